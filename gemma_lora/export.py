"""Export a model for Transformers, and have Transformers read it back: the same logits, tokens and token ids."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import psutil

from gemma_lora.cards import model_card, write_card
from gemma_lora.sampling import generate
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.tokenizer import tokenizer_of
from gemma_lora.transformers_format import MADE_BY, transformers_config, write_model

_PROMPTS = ("What should I do on a trip to Europe?", "The capital of France is", "1 2 3\n\n\tdéjà vu 🙂 " * 8)


@dataclass(frozen=True, repr=False)
class Exported(ShowsAsTable):
    """The folder of an export, its files in bytes, and what came out when its reader read it."""

    folder: Path
    files: dict[str, int]
    checked: str
    difference: float | None = None  # the largest between two logits, if it was checked

    def table(self) -> Table:
        """A row a file."""
        rows = [{"file": name, "bytes": size} for name, size in self.files.items()]
        return Table(rows, caption=self.checked)


def export_transformers(model, folder: str | Path, *, verify: bool | None = None) -> Exported:
    """Write a model, its adapter merged, as Transformers reads it: weights, config, tokenizer, generation settings.

    The model itself stays as it is. For Gemma 1, Gemma 2 and Gemma 3 text models, any number of key/value heads.

    Args:
        model: With or without adapters; kernels in float32, bfloat16 or float16, which the weights keep.
        folder: Made if it is not there. Files of an export in it are replaced.
        verify: Load the folder with Transformers and compare. None does so where Transformers and torch are installed
            and there is memory for it; what was done, or how to do it, is in the result.

    Raises:
        ValueError: The model is quantized, or of an architecture that Transformers' Gemmas do not have; or the folder
            holds a model that is no export of gl's.
        RuntimeError: Transformers read the folder, and came to other logits, tokens or token ids.
    """
    config = transformers_config(model)
    folder = Path(folder).expanduser()
    if (folder / "config.json").is_file() and MADE_BY not in (folder / "config.json").read_text("utf-8"):
        raise ValueError(f"{folder} holds a model that gl did not export. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, folder, config)
    write_card(folder, model_card(model, kind="transformers"))
    files = sizes(folder)
    checked, difference = _verified(model, folder, verify, sum(files.values()))
    return Exported(folder, files, checked, difference)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _verified(model, folder: Path, verify: bool | None, size: int) -> tuple[str, float | None]:
    """Read the folder with Transformers: a sentence on what came out, and the largest difference of two logits."""
    again = "call export_transformers(model, folder, verify=True)"
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        if verify:
            raise ValueError(f"To verify an export takes {' and '.join(missing)}: pip install {' '.join(missing)}")
        return f"Not checked: {' and '.join(missing)} not installed. Install, and {again}.", None
    single = model.backbone.token_embedding.compute_dtype == "float32"
    needed, free = size * (1.3 if single else 2.6), psutil.virtual_memory().available
    if verify is None and needed > free:
        return f"Not checked: it takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free. Elsewhere, {again}.", None
    if verify is False:
        return f"Not checked, as asked. To check, {again}.", None
    import torch
    import transformers

    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            bars.enable_progress_bar()
    encode, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(model)
    differences, shares = [], []  # of a prompt's logits: the largest; and their root mean square, of the logits' own
    with jax.default_matmul_precision("float32"):  # GPUs and TPUs else round float32 in products
        answers, end = generate(model, list(_PROMPTS), template=None, max_new_tokens=16), tokenizer.id_of("<eos>")
    for prompt, answer in zip(_PROMPTS, answers, strict=True):
        ids = tokenizer.prompt(None, prompt)
        if encode(prompt)["input_ids"] != ids:
            raise RuntimeError(f"Transformers' tokenizer encodes {prompt!r} otherwise, in {folder}.")
        inputs = np.array([ids])
        with jax.default_matmul_precision("float32"):
            ours = np.asarray(model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})).astype("float32")
        with torch.no_grad():
            theirs = peer(torch.tensor(inputs)).logits.numpy()
            new = peer.generate(torch.tensor(inputs), max_new_tokens=16, do_sample=False, eos_token_id=end)
        differences.append(float(np.abs(ours - theirs).max()))
        shares.append(float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(ours**2))))
        new = new[0, len(ids) :].tolist()
        if single and tokenizer.decode(new).strip() != answer:
            raise RuntimeError(f"Transformers answers {prompt!r} otherwise: {tokenizer.decode(new)!r}, not {answer!r}.")
    worst, share = max(differences), max(shares)
    # Half precision alone moved logits by 0.5 to 1.1 %, a wrong config by 9 % and more. NaN is within no limit.
    if not (worst <= 1e-4 if single else share <= 0.05):
        raise RuntimeError(f"Transformers reads {folder}, but logits differ by {worst:.1e} ({share:.1%} of them).")
    what = f"the same greedy tokens and logits within {worst:.1e}"
    if not single:
        what = f"logits within {worst:.1e} ({share:.1%} of them), as half precision rounds"
    return f"Read back with Transformers {transformers.__version__}: {what}.", worst
