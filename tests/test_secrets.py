"""Does a secret get out anywhere? Plant one, let all go well or wrong, search all that
is written.

The quick run plants one for each sink; every place with every outcome is marked `full`.
`pytest -s tests/test_secrets.py` says how many places were searched.
"""

import base64
import collections
import contextlib
import html
import io
import json
import logging
import os
import pickle
import secrets
import subprocess
import sys
import time
import traceback
import urllib.parse
import warnings
from pathlib import Path

import nbformat
import pytest
from hub_server import HANG, RESET, HubServer, hub_of_this_process
from huggingface_hub import constants
from IPython.core.ultratb import FormattedTB
from kaggle_server import KaggleServer, _error
from nbclient import NotebookClient
from test_credentials import (
    FOLDER,
    PLACES,
    access_token,
    colab_pair,
    colab_token,
    environment_file,
    environment_pair,
    environment_token,
    home,  # noqa: F401
    kaggle,  # noqa: F401
    kaggle_json,
    kaggle_json_elsewhere,
)

import gemma_lora as gl
from gemma_lora import checks
from gemma_lora.access import kaggle as credentials

SEARCHED: collections.Counter = collections.Counter()
PRESET = "gemma_2b_en"


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    sys.__stdout__.write(f"\nSearched {SEARCHED.total()} places: {dict(SEARCHED)}\n")


def every(names: str, ones, others, one_in: int = 10**9):
    """All pairs, each a test; one in so many, with each one and each other, in the
    quick run.
    """
    pairs = [(i + j, one, other) for i, one in enumerate(ones) for j, other in enumerate(others)]
    params = [
        pytest.param(
            one,
            other,
            marks=[pytest.mark.full] if number % one_in or one_in > 10**6 else [],
            id=f"{_name(one)}-{_name(other)}",
        )
        for number, one, other in pairs
    ]
    return pytest.mark.parametrize(names, params)


def _name(one) -> str:
    return getattr(one, "__name__", repr(one))


# What is searched for


def new_secret() -> str:
    return "KGAT_" + secrets.token_hex(16)


def traces(secret: str) -> set[str]:
    """Whatever gives a secret away: ten characters of it in a row, as they are or in
    base64 beside anything.
    """
    body = secret.removeprefix("KGAT_").removeprefix("hf_")
    found = {body[start : start + 10] for start in range(len(body) - 9)}
    # base64 of user:key depends on where, of three, the key begins
    for before in range(3):
        code = base64.b64encode(b" " * before + body.encode()).decode()
        found.update(code[start : start + 14] for start in range(4, len(code) - 20))
    return found


def search(secret: str, sink: str, *written: str | bytes):
    """Fail if a secret can be seen in a text, also escaped, quoted or encoded."""
    for text in written:
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        SEARCHED[sink] += 1
        forms = (text, urllib.parse.unquote(text), html.unescape(text), text.replace("\\", ""))
        assert not any(trace in form for trace in traces(secret) for form in forms), (
            f"{sink} shows it: {text[:3000]}"
        )


# Where it is searched


