"""Save a model's adapter as one file, and load an adapter from any format we know.

Our own format is safetensors by layer path, with a description of the adapter in the
file's metadata: one file, so nothing has to be kept consistent. `load_adapter` also
reads PEFT's folders (`peft.py` knows how), `.lora.h5` files of stock Keras, and the two
files that gemma_lora wrote before. Whatever it reads, it checks all of it before it
touches the model.
"""

import hashlib
import json
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np
from keras_hub.models import CausalLM
from safetensors import safe_open
from safetensors.numpy import load, save

from gemma_lora.formats import peft
from gemma_lora.formats.card import base_name, describe, model_card, write_card, write_file
from gemma_lora.lora import (
    LoraSummary,
    Targets,
    adopt,
    check_not_empty,
    detach,
    enable_lora,
    fingerprints,
    kernel_shape,
    linear_layers,
    lora_layers,
    resolve_targets,
    target_names,
)
from gemma_lora.models import Run, one_at_a_time, state_of, template_of
from gemma_lora.options import a_path, with_options
from gemma_lora.templates import Template, get_template

FORMAT = 2
ADAPTER_FILE = "adapter.safetensors"
_METADATA_KEY = "gemma_lora"
# Format 1 kept its description in a file of its own. A save that was cut off could
# leave the former tensors under the second name.
_FORMAT_1_DESCRIPTION = "adapter.json"
_FORMAT_1_OLD_TENSORS = "adapter.safetensors.old"
# A path to one of these means the folder that it is in.
_FILES_OF_ADAPTERS = (
    ADAPTER_FILE,
    _FORMAT_1_DESCRIPTION,
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# What a description holds whatever format it was read from.
_NEEDED = ("rank", "alpha", "targets", "seed", "run")
# Mismatches that an error lists before it only counts the others.
_LISTED = 6


@with_options
def save_adapter(model: CausalLM, folder: str | Path) -> Path:
    """Save a model's adapter as one file, with a model card beside it.

    In `adapter.safetensors`, tensors are named "<layer path>/a" and "/b"; they are
    float32, in Keras's shapes. The file's metadata holds a description in JSON: the
    base's name and fingerprints, rank, alpha, targets, seed, the record of the training
    run, versions, and a checksum over everything. Anybody can read it without gl:

    >>> import json, safetensors, tempfile
    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = gl.enable_lora(model, rank=4)
    >>> folder = gl.save_adapter(model, tempfile.mkdtemp())
    >>> with safetensors.safe_open(folder / "adapter.safetensors", "numpy") as file:
    ...     description = json.loads(file.metadata()["gemma_lora"])
    >>> description["base"], description["rank"], description["targets"]
    ('tiny_gemma_en', 4, ['query', 'value'])

    Args:
        model: A model with adapters.
        folder: Where to save; it is created if needed. An adapter in it is replaced in
            one step: a process that is killed meanwhile leaves the old or the new one.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no adapters.
    """
    lora = adopt(model)
    if lora is None:
        raise ValueError(
            "The model has no adapters to save. Call gl.enable_lora(model) and gl.fit() first."
        )
    check_not_empty(model)
    folder = a_path("folder", folder)
    description = {
        "format": FORMAT,
        **describe(model),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": [*lora.targets],
        "seed": lora.seed,
        "versions": {name: version(name) for name in ("gemma-lora", "keras", "keras-hub", "jax")},
    }
    tensors = {
        name: np.asarray(variable.value, "float32") for name, variable in _variables(model).items()
    }
    description["checksum"] = _checksum(description, tensors)
    content = save(tensors, metadata={_METADATA_KEY: json.dumps(description)})
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / ADAPTER_FILE, content)
    # Only now, and not needed: the reader prefers the description in the file of
    # tensors.
    for name in (_FORMAT_1_DESCRIPTION, _FORMAT_1_OLD_TENSORS):
        (folder / name).unlink(missing_ok=True)
    write_card(folder, model_card(model, kind="adapter"))
    return folder


