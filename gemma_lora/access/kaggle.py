"""Whose token Kaggle's client uses and where it was found; never what it is."""

import base64
import getpass
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import kagglehub
import requests
from kagglehub.config import (
    KaggleApiCredentials,
    clear_kaggle_credentials,
    get_kaggle_credentials,
    set_kaggle_api_token,
    set_kaggle_credentials,
)

from gemma_lora.tables import Table

NAMES = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")


def used_place() -> str | None:
    """Where the credentials that Kaggle's client will use were found; None if there are none."""
    used, problem = held_credentials()
    if problem:
        raise ValueError(problem)
    found = list(all_places())
    if (
        used is None or used.api_key is None
    ):  # its inner client looks again: a token first, and at home last
        inner = [one for one in found if one[1] and (one[1].api_key or used is None)]
        place, used = next(iter(inner), (None, used))
        if place:
            check_characters(used, place)
            return place
    if used is None:
        return None
    place = getattr(
        used, "gemma_lora_place", None
    )  # set below, on the credentials that kagglehub then holds
    place = place or next((place for place, one in found if one == used), "an earlier login")
    check_characters(used, place)
    return place


def held_credentials() -> tuple[KaggleApiCredentials | None, str]:
    """What Kaggle's client uses; and where it fails, why. Its own errors may hold, or lead to, the value."""
    try:
        return get_kaggle_credentials(), ""
    except (OSError, TypeError, ValueError) as error:
        if (
            type(error) is ValueError
        ):  # a kaggle.json that cannot be read; the message holds its path only
            return None, f"{error}. Download it again, or delete it."
        what = "What KAGGLE_API_TOKEN names, or a file in ~/.kaggle (access_token, kaggle.json),"
        return (
            None,
            f"{what} is no token and cannot be read ({type(error).__name__}). Create it anew.",
        )


def hide(text: str) -> str:
    """Leave out of a text every secret that can be found."""
    for secret in secrets():
        text = text.replace(secret, "(hidden)")
    return text


def secrets() -> list[str]:
    """All that must never be shown: every token and key that can be found, longest first."""
    try:
        pairs = [held_credentials()[0], *(found for _, found in all_places())]
        hub = huggingface_hub.get_token()
    except (OSError, ValueError):
        pairs, hub = [held_credentials()[0]], None
    found = [value for one in pairs if one for value in (one.api_key, one.key)]
    found += [
        base64.b64encode(f"{one.username}:{one.key}".encode()).decode()
        for one in pairs
        if one and one.key
    ]
    found += [hub, *map(os.environ.get, ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "HF_TOKEN"))]
    return sorted(
        {value for value in found if isinstance(value, str) and len(value) > 3},
        key=len,
        reverse=True,
    )


def check_hub_token() -> None:
    """Raise a ValueError, without the value, if the Hub's token is one that no header can carry."""
    try:
        token = huggingface_hub.get_token()
    except (OSError, ValueError):
        token = "\0"
    if token:
        check_characters(KaggleApiCredentials(api_key=token), "HF_TOKEN, or the Hub's file of it,")


def all_places() -> Iterator[tuple[str, KaggleApiCredentials | None]]:
    """Yield each place that Kaggle's client reads, in its order, and what stands there."""

    def from_file(path: Path) -> KaggleApiCredentials | None:
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        return KaggleApiCredentials(api_key=text) if text else None

    if {"KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL"} <= os.environ.keys():
        yield "Kaggle's own notebook", from_file(Path(os.environ.get("KAGGLE_API_V1_TOKEN", "")))
    token, username, key = map(os.environ.get, NAMES)
    home = Path.home() / ".kaggle"
    if token and os.path.exists(token):  # noqa: PTH110 (unlike Path, it takes a name of any length)
        yield "environment: KAGGLE_API_TOKEN", from_file(Path(token))
    else:
        yield (
            "environment: KAGGLE_API_TOKEN",
            KaggleApiCredentials(api_key=token) if token else None,
        )
    yield (
        "file: ~/.kaggle/access_token",
        from_file(home / "access_token") or from_file(home / "access_token.txt"),
    )
    pair = KaggleApiCredentials(username=username, key=key) if username and key else None
    yield "environment: KAGGLE_USERNAME and KAGGLE_KEY", pair
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    for name, where in {"kaggle.json": folder, "~/.kaggle/kaggle.json": home}.items():
        if name == "kaggle.json" or where != folder:
            text = from_file(where / "kaggle.json")
            yield (
                f"file: {name}",
                read_pair(text.api_key) if text else None,
            )  # used_place() says if it cannot be read


def read_pair(text: str) -> KaggleApiCredentials | None:
    """Read what stands in a kaggle.json; None if it is none."""
    try:
        pair = json.loads(text)
        return KaggleApiCredentials(username=pair["username"], key=pair["key"])
    except (KeyError, TypeError, ValueError):
        return None


