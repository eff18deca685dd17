"""Whose Kaggle token is used, and where one exists; never what it is.

Here: hand Colab's secrets to kagglehub, ask Kaggle whose credentials they are, ask you
for a token, store it, and hide every secret in a text. Which credentials come first is
Kaggle's client's business: we ask the client. Not here: downloads (`fetch`).
"""

import base64
import getpass
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import kagglehub

# private: kagglehub.config has these names, but kagglehub does not export them
from kagglehub.config import (
    KaggleApiCredentials,
    clear_kaggle_credentials,
    get_kaggle_credentials,
    set_kaggle_api_token,
    set_kaggle_credentials,
)

from gemma_lora.options import with_options
from gemma_lora.tables import Table

T = TypeVar("T")

NAMES = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")

# How long one question to Kaggle may take, in seconds.
SECONDS = 20

THREE_WAYS = """\
Create a token on kaggle.com: your picture > Settings > API > Generate New Token. Then
- in Colab: the key symbol on the left > Add new secret > name KAGGLE_API_TOKEN, value the
  token, Notebook access on;
- elsewhere: set the environment variable KAGGLE_API_TOKEN;
- or, on your own machine: gl.kaggle_login(store=True) asks for it and writes it to the file
  ~/.kaggle/access_token.
An older user name and key work too: KAGGLE_USERNAME and KAGGLE_KEY, or ~/.kaggle/kaggle.json."""


@dataclass(frozen=True)
class Login:
    """Where credentials for Kaggle were found, and whose they are.

    It is true if there are any. `user` is None if Kaggle did not say.
    """

    place: str | None
    user: str | None

    def __bool__(self) -> bool:
        return self.place is not None

    def __repr__(self) -> str:
        if self.place is None:
            return f"No credentials for Kaggle.\n{THREE_WAYS}"
        owner = "whose user Kaggle did not confirm: gl.check() says why"
        if self.user:
            owner = f"of the user {self.user!r}"
        return f"Kaggle credentials {owner}, found in: {self.place}"


@with_options
def kaggle_login(
    *,
    token: str | None = None,
    username: str | None = None,
    key: str | None = None,
    store: bool = False,
    ask: bool = True,
) -> Login:
    """Find credentials for Kaggle, have kagglehub and KerasHub use them, and say whose.

    Arguments come first. Without them, Kaggle's client looks: at KAGGLE_API_TOKEN, at
    `~/.kaggle/access_token`, the older KAGGLE_USERNAME and KAGGLE_KEY, `kaggle.json`,
    and Colab's secrets of these names. If nothing exists, this asks you for a token,
    hidden while you type; press Enter to go on without one.

    Args:
        token: An API token. Pass a variable, not a literal: a literal is saved with the
            notebook.
        username, key: An older pair instead of a token.
        store: Whether to write what you gave or typed to `~/.kaggle/access_token` (a
            pair: `kaggle.json`), readable by you alone, after Kaggle has confirmed it.
        ask: Whether to ask, if somebody can be asked.

    Returns:
        Where they were found and whose they are. It is false, and shows what to do, if
        there are none.

    Raises:
        ValueError: What you gave, or what was found, cannot be a token or key; or a
            token exists that Kaggle's client would send instead of your pair.
        PermissionError: With `store`, Kaggle did not confirm them.
        FileExistsError: With `store`, the file already exists.
    """
    if (username is None) != (key is None) or (token is not None and key is not None):
        raise ValueError(
            "Give a token, or a username and a key. Received: another choice of the three."
        )
    given = None
    place = "the arguments"
    if key is not None:
        given = KaggleApiCredentials(username=username, key=key)
    elif token is not None:
        given = _from_text(token)
    else:
        share_colab_secrets()
        typed = _ask() if ask and used_place() is None else None
        if typed:
            given = _from_text(typed)
            place = "what you typed"
    if given:
        _hand_over(given, place)
    else:
        place = used_place()
    login = Login(place, whose() if place else None)
    if store and given:
        _store(given, login)
    return login


