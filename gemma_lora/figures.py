"""The plots that the notebooks show. Each returns a matplotlib `Figure`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

_BASE, _TUNED, _CUT = "#9aa5b1", "#1a73e8", "#d93025"


def plot_lengths(lengths: Sequence[int], *, sequence_length: int | None = None) -> Figure:
    """Show how many tokens the records have (before any cut), and what share of them a sequence length cuts."""
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        raise ValueError("There are no lengths to plot.")
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.hist(lengths, bins=min(40, max(1, int(np.ptp(lengths)))), color=_TUNED, alpha=0.8)
    axes.set(xlabel="tokens in a record", ylabel="records")
    title = f"{lengths.size:,} records: median {np.median(lengths):.0f} tokens, longest {lengths.max():,}"
    if sequence_length is not None:
        axes.axvline(sequence_length, color=_CUT, linestyle="--", label=f"sequence length {sequence_length}")
        axes.legend(frameon=False)
        title += f"; {np.mean(lengths > sequence_length):.1%} cut"
    return _finished(figure, axes, title)


def plot_history(history) -> Figure:
    """Show training and held-out loss per real token, from what `fit` returned."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    epochs = np.arange(1, len(history.history["loss"]) + 1)
    for name, label, color in (("loss", "training", _BASE), ("val_loss", "held out", _TUNED)):
        if name in history.history:
            axes.plot(epochs, history.history[name], marker="o", label=label, color=color)
    axes.set(xlabel="epoch", ylabel="loss (nats a token)", xticks=epochs)
    axes.legend(frameon=False)
    return _finished(figure, axes, "Loss per real token")


def plot_before_after(before: Mapping[str, float], after: Mapping[str, float], *, title: str = "") -> Figure:
    """Show shares from 0 to 1, before and after tuning, as a pair of bars for each label."""
    if not before or set(before) != set(after):
        raise ValueError(f"before and after have the same labels. Received: {sorted(before)} and {sorted(after)}")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    places = np.arange(len(before))
    for shift, shares, label, color in ((-0.2, before, "before", _BASE), (0.2, after, "after", _TUNED)):
        bars = axes.bar(places + shift, [shares[name] for name in before], 0.38, label=label, color=color)
        axes.bar_label(bars, fmt=lambda share: f"{share:.1%}", padding=2)
    axes.set(xticks=places, xticklabels=list(before), ylim=(0, 1.15), yticks=[0, 0.5, 1], ylabel="share right")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _finished(figure, axes, title or "Answers right, word for word")


def _finished(figure: Figure, axes, title: str) -> Figure:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # the notebook shows what a cell returns; left open, it would show twice
    return figure
