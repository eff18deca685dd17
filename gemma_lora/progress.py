"""How a run goes on: its loss curve; a live picture in a notebook, a bar in a terminal, a line at times in a log."""

import collections
import shutil
import sys
import time
from collections.abc import Iterator, Sequence

import keras
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from gemma_lora.batches import Batches

BASE = "#9aa5b1"
TUNED = "#1a73e8"
CUT = "#d93025"
INK = "#767b82"  # as legible on white as on near-black
_PAUSE = {"notebook": 0.5, "terminal": 0.2, "log": 60.0}  # seconds from one line to the next


class Progress(keras.callbacks.Callback):
    """Shows epoch, steps, real tokens (no padding) a second, loss per token that counts, and the time left.

    The first step of an epoch may wait for the compiler, and is left out of the rate, as is the validation.

    Args:
        curve: The `LossCurve` of the run.
        verbose: "auto" or 1 shows progress as it suits the place; 2 a line after each epoch; 0 nothing.
    """

    def __init__(self, batches: Batches, curve, *, epochs: int, verbose):
        super().__init__()
        self._batches, self._curve, self._epochs = batches, curve, epochs
        self._place = _place() if verbose in ("auto", 1) else "log"
        self._pause = _PAUSE[self._place] if verbose in ("auto", 1) else float("inf")
        self._silent = verbose == 0
        self._lines, self._pages, self._picture_cost, self._pictured = [], {}, 0.0, 0.0
        self._start, self._held_out = None, []

    def on_epoch_begin(self, epoch, logs=None):
        self._per_step = self._batches.tokens(learned=False)
        self._epoch, self._step, self._done = epoch, self._batches.first, 0
        self._began = self._shown = time.monotonic()
        self._start = self._ended = None

    def on_test_begin(self, logs=None):
        self._ended = time.monotonic()  # the validation after an epoch is none of its steps

    def after_step(self) -> None:
        """Count a step, and show how things stand if it is time to."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        else:
            self._done += self._per_step[self._step]
        self._step += 1
        if now - self._shown >= self._pause and not self._silent:
            self._shown = now
            self._show(self._line(now))
            if self._place == "notebook" and now - self._pictured > 30 * self._picture_cost:
                self._picture()

    def on_epoch_end(self, epoch, logs=None):
        if self._silent:
            return
        now, logs = self._ended or time.monotonic(), logs or {}
        whole = self._step == len(self._per_step)
        text = f"Epoch {epoch + 1}/{self._epochs}: {self._step if whole else f'{self._step} of {len(self._per_step)}'} "
        text += f"steps in {now - self._began:.1f} s"
        if rate := self._rate(now):
            text += f", {rate:,.0f} real tokens/s"
        names = {
            "loss": "loss",
            "accuracy": "accuracy",
            "val_loss": "held-out loss",
            "val_accuracy": "held-out accuracy",
        }
        for key, name in names.items():
            if key in logs:
                text += (
                    f", {name} {logs[key]:.4f}" if "loss" in key else f", {name} {logs[key]:.1%}"
                )
        if "val_loss" in logs:
            self._held_out.append((epoch + self._step / len(self._per_step), logs["val_loss"]))
        self._show(text, last=True)
        if self._place == "notebook":
            self._picture()

    def _rate(self, now: float) -> float:
        return self._done / max(now - (self._start or now), 1e-9)

    def _line(self, now: float) -> str:
        steps, rate = len(self._per_step), self._rate(now)
        filled = 12 * self._step // steps
        text = f"Epoch {self._epoch + 1}/{self._epochs} {'━' * filled}{'─' * (12 - filled)} {self._step}/{steps}"
        if rate:
            left = self._per_step[self._step :].sum() + self._per_step.sum() * (
                self._epochs - self._epoch - 1
            )
            minutes, seconds = divmod(int(left / rate), 60)
            loss = f", loss {self._curve.latest:.4f}" if self._curve.latest is not None else ""
            text += f", {rate:,.0f} real tokens/s{loss}, {minutes}:{seconds:02} left"
        return text

    def _show(self, line: str, *, last: bool = False) -> None:
        if self._place == "notebook":
            self._page("text", {"text/plain": "\n".join([*self._lines, line])})
            self._lines += [line] * last
        elif self._place == "terminal":
            shown = line if last else line[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{shown}", end="\n" * last, flush=True)
        else:
            print(line, flush=True)

    def _picture(self) -> None:
        start = time.monotonic()
        from IPython.core.pylabtools import print_figure

        figure = plot_losses(self._curve.so_far(), self._held_out, epochs=self._epochs)
        png = print_figure(figure, "png", base64=True)
        self._page("picture", {"image/png": png, "text/plain": "loss per real token"})
        self._pictured = time.monotonic()
        self._picture_cost = self._pictured - start  # drawing takes a thirtieth of the time at most

    def _page(self, name: str, data: dict) -> None:
        if name in self._pages:
            self._pages[name].update(data, raw=True)
        else:
            from IPython.display import display

            self._pages[name] = display(data, raw=True, display_id=True)


def _place() -> str:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is not None:
        return "notebook"
    return "terminal" if sys.stdout.isatty() else "log"


class LossCurve(keras.callbacks.Callback):
    """Collect the training loss of each twentieth of an epoch, per token that counts; stop where it is not a number.

    Keras logs the mean since the epoch began; the difference of two such sums is the loss in between.
    """

    def __init__(self, batches: Batches):
        super().__init__()
        self.points, self._means, self._batches = [], {}, batches
        self._step, self._recent = 0, collections.deque()
        self.latest: float | None = None  # the epoch's mean, some steps ago

    def on_epoch_begin(self, epoch, logs=None):
        if self._batches.epoch != epoch:
            self._batches.start(epoch)
        if not self._batches.first:
            self._means = {}
        self._step, self._epoch, self.latest = self._batches.first, epoch, None
        self._recent.clear()
        self._tokens = np.cumsum(self._batches.tokens())

    def after_step(self, logs: dict) -> None:
        """Take the loss of a step, without waiting for it."""
        step, steps, self._step = self._step, len(self._tokens), self._step + 1
        if (step + 1) * 20 // steps > step * 20 // steps:
            self._means[step] = logs["loss"]  # still on the device
        self._recent.append((step, logs["loss"]))
        if len(self._recent) >= 16:
            self._look(8)  # those have been computed by now, so nobody waits

    def on_epoch_end(self, epoch, logs=None):
        self._look(len(self._recent))
        self.points = self.so_far()

    def so_far(self) -> list[tuple[float, float]]:
        """The points, those of the epoch at hand included."""
        return [
            *(point for point in self.points if point[0] <= self._epoch),
            *self._measured(self._epoch),
        ]

    def state(self, epoch: int, step: int) -> list:
        """What `restore` takes to go on at a step of an epoch, in JSON's types."""
        done = [point for point in self.points if point[0] <= epoch]
        return [done, {at: float(mean) for at, mean in self._means.items() if at < step}]

    def restore(self, state: list) -> None:
        """Go on from a `state` of another process."""
        self.points, means = [tuple(point) for point in state[0]], state[1]
        self._means = {int(step): mean for step, mean in means.items()}

    def _measured(self, epoch: int) -> Iterator[tuple[float, float]]:
        old_total = old_tokens = 0.0
        for step, mean in sorted(self._means.items()):
            tokens = float(self._tokens[step])
            total = float(mean) * tokens
            loss = (total - old_total) / max(tokens - old_tokens, 1.0)
            yield epoch + (step + 1) / len(self._tokens), loss
            old_total, old_tokens = total, tokens

    def _look(self, count: int) -> None:
        for step, mean in [self._recent.popleft() for _ in range(count)]:
            self.latest = float(mean)
            if not np.isfinite(self.latest):
                rows = ", ".join(map(str, self._batches.rows(step)[:8]))
                raise FloatingPointError(
                    f"The loss is {self.latest} since step {step + 1} of epoch {self._batches.epoch + 1}, "
                    f"on the records {rows}. The adapters are as they were before this call. Try a lower "
                    "learning_rate; if that does not help, dtype='float32', and look at these records."
                )


def plot_losses(
    training: Sequence, held_out: Sequence = (), *, epochs: float | None = None
) -> Figure:
    """Show losses in nats a token, pairs of (epochs done, loss), on an axis of as many epochs."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(
        *zip(*(training or [(np.nan, np.nan)]), strict=True),
        marker=".",
        label="training",
        color=BASE,
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", label="held out, after the epoch", color=TUNED)
    axes.set(
        xlabel="epochs",
        ylabel="loss (nats a token)",
        xlim=(0, epochs and 1.02 * epochs),
        ylim=(0, None),
    )
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
