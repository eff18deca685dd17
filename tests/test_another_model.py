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
    text = json.dumps(execute(folder / path.name, fresh=False))  # a cell that fails is an error here
    assert "(from GEMMA_LORA_PRESET)" in text
    if path.stem.startswith("05"):
        assert "One epoch is" not in text  # it goes on with what notebook 04 left
        assert "40 records, 1 epoch" in text
    elif "load_dolly" in text:
        assert "40 records to tune on" in text


def test_without_an_account_the_first_notebook_says_so_and_goes_on(folder, monkeypatch):
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))  # no credentials in files either
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")  # Kaggle's client asks this machine, where nobody answers
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(folder / "kagglehub"))
    monkeypatch.setenv("GEMMA_LORA_PRESET", "gemma_2b_en")
    shutil.copy(NOTEBOOKS[1], folder)
    text = json.dumps(execute(folder / NOTEBOOKS[1].name))
    assert "Could not fetch 'gemma_2b_en'" in text
    assert "one click of consent" in text
    assert "tiny_gemma_en: 1,943,232 parameters" in text
