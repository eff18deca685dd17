"""Show a run's progress: a live plot in notebooks, a bar in terminals, lines in logs.

`LossCurve` collects the training loss without making the device wait. `Progress` shows
it. `counted` shows how far other work is, such as questions to answer. The last part
draws: the colours and the finish that every figure of the package shares.
"""

import base64
import collections
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from tqdm import tqdm

from gemma_lora.batches import Batches
from gemma_lora.loss import averages

BASE = "#9aa5b1"
TUNED = "#1a73e8"
CUT = "#d93025"
# As legible on white as on near-black.
INK = "#767b82"
# Of the loss curve, an epoch.
POINTS = 20

# Seconds from one update to the next.
_PAUSE = {"notebook": 0.5, "terminal": 0.2, "log": 60.0}
_BAR = "{desc} {bar:12} {n_fmt}/{total_fmt}{postfix}, {remaining} left"
_COUNTED = "{desc} {bar:12} {n_fmt}/{total_fmt}, {remaining} left"
# Seconds before a bar shows.
_DELAY = 1.0
_SHOWN_AS = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "val_loss": "held-out loss {:.4f}",
    "val_accuracy": "held-out accuracy {:.1%}",
}


class LossCurve:
    """Collect the loss of each twentieth of an epoch; stop a run that diverged.

    A step leaves its sums on the device, and reading them would wait for it. So we keep
    the sums of the last few steps, and read those that must be finished by now.

    Args:
        batches: The run's batches.
        saved: What `saved` returned in another process.

    Attributes:
        points: (epochs done, loss per token since the point before) of complete epochs.
        latest: The epoch's mean loss, a few steps ago; None at its beginning.
    """

    def __init__(self, batches: Batches, saved: list | None = None):
        complete, current = saved or ([], {})
        self.points = [tuple(point) for point in complete]
        self.latest: float | None = None
        self._batches = batches
        self._epoch = 0
        self._step = 0
        self._steps = 1
        # Sums since the epoch began, by the step after which a point is due.
        self._sums = {int(step): sums for step, sums in current.items()}
        self._unread = collections.deque()

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch at the step that `batches` begins with."""
        self._epoch = epoch
        self._step = self._batches.first
        self._steps = self._batches.first + len(self._batches)
        self.latest = None
        self._unread.clear()
        if self._step == 0:
            self._sums = {}

    def after_step(self, sums) -> None:
        """Take a step's sums since the epoch began, as in `TrainState`."""
        step = self._step
        self._step += 1
        if (step + 1) * POINTS // self._steps > step * POINTS // self._steps:
            self._sums[step] = sums
        self._unread.append((step, sums))
        if len(self._unread) >= 16:
            self._read(8)

    def end_epoch(self) -> None:
        """Read what is left, and close the epoch's part of the curve."""
        self._read(len(self._unread))
        self.points = self.so_far()

    def so_far(self) -> list[tuple[float, float]]:
        """Return all points, those of the current epoch included."""
        complete = [point for point in self.points if point[0] <= self._epoch]
        return [*complete, *self._current_points()]

    def saved(self, epoch: int, step: int) -> list:
        """Return what another curve needs to go on from there, in JSON's types."""
        complete = [point for point in self.points if point[0] <= epoch]
        current = {at: list(map(float, sums)) for at, sums in self._sums.items() if at < step}
        return [complete, current]

    def _current_points(self) -> Iterator[tuple[float, float]]:
        losses_before = tokens_before = 0.0
        for step, sums in sorted(self._sums.items()):
            losses, _, tokens = map(float, sums)
            loss = (losses - losses_before) / max(tokens - tokens_before, 1.0)
            yield self._epoch + (step + 1) / self._steps, loss
            losses_before = losses
            tokens_before = tokens

    def _read(self, count: int) -> None:
        for _ in range(count):
            step, sums = self._unread.popleft()
            self.latest = averages(sums)["loss"]
            if not np.isfinite(self.latest):
                rows = ", ".join(map(str, self._batches.rows(step)[:8]))
                raise FloatingPointError(
                    f"The loss is {self.latest} since step {step + 1} of epoch {self._epoch + 1}, "
                    f"on the records {rows}. The adapters are as they were before this call. Try "
                    "a lower learning_rate; if that does not help, dtype='float32', and look at "
                    "these records."
                )