@with_options
@one_at_a_time
def load_adapter(
    model: CausalLM, source: str | Path, *, targets: Targets | None = None, force: bool = False
) -> LoraSummary:
    """Put a saved adapter on a model: LoRA on the right layers, and its exact weights.

    An adapter that the model has is replaced. If the new one has the same rank, alpha
    and targets, nothing is compiled again.

    Args:
        model: The adapter's base.
        source: A folder from `gl.save_adapter`, a folder in PEFT's format, a file in
            one of these, or a `.lora.h5` file of stock Keras.
        targets: The layers that the adapter was made for, as in `gl.enable_lora`. None
            takes what the adapter says. A `.lora.h5` file numbers its layers and names
            none: there, None means query and value.
        force: Whether to accept a base whose weights differ from those that the adapter
            was made for. Its shapes must still be the same.

    Returns:
        What `gl.enable_lora` returns.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter was cut or altered, or belongs to another base; the
            text says what differs. The model stays as it was.
    """
    a_path("source", source)
    description, tensors = _read(model, source)
    if Path(source).suffix == ".h5":
        targets = targets or "query_value"
    description["targets"] = _checked_targets(model, source, description, targets)
    _check_numbers(source, description, tensors)
    _check_fits(model, source, description, tensors)
    _check_base(model, source, description, force)

    # Nothing has changed so far, and nothing is left to go wrong.
    state = state_of(model)
    old = state.lora
    options = {name: description[name] for name in ("rank", "alpha", "targets")}
    if old and options == {"rank": old.rank, "alpha": old.alpha, "targets": old.targets}:
        summary = enable_lora(model, **options)
    else:
        detach(model)
        summary = enable_lora(model, **options, seed=description["seed"])
    if description["seed"] is not None:
        summary = replace(summary, seed=description["seed"])
        state.lora = summary
    for name, variable in _variables(model).items():
        variable.assign(tensors[name])
    state.run = description["run"]
    if state.run is None and not (Path(source) / ADAPTER_FILE).is_file():
        print(
            f"{source} does not say which template it was trained with. The model is asked with "
            f"{get_template(template_of(model)).name!r}; template=... takes another."
        )
    return summary


class DescribedBase(NamedTuple):
    """What a folder says of the model that it is, or that it was made from.

    Attributes:
        name: The base's name, or "". PEFT's config may give a folder's path.
        vocabulary_size: The number of tokens, or None if no file says it.
    """

    name: str
    vocabulary_size: int | None


def described_base(folder: Path) -> DescribedBase:
    """Read which base a folder of any of our formats belongs to; no model is needed.

    An adapter of ours, one in PEFT's format, a KerasHub preset and a model for
    Transformers all say it, each in a file of its own.

    Raises:
        ValueError: If one of these files cannot be read.
    """
    name = ""
    size = None
    # The first that says it wins: PEFT's own before our note beside it, as PEFT will
    # look for that base; an adapter's newer description before one of format 1.
    for file_name in (
        "config.json",
        "adapter_config.json",
        peft.DESCRIPTION_FILE,
        ADAPTER_FILE,
        _FORMAT_1_DESCRIPTION,
    ):
        path = folder / file_name
        if not path.is_file():
            continue
        try:
            text = embedded_text(path) if file_name == ADAPTER_FILE else path.read_text("utf-8")
            said = {} if text is None else json.loads(text)
            # A KerasHub preset keeps its numbers one level further in.
            numbers = said.get("config", said)
            name = name or said.get("base_model_name_or_path") or said.get("base") or ""
            size = size or numbers.get("vocabulary_size") or numbers.get("vocab_size")
            if not isinstance(name, str):
                raise TypeError(f"the base is not a name, but {name!r}")
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}. Save or export it again.") from error
    return DescribedBase(name, size)


