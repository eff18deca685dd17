"""An adapter as a file: safetensors by layer path, and beside it what it belongs to."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load, save

from gemma_lora.formats import card, peft
from gemma_lora.lora import (
    LoraSummary,
    detach,
    enable_lora,
    fingerprints,
    kernel_shape,
    linear_layers,
    lora_layers,
    resolve_targets,
    target_names,
)
from gemma_lora.models import state_of
from gemma_lora.templates import Template

FORMAT = 1
_OLD = ".old"


def save_adapter(model, folder: str | Path) -> Path:
    """Save a model's adapters as `adapter.safetensors` and `adapter.json`, with a page that says how to load them.

    The tensors are named "<layer path>/a" and "/b", float32, in Keras's shapes; the JSON holds the base's name and
    fingerprints, rank, alpha, targets, seed, the record of the training run, versions, and a checksum of it all.

    Args:
        model: A model with adapters.
        folder: Made if it is not there, and returned; an adapter in it is replaced.
    """
    state = state_of(model)
    if state.lora is None:
        raise ValueError(
            "The model has no adapters to save. Call gl.enable_lora(model) and gl.fit() first."
        )
    folder = Path(folder).expanduser()
    tensors = save(
        {
            name: np.asarray(weight.value, dtype="float32")
            for name, weight in _tensors(model).items()
        }
    )
    about = {"format": FORMAT, **card.about(model)}
    about |= {"rank": state.lora.rank, "alpha": state.lora.alpha, "targets": [*state.lora.targets]}
    about["seed"] = state.lora.seed
    about["versions"] = {
        name: version(name) for name in ("gemma-lora", "keras", "keras-hub", "jax")
    }
    text = json.dumps(about | {"checksum": _checksum(about, tensors)}, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    _replace({folder / "adapter.safetensors": tensors, folder / "adapter.json": text.encode()})
    card.write_card(folder, card.model_card(model, kind="adapter"))
    return folder


def load_adapter(model, source: str | Path, *, targets=None, force: bool = False) -> LoraSummary:
    """Put a saved adapter on a model: LoRA on the right layers, and the weights, exactly.

    An adapter that the model has is replaced; with the same rank, alpha and targets nothing is compiled anew.

    Args:
        model: The adapter's base.
        source: A folder that `save_adapter` wrote; a folder in PEFT's format; or a `.lora.h5` file of stock Keras.
        targets: The layers it was made for. A `.lora.h5` file numbers layers, so there it is asked for what they should
            be: None means query and value.
        force: Take a base of the right shapes whose weights differ from those that the adapter was made for.

    Returns:
        What `enable_lora` returns.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It was cut or altered, or belongs to another base: the text says what differs. The model is left as
            it was.
    """
    if "://" in str(source):
        raise FileNotFoundError(
            f"{source} is an address: download it, and pass the folder that it is in then."
        )
    state, source = state_of(model), Path(source).expanduser()
    if source.suffix == ".h5":
        about, tensors = _read(source, lambda: _read_keras(model, source))
        targets = targets or "query_value"
    elif (source / "adapter_config.json").is_file() and not (source / "adapter.json").is_file():
        about, tensors = _read(source, lambda: peft.read(model, source))
    else:
        about, tensors = _read(source, lambda: _read_own(source))
    _check_targets(model, source, about, targets)
    _check_fits(model, source, about, tensors)
    _check_base(model, source, about, force)
    lora = state.lora
    if lora and (lora.rank, lora.alpha, lora.targets) != (
        about["rank"],
        about["alpha"],
        about["targets"],
    ):
        lora = None
    if lora is None:
        detach(model)
    options = {name: about[name] for name in ("rank", "alpha", "targets")}
    summary = enable_lora(model, **options, seed=None if lora else about["seed"])
    if about["seed"] is not None:
        state.lora = summary = replace(summary, seed=about["seed"])
    for name, weight in _tensors(model).items():
        weight.assign(tensors[name])
    state.run = about["run"]
    return summary


def _read(source: Path, read: Callable) -> tuple[dict, dict]:
    """What there is to read, with rank, alpha, targets, seed and run; or a sentence why not."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}.")
    try:
        about, tensors = read()
        about["targets"] = tuple(map(str, about["targets"]))
        if about["run"] is not None:
            about["run"] = about["run"] | {"template": Template(**about["run"]["template"])}
        return about, {name: np.asarray(tensor, "float32") for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"The adapter in {source} cannot be read: {error}. Copy or save it again."
        ) from error


def _read_own(folder: Path) -> tuple[dict, dict]:
    old = [folder / f"adapter.safetensors{_OLD}"] * (
        folder / f"adapter.safetensors{_OLD}"
    ).is_file()
    for name in ("adapter.json", "adapter.safetensors"):
        if not (folder / name).is_file() and not (old and name == "adapter.safetensors"):
            raise FileNotFoundError(f"The folder {folder} holds no adapter: it has no {name}.")
    about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    if about["format"] != FORMAT:
        raise ValueError(
            f"its format is {about['format']!r}, and this version of gemma_lora reads {FORMAT}"
        )
    checksum = about.pop("checksum")
    for path in (
        folder / "adapter.safetensors",
        *old,
    ):  # the old ones: of a process that ended while it replaced them
        if path.is_file() and _checksum(about, tensors := path.read_bytes()) == checksum:
            return about, load(tensors)
    raise ValueError("it was cut or altered after it was saved (its checksum differs)")


