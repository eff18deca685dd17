"""Every way in which a preset cannot be fetched, and what is then said.

First the table: what a recorded error of a real client means, as the pure function that
it is. Then the real clients against servers on loopback: one test for each outcome and
site. The matrix of faults and files is marked `full`; with ACCESS_TABLE=FILE in the
environment, FILE then says, as Markdown, what each fault leads to.
"""

import builtins
import errno
import functools
import http.client
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import kagglehub
import numpy as np
import pytest
import requests
from hub_server import CUT, HANG, HANG_UP, RESET, SHORT, HubServer, Response, hub_of_this_process
from huggingface_hub import constants, errors
from kaggle_server import KaggleServer, serving
from kagglehub.exceptions import DataCorruptionError, KaggleApiHTTPError

import gemma_lora as gl
from gemma_lora import checks
from gemma_lora.access import fetch as access
from gemma_lora.access import kaggle as credentials
from gemma_lora.access.fetch import AccessError, Source, explain
from gemma_lora.models import TINY, TINY_FOLDER

PRESET, HANDLE = "gemma_2b_en", "keras/gemma/keras/gemma_2b_en/3"
PAGE = "https://www.kaggle.com/models/keras/gemma"
CONFIG, WEIGHTS, VOCABULARY = "/config.json", "model.weights.h5", "vocabulary.spm"
ADA, EVE, NOBODY = "KGAT_ada_secret", "KGAT_eve_secret", "KGAT_nobody_secret"
REPO, HF = "someone/tiny", "hf://someone/tiny"
HF_ADA, HF_EVE = "hf_ada_secret", "hf_eve_secret"
SECRETS = (ADA, EVE, NOBODY, HF_ADA, HF_EVE)
LOADS = "loads"

# The Hub's client has changed its HTTP library twice: take the one that this version
# uses.
HTTP = sys.modules[type(huggingface_hub.utils.get_session()).__module__.partition(".")[0]]


# What an error means: a table


def kaggle_answer(status: int, text: str = "") -> Exception:
    """Make what kagglehub raises for an answer."""
    response = requests.Response()
    response.status_code = status
    return KaggleApiHTTPError(f"{status} Client Error. {text}", response=response)


def hub_answer(status: int, kind=errors.HfHubHTTPError, text: str = "") -> Exception:
    """Make what huggingface_hub raises for an answer."""
    request = HTTP.Request("GET", "https://huggingface.co/someone/tiny")
    return kind(f"{status} {text}", response=HTTP.Response(status, request=request))


def after(cause: Exception, error: Exception) -> Exception:
    """Make an error that was raised while another one was handled, as KerasHub does."""
    error.__context__ = cause
    return error


def no_config() -> Exception:
    return FileNotFoundError("`config.json` doesn't exist in preset directory `gemma_2b_en`.")


def disk(number: int) -> Exception:
    return OSError(number, os.strerror(number), "/somewhere/model.weights.h5")


NO_TOKEN = ("KAGGLE_API_TOKEN", PAGE, "Settings > API", "tiny_gemma_en")
REFUSED = ("does not accept", "environment: KAGGLE_API_TOKEN", "Create a new token")
CONSENT = ("has not accepted the licence of 'gemma_2b_en'", PAGE)
HUB_NO_TOKEN = ("no token for the Hub", f"huggingface.co/{REPO}", "HF_TOKEN")
MISSING = ("spelt right", HANDLE)
BUSY = ("rate-limiting", "429", "Wait a few minutes")
SILENT = ("did not answer in time", "tiny_gemma_en")
AWAY = ("cannot be reached", "proxy", "tiny_gemma_en")
BROKEN = ("broke off", "Run this again")
FULL = ("disk is full", "Delete what you can spare")
CLOSED = ("cannot be stored",)
K, H = PRESET, HF
KAGGLE_TOKEN, HUB_TOKEN = "environment: KAGGLE_API_TOKEN", "HF_TOKEN"

