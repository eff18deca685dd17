"""The notebooks on another preset, and on Dolly: the cells that a learner runs with `PRESET = "gemma_2b_en"`.

The preset is a folder with the small model's weights under another name, so that nothing of what is recommended for
`tiny_gemma_en` applies; Dolly is served on loopback, with rows of the small world.
"""

import json
import shutil
from pathlib import Path

import pytest
from kaggle_server import KaggleServer, serving_subprocesses

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
    text = json.dumps(
        execute(folder / path.name, fresh=False)
    )  # a cell that fails is an error here
    assert "(from GEMMA_LORA_PRESET)" in text
    if path.stem.startswith(
        ("05", "10")
    ):  # they go on with what notebook 04 left; 05 tunes a second adapter
        assert text.count("One epoch is") == path.stem.startswith("05")
        assert "40 records, 1 epoch" in text
    elif "load_dolly" in text:
        assert "40 records to tune on" in text


@pytest.fixture
def kaggle(folder, monkeypatch):
    """Kaggle on loopback, which has the small model as gemma_2b_en; and a home without credentials."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("GEMMA_LORA_PRESET", "gemma_2b_en")
    server = KaggleServer()
    server.presets["gemma_2b_en"] = folder / "another_gemma_en"
    server.users["a-dummy-token"] = "ada"
    with serving_subprocesses(server, folder / "kagglehub"):
        yield server


def test_without_an_account_the_first_notebook_says_so_and_goes_on(kaggle, folder):
    shutil.copy(NOTEBOOKS[1], folder)
    text = json.dumps(execute(folder / NOTEBOOKS[1].name))
    assert "'gemma_2b_en' takes a Kaggle account, its consent to the licence on" in text
    assert "No credentials for Kaggle." in text
    assert "tiny_gemma_en: 1,943,232 parameters" in text


def test_with_an_account_but_no_consent_the_first_notebook_names_the_page(
    kaggle, folder, monkeypatch
):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-dummy-token")
    shutil.copy(NOTEBOOKS[1], folder)
    text = json.dumps(execute(folder / NOTEBOOKS[1].name))
    assert (
        "ada has not accepted the licence of 'gemma_2b_en': open https://www.kaggle.com/models/keras/gemma"
        in text
    )
    assert "tiny_gemma_en: 1,943,232 parameters" in text


def test_with_consent_the_first_notebook_fetches_the_preset_by_its_name(
    kaggle, folder, monkeypatch
):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-dummy-token")
    kaggle.consented.add("ada")
    shutil.copy(NOTEBOOKS[1], folder)
    text = json.dumps(execute(folder / NOTEBOOKS[1].name))
    assert "Kaggle hands out keras/gemma/keras/gemma_2b_en/3" in text
    assert "gemma_2b_en: 1,943,232 parameters" in text.replace("tiny_gemma_en", "")