def find_credentials() -> Table:
    """Look where Kaggle's client looks, and say whether credentials exist there.

    The result has a row for each place. `found` is "yes", "no" or a reason. What the
    credentials are is never shown, and Kaggle is not asked.
    """
    rows = []
    for place, found in known_places().items():
        if isinstance(found, KaggleApiCredentials):
            problem = problem_with(found)
            found = f"yes, but {problem}" if problem else "yes"
        rows.append({"place": place, "found": found or "no"})
    if "COLAB_RELEASE_TAG" in os.environ:
        secrets_of_colab = share_colab_secrets()
        for name in NAMES:
            found = secrets_of_colab.get(name, "not asked: a place above has credentials")
            rows.append({"place": f"Colab secret {name}", "found": found})
    held = _held()
    if held and held != _from_colab and held not in known_places().values():
        rows.insert(0, {"place": "an earlier login", "found": "yes"})
    return Table(rows)


def known_places() -> dict[str, KaggleApiCredentials | str | None]:
    """Read each place that Kaggle documents.

    Returns:
        By place: credentials, a text that says why they cannot be read, or None.
    """
    home = Path.home() / ".kaggle"
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    token, username, key = (os.environ.get(name) for name in NAMES)
    places = {}
    if {"KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL"} <= os.environ.keys():
        file = Path(os.environ.get("KAGGLE_API_V1_TOKEN", ""))
        places["Kaggle's own notebook"] = _in_file(file)
    places["environment: KAGGLE_API_TOKEN"] = None
    if token and os.path.exists(token):  # noqa: PTH110 (Path takes no name of such length)
        places["environment: KAGGLE_API_TOKEN"] = _in_file(Path(token))
    elif token:
        places["environment: KAGGLE_API_TOKEN"] = KaggleApiCredentials(api_key=token)
    places["file: ~/.kaggle/access_token"] = _in_file(home / "access_token") or _in_file(
        home / "access_token.txt"
    )
    places["environment: KAGGLE_USERNAME and KAGGLE_KEY"] = None
    if username and key:
        pair = KaggleApiCredentials(username=username, key=key)
        places["environment: KAGGLE_USERNAME and KAGGLE_KEY"] = pair
    places["file: kaggle.json"] = _in_file(folder / "kaggle.json")
    if folder != home:
        # Kaggle's inner client looks at home all the same.
        places["file: ~/.kaggle/kaggle.json"] = _in_file(home / "kaggle.json")
    return places


def used_place() -> str | None:
    """Name the places that hold what Kaggle's client will send; None if it has nothing.

    Raises ValueError, without the value, if what it found cannot be read or sent.
    """
    used = _in_use()
    if used is None:
        return None
    places = [place for place, found in known_places().items() if found == used]
    if used == _from_colab:
        places.append(_colab_place(used))
    place = " and ".join(places) or "an earlier login"
    check_characters(used, place)
    return place


def whose() -> str | None:
    """Ask Kaggle for the name of the credentials' user; None if it does not say."""
    try:
        asked = in_background(lambda: kagglehub.whoami(verbose=False))
        return asked.result(SECONDS)["username"]
    except Exception:
        # kagglehub raises the same error for a wrong token, no answer, and no JSON.
        return None


def in_background(call: Callable[[], T]) -> "Future[T]":
    """Start a call in a daemon thread, and return its future.

    Kaggle's client sets no time limit on its requests; `in_background(call).result(20)`
    does. Unlike a thread pool, a daemon thread does not keep a program from ending.

    >>> in_background(lambda: 6 * 7).result(1)
    42
    """
    future: Future[T] = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# Secrets, and how they stay hidden


def hide(text: str) -> str:
    """Replace every secret that can be found in a text by "(hidden)"."""
    for secret in secrets():
        text = text.replace(secret, "(hidden)")
    return text