# error, preset, place of the credentials, user, reason, words in the sentence
EXPLAINED = [
    (kaggle_answer(401), K, None, None, "credentials", NO_TOKEN),
    (kaggle_answer(403), K, None, None, "credentials", NO_TOKEN),
    (kaggle_answer(401), K, KAGGLE_TOKEN, None, "credentials", (*REFUSED, "(401)")),
    (kaggle_answer(403), K, KAGGLE_TOKEN, None, "credentials", (*REFUSED, "(403)")),
    (kaggle_answer(403), K, KAGGLE_TOKEN, "ada", "consent", ("ada", "sign in as ada", *CONSENT)),
    (kaggle_answer(404), K, KAGGLE_TOKEN, "ada", "unknown", MISSING),
    (kaggle_answer(429), K, KAGGLE_TOKEN, None, "busy", BUSY),
    (kaggle_answer(500), K, KAGGLE_TOKEN, None, "server", ("Kaggle has a fault", "(500)")),
    (kaggle_answer(503), K, KAGGLE_TOKEN, None, "server", ("in some minutes", "(503)")),
    (kaggle_answer(400, "strange"), K, KAGGLE_TOKEN, None, "unknown", ("unexpected", "strange")),
    (kaggle_answer(418), K, KAGGLE_TOKEN, None, "unknown", ("unexpected answer (418)",)),
    (after(kaggle_answer(403), no_config()), K, KAGGLE_TOKEN, "ada", "consent", CONSENT),
    (after(kaggle_answer(404), no_config()), K, KAGGLE_TOKEN, None, "unknown", MISSING),
    (after(kaggle_answer(502), ValueError("502")), K, KAGGLE_TOKEN, None, "server", ("(502)",)),
    (kaggle_answer(403), "kaggle://a/b/keras/c", KAGGLE_TOKEN, "ada", "consent",
     ("do not exist", "https://www.kaggle.com/models/a/b")),
    (requests.ConnectTimeout(), K, KAGGLE_TOKEN, None, "network", SILENT),
    (requests.ReadTimeout(), K, KAGGLE_TOKEN, None, "network", SILENT),
    (TimeoutError(), K, KAGGLE_TOKEN, None, "network", SILENT),
    (after(TimeoutError(), requests.ConnectionError()), K, KAGGLE_TOKEN, None, "network", SILENT),
    (requests.ConnectionError("refused"), K, KAGGLE_TOKEN, None, "network", AWAY),
    (requests.exceptions.ProxyError(), K, KAGGLE_TOKEN, None, "network", AWAY),
    (requests.exceptions.SSLError(), K, KAGGLE_TOKEN, None, "network", AWAY),
    (ConnectionResetError(), K, KAGGLE_TOKEN, None, "network", AWAY),
    (requests.exceptions.ChunkedEncodingError("cut"), K, KAGGLE_TOKEN, None, "damaged", BROKEN),
    (requests.exceptions.ContentDecodingError(), K, KAGGLE_TOKEN, None, "damaged", BROKEN),
    (after(http.client.IncompleteRead(b""), requests.ConnectionError()), K, KAGGLE_TOKEN,
     None, "damaged", BROKEN),
    (DataCorruptionError("MD5"), K, KAGGLE_TOKEN, None, "damaged", BROKEN),
    (requests.exceptions.JSONDecodeError("no", "<html>", 0), K, KAGGLE_TOKEN, None, "server",
     ("a web page", "login")),
    (disk(errno.ENOSPC), K, KAGGLE_TOKEN, None, "disk", (*FULL, "KAGGLEHUB_CACHE")),
    (disk(errno.EDQUOT), H, HUB_TOKEN, None, "disk", (*FULL, "HF_HOME")),
    (disk(errno.EACCES), K, KAGGLE_TOKEN, None, "disk", (*CLOSED, "KAGGLEHUB_CACHE")),
    (disk(errno.EROFS), H, HUB_TOKEN, None, "disk", (*CLOSED, "HF_HOME")),
    (disk(errno.ENOTDIR), K, KAGGLE_TOKEN, None, "disk", CLOSED),
    (hub_answer(401, errors.GatedRepoError), H, None, None, "credentials", HUB_NO_TOKEN),
    (hub_answer(401, errors.RepositoryNotFoundError), H, HUB_TOKEN, None, "credentials",
     ("does not accept this machine's token", REPO, "login()")),
    (hub_answer(403, errors.GatedRepoError), H, HUB_TOKEN, None, "consent",
     ("has no access to", f"huggingface.co/{REPO}", "accept")),
    (hub_answer(403), H, None, None, "credentials", HUB_NO_TOKEN),
    (hub_answer(404, errors.RepositoryNotFoundError), H, HUB_TOKEN, None, "unknown", (REPO,)),
    (hub_answer(404, errors.RemoteEntryNotFoundError), H, None, None, "unknown", ("spelt",)),
    (hub_answer(429), H, None, None, "busy", BUSY),
    (hub_answer(504), H, None, None, "server", ("The Hugging Face Hub has a fault", "(504)")),
    (after(hub_answer(503), errors.LocalEntryNotFoundError("no")), H, None, None, "server",
     ("(503)",)),
    (errors.LocalEntryNotFoundError("no connection"), H, None, None, "network", AWAY),
    (errors.OfflineModeIsEnabled("offline"), H, None, None, "network", ("HF_HUB_OFFLINE forbids",)),
    (HTTP.ConnectTimeout("slow"), H, None, None, "network", SILENT),
    (HTTP.ReadTimeout("slow"), H, None, None, "network", SILENT),
    (HTTP.ConnectError("refused"), H, None, None, "network", AWAY),
    (HTTP.RemoteProtocolError("closed"), H, None, None, "damaged", BROKEN),
    (OSError("Consistency check failed: file should be of size 7"), H, None, None, "damaged",
     BROKEN),
    (ValueError("Invalid model handle: keras/gemma"), K, None, None, None, ()),
    (KeyError("module"), H, None, None, None, ()),
]  # fmt: skip