@contextlib.contextmanager
def all_logs():
    """What every logger says, also those that keep it to themselves, from DEBUG on."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s %(exc_info)s"))
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        if logger is logging.root or not logger.propagate:
            logger.addHandler(handler)
    try:
        yield stream
    finally:
        for logger, level in before:
            logger.setLevel(level)
            logger.removeHandler(handler)


def look_through_error(secret: str, error: BaseException):
    search(secret, "traceback", "".join(traceback.format_exception(error)))
    for mode in ("Plain", "Context"):
        search(
            secret,
            f"IPython's {mode} traceback",
            FormattedTB(mode=mode).text(type(error), error, error.__traceback__),
        )
    search(secret, "pickled error", pickle.dumps(error))
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        seen.add(id(one))
        search(
            secret,
            "chain of errors",
            str(one),
            repr(one),
            repr(one.args),
            *map(repr, getattr(one, "__notes__", [])),
        )
        waiting += [
            other
            for other in (one.__cause__, one.__context__)
            if other is not None and id(other) not in seen
        ]


def look_through_result(secret: str, result):
    search(secret, "str and repr", str(result), repr(result))
    if hasattr(result, "_repr_html_"):
        search(secret, "html", result._repr_html_())
    if (
        not isinstance(result, str)
        and type(result).__module__.startswith("gemma_lora")
        and "Tokenizer" not in repr(result)
    ):
        search(secret, "pickle", pickle.dumps(result))


def look_through_files(secret: str, folder: Path, planted: dict[Path, bytes]):
    for file in folder.rglob("*"):
        if (
            file.is_file()
            and (content := file.read_bytes()) != planted.get(file)
            and len(content) < 10**6
        ):
            search(secret, "file", str(file), content)


def run_all(secret: str, capfd, folder: Path, calls: dict, *, in_environment: bool) -> dict:
    """Make the calls, search whatever comes of each, and return that."""
    planted = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    answers = {}
    for name, call in calls.items():
        capfd.readouterr()
        with all_logs() as logs, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                answers[name] = call()
            except Exception as error:
                answers[name] = error
        out, err = capfd.readouterr()
        search(secret, "stdout", out)
        search(secret, "stderr", err)
        search(secret, "log", logs.getvalue())
        search(secret, "warnings", "\n".join(str(one.message) for one in warned))
        (look_through_error if isinstance(answers[name], Exception) else look_through_result)(
            secret, answers[name]
        )
        look_through_files(secret, folder, planted)
        if not in_environment:
            search(secret, "os.environ", repr(os.environ))
    if not in_environment:
        command = [sys.executable, "-S", "-c", "import os; print(os.environ)"]
        search(
            secret, "environment of a child", subprocess.run(command, capture_output=True).stdout
        )
    return answers


# What goes wrong


class EchoingServer(KaggleServer):
    """Says, in its error, which header it got, as some proxies do."""

    echo = False

    def respond(self, method, url, headers, body):
        response = super().respond(method, url, headers, body)
        return _error(400, f"Bad header: {headers.get('Authorization')}") if self.echo else response


OUTCOMES = {
    "fine": {},
    "401": {"": 401},
    "403": {},
    "404": {"": 404},
    "429": {"": 429},
    "500": {"": 500},
}
OUTCOMES |= {
    "hangs": {"": HANG},
    "reset": {"": RESET},
    "broken off": {".json": "cut"},
    "down": {},
    "echoed": {},
}
OUTCOMES |= {"unknown": {}}


@pytest.fixture
def impatient(monkeypatch):
    """Nothing waits before another attempt; `prepare` shortens other waits."""
    monkeypatch.setattr(credentials, "SECONDS", credentials.SECONDS)
    monkeypatch.setattr(checks, "_SECONDS", checks._SECONDS)
    monkeypatch.setattr(checks, "_pip_check", lambda: "")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def prepare(kaggle, outcome, secret):
    kaggle.users = {secret: "someone", **dict.fromkeys(("ada", "bob", "eve", "cleo"))}
    kaggle.consented = (
        {"someone", "ada", "bob", "eve", "cleo", "dora"} if outcome != "403" else set()
    )
    kaggle.failing = OUTCOMES[outcome]
    if outcome == "hangs":
        credentials.SECONDS = 0.4
        checks._SECONDS = 0.6
    if outcome == "unknown":
        kaggle.users = {}
    if outcome == "echoed":
        kaggle.__class__ = EchoingServer
        kaggle.echo = True
    if outcome == "down":
        kaggle.stop()


def calls(*, login=None, model=False, preset=PRESET) -> dict:
    """What is called, in the order of notebook 01."""
    login = login or (lambda: gl.kaggle_login(ask=False))
    one = {"login": login, "find": gl.find_credentials, "check": lambda: gl.check(preset)}
    one["tokenizer"] = lambda: gl.load_tokenizer(preset)
    return one | ({"model": lambda: gl.load(preset)} if model else {})


SINKS = [
    ("str and repr", environment_token, "fine"),
    ("html", kaggle_json, "403"),
    ("stdout", access_token, "500"),
    ("stderr", environment_file, "fine"),
    ("log", colab_token, "401"),
    ("warnings", environment_pair, "429"),
    ("traceback", environment_pair, "echoed"),
    ("IPython's Plain traceback", kaggle_json_elsewhere, "unknown"),
    ("IPython's Context traceback", environment_token, "echoed"),
    ("chain of errors", environment_token, "404"),
    ("pickled error", access_token, "reset"),
    ("pickle", kaggle_json, "403"),
    ("file", kaggle_json, "broken off"),
    ("os.environ", colab_token, "hangs"),
    ("environment of a child", colab_pair, "down"),
]


@pytest.mark.parametrize(("sink", "plant", "outcome"), SINKS)
def test_no_sink_shows_it(kaggle, home, tmp_path, capfd, impatient, sink, plant, outcome):
    before = SEARCHED[sink]
    plant_and_search(kaggle, home, tmp_path, capfd, plant, outcome)
    assert SEARCHED[sink] > before


@every("plant, outcome", PLACES, OUTCOMES)
def test_what_was_found_never_gets_out(kaggle, home, tmp_path, capfd, impatient, plant, outcome):
    plant_and_search(kaggle, home, tmp_path, capfd, plant, outcome)


def plant_and_search(kaggle, home, tmp_path, capfd, plant, outcome):
    """Plant a secret, make the calls of notebook 01, and search everything."""
    secret = new_secret()
    header = plant(home, secret)
    prepare(kaggle, outcome, secret)
    if header.startswith("Basic") and outcome != "unknown":
        kaggle.users[secret] = base64.b64decode(header[6:]).decode().partition(":")[0]
    load = outcome == "fine" and plant.__name__ in ("environment_token", "kaggle_json")
    hidden = (
        PLACES[plant].startswith(("Colab", "file", "Kaggle's"))
        or plant.__name__ == "environment_file"
    )
    answers = run_all(secret, capfd, tmp_path, calls(model=load), in_environment=not hidden)
    assert header in {one for _, one in kaggle.requests} or outcome == "down"
    assert isinstance(answers["tokenizer"], Exception) == (outcome != "fine")


@every("form, outcome", ["token", "key", "pasted", "typed", "typed pair", "stored"], OUTCOMES, 12)
def test_what_was_given_or_typed_never_gets_out(
    kaggle, tmp_path, capfd, impatient, monkeypatch, form, outcome
):
    secret = new_secret()
    prepare(kaggle, outcome, secret)
    pair = {"username": "dora", "key": secret}
    if form in ("key", "pasted", "typed pair") and outcome != "unknown":
        kaggle.users[secret] = "dora"
    given = pair if form == "key" else {"token": json.dumps(pair) if "pa" in form else secret}
    if "typed" in form:
        monkeypatch.setattr(credentials, "_ask", lambda: given["token"])
        answers = run_all(
            secret, capfd, tmp_path, calls(login=gl.kaggle_login), in_environment=False
        )
    elif form == "stored" and outcome in ("fine", "403", "broken off"):
        gl.kaggle_login(**given, store=True)  # here it is meant to be in a file
        answers = run_all(secret, capfd, tmp_path, calls(), in_environment=False)
    else:
        login = lambda: gl.kaggle_login(**given, store=form == "stored")  # noqa: E731
        answers = run_all(secret, capfd, tmp_path, calls(login=login), in_environment=False)
        assert isinstance(answers["login"], PermissionError) == (form == "stored")
    assert kaggle.requests or outcome == "down"


def test_storing_where_a_file_is_never_gets_either_out(kaggle, home, tmp_path, capfd, impatient):
    old, new = new_secret(), new_secret()
    PLANTS["access_token"](home, old)
    kaggle.users = {new: "dora"}
    for secret in (old, new):
        login = {"login": lambda: gl.kaggle_login(token=new, store=True)}
        answers = run_all(secret, capfd, tmp_path, login, in_environment=False)
        assert isinstance(answers["login"], FileExistsError)


PLANTS = {plant.__name__: plant for plant in PLACES}
MALFORMED = {
    "space": lambda secret: secret[:20] + " " + secret[20:],
    "line break": lambda secret: secret[:20] + "\n" + secret[20:],
    "not ASCII": lambda secret: secret[:20] + "é" + secret[20:],
    "not Latin": lambda secret: secret[:20] + "→" + secret[20:],
    "control": lambda secret: secret[:20] + "\x01" + secret[20:],
    "surrogate": lambda secret: secret[:20] + "\udcff" + secret[20:],
    "half a kaggle.json": lambda secret: '{"username": "ada", "key": "' + secret,
    "very long": lambda secret: secret * 9,
    "a path": lambda secret: f"/tmp/{secret}/token",
}


@every("plant, kind", [*PLANTS, "token", "key", "username", "pasted", "typed"], MALFORMED, 9)
def test_what_is_malformed_never_gets_out(
    kaggle, home, tmp_path, capfd, impatient, monkeypatch, plant, kind
):
    secret = new_secret()
    value = MALFORMED[kind](secret)
    login = None
    if plant in PLANTS:
        try:
            PLANTS[plant](home, value)
        except UnicodeEncodeError:
            PLANTS[plant](home, "here")
            for file in home.rglob("*"):
                if file.is_file():
                    file.write_bytes(
                        file.read_bytes().replace(b"here", value.encode(errors="surrogateescape"))
                    )
    elif plant == "typed":
        monkeypatch.setattr(credentials, "_ask", lambda: value)
        login = gl.kaggle_login
    else:
        given = (
            {"token": value}
            if plant == "token"
            else {"username": "ada", "key": "0123456789"} | {plant: value}
        )
        given = (
            {"token": json.dumps({"username": "ada", "key": value})} if plant == "pasted" else given
        )
        login = lambda: gl.kaggle_login(**given)  # noqa: E731
    outside = plant in ("environment_token", "environment_pair")
    run_all(secret, capfd, tmp_path, calls(login=login), in_environment=outside)


DAMAGED = [
    '{"username": "ada", "key": "%s',
    '{"username": "%s"}',
    '{"key": "%s"}',
    '"%s"',
    "%s",
    '["%s"]',
    "\udcff%s",
]
DAMAGED += [
    '{"username": "ada", "key": ["%s"]}',
    '\ufeff{"username": "ada", "key": "%s"}',
    '"username key %s"',
    "7 %s",
]


@every("name, text", ["kaggle.json", "access_token", "access_token.txt"], DAMAGED, 7)
def test_a_damaged_file_never_gets_out(kaggle, home, tmp_path, capfd, impatient, name, text):
    secret = new_secret()
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / name).write_bytes((text % secret).encode(errors="surrogateescape"))
    run_all(secret, capfd, tmp_path, calls(), in_environment=False)
    run_all(secret, capfd, tmp_path, calls(preset="hf://someone/tiny"), in_environment=False)


def test_a_file_that_nobody_may_read_never_gets_out(
    kaggle, home, tmp_path, capfd, impatient, monkeypatch
):
    secret = new_secret()
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "denied", "here")),
    )
    PLANTS["access_token"](home, secret)
    run_all(secret, capfd, tmp_path, {"find": gl.find_credentials, **calls()}, in_environment=False)


# The Hub


class RecordingHub(HubServer):
    seen = ()

    def respond(self, method, url, headers, body):
        self.seen = {*self.seen, headers.get("Authorization")}
        return super().respond(method, url, headers, body)


HUB_OUTCOMES = ["fine", "401", "403", "404", "500", "reset", "down", "unknown", *MALFORMED]


@every("place, outcome", ["HF_TOKEN", "file"], HUB_OUTCOMES, 7)
def test_a_token_for_the_hub_never_gets_out(
    kaggle, tmp_path, capfd, impatient, monkeypatch, place, outcome
):
    secret = "hf_" + secrets.token_hex(17)
    value = MALFORMED.get(outcome, str)(secret)
    server = RecordingHub()
    server.models["someone/tiny"] = FOLDER
    if outcome in ("401", "403", "unknown"):
        server.gated = {"someone/tiny"}
    server.failing = {
        "500": {"": 500},
        "404": {"": 404},
        "reset": {"": RESET},
        "401": {"": 401},
    }.get(outcome, {})
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    if place == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", value)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "token").write_bytes(value.encode(errors="surrogateescape"))
    with hub_of_this_process(server, tmp_path / "hub"):
        if outcome == "down":
            server.stop()
        hub = calls(preset="hf://someone/tiny", model=outcome == "fine")
        answers = run_all(secret, capfd, tmp_path, hub, in_environment=place == "HF_TOKEN")
        if outcome not in ("down", *MALFORMED):
            assert f"Bearer {secret}" in server.seen
            assert isinstance(answers["tokenizer"], Exception) == (outcome != "fine")


# A notebook


@pytest.mark.full
def test_a_saved_notebook_holds_no_secret(kaggle, home, tmp_path):
    """Real cells in a kernel whose environment holds a bad token, then worse ones; the
    client logs to a file.
    """
    secret = new_secret()
    os.environ.update(KAGGLE_API_TOKEN=secret, HF_TOKEN="hf_" + secret, KAGGLE_LOGGING_ENABLED="1")
    os.environ.update(KAGGLEHUB_VERBOSITY="debug", PYTHONPATH=str(Path(gl.__file__).parents[1]))
    endpoint = f"kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = {kaggle.url!r}"
    cells = [
        "import os, time, gemma_lora as gl\nfrom kagglesdk import kaggle_env\n"
        f"time.sleep = int\n{endpoint}"
    ]
    ask = [
        "gl.find_credentials()",
        "gl.kaggle_login()",
        f"gl.check({PRESET!r})",
        f"gl.load({PRESET!r})",
    ]
    cells += ["gl.setup(seed=0)", *ask, "gl.load('hf://someone/tiny')"]
    for kind in ("not ASCII", "control", "very long"):
        (tmp_path / "worse").mkdir(exist_ok=True)
        (tmp_path / "worse" / kind).write_text(MALFORMED[kind](secret))
        read = f"open({str(tmp_path / 'worse' / kind)!r}).read()"
        cells += [f"os.environ.update(KAGGLE_API_TOKEN={read}, HF_TOKEN={read})", *ask[:2], ask[3]]
        cells += [
            "gl.kaggle_login(token=os.environ['KAGGLE_API_TOKEN'])",
            "gl.load('hf://someone/tiny')",
        ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    nbformat.write(notebook, tmp_path / "saved.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert sum(output.output_type == "error" for output in outputs) > 3
    assert ("Hello", f"Bearer {secret}") in kaggle.requests
    search(
        secret, "saved notebook", (tmp_path / "saved.ipynb").read_text(), *map(json.dumps, outputs)
    )
    look_through_files(secret, home, {})


def test_the_search_finds_what_it_should():
    secret = new_secret()
    leaks = [
        secret,
        repr(secret),
        secret[:17],
        f"%{secret}",
        "".join(f"%{ord(char):02x}" for char in secret),
    ]
    leaks += [
        base64.b64encode(f"{user}:{secret}".encode()).decode()
        for user in ("a", "ab", "abc", "abcd")
    ]
    for leak in leaks:
        with pytest.raises(AssertionError, match="shows it"):
            search(secret, "test", f"before {leak} after")
    search(secret, "test", new_secret())
    del SEARCHED["test"]
