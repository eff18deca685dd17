"""Download a preset from Kaggle or the Hugging Face Hub, or say why that fails.

Here: where a preset comes from, and one table from an error to its sentence. Nothing
here deletes or repairs a file: a damaged copy is named, with the command that deletes
it. Not here: credentials (`kaggle`) and models (`models`).
"""

import errno
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import h5py
import huggingface_hub
import kagglehub
import keras_hub
from sentencepiece import SentencePieceProcessor

from gemma_lora.access import kaggle
from gemma_lora.access.kaggle import (
    THREE_WAYS,
    check_hub_token,
    hide,
    in_background,
    share_colab_secrets,
    used_place,
    whose,
)

T = TypeVar("T")

# Seconds until the Hub must have answered the first question.
_HUB_SECONDS = 10

_READERS = {
    ".json": lambda file: json.loads(file.read_text("utf-8")),
    ".h5": lambda file: h5py.File(file).close(),
    ".spm": lambda file: SentencePieceProcessor(model_file=str(file)),
}


class Source:
    """Where a preset comes from: `site` is "kaggle", "hf", or "" for anything else.

    >>> Source("gemma_2b_en").page
    'https://www.kaggle.com/models/keras/gemma'
    """

    def __init__(self, preset: str):
        # private: the entry "kaggle_handle" of a KerasHub preset
        known = keras_hub.models.CausalLM.presets
        address = known[preset]["kaggle_handle"] if preset in known else preset
        site, _, handle = address.partition("://")
        self.preset = preset
        self.builtin = preset in known
        self.handle = handle
        self.site = site if handle and site in ("kaggle", "hf") else ""
        self.host = {"kaggle": "Kaggle", "hf": "The Hugging Face Hub"}.get(self.site, address)
        pages = {"kaggle": "https://www.kaggle.com/models"}
        root = pages.get(self.site, "https://huggingface.co")
        self.page = "/".join([root, *handle.split("/")[:2]])

    def credentials(self) -> str | None:
        """Say where this site's credentials are; None if there are none.

        Raises ValueError, without the value, if they cannot be read or sent.
        """
        if self.site == "kaggle":
            return used_place()
        return check_hub_token() if self.site == "hf" else None

    def file(self, name: str) -> Path:
        """Fetch one small file unless cached. Raises TimeoutError if that is slow."""
        if self.site == "kaggle":
            download = in_background(lambda: kagglehub.model_download(self.handle, name))
            return Path(download.result(kaggle.SECONDS))
        # One question first: a download that fails is tried again for minutes.
        huggingface_hub.HfApi().model_info(self.handle, timeout=_HUB_SECONDS)
        return Path(huggingface_hub.hf_hub_download(self.handle, name))

    def ask_hub(self, name: str) -> None:
        """Ask the Hub for one file's headers, which raises what a download would."""
        url = huggingface_hub.hf_hub_url(self.handle, name)
        huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_SECONDS)

    def folder(self) -> Path:
        """Say where the files are once they have been fetched. It asks nobody."""
        if self.site == "kaggle":
            # private: kagglehub.cache and kagglehub.handle
            handle = kagglehub.handle.parse_model_handle(self.handle)
            return Path(kagglehub.cache.get_cached_path(handle))
        known = huggingface_hub.try_to_load_from_cache(self.handle, "config.json")
        return Path(known).parent if isinstance(known, str) else Path("nothing of it is cached")

    def is_complete(self) -> bool:
        """Say whether the config and all weights are cached and can be read."""
        folder = self.folder()
        names = {"config.json", "model.weights.h5"}
        try:
            if (folder / "model.weights.json").is_file():
                parts = json.loads((folder / "model.weights.json").read_text("utf-8"))
                names = {"config.json"}
                for part in parts["weight_map"].values():
                    names.update([part] if isinstance(part, str) else part)
        except (OSError, ValueError, KeyError):
            return False
        return all((folder / name).is_file() for name in names) and not self.damaged()

    def damaged(self) -> list[str]:
        """Name the cached files that cannot be read. It changes none."""
        names = []
        try:
            files = sorted(self.folder().rglob("*")) if self.site else []
        except (OSError, ValueError):
            # The handle is malformed, which the client says better.
            files = []
        for file in files:
            if file.suffix not in _READERS or not file.is_file():
                continue
            try:
                _READERS[file.suffix](file)
            except Exception:
                with suppress(OSError):
                    is_page = file.read_bytes()[:200].lstrip().startswith(b"<")
                    hint = " (a web page: does the network want a login?)" if is_page else ""
                    names.append(file.name + hint)
        return names

    def folder_to_delete(self) -> Path:
        """Say which folder to delete so that the next download starts from nothing."""
        # The Hub's files are links to blobs beside them, which a new download reuses.
        return self.folder().parents[1] if self.site == "hf" else self.folder()


class AccessError(RuntimeError):
    """A preset or its data could not be fetched, or a model could not be sent.

    `reason` is one word: credentials, consent, unknown, busy, server, network, disk or
    damaged. No secret that can be found is ever part of the text.
    """

    def __init__(self, reason: str, sentence: str):
        super().__init__(hide(sentence))
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