def check_characters(given: KaggleApiCredentials, place: str) -> None:
    """Raise a ValueError, without the value, for what no header can carry: its own error would show the value."""
    values = (
        {"token": given.api_key}
        if given.api_key is not None
        else {"user name": given.username, "key": given.key}
    )
    for what, value in values.items():
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"The {what} in {place} is empty, or no text. Received: {type(value).__name__}"
            )
        bad = next((char for char in value if not "!" <= char <= "~"), None)
        if bad:
            kind = (
                "a space or line break"
                if bad.isspace()
                else "a character outside ASCII, or a control character"
            )
            raise ValueError(f"The {what} in {place} holds {kind}; none has. Copy it again.")


THREE_WAYS = """\
Create a token on kaggle.com: your picture > Settings > API > Generate New Token. Then one of
- in Colab: the key symbol on the left > Add new secret > name KAGGLE_API_TOKEN, value the token, Notebook access on;
- anywhere: the environment variable KAGGLE_API_TOKEN;
- on your own machine: the file ~/.kaggle/access_token, the token alone; gl.kaggle_login(store=True) asks and writes it.
An older user name and key work too, as KAGGLE_USERNAME and KAGGLE_KEY or as the file ~/.kaggle/kaggle.json."""
_NOT_USED = "yes, but a place above comes first"


@dataclass(frozen=True)
class Login:
    """Where credentials were found, and whose they are; true if there are any. `user` is None if Kaggle did not say."""

    place: str | None
    user: str | None

    def __bool__(self) -> bool:
        return self.place is not None

    def __repr__(self) -> str:
        if self.place is None:
            return f"No credentials for Kaggle.\n{THREE_WAYS}"
        whose = (
            f"of the user {self.user!r}"
            if self.user
            else "whose user Kaggle did not confirm: gl.check() says why"
        )
        return f"Kaggle credentials {whose}, found in: {self.place}"


def kaggle_login(
    *,
    token: str | None = None,
    username: str | None = None,
    key: str | None = None,
    store: bool = False,
    ask: bool = True,
) -> Login:
    """Find credentials for Kaggle where its client looks, in its order, and have kagglehub and KerasHub use them.

    The order: these arguments; an earlier login; the environment or file KAGGLE_API_TOKEN; `~/.kaggle/access_token`;
    the environment variables KAGGLE_USERNAME and KAGGLE_KEY; kaggle.json; Colab's secrets of the same three names.
    Where there is nothing, it asks for a token, hidden while you type; Enter goes on without.

    Args:
        token: An API token. Rather a variable than a literal: what stands in a cell is saved with it.
        username, key: An older pair instead of a token.
        store: Whether to write what was given or typed to `~/.kaggle/access_token` (a pair: `kaggle.json`), readable by
            you alone, once Kaggle has confirmed it.
        ask: Whether to ask, where there is somebody to ask.

    Returns:
        Where they were found and whose they are. It is false, and shows what to do, where there are none.

    Raises:
        ValueError: What was given or found cannot be a token or key, or a place that Kaggle's client prefers hides it.
        PermissionError: `store`, and Kaggle did not confirm them.
        FileExistsError: `store`, and there is a file already.
    """
    if (username is None) != (key is None) or (token is not None and key is not None):
        raise ValueError(
            "Give a token, or a username and a key. Received: another choice of the three."
        )
    place = "the arguments" if token is not None or key is not None else None
    pair = KaggleApiCredentials(username=username, key=key, api_key=token)
    given = _from_text(token) if isinstance(token, str) else pair
    if place is None:
        share_colab_secrets()
        if ask and used_place() is None and (typed := _ask()):
            given, place = _from_text(typed), "what you typed"
    if place:
        _use(given, place)
    used = used_place()
    login = Login(used, whose() if used else None)
    if store and place:
        _store(given, login)
    return login


def find_credentials() -> Table:
    """Look where Kaggle's client looks, and say where something was found, never what: a row a place, in its order."""
    refused = share_colab_secrets()
    used, rows = used_place(), []
    for place, found in all_places():
        rows.append(
            {"place": place, "found": "yes" if place == used else _NOT_USED if found else "no"}
        )
    if used and used not in [row["place"] for row in rows]:
        rows.insert(0, {"place": used, "found": "yes"})
    refused = {f"Colab secret {name}": reason for name, reason in refused.items()}
    return Table(
        rows
        + [{"place": place, "found": reason} for place, reason in refused.items() if place != used]
    )


