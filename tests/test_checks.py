"""`gl.check`, asked of the same servers as `gl.load`."""

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import datasets
import pytest
from hub_server import HANG, HANG_UP, RESET
from kaggle_server import KaggleServer, serving

import gemma_lora as gl
from gemma_lora import checks, memory
from gemma_lora.models import TINY_FOLDER
from gemma_lora.records import DOLLY

PRESET = "gemma_2b_en"
PAGE = "https://www.kaggle.com/models/keras/gemma"
ADA, EVE, NOBODY = "KGAT_ada_secret", "KGAT_eve_secret", "KGAT_nobody_secret"
CHECKS = ["packages", "device", "memory", "disk", "credentials", "licence", "data"]


@pytest.fixture(autouse=True)
def no_pip(monkeypatch):
    """Leave out pip's own check, which takes a second; one test asks it."""
    monkeypatch.setattr(checks, "_pip_check", lambda: "")


@pytest.fixture
def data(hub, tmp_path, monkeypatch):
    """The Hub has Dolly, and this machine has not."""
    hub.repos[DOLLY] = {
        "README.md": b"# Dolly\n",
        "databricks-dolly-15k.jsonl": b'{"instruction": "Why?"}\n',
    }
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield hub
    del hub.repos[DOLLY]


@pytest.fixture
def kaggle(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server = KaggleServer()
    server.presets[PRESET] = TINY_FOLDER
    server.users = {ADA: "ada", EVE: "eve"}
    server.consented = {"ada"}
    with serving(server, tmp_path / "cache"):
        sign_in(ADA)
        yield server


@pytest.fixture
def room(monkeypatch):
    """A machine on which the preset fits, whatever this one is."""
    monkeypatch.setattr(checks, "_memory", lambda preset: checks.Answer(True, "enough"))
    monkeypatch.setattr(checks, "_disk", lambda source, local: checks.Answer(True, "enough"))


@pytest.fixture
def hurry(monkeypatch):
    """Give the network half a second."""
    monkeypatch.setattr(checks, "_SECONDS", 0.6)


def sign_in(token: str | None):
    os.environ.pop("KAGGLE_API_TOKEN", None)
    if token:
        os.environ["KAGGLE_API_TOKEN"] = token


def checked(preset=PRESET) -> checks.Check:
    found = gl.check(preset)
    assert [row["check"] for row in found.rows] == CHECKS
    assert all(set(row) == {"check", "ok", "found", "fix"} for row in found.rows)
    assert all(row["fix"] for row in found.rows if row["ok"] is False), found
    assert not any(row["fix"] for row in found.rows if row["ok"]), found
    shown = str(found) + found._repr_html_() + repr(found.rows)
    assert not any(secret in shown for secret in (ADA, EVE, NOBODY))
    return found


# All is well


def test_where_all_is_well_all_is_green_and_the_user_is_named(kaggle, room):
    found = checked()
    assert found.ok, found
    assert [row["check"] for row in found.rows if row["ok"] is not True] == []
    assert (
        "of ada" in found["credentials"]["found"]
        and "KAGGLE_API_TOKEN" in found["credentials"]["found"]
    )
    assert "keras/gemma/keras/gemma_2b_en" in found["licence"]["found"]
    assert DOLLY in found["data"]["found"]


def test_the_smallest_file_is_all_that_is_fetched(kaggle):
    checked()
    assert {what.rpartition("/")[2] for what, _ in kaggle.requests} == {"config.json", "Hello"}


def test_the_small_model_asks_nobody(kaggle, data):
    kaggle.failing, data.failing = {"": 500}, {"": 500}
    found = checked("tiny_gemma_en")
    assert found.ok and not kaggle.requests
    assert (
        found["credentials"]["ok"] is None and "part of this package" in found["licence"]["found"]
    )


def test_a_folder_asks_kaggle_nothing(kaggle, room, tmp_path):
    shutil.copytree(TINY_FOLDER, tmp_path / "mine")
    found = checked(tmp_path / "mine")
    assert found.ok and not kaggle.requests
    assert "is a folder" in found["licence"]["found"]


@pytest.mark.parametrize("name", ["gemma_3b_en", "tiny_gemma", ""])
def test_what_is_neither_preset_nor_folder_is_a_value_error(kaggle, name):
    with pytest.raises(ValueError, match=r"No preset or folder|holds no preset"):
        gl.check(name)
    assert not kaggle.requests


# Credentials and licence, told apart by what Kaggle answers


@pytest.mark.parametrize(
    ("token", "failing", "credentials", "licence", "words"),
    [
        (NOBODY, {}, False, None, ("does not accept", "(401)")),
        (EVE, {}, True, False, ("eve has not accepted", PAGE)),
        (None, {}, False, None, ("KAGGLE_API_TOKEN", "Settings > API")),
        (ADA, {"/config.json": 404}, None, False, ("spelt",)),
        (ADA, {"/config.json": 429}, None, False, ("429", "Wait")),
        (ADA, {"/config.json": 503}, None, False, ("503", "in some minutes")),
        (ADA, {"/config.json": RESET}, None, False, ("cannot be reached",)),
        (ADA, {"/config.json": HANG_UP}, None, False, ("cannot be reached",)),
    ],
    ids=["401", "403", "no credentials", "404", "429", "503", "reset", "closed"],
)
def test_refusals_are_told_apart_and_each_has_its_fix(
    kaggle, token, failing, credentials, licence, words
):
    sign_in(token)
    kaggle.failing = failing
    found = checked()
    assert not found.ok
    assert (found["credentials"]["ok"], found["licence"]["ok"]) == (credentials, licence), found
    fixes = found["credentials"]["fix"] + found["licence"]["fix"]
    assert all(word in fixes for word in words), fixes


@pytest.mark.parametrize(
    ("token", "word"), [(NOBODY, "does not accept"), (EVE, "eve has not accepted")]
)
def test_a_config_in_the_cache_does_not_hide_that_kaggle_refuses(kaggle, token, word):
    assert checked()["licence"]["ok"]
    sign_in(token)
    found = checked()
    assert not found.ok
    assert word in found["credentials"]["fix"] + found["licence"]["fix"]


def test_a_config_in_the_cache_does_not_hide_that_there_is_no_network(kaggle):
    assert checked()["licence"]["ok"]
    kaggle.stop()
    assert checked()["licence"]["ok"] is False


@pytest.mark.parametrize("fault", ["stopped", 401, 503])
def test_a_preset_that_is_here_whole_needs_nobody(kaggle, room, fault):
    gl.load(PRESET)
    kaggle.failing = {"": fault}
    if fault == "stopped":
        kaggle.stop()
    found = checked()
    assert found.ok and found["licence"]["ok"], found


def test_a_token_that_no_header_can_carry_is_said(kaggle):
    sign_in("two words")
    found = checked()
    assert found["credentials"]["ok"] is False and "space" in found["credentials"]["found"]
    assert "two words" not in str(found)


# Nobody answers


def test_a_kaggle_that_hangs_is_no_answer_in_time(kaggle, hurry):
    kaggle.failing = {"/config.json": HANG}
    found = checked()
    assert found["licence"]["ok"] is False and "did not answer in time" in found["licence"]["fix"]
    kaggle.failing = {}
    assert checked()["licence"]["ok"]


def test_no_network_at_all_is_named(kaggle, data):
    kaggle.stop()
    data.stop()
    found = checked()
    assert "cannot be reached" in found["licence"]["fix"]
    assert found["data"]["ok"] is False and "load_tiny_world" in found["data"]["fix"]


def test_all_that_hangs_takes_no_longer_than_the_network_may(kaggle, data, hurry):
    kaggle.failing, data.failing = {"": HANG}, {"": HANG}
    start = time.monotonic()
    found = checked()
    assert time.monotonic() - start < 0.6 + 2
    assert found["licence"]["ok"] is False and found["data"]["ok"] is False
    kaggle.release()
    data.release()


def test_an_answer_that_comes_too_late_is_said(kaggle, hurry, monkeypatch):
    monkeypatch.setattr(checks, "_ask_for_config", lambda source: None)
    monkeypatch.setattr(checks, "whose", lambda: time.sleep(5))
    found = checked()
    assert "no answer within" in found["licence"]["found"]


# The data


def test_dolly_is_reachable_cached_or_neither(kaggle, data, tmp_path):
    assert "can be fetched" in checked()["data"]["found"]
    data.failing = {"": 503}
    found = checked()["data"]
    assert found["ok"] is False and "load_records" in found["fix"]
    arrow = tmp_path / "datasets" / DOLLY.replace("/", "___") / "default/0.0.0/x/dolly-train.arrow"
    arrow.parent.mkdir(parents=True)
    arrow.write_bytes(b"")
    assert "is cached" in checked()["data"]["found"]


# This machine


def test_too_little_memory_says_what_fits(kaggle, monkeypatch):
    monkeypatch.setattr(memory, "this_machine", lambda: ("small", 8 * 2**30))
    found = checked()["memory"]
    assert found["ok"] is False and "smaller preset is gemma3_270m" in found["fix"]
    monkeypatch.setattr(memory, "this_machine", lambda: ("large", 2**37))
    assert checked()["memory"]["ok"] is True


def test_too_full_a_disk_says_what_the_download_takes(kaggle, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 2**30, 2**30))
    found = checked()["disk"]
    assert found["ok"] is False
    assert (
        "1.0 GiB free" in found["found"]
        and "4.7" in found["found"]
        and "KAGGLEHUB_CACHE" in found["fix"]
    )
    assert checked()["disk"]["ok"] is not None