def fetch(preset: str, load: Callable[[str], T]) -> T:
    """Download and load a preset that is not a folder; a cached one needs no network.

    Args:
        preset: A KerasHub preset's name, or a handle: "kaggle://..." or "hf://...".
        load: Makes the model or tokenizer from a preset or folder; it downloads files.

    Raises:
        AccessError: It could not be fetched. The text says why and what to do.
        ValueError: The credentials, or the handle, are malformed.
    """
    source = Source(preset)
    if source.site == "kaggle" and source.is_complete():
        # A version on Kaggle never changes, so there is nothing to ask. A file can be
        # missing all the same: without a task.json, the weights do not come last.
        with suppress(FileNotFoundError):
            return load(str(source.folder()))
    share_colab_secrets()
    place = source.credentials()
    try:
        if source.site:
            # KerasHub would say of every failure that this file does not exist. Here,
            # the client's own error arrives, and with it the status code.
            source.file("config.json")
        return load(preset)
    except (MemoryError, TypeError):
        raise
    except Exception as error:
        problem = access_error(_cause(error, source), source, place)
        if problem is None:
            raise
    if source.site == "hf" and problem.reason not in ("disk", "damaged") and source.is_complete():
        with suppress(FileNotFoundError):
            return load(str(source.folder()))
    # Raised out here: as its context, the client's error could show a header.
    raise problem


def _cause(error: Exception, source: Source) -> Exception:
    """Find out why the Hub sends no weights; KerasHub says that they do not exist."""
    # private: this text of KerasHub, whose error does not keep the Hub's
    if source.site == "hf" and "model.weights" in str(error):
        try:
            source.ask_hub("model.weights.h5")
        except Exception as cause:
            return cause if status_of(cause) not in (0, 404) else error
    return error


def access_error(error: Exception, source: Source, place: str | None) -> AccessError | None:
    """Gather what `explain` needs, and say what an error means; None if it cannot say.

    Args:
        error: What a client, or KerasHub after it, has raised.
        source: What was asked for.
        place: Where the credentials are; None if there are none.
    """
    user = None
    if source.site == "kaggle" and place and status_of(error) == 403:
        user = whose()
    problem = explain(error, source, place=place, user=user)
    if status_of(error) == 0 and (problem is None or problem.reason == "server"):
        # A file that is no JSON, for example: from the network, or from the cache.
        damaged = source.damaged()
        if damaged:
            problem = damaged_copy(source, damaged, source.folder_to_delete())
    if problem is None:
        texts = [text for each in _chain(error) for text in (str(each), repr(each))]
        if all(text == hide(text) for text in texts):
            return None
        problem = Problem("unknown", f"{source.host} gave an unexpected answer: {_said(error)}")
    return AccessError(problem.reason, problem.sentence)


# What an error means: a table, and the pure functions that look things up in it


class Problem(NamedTuple):
    """Why something cannot be fetched, in one word and in a sentence."""

    reason: str
    sentence: str


# By kind of fault: the reason, and the sentence, whose fields `explain` fills in.
_PROBLEMS = {
    "kaggle: no token": Problem(
        "credentials",
        "{name!r} takes a Kaggle account, its consent to the licence on {page}, and a token. "
        "No token was found. {ways}\n{anyway}",
    ),
    "kaggle: no consent": Problem(
        "consent",
        "{user} has not accepted the licence of {name!r}: open {page}, sign in as {user}, accept "
        "it, and run this again. It takes effect within minutes.{hint}",
    ),
    "kaggle: token refused": Problem(
        "credentials",
        "Kaggle does not accept the credentials found in: {place} ({status}). They may be "
        "mistyped, expired or deleted. Create a new token on kaggle.com (your picture > Settings "
        "> API), put it there, and run this again. {anyway}",
    ),
    "hf: no token": Problem(
        "credentials",
        "{name!r} is not open to everybody, or does not exist ({status}), and there is no token "
        "for the Hub. Accept the licence on {page}, create a token on {tokens}, and call "
        "huggingface_hub.login() or set HF_TOKEN. {anyway}",
    ),
    "hf: no consent": Problem(
        "consent",
        "The user of this machine's token for the Hub has no access to {name!r}: open {page}, "
        "accept the licence, and run this again. A fine-grained token also needs permission to "
        "read gated repositories.",
    ),
    "hf: token refused": Problem(
        "credentials",
        "The Hub does not accept this machine's token, or has no {handle!r} that it may see "
        "({status}). Create a new token on {tokens} and call huggingface_hub.login(). {anyway}",
    ),
    "404": Problem(
        "unknown", "{host} has no model {handle!r}, or no such file in it. Is {name!r} spelt right?"
    ),
    "429": Problem(
        "busy",
        "{host} is rate-limiting this machine (429). Wait a few minutes, and run this again.",
    ),
    "5xx": Problem(
        "server", "{host} has a fault of its own ({status}). Run this again in some minutes."
    ),
    "another status": Problem("unknown", "{host} gave an unexpected answer ({status}): {said}"),
    "disk": Problem(
        "disk",
        "The disk is full: {name!r} could not be stored. Delete what you can spare, or set "
        "{variable} to a folder on a larger disk and restart; then run this again.",
    ),
    "folder": Problem(
        "disk",
        "{name!r} cannot be stored: {said}. Set {variable} to a folder that you may write to, "
        "and restart.",
    ),
    "broken off": Problem(
        "damaged", "The download of {name!r} broke off ({said}). Run this again."
    ),
    "offline": Problem(
        "network",
        "{name!r} is not on this machine, and HF_HUB_OFFLINE forbids downloading it. {anyway}",
    ),
    "timeout": Problem(
        "network", "{host} did not answer in time. Check the network, and run this again. {anyway}"
    ),
    "network": Problem(
        "network",
        "{host} cannot be reached, and {name!r} is not on this machine. Check the network (also "
        "a proxy or VPN), and run this again. {anyway}",
    ),
    "page": Problem(
        "server", "{host} answered with a web page. Does this network want a login? Run this again."
    ),
    "damaged": Problem(
        "damaged",
        "The copy of {name!r} on this machine is damaged: {files}. Delete it, and run this "
        "again:\nrm -r {folder}",
    ),
}

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

