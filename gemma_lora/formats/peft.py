"""Adapters in the format of PEFT, and back.

PEFT's update of a module is B A, of one rank for all outputs. KerasHub's query has a factor A for each head and one B
for all: as one product its rank is rank * heads, with B on the diagonal of a block matrix. The way back finds the
smallest rank of that kind by a singular value decomposition.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_lora.formats.card import about, model_card, write_card
from gemma_lora.formats.transformers import NAMES, Exported, sizes, write_json
from gemma_lora.lora import kernel_shape, linear_layers, lora_layers
from gemma_lora.models import state_of

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d+)\.([\w.]+)\.lora_([AB])(?:\.\w+)?\.weight"
)
_ABOUT = "gemma_lora.json"  # which base, and the record of training: PEFT has no place for them
_FOREIGN = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
_FOREIGN += ("alora_invocation_tokens", "use_qalora")
_PLAIN = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # other ways to begin change the base, too


def export_peft(model, folder: str | Path, *, base: str | Path = "") -> Exported:
    """Write the adapter alone as PEFT reads it, exactly: `adapter_model.safetensors` and `adapter_config.json`.

    Beside them `gemma_lora.json` says for `load_adapter` what base it is of, and how it was trained.

    Args:
        model: A model with adapters.
        folder: Made if it is not there. An adapter in it is replaced.
        base: The base model in Transformers' format, for PEFT to find: a name on the Hub such as "google/gemma-2b", or
            a folder that `export_transformers` wrote without the adapter.
    """
    state, folder = state_of(model), Path(folder).expanduser()
    if state.lora is None:
        raise ValueError(
            "The model has no adapters to export. Call gl.enable_lora(model) and gl.fit() first."
        )
    rank, alpha, tensors, ranks = state.lora.rank, state.lora.alpha, {}, {}
    blocks = [block.name for block in model.backbone.transformer_layers]
    for path, layer in lora_layers(model).items():
        a, b = (np.asarray(x.value, "float32") for x in (layer.lora_kernel_a, layer.lora_kernel_b))
        if (
            a.ndim == 3 and layer.name != "attention_output"
        ):  # heads: their factors below each other
            ranks[NAMES[layer.name].split(".")[-1]] = rank * len(a)
            a, b = (
                a.transpose(0, 2, 1).reshape(-1, a.shape[1]),
                np.kron(np.eye(len(a), dtype="float32"), b.T),
            )
        else:
            a, b = a.reshape(-1, rank).T, b.T
        name = (
            f"base_model.model.model.layers.{blocks.index(path.split('/')[0])}.{NAMES[layer.name]}"
        )
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {
            name: alpha * r / rank for name, r in ranks.items()
        },  # as PEFT divides by the module's rank
        "target_modules": [NAMES[name].split(".")[-1] for name in state.lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    write_json(folder / _ABOUT, about(model))
    write_card(folder, model_card(model, kind="peft"))
    return Exported(folder, sizes(folder), "To check: peft.PeftModel.from_pretrained(base, folder)")


def read(model, folder: Path) -> tuple[dict, dict]:
    """An adapter of PEFT as `load_adapter` takes it: what it is, and its tensors in Keras's shapes."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    foreign = [name for name in _FOREIGN if config.get(name)]
    foreign += ["init_lora_weights"] * (config.get("init_lora_weights") not in _PLAIN)
    if config.get("peft_type") != "LORA" or foreign:
        raise ValueError(
            f"it is {config.get('peft_type')} with {foreign or 'its own kind of factors'}, no plain LoRA"
        )
    layers = linear_layers(model)
    paths = [
        [path for path in layers if path.startswith(f"{b.name}/")]
        for b in model.backbone.transformer_layers
    ]
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = _TENSOR.fullmatch(name)
        places = paths[int(match[1])] if match and int(match[1]) < len(paths) else ()
        path = next((path for path in places if NAMES[path.split("/")[-1]] == match[2]), None)
        if path is None:
            raise ValueError(f"this model has no place for {name!r}")
        factors.setdefault(path, {})[match[3]] = np.asarray(tensor, "float32")
    found, scales = {}, {}
    for path, parts in factors.items():
        if set(parts) != {"A", "B"}:
            raise ValueError(f"{path} has only one factor of two")
        block = next(i for i, inside in enumerate(paths) if path in inside)
        module, rank = f"model.layers.{block}.{NAMES[path.split('/')[-1]]}", len(parts["A"])
        expected, alpha = (
            _of(module, config, "rank_pattern", "r"),
            _of(module, config, "alpha_pattern", "lora_alpha"),
        )
        shapes = parts["A"].shape, parts["B"].shape
        if rank != expected or shapes[1][1] != rank:
            raise ValueError(f"{path} has factors of shapes {shapes}, not of rank {expected}")
        scales[path] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        found[path] = _in_keras_shapes(layers[path], **parts)
    targets = {path.split("/")[-1] for path in found}
    rank = max(len(b) for _, b in found.values())
    same = len(set(scales.values())) == 1
    tensors = {}
    for path, layer in layers.items():
        if layer.name in targets:
            shape = kernel_shape(layer)
            a, b = found.get(path, (np.zeros((*shape[:-1], 1)), np.zeros((1, shape[-1]))))
            more = rank - len(b)
            tensors[f"{path}/a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
            tensors[f"{path}/b"] = np.pad(b, [(0, more), (0, 0)]) * (
                1.0 if same else scales.get(path, 1.0)
            )
    alpha = float(rank * next(iter(scales.values()))) if same else float(rank)
    found = {"run": None}
    if (folder / _ABOUT).is_file():
        found |= json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    targets = sorted(targets, key=[*NAMES].index)
    return found | {"rank": rank, "alpha": alpha, "targets": targets, "seed": None}, tensors


def _of(module: str, config: dict, pattern: str, key: str):
    """A module's own value by PEFT's patterns of names, or the one for all."""
    own = (
        value
        for name, value in (config.get(pattern) or {}).items()
        if re.fullmatch(rf"(.*\.)?({name})", module)
    )
    return next(own, config[key])


def _in_keras_shapes(layer, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803
    """Factors of PEFT, (rank, inputs) and (outputs, rank), in the shapes of a layer's `lora_kernel_a` and `_b`."""
    *outer, last = kernel_shape(layer)
    if len(outer) < 2 or layer.name == "attention_output":
        return A.T.reshape(*outer, -1), B.T
    heads = outer[0]
    parts = B.reshape(heads, last, -1).transpose(
        0, 2, 1
    )  # (heads, rank, head size), of which one basis is sought
    _, sizes, basis = np.linalg.svd(parts.reshape(-1, last), full_matrices=False)
    basis = basis[: max(1, int((sizes > 1e-6 * sizes[0]).sum()))]
    return np.einsum("ri,hrd,kd->hik", A, parts, basis, optimize=True), basis
