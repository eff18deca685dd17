"""The matrix: every fault on every file, on both sites, each ending in a loaded model
or a sentence.

`test_access.py` has one test for each outcome; this is the long count behind it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from hub_server import CUT, HANG, HANG_HALF, HANG_UP, RESET, SHORT
from huggingface_hub import constants
from test_access import (
    AWAY,
    BROKEN,
    BUSY,
    CLOSED,
    CONFIG,
    CONSENT,
    EVE,
    FULL,
    HANDLE,
    HF,
    HF_ADA,
    HUB_NO_TOKEN,
    LOADS,
    MISSING,
    OUTCOMES,
    PAGE,
    PRESET,
    REFUSED,
    REPO,
    SILENT,
    VOCABULARY,
    WEIGHTS,
    cached,
    do_as_told,
    expect,
    expect_recovery,
    fetch_all,
    kaggle,
    model_hub,
    no_waiting,
    outcome,
    sign_in,
    table,
    wait_half_a_second,
)

import gemma_lora as gl
from gemma_lora.models import TINY_FOLDER
from gemma_lora.records import DOLLY

pytestmark = pytest.mark.full
__all__ = ["kaggle", "model_hub", "no_waiting", "table"]  # fixtures

FAULTS = {  # name: (fault, reason, words in the sentence)
    "200": ([], LOADS, ()),
    "401": (401, "credentials", (*REFUSED, "(401)")),
    # KerasHub hides a 403 for the weights; the client's own comes with config.json.
    "403": (403, "consent", ("ada", *CONSENT)),
    "404": (404, "unknown", MISSING),
    "429": (429, "busy", BUSY),
    "500, then 200": ([500], "server", ("500",)),
    "503, always": (503, "server", ("503", "in some minutes")),
    "hangs": (HANG, "network", SILENT),
    "hangs once": ([HANG], "network", SILENT),
    "hangs half-way": (HANG_HALF, "network", SILENT),
    "cut in half once": ([CUT], "damaged", BROKEN),
    "cut in half, always": (CUT, "damaged", BROKEN),
    "half of it as if it were all, once": ([SHORT], "damaged", BROKEN),
    "half of it as if it were all, always": (SHORT, "damaged", BROKEN),
    "connection reset": (RESET, "network", AWAY),
    "connection closed": (HANG_UP, "network", AWAY),
}
# Kaggle's client sets no time limit: only the first, small file is fetched with one of
# ours.
PAIRS = [
    (fault, place)
    for fault in FAULTS
    for place in (CONFIG, WEIGHTS, VOCABULARY)
    if place == CONFIG or ("hangs" not in fault and (fault, place) != ("403", WEIGHTS))
]


@pytest.mark.parametrize(("fault", "place"), PAIRS)
def test_a_fault_ends_in_a_model_or_a_sentence_and_the_next_call_works(kaggle, fault, place):
    how, reason, words = FAULTS[fault]
    kaggle.failing = {place: list(how) if isinstance(how, list) else how}
    if "hangs" in fault:
        wait_half_a_second()
    expect(fault, place, reason, words)
    expect_recovery(kaggle)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_meets_the_same_faults(kaggle, fault):
    how, reason, words = FAULTS[fault]
    place = CONFIG if "hangs" in fault else VOCABULARY
    kaggle.failing = {place: list(how) if isinstance(how, list) else how}
    if "hangs" in fault:
        wait_half_a_second()
    expect(f"tokenizer: {fault}", place, reason, words, load=gl.load_tokenizer)
    expect_recovery(kaggle, load=gl.load_tokenizer)


def test_a_tokenizer_takes_no_weights(kaggle):
    tokenizer = gl.load_tokenizer(PRESET)
    assert tokenizer.decode(tokenizer.encode(["Paris"])) == "Paris"
    assert not any("weights" in what for what, _ in kaggle.requests)
    kaggle.stop()
    gl.load_tokenizer(PRESET)


def test_consent_given_meanwhile_is_seen_by_the_next_call(kaggle):
    sign_in(EVE)
    assert outcome()[0] == "consent"
    kaggle.consented.add("eve")
    expect_recovery(kaggle)


@pytest.mark.parametrize(
    ("preset", "fault"),
    [
        ("kaggle://keras/gemma/keras/gemma_2b_en/99", "no such version"),
        ("kaggle://keras/gemma/keras/gemma_3b_en/1", "no such variation"),
        ("gemma_7b_en", "a preset that Kaggle took away"),
    ],
)
def test_what_kaggle_does_not_have_is_called_unknown(kaggle, preset, fault):
    expect(fault, CONFIG, "unknown", (preset.partition("/keras/")[2], "spelt"), preset=preset)
    expect_recovery(kaggle)


@pytest.mark.parametrize("handle", [HANDLE, HANDLE.removesuffix("/3")])
def test_handles_load_too_with_and_without_a_version(kaggle, handle):
    preset = f"kaggle://{handle}"
    assert outcome(preset=preset) == (LOADS, "")
    sign_in(EVE)
    shutil.rmtree(os.environ["KAGGLEHUB_CACHE"])
    reason, sentence = outcome(preset=preset)
    assert reason == "consent" and PAGE in sentence and "eve" in sentence


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_login_page_instead_of_a_file_is_named(kaggle, tmp_path, place):
    served = shutil.copytree(TINY_FOLDER, tmp_path / "served")
    file = cached(served, place)
    good = file.read_bytes()
    file.write_bytes(b"<!doctype html><title>Please log in to this network</title>")
    kaggle.presets[PRESET] = served
    sentence = expect("a login page", place, "damaged", ("a web page", "login"))
    file.write_bytes(good)
    do_as_told(sentence, tmp_path)
    expect_recovery(kaggle)


@pytest.mark.parametrize("place", ["/task.json", "metadata.json", "task.weights.h5"])
@pytest.mark.parametrize("fault", [[500], 503, 403])
def test_a_fault_on_a_smaller_file_ends_well_too(kaggle, fault, place):
    kaggle.failing = {place: list(fault) if isinstance(fault, list) else fault}
    found, sentence = outcome()
    OUTCOMES[str(fault), place] = f"{found}: {sentence}"
    assert found in (LOADS, "server", "consent")
    expect_recovery(kaggle)


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_full_disk_is_named_and_once_there_is_room_the_next_call_works(kaggle, tmp_path, place):
    name = cached(TINY_FOLDER, place).relative_to(TINY_FOLDER)
    target = tmp_path / "cache/models" / HANDLE / name
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    expect("the disk is full", place, "disk", FULL)
    if target.is_symlink():
        target.unlink()
    expect_recovery(kaggle)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_named(kaggle, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    expect("the cache is read-only", CONFIG, "disk", CLOSED)
    (tmp_path / "cache").chmod(0o700)
    expect_recovery(kaggle)


# Damaged copies

DAMAGES = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing of it": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<html>log in</html>",
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_loads_again_or_is_named(kaggle, tmp_path, damage, place, marked):
    fetch_all()
    file = cached(tmp_path / "cache", place)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if not marked:
        # As if a process had ended in the middle: Kaggle's client goes on with the
        # download.
        cached(tmp_path / "cache", f"{file.name}.complete").unlink()
    found, sentence = outcome()
    OUTCOMES[f"cached: {damage}{'' if marked else ', unfinished'}", place] = f"{found}: {sentence}"
    assert found == "damaged" or not marked, sentence
    if "rm -r" in sentence:
        assert file.name in sentence
        do_as_told(sentence, tmp_path)
    expect_recovery(kaggle)


@pytest.mark.parametrize("damage", ["half of it", "a web page"])
@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_damaged_copy_of_the_hub_is_named(model_hub, tmp_path, damage, place):
    assert outcome(preset=HF) == (LOADS, "")
    file = cached(tmp_path / "hub", place)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    sentence = expect(f"Hub, cached: {damage}", place, "damaged", (file.name,), preset=HF)
    do_as_told(sentence, tmp_path)
    expect_recovery(model_hub, HF)


# Without a network


@pytest.fixture(params=["with all files", "without task.json"])
def served(request, kaggle, tmp_path):
    """Kaggle with the preset, or an older one, whose weights do not come last."""
    if request.param == "without task.json":
        shutil.copytree(
            TINY_FOLDER, tmp_path / "served", ignore=lambda *_: ["task.json", "preprocessor.json"]
        )
        kaggle.presets[PRESET] = tmp_path / "served"
    return kaggle


@pytest.mark.parametrize("fault", ["stopped", HANG, 401, 503, "no token"])
def test_what_was_loaded_once_loads_without_kaggle(served, fault):
    assert outcome() == (LOADS, "")
    if fault == "stopped":
        served.stop()
    elif fault == "no token":
        sign_in(None)
    else:
        served.failing = {"": fault}
    wait_half_a_second()
    start = time.monotonic()
    expect(f"{fault}, after all was fetched", "all", LOADS)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_what_was_fetched_in_part_is_not_taken_for_complete(served, place):
    served.failing = {place: RESET}
    assert outcome()[0] in ("network", "damaged")
    served.failing = {}
    served.stop()
    expect(f"{place.strip('/')} was never fetched; then no network", "all", "network", AWAY)
    expect_recovery(served)


# The Hub

HUB_FAULTS = {
    "200": ([], LOADS, ()),
    "401": (401, "credentials", ("no token for the Hub",)),
    "403": (403, "credentials", ("no token for the Hub",)),
    "404": (404, "unknown", (REPO, "spelt")),
    "429": (429, "busy", BUSY),
    # The Hub's client tries again by itself.
    "500, then 200": ([500], LOADS, ()),
    "503, always": (503, "server", ("503",)),
    "cut in half once": ([CUT], LOADS, ()),
    "half of it as if it were all": (SHORT, "damaged", BROKEN),
    "connection reset": (RESET, "network", AWAY),
    "connection closed": (HANG_UP, "damaged", BROKEN),
}


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("fault", HUB_FAULTS)
def test_a_fault_of_the_hub_ends_in_a_model_or_a_sentence_too(model_hub, fault, place):
    how, reason, words = HUB_FAULTS[fault]
    model_hub.failing = {place: list(how) if isinstance(how, list) else how}
    expect(f"Hub: {fault}", place, reason, words, preset=HF)
    expect_recovery(model_hub, HF)


def fail_altogether(model_hub, fault) -> None:
    """Let the Hub answer every request with a fault; "stopped" closes its port."""
    model_hub.failing = {"": fault}
    if fault == "stopped":
        model_hub.stop()
    if fault == HANG:
        wait_half_a_second()


@pytest.mark.parametrize("fault", ["stopped", HANG, 429, 503, RESET])
def test_a_hub_that_fails_altogether_is_named_soon(model_hub, fault):
    reason = {429: "busy", 503: "server"}.get(fault, "network")
    fail_altogether(model_hub, fault)
    start = time.monotonic()
    expect(f"Hub: {fault}, for all", CONFIG, reason, ("Hub",), preset=HF)
    assert time.monotonic() - start < 5
    expect_recovery(model_hub, HF)


def test_a_repository_that_the_hub_does_not_have_is_called_unknown(model_hub):
    words = ("someone/else", "spelt")
    expect("Hub: no such repository", CONFIG, "unknown", words, preset="hf://someone/else")


def test_a_gated_repository_of_nobody_asks_for_a_token(model_hub, monkeypatch):
    model_hub.gated = {REPO}
    expect("Hub: gated, no token", CONFIG, "credentials", HUB_NO_TOKEN, preset=HF)
    monkeypatch.setenv("HF_TOKEN", HF_ADA)
    expect_recovery(model_hub, HF)


@pytest.mark.parametrize("fault", ["stopped", HANG, 401, 503, RESET])
def test_what_was_loaded_once_loads_without_the_hub(model_hub, fault):
    assert outcome(preset=HF) == (LOADS, "")
    fail_altogether(model_hub, fault)
    start = time.monotonic()
    expect(f"Hub: {fault}, after all was fetched", "all", LOADS, preset=HF)
    assert time.monotonic() - start < 10


# HF_HUB_OFFLINE, which is read at import

LOAD_OFFLINE = """
import sys
import gemma_lora as gl

