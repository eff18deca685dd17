"""The plots that the notebooks show.

Each function takes results and returns a closed matplotlib `Figure`, which a notebook
shows and a script can save. Nothing is measured here, and nothing is printed. The loss
curve, which is also drawn during a run, is in `progress`, with the look of all figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from gemma_lora.lora import lora_layers
from gemma_lora.memory import DEVICES
from gemma_lora.progress import BASE, CUT, INK, TUNED, finished, plot_losses

if TYPE_CHECKING:
    import keras
    from keras_hub.models import CausalLM
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gemma_lora.evaluation import Evaluation
    from gemma_lora.memory import MemoryBudget, Parts

GIB = 2**30
WIDTH = 7  # inches: what a notebook's page has room for


def plot_lengths(lengths: Sequence[int], *, sequence_length: int | None = None) -> Figure:
    """Show how many tokens the records have, and what a sequence length would cut.

    Args:
        lengths: Tokens in each record, before any cut.
        sequence_length: A limit to mark, in tokens; None for no mark.

    Returns:
        A histogram. Its title has the median, the longest and the share over the limit.

    Raises:
        ValueError: There are no lengths.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        raise ValueError("There are no lengths to plot. Pass one number a record.")
    figure, axes = _new_figure(height=3)
    bins = np.clip(np.ptp(lengths), 1, 40).astype(int)
    axes.hist(lengths, bins=bins, color=TUNED, alpha=0.8)
    axes.set(xlabel="tokens in a record", ylabel="records")
    title = f"{lengths.size:,} records: median {np.median(lengths):.0f} tokens"
    title += f", longest {lengths.max():,}"
    if sequence_length is not None:
        label = f"sequence length {sequence_length}"
        axes.axvline(sequence_length, color=CUT, linestyle="--", label=label)
        axes.legend(frameon=False)
        title += f"; {np.mean(lengths > sequence_length):.1%} longer than {sequence_length}"
    return finished(figure, axes, title)


def plot_history(history: keras.callbacks.History) -> Figure:
    """Show what `fit` returned: training loss on the way, held-out loss per epoch.

    Args:
        history: A Keras `History`. One of `fit` has about twenty points an epoch; any
            other has one.

    Returns:
        A line for training and dots for held-out loss, in nats a token.
    """
    losses = history.history["loss"]
    ends_of_epochs = np.arange(1.0, len(losses) + 1)
    curve = getattr(history, "curve", None) or list(zip(ends_of_epochs, losses, strict=True))
    # A run that was stopped ended within an epoch: its held-out loss belongs there.
    last_epoch_done, _ = curve[-1]
    ends_of_epochs[-1] = last_epoch_done
    held_out_losses = history.history.get("val_loss", [])
    return plot_losses(curve, list(zip(ends_of_epochs, held_out_losses, strict=False)))


def plot_lora(model: CausalLM, path: str | None = None) -> Figure:
    """Show an adapter to scale: a frozen weight W, factors A and B, and their product.

    Args:
        model: A model with adapters.
        path: The layer, such as "decoder_block_0/attention/query"; None for the first
            that has an adapter. Of a layer with several heads, the first head is shown.

    Returns:
        Four panels of one scale. Red is below zero, blue above; each panel's title says
        how far its colours reach.

    Raises:
        ValueError: No layer of this path has an adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has no adapters to draw. Call gl.enable_lora(model) first.")
    if path is not None and path not in layers:
        raise ValueError(
            f"path is a layer that has an adapter, one of {[*layers]}. Received: {path!r}"
        )
    path = path or next(iter(layers))
    layer = layers[path]
    # private: the kernel by itself; `layer.kernel` is W + A B
    w = _first_head(layer._kernel)
    a = _first_head(layer.lora_kernel_a)
    b = _first_head(layer.lora_kernel_b)
    panels = [
        ("W", w, "frozen"),
        ("A", a, "trained"),
        ("B", b, "trained"),
        ("A B", a @ b, "the update"),
    ]
    figure, all_axes = plt.subplots(1, 4, figsize=(WIDTH, 3.6), layout="constrained")
    for axes, (name, matrix, role) in zip(all_axes, panels, strict=True):
        reach = _draw_matrix(axes, matrix)
        rows, columns = matrix.shape
        axes.set_title(f"{name}: {rows:,} × {columns:,}\n{role}, {reach}", fontsize=9)
        # The same limits in each panel: a thin factor is drawn as thin as it is.
        axes.set(xlim=(-1, w.shape[1]), ylim=(w.shape[0], -1))
    figure.suptitle(f"{path}: W + {layer.lora_alpha / layer.lora_rank:g} · A B", fontsize=11)
    return finished(figure)


def plot_before_after(before: Evaluation, after: Evaluation, *, title: str = "") -> Figure:
    """Show the share of right answers before and after tuning, by category.

    Args:
        before: What `evaluate` measured of the base model.
        after: The same of the tuned model, on the same questions.
        title: Above the figure; "" for one that says what is counted.

    Returns:
        Two bars for each category, with whiskers for the 95 % intervals.

    Raises:
        ValueError: No questions were asked, or not the same categories.
    """
    if not before.asked or set(before.asked) != set(after.asked):
        raise ValueError(
            f"before and after asked the same. Received: {[*before.asked]} and {[*after.asked]}"
        )
    categories = list(before.asked)
    figure, axes = _new_figure(height=3.2)
    _draw_shares(axes, before, categories, label="before", color=BASE, shift=-0.2)
    _draw_shares(axes, after, categories, label="after", color=TUNED, shift=0.2)
    axes.set(xticks=range(len(categories)), xticklabels=categories)
    axes.set(ylim=(0, 1.2), yticks=[0, 0.5, 1], ylabel="share right")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    title = title or "Answers right, word for word (whiskers: 95 % intervals)"
    return finished(figure, axes, title)


def plot_bars(values: Mapping[str, float], *, title: str = "", form: str = "{:.2f}") -> Figure:
    """Show named numbers as bars, from top to bottom, each with its value beside it.

    Args:
        values: A number, zero or more, for each name.
        title: Above the figure.
        form: How a value is written, such as "{:.0%}".

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("There are no values to plot. Pass a dict of names and numbers.")
    figure, axes = _new_figure(height=0.6 + 0.32 * len(values))
    bars = axes.barh(list(values), list(values.values()), 0.7, color=TUNED)
    axes.bar_label(bars, fmt=form, padding=3)
    axes.invert_yaxis()
    # Room for the labels; an axis needs a length even if all values are zero.
    axes.set(xticks=[], xlim=(0, 1.12 * max(values.values()) or 1))
    axes.spines["bottom"].set_visible(False)
    return finished(figure, axes, title)


