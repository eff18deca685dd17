"""Does a notebook's test fail when it should? Two that are wrong must say so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import v4

CONFTEST = Path(__file__).parents[1] / "notebooks/conftest.py"


def cell(source: str, output: str = ""):
    outputs = [v4.new_output("stream", text=output)] if output else []
    return v4.new_code_cell(source, outputs=outputs, execution_count=1)


def test_cells_that_fail_or_print_something_else_are_found(tmp_path):
    cells = [
        cell("from pathlib import Path\nprint('as committed')", "as committed\n"),
        cell("print('one thing')", "another\n"),
        cell("import os\nprint('GEMMA_LORA_ROWS' in os.environ)", "False\n"),
        cell("Path('artifacts').mkdir()"),
        cell("import sys\nprint('a warning', file=sys.stderr)"),
        cell("raise ValueError('stops here')"),
        cell("print('never run')", "never run\n"),
    ]
    for name in ("first.ipynb", "second.ipynb"):
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / name)
    shutil.copy(CONFTEST, tmp_path)
    environment = {**os.environ, "GEMMA_LORA_ROWS": "3"}
    command = [sys.executable, "-m", "pytest", "-rA", "--color=no", str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    for name in ("first.ipynb", "second.ipynb"):
        outcomes = {
            index: outcome
            for outcome in ("PASSED", "FAILED")
            for index in range(len(cells))
            if f"{outcome} {name}::Cell {index}" in result.stdout
        }
        # Cell 3 makes a folder in each notebook: neither sees the other's.
        expected = ["PASSED", "FAILED", "PASSED", "PASSED", "FAILED", "FAILED"]
        assert outcomes == dict(enumerate(expected)), result.stdout
    assert "2 skipped" in result.stdout
    assert "Cell 5 of this notebook failed" in result.stdout
    assert not (tmp_path / "artifacts").exists()