for preset in sys.argv[1:]:
    try:
        gl.load(preset)
        print("loaded", preset)
    except RuntimeError as error:
        print(error.reason, error)
train, held_out = gl.load_dolly(rows=3, or_tiny_world=True)
print(train.num_rows, "rows:", train[0]["instruction"])
"""


def offline(*presets: str) -> list[str]:
    """What a process of its own says that may not ask the Hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    environment["PYTHONPATH"] = str(Path(gl.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_OFFLINE, *presets],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_offline_what_is_not_here_is_said_and_the_small_world_stands_in(
    model_hub, hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    refused, dolly, instead, rows = offline(HF)
    OUTCOMES["HF_HUB_OFFLINE=1, nothing cached", "all"] = refused
    OUTCOMES["HF_HUB_OFFLINE=1, no Dolly", "load_dolly"] = f"{dolly} {instead}"
    assert refused.startswith(f"network '{HF}' is not on this machine")
    assert "HF_HUB_OFFLINE" in refused
    assert DOLLY in dolly and instead == "These are records of the small world instead."
    assert rows.startswith("3 rows: ") and "Dolly" not in rows


def test_offline_what_was_fetched_before_is_used(model_hub, hub, tmp_path, monkeypatch):
    rows = [
        {"instruction": f"Dolly {n}?", "context": "", "response": "So.", "category": "open_qa"}
        for n in range(5)
    ]
    hub.repos[DOLLY] = {"databricks-dolly-15k.jsonl": "\n".join(map(json.dumps, rows)).encode()}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert outcome(preset=HF) == (LOADS, "")
    # Dolly is on the other Hub, that of all tests.
    here = constants.ENDPOINT
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(here)
    with monkeypatch.context() as back:
        back.setattr(constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
        back.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{os.environ['HF_ENDPOINT']}{template}"
        )
        gl.load_dolly(rows=3)
    model_hub.stop()
    assert offline(HF) == [f"loaded {HF}", "3 rows: Dolly 0?"]
