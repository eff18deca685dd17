"""An adapter as a file: safetensors by layer path, and beside it what it belongs to."""

import json
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_lora.lora import LoraSummary, enable_lora, linear_layers, lora_layers
from gemma_lora.models import state_of
from gemma_lora.templates import Template

FORMAT = 1


def save_adapter(model, folder: str | Path) -> Path:
    """Save a model's adapters as `adapter.safetensors` and `adapter.json`.

    The tensors are named "<layer path>/a" and "/b", float32, in Keras's shapes; the JSON holds format, base, rank,
    alpha, targets, seed and the record of the training run.

    Args:
        model: A model with adapters.
        folder: Made if it is not there, and returned; an adapter in it is replaced.
    """
    state = state_of(model)
    if state.lora is None:
        raise ValueError("The model has no adapters to save. Call gl.enable_lora(model) and gl.fit() first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(weight.value, dtype="float32") for name, weight in _tensors(model).items()}
    run = None if state.run is None else state.run | {"template": vars(state.run["template"])}
    about = {"format": FORMAT, "base": state.preset, "architecture": type(model.backbone).__name__}
    about |= {name: getattr(state.lora, name) for name in ("rank", "alpha", "targets", "seed")} | {"run": run}
    text = json.dumps(about, indent=2, default=float)  # before anything is written
    _replace(folder / "adapter.safetensors", lambda file: save_file(tensors, file))
    _replace(folder / "adapter.json", lambda file: file.write_text(text, encoding="utf-8"))
    return folder


def load_adapter(model, folder: str | Path) -> LoraSummary:
    """Put a saved adapter on a model: LoRA on the right layers, and the weights, exactly.

    The model is the adapter's base, without adapters or with some of the same rank, alpha and targets; `folder` is what
    `save_adapter` wrote. Returns what `enable_lora` returns.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: A tensor is missing, spare, broken or of another shape; the model is left as it was. Another base
            of the same shapes is a warning.
    """
    state, folder = state_of(model), Path(folder)
    for name in ("adapter.json", "adapter.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"The folder {folder} holds no adapter: it has no {name}.")
    try:
        about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, and this version of gemma_lora reads {FORMAT}")
        tensors = load_file(folder / "adapter.safetensors")
        rank, alpha, targets, run = about["rank"], about["alpha"], about["targets"], about["run"]
        if run is not None:
            run = run | {"template": Template(**run["template"])}
    except Exception as error:
        raise ValueError(f"The adapter in {folder} cannot be read: {error}. Copy or save it again.") from error

    expected = {}
    for path, layer in linear_layers(model).items():
        if layer.name in targets:
            shape = tuple(layer._kernel.shape)
            expected[f"{path}/a"], expected[f"{path}/b"] = (*shape[:-1], rank), (rank, shape[-1])
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]:
        raise ValueError(
            f"The adapter in {folder} was made for {about.get('base')!r} and does not fit this model, "
            f"{state.preset!r}. For instance {wrong[0]!r}: the model takes shape {expected.get(wrong[0])}, the file "
            f"has {found.get(wrong[0])}. Load its base: gl.load({about.get('base')!r})."
        )
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"The adapter in {folder} holds values that are no numbers, for instance in {broken[0]!r}.")

    if about["base"] != state.preset:
        warnings.warn(f"The adapter was made for {about['base']!r}, the model is {state.preset!r}.", stacklevel=2)
    summary = enable_lora(model, rank=rank, targets=targets, alpha=alpha, seed=None if state.lora else about["seed"])
    for name, weight in _tensors(model).items():
        weight.assign(tensors[name])
    state.run = run
    return summary


def _tensors(model) -> dict:
    """The adapters' weights by the name that they have in a file."""
    layers = lora_layers(model).items()
    return {f"{path}/{part}": getattr(layer, f"lora_kernel_{part}") for path, layer in layers for part in "ab"}


def _replace(path: Path, write) -> None:
    """Write beside the file, then move: a failure half way leaves the old file."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
