"""What a run shows, in each place it can run in."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import keras
import nbformat
import pytest
from nbclient import NotebookClient

import gemma_lora as gl

RUN = (
    "import gemma_lora as gl; gl.setup(seed=0); train, held_out = gl.load_tiny_world(); "
    "model = gl.load(); gl.enable_lora(model); "
    "gl.fit(model, train.select(range(600)), validation=held_out.select(range(8)), epochs=2)"
)
EPOCH = r"Epoch 1/2: \d+ steps in [\d.]+ s, [\d,]+ real tokens/s, loss [\d.]+, accuracy [\d.]+%, held-out loss [\d.]+, held"


def test_a_log_has_a_line_an_epoch():
    out = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, check=True
    ).stdout
    assert len(out.splitlines()) == 4 and "\r" not in out
    assert re.search(EPOCH, out)


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_has_a_bar_that_moves():
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                text += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    assert process.returncode == 0
    text = text.decode()
    steps = [int(step) for step in re.findall(r"\r\x1b\[KEpoch 1/2 [━─]{12} (\d+)/\d+", text)]
    assert len(steps) > 1 and steps == sorted(set(steps))
    assert re.search(r"[\d,]+ real tokens/s, loss [\d.]+, \d+:\d\d left", text)
    assert re.search(EPOCH, text)


def test_a_notebook_has_a_line_and_a_picture_each_kept_up_to_date():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RUN + ";")])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    line, picture = [
        one["data"] for one in notebook.cells[0].outputs if one["output_type"] == "display_data"
    ]
    assert re.search(EPOCH, line["text/plain"]) and "Epoch 2/2: " in line["text/plain"]
    assert len(picture["image/png"]) > 10_000


def test_verbose_2_is_a_line_an_epoch_and_0_is_silence(tiny_lora, capsys):
    train = gl.load_tiny_world()[0].select(range(8))
    gl.fit(tiny_lora, train, verbose=2)
    assert re.search(r"Epoch 1/1: \d+ steps in", capsys.readouterr().out)
    gl.fit(tiny_lora, train, verbose=0)
    assert capsys.readouterr().out == ""


def test_a_run_stopped_in_its_first_step_has_a_line_and_its_rate_leaves_validation_out(
    tiny_lora, capsys
):
    train, held_out = gl.load_tiny_world()
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: os.kill(os.getpid(), signal.SIGINT)
    )
    gl.fit(tiny_lora, train, validation=held_out.select(range(4)), callbacks=[stop], verbose=2)
    assert re.search(r"Epoch 1/1: [1-9] of 284 steps in", capsys.readouterr().out)
    slow = keras.callbacks.LambdaCallback(on_test_batch_end=lambda step, logs: time.sleep(2))
    gl.fit(
        tiny_lora,
        train.select(range(8)),
        validation=held_out.select(range(4)),
        callbacks=[slow],
        verbose=2,
    )
    seconds = re.search(r"steps in ([\d.]+) s", capsys.readouterr().out)[1]
    start = time.monotonic()
    gl.evaluate(tiny_lora, held_out.select(range(4)), answers=False)
    gl.fit(tiny_lora, train.select(range(8)), verbose=0)
    assert float(seconds) < time.monotonic() - start + 1.5  # two seconds a batch are not in it
