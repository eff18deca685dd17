"""Download a preset of Kaggle or the Hugging Face Hub, or say in one sentence why not."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import h5py
import huggingface_hub
import kagglehub
import keras_hub
import requests
from sentencepiece import SentencePieceProcessor

from gemma_lora.access.kaggle import (
    THREE_WAYS,
    check_hub_token,
    hide,
    share_colab_secrets,
    timeouts,
    used_place,
    whose,
)


class Source:
    """Where a preset comes from: `site` is "kaggle", "hf", or "" for what is neither.

    >>> Source("gemma_2b_en").page
    'https://www.kaggle.com/models/keras/gemma'
    """

    def __init__(self, preset: str):
        known = keras_hub.models.CausalLM.presets
        address = known[preset]["kaggle_handle"] if preset in known else preset
        self.preset, (site, _, self.handle) = preset, address.partition("://")
        self.site = site if self.handle and site in ("kaggle", "hf") else ""
        self.host = {"kaggle": "Kaggle", "hf": "The Hugging Face Hub"}.get(self.site, address)
        root = (
            "https://www.kaggle.com/models" if self.site == "kaggle" else "https://huggingface.co"
        )
        self.page = "/".join([root, *self.handle.split("/")[:2]])

    def file(self, name: str) -> Path:
        """Fetch one file, unless it is in the cache."""
        if self.site == "kaggle":
            return Path(kagglehub.model_download(self.handle, name))
        huggingface_hub.HfApi().model_info(
            self.handle, timeout=10
        )  # a download's own retries go on for minutes
        return Path(huggingface_hub.hf_hub_download(self.handle, name))

    def folder(self) -> Path:
        """Where the files are kept once they have been fetched; this asks nobody."""
        if self.site == "kaggle":
            return Path(
                kagglehub.cache.get_cached_path(kagglehub.handle.parse_model_handle(self.handle))
            )
        known = huggingface_hub.try_to_load_from_cache(self.handle, "config.json")
        return Path(known).parent if isinstance(known, str) else Path("nothing of it is cached")

    def is_complete(self) -> bool:
        """Whether all was fetched before and can be read: weights come last."""
        folder = self.folder()
        try:
            parts = {"model.weights.h5"}
            if (folder / "model.weights.json").is_file():
                names = json.loads((folder / "model.weights.json").read_text())[
                    "weight_map"
                ].values()
                parts = {part for one in names for part in ([one] if isinstance(one, str) else one)}
            for name in ("config.json", *parts):
                _READERS[Path(name).suffix](folder / name)
            return True
        except (OSError, ValueError, KeyError):
            return False

    def remove_damaged(self) -> list[str]:
        """Delete what was fetched but cannot be read, so that it is fetched anew; the names of these files."""
        removed = []
        for file in sorted(self.folder().rglob("*")):
            if (check := _READERS.get(file.suffix)) and file.is_file():
                try:
                    check(file)
                except Exception:
                    page = file.read_bytes()[:200].lstrip().startswith(b"<")
                    file.resolve().unlink()
                    removed.append(
                        file.name
                        + (" (a web page: does the network want a login?)" if page else "")
                    )
        return removed


_READERS = {
    ".json": lambda file: json.loads(file.read_text()),
    ".h5": lambda file: h5py.File(file).close(),
    ".spm": lambda file: SentencePieceProcessor(model_file=str(file)),
}


T = TypeVar("T")
_ANYWAY = 'Without any of this, gl.load("tiny_gemma_en") works.'


class AccessError(RuntimeError):
    """A preset or its data could not be fetched. `reason` is one word: credentials, consent, unknown, busy, server,
    network, disk or damaged."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(hide(sentence))
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


def fetch(preset: str, load: Callable[[str], T]) -> T:
    """Load a preset that is not a folder; what fails for a moment is tried again, and what is cached needs no network.

    Raises:
        AccessError: It could not be fetched; its text says why, and the way out.
    """
    share_colab_secrets()
    source = Source(preset)
    refuse_what_cannot_be_sent = check_hub_token if source.site == "hf" else used_place
    refuse_what_cannot_be_sent()  # before an error of the client shows it
    for attempt in (1, 2, 3):
        try:
            with timeouts():
                if source.site:
                    source.file(
                        "config.json"
                    )  # KerasHub would say of each failure that this file does not exist
                return load(preset)
        except (MemoryError, TypeError):
            raise
        except Exception as error:
            problem = explain(_cause(error, source), source)
            if problem.reason not in ("disk", "damaged") and source.is_complete():
                with suppress(
                    FileNotFoundError
                ):  # another part: without a task.json the weights do not come last
                    return load(str(source.folder()))
        if problem.reason not in ("server", "damaged") or attempt == 3:
            raise problem  # here, not above: the client's error would stay with it, and may hold a header
        time.sleep(attempt)


def _cause(error: Exception, source: Source) -> Exception:
    """The error that KerasHub hides where it says that there are no weights: fetch them to see."""
    if source.site and "model.weights" in str(error):
        for name in ("model.weights.h5", "model.weights.json"):
            try:
                with timeouts():
                    if source.site == "kaggle":
                        source.file(name)
                    else:  # one request, without a download's retries
                        url = huggingface_hub.hf_hub_url(source.handle, name)
                        huggingface_hub.get_hf_file_metadata(url, timeout=10)
            except Exception as hidden:
                if getattr(getattr(hidden, "response", None), "status_code", 404) != 404:
                    return hidden
    return error


