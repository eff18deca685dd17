"""Run the notebooks: `demo` shows the quickstart in a terminal, `save` executes all in place, `test` compares them.

python tests/notebooks.py demo|save|test
"""

import base64
import copy
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PAGES = ROOT / "artifacts"
README_PICTURE = ROOT / "notebooks/images/before_after.png"


class TerminalClient(NotebookClient):
    """Executes a notebook and shows its text as it comes, progress bars included."""

    moving = False  # whether the line at hand is a progress bar's

    def process_message(self, msg, cell, cell_index):
        content, kind = msg.get("content", {}), msg["msg_type"]
        shown = (
            kind in ("execute_result", "display_data", "update_display_data")
            and "image/png" not in content["data"]
        )
        if self.moving and (kind == "stream" or (shown and not content.get("transient"))):
            self.moving = print(flush=True)
        if kind == "stream":
            print(content["text"], end="", flush=True)
        elif shown and content.get("transient"):
            self.moving = True
            print(f"\r\x1b[K{content['data']['text/plain'].splitlines()[-1]}", end="", flush=True)
        elif shown:
            print(content["data"].get("text/plain", ""), flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(path: Path, client=NotebookClient, *, fresh: bool = True) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom in a kernel of its own; if `fresh`, without what earlier runs left."""
    if fresh:
        shutil.rmtree(path.parent / "artifacts", ignore_errors=True)
    notebook = nbformat.read(path, as_version=4)
    runner = client(
        notebook, timeout=3600, kernel_name="python3", coalesce_streams=True, record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    if client is TerminalClient:
        runner.on_cell_execute = lambda cell, cell_index: announce(notebook, cell_index)
    runner.execute()
    return notebook


def announce(notebook: nbformat.NotebookNode, index: int) -> None:
    """Print the heading that stands above a cell, if this cell is the first below it."""
    above = notebook.cells[index - 1]
    if above.cell_type == "markdown" and (heading := re.match(r"#+ (.*)", above.source)):
        print(f"\n\033[1m{heading[1]}\033[0m", flush=True)


def page(notebook: nbformat.NotebookNode, name: str) -> Path:
    """Write a page that needs nothing else: pictures inside, nothing fetched."""
    notebook = copy.deepcopy(notebook)
    notebook.cells[0].source = re.sub(
        r"\n\[!\[Open in Colab.*\n", "", notebook.cells[0].source
    )  # a remote picture
    exporter = HTMLExporter(
        embed_images=True, require_js_url="", jquery_url="", mathjax_url="", mermaid_js_url=""
    )
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    PAGES.mkdir(exist_ok=True)
    file = PAGES / f"{name}.html"
    file.write_text(body, encoding="utf-8")
    return file


def picture(notebook: nbformat.NotebookNode) -> bytes:
    """The last picture that a notebook shows."""
    outputs = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    return base64.b64decode([data["image/png"] for data in outputs if "image/png" in data][-1])


def demo() -> int:
    start = time.monotonic()
    if Path(preset := os.environ.get("GEMMA_LORA_PRESET", "")).is_dir():
        os.environ["GEMMA_LORA_PRESET"] = str(Path(preset).absolute())  # the kernel runs elsewhere
    try:
        notebook = execute(NOTEBOOKS[0], TerminalClient)
    except CellExecutionError as error:
        print(f"\nThe demo stopped: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was stopped. `make demo` starts it again.", file=sys.stderr)
        return 130
    file = page(notebook, f"demo_{Path(os.environ.get('GEMMA_LORA_PRESET', 'tiny_gemma_en')).name}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. With its pictures: {file}")
    return 0


def save() -> int:
    for path in NOTEBOOKS:
        start = time.monotonic()
        notebook = execute(path)
        for name in ("language_info", "widgets"):
            notebook.metadata.pop(name, None)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, path)
        if path == NOTEBOOKS[0]:
            README_PICTURE.parent.mkdir(exist_ok=True)
            README_PICTURE.write_bytes(picture(notebook))
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {page(notebook, path.stem)}")
    return 0


def test() -> int:
    shutil.rmtree(ROOT / "notebooks/artifacts", ignore_errors=True)
    command = [
        "-m",
        "pytest",
        "-x",
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout=900",
        "-o",
        "addopts=-q",
    ]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("GEMMA_LORA_")
    }
    return subprocess.run(
        [sys.executable, *command, *map(str, NOTEBOOKS)], cwd=ROOT, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    commands = {"demo": demo, "save": save, "test": test}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]]())
