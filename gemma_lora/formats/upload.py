"""Send a folder to Kaggle or the Hugging Face Hub: an adapter, a saved preset, or a model exported for others."""

import json
import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import huggingface_hub
import kagglehub
import requests
from huggingface_hub.utils import validate_repo_id

from gemma_lora.access.fetch import AccessError, Source, explain
from gemma_lora.access.kaggle import (
    THREE_WAYS,
    check_hub_token,
    hide,
    share_colab_secrets,
    timeouts,
    used_place,
)
from gemma_lora.models import TINY, TINY_VOCABULARY
from gemma_lora.tables import ShowsAsTable, Table

_ADDRESS = r"kaggle://[\w-]+/[\w-]+/\w+/[\w.-]+|hf://[\w.-]+/[\w.-]+"
_WEIGHTS = (".safetensors", ".h5")
_SENT = (
    r"[^/]+\.(safetensors|h5|json|model|spm|jinja)|README\.md|(LICENSE|NOTICE)(\.\w+)?|assets/.+"
)
_NEVER = r"(?i)\..*|.*\.part|(checkpoint|ckpt).*|kaggle\.json|.*(secret|credential).*|(.*[_-])?token\.json"
_APACHE = f"Licence: Apache-2.0, as it is made from {TINY}, this project's own."
_GEMMA = (
    "Licence: Gemma's terms go with all that is made from Gemma, https://ai.google.dev/gemma/terms"
)


@dataclass(frozen=True, repr=False)
class Upload(ShowsAsTable):
    """What `upload` sent, or would send, shown as a table: the bytes of each file, and what was left out."""

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
        where = (
            f"Sent to {self.url}"
            if self.sent
            else f"A dry run, nothing was sent. It would go to {self.url}"
        )
        lines = [f"{where}, private if it is new.", self.licence]
        lines += [f"Left out: {', '.join(self.left_out)}"] if self.left_out else []
        return Table(rows, caption="\n".join(lines))


def upload(
    folder: str | Path, uri: str, *, dry_run: bool = False, card: str | None = None
) -> Upload:
    """Send a model's or an adapter's folder to Kaggle or the Hugging Face Hub; a second time, as a new version.

    Weights, JSON, the vocabulary, `assets`, README.md and licences are sent. All else in the folder is left out, hidden
    files, links, checkpoints and credentials too, and the result names it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "adapter.json").write_text('{"base": "tiny_gemma_en"}')
    >>> _ = (folder / "adapter.safetensors").write_bytes(bytes(2048))
    >>> _ = (folder / ".env").write_text("what nobody else should see")
    >>> upload(folder, "hf://ada/tiny_lora", dry_run=True, card="An adapter for travel questions.")
    A dry run, nothing was sent. It would go to https://huggingface.co/ada/tiny_lora, private if it is new.
    Licence: Apache-2.0, as it is made from tiny_gemma_en, this project's own.
    Left out: .env
    file                 bytes
    README.md               32
    adapter.json            25
    adapter.safetensors  2,048
    all                  2,105

    Args:
        folder: From `gl.save_adapter`, `model.save_to_preset` or an export.
        uri: "kaggle://OWNER/MODEL/FRAMEWORK/VARIATION" or "hf://OWNER/NAME".
        dry_run: Whether only to show what would be sent. It takes no network and no credentials, and writes nothing.
        card: The model card, if the folder has no README.md; it is written there.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The address is none, or the folder has no weights, no card, another card, or a token in a file.
        RuntimeError: It could not be sent. The text says why and what to do; `reason` says it in one word.
    """
    source, folder = _source(uri), Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Save a model first: gl.save_adapter(model, folder)."
        )
    files, left_out = _choose(folder)
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise ValueError(
            f"The folder {folder} holds no weights (*{', *'.join(_WEIGHTS)}). Found: {[*files] or 'none'}"
        )
    for name in files:
        if (
            not name.endswith(_WEIGHTS)
            and hide(text := (folder / name).read_text("latin-1")) != text
        ):
            raise ValueError(
                f"{name} holds a token or key that this machine uses. Remove it, and run this again."
            )
    readme = folder / "README.md"
    if not card and not readme.is_file():
        raise ValueError(
            f"{folder} has no model card, the file README.md. Pass its text: card=gl.model_card(model)."
        )
    if card and readme.is_file() and readme.read_bytes() != card.encode():
        raise ValueError(
            f"{readme} is another card than `card`, and is not replaced. Delete it, or pass no card."
        )
    if card:
        files = dict(sorted({**files, "README.md": len(card.encode())}.items()))
    tiny, url = _is_tiny(folder), "/".join([source.page, *source.handle.split("/")[2:]])
    result = Upload(uri, files, left_out, _APACHE if tiny else _GEMMA, url, not dry_run)
    if dry_run:
        return result

    _check_credentials(source)
    if card and not readme.is_file():
        part = readme.with_suffix(".part")
        part.write_bytes(card.encode())
        part.replace(readme)
    try:
        with timeouts(read=300):
            _send(folder, source, result, "Apache 2.0" if tiny else None)
        return result
    except Exception as error:
        problem = _explain(error, source)
    raise problem  # here, not above: the client's error would stay with it, and may hold a header


