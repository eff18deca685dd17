"""What a run shows, in each place it can run in."""

import os
import pty
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

import gemma_lora as gl

RUN = (
    "import gemma_lora as gl; gl.setup(seed=0); train, held_out = gl.load_tiny_world(); "
    "model = gl.load(); gl.enable_lora(model); "
    "gl.fit(model, train.select(range(600)), validation=held_out.select(range(8)), epochs=2)"
)
EPOCH = (
    r"Epoch 1/2: \d+ steps in [\d.]+ s, [\d,]+ real tokens/s, loss [\d.]+, accuracy [\d.]+%, held-out loss [\d.]+, held"
)


def test_a_log_has_a_line_an_epoch():
    out = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) == 4 and "\r" not in out
    assert re.search(EPOCH, out)


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_has_a_bar_that_moves():
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=theirs, stderr=subprocess.DEVNULL) as process:
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
    line, picture = [one["data"] for one in notebook.cells[0].outputs if one["output_type"] == "display_data"]
    assert re.search(EPOCH, line["text/plain"]) and "Epoch 2/2: " in line["text/plain"]
    assert len(picture["image/png"]) > 10_000


def test_verbose_2_is_a_line_an_epoch_and_0_is_silence(tiny_lora, capsys):
    train = gl.load_tiny_world()[0].select(range(8))
    gl.fit(tiny_lora, train, verbose=2)
    assert re.search(r"Epoch 1/1: \d+ steps in", capsys.readouterr().out)
    gl.fit(tiny_lora, train, verbose=0)
    assert capsys.readouterr().out == ""
