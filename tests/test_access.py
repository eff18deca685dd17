"""Every way in which a preset cannot be fetched: the real clients against servers on loopback.

Each test ends in a loaded model or one clear sentence, and then, the fault gone, in a model that answers.
With ACCESS_TABLE=FILE in the environment, FILE then says, as Markdown, what each fault leads to.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import kagglehub
import numpy as np
import pytest
from hub_server import CUT, HANG, HANG_HALF, HANG_UP, RESET, SHORT, HubServer, Response
from huggingface_hub import constants
from kaggle_server import KaggleServer, serving

import gemma_lora as gl
from gemma_lora.access import fetch as access
from gemma_lora.access import kaggle as credentials
from gemma_lora.access.fetch import AccessError
from gemma_lora.models import TINY, TINY_FOLDER
from gemma_lora.records import DOLLY

PRESET, HANDLE = "gemma_2b_en", "keras/gemma/keras/gemma_2b_en/3"
PAGE = "https://www.kaggle.com/models/keras/gemma"
CONFIG, WEIGHTS, VOCABULARY = "/config.json", "model.weights.h5", "vocabulary.spm"
ADA, EVE, NOBODY = "KGAT_ada_secret", "KGAT_eve_secret", "KGAT_nobody_secret"
REPO, HF = "someone/tiny", "hf://someone/tiny"
HF_ADA, HF_EVE = "hf_ada_secret", "hf_eve_secret"
SECRETS = (ADA, EVE, NOBODY, HF_ADA, HF_EVE)
EVERYWHERE = {
    "401",
    "403",
    "404",
    "503, always",
    "hangs",
    "half of it",
}  # on other files than the weights: long counts
LOADS = "loads"


def at_places(faults, *places) -> list:
    """Pair faults with the files that they meet."""
    long = {(fault, place) for fault in faults for place in places if place == VOCABULARY}
    long |= {(fault, CONFIG) for fault in faults if fault not in EVERYWHERE}
    pairs = [(fault, place) for fault in faults for place in places]
    return [pytest.param(*pair, marks=[pytest.mark.full] if pair in long else []) for pair in pairs]


TEMPLATE = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)

OUTCOMES: dict[tuple[str, str], str] = {}  # (fault, place) -> what came of it


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if "ACCESS_TABLE" in os.environ:
        rows = [
            f"| {fault} | {place.strip('/')} | {said} |"
            for (fault, place), said in OUTCOMES.items()
        ]
        head = ["| fault | place | what gl.load does |", "|---|---|---|"]
        Path(os.environ["ACCESS_TABLE"]).write_text(
            "\n".join([*head, *(row.replace("\n", " ") for row in rows)]) + "\n"
        )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    """Nobody waits long here, and nobody has credentials in files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    quick = functools.partial(credentials.timeouts, 0.5, 0.5)
    monkeypatch.setattr(access, "timeouts", quick)
    monkeypatch.setattr(credentials, "timeouts", quick)


@pytest.fixture
def kaggle(tmp_path, no_waiting):
    server = KaggleServer()
    server.presets[PRESET] = TINY_FOLDER
    server.users = {ADA: "ada", EVE: "eve"}
    server.consented = {"ada"}
    with serving(server, tmp_path / "cache"):
        os.environ["KAGGLE_API_TOKEN"] = ADA
        yield server


@pytest.fixture
def model_hub(tmp_path, monkeypatch, no_waiting):
    server = HubServer()
    server.models[REPO] = TINY_FOLDER
    server.tokens_with_access = {HF_ADA}
    server.start()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url_for_tokens + TEMPLATE)
    monkeypatch.setattr(constants, "ENDPOINT", server.url_for_tokens)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    ask = huggingface_hub.HfApi.model_info
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda self, repo, timeout: ask(self, repo, timeout=timeout / 20),
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.stop()


def cached(tmp_path: Path, name: str) -> Path:
    """Where Kaggle's client keeps a file of the preset."""
    return tmp_path / "cache/models" / HANDLE / name


@functools.cache
def the_small_model():
    return gl.load()


def fetch_all():
    """Fill the cache, with the real client."""
    for file in TINY_FOLDER.rglob("*.*"):
        kagglehub.model_download(HANDLE, str(file.relative_to(TINY_FOLDER)))


def is_the_small_model(model) -> bool:
    """Whether it has the same weights, all of them, and reads a text as the same tokens."""
    expected, text = the_small_model(), "The capital of France is Paris."
    tokens = [list(map(int, one.preprocessor.tokenizer(text))) for one in (model, expected)]
    weights = zip(model.get_weights(), expected.get_weights(), strict=True)
    return tokens[0] == tokens[1] and all(np.array_equal(one, other) for one, other in weights)