def secrets() -> list[str]:
    """List every token and key that can be found, longest first. Never show it."""
    values = [os.environ.get(name) for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "HF_TOKEN")]
    for found in [*known_places().values(), _held()]:
        if not isinstance(found, KaggleApiCredentials):
            continue
        values += [found.api_key, found.key]
        if found.key:
            # A pair is sent as base64, so an error can also show it in that form.
            pair = f"{found.username}:{found.key}".encode(errors="surrogateescape")
            values.append(base64.b64encode(pair).decode())
    # If the Hub's file of the token cannot be read, nobody can show it.
    with suppress(OSError, ValueError):
        values.append(huggingface_hub.get_token())
    texts = {value for value in values if isinstance(value, str) and len(value) > 3}
    return sorted(texts, key=len, reverse=True)


def problem_with(credentials: KaggleApiCredentials) -> str | None:
    """Say, without the value, why no header can carry credentials; None if one can.

    >>> problem_with(KaggleApiCredentials(api_key="two words"))
    'the token holds a space or line break'
    """
    values = {"token": credentials.api_key}
    if credentials.api_key is None:
        values = {"user name": credentials.username, "key": credentials.key}
    for what, value in values.items():
        if not isinstance(value, str):
            return f"the {what} is not text but {type(value).__name__}"
        if not value:
            return f"the {what} is empty"
        if any(character.isspace() for character in value):
            return f"the {what} holds a space or line break"
        if not all("!" <= character <= "~" for character in value):
            return f"the {what} holds a control character, or one outside ASCII"
    return None


def check_characters(credentials: KaggleApiCredentials, place: str) -> None:
    """Raise ValueError, without the value, if credentials cannot be sent in a header.

    Call it before any client sees them: the client's own error would show the value.
    """
    problem = problem_with(credentials)
    if problem:
        raise ValueError(f"Found in {place}: {problem}. Copy it again.")


def check_hub_token() -> str | None:
    """Say where the Hub's token is; None without a token.

    Raises ValueError, without the value, if it cannot be read or sent.
    """
    place = "HF_TOKEN, or the file that huggingface_hub.login() writes"
    try:
        token = huggingface_hub.get_token()
    except (OSError, ValueError):
        token = "\0"
    if not token:
        return None
    check_characters(KaggleApiCredentials(api_key=token), place)
    return place


# Colab's secrets

# What was handed to kagglehub last, to tell it from a login.
_from_colab: KaggleApiCredentials | None = None


def share_colab_secrets() -> dict[str, str]:
    """Hand Colab's secrets to kagglehub, unless other credentials exist.

    kagglehub alone finds a user name and key there only if a token is there too.

    Returns:
        For each secret "yes", "no" or a reason. Nothing outside Colab, or if another
        place has credentials: then Colab is not asked.
    """
    global _from_colab
    if "COLAB_RELEASE_TAG" not in os.environ:
        return {}
    from_colab_before = _from_colab is not None and _held() == _from_colab
    found, secret = {}, None
    if not any(known_places().values()):
        found, secret = _read_colab_secrets()
    if from_colab_before and secret is None:
        clear_kaggle_credentials()
    elif secret and (from_colab_before or _held() in (None, secret)):
        _hand_over(secret, _colab_place(secret))
        _from_colab = secret
    return found


def _read_colab_secrets() -> tuple[dict[str, str], KaggleApiCredentials | None]:
    """Ask Colab for its secrets: what exists, and the credentials that they make."""
    try:
        from google.colab import userdata
    except ImportError:
        # A virtual environment inside Colab does not have Colab's module.
        return {}, None
    reasons = {
        userdata.SecretNotFoundError: "no",
        userdata.NotebookAccessError: "yes, but switch its notebook access on",
        userdata.TimeoutException: "Colab did not answer: run this cell again",
    }
    values, found = {}, {}
    for name in NAMES:
        try:
            # Line breaks are left out, as kagglehub does.
            values[name] = "".join(userdata.get(name).splitlines()).strip()
            found[name] = "yes"
        except Exception as error:
            # Colab's own three, or a process that has no page to ask.
            found[name] = reasons.get(type(error), "only a notebook's page can be asked for it")
    token, username, key = (values.get(name) for name in NAMES)
    if token:
        return found, KaggleApiCredentials(api_key=token)
    if username and key:
        return found, KaggleApiCredentials(username=username, key=key)
    return found, None


