"""What a run shows, in each place it can run in."""

import io
import os
import re
import signal
import sys

import keras
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import gemma_lora as gl
from gemma_lora import progress
from gemma_lora.progress import LossCurve, Progress

EPOCH = (
    r"Epoch 1/2: \d+ steps in [\d.]+ s, [\d,]+ real tokens/s, loss [\d.]+, accuracy [\d.]+%, "
    r"held-out loss [\d.]+, held-out accuracy [\d.]+%"
)


class FakeBatches:
    """Twenty steps of ten tokens each."""

    first = 0

    def __len__(self):
        return 20

    def tokens(self, *, learned=True):
        return np.full(20, 10)

    def rows(self, step):
        return [step]


class FakeTime:
    """A clock that goes on by a second whenever somebody looks."""

    now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_of_two_epochs(verbose="auto") -> None:
    batches = FakeBatches()
    curve = LossCurve(batches)
    shown = Progress(batches, curve, epochs=2, verbose=verbose)
    for epoch in range(2):
        curve.start_epoch(epoch)
        shown.start_epoch(epoch)
        for step in range(20):
            curve.after_step(np.array([20.0, 5.0, 10.0]) * (step + 1))
            shown.after_step()
        curve.end_epoch()
        logs = {"loss": 2.0, "accuracy": 0.5, "val_loss": 1.5, "val_accuracy": 0.75}
        shown.end_epoch(logs)


@pytest.fixture
def clock(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_a_line_an_epoch_and_one_now_and_then(clock, capsys, monkeypatch):
    monkeypatch.setitem(progress._PAUSE, "log", 5.0)
    run_of_two_epochs()
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    lines = out.splitlines()
    assert len([line for line in lines if re.fullmatch(EPOCH, line)]) == 1
    moving = [line for line in lines if "left" in line]
    assert re.match(r"Epoch 1/2 [━─]{12} 5/20, [\d,]+ real tokens/s", moving[0])
    assert len(moving) == 8


def test_a_terminal_has_a_bar_that_moves(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setitem(progress._PAUSE, "terminal", 0.0)
    run_of_two_epochs()
    text = sys.stdout.getvalue()
    steps = [int(step) for step in re.findall(r"\rEpoch 1/2 [━─]{12} (\d+)/20", text)]
    assert len(steps) > 10 and steps == sorted(steps)
    assert re.search(r"[\d,]+ real tokens/s, loss 2.0000, \d+:\d\d left", text)
    assert re.search(EPOCH, text)


def test_a_notebook_has_a_line_and_a_picture_each_kept_up_to_date(monkeypatch, clock):
    shown = []

    class Handle:
        def __init__(self, data):
            shown.append([data])
            self.updates = shown[-1]

        def update(self, data, raw):
            self.updates.append(data)

    monkeypatch.setattr("IPython.display.display", lambda data, raw, display_id: Handle(data))
    monkeypatch.setattr(progress, "_place", lambda: "notebook")
    run_of_two_epochs()
    lines, pictures = shown
    assert re.search(EPOCH, lines[-1]["text/plain"]) and "Epoch 2/2: " in lines[-1]["text/plain"]
    assert "left" in lines[3]["text/plain"]
    assert len(pictures[-1]["image/png"]) > 10_000


@pytest.mark.full
def test_a_real_notebook_shows_them():
    source = (
        "import gemma_lora as gl; gl.setup(seed=0); train, held_out = gl.load_tiny_world(); "
        "model = gl.load(); gl.enable_lora(model); held_out = held_out.select(range(8));"
        "gl.fit(model, train.select(range(600)), validation=held_out, epochs=2);"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    line, picture = [one["data"] for one in outputs if one["output_type"] == "display_data"]
    assert re.search(EPOCH, line["text/plain"]) and "Epoch 2/2: " in line["text/plain"]
    assert len(picture["image/png"]) > 10_000


def test_the_rate_leaves_out_the_first_step_and_the_validation(clock, capsys):
    batches = FakeBatches()
    shown = Progress(batches, LossCurve(batches), epochs=1, verbose=2)
    shown.start_epoch(0)
    clock.now += 1000
    for _ in range(20):
        shown.after_step()
    clock.now += 500
    shown.end_epoch({"loss": 1.0})
    line = capsys.readouterr().out
    # A second a step, but for the first: 19 steps of 10 tokens in 19 seconds.
    assert line == "Epoch 1/1: 20 steps in 1020.0 s, 10 real tokens/s, loss 1.0000\n"


def test_verbose_2_is_a_line_an_epoch_and_0_is_silence(tiny_lora, capsys):
    train = gl.load_tiny_world()[0].select(range(8))
    gl.fit(tiny_lora, train, verbose=2)
    out, err = capsys.readouterr()
    assert re.search(r"Epoch 1/1: \d+ steps in", out) and err == ""
    gl.fit(tiny_lora, train, verbose=0)
    assert capsys.readouterr() == ("", "")


def test_a_run_stopped_in_its_first_step_has_a_line(tiny_lora, capsys):
    train, held_out = gl.load_tiny_world()
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: os.kill(os.getpid(), signal.SIGINT)
    )
    gl.fit(tiny_lora, train, validation=held_out.select(range(4)), callbacks=[stop], verbose=2)
    assert re.search(r"Epoch 1/1: [1-9] of 284 steps in", capsys.readouterr().out)


def test_a_curve_goes_on_from_what_another_process_saved():
    batches = FakeBatches()
    whole, first = LossCurve(batches), LossCurve(batches)
    sums = [np.array([step**2, 0.0, step]) for step in range(1, 21)]
    for curve, steps in ((whole, sums), (first, sums[:7])):
        curve.start_epoch(0)
        for one in steps:
            curve.after_step(one)
    second = LossCurve(batches, first.saved(0, 7))
    batches.first = 7
    batches.__class__.__len__ = lambda self: 20 - self.first
    second.start_epoch(0)
    for one in sums[7:]:
        second.after_step(one)
    assert len(whole.so_far()) == 20
    assert second.so_far() == whole.so_far()


def test_counting_shows_a_bar_that_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setitem(progress._PAUSE, "notebook", 0.0)
    monkeypatch.setattr(progress, "_place", lambda: "notebook")
    seen = []

    class Handle:
        def update(self, data, raw):
            seen.append(data)

    def display(data, raw, display_id):
        seen.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    with progress.counted("Questions", 4) as count:
        count(1)
        count(2)
        count(1)
    first, *bars, last = seen
    assert (first, last) == ({}, {"text/plain": ""})
    assert [re.search(r"Questions .* (\d)/4", bar["text/plain"])[1] for bar in bars] == ["1", "3"]


def test_counting_of_quick_work_shows_nothing(capsys):
    with progress.counted("Questions", 4) as count:
        count(4)
    assert capsys.readouterr().out == ""