def sign_in(token: str | None):
    os.environ.pop("KAGGLE_API_TOKEN", None)
    if token:
        os.environ["KAGGLE_API_TOKEN"] = token


def outcome(load=gl.load, preset=PRESET) -> tuple[str, str]:
    """Load; the reason and the sentence of what stood in the way."""
    try:
        model = load(preset)
    except AccessError as error:
        sentence = str(error)
        own = sentence.replace(credentials.THREE_WAYS, "").replace("...", "")
        assert "no config.json" not in sentence
        assert not any(secret in sentence for secret in SECRETS)
        assert own.count(". ") <= 4 and len(own) < 600, own
        return error.reason, sentence
    assert load is not gl.load or is_the_small_model(model)
    return LOADS, ""


def expect(fault: str, place: str, reason: str, words: tuple[str, ...] = (), **how) -> str:
    """Load, and compare what came of it."""
    found, sentence = outcome(**how)
    OUTCOMES[fault, place] = f"{found}: {sentence}" if sentence else found
    assert found == reason, sentence
    for word in words:
        assert word in sentence
    return found


def expect_recovery(server, preset=PRESET):
    """The fault is gone: the next call works."""
    server.failing = {}
    server.start()
    assert outcome(preset=preset) == (LOADS, "")


# Kaggle: what goes wrong on the way

NO_TOKEN = ("KAGGLE_API_TOKEN", PAGE, "Settings > API", "tiny_gemma_en")
WRONG = ("does not accept", "environment: KAGGLE_API_TOKEN", "Create a new token")
NO_CONSENT = ("has not accepted the licence of 'gemma_2b_en'", PAGE)
FAULTS = {  # name: (fault, reason, words in the sentence)
    "200": ([], LOADS, ()),
    "401": (401, "credentials", (*WRONG, "(401)")),
    "403": (403, "consent", ("ada", *NO_CONSENT)),
    "404": (404, "unknown", (HANDLE, "spelt")),
    "429": (429, "busy", ("429", "Wait")),
    "500, then 200": ([500], LOADS, ()),
    "503, always": (503, "server", ("503", "in some minutes")),
    "hangs": (HANG, "network", ("did not answer in time", "tiny_gemma_en")),
    "hangs once": ([HANG], "network", ("did not answer in time", "tiny_gemma_en")),
    "hangs half-way": (HANG_HALF, "network", ("did not answer in time",)),
    "cut in half once": ([CUT], LOADS, ()),
    "cut in half, always": (CUT, "damaged", ("broke off", "Run this again")),
    "half of it as if it were all, once": ([SHORT], LOADS, ()),
    "half of it as if it were all, always": (SHORT, "damaged", ("Run this again",)),
    "connection reset": (RESET, "network", ("cannot be reached", "proxy")),
    "connection closed": (HANG_UP, "network", ("cannot be reached", "proxy")),
}


@pytest.mark.parametrize(("fault", "place"), at_places(FAULTS, CONFIG, WEIGHTS, VOCABULARY))
def test_a_fault_ends_in_a_model_or_a_sentence_and_the_next_call_works(kaggle, fault, place):
    how, reason, words = FAULTS[fault]
    kaggle.failing = {place: list(how) if isinstance(how, list) else how}
    if expect(fault, place, reason, words) != LOADS:
        expect_recovery(kaggle)


# Kaggle: whose credentials


@pytest.mark.parametrize(
    ("token", "fault", "reason", "words"),
    [
        (ADA, "signed in, consent given", LOADS, ()),
        (NOBODY, "a wrong token", "credentials", (*WRONG, "(401)")),
        (EVE, "signed in, no consent", "consent", ("eve", *NO_CONSENT, "sign in as eve")),
        (None, "no credentials", "credentials", NO_TOKEN),
    ],
)
def test_each_refusal_says_whose_it_is_and_the_way_out(kaggle, token, fault, reason, words):
    sign_in(token)
    expect(fault, CONFIG, reason, words)
    sign_in(ADA)
    expect_recovery(kaggle)


def test_consent_given_meanwhile_is_seen_by_the_next_call(kaggle):
    sign_in(EVE)
    assert outcome()[0] == "consent"
    kaggle.consented.add("eve")
    expect_recovery(kaggle)


def test_a_user_whose_name_kaggle_does_not_say_is_told_of_the_credentials(kaggle):
    sign_in(EVE)
    kaggle.failing = {"Hello": 503}
    expect(
        "no consent, and 503 to the question whose token it is", CONFIG, "credentials", ("(403)",)
    )


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "größer"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(kaggle, token):
    sign_in(token)
    with pytest.raises(ValueError, match="Copy it again") as raised:
        gl.load(PRESET)
    assert token not in str(raised.value)
    assert not kaggle.requests