class Progress:
    """Show epoch, steps, real tokens (no padding) a second, loss, and the time left.

    The first step of an epoch may wait for the compiler, so the rate leaves it out.

    Args:
        batches: The run's batches, for the number of steps and of tokens.
        curve: The run's `LossCurve`.
        epochs: Epochs of the run.
        verbose: "auto" or 1 shows progress as it suits the place, 2 a line after each
            epoch, 0 nothing.
    """

    def __init__(self, batches: Batches, curve: LossCurve, *, epochs: int, verbose: int | str):
        self._batches = batches
        self._curve = curve
        self._epochs = epochs
        self._silent = verbose == 0
        self._place = _place() if verbose in ("auto", 1) else "log"
        self._pause = _PAUSE[self._place] if verbose in ("auto", 1) else float("inf")
        self._held_out: list[tuple[float, float]] = []
        # What a notebook's page shows; and when its picture was drawn, and how long
        # that took.
        self._lines: list[str] = []
        self._pages: dict = {}
        self._drawn_at = 0.0
        self._drawing_took = 0.0

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch at the step that `batches` begins with."""
        self._epoch = epoch
        self._tokens_of_step = self._batches.tokens(learned=False)
        self._tokens_done = 0
        self._began = self._shown_at = time.monotonic()
        self._first_step_ended = self._last_step_ended = None
        in_terminal = self._place == "terminal" and not self._silent
        self._bar = tqdm(
            total=len(self._tokens_of_step),
            initial=self._batches.first,
            desc=f"Epoch {epoch + 1}/{self._epochs}",
            bar_format=_BAR,
            ascii="─━",
            mininterval=self._pause,
            leave=False,
            # Only a terminal can redraw a line. Elsewhere we ask the bar for its text.
            file=sys.stdout if in_terminal else io.StringIO(),
        )

    def after_step(self) -> None:
        """Count a step, and show how things stand if it is time to."""
        now = self._last_step_ended = time.monotonic()
        if self._first_step_ended is None:
            self._first_step_ended = now
            self._bar.unpause()
        else:
            self._tokens_done += self._tokens_of_step[self._bar.n]
        loss = self._curve.latest
        shown = [f"{self._rate():,.0f} real tokens/s"] if self._tokens_done else []
        shown += [f"loss {loss:.4f}"] if loss is not None else []
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()
        due = now - self._shown_at >= self._pause
        if due and not self._silent and self._place != "terminal":
            self._shown_at = now
            self._show(str(self._bar))
            # Drawing takes a thirtieth of the time at most.
            if self._place == "notebook" and now - self._drawn_at > 30 * self._drawing_took:
                self._draw()

    def end_epoch(self, logs: dict[str, float]) -> None:
        """Show an epoch's results; `logs` are Keras's."""
        done = self._bar.n
        steps = len(self._tokens_of_step)
        self._bar.close()
        if self._silent:
            return
        if "val_loss" in logs:
            self._held_out.append((self._epoch + done / steps, logs["val_loss"]))
        counted = f"{done}" if done == steps else f"{done} of {steps}"
        # Without the validation that followed the last step.
        seconds = (self._last_step_ended or self._began) - self._began
        parts = [f"Epoch {self._epoch + 1}/{self._epochs}: {counted} steps in {seconds:.1f} s"]
        if self._tokens_done:
            parts.append(f"{self._rate():,.0f} real tokens/s")
        parts += [text.format(logs[key]) for key, text in _SHOWN_AS.items() if key in logs]
        self._show(", ".join(parts))
        self._lines.append(", ".join(parts))
        if self._place == "notebook":
            self._draw()

    def _rate(self) -> float:
        """Real tokens a second since the first step of the epoch ended."""
        return self._tokens_done / max(self._last_step_ended - self._first_step_ended, 1e-9)

    def _show(self, line: str) -> None:
        if self._place == "notebook":
            self._update_page("text", {"text/plain": "\n".join([*self._lines, line])})
        else:
            print(line, flush=True)

    def _draw(self) -> None:
        start = time.monotonic()
        figure = plot_losses(self._curve.so_far(), self._held_out, epochs=self._epochs)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=figure.dpi, bbox_inches="tight")
        encoded = base64.b64encode(png.getvalue()).decode()
        data = {"image/png": encoded, "text/plain": "loss per real token"}
        self._update_page("picture", data)
        self._drawn_at = time.monotonic()
        self._drawing_took = self._drawn_at - start

    def _update_page(self, name: str, data: dict) -> None:
        from IPython.display import display

        if name in self._pages:
            self._pages[name].update(data, raw=True)
        else:
            self._pages[name] = display(data, raw=True, display_id=True)


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with how many more are done; a bar shows it meanwhile.

    Work that ends within a second shows nothing. After longer work nothing is left.
    """
    place = _place()
    in_terminal = place == "terminal"
    bar = tqdm(
        total=total,
        desc=what,
        bar_format=_COUNTED,
        ascii="─━",
        leave=False,
        delay=_DELAY,
        file=sys.stdout if in_terminal else io.StringIO(),
    )
    shown = None
    shown_at = time.monotonic()

    def count(more: int) -> None:
        nonlocal shown, shown_at
        bar.update(more)
        now = time.monotonic()
        if in_terminal or now - shown_at < max(_DELAY, _PAUSE[place]) or bar.n >= total:
            return
        shown_at = now
        if place == "log":
            print(bar, flush=True)
            return
        from IPython.display import display

        # A page that is not live, and a test of its outputs, see the empty one.
        shown = shown or display({}, raw=True, display_id=True)
        shown.update({"text/plain": str(bar)}, raw=True)

    try:
        yield count
    finally:
        bar.close()
        if shown is not None:
            # nbconvert would warn of an output without any text.
            shown.update({"text/plain": ""}, raw=True)