def _colab_place(secret: KaggleApiCredentials) -> str:
    if secret.api_key is None:
        return "Colab secrets KAGGLE_USERNAME and KAGGLE_KEY"
    return "Colab secret KAGGLE_API_TOKEN"


# Between kagglehub and you


def _in_use() -> KaggleApiCredentials | None:
    """Ask kagglehub what it will send. Raises ValueError, without the value."""
    try:
        return get_kaggle_credentials()
    except (OSError, TypeError, ValueError) as error:
        kind = type(error).__name__
    # Raised out here: as its context, the client's error could show the value.
    raise ValueError(
        f"Kaggle's client cannot read its credentials ({kind}). One of these is damaged: "
        "KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json. Delete it, or create it again."
    )


def _held() -> KaggleApiCredentials | None:
    """Say what kagglehub will send; None also if it cannot say."""
    try:
        return _in_use()
    except ValueError:
        return None


def _in_file(path: Path) -> KaggleApiCredentials | str | None:
    """Read credentials from a file; say why if that fails; None if it has none."""
    try:
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8").strip()
        if path.name != "kaggle.json":
            return KaggleApiCredentials(api_key=text) if text else None
        return _pair(text)
    except (OSError, ValueError) as error:
        return f"yes, but it cannot be read ({type(error).__name__})"


def _pair(text: str) -> KaggleApiCredentials:
    """Read the text of a kaggle.json. Raises ValueError, without the text."""
    try:
        values = json.loads(text)
        return KaggleApiCredentials(username=values["username"], key=values["key"])
    except (KeyError, TypeError, ValueError):
        values = None
    # Raised out here, because that error holds the text.
    raise ValueError("It begins like a kaggle.json, but holds no username and key.")


def _from_text(text: str) -> KaggleApiCredentials:
    """Read a token, or the text of a kaggle.json, which people paste too."""
    if isinstance(text, str) and text.lstrip().startswith("{"):
        return _pair(text)
    return KaggleApiCredentials(api_key=text.strip() if isinstance(text, str) else text)


def _hand_over(given: KaggleApiCredentials, place: str) -> None:
    """Give credentials to kagglehub: in memory, not in the environment."""
    check_characters(given, place)
    if given.api_key is not None:
        set_kaggle_api_token(given.api_key)
        return
    for other, found in known_places().items():
        if isinstance(found, KaggleApiCredentials) and found.api_key:
            raise ValueError(
                "Kaggle's client prefers a token to a user name and key, and one exists in "
                f"{other}. Remove it, or pass token=... instead."
            )
    set_kaggle_credentials(given.username, given.key)


def _ask() -> str | None:
    """Ask for a token, hidden while it is typed; None if nobody can be asked."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    in_terminal = not getattr(sys.stdin, "closed", True) and sys.stdin.isatty()
    if not hasattr(shell, "kernel") and not in_terminal:
        return None
    try:
        prompt = "Kaggle API token (hidden while you type; Enter to go on without): "
        return getpass.getpass(prompt).strip()
    except (EOFError, RuntimeError):
        # A notebook that runs without a page raises StdinNotImplementedError.
        return None


def _store(given: KaggleApiCredentials, login: Login) -> None:
    """Write confirmed credentials where Kaggle's client looks, never over a file."""
    if login.user is None:
        raise PermissionError(
            "Kaggle did not confirm these credentials, so nothing was stored. gl.check() says why."
        )
    path = Path.home() / ".kaggle" / "access_token"
    text = given.api_key
    if text is None:
        path = Path(os.environ.get("KAGGLE_CONFIG_DIR") or path.parent) / "kaggle.json"
        text = json.dumps({"username": given.username, "key": given.key})
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The whole text under another name first; mkstemp lets only its owner read it.
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".part")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        # Unlike a rename, a link fails if the file exists.
        path.hardlink_to(part)
    except FileExistsError:
        raise FileExistsError(
            f"The file {path} already exists, and was left as it is. Delete it to store these."
        ) from None
    finally:
        Path(part).unlink()
