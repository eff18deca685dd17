"""Where a preset comes from, Kaggle or the Hugging Face Hub, and what of it is in the cache."""

import json
from pathlib import Path

import h5py
import huggingface_hub
import kagglehub
import keras_hub
from sentencepiece import SentencePieceProcessor


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
        root = "https://www.kaggle.com/models" if self.site == "kaggle" else "https://huggingface.co"
        self.page = "/".join([root, *self.handle.split("/")[:2]])

    def file(self, name: str) -> Path:
        """Fetch one file, unless it is in the cache."""
        if self.site == "kaggle":
            return Path(kagglehub.model_download(self.handle, name))
        huggingface_hub.HfApi().model_info(self.handle, timeout=10)  # a download's own retries go on for minutes
        return Path(huggingface_hub.hf_hub_download(self.handle, name))

    def folder(self) -> Path:
        """Where the files are kept once they have been fetched; this asks nobody."""
        if self.site == "kaggle":
            return Path(kagglehub.cache.get_cached_path(kagglehub.handle.parse_model_handle(self.handle)))
        known = huggingface_hub.try_to_load_from_cache(self.handle, "config.json")
        return Path(known).parent if isinstance(known, str) else Path("nothing of it is cached")

    def is_complete(self) -> bool:
        """Whether all was fetched before and can be read: weights come last."""
        folder = self.folder()
        try:
            parts = {"model.weights.h5"}
            if (folder / "model.weights.json").is_file():
                names = json.loads((folder / "model.weights.json").read_text())["weight_map"].values()
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
                    removed.append(file.name + (" (a web page: does the network want a login?)" if page else ""))
        return removed


_READERS = {
    ".json": lambda file: json.loads(file.read_text()),
    ".h5": lambda file: h5py.File(file).close(),
    ".spm": lambda file: SentencePieceProcessor(model_file=str(file)),
}