def _place() -> str:
    """Where the output goes: "notebook", "terminal" or "log"."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is not None:
        return "notebook"
    return "terminal" if sys.stdout.isatty() else "log"


def plot_losses(
    training: Sequence, held_out: Sequence = (), *, epochs: float | None = None
) -> Figure:
    """Show losses along a run.

    Args:
        training: Pairs of (epochs done, loss in nats a token).
        held_out: The same, measured on held-out records after an epoch.
        epochs: Where the axis ends; None for the last point.
    """
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    points = training or [(np.nan, np.nan)]
    axes.plot(*zip(*points, strict=True), marker=".", label="training", color=BASE)
    if held_out:
        label = "held out, after the epoch"
        axes.plot(*zip(*held_out, strict=True), "o", label=label, color=TUNED)
    axes.set(xlabel="epochs", ylabel="loss (nats a token)", ylim=(0, None))
    axes.set_xlim(0, 1.02 * epochs if epochs else None)
    axes.legend(frameon=False)
    return finished(figure, axes, "Loss per real token")


def finished(figure: Figure, axes=None, title: str = "") -> Figure:
    """Give a figure the look that all share, and close it.

    A figure has no background, and its ink is a mid grey, so it suits light and dark
    pages. A notebook shows what a cell returns; an open figure would show twice.
    """
    if axes is not None:
        axes.set_title(title, loc="left", fontsize=11)
    figure.set_facecolor("none")
    for panel in figure.axes:
        panel.set_facecolor("none")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(INK)
        panel.tick_params(colors=INK)
    for text in figure.findobj(Text):
        # What has a colour of its own, such as the name of a device, keeps it.
        if text.get_color() == plt.rcParams["text.color"]:
            text.set_color(INK)
    plt.close(figure)
    return figure