def _read_keras(model, path: Path) -> tuple[dict, dict]:
    """Keras numbers the layers with weights, and says neither their names nor alpha, which is the rank there."""
    paths = {id(layer): path for path, layer in linear_layers(model).items()}
    numbered = [
        layer for layer in model.backbone._flatten_layers(include_self=False) if layer.weights
    ]
    numbered = {str(i): paths[id(layer)] for i, layer in enumerate(numbered) if id(layer) in paths}
    with h5py.File(path) as file:
        lora = file["lora"]
        rank, tensors = int(lora["vars"]["rank"][()]), {}
        for number in lora:
            if number != "vars":
                layer = numbered.get(number, f"layer {number}")
                for part in "ab":
                    tensors[f"{layer}/{part}"] = lora[number]["vars"][f"lora_kernel_{part}"][()]
    found = sorted({name.split("/")[-2] for name in tensors if "/" in name[:-2]})
    return {
        "rank": rank,
        "alpha": float(rank),
        "targets": found,
        "seed": None,
        "run": None,
    }, tensors


def _check_targets(model, source: Path, about: dict, targets) -> None:
    """The layers that it is for are of this model, and those that were asked for; then in the model's own order."""
    present = target_names(model)
    if not about["targets"] or {*about["targets"]} - {*present}:
        raise ValueError(
            f"The adapter in {source} is for layers {about['targets']}; this model has {present}."
        )
    names = resolve_targets(targets or about["targets"], present)
    if set(about["targets"]) != {*names}:
        raise ValueError(
            f"{source} is for {about['targets']}, not for {names}: pass the targets it was made with."
        )
    about["targets"] = names


def _check_fits(model, source: Path, about: dict, tensors: dict) -> None:
    """Every tensor where this model has a place for it, of its shape, with numbers in it."""
    rank, alpha, expected = about["rank"], about["alpha"], {}
    if (
        type(rank) is not int
        or rank < 1
        or not isinstance(alpha, float)
        or not 0 < alpha < math.inf
    ):
        raise ValueError(
            f"The adapter in {source} has no usable rank and alpha: {rank!r}, {alpha!r}."
        )
    for path, layer in linear_layers(model).items():
        if layer.name in about["targets"]:
            shape = kernel_shape(layer)
            expected[f"{path}/a"], expected[f"{path}/b"] = (*shape[:-1], rank), (rank, shape[-1])
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := [
        name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)
    ]:
        base = about.get("base")
        raise ValueError(
            f"The adapter in {source} does not fit this model, {card.base_name(model)!r}. For instance {wrong[0]!r}: "
            f"the model takes shape {expected.get(wrong[0])}, the file has {found.get(wrong[0])}."
            + (f" It was made for {base!r}: gl.load({base!r})." if base else "")
        )
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(
            f"The adapter in {source} holds values that are no numbers, for instance in {broken[0]!r}."
        )


def _check_base(model, source: Path, about: dict, force: bool) -> None:
    """The base that it was made for, where it says which: only `force` takes other weights."""
    merged, base = bool(state_of(model).merges), about.get("base")
    differs = [
        name for name, own in fingerprints(model).items() if name in about and about[name] != own
    ]
    if (differs == [] and ("weights" in about or not merged)) or (
        force and differs in ([], ["weights"])
    ):
        return
    if merged and not about.get("merged"):
        raise ValueError(
            f"An adapter was merged into this model, and the one in {source} is for a base without it. "
            "gl.remove_adapter(model) undoes a merge(keep=True); else load the base again, gl.load(...)."
        )
    text = f"The adapter in {source} was made for {base!r}"
    text += ", with another adapter merged into it" if about.get("merged") else ""
    text += f"; this model, {card.base_name(model)!r}, has other {' and '.join(differs)}. "
    text += (
        "Load that merged model." if about.get("merged") else f"Load its base, gl.load({base!r})."
    )
    if differs == ["weights"]:
        text += " A quantized, merged or otherwise trained base has other weights: force=True takes it all the same."
    raise ValueError(text)


def _checksum(about: dict, tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + tensors).hexdigest()


def _tensors(model) -> dict:
    """The adapters' weights by the name that they have in a file."""
    layers = lora_layers(model).items()
    return {
        f"{path}/{part}": getattr(layer, f"lora_kernel_{part}")
        for path, layer in layers
        for part in "ab"
    }


def _replace(contents: dict[Path, bytes]) -> None:
    """Write beside the files, then move; the tensors, first of them, are kept until the JSON is there as well."""
    parts = {path: path.with_name(f"{path.name}.part") for path in contents}
    tensors, about = contents
    old = tensors.with_name(tensors.name + _OLD)
    try:
        for path, part in parts.items():
            with part.open("wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        if tensors.is_file() and about.is_file() and not old.is_file():
            tensors.replace(old)
        for path, part in parts.items():
            part.replace(path)
        old.unlink(missing_ok=True)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