def plot_memory(budget: MemoryBudget) -> Figure:
    """Show what training and answering need, part by part, beside usual devices.

    Args:
        budget: What `memory_budget` returned.

    Returns:
        A stacked bar, in GiB, for each use. If the compiler measured this machine, one
        more bar shows the estimate for a GPU. Dashed lines mark what usual GPUs have.
    """
    source = "here, compiled" if budget.compiled else "estimate"
    bars = {
        f"training\n({source})": budget.parts,
        f"answering\n({source})": _parts_of_answering(budget.parts, budget.generation),
    }
    if budget.compiled:
        bars["training\n(GPU, estimate)"] = budget.estimate

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    ends = np.zeros(len(bars))
    for part, color in PART_COLORS.items():
        sizes = np.array([getattr(parts, part) / GIB for parts in bars.values()])
        axes.barh(list(bars), sizes, 0.7, left=ends, label=part, color=color)
        ends += sizes
    for y, total in enumerate(ends):
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{total:.3g} GiB", (total, y), **beside)
    axes.invert_yaxis()

    longest = ends.max()
    devices = {name: size for name, size in DEVICES.items() if size < 2 * longest}
    axes.set_xlim(0, max([1.15 * longest, *(1.05 * size for size in devices.values())]))
    for device, size in devices.items():
        axes.axvline(size, color=CUT, linestyle="--")
        at_the_top = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(device, (size, 1), color=CUT, **at_the_top)
    axes.set_xlabel("GiB")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    need = budget.need
    # The line break leaves room for the devices' names, which stand above the axes.
    title = f"{need.preset}, {need.dtype}, {need.batch_size} x {need.sequence_length} tokens\n"
    return finished(figure, axes, title)


PART_COLORS = {
    "weights": BASE,
    "adapters": "#1a73e8",
    "gradients": "#8ab4f8",
    "optimizer": "#a142f4",
    "activations": "#34a853",
    "logits": "#e8710a",
}


def _new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the usual width, in inches, with one pair of axes."""
    return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def _first_head(weight) -> np.ndarray:
    """A weight as a matrix; of one with a dimension for heads, the first head's."""
    matrix = np.asarray(weight, "float32")
    return matrix[0] if matrix.ndim == 3 else matrix


def _draw_matrix(axes: Axes, matrix: np.ndarray) -> str:
    """Draw a framed matrix, red below zero, blue above; return how far it reaches."""
    rows, columns = matrix.shape
    largest = np.abs(matrix).max()
    limit = largest or 1
    axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    frame = plt.Rectangle((-0.5, -0.5), columns, rows, fill=False, linewidth=0.8, edgecolor=INK)
    axes.add_patch(frame)
    axes.axis("off")
    return f"up to {largest:.2g}" if largest else "all zero"


def _draw_shares(
    axes: Axes, result: Evaluation, categories: list[str], *, label: str, color: str, shift: float
) -> None:
    """Draw a bar with its interval for each category, `shift` beside its tick."""
    shares = np.array([result.share(name) for name in categories])
    low, high = np.array([result.interval(name) for name in categories]).T
    whiskers = [shares - low, high - shares]
    places = np.arange(len(categories)) + shift
    style = {"label": label, "color": color, "ecolor": INK, "capsize": 3}
    bars = axes.bar(places, shares, 0.38, yerr=whiskers, **style)
    axes.bar_label(bars, fmt=lambda share: f"{share:.1%}", padding=2)


def _parts_of_answering(parts: Parts, generation: int) -> Parts:
    """Split the peak of answering: weights, adapters, and the rest as activations."""
    kept = replace(parts, gradients=0, optimizer=0, activations=0, logits=0)
    return replace(kept, activations=generation - kept.total)