def _source(uri: str) -> Source:
    if not re.fullmatch(_ADDRESS, str(uri)):
        forms = (
            '"kaggle://OWNER/MODEL/FRAMEWORK/VARIATION", without a version, or "hf://OWNER/NAME"'
        )
        raise ValueError(f"An address is {forms}. Received: {uri!r}")
    source = Source(uri)
    if (
        source.site == "kaggle"
    ):  # the clients ask this, too, but late: Kaggle's when all has been sent
        kagglehub.handle.parse_model_handle(source.handle).framework_enum()
    else:
        validate_repo_id(source.handle)
    return source


def _choose(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The bytes of each file to send, and what else is there: a file, or a folder of which nothing is sent."""
    files, left_out = {}, set()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name, parts = file.relative_to(folder).as_posix(), file.relative_to(folder).parts
        never = file.is_symlink() or any(re.fullmatch(_NEVER, part) for part in parts)
        if re.fullmatch(_SENT, name) and not never:
            files[name] = file.stat().st_size
        else:
            left_out.add(name if len(parts) == 1 or parts[0] == "assets" else f"{parts[0]}/")
    return files, tuple(sorted(left_out))


def _is_tiny(folder: Path) -> bool:
    """Whether a folder's model, or its base, is the small model of this package."""
    about = {}
    for name in ("config.json", "adapter_config.json", "gemma_lora.json", "adapter.json"):
        try:
            about |= (
                json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
            )
            base = Path(about.get("base_model_name_or_path") or about.get("base") or "")
            inner = about.get("config", {}).get("vocabulary_size")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / name} cannot be read: {error}. Save or export it again."
            ) from error
    if base.is_absolute():
        raise ValueError(
            f"The base is said to be {base}, a folder of this machine. Give a name when you export it."
        )
    return (
        TINY_VOCABULARY in (inner, about.get("vocab_size"), about.get("vocabulary_size"))
        or base.name == TINY
    )


def _check_credentials(source: Source) -> None:
    share_colab_secrets()
    if source.site == "kaggle":
        found, way_out = used_place(), THREE_WAYS
    else:
        check_hub_token()
        found = huggingface_hub.get_token()
        way_out = "Create one with the role write on huggingface.co/settings/tokens, and call huggingface_hub.login()."
    if not found:
        raise AccessError(
            "credentials", f"To send to {source.host} takes a token, and none was found. {way_out}"
        )


def _send(folder: Path, source: Source, result: Upload, license_name: str | None) -> None:
    if (
        source.site == "kaggle"
    ):  # it makes a new model private itself; its list of licences has none for Gemma
        patterns = [escape(name) for name in result.left_out]
        kagglehub.model_upload(source.handle, str(folder), license_name, ignore_patterns=patterns)
    else:
        hub, patterns = huggingface_hub.HfApi(), [escape(name) for name in result.files]
        hub.create_repo(source.handle, private=True, exist_ok=True)
        hub.upload_folder(repo_id=source.handle, folder_path=folder, allow_patterns=patterns)


def _explain(error: Exception, source: Source) -> AccessError:
    """Say what an error of the clients means: as of a download where that is the same, else in words of its own."""
    owner, host = source.handle.split("/")[0], source.host
    try:
        problem = explain(error, source)
    except Exception:  # it raises what it does not know
        problem = AccessError("unknown", "")
    if isinstance(
        error, requests.ConnectionError | requests.Timeout
    ):  # also after an answer such as "no such model"
        problem = AccessError("network", "")
    if isinstance(error, json.JSONDecodeError):
        problem = AccessError(
            "server",
            f"{host} answers with a page. Is there a login to this network? Run this again.",
        )
    said = re.sub(
        r"\?\S+", "", " ".join(hide(str(error)).split())
    )  # an address without its signature
    sentences = {
        "consent": f"{host} does not let this machine's token write to {owner!r} (403). The owner is your own user "
        "name there, or an organisation in which you may write; on the Hub the token needs the role write.",
        "network": f"{host} cannot be reached, or stopped answering before all had arrived. Check the network (also a "
        "proxy, a VPN, HF_HUB_OFFLINE), and run this again.",
        "unknown": f"{host} did not take {source.handle!r}: {said[:300] or type(error).__name__}",
    }
    reason = {"damaged": "network", "disk": "unknown"}.get(problem.reason, problem.reason)
    return AccessError(
        reason, sentences.get(reason) or str(problem).partition(" Without any of this")[0]
    )