@contextmanager
def nothing_is_touched():
    """Note every look at a disk or the network meanwhile; there is to be none."""
    touched = []
    watched = ((builtins, "open"), (os, "stat"), (os, "unlink"), (os, "remove"), (os, "scandir"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (*watched, (socket, "socket"), (shutil, "rmtree")):
            patch.setattr(module, name, lambda *args, **options: touched.append(args))
        yield
    assert not touched


@pytest.mark.parametrize(
    ("error", "preset", "place", "user", "reason", "words"),
    EXPLAINED,
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_is_explained(error, preset, place, user, reason, words):
    source = Source(preset)
    with nothing_is_touched():
        problem = explain(error, source, place=place, user=user)
    if reason is None:
        assert problem is None
        return
    assert problem.reason == reason, problem
    assert all(word in problem.sentence for word in words), problem.sentence
    is_short(problem.sentence)


def is_short(sentence: str):
    own = sentence.replace(credentials.THREE_WAYS, "").replace("...", "")
    assert own.count(". ") <= 4 and len(own) < 600, own
    assert "no config.json" not in sentence and "{" not in sentence


# The real clients

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


@pytest.fixture
def no_waiting(monkeypatch, tmp_path):
    """Nobody waits between attempts, and nobody has credentials in files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(credentials, "SECONDS", credentials.SECONDS)
    monkeypatch.setattr(access, "_HUB_SECONDS", access._HUB_SECONDS)
    monkeypatch.setattr(checks, "_pip_check", lambda: "")


def wait_half_a_second():
    """Wait no longer for a server that hangs; `no_waiting` puts the limits back."""
    credentials.SECONDS = access._HUB_SECONDS = 0.5


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
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_of_this_process(server, tmp_path / "hub"):
        yield server


def cached(folder: Path, name: str) -> Path:
    """Find a file of the preset in a cache."""
    return next(file for file in folder.rglob("*") if str(file).endswith(name))


@functools.cache
def the_small_model():
    return gl.load()


def fetch_all():
    """Fill the cache, with the real client."""
    for file in TINY_FOLDER.rglob("*.*"):
        kagglehub.model_download(HANDLE, str(file.relative_to(TINY_FOLDER)))


def is_the_small_model(model) -> bool:
    """Whether it has all the same weights, and reads a text as the same tokens."""
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
        assert error.__cause__ is None and error.__context__ is None
        assert not any(secret in str(error) + repr(error) for secret in SECRETS)
        is_short(str(error))
        return error.reason, str(error)
    assert load is not gl.load or is_the_small_model(model)
    return LOADS, ""


def expect(fault: str, place: str, reason: str, words: tuple[str, ...] = (), **how) -> str:
    """Load, and compare what came of it."""
    found, sentence = outcome(**how)
    OUTCOMES[fault, place] = f"{found}: {sentence}" if sentence else found
    assert found == reason, sentence
    for word in words:
        assert word in sentence
    return sentence


def do_as_told(sentence: str, folder: Path):
    """Run the command that a sentence about a damaged copy ends with."""
    command = shlex.split(sentence.splitlines()[-1])
    assert command[:2] == ["rm", "-r"] and folder in Path(command[2]).parents
    subprocess.run(command, check=True)


def expect_recovery(server, preset=PRESET, load=gl.load):
    """The fault is gone: the next call works."""
    server.failing = {}
    server.start()
    assert outcome(preset=preset, load=load) == (LOADS, "")


# One test for each outcome: a tokenizer is the smallest download

TOKENIZER = {"load": gl.load_tokenizer}
ENDS = [
    # token, fault, reason, words
    (ADA, None, LOADS, ()),
    (NOBODY, None, "credentials", (*REFUSED, "(401)")),
    (EVE, None, "consent", ("eve", "sign in as eve", *CONSENT)),
    (None, None, "credentials", NO_TOKEN),
    (ADA, {CONFIG: 404}, "unknown", MISSING),
    (ADA, {CONFIG: 429}, "busy", BUSY),
    (ADA, {CONFIG: 503}, "server", ("503",)),
    (ADA, {CONFIG: HANG}, "network", SILENT),
    (ADA, {CONFIG: RESET}, "network", AWAY),
    (ADA, {VOCABULARY: CUT}, "damaged", BROKEN),
    (ADA, {VOCABULARY: SHORT}, "damaged", BROKEN),
    (ADA, {VOCABULARY: 503}, "server", ("503",)),
    (EVE, {"Hello": 503}, "credentials", ("(403)",)),
]


@pytest.mark.parametrize(("token", "fault", "reason", "words"), ENDS)
def test_kaggle_ends_in_a_tokenizer_or_a_sentence(kaggle, token, fault, reason, words):
    sign_in(token)
    kaggle.failing = fault or {}
    if HANG in (fault or {}).values():
        wait_half_a_second()
    expect(str(fault), str(token), reason, words, **TOKENIZER)
    sign_in(ADA)
    expect_recovery(kaggle, **TOKENIZER)
    asked = {what for what, _ in kaggle.requests}
    assert not any("weights" in what for what in asked)


HUB_ENDS = [
    # token, gated, fault, reason, words
    (None, False, None, LOADS, ()),
    (HF_ADA, True, None, LOADS, ()),
    (None, True, None, "credentials", HUB_NO_TOKEN),
    (HF_EVE, True, None, "consent", (f"huggingface.co/{REPO}", "accept")),
    (HF_EVE, False, {"": 401}, "credentials", ("does not accept this machine's token",)),
    (None, False, {CONFIG: 404}, "unknown", (REPO, "spelt")),
    (None, False, {"": 429}, "busy", BUSY),
    (None, False, {"": 503}, "server", ("503",)),
    (None, False, {"": HANG}, "network", ("Hub did not answer in time",)),
    (None, False, {"": RESET}, "network", ("Hub cannot be reached",)),
    (None, False, {CONFIG: HANG_UP}, "damaged", BROKEN),
]


@pytest.mark.parametrize(("token", "gated", "fault", "reason", "words"), HUB_ENDS)
def test_the_hub_ends_in_a_tokenizer_or_a_sentence(
    model_hub, monkeypatch, token, gated, fault, reason, words
):
    model_hub.gated = {REPO} if gated else set()
    model_hub.failing = fault or {}
    if HANG in (fault or {}).values():
        wait_half_a_second()
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    expect(f"Hub: {fault}", str(token), reason, words, preset=HF, **TOKENIZER)
    monkeypatch.setenv("HF_TOKEN", HF_ADA)
    expect_recovery(model_hub, HF, **TOKENIZER)


@pytest.mark.parametrize("site", ["kaggle", "model_hub"])
def test_where_nobody_listens_the_network_is_named(request, site):
    server = request.getfixturevalue(site)
    server.stop()
    preset = HF if site == "model_hub" else PRESET
    expect("nobody listens", site, "network", AWAY, preset=preset, **TOKENIZER)
    expect_recovery(server, preset, **TOKENIZER)


def test_without_the_network_by_order_the_hub_is_not_asked(model_hub, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        expect("offline", HF, "network", ("HF_HUB_OFFLINE forbids",), preset=HF, **TOKENIZER)
    assert not model_hub.requests
    assert outcome(preset=HF) == (LOADS, "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert outcome(preset=HF) == (LOADS, "")


def test_the_disk_is_full(kaggle, tmp_path):
    target = tmp_path / "cache/models" / HANDLE / "config.json"
    target.parent.mkdir(parents=True)
    target.symlink_to("/dev/full")
    expect("the disk is full", CONFIG, "disk", (*FULL, "KAGGLEHUB_CACHE"), **TOKENIZER)
    with suppress(FileNotFoundError):
        target.unlink()
    expect_recovery(kaggle, **TOKENIZER)


def test_a_file_where_the_cache_should_be_is_named(kaggle, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    expect("the cache is a file", CONFIG, "disk", (*CLOSED, "KAGGLEHUB_CACHE"), **TOKENIZER)
    (tmp_path / "cache").unlink()
    expect_recovery(kaggle, **TOKENIZER)


def test_a_login_page_instead_of_a_file_is_named(kaggle, tmp_path):
    served = shutil.copytree(TINY_FOLDER, tmp_path / "served")
    (served / "config.json").write_text("<!doctype html><title>Please log in</title>")
    kaggle.presets[PRESET] = served
    sentence = expect("a login page", CONFIG, "damaged", ("a web page", "login"), **TOKENIZER)
    shutil.copy(TINY_FOLDER / "config.json", served)
    do_as_told(sentence, tmp_path)
    expect_recovery(kaggle, **TOKENIZER)


@pytest.mark.parametrize("preset", [PRESET, f"kaggle://{HANDLE.removesuffix('/3')}"])
def test_a_login_page_instead_of_kaggle_is_no_crash(kaggle, monkeypatch, preset):
    html = {"Content-Type": "text/html"}
    page = Response(200, html, b"<!doctype html><title>Please log in</title>")
    monkeypatch.setattr(kaggle, "respond", lambda *asked: page)
    reason, sentence = outcome(preset=preset)
    assert reason in ("damaged", "server") and "login" in sentence


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "größer"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(kaggle, token):
    sign_in(token)
    with pytest.raises(ValueError, match="Copy it again") as raised:
        gl.load(PRESET)
    assert token not in str(raised.value)
    assert not kaggle.requests


@pytest.mark.parametrize(
    "handle",
    ["kaggle://keras/gemma", "kaggle://", "kaggle://a/b/c/d/e/f", "someone/tiny", "ftp://x/y"],
)
def test_what_is_no_handle_is_no_fault_of_the_network(kaggle, handle):
    with pytest.raises(ValueError, match=r"(?i)handle|preset"):
        gl.load(handle)
    assert not kaggle.requests


# What is in the cache: used without a network, never deleted, never changed


def content(folder: Path) -> dict[str, tuple]:
    """Everything about a folder that a look may not change."""
    return {
        str(file.relative_to(folder)): (
            file.is_symlink(),
            file.is_file() and (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino),
        )
        for file in folder.rglob("*")
    }


def damage(file: Path):
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, VOCABULARY])
def test_a_damaged_copy_is_named_and_nothing_is_deleted_or_changed(kaggle, tmp_path, name):
    fetch_all()
    damage(cached(tmp_path / "cache", name))
    before = content(tmp_path)
    words = (name.strip("/"), str(tmp_path / "cache/models" / HANDLE), "rm -r")
    sentence = expect("cached: 300 bytes of it", name, "damaged", words)
    assert gl.check(PRESET)["licence"]["ok"]
    with pytest.raises(ValueError, match="weights"):
        gl.upload(tmp_path / "cache", f"kaggle://{HANDLE.removesuffix('/3')}")
    with pytest.raises(AccessError, match="write to 'keras'"):
        gl.upload(
            preset_folder(tmp_path.parent / f"{tmp_path.name} mine"), "kaggle://keras/g/keras/g"
        )
    assert content(tmp_path) == before
    kaggle.stop()
    # KerasHub asks for another file before it opens the weights, so the network fails
    # first.
    assert outcome()[0] == "network" if name == WEIGHTS else outcome() == ("damaged", sentence)
    gl.check(PRESET)
    assert content(tmp_path) == before
    do_as_told(sentence, tmp_path)
    expect_recovery(kaggle)


def preset_folder(folder: Path) -> Path:
    shutil.copytree(TINY_FOLDER, folder)
    (folder / "README.md").write_text("Mine.")
    return folder


def test_a_damaged_copy_of_the_hub_is_named_and_nothing_is_deleted_or_changed(
    model_hub, tmp_path, monkeypatch
):
    assert outcome(preset=HF, **TOKENIZER) == (LOADS, "")
    damage(cached(tmp_path / "hub", VOCABULARY))
    before = content(tmp_path)
    words = (VOCABULARY, "models--someone--tiny", "rm -r")
    sentence = expect("Hub, cached: 300 bytes of it", VOCABULARY, "damaged", words, preset=HF)
    # Loading went as far as the weights, which come from the Hub: they are new, nothing
    # else is.
    assert before.items() <= content(tmp_path).items()
    monkeypatch.setenv("HF_TOKEN", HF_EVE)
    before = content(tmp_path)
    gl.check(HF)
    with pytest.raises(AccessError):
        gl.upload(preset_folder(tmp_path.parent / f"{tmp_path.name} mine"), HF)
    assert content(tmp_path) == before
    do_as_told(sentence, tmp_path)
    expect_recovery(model_hub, HF, **TOKENIZER)


def test_what_was_loaded_once_needs_neither_kaggle_nor_credentials(kaggle):
    question = "The capital of France is"
    answers = [
        gl.generate(gl.load(name), question, template=None, max_new_tokens=5)
        for name in (PRESET, TINY)
    ]
    assert answers[0] == answers[1]
    kaggle.requests.clear()
    sign_in("no token at all")
    assert outcome() == (LOADS, "")
    assert kaggle.requests == []


@pytest.mark.parametrize("fault", ["stopped", 401, 503])
def test_what_was_loaded_once_needs_no_hub(model_hub, fault):
    assert outcome(preset=HF) == (LOADS, "")
    model_hub.failing = {"": fault}
    if fault == "stopped":
        model_hub.stop()
    expect(f"Hub: {fault}, after all was fetched", "all", LOADS, preset=HF)


def test_what_was_fetched_in_part_is_not_taken_for_complete(kaggle):
    kaggle.failing = {WEIGHTS: RESET}
    assert outcome()[0] == "network"
    kaggle.failing = {}
    kaggle.stop()
    expect("weights were never fetched; then no network", "all", "network", AWAY)
    expect_recovery(kaggle)