# Kaggle: what is not there, and what is not Kaggle


@pytest.mark.parametrize(
    ("preset", "fault", "words"),
    [
        (
            "kaggle://keras/gemma/keras/gemma_2b_en/99",
            "no such version",
            ("gemma_2b_en/99", "spelt"),
        ),
        (
            "kaggle://keras/gemma/keras/gemma_3b_en/1",
            "no such variation",
            ("gemma_3b_en/1", "spelt"),
        ),
        ("gemma_7b_en", "a preset that Kaggle took away", ("gemma_7b_en", "spelt")),
    ],
)
def test_what_kaggle_does_not_have_is_called_unknown(kaggle, preset, fault, words):
    expect(fault, CONFIG, "unknown", words, preset=preset)
    expect_recovery(kaggle)


@pytest.mark.parametrize("handle", [HANDLE, HANDLE.removesuffix("/3")])
def test_handles_load_too_with_and_without_a_version(kaggle, handle):
    preset = f"kaggle://{handle}"
    assert outcome(preset=preset) == (LOADS, "")
    sign_in(EVE)
    shutil.rmtree(os.environ["KAGGLEHUB_CACHE"])
    reason, sentence = outcome(preset=preset)
    assert reason == "consent" and PAGE in sentence and "eve" in sentence


@pytest.mark.parametrize(
    "handle",
    ["kaggle://keras/gemma", "kaggle://", "kaggle://a/b/c/d/e/f", "someone/tiny", "ftp://x/y"],
)
def test_what_is_no_handle_is_no_fault_of_the_network(kaggle, handle):
    with pytest.raises(ValueError, match=r"(?i)handle|preset"):
        gl.load(handle)
    assert not kaggle.requests


def test_nobody_listens(kaggle):
    kaggle.stop()
    expect(
        "connection refused",
        CONFIG,
        "network",
        ("Kaggle cannot be reached", "proxy", "tiny_gemma_en"),
    )
    expect_recovery(kaggle)


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_login_page_instead_of_a_file_is_named_and_not_kept(kaggle, tmp_path, place):
    served = tmp_path / "served"
    shutil.copytree(TINY_FOLDER, served)
    file = next(file for file in served.rglob("*") if str(file).endswith(place))
    good = file.read_bytes()
    file.write_bytes(b"<!doctype html><title>Please log in to this network</title>")
    kaggle.presets[PRESET] = served
    expect("a login page in its place", place, "damaged", ("a web page", "login"))
    file.write_bytes(good)
    expect_recovery(kaggle)


def test_a_login_page_instead_of_kaggle_is_no_crash(kaggle, monkeypatch):
    page = Response(
        200, {"Content-Type": "text/html"}, b"<!doctype html><title>Please log in</title>"
    )
    monkeypatch.setattr(kaggle, "respond", lambda *asked: page)
    found, sentence = outcome()
    OUTCOMES["a login page in place of the whole of Kaggle", CONFIG] = f"{found}: {sentence}"
    assert found in ("damaged", "network")
    monkeypatch.undo()


# Files that a preset need not have


@pytest.mark.parametrize("place", ["/task.json", "metadata.json", "task.weights.h5"])
@pytest.mark.parametrize("fault", [[500], 503, 403])
def test_a_fault_on_a_smaller_file_ends_well_too(kaggle, fault, place):
    kaggle.failing = {place: list(fault) if isinstance(fault, list) else fault}
    found, sentence = outcome()
    OUTCOMES[f"{fault[0]}, once" if isinstance(fault, list) else f"{fault}, always", place] = (
        f"{found}: {sentence}"
    )
    assert found in (LOADS, "server", "consent")
    if found != LOADS:
        expect_recovery(kaggle)


