"""The plots that the notebooks show. Each returns a matplotlib `Figure`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from gemma_lora.evaluation import Evaluation
from gemma_lora.lora import lora_layers
from gemma_lora.memory import DEVICES, MemoryBudget, Parts
from gemma_lora.progress import BASE, CUT, TUNED, finished, plot_losses


def plot_lengths(lengths: Sequence[int], *, sequence_length: int | None = None) -> Figure:
    """Show how many tokens the records have (before any cut), and what share is longer than a sequence length."""
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        raise ValueError("There are no lengths to plot.")
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.hist(lengths, bins=min(40, max(1, int(np.ptp(lengths)))), color=TUNED, alpha=0.8)
    axes.set(xlabel="tokens in a record", ylabel="records")
    title = f"{lengths.size:,} records: median {np.median(lengths):.0f} tokens, longest {lengths.max():,}"
    if sequence_length is not None:
        axes.axvline(
            sequence_length, color=CUT, linestyle="--", label=f"sequence length {sequence_length}"
        )
        axes.legend(frameon=False)
        title += f"; {np.mean(lengths > sequence_length):.1%} longer than {sequence_length}"
    return finished(figure, axes, title)


def plot_history(history) -> Figure:
    """Show what `fit` returned: training loss per real token along the way, and held-out loss after each epoch."""
    epochs = np.arange(1.0, len(history.history["loss"]) + 1)
    curve = getattr(history, "curve", None) or [*zip(epochs, history.history["loss"], strict=True)]
    epochs[-1] = curve[-1][0]  # a run that was stopped ended within an epoch
    return plot_losses(curve, [*zip(epochs, history.history.get("val_loss", []), strict=False)])


def plot_lora(model, path: str | None = None) -> Figure:
    """Show an adapter to scale: a frozen weight W, the factors A and B, and the update A B that they make.

    Args:
        model: A model with adapters.
        path: The layer, such as "decoder_block_0/attention/query"; None for the first that has an adapter. Of a layer
            with several heads the first is shown.
    """
    layers = lora_layers(model)
    if not layers or (path is not None and path not in layers):
        raise ValueError(
            f"path is a layer that has an adapter, one of {[*layers]}. Received: {path!r}"
        )
    path = path or next(iter(layers))
    layer = layers[path]
    w, a, b = (
        np.asarray(v, "float32") for v in (layer._kernel, layer.lora_kernel_a, layer.lora_kernel_b)
    )
    w, a = (matrix[0] if matrix.ndim == 3 else matrix for matrix in (w, a))
    parts = {
        "W": (w, "frozen"),
        "A": (a, "trained"),
        "B": (b, "trained"),
        "A B": (a @ b, "the update"),
    }
    figure, panels = plt.subplots(1, 4, figsize=(7, 3.6), layout="constrained")
    for axes, (name, (part, role)) in zip(panels, parts.items(), strict=True):
        rows, columns = part.shape
        limit = np.abs(part).max() or 1
        axes.imshow(part, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.add_patch(plt.Rectangle((-0.5, -0.5), columns, rows, fill=False, linewidth=0.8))
        axes.set(xlim=(-1, w.shape[1]), ylim=(w.shape[0], -1))  # one scale for all
        axes.axis("off")
        size = f"up to {limit:.2g}" if part.any() else "all zero"
        axes.set_title(f"{name}: {rows:,} × {columns:,}\n{role}, {size}", fontsize=9)
    figure.suptitle(f"{path}: W + {layer.lora_alpha / layer.lora_rank:g} · A B", fontsize=11)
    plt.close(figure)
    return figure


def plot_before_after(before: Evaluation, after: Evaluation, *, title: str = "") -> Figure:
    """Show the share of right answers before and after tuning, by category, with 95 % intervals."""
    if not before.asked or set(before.asked) != set(after.asked):
        raise ValueError(
            f"before and after asked the same. Received: {[*before.asked]} and {[*after.asked]}"
        )
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    places = np.arange(len(before.asked))
    for shift, result, label, color in (
        (-0.2, before, "before", BASE),
        (0.2, after, "after", TUNED),
    ):
        shares = np.array([result.share(name) for name in before.asked])
        low, high = np.array([result.interval(name) for name in before.asked]).T
        reach = [shares - low, high - shares]
        bars = axes.bar(
            places + shift,
            shares,
            0.38,
            label=label,
            color=color,
            yerr=reach,
            ecolor="#5f6368",
            capsize=3,
        )
        axes.bar_label(bars, fmt=lambda share: f"{share:.1%}", padding=2)
    axes.set(
        xticks=places,
        xticklabels=list(before.asked),
        ylim=(0, 1.2),
        yticks=[0, 0.5, 1],
        ylabel="share right",
    )
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return finished(
        figure, axes, title or "Answers right, word for word (whiskers: 95 % intervals)"
    )


def plot_bars(values: Mapping[str, float], *, title: str = "", form: str = "{:.2f}") -> Figure:
    """Show named numbers as bars, from top to bottom, each with its value written by the format `form`."""
    if not values:
        raise ValueError("There are no values to plot.")
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(values)), layout="constrained")
    bars = axes.barh(list(values), list(values.values()), 0.7, color=TUNED)
    axes.bar_label(bars, fmt=form, padding=3)
    axes.invert_yaxis()
    axes.set(xticks=[], xlim=(0, 1.12 * max(values.values()) or 1))
    axes.spines["bottom"].set_visible(False)
    return finished(figure, axes, title)


def plot_memory(budget: MemoryBudget) -> Figure:
    """Show what training and answering need, part by part, beside what usual devices have."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    here = "here, compiled" if budget.compiled else "estimate"
    bars = {
        f"training\n({here})": budget.parts,
        f"answering\n({here})": _answering(budget.parts, budget.generation),
    }
    if budget.compiled:
        bars["training\n(GPU, estimate)"] = budget.estimate
    left = np.zeros(len(bars))
    for part, color in _PARTS.items():
        sizes = np.array([getattr(parts, part) / 2**30 for parts in bars.values()])
        axes.barh([*bars], sizes, 0.7, left=left, label=part, color=color)
        left += sizes
    for y, total in enumerate(left):
        text = axes.annotate(
            f"{total:.3g} GiB", (total, y), xytext=(4, 0), textcoords="offset points", va="center"
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.invert_yaxis()
    shown = {name: size for name, size in DEVICES.items() if size < 2 * left.max()}
    axes.set_xlim(0, max([1.15 * left.max(), *(1.05 * size for size in shown.values())]))
    for device, size in shown.items():
        axes.axvline(size, color=CUT, linestyle="--")
        axes.annotate(
            device,
            (size, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color=CUT,
        )
    axes.set_xlabel("GiB")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    need = budget.need
    title = f"{need.preset}, {need.dtype}, {need.batch_size} x {need.sequence_length} tokens\n"
    return finished(figure, axes, title)


def _answering(parts: Parts, generation: int) -> Parts:
    """Answering needs the weights and adapters; the rest of its peak are activations."""
    kept = replace(parts, gradients=0, optimizer=0, activations=0, logits=0)
    return replace(kept, activations=generation - kept.total)


_PARTS = dict(weights=BASE, adapters="#1a73e8", gradients="#0b3d91", optimizer="#7b1fa2")
_PARTS |= dict(activations="#34a853", logits="#e8710a")