def whose() -> str | None:
    """Ask Kaggle for the name of the credentials' user; None if it does not say."""
    try:
        with timeouts():
            return kagglehub.whoami(verbose=False)["username"]
    except Exception:  # kagglehub has one error for all: wrong, no answer, not JSON
        return None


def share_colab_secrets() -> dict[str, str]:
    """In Colab, have Kaggle's client use the secrets; for each that could not be read, why.

    The client itself finds a user name and key there only if there is a token too, and keeps what it found once.
    """
    if "COLAB_RELEASE_TAG" not in os.environ:
        return {}
    if any(
        found for _, found in all_places()
    ):  # they come first, also where the secrets were used before
        if getattr(held_credentials()[0], "gemma_lora_place", "").startswith("Colab"):
            clear_kaggle_credentials()
        return {}
    try:
        from google.colab import userdata
    except ImportError:  # a virtual environment within Colab
        return {}

    reasons = {
        userdata.SecretNotFoundError: "no",
        userdata.NotebookAccessError: "yes, but notebook access is off: switch it on beside the secret",
        userdata.TimeoutException: "Colab did not answer: run this cell again",
    }
    found, refused = {}, {}
    for name in NAMES:
        try:
            found[name] = (
                userdata.get(name).replace("\r", "").replace("\n", "").strip()
            )  # as the client does
        except Exception as error:  # Colab's own three, or a process that has no page to ask
            refused[name] = reasons.get(
                type(error), "could not be asked for: that takes a notebook's page"
            )
    token, username, key = map(found.get, NAMES)
    if not token and not (username and key):
        return refused
    secret = (
        KaggleApiCredentials(api_key=token)
        if token
        else KaggleApiCredentials(username=username, key=key)
    )
    held, _ = held_credentials()
    if held in (None, secret) or getattr(held, "gemma_lora_place", "").startswith(
        "Colab"
    ):  # else: a login came first
        _use(
            secret,
            "Colab secret KAGGLE_API_TOKEN"
            if token
            else "Colab secrets KAGGLE_USERNAME and KAGGLE_KEY",
        )
    return refused


@contextmanager
def timeouts(connect: float = 5, read: float = 20) -> Iterator[None]:
    """Within this context no request of Kaggle's client waits for ever: it sets no limit itself. Seconds."""
    with _ONE_AT_A_TIME:
        send = requests.Session.send

        def limited(self, request, **options):
            options["timeout"] = options.get("timeout") or (connect, read)
            return send(self, request, **options)

        requests.Session.send = limited
        try:
            yield
        finally:
            requests.Session.send = send


_ONE_AT_A_TIME = threading.RLock()


def _from_text(text: str) -> KaggleApiCredentials:
    """Read a token, or what stands in a kaggle.json, which people paste too."""
    if not text.lstrip().startswith("{"):
        return KaggleApiCredentials(api_key=text.strip())
    if (pair := read_pair(text)) is None:
        raise ValueError("That begins like a kaggle.json, but holds no username and key.")
    return pair


def _use(given: KaggleApiCredentials, place: str) -> None:
    """Hand credentials to kagglehub, which KerasHub asks; in memory, not in the environment that others can list."""
    check_characters(given, place)
    if given.api_key is None:
        hidden = [name for name, found in all_places() if found and found.api_key]
        if hidden:
            raise ValueError(
                f"Kaggle's client prefers a token to a user name and key, and there is one in {hidden[0]}. Remove it, "
                "or pass token=... instead."
            )
        set_kaggle_credentials(given.username, given.key)
    else:
        set_kaggle_api_token(given.api_key)
    get_kaggle_credentials().gemma_lora_place = place


def _ask() -> str | None:
    """Ask for a token, hidden; None where nobody can be asked."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel") and (
        getattr(sys.stdin, "closed", True) or not sys.stdin.isatty()
    ):
        return None
    try:
        return getpass.getpass(
            "Kaggle API token (hidden while you type; Enter to go on without): "
        ).strip()
    except (
        EOFError,
        RuntimeError,
    ):  # a notebook that runs with no page to ask: StdinNotImplementedError
        return None


def _store(given: KaggleApiCredentials, login: Login) -> None:
    if login.user is None:
        raise PermissionError(
            "Kaggle did not confirm these credentials, so nothing was stored. gl.check() says why."
        )
    path = Path.home() / ".kaggle" / "access_token"
    if given.api_key is None:
        path = Path(os.environ.get("KAGGLE_CONFIG_DIR") or path.parent) / "kaggle.json"
    if path.exists():
        raise FileExistsError(
            f"There is a file {path} already, and it was left as it is. Delete it to store these."
        )
    path.parent.mkdir(mode=0o700, exist_ok=True)
    pair = json.dumps({"username": given.username, "key": given.key})
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(given.api_key or pair)
    except OSError:
        path.unlink(missing_ok=True)
        raise
