"""Send a folder to Kaggle or the Hugging Face Hub, after a look at what would be sent.

Here: which files of a folder are sent, under which licence, and what a refusal means.
Not here: how such a folder is made (the other formats), whose token is used (`access`).
"""

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

import huggingface_hub
import kagglehub
import requests
from huggingface_hub.utils import validate_repo_id

from gemma_lora.access.fetch import AccessError, Source, access_error
from gemma_lora.access.kaggle import THREE_WAYS, hide, share_colab_secrets
from gemma_lora.formats.adapter import ADAPTER_FILE, described_base, embedded_text
from gemma_lora.models import TINY, TINY_VOCABULARY
from gemma_lora.options import a_path, with_options
from gemma_lora.tables import ShowsAsTable, Table

_ADDRESS = r"kaggle://[\w-]+/[\w-]+/\w+/[\w.-]+|hf://[\w.-]+/[\w.-]+"
_WEIGHTS = (".safetensors", ".h5")

# What is sent of a folder and of its `assets`, and what is never sent; in lower case.
_SENT = ("*.safetensors", "*.h5", "*.json", "*.model", "*.spm", "*.jinja", "readme.md")
_SENT += ("license", "license.*", "notice", "notice.*", "assets/*")
_NEVER = (".*", "*/.*", "*.part", "*secret*", "*credential*", "*kaggle.json")
_NEVER += ("checkpoint*", "ckpt*", "*/checkpoint*", "*/ckpt*")
_NEVER += ("token.json", "*[_-]token.json", "*/token.json")

_APACHE = f"Licence: Apache-2.0, as it is made from {TINY}, this project's own."
_GEMMA = (
    "Licence: Gemma's terms go with everything made from Gemma, https://ai.google.dev/gemma/terms"
)

# Where a refused upload means something else than a refused download, by reason.
_SENTENCES = {
    "consent": "{host} does not let this machine's token write to {owner!r} (403). The owner is "
    "your own user name there, or an organisation in which you may write; on the Hub the token "
    "needs the role write.",
    "network": "{host} cannot be reached, or stopped answering before everything had arrived. "
    "Check the network (also a proxy, a VPN, HF_HUB_OFFLINE), and run this again.",
    "unknown": "{host} did not take {handle!r}: {said}",
}


@dataclass(frozen=True, repr=False)
class Upload(ShowsAsTable):
    """What `upload` sent, or would send: each file's bytes, and what was left out."""

    uri: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    licence: str
    url: str
    sent: bool

    def table(self) -> Table:
        """A row for each file, and their sum."""
        rows = [{"file": name, "bytes": size} for name, size in self.files.items()]
        rows.append({"file": "all", "bytes": sum(self.files.values())})
        where = "Sent to" if self.sent else "A dry run: nothing was sent. It would go to"
        lines = [f"{where} {self.url}", "A new model is private.", self.licence]
        if self.left_out:
            lines.append(f"Left out: {', '.join(self.left_out)}")
        return Table(rows, caption="\n".join(lines))


@with_options
def upload(
    folder: str | Path, uri: str, *, dry_run: bool = False, card: str | None = None
) -> Upload:
    """Send a model or an adapter to Kaggle or the Hub; the next time, as a new version.

    Weights, JSON, the vocabulary, `assets`, README.md and licences are sent. Everything
    else stays: hidden files, links, checkpoints, credentials. The result names it.

    >>> import tempfile
    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = gl.enable_lora(model)
    >>> folder = gl.save_adapter(model, tempfile.mkdtemp())
    >>> _ = (folder / ".env").write_text("what nobody else should see")
    >>> shown = upload(folder, "hf://ada/tiny", dry_run=True)
    >>> for line in str(shown).splitlines()[:4]:
    ...     print(line)
    A dry run: nothing was sent. It would go to https://huggingface.co/ada/tiny
    A new model is private.
    Licence: Apache-2.0, as it is made from tiny_gemma_en, this project's own.
    Left out: .env
    >>> sorted(shown.files)
    ['README.md', 'adapter.safetensors']

    Args:
        folder: From `gl.save_adapter`, `model.save_to_preset` or an export.
        uri: "kaggle://OWNER/MODEL/FRAMEWORK/VARIATION" or "hf://OWNER/NAME".
        dry_run: Whether only to show what would be sent. It needs no network and no
            credentials, and writes nothing.
        card: The model card's text, if the folder has no README.md: it becomes one.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The address is malformed; or the folder has no weights, no card, a
            different card, or a token in a file.
        RuntimeError: It could not be sent. The text says why and what to do; `reason`
            says it in one word.
    """
    source = _source(uri)
    folder = a_path("folder", folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Save a model first: gl.save_adapter(model, folder)."
        )
    files, left_out = _choose(folder)
    _check_files(folder, files)
    readme = folder / "README.md"
    _check_card(readme, card)
    if card:
        files = dict(sorted({**files, "README.md": len(card.encode())}.items()))
    is_tiny = _is_tiny(folder)
    url = "/".join([source.page, *source.handle.split("/")[2:]])
    result = Upload(uri, files, left_out, _APACHE if is_tiny else _GEMMA, url, sent=False)
    if dry_run:
        return result

    place = _credentials(source)
    if card and not readme.is_file():
        part = readme.with_suffix(".part")
        part.write_bytes(card.encode())
        part.replace(readme)
    try:
        _send(folder, source, result, "Apache 2.0" if is_tiny else None)
    except Exception as error:
        problem = _explain(error, source, place)
    else:
        return replace(result, sent=True)
    # Raised out here: as its context, the client's error could show a header.
    raise problem