# By the name of a class, because the Hub's client has changed its HTTP library twice
# (requests, httpx, httpx2). Of several kinds, the first one counts.
_KINDS = {
    "broken off": {
        "ChunkedEncodingError",
        "ContentDecodingError",
        "DataCorruptionError",
        "IncompleteRead",
        "RemoteProtocolError",
    },
    "offline": {"OfflineModeIsEnabled"},
    "timeout": {"Timeout", "TimeoutError", "TimeoutException"},
    "network": {"ConnectionError", "LocalEntryNotFoundError", "TransportError"},
    "page": {"JSONDecodeError"},
}


def explain(
    error: BaseException, source: Source, *, place: str | None = None, user: str | None = None
) -> Problem | None:
    """Say what an error of a client means; None if it has nothing to do with access.

    It looks only at its arguments: it opens and deletes nothing, and asks nobody.

    Args:
        error: What a client, or KerasHub after it, has raised.
        source: What was asked for.
        place: Where this site's credentials are; None if there are none.
        user: The user that Kaggle named; None if it named nobody.

    >>> explain(TimeoutError(), Source("gemma_2b_en")).reason
    'network'
    """
    kind = _kind(error, source, place, user)
    if kind is None:
        return None
    hint = "" if source.builtin else " Kaggle says the same of some models that do not exist."
    fields = {
        "name": source.preset,
        "handle": source.handle,
        "host": source.host,
        "page": source.page,
        "place": place,
        "user": user,
        "hint": hint,
        "status": status_of(error),
        "said": _said(error),
        "variable": "HF_HOME" if source.site == "hf" else "KAGGLEHUB_CACHE",
        "tokens": "huggingface.co/settings/tokens",
        "ways": THREE_WAYS,
        "anyway": 'Without any of this, gl.load("tiny_gemma_en") works.',
    }
    problem = _PROBLEMS[kind]
    return Problem(problem.reason, problem.sentence.format(**fields))


def damaged_copy(source: Source, files: list[str], folder: Path) -> Problem:
    """Name the damaged files of a cached preset, and the command that deletes it."""
    problem = _PROBLEMS["damaged"]
    command_folder = shlex.quote(str(folder))
    fields = {"name": source.preset, "files": ", ".join(files), "folder": command_folder}
    return Problem(problem.reason, problem.sentence.format(**fields))


def status_of(error: BaseException) -> int:
    """Return the HTTP status behind an error; 0 if no server answered."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if response is not None:
            return response.status_code
    return 0


def _kind(error: BaseException, source: Source, place: str | None, user: str | None) -> str | None:
    """Find an error's row in the table of problems."""
    status = status_of(error)
    if status in (401, 403) and source.site:
        if place is None:
            return f"{source.site}: no token"
        # Kaggle answers 403 to some bad tokens too, but names no user for those.
        # The Hub answers 401 to those.
        if status == 403 and (user or source.site == "hf"):
            return f"{source.site}: no consent"
        return f"{source.site}: token refused"
    if status >= 500:
        return "5xx"
    if status:
        return str(status) if status in (404, 429) else "another status"
    numbers = {getattr(each, "errno", None) for each in _chain(error)}
    if numbers.intersection(_FULL):
        return "disk"
    if numbers.intersection(_CLOSED):
        return "folder"
    # private: this text of huggingface_hub, whose error has no class of its own
    if "Consistency check failed" in str(error):
        return "broken off"
    # Without urllib3's: there, a refused connection is a kind of TimeoutError.
    classes = [kind for each in _chain(error) for kind in type(each).__mro__]
    names = {kind.__name__ for kind in classes if not kind.__module__.startswith("urllib3")}
    for kind, known in _KINDS.items():
        if names & known:
            return kind
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str:
    """Return the first line of an error's text, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:120]