# The disk


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_full_disk_is_named_and_once_there_is_room_the_next_call_works(kaggle, tmp_path, place):
    name = next(
        str(file.relative_to(TINY_FOLDER))
        for file in TINY_FOLDER.rglob("*")
        if str(file).endswith(place)
    )
    target = cached(tmp_path, name)
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    expect("the disk is full", place, "disk", ("disk is full", "GiB are free", "KAGGLEHUB_CACHE"))
    if target.is_symlink():
        target.unlink()
    expect_recovery(kaggle)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_named(kaggle, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    expect("the cache is read-only", CONFIG, "disk", ("cannot be stored", "KAGGLEHUB_CACHE"))
    (tmp_path / "cache").chmod(0o700)
    expect_recovery(kaggle)


def test_a_file_where_the_cache_should_be_is_named(kaggle, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    expect("the cache is a file", CONFIG, "disk", ("cannot be stored", "KAGGLEHUB_CACHE"))
    (tmp_path / "cache").unlink()
    expect_recovery(kaggle)


DAMAGES = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing of it": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<html>log in</html>",
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("damage", "place"), at_places(DAMAGES, CONFIG, WEIGHTS, VOCABULARY))
def test_what_is_damaged_in_the_cache_is_fetched_again_by_itself(
    kaggle, tmp_path, damage, place, marked
):
    fetch_all()
    file = next(file for file in (tmp_path / "cache").rglob("*") if str(file).endswith(place))
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if not marked:  # as where a process was ended in the middle
        next((tmp_path / "cache").rglob(f"{file.name}.complete")).unlink()
    expect(f"cached: {damage}{'' if marked else ', unfinished'}", place, LOADS)


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_what_is_damaged_in_the_cache_is_not_used_without_a_network_either(kaggle, tmp_path, place):
    fetch_all()
    file = next(file for file in (tmp_path / "cache").rglob("*") if str(file).endswith(place))
    file.write_bytes(file.read_bytes()[:300])
    kaggle.stop()
    expect("cached: half of it; then no network", place, "network", ("cannot be reached",))
    expect_recovery(kaggle)


# Without a network


@pytest.fixture(params=["with all files", "without task.json"])
def served(request, kaggle, tmp_path):
    """Kaggle with the preset, whole, or as older ones are, whose weights do not come last."""
    if request.param == "without task.json":
        shutil.copytree(
            TINY_FOLDER, tmp_path / "served", ignore=lambda *_: ["task.json", "preprocessor.json"]
        )
        kaggle.presets[PRESET] = tmp_path / "served"
    return kaggle


@pytest.mark.parametrize("fault", ["stopped", HANG, 401, 503])
def test_what_was_loaded_once_loads_without_kaggle(served, fault):
    assert outcome() == (LOADS, "")
    if fault == "stopped":
        served.stop()
    else:
        served.failing = {"": fault}
    start = time.monotonic()
    expect(f"{fault}, after all was fetched", "all", LOADS)
    assert time.monotonic() - start < 5


def test_what_was_loaded_once_loads_without_credentials(served):
    assert outcome() == (LOADS, "")
    sign_in(None)
    assert outcome() == (LOADS, "")


def test_what_was_loaded_once_is_not_fetched_again_and_answers(kaggle):
    question = "The capital of France is"
    answers = [
        gl.generate(gl.load(name), question, template=None, max_new_tokens=5)
        for name in (PRESET, TINY)
    ]
    assert answers[0] == answers[1]
    kaggle.requests.clear()
    assert outcome() == (LOADS, "")
    assert not [what for what, _ in kaggle.requests if what.startswith("storage/")]


@pytest.mark.parametrize("place", [CONFIG, WEIGHTS, VOCABULARY])
def test_what_was_fetched_in_part_is_not_taken_for_complete(served, place):
    served.failing = {place: RESET}
    assert outcome()[0] in ("network", "damaged")
    served.stop()
    expect(
        f"{place.strip('/')} was never fetched; then no network",
        "all",
        "network",
        ("cannot be reached",),
    )
    expect_recovery(served)


# Tokenizers


def test_a_tokenizer_takes_no_weights(kaggle):
    tokenizer = gl.load_tokenizer(PRESET)
    assert tokenizer.decode(tokenizer.encode(["Paris"])) == "Paris"
    asked = {what for what, _ in kaggle.requests}
    assert any(VOCABULARY in what for what in asked)
    assert not any("weights" in what for what in asked)
    kaggle.stop()
    gl.load_tokenizer(PRESET)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_meets_the_same_faults(kaggle, fault):
    how, reason, words = FAULTS[fault]
    kaggle.failing = {VOCABULARY: list(how) if isinstance(how, list) else how}
    found, sentence = outcome(load=gl.load_tokenizer)
    assert found == reason, sentence
    assert all(word in sentence for word in words), sentence
    kaggle.failing = {}
    assert outcome(load=gl.load_tokenizer) == (LOADS, "")


def test_a_tokenizer_without_consent_names_the_page(kaggle):
    sign_in(EVE)
    reason, sentence = outcome(load=gl.load_tokenizer)
    assert reason == "consent" and PAGE in sentence


# The Hub


@pytest.mark.parametrize(
    ("token", "fault", "reason", "words"),
    [
        (
            None,
            "gated, no token",
            "credentials",
            ("no token for the Hub", f"huggingface.co/{REPO}", "HF_TOKEN"),
        ),
        (HF_EVE, "gated, no access", "consent", (f"huggingface.co/{REPO}", "accept")),
        (HF_ADA, "gated, access", LOADS, ()),
    ],
)
def test_a_gated_repository_says_what_is_missing(
    model_hub, monkeypatch, token, fault, reason, words
):
    model_hub.gated = {REPO}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    expect(f"Hub: {fault}", CONFIG, reason, words, preset=HF)
    monkeypatch.setenv("HF_TOKEN", HF_ADA)
    expect_recovery(model_hub, HF)


HUB_FAULTS = {
    "200": ([], LOADS, ()),
    "401": (401, "credentials", ("no token for the Hub",)),
    "403": (403, "credentials", ("no token for the Hub",)),
    "404": (404, "unknown", (REPO, "spelt")),
    "429": (429, "busy", ("429",)),
    "500, then 200": ([500], LOADS, ()),
    "503, always": (503, "server", ("503",)),
    "cut in half once": ([CUT], LOADS, ()),
    "half of it as if it were all, once": ([SHORT], LOADS, ()),
    "connection reset": (RESET, "network", ("cannot be reached",)),
    "connection closed": (HANG_UP, "damaged", ("broke off",)),
}


@pytest.mark.parametrize(("fault", "place"), at_places(HUB_FAULTS, CONFIG, WEIGHTS))
def test_a_fault_of_the_hub_ends_in_a_model_or_a_sentence_too(model_hub, fault, place):
    how, reason, words = HUB_FAULTS[fault]
    model_hub.failing = {place: list(how) if isinstance(how, list) else how}
    if expect(f"Hub: {fault}", place, reason, words, preset=HF) != LOADS:
        expect_recovery(model_hub, HF)


@pytest.mark.parametrize("fault", ["stopped", HANG, 429, 503, RESET])
def test_a_hub_that_fails_altogether_is_named_soon(model_hub, fault):
    reason = {429: "busy", 503: "server"}.get(fault, "network")
    model_hub.failing = {"": fault}
    if fault == "stopped":
        model_hub.stop()
    start = time.monotonic()
    expect(f"Hub: {fault}, for all", CONFIG, reason, ("Hub",), preset=HF)
    assert time.monotonic() - start < 5
    expect_recovery(model_hub, HF)


def test_a_repository_that_the_hub_does_not_have_is_called_unknown(model_hub):
    expect(
        "Hub: no such repository",
        CONFIG,
        "unknown",
        ("someone/else", "spelt"),
        preset="hf://someone/else",
    )


@pytest.mark.parametrize(
    ("damage", "place"), at_places(["half of it", "a web page"], CONFIG, WEIGHTS, VOCABULARY)
)
def test_what_is_damaged_in_the_cache_of_the_hub_is_fetched_again(
    model_hub, tmp_path, damage, place
):
    assert outcome(preset=HF) == (LOADS, "")
    file = next(file for file in (tmp_path / "hub").rglob("*") if str(file).endswith(place))
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    expect(f"Hub, cached: {damage}", place, LOADS, preset=HF)


@pytest.mark.parametrize("fault", ["stopped", HANG, 401, 503, RESET])
def test_what_was_loaded_once_loads_without_the_hub(model_hub, fault):
    assert outcome(preset=HF) == (LOADS, "")
    model_hub.failing = {"": fault}
    if fault == "stopped":
        model_hub.stop()
    start = time.monotonic()
    expect(f"Hub: {fault}, after all was fetched", "all", LOADS, preset=HF)
    assert time.monotonic() - start < 5


# HF_HUB_OFFLINE, which is read at import

LOAD_OFFLINE = """
import sys
import gemma_lora as gl

for preset in sys.argv[1:]:
    try:
        gl.load(preset)
        print("loaded", preset)
    except access.AccessError as error:
        print(error.reason, error)
train, held_out = gl.load_dolly(rows=3, or_tiny_world=True)
print(train.num_rows, "rows:", train[0]["instruction"])
"""


def offline(*presets: str) -> list[str]:
    """What a process of its own says that may not ask the Hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
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
    assert (
        refused.startswith(f"network '{HF}' is not on this machine") and "HF_HUB_OFFLINE" in refused
    )
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
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE)
    with monkeypatch.context() as back:  # Dolly is on the other Hub, that of all tests
        back.setattr(constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
        back.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{os.environ['HF_ENDPOINT']}{TEMPLATE}"
        )
        gl.load_dolly(rows=3)
    model_hub.stop()
    assert offline(HF) == [f"loaded {HF}", "3 rows: Dolly 0?"]
