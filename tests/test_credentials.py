"""Is what is said of credentials what Kaggle's client then sends?

Asked of the real client and a Kaggle on loopback. Prompts are answered by a fake
getpass; one real terminal and one real kernel are marked `full`.
"""

import base64
import contextlib
import io
import itertools
import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import IPython
import kagglehub
import nbformat
import pexpect
import pytest
from hub_server import HANG_UP
from jupyter_client.manager import start_new_kernel
from kaggle_server import KaggleServer, serving
from kagglehub import config
from nbclient import NotebookClient

import gemma_lora as gl
from gemma_lora.access import kaggle as credentials

FOLDER = Path(gl.__file__).parent / "tiny" / "tiny_gemma_en"
HANDLE = "keras/gemma/keras/gemma_2b_en/3"
FAULTY = {
    "empty": "",
    "spaces alone": "   ",
    "a space inside": "KGAT_plan ted",
    "a line break inside": "KGAT_plan\nted",
    "not ASCII": "KGAT_plantéd",
    "a control character": "KGAT_plan\x01ted",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without credentials."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "")  # so that it is restored
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    monkeypatch.setenv("DISABLE_KAGGLE_CACHE", "1")
    return folder


@pytest.fixture
def kaggle(home, tmp_path):
    """A Kaggle that knows whatever is planted; `serving` puts the environment back."""
    server = KaggleServer()
    server.presets["gemma_2b_en"] = FOLDER
    with (
        serving(server, tmp_path / "cache"),
        patch.dict(sys.modules),
        patch.object(config, "is_in_colab_notebook"),
    ):
        os.environ["DISABLE_KAGGLE_CACHE"] = "1"
        config.is_in_colab_notebook.return_value = False
        yield server


# Each of these plants a secret in one place, and returns the header with which it is
# sent.


def bearer(token: str) -> str:
    return f"Bearer {token}"


def basic(user: str, key: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def kaggle_notebook(home, token):
    os.environ.update(
        KAGGLE_KERNEL_RUN_TYPE="Interactive", KAGGLE_DATA_PROXY_URL="http://127.0.0.1:9"
    )
    os.environ["KAGGLE_API_V1_TOKEN"] = str(write(home / "v1/token", token))
    return bearer(token)


def environment_token(home, token):
    os.environ["KAGGLE_API_TOKEN"] = token
    return bearer(token)


def environment_file(home, token):
    os.environ["KAGGLE_API_TOKEN"] = str(write(home / "anywhere/token", f"{token}\n"))
    return bearer(token)


def access_token(home, token):
    write(home / ".kaggle/access_token", f"{token}\n")
    return bearer(token)


def access_token_txt(home, token):
    write(home / ".kaggle/access_token.txt", f"{token}\r\n")
    return bearer(token)


def environment_pair(home, key):
    os.environ.update(KAGGLE_USERNAME="ada", KAGGLE_KEY=key)
    return basic("ada", key)


def kaggle_json(home, key):
    write(home / ".kaggle/kaggle.json", json.dumps({"username": "bob", "key": key}))
    return basic("bob", key)


def kaggle_json_elsewhere(home, key):
    file = write(home / "elsewhere/kaggle.json", json.dumps({"username": "eve", "key": key}))
    os.environ["KAGGLE_CONFIG_DIR"] = str(file.parent)
    return basic("eve", key)


def colab(**secrets):
    """Make this process one of Colab's, whose module has this one function and these
    three exceptions.
    """
    os.environ["COLAB_RELEASE_TAG"] = "release-colab"
    config.is_in_colab_notebook.return_value = True
    userdata = types.ModuleType("google.colab.userdata")
    for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, name, type(name, (Exception,), {}))

    def get(name):
        answer = secrets.get(name) or userdata.SecretNotFoundError(f"Secret {name} does not exist.")
        if isinstance(answer, str):
            return answer
        raise (
            answer
            if isinstance(answer, Exception)
            else getattr(userdata, answer[0])(f"{name} {answer}")
        )

    userdata.get, userdata.secrets = get, secrets
    module = types.ModuleType("google.colab")
    module.userdata = userdata
    sys.modules["google.colab"], sys.modules["google.colab.userdata"] = module, userdata
    return userdata


def colab_token(home, token):
    colab(KAGGLE_API_TOKEN=f"{token}\n")
    return bearer(token)


def colab_pair(home, key):
    colab(KAGGLE_USERNAME="cleo", KAGGLE_KEY=key)
    return basic("cleo", key)


PLACES = {
    kaggle_notebook: "Kaggle's own notebook",
    environment_token: "environment: KAGGLE_API_TOKEN",
    environment_file: "environment: KAGGLE_API_TOKEN",
    access_token: "file: ~/.kaggle/access_token",
    access_token_txt: "file: ~/.kaggle/access_token",
    environment_pair: "environment: KAGGLE_USERNAME and KAGGLE_KEY",
    kaggle_json_elsewhere: "file: kaggle.json",
    kaggle_json: "file: kaggle.json",
    colab_token: "Colab secret KAGGLE_API_TOKEN",
    colab_pair: "Colab secrets KAGGLE_USERNAME and KAGGLE_KEY",
}
SAME_VARIABLE = {
    frozenset((environment_token, environment_file)),
    frozenset((colab_token, colab_pair)),
}
PAIRS = [pair for pair in itertools.combinations(PLACES, 2) if frozenset(pair) not in SAME_VARIABLE]
TOKENS = [
    place for place in PLACES if "json" not in place.__name__ and "pair" not in place.__name__
]


def sent(kaggle) -> str | None:
    """The Authorization header that the client sends now."""
    first = len(kaggle.requests)
    with contextlib.suppress(kagglehub.exceptions.KaggleApiHTTPError):
        kagglehub.model_download(HANDLE, "config.json", force_download=True)
    return kaggle.requests[first][1]


def held() -> str | None:
    """The header that is made of what the client says it holds."""
    one = config.get_kaggle_credentials()
    return one and (bearer(one.api_key) if one.api_key else basic(one.username, one.key))


def places(kind="yes") -> list[str]:
    return [row["place"] for row in gl.find_credentials().rows if row["found"].startswith(kind)]


def agree(kaggle, place: str | None, header: str | None):
    """What is said, what is held and what is sent are the same."""
    if place and place != "an earlier login" and not place.startswith("Colab"):
        assert place in places()
    before = len(kaggle.requests)
    login = gl.kaggle_login(ask=False)
    assert login.place == place and bool(login) == bool(place)
    assert all(one == ("Hello", header) for one in kaggle.requests[before:])
    assert held() == header and sent(kaggle) == header
    return login


# Where credentials are


def test_where_there_are_none_nothing_is_sent_and_the_three_ways_are_told(kaggle):
    login = agree(kaggle, None, None)
    assert login.user is None
    for words in (
        "KAGGLE_API_TOKEN",
        "Generate New Token",
        "Add new secret",
        "Notebook access",
        "access_token",
    ):
        assert words in str(login)
    assert all(row["found"] == "no" for row in gl.find_credentials().rows)


@pytest.mark.parametrize("plant", PLACES)
def test_what_is_said_of_each_place_is_what_is_sent(kaggle, home, plant):
    header = plant(home, "KGAT_planted")
    if (
        plant is not colab_pair
    ):  # the client alone asks Colab for these two only if there is a token, too
        assert sent(kaggle) == header
    kaggle.users["KGAT_planted"] = _user(header) or "someone"
    login = agree(kaggle, PLACES[plant], header)
    assert login.user == kaggle.users["KGAT_planted"]
    assert str(login) == f"Kaggle credentials of the user {login.user!r}, found in: {PLACES[plant]}"


def _user(header: str) -> str | None:
    return (
        base64.b64decode(header[6:]).decode().partition(":")[0]
        if header.startswith("Basic ")
        else None
    )


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_of_two_places_the_one_is_used_that_the_client_prefers(kaggle, home, one, other):
    headers = {one: one(home, "KGAT_one"), other: other(home, "KGAT_other")}
    preferred = next(
        (plant for plant, header in headers.items() if header == sent(kaggle)), colab_pair
    )
    kaggle.users = {
        "KGAT_one": _user(headers[one]) or "one",
        "KGAT_other": _user(headers[other]) or "other",
    }
    agree(kaggle, PLACES[preferred], headers[preferred])
    second = other if preferred is one else one
    if not PLACES[second].startswith("Colab"):
        assert PLACES[second] in places()


@pytest.mark.parametrize("plant", PLACES)
def test_an_explicit_token_beats_every_place(kaggle, home, plant):
    plant(home, "KGAT_planted")
    assert gl.kaggle_login(token=" KGAT_given\n").place == "the arguments"
    agree(kaggle, "an earlier login", bearer("KGAT_given"))


@pytest.mark.parametrize("plant", PLACES)
@pytest.mark.parametrize("pasted", [False, True])
def test_an_explicit_pair_beats_every_pair_and_is_refused_where_a_token_would_be_sent_instead(
    kaggle, home, plant, pasted
):
    before = plant(home, "KGAT_planted")
    pair = {"username": "dora", "key": "0123456789abcdef"}
    given = {"token": json.dumps(pair)} if pasted else pair
    if plant in TOKENS and plant is not colab_token:
        with pytest.raises(ValueError, match="prefers a token"):
            gl.kaggle_login(**given)
        agree(kaggle, PLACES[plant], before)
    else:
        gl.kaggle_login(**given)
        agree(kaggle, "an earlier login", basic(**{"user": "dora", "key": pair["key"]}))


@pytest.mark.parametrize("plant", [environment_token, access_token])
def test_a_token_that_appears_after_a_pair_was_given_is_sent_and_its_user_is_named(
    kaggle, home, plant
):
    gl.kaggle_login(username="dora", key="0123456789abcdef")
    agree(kaggle, "an earlier login", basic("dora", "0123456789abcdef"))
    header = plant(home, "KGAT_later")
    assert sent(kaggle) == header
    kaggle.users = {"KGAT_later": "eve", "0123456789abcdef": "dora"}
    assert gl.kaggle_login(ask=False).user == "eve"


def test_an_earlier_login_with_the_client_is_used(kaggle, home):
    environment_token(home, "KGAT_planted")
    kagglehub.config.set_kaggle_api_token("KGAT_earlier")
    agree(kaggle, "an earlier login", bearer("KGAT_earlier"))
    assert {"an earlier login", "environment: KAGGLE_API_TOKEN"} <= set(places())


def test_kaggles_own_token_counts_only_where_the_client_reads_it(kaggle, home):
    kaggle_notebook(home, "KGAT_planted")
    del os.environ["KAGGLE_DATA_PROXY_URL"]
    assert sent(kaggle) is None
    agree(kaggle, None, None)
    assert places() == []


@pytest.mark.parametrize("kind", ["empty file", "folder"])
def test_the_variable_may_name_what_holds_no_token(kaggle, home, kind):
    path = write(home / "named/token", "") if kind == "empty file" else home
    os.environ["KAGGLE_API_TOKEN"] = str(path)
    if kind == "folder":
        with pytest.raises((ValueError, IsADirectoryError)):
            gl.kaggle_login(ask=False)
        return
    header = kaggle_json(home, "0123456789abcdef")
    assert sent(kaggle) == header
    agree(kaggle, "file: kaggle.json", header)
    assert places() == ["file: kaggle.json"]


# What cannot be credentials


@pytest.mark.parametrize("value", FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("form", ["token", "key", "username", "pasted"])
def test_what_no_header_can_carry_is_refused_and_not_shown(kaggle, value, form):
    given = (
        {"token": value}
        if form == "token"
        else {"username": "ada", "key": "0123456789abcdef"} | {form: value}
    )
    if form == "pasted":
        given = {"token": json.dumps({"username": "ada", "key": value})}
    with pytest.raises(ValueError) as raised:
        gl.kaggle_login(**given)
    assert "the arguments" in str(raised.value) and "plan" not in str(raised.value)
    agree(kaggle, None, None)


@pytest.mark.parametrize(
    "value", [value for value in FAULTY.values() if value], ids=[kind for kind in FAULTY][1:]
)
@pytest.mark.parametrize("plant", [environment_token, environment_pair, kaggle_json, access_token])
def test_what_was_found_and_cannot_be_sent_names_its_place(kaggle, home, plant, value):
    plant(home, value)
    if plant is access_token and not value.strip():
        agree(kaggle, None, None)
        return
    with pytest.raises(ValueError) as raised:
        gl.kaggle_login(ask=False)
    assert PLACES[plant] in str(raised.value) and "plan" not in str(raised.value)
    assert places("yes, but the ") == [PLACES[plant]]
    assert "plan" not in str(gl.find_credentials())


def test_a_token_too_long_for_a_file_name_is_no_error_that_shows_it(kaggle, home):
    os.environ["KAGGLE_API_TOKEN"] = "KGAT_" + "planted" * 60
    try:
        login = gl.kaggle_login(ask=False)
    except Exception as error:
        assert "planted" not in f"{error} {error!r} {error.__context__!r}"
        assert "KAGGLE_API_TOKEN" in str(error)
    else:
        assert login.place == "environment: KAGGLE_API_TOKEN"


@pytest.mark.parametrize("value", [7, b"KGAT_planted", ["KGAT_planted"], True])
def test_what_is_no_text_is_refused(kaggle, value):
    for given in (
        {"token": value},
        {"username": "ada", "key": value},
        {"username": value, "key": "0123456789abcdef"},
    ):
        with pytest.raises(ValueError, match=type(value).__name__) as raised:
            gl.kaggle_login(**given)
        assert "plan" not in str(raised.value)


@pytest.mark.parametrize(
    "given", ["username", "key", "token username", "token key", "token username key"]
)
def test_half_a_pair_or_both_kinds_is_refused(kaggle, given):
    with pytest.raises(ValueError, match="Give a token, or a username and a key"):
        gl.kaggle_login(**dict.fromkeys(given.split(), "planted"))
    agree(kaggle, None, None)


DAMAGED = [
    '{"username": "ada", "key": "planted',
    "{}",
    '{"username": "ada"}',
    '{"key": "planted"}',
    "[]",
    "7",
    "KGAT_p",
]
DAMAGED += [
    "",
    '{"username": "ada", "key": 7}',
    '{"username": "ada", "key": null}',
    '"username and key planted"',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_named_and_not_shown(kaggle, home, text):
    write(home / ".kaggle/kaggle.json", text)
    with pytest.raises(ValueError) as raised:
        gl.kaggle_login(ask=False)
    assert "kaggle.json" in str(raised.value) and "planted" not in str(raised.value)
    assert places("yes, but ") == ["file: kaggle.json"]
    assert "planted" not in str(gl.find_credentials())


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_does_not_stand_in_the_way_of_others(kaggle, home, text):
    write(home / ".kaggle/kaggle.json", text)
    gl.kaggle_login(username="dora", key="0123456789abcdef")
    agree(kaggle, "an earlier login", basic("dora", "0123456789abcdef"))
    config.clear_kaggle_credentials()
    agree(kaggle, "environment: KAGGLE_API_TOKEN", environment_token(home, "KGAT_planted"))


@pytest.mark.parametrize("text", DAMAGED[:4])
def test_a_damaged_file_that_was_pasted_is_refused(kaggle, text):
    with pytest.raises(ValueError, match=r"begins like a kaggle\.json") as raised:
        gl.kaggle_login(token=text)
    assert "planted" not in str(raised.value)


# Whose they are


def test_who_is_not_confirmed_is_said_to_be_so(kaggle, home):
    environment_token(home, "KGAT_planted")
    for state in ("unknown", "a fault", "hangs up", "down"):
        kaggle.failing = {"a fault": {"Hello": 500}, "hangs up": {"Hello": HANG_UP}}.get(state, {})
        if state == "down":
            kaggle.stop()
        login = gl.kaggle_login()
        assert login and login.user is None
        assert "did not confirm" in str(login) and "gl.check()" in str(login)


# Colab


@pytest.mark.parametrize(
    ("error", "words"),
    [("SecretNotFoundError", "no"),
     ("NotebookAccessError", "yes, but switch its notebook access on"),
     ("TimeoutException", "did not answer"), (RuntimeError("planted"), "a notebook's page")],
)  # fmt: skip
def test_colabs_exceptions_become_words(kaggle, error, words):
    colab(
        **dict.fromkeys(
            credentials.NAMES, error if isinstance(error, Exception) else (error, "planted")
        )
    )
    table = gl.find_credentials()
    for name in credentials.NAMES:
        assert next(row for row in table.rows if row["place"] == f"Colab secret {name}")[
            "found"
        ].count(words)
    assert "planted" not in str(table) + table._repr_html_()
    agree(kaggle, None, None)


def test_a_secret_that_was_put_right_is_read_again(kaggle):
    userdata = colab(KAGGLE_API_TOKEN=("NotebookAccessError", ""))
    agree(kaggle, None, None)
    userdata.secrets["KAGGLE_API_TOKEN"] = "KGAT_mistyped"
    agree(kaggle, "Colab secret KAGGLE_API_TOKEN", bearer("KGAT_mistyped"))
    userdata.secrets["KAGGLE_API_TOKEN"] = "KGAT_right"
    agree(kaggle, "Colab secret KAGGLE_API_TOKEN", bearer("KGAT_right"))
    assert "KAGGLE_API_TOKEN" not in os.environ


def test_a_secret_that_was_deleted_is_not_told_as_found_and_missing_at_once(kaggle):
    userdata = colab(KAGGLE_API_TOKEN="KGAT_planted")
    agree(kaggle, "Colab secret KAGGLE_API_TOKEN", bearer("KGAT_planted"))
    del userdata.secrets["KAGGLE_API_TOKEN"]
    rows = [row["place"] for row in gl.find_credentials().rows]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("plant", [environment_token, environment_pair, access_token])
@pytest.mark.parametrize("secrets", [colab_token, colab_pair])
def test_what_is_put_into_the_environment_later_beats_colabs_secrets(kaggle, home, plant, secrets):
    agree(kaggle, PLACES[secrets], secrets(home, "KGAT_in_colab"))
    agree(kaggle, PLACES[plant], plant(home, "KGAT_here"))


def test_line_breaks_in_a_secret_are_left_out_as_the_client_does(kaggle):
    colab(KAGGLE_API_TOKEN="KGAT_plan\nted\n")
    agree(kaggle, "Colab secret KAGGLE_API_TOKEN", bearer("KGAT_planted"))


@pytest.mark.parametrize(
    "value", [value for value in FAULTY.values() if value.strip() and "\n" not in value]
)
def test_a_secret_that_cannot_be_sent_is_refused_by_its_name(kaggle, value):
    colab(KAGGLE_API_TOKEN=value)
    with pytest.raises(ValueError, match="Colab secret KAGGLE_API_TOKEN") as raised:
        gl.kaggle_login(ask=False)
    assert "plan" not in str(raised.value)


def test_colabs_variable_without_colabs_module_is_no_error(kaggle):
    # a virtual environment within Colab
    os.environ["COLAB_RELEASE_TAG"] = "release-colab"
    agree(kaggle, None, None)


# Storing


@pytest.mark.parametrize("kind", ["token", "pair"])
def test_what_is_stored_is_for_the_owner_alone_and_is_found_again(kaggle, home, kind):
    kaggle.users = {"0123456789abcdef": "dora"}
    given = (
        {"token": "0123456789abcdef"}
        if kind == "token"
        else {"username": "dora", "key": "0123456789abcdef"}
    )
    assert gl.kaggle_login(**given, store=True).user == "dora"
    file = home / ".kaggle" / ("access_token" if kind == "token" else "kaggle.json")
    assert [one for one in home.rglob("*") if one.is_file()] == [file]
    assert (
        stat.S_IMODE(file.stat().st_mode) == 0o600
        and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    )
    config.clear_kaggle_credentials()
    header = bearer("0123456789abcdef") if kind == "token" else basic("dora", "0123456789abcdef")
    assert (
        agree(
            kaggle,
            f"file: {'~/.kaggle/access_token' if kind == 'token' else 'kaggle.json'}",
            header,
        ).user
        == "dora"
    )


def test_a_file_is_never_overwritten(kaggle, home):
    kaggle.users = {"KGAT_new": "dora"}
    file = write(home / ".kaggle/access_token", "KGAT_old")
    with pytest.raises(FileExistsError) as raised:
        gl.kaggle_login(token="KGAT_new", store=True)
    assert str(file) in str(raised.value) and file.read_text() == "KGAT_old"


@pytest.mark.parametrize("state", ["wrong", "a fault", "down"])
def test_nothing_is_stored_that_kaggle_did_not_confirm(kaggle, home, state):
    kaggle.failing = {"Hello": 500} if state == "a fault" else {}
    kaggle.users = {"KGAT_given": "dora"} if state != "wrong" else {}
    if state == "down":
        kaggle.stop()
    with pytest.raises(PermissionError, match="nothing was stored"):
        gl.kaggle_login(token="KGAT_given", store=True)
    assert not (home / ".kaggle").exists()


def test_nothing_is_stored_unasked(kaggle, home):
    kaggle.users = {"KGAT_given": "dora"}
    gl.kaggle_login(token="KGAT_given")
    assert not list(home.iterdir()) and "KGAT_given" not in os.environ.values()


def test_a_stored_pair_is_found_where_the_config_folder_is_elsewhere(kaggle, home):
    kaggle.users = {"0123456789abcdef": "dora"}
    os.environ["KAGGLE_CONFIG_DIR"] = str(home / "elsewhere")
    gl.kaggle_login(username="dora", key="0123456789abcdef", store=True)
    config.clear_kaggle_credentials()
    agree(kaggle, "file: kaggle.json", basic("dora", "0123456789abcdef"))


def test_a_disk_that_fills_up_leaves_no_half_a_token(kaggle, home, monkeypatch):
    kaggle.users = {"KGAT_given": "dora"}
    real = os.fdopen

    def full(descriptor, *arguments, **options):
        with real(descriptor, *arguments, **options) as file:
            file.write("KGAT_gi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="No space"):
        gl.kaggle_login(token="KGAT_given", store=True)
    assert not list((home / ".kaggle").iterdir())


# Asking


@pytest.fixture
def typed(kaggle, monkeypatch):
    """A terminal at which somebody types: a text, or a key that raises."""
    kaggle.users = {"KGAT_typed": "dora"}

    class Terminal:
        text = ""
        closed = False
        prompts: ClassVar[list[str]] = []
        isatty = staticmethod(lambda: True)

        def ask(self, prompt):
            self.prompts = [*self.prompts, prompt]
            if isinstance(self.text, BaseException):
                raise self.text
            return self.text

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(credentials.getpass, "getpass", terminal.ask)
    return terminal


@pytest.mark.parametrize("text", ["KGAT_typed", '{"username": "dora", "key": "KGAT_typed"}'])
def test_what_is_typed_is_used_and_not_shown(typed, kaggle, text, capfd):
    typed.text = text
    login = gl.kaggle_login()
    assert repr(login) == "Kaggle credentials of the user 'dora', found in: what you typed"
    assert "hidden while you type" in typed.prompts[0] and "Enter" in typed.prompts[0]
    header = bearer(text) if text[0] != "{" else basic("dora", "KGAT_typed")
    assert kaggle.requests == [("Hello", header)]
    assert "KGAT_typed" not in "".join(capfd.readouterr())


def test_enter_goes_on_without(typed, kaggle):
    login = gl.kaggle_login()
    assert not login and "No credentials for Kaggle." in str(login)
    assert "Generate New Token" in str(login) and kaggle.requests == []


def test_an_interrupt_at_the_prompt_is_one(typed):
    typed.text = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        gl.kaggle_login()


@pytest.mark.parametrize("error", [EOFError(), RuntimeError("StdinNotImplementedError")])
def test_a_prompt_that_nobody_can_answer_is_no_error(typed, error):
    typed.text = error
    assert not gl.kaggle_login()


@pytest.mark.parametrize("stdin", [io.StringIO(""), None, "closed"])
def test_with_nobody_to_ask_nobody_is_asked(typed, monkeypatch, stdin):
    if stdin == "closed":
        stdin = io.StringIO()
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "Generate New Token" in str(gl.kaggle_login())
    assert not typed.prompts


def test_a_kernel_asks_whatever_its_stdin_is(typed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel="one"))
    typed.text = "KGAT_typed"
    assert gl.kaggle_login().user == "dora"


# A real terminal and a real kernel

PROGRAM = """
import sys
import gemma_lora as gl
from kagglesdk import kaggle_env
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = {url!r}
print(gl.kaggle_login())
print("went on")
"""


@pytest.fixture
def program(kaggle):
    kaggle.users = {"KGAT_typed": "dora"}
    os.environ["PYTHONPATH"] = str(Path(gl.__file__).parents[1])
    return PROGRAM.format(url=kaggle.url)


@pytest.mark.full
def test_a_terminal_asks_and_does_not_show_what_is_typed(program, kaggle):
    with pexpect.spawn(sys.executable, ["-c", program], encoding="utf-8", timeout=60) as child:
        child.delaybeforesend = None
        child.expect("Kaggle API token .*: ")
        assert child.waitnoecho(10)
        child.sendline("KGAT_typed")
        child.expect(pexpect.EOF)
        said = child.before.replace("\r\n", "\n")
    assert "of the user 'dora', found in: what you typed" in said and "went on" in said
    assert "KGAT_typed" not in said
    assert kaggle.requests == [("Hello", bearer("KGAT_typed"))]


@pytest.mark.full
def test_a_kernel_without_a_page_goes_on_at_once(program):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(program)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    said = "".join(output.text for output in notebook.cells[0].outputs)
    assert "Generate New Token" in said and "went on" in said


@pytest.mark.full
def test_a_kernel_with_a_page_asks_there_hidden(program, kaggle):
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        asked = client.execute(program, allow_stdin=True)
        request = client.get_stdin_msg(timeout=60)
        assert request["msg_type"] == "input_request" and request["content"]["password"] is True
        client.input("KGAT_typed")
        messages = []
        while not messages or messages[-1]["content"].get("execution_state") != "idle":
            message = client.get_iopub_msg(timeout=60)
            messages += [message] if message["parent_header"].get("msg_id") == asked else []
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    said = "".join(message["content"].get("text", "") for message in messages)
    assert "of the user 'dora', found in: what you typed" in said
    assert "KGAT_typed" not in str(messages[1:]) and kaggle.requests == [
        ("Hello", bearer("KGAT_typed"))
    ]
