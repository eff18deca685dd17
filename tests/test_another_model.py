"""The notebooks on another preset, and on Dolly: the cells that a learner runs with `PRESET = "gemma_2b_en"`.

The preset is a folder with the small model's weights under another name, so that nothing of what is recommended for
`tiny_gemma_en` applies; Dolly is served on loopback, with rows of the small world.
"""

import json
import shutil
from pathlib import Path

import pytest

import gemma_lora as gl
from gemma_lora.records import DOLLY
from notebooks import NOTEBOOKS, execute


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks run one after the other, as they do in one runtime."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(Path(gl.__file__).parent / "tiny/tiny_gemma_en", folder / "another_gemma_en")
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_on_another_model_and_on_dolly(path, folder, hub, monkeypatch):
    rows = [json.dumps(record) for record in gl.load_tiny_world()[0].select(range(400))]
    hub.repos[DOLLY] = {"databricks-dolly-15k.jsonl": "\n".join(rows).encode()}
    monkeypatch.setenv("GEMMA_LORA_PRESET", str(folder / "another_gemma_en"))
    monkeypatch.setenv("GEMMA_LORA_ROWS", "40")
    shutil.copy(path, folder)
    notebook = execute(folder / path.name)
    text = json.dumps(notebook)
    assert "(from GEMMA_LORA_PRESET)" in text
    assert not [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    if "load_dolly" in text:
        assert "40 records to tune on" in text or path.stem.startswith("05")