@pytest.mark.parametrize(
    ("line", "words", "fix"),
    [
        (
            "keras-hub 0.32.0 has requirement keras>=3.13, but you have keras 3.5.0.",
            "but you have keras 3.5.0",
            'pip install "keras>=3.13"',
        ),
        (
            "keras-nlp 0.1.0 has requirement keras-hub==0.1.0, but you have keras-hub 0.32.0.",
            "keras-nlp 0.1.0",
            '"keras-hub==0.1.0"',
        ),
        (
            "gemma-lora 0.1.0 has requirement kagglehub!=1.0.1, but you have kagglehub 1.0.1.",
            "kagglehub 1.0.1",
            '"kagglehub!=1.0.1"',
        ),
        (
            "kagglehub 1.0.2 requires kagglesdk, which is not installed.",
            "kagglesdk, which is not installed",
            '"kagglesdk"',
        ),
    ],
)
def test_versions_that_do_not_go_together_are_named_with_the_command(monkeypatch, line, words, fix):
    other = "notebook 7.0 has requirement tornado>=6.2, but you have tornado 5.0."
    text = "keras-hub 0.32.0 requires tensorflow-text, which is not installed."
    monkeypatch.setattr(checks, "_pip_check", lambda: f"{other}\n{line}\n{text}\n")
    found = checked("tiny_gemma_en")["packages"]
    assert found["ok"] is False and words in found["found"] and fix in found["fix"], found
    assert "tornado" not in str(found) and "tensorflow" not in str(found)


