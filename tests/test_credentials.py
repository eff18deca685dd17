import os
import sys
import types

import pytest

import gemma_lora as gl

SECRET = "secret-value-that-nobody-may-see"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without credentials."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "COLAB_RELEASE_TAG"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return tmp_path


def found(table) -> list[str]:
    assert SECRET not in str(table) + table._repr_html_()
    return [row["place"] for row in table.rows if row["found"] == "yes"]


def test_nothing_is_found_where_nothing_is(home):
    assert found(gl.find_credentials()) == []


def test_each_place_is_found_and_no_value_is_shown(home, monkeypatch):
    (home / ".kaggle").mkdir()
    (home / ".kaggle/access_token").write_text(SECRET)
    assert found(gl.find_credentials()) == ["file: ~/.kaggle/access_token"]
    (home / "elsewhere").mkdir()
    (home / "elsewhere/kaggle.json").write_text(f'{{"username": "me", "key": "{SECRET}"}}')
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home / "elsewhere"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    assert len(found(gl.find_credentials())) == 3
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    assert len(found(gl.find_credentials())) == 4


def test_colab_secrets_go_into_the_environment_or_the_reason_is_said(home, monkeypatch):
    # Colab's own module, which is nowhere else, has this one function and these three exceptions.
    userdata = types.ModuleType("google.colab.userdata")
    for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, name, type(name, (Exception,), {}))
    answers = {"KAGGLE_API_TOKEN": userdata.SecretNotFoundError(SECRET), "KAGGLE_USERNAME": "me"}
    answers["KAGGLE_KEY"] = userdata.NotebookAccessError(SECRET)

    def get(name):
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    userdata.get = get
    colab = types.ModuleType("google.colab")
    colab.userdata = userdata
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    table = gl.find_credentials()
    assert found(table) == []
    assert {row["place"]: row["found"] for row in table.rows}["Colab secret: KAGGLE_KEY"].startswith(
        "yes, but notebook"
    )
    assert os.environ["KAGGLE_USERNAME"] == "me"
    answers["KAGGLE_KEY"] = SECRET
    assert found(gl.find_credentials()) == ["environment: KAGGLE_USERNAME and KAGGLE_KEY"]
    assert os.environ["KAGGLE_KEY"] == SECRET