def _source(uri: str) -> Source:
    """Read an address. Raises ValueError if it is malformed."""
    if not re.fullmatch(_ADDRESS, str(uri)):
        forms = (
            '"kaggle://OWNER/MODEL/FRAMEWORK/VARIATION", without a version, or "hf://OWNER/NAME"'
        )
        raise ValueError(f"An address is {forms}. Received: {uri!r}")
    source = Source(uri)
    # The clients check this too, but Kaggle's only after it has sent everything.
    if source.site == "kaggle":
        # private: kagglehub.handle
        kagglehub.handle.parse_model_handle(source.handle).framework_enum()
    else:
        validate_repo_id(source.handle)
    return source


def _choose(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Choose the files to send.

    Returns:
        The bytes of each file to send; and what is left out: files, or whole folders.
    """
    files, left_out = {}, set()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        top, _, inner = name.partition("/")
        may_be_sent = not inner or top == "assets"
        is_wanted = _matches(name, _SENT) and not _matches(name, _NEVER)
        if may_be_sent and is_wanted and not file.is_symlink():
            files[name] = file.stat().st_size
        else:
            left_out.add(name if may_be_sent else f"{top}/")
    return files, tuple(sorted(left_out))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _check_files(folder: Path, files: dict[str, int]) -> None:
    """Raise ValueError if no file holds weights, or one holds a known token."""
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise ValueError(
            f"The folder {folder} holds no weights (*{', *'.join(_WEIGHTS)}). "
            f"Found: {[*files] or 'none'}"
        )
    for name in files:
        file = folder / name
        if not name.endswith(_WEIGHTS):
            text = file.read_text("latin-1")
        elif file.name == ADAPTER_FILE:
            # An adapter's description stands in the file of its weights.
            text = embedded_text(file) or ""
        else:
            continue
        if hide(text) != text:
            raise ValueError(
                f"{name} holds a token or key that this machine uses. Remove it, and run this "
                "again."
            )


def _check_card(readme: Path, card: str | None) -> None:
    """Raise ValueError if there is no card, or one that `card` would replace."""
    if not card and not readme.is_file():
        raise ValueError(
            f"{readme.parent} has no model card, the file README.md. Pass its text: "
            "card=gl.model_card(model)."
        )
    if card and readme.is_file() and readme.read_bytes() != card.encode():
        raise ValueError(
            f"{readme} is not the card you passed, and is not replaced. Delete it, or pass no card."
        )


def _is_tiny(folder: Path) -> bool:
    """Whether a folder's model, or its base, is the small model of this package."""
    base, vocabulary_size = described_base(folder)
    if Path(base).is_absolute():
        raise ValueError(
            f"The base is said to be {base}, a folder of this machine. Give a name when you export "
            "it."
        )
    return vocabulary_size == TINY_VOCABULARY or Path(base).name == TINY


def _credentials(source: Source) -> str:
    """Say where the site's credentials are. Raises AccessError if there are none."""
    share_colab_secrets()
    place = source.credentials()
    if place:
        return place
    way_out = THREE_WAYS
    if source.site == "hf":
        way_out = (
            "Create one with the role write on huggingface.co/settings/tokens, and call "
            "huggingface_hub.login()."
        )
    raise AccessError(
        "credentials", f"Sending to {source.host} takes a token, and none was found. {way_out}"
    )


def _send(folder: Path, source: Source, result: Upload, license_name: str | None) -> None:
    """Have the site's client send exactly the chosen files; a new model is private."""
    if source.site == "kaggle":
        # It makes a new model private itself; its list of licences has none for Gemma.
        patterns = [escape(name) for name in result.left_out]
        kagglehub.model_upload(source.handle, str(folder), license_name, ignore_patterns=patterns)
        return
    hub = huggingface_hub.HfApi()
    patterns = [escape(name) for name in result.files]
    hub.create_repo(source.handle, private=True, exist_ok=True)
    hub.upload_folder(repo_id=source.handle, folder_path=folder, allow_patterns=patterns)


def _explain(error: Exception, source: Source, place: str | None) -> AccessError:
    """Say what an error means, as for a download, or in the words of an upload."""
    problem = access_error(error, source, place)
    reason = problem.reason if problem else "unknown"
    # After an answer such as "no such model" the network can still break off.
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        reason = "network"
    reason = {"damaged": "network", "disk": "unknown"}.get(reason, reason)
    if reason not in _SENTENCES:
        return AccessError(reason, str(problem).partition(" Without any of this")[0])
    # Without the signature of an address.
    said = re.sub(r"\?\S+", "", " ".join(hide(str(error)).split()))[:300]
    sentence = _SENTENCES[reason].format(
        host=source.host,
        owner=source.handle.split("/")[0],
        handle=source.handle,
        said=said or type(error).__name__,
    )
    return AccessError(reason, sentence)