def test_a_plugin_of_another_jaxlib_is_named(monkeypatch):
    real = checks.version
    versions = {"jax-cuda12-plugin": "0.4.0"}
    monkeypatch.setattr(checks, "version", lambda package: versions.get(package) or real(package))
    found = checked("tiny_gemma_en")["packages"]
    assert found["ok"] is False and "jax-cuda12-plugin 0.4.0 beside jaxlib" in found["found"]
    assert found["fix"].startswith('pip install -U "jax[cuda12]"')


def test_what_is_installed_here_goes_together(monkeypatch):
    monkeypatch.undo()
    found = gl.check("tiny_gemma_en")["packages"]
    assert found["ok"], found
    for name in ("keras ", "keras-hub ", "jax ", "kagglehub ", "datasets "):
        assert name in found["found"]


# How it shows


def test_a_terminal_shows_marks_and_a_notebook_colours(kaggle):
    sign_in(EVE)
    found = checked()
    text, page = str(found), found._repr_html_()
    assert "✓" in text and "✗" in text and "–" not in text.splitlines()[0]
    assert (
        text.splitlines()[0].startswith(f"{PRESET}: ") and "checks failed" in text.splitlines()[0]
    )
    assert '<b style="color:#188038">✓</b>' in page and '<b style="color:#d93025">✗</b>' in page


def test_what_stands_in_a_row_is_escaped():
    rows = [{"check": "licence", "ok": False, "found": "<script>&", "fix": "a > b"}]
    page = checks.Check("<b>", rows)._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page and "a &gt; b" in page
    assert "&lt;b&gt;: 1 of 1" in page


def test_a_program_can_ask_for_one_check(kaggle):
    found = checked()
    assert found["licence"] is next(row for row in found.rows if row["check"] == "licence")
    with pytest.raises(KeyError):
        found["nothing"]


def test_a_machine_where_keras_hub_cannot_read_text_is_told_so():
    """As on Windows, where nothing brings TensorFlow along. In a process of its own."""
    script = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec

def without_tensorflow(name, path=None, target=None):
    hidden = name.split(".")[0] in ("tensorflow", "tensorflow_text")
    return None if hidden else find(name, path, target)

machinery.PathFinder.find_spec = staticmethod(without_tensorflow)
import gemma_lora as gl
gl.setup(seed=0)
from gemma_lora.checks import _packages
for preset in ("gemma_2b_en", "gemma3_270m"):
    print(_packages(preset))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    older, newer = done.stdout.splitlines()[-2:]
    assert "ok=True" in older
    assert "ok=False" in newer
    assert "KerasHub cannot read text here" in newer
    assert "pip install tensorflow" in newer
