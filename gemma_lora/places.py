"""Where Kaggle's client finds credentials; that they are there may be shown, what they are never."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from kagglehub.config import KaggleApiCredentials, get_kaggle_credentials

NAMES = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")


def used_place() -> str | None:
    """Where the credentials that Kaggle's client will use were found; None if there are none."""
    used, problem = held_credentials()
    if problem:
        raise ValueError(problem)
    found = list(all_places())
    if used is None or used.api_key is None:  # its inner client looks again: a token first, and at home last
        inner = [one for one in found if one[1] and (one[1].api_key or used is None)]
        place, used = next(iter(inner), (None, used))
        if place:
            check_characters(used, place)
            return place
    if used is None:
        return None
    place = getattr(used, "gemma_lora_place", None)  # set below, on the credentials that kagglehub then holds
    place = place or next((place for place, one in found if one == used), "an earlier login")
    check_characters(used, place)
    return place


def held_credentials() -> tuple[KaggleApiCredentials | None, str]:
    """What Kaggle's client uses; and where it fails, why. Its own errors may hold, or lead to, the value."""
    try:
        return get_kaggle_credentials(), ""
    except (OSError, TypeError, ValueError) as error:
        if type(error) is ValueError:  # a kaggle.json that cannot be read; the message holds its path only
            return None, f"{error}. Download it again, or delete it."
        what = "What KAGGLE_API_TOKEN names, or a file in ~/.kaggle (access_token, kaggle.json),"
        return None, f"{what} is no token and cannot be read ({type(error).__name__}). Create it anew."


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
    found += [base64.b64encode(f"{one.username}:{one.key}".encode()).decode() for one in pairs if one and one.key]
    found += [hub, *map(os.environ.get, ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "HF_TOKEN"))]
    return sorted({value for value in found if isinstance(value, str) and len(value) > 3}, key=len, reverse=True)


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
        yield "environment: KAGGLE_API_TOKEN", KaggleApiCredentials(api_key=token) if token else None
    yield "file: ~/.kaggle/access_token", from_file(home / "access_token") or from_file(home / "access_token.txt")
    pair = KaggleApiCredentials(username=username, key=key) if username and key else None
    yield "environment: KAGGLE_USERNAME and KAGGLE_KEY", pair
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    for name, where in {"kaggle.json": folder, "~/.kaggle/kaggle.json": home}.items():
        if name == "kaggle.json" or where != folder:
            text = from_file(where / "kaggle.json")
            yield f"file: {name}", read_pair(text.api_key) if text else None  # used_place() says if it cannot be read


def read_pair(text: str) -> KaggleApiCredentials | None:
    """Read what stands in a kaggle.json; None if it is none."""
    try:
        pair = json.loads(text)
        return KaggleApiCredentials(username=pair["username"], key=pair["key"])
    except (KeyError, TypeError, ValueError):
        return None


def check_characters(given: KaggleApiCredentials, place: str) -> None:
    """Raise a ValueError, without the value, for what no header can carry: its own error would show the value."""
    values = {"token": given.api_key} if given.api_key is not None else {"user name": given.username, "key": given.key}
    for what, value in values.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"The {what} in {place} is empty, or no text. Received: {type(value).__name__}")
        bad = next((char for char in value if not "!" <= char <= "~"), None)
        if bad:
            kind = "a space or line break" if bad.isspace() else "a character outside ASCII, or a control character"
            raise ValueError(f"The {what} in {place} holds {kind}; none has. Copy it again.")
