"""Do the two servers speak as the real ones do? Asked by the real clients."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import kagglehub
import keras_hub
import numpy as np
import pytest
import requests
from hub_server import CUT, HANG, RESET, SHORT, HubServer, hub_of_this_process
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from kaggle_server import KaggleServer, serving, serving_subprocesses
from kagglehub.exceptions import DataCorruptionError, KaggleApiHTTPError, UnauthenticatedError

import gemma_lora as gl

FOLDER = Path(gl.__file__).parent / "tiny" / "tiny_gemma_en"
HANDLE = "keras/gemma/keras/gemma_2b_en/3"


@pytest.fixture
def no_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def prepared(no_credentials):
    server = KaggleServer()
    server.presets["gemma_2b_en"] = FOLDER
    server.users = {"KGAT_ada": "ada", "key-of-bob": "bob", "key-of-eve": "eve"}
    server.consented = {"ada", "bob"}
    return server


@pytest.fixture
def kaggle(prepared, tmp_path):
    with serving(prepared, tmp_path / "cache"):
        sign_in(KAGGLE_API_TOKEN="KGAT_ada")
        yield prepared


@pytest.fixture
def model_hub(tmp_path):
    server = HubServer()
    server.models["someone/tiny"] = FOLDER
    with hub_of_this_process(server, tmp_path / "hub"):
        yield server


def sign_in(**credentials: str):
    """Put credentials in the place of those in the environment; `serving` puts back
    what was there.
    """
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        os.environ.pop(name, None)
    os.environ.update(credentials)


def same_weights(model) -> bool:
    expected = gl.load().get_weights()
    return all(
        np.array_equal(one, other) for one, other in zip(model.get_weights(), expected, strict=True)
    )


def status_of(path="config.json", handle=HANDLE) -> int:
    with pytest.raises(KaggleApiHTTPError) as raised:
        kagglehub.model_download(handle, path)
    return raised.value.response.status_code


# Kaggle


@pytest.mark.parametrize("preset", ["gemma_2b_en", f"kaggle://{HANDLE}"])
def test_a_preset_is_fetched_from_kaggle(kaggle, preset):
    model = keras_hub.models.CausalLM.from_preset(preset, dtype="float32")
    assert same_weights(model)
    asked = [what for what, _ in kaggle.requests]
    assert asked.count("gemma_2b_en/3/model.weights.h5") == 1
    assert {authorization for _, authorization in kaggle.requests} == {"Bearer KGAT_ada"}


def test_a_whole_model_of_the_latest_version_is_fetched(kaggle):
    folder = Path(kagglehub.model_download(HANDLE.rpartition("/")[0]))
    assert folder.name == "5"
    vocabulary = "assets/tokenizer/vocabulary.spm"
    assert (folder / vocabulary).read_bytes() == (FOLDER / vocabulary).read_bytes()


def test_whoami_names_the_user(kaggle):
    assert kagglehub.whoami() == {"username": "ada"}
    sign_in(KAGGLE_API_TOKEN="KGAT_nobody")
    with pytest.raises(UnauthenticatedError):
        kagglehub.whoami()
    sign_in(KAGGLE_USERNAME="eve", KAGGLE_KEY="key-of-eve")
    assert kagglehub.whoami() == {"username": "eve"}


@pytest.mark.parametrize(
    ("credentials", "status"),
    [
        ({}, 403),
        ({"KAGGLE_API_TOKEN": "KGAT_nobody"}, 401),
        ({"KAGGLE_USERNAME": "bob", "KAGGLE_KEY": "key-of-eve"}, 401),
        ({"KAGGLE_USERNAME": "eve", "KAGGLE_KEY": "key-of-eve"}, 403),
    ],
)
def test_refusals_arrive_with_their_status(kaggle, credentials, status):
    sign_in(**credentials)
    assert status_of() == status


def test_what_is_not_there_is_a_404(kaggle):
    assert status_of("nothing.json") == 404
    assert status_of(handle="keras/gemma/keras/gemma_2b_en/99") == 404
    assert status_of(handle="keras/gemma/keras/gemma_7b_en/4") == 404


def test_faults_are_used_up_one_a_request(kaggle):
    kaggle.failing = {"config.json": [429, 500, RESET]}
    assert status_of() == 429
    assert status_of() == 500
    with pytest.raises(requests.ConnectionError):
        kagglehub.model_download(HANDLE, "config.json")
    assert Path(kagglehub.model_download(HANDLE, "config.json")).is_file()


def test_a_download_that_was_cut_goes_on(kaggle):
    kaggle.failing = {".h5": [CUT]}
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        kagglehub.model_download(HANDLE, "model.weights.h5")
    file = Path(kagglehub.model_download(HANDLE, "model.weights.h5"))
    assert file.read_bytes() == (FOLDER / "model.weights.h5").read_bytes()
    assert [what for what, _ in kaggle.requests].count(
        "storage/gemma_2b_en/3/model.weights.h5"
    ) == 3


@pytest.mark.parametrize("checksums", [True, False])
def test_what_came_short_is_noticed_by_its_checksum_only(kaggle, checksums):
    kaggle.checksums = checksums
    kaggle.failing = {"config.json": SHORT}
    if checksums:
        with pytest.raises(DataCorruptionError):
            kagglehub.model_download(HANDLE, "config.json")
    else:
        file = Path(kagglehub.model_download(HANDLE, "config.json"))
        assert file.stat().st_size == (FOLDER / "config.json").stat().st_size // 2


@pytest.mark.parametrize("end", ["release", "stop"])
def test_what_hangs_ends_with_a_release_or_the_server(kaggle, end):
    kaggle.failing = {"config.json": HANG}
    answers, before = [], set(threading.enumerate())

    def ask():
        try:
            answers.append(kagglehub.model_download(HANDLE, "config.json"))
        except requests.ConnectionError as error:
            answers.append(error)

    client = threading.Thread(target=ask)
    client.start()
    while not kaggle.requests:
        client.join(0.01)
    assert client.is_alive()
    getattr(kaggle, end)()
    client.join(5)
    assert isinstance(answers[0], str if end == "release" else requests.ConnectionError)
    kaggle.stop()
    assert not any(
        "process_request" in thread.name for thread in set(threading.enumerate()) - before
    )


@pytest.mark.full
def test_a_subprocess_is_served_too(prepared, tmp_path):
    program = f"import kagglehub; kagglehub.model_download({HANDLE!r}, 'config.json')"
    with serving_subprocesses(prepared, tmp_path / "cache"):
        sign_in(KAGGLE_API_TOKEN="KGAT_ada")
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert prepared.requests[0][0] == "gemma_2b_en/3/config.json"
    assert list((tmp_path / "cache").rglob("config.json"))


def test_the_environment_is_put_back(no_credentials, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "as before")
    before = dict(os.environ)
    with serving(KaggleServer(), tmp_path):
        assert "KAGGLE_KEY" not in os.environ
    assert dict(os.environ) == before


# The Hub


def test_a_model_is_loaded_from_the_hub(model_hub):
    assert same_weights(keras_hub.models.CausalLM.from_preset("hf://someone/tiny", dtype="float32"))
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("someone/tiny", "nothing.json")


def test_a_gated_model_takes_a_token_with_access(model_hub):
    model_hub.gated = {"someone/tiny"}
    model_hub.tokens_with_access = {"hf_ada"}
    for token, status in [(False, 401), ("hf_eve", 403)]:
        with pytest.raises(GatedRepoError) as raised:
            huggingface_hub.hf_hub_download("someone/tiny", "config.json", token=token)
        assert raised.value.response.status_code == status
    assert Path(
        huggingface_hub.hf_hub_download("someone/tiny", "config.json", token="hf_ada")
    ).is_file()


def test_a_file_of_the_hub_that_was_cut_is_fetched_again(model_hub):
    model_hub.failing = {"config.json": [CUT]}
    file = Path(huggingface_hub.hf_hub_download("someone/tiny", "config.json"))
    assert file.read_bytes() == (FOLDER / "config.json").read_bytes()
