"""The notebooks on another model and on Dolly, as if a learner changed PRESET.

The preset is a folder with the small model's weights under another name, so that
nothing that is recommended for `tiny_gemma_en` applies. Dolly is served on loopback,
with rows of the small world. The quickstart and the notebook that trains run in `make
test`; `make test-full` runs all.
"""

import json
import shutil
from pathlib import Path

import pytest
from kaggle_server import KaggleServer, serving_subprocesses

import gemma_lora as gl
from gemma_lora.records import DOLLY
from notebooks import NOTEBOOKS, execute

QUICK = ("00", "04")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks run one after the other, as they do in one runtime."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(Path(gl.__file__).parent / "tiny/tiny_gemma_en", folder / "another_gemma_en")
    return folder


def run(path: Path, folder: Path) -> str:
    """Run a copy of a notebook in the folder. A cell that fails is an error here."""
    shutil.copy(path, folder)
    return json.dumps(execute(folder / path.name, fresh=False))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[] if path.stem.startswith(QUICK) else [pytest.mark.full]
        )
        for path in NOTEBOOKS
    ],
)
def test_every_notebook_runs_on_another_model_and_on_dolly(path, folder, hub, monkeypatch):
    rows = [json.dumps(record) for record in gl.load_tiny_world()[0].select(range(400))]
    hub.repos[DOLLY] = {"databricks-dolly-15k.jsonl": "\n".join(rows).encode()}
    monkeypatch.setenv("GEMMA_LORA_PRESET", str(folder / "another_gemma_en"))
    monkeypatch.setenv("GEMMA_LORA_ROWS", "40")
    text = run(path, folder)
    assert "(from GEMMA_LORA_PRESET)" in text
    # 05 and 10 go on with the adapter that 04 left; 05 also tunes a second one.
    if path.stem.startswith(("05", "10")):
        assert text.count("One epoch is") == path.stem.startswith("05")
        assert "40 records, 1 epoch" in text
    elif "load_dolly" in text or "load_data" in text:
        assert "40 records to tune on" in text


@pytest.fixture
def kaggle(folder, monkeypatch):
    """Kaggle on loopback, which has gemma_2b_en, and a home without credentials."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("GEMMA_LORA_PRESET", "gemma_2b_en")
    server = KaggleServer()
    server.presets["gemma_2b_en"] = folder / "another_gemma_en"
    server.users["a-dummy-token"] = "ada"
    with serving_subprocesses(server, folder / "kagglehub"):
        yield server


@pytest.mark.full
def test_without_an_account_notebook_01_says_so_and_goes_on(kaggle, folder):
    text = run(NOTEBOOKS[1], folder)
    assert "'gemma_2b_en' takes a Kaggle account, its consent to the licence on" in text
    assert "No credentials for Kaggle." in text
    assert "tiny_gemma_en: 1,943,232 parameters" in text


@pytest.mark.full
def test_without_consent_notebook_01_names_the_page(kaggle, folder, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-dummy-token")
    text = run(NOTEBOOKS[1], folder)
    page = "https://www.kaggle.com/models/keras/gemma"
    assert f"ada has not accepted the licence of 'gemma_2b_en': open {page}" in text
    assert "tiny_gemma_en: 1,943,232 parameters" in text


@pytest.mark.full
def test_with_consent_notebook_01_fetches_the_preset(kaggle, folder, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-dummy-token")
    kaggle.consented.add("ada")
    text = run(NOTEBOOKS[1], folder)
    assert "Kaggle hands out keras/gemma/keras/gemma_2b_en/3" in text
    assert "gemma_2b_en: 1,943,232 parameters" in text.replace("tiny_gemma_en", "")