def _read(model, source: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read an adapter of any format.

    Returns:
        A description with at least rank, alpha, targets (a tuple of names), seed and
        run; and float32 tensors by "<layer path>/a" and "/b".
    """
    if "://" in str(source):
        raise FileNotFoundError(
            f"{source} is an address. Download it, and pass the folder that it is in then."
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.name in _FILES_OF_ADAPTERS:
        # The folder is meant, since an adapter may have several files.
        path = path.parent
    own = (path / ADAPTER_FILE).is_file() or (path / _FORMAT_1_DESCRIPTION).is_file()
    try:
        if path.suffix == ".h5":
            description, tensors = _read_keras(model, path)
        elif own:
            description, tensors = _read_own(path)
        elif (path / "adapter_config.json").is_file():
            description, tensors = peft.read(model, path)
        else:
            raise FileNotFoundError(_why_no_adapter(path))
        missing = [name for name in _NEEDED if name not in description]
        if missing:
            raise ValueError(f"its description lacks {', '.join(missing)}")
        description["targets"] = tuple(map(str, description["targets"]))
        run = description["run"]
        if run is not None:
            description["run"] = Run(run | {"template": Template(**run["template"])})
        tensors = {name: np.asarray(tensor, "float32") for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"The adapter in {path} cannot be read: {error}. If a file is damaged, copy or "
            "save it again."
        ) from error
    return description, tensors


def _why_no_adapter(path: Path) -> str:
    """Say what a path without an adapter is, and which call takes it."""
    if path.is_file():
        return f"{path} is no adapter. Pass the folder that gl.save_adapter wrote."
    if (path / "config.json").is_file():
        return f"The folder {path} holds a model, not an adapter. Load it by gl.load(folder)."
    return f"The folder {path} holds no adapter: it has no {ADAPTER_FILE}."


def embedded_text(path: Path) -> str | None:
    """Return the description in an adapter's file, as JSON; None without one.

    Only the head of the file is read.
    """
    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get(_METADATA_KEY)


def _read_own(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read what `save_adapter` wrote, now or in format 1.

    The file of tensors decides: a description in it is the newer one. A save over
    format 1 that is cut off can leave the old `adapter.json` beside the new file.
    """
    path = folder / ADAPTER_FILE
    text = embedded_text(path) if path.is_file() else None
    if text is None:
        return _read_format_1(folder)
    description = json.loads(text)
    _check_format(description, FORMAT)
    checksum = description.pop("checksum")
    tensors = load(path.read_bytes())
    if _checksum(description, tensors) != checksum:
        raise ValueError("it was cut or altered after it was saved (its checksum differs)")
    return description, tensors


def _read_format_1(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read what gemma_lora wrote before: `adapter.json`, and tensors beside it."""
    if not (folder / _FORMAT_1_DESCRIPTION).is_file():
        raise ValueError(f"{ADAPTER_FILE} holds no description of gemma_lora's")
    description = json.loads((folder / _FORMAT_1_DESCRIPTION).read_text(encoding="utf-8"))
    _check_format(description, 1)
    checksum = description.pop("checksum")
    text = json.dumps(description, sort_keys=True).encode()
    for name in (ADAPTER_FILE, _FORMAT_1_OLD_TENSORS):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            if hashlib.sha256(text + content).hexdigest() == checksum:
                return description, load(content)
    raise ValueError("it was cut or altered after it was saved (its checksum differs)")


def _check_format(description: dict, expected: int) -> None:
    if description["format"] != expected:
        raise ValueError(
            f"its format is {description['format']!r}, and this version of gemma_lora reads "
            f"1 and {FORMAT}. Update gemma_lora"
        )


def _read_keras(model, path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a `.lora.h5` file of stock Keras, which numbers the layers with weights.

    It says neither the layers' names nor alpha, which is the rank there.
    """
    paths = {id(layer): name for name, layer in linear_layers(model).items()}
    # private: Keras numbers layers in the order of `_flatten_layers`
    layers = model.backbone._flatten_layers(include_self=False)
    with_weights = [layer for layer in layers if layer.weights]
    numbered = {
        str(number): paths[id(layer)]
        for number, layer in enumerate(with_weights)
        if id(layer) in paths
    }
    tensors = {}
    # private: the names inside Keras's file
    with h5py.File(path) as file:
        if "lora" not in file:
            raise ValueError(
                "it holds a whole model, its adapter merged, as Keras's ModelCheckpoint saves it. "
                "model = gl.load(base), without adapters, and model.load_weights(file) read it"
            )
        saved = file["lora"]
        rank = int(saved["vars"]["rank"][()])
        for number in saved:
            if number == "vars":
                continue
            # A layer that takes no adapter here keeps its number, and is refused later.
            name = numbered.get(number, f"layer {number}")
            for part in "ab":
                tensors[f"{name}/{part}"] = saved[number]["vars"][f"lora_kernel_{part}"][()]
    targets = sorted({name.split("/")[-2] for name in tensors if name.count("/") > 1})
    description = {
        "rank": rank,
        "alpha": float(rank),
        "targets": targets,
        "seed": None,
        "run": None,
    }
    return description, tensors


def _checked_targets(model, source, description: dict, targets) -> tuple[str, ...]:
    """Return an adapter's targets in the model's own order.

    Raises:
        ValueError: If the model has no such layers, or others were asked for.
    """
    present = target_names(model)
    said = description["targets"]
    if not said or {*said} - {*present}:
        raise ValueError(f"The adapter in {source} is for layers {said}; this model has {present}.")
    names = resolve_targets(targets or said, present)
    if {*said} != {*names}:
        raise ValueError(
            f"{source} is for {said}, not for {names}: pass the targets it was made with."
        )
    return names


def _check_numbers(source, description: dict, tensors: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless rank, alpha, seed and all tensors are usable numbers."""
    rank = description["rank"]
    alpha = description["alpha"]
    seed = description["seed"]
    rank_is_usable = type(rank) is int and rank >= 1
    alpha_is_usable = isinstance(alpha, float) and 0 < alpha < math.inf
    if not rank_is_usable or not alpha_is_usable or not (seed is None or type(seed) is int):
        raise ValueError(
            f"The adapter in {source} has no usable rank, alpha and seed: {rank!r}, {alpha!r}, "
            f"{seed!r}."
        )
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"The adapter in {source} holds values that are no numbers, in {len(broken)} of its "
            f"{len(tensors)} tensors: {_listed(broken)}"
        )


def _check_fits(model, source, description: dict, tensors: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless names and shapes of the tensors are what we need."""
    rank = description["rank"]
    expected = {}
    for path, layer in linear_layers(model).items():
        if layer.name in description["targets"]:
            shape = kernel_shape(layer)
            expected[f"{path}/a"] = (*shape[:-1], rank)
            expected[f"{path}/b"] = (rank, shape[-1])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    misfits = []
    for name in sorted({*expected, *shapes}):
        if expected.get(name) != shapes.get(name):
            wanted = expected.get(name, "has no such place")
            misfits.append(
                f"{name!r:.80}: the model {wanted}, the file {shapes.get(name, 'has none')}"
            )
    if not misfits:
        return
    base = description.get("base")
    way_out = f"\nIt was made for {base!r}: gl.load({base!r})." if base else ""
    raise ValueError(
        f"The adapter in {source} does not fit this model, {base_name(model)!r}. "
        f"{len(misfits)} tensors differ: {_listed(misfits)}{way_out}"
    )


def _check_base(model, source, description: dict, force: bool) -> None:
    """Raise ValueError unless the model is the base that the adapter was made for.

    The fingerprints say it, where the adapter has them. `force` accepts other weights
    of the same architecture, vocabulary and shapes.
    """
    merged_here = state_of(model).merged is not None
    merged_there = bool(description.get("merged"))
    differing = [
        name
        for name, value in fingerprints(model).items()
        if name in description and description[name] != value
    ]
    # Without fingerprints we cannot know whether an adapter was made after or before a
    # merge.
    unknown = merged_here and "weights" not in description
    if not differing and (force or not unknown):
        return
    if force and differing == ["weights"]:
        return
    if merged_here and not merged_there:
        raise ValueError(
            f"An adapter was merged into this model, and the one in {source} is for a base "
            "without it. gl.remove_adapter(model) undoes a merge(keep=True); after any other "
            "merge, load the base again with gl.load(...)."
        )
    base = description.get("base")
    made_for = repr(base)
    way_out = f"Load its base, gl.load({base!r})."
    if merged_there:
        made_for += ", with another adapter merged into it"
        way_out = "Load that merged model."
    if differing == ["weights"]:
        way_out += (
            " A base that is quantized, merged or trained otherwise has other weights: "
            "force=True accepts it."
        )
    raise ValueError(
        f"The adapter in {source} was made for {made_for}; this model, {base_name(model)!r}, has "
        f"other {' and '.join(differing)}. {way_out}"
    )


def _listed(lines: list[str]) -> str:
    """Join lines of an error below each other; beyond a few, count the others."""
    shown = [f"\n  {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"\n  and {len(lines) - _LISTED} more")
    return "".join(shown)


def _checksum(description: dict, tensors: dict[str, np.ndarray]) -> str:
    """Return a digest of a description without its checksum, and of all tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tensor.shape)).encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _variables(model) -> dict[str, keras.Variable]:
    """Map the names that tensors have in a file to the adapters' weights."""
    variables = {}
    for path, layer in lora_layers(model).items():
        variables[f"{path}/a"] = layer.lora_kernel_a
        variables[f"{path}/b"] = layer.lora_kernel_b
    return variables