def explain(error: BaseException, source: Source) -> AccessError:
    """Say what an error of the clients means; an error that has nothing to do with fetching is raised again."""
    chain = list(_chain(error))
    name, host = source.preset, source.host
    responses = [one.response for one in chain if getattr(one, "response", None) is not None]
    status = responses[0].status_code if responses else 0
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    full = next(
        (
            one
            for one in chain
            if getattr(one, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
        None,
    )
    closed = next((one for one in chain if getattr(one, "errno", 0) in _CLOSED), None)
    said = next(
        (line for line in hide(str(error)).splitlines() if line.strip()), type(error).__name__
    )

    if status in (401, 403):
        return (_kaggle_refusal if source.site == "kaggle" else _hub_refusal)(status, source)
    if status == 404:
        sentence = f"{host} has no model {source.handle!r}, or no such file in it. Is {name!r} spelt right?"
        return AccessError("unknown", sentence)
    if status == 429:
        sentence = (
            f"{host} gets too many requests from here (429). Wait some minutes, and run this again."
        )
        return AccessError("busy", sentence)
    if status >= 500:
        sentence = f"{host} has a fault of its own ({status}). Run this again in some minutes."
        return AccessError("server", sentence)
    if full:
        sentence = (
            f"The disk is full: {name!r} could not be stored{_free(full.filename)}. Delete what you can spare, or set "
            "KAGGLEHUB_CACHE (for the Hub HF_HOME) to a folder on a larger disk and restart; then run this again."
        )
        return AccessError("disk", sentence)
    if closed:
        sentence = f"{name!r} cannot be stored: {closed}. Set KAGGLEHUB_CACHE to a folder that you may write to."
        return AccessError("disk", sentence)
    if kinds & _BROKEN_OFF or "Consistency check failed" in str(error):
        return AccessError(
            "damaged", f"The download of {name!r} broke off ({said:.120}). Run this again."
        )
    if "OfflineModeIsEnabled" in kinds:
        sentence = (
            f"{name!r} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it. {_ANYWAY}"
        )
        return AccessError("network", sentence)
    if "TimeoutException" in kinds or any(
        isinstance(one, requests.Timeout | TimeoutError) for one in chain
    ):
        sentence = (
            f"{host} did not answer in time. Check the network, and run this again. {_ANYWAY}"
        )
        return AccessError("network", sentence)
    if kinds & {"ConnectionError", "TransportError", "LocalEntryNotFoundError"}:
        sentence = (
            f"{host} cannot be reached, and {name!r} is not on this machine. Check the network (also a proxy or VPN), "
            f"and run this again. {_ANYWAY}"
        )
        return AccessError("network", sentence)
    try:
        removed = source.site and source.remove_damaged()
    except Exception:  # a cache that is read-only, or gone
        removed = []
    if removed:
        sentence = (
            f"What was fetched of {name!r} was damaged, and has been deleted: {', '.join(removed)}."
        )
        return AccessError("damaged", f"{sentence} Run this again.")
    shown = [text for one in chain for text in (str(one), repr(one))]
    if any(text != hide(text) for text in shown):  # an answer that holds what was sent
        return AccessError("unknown", f"{host} answers what nobody expects ({status}): {said}")
    raise error


_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_BROKEN_OFF = {
    "ChunkedEncodingError",
    "IncompleteRead",
    "ContentDecodingError",
    "RemoteProtocolError",
}
_BROKEN_OFF |= {"DataCorruptionError"}


def _kaggle_refusal(status: int, source: Source) -> AccessError:
    place, name = used_place(), source.preset
    if place is None:
        sentence = (
            f"{name!r} takes a Kaggle account, its consent to the licence on {source.page}, and a token. No token was "
            f"found. {THREE_WAYS}\n{_ANYWAY}"
        )
        return AccessError("credentials", sentence)
    user = whose() if status == 403 else None
    if user:
        sentence = (
            f"{user} has not accepted the licence of {name!r}: open {source.page}, sign in as {user}, accept it, and "
            "run this again. It takes effect within minutes."
        )
        if name not in keras_hub.models.CausalLM.presets:
            sentence += " Kaggle says the same of some models that do not exist: is it spelt right?"
        return AccessError("consent", sentence)
    sentence = (
        f"Kaggle does not accept the credentials found in: {place} ({status}). Are they mistyped, expired or deleted? "
        f"Create a new token on kaggle.com (your picture > Settings > API), put it there, and run this again. {_ANYWAY}"
    )
    return AccessError("credentials", sentence)


def _hub_refusal(status: int, source: Source) -> AccessError:
    name, tokens = source.preset, "huggingface.co/settings/tokens"
    if huggingface_hub.get_token() is None:
        sentence = (
            f"{name!r} is not open to everybody, or does not exist ({status}), and there is no token for the Hub. "
            f"Accept the licence on {source.page}, create a token on {tokens}, and call huggingface_hub.login() or "
            f"set HF_TOKEN. {_ANYWAY}"
        )
        return AccessError("credentials", sentence)
    if status == 403:
        sentence = (
            f"The user of this machine's token for the Hub has no access to {name!r}: open {source.page}, accept the "
            "licence, and run this again. A fine-grained token must also allow to read gated repositories."
        )
        return AccessError("consent", sentence)
    sentence = (
        f"The Hub does not accept this machine's token, or has no {source.handle!r} that it may see ({status}). Create "
        f"a new token on {tokens} and call huggingface_hub.login(). {_ANYWAY}"
    )
    return AccessError("credentials", sentence)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _free(place: str | None) -> str:
    folder = Path(place or kagglehub.config.get_cache_folder())
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f" ({shutil.disk_usage(folder).free / 2**30:.1f} GiB are free in {folder})"
