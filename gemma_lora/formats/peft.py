"""Write an adapter in the format of PEFT, and read one.

Both libraries learn an update of a frozen kernel as a product of two thin matrices.
They differ where a layer has heads. PEFT has one product for all heads of a module,

    update = B A        B: (heads * head size, rank)        A: (rank, hidden)

and KerasHub has, for queries, keys and values, a factor A for each head and one B for
all,

    update[h] = A[h] B  A: (heads, hidden, rank)            B: (rank, head size)

*Out*: KerasHub's factors are PEFT's of rank `heads * rank`, exactly: the heads' A below
each other, and B once for each head on the diagonal of a block matrix (`to_peft`).
Factors of zeros bring every module to the same rank, because not every reader knows
`rank_pattern`: llama.cpp's converter has one alpha for all.

*Back*: any update of PEFT's is one of KerasHub's, of a rank of at most the head size. A
singular value decomposition finds the smallest one (`_to_keras`). An adapter that went
out comes back at its own rank, or at a lower one if that suffices.

Plain LoRA is read: `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora`.
Everything else is refused.
"""

import json
import re
from pathlib import Path

import numpy as np
from keras_hub.models import CausalLM
from safetensors.numpy import load_file, save

from gemma_lora.formats.card import describe, model_card, write_card, write_file, write_json
from gemma_lora.formats.transformers import Exported, sizes
from gemma_lora.lora import NAMES_IN_TRANSFORMERS as NAMES
from gemma_lora.lora import LoraSummary, adopt, kernel_shape, linear_layers, lora_layers
from gemma_lora.models import NOTE
from gemma_lora.options import a_path, with_options

# The base, and the record of training: PEFT's own files have no place for them.
DESCRIPTION_FILE = NOTE

# "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": block, module and
# factor.
# A Gemma that also sees pictures has its text part under "language_model".
_TENSOR_NAME = re.compile(
    r"(?:(?:base_model|model|language_model)\.)+"
    r"layers\.(\d+)\.([\w.]+)\.lora_([AB])(?:\.\w+)?\.weight"
)

# Options that make an adapter compute something else than B A beside its base. Most
# would also bring tensors that we have no place for; some would not.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# These ways to begin leave the base as it is. Others, such as "pissa", subtract from
# it.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@with_options
def export_peft(model: CausalLM, folder: str | Path, *, base: str | Path = "") -> Exported:
    """Write a model's adapter in the format of PEFT, exactly.

    The folder gets `adapter_model.safetensors`, `adapter_config.json`, a model card,
    and `gemma_lora.json`, which tells `gl.load_adapter` the base and how it was
    trained.

    Args:
        model: A model with adapters.
        folder: Where to write; it is created if needed. An adapter in it is replaced.
        base: The base model in Transformers' format, for PEFT to find: a name on the
            Hub such as "google/gemma-2b", or a folder that `gl.export_transformers`
            wrote without the adapter.

    Returns:
        The files, and how to check them.

    Raises:
        ValueError: If the model has no adapters.
    """
    lora = lora_to_export(model)
    folder = a_path("folder", folder)
    blocks = [block.name for block in model.backbone.transformer_layers]
    factors = {}
    for path, layer in lora_layers(model).items():
        a = np.asarray(layer.lora_kernel_a.value, "float32")
        b = np.asarray(layer.lora_kernel_b.value, "float32")
        block = blocks.index(path.split("/")[0])
        name = f"base_model.model.model.layers.{block}.{NAMES[layer.name]}"
        factors[name] = to_peft(a, b, heads=has_heads(layer))
    rank = max(len(down) for down, _ in factors.values())
    tensors = {}
    for name, (down, up) in factors.items():
        missing = rank - len(down)
        # safetensors writes memory as it lies.
        down = np.ascontiguousarray(np.pad(down, [(0, missing), (0, 0)]))
        up = np.ascontiguousarray(np.pad(up, [(0, 0), (0, missing)]))
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(tensors, metadata={"format": "pt"})
    write_file(folder / "adapter_model.safetensors", weights)
    write_json(folder / "adapter_config.json", _config(lora, rank, base))
    write_json(folder / DESCRIPTION_FILE, describe(model))
    write_card(folder, model_card(model, kind="peft"))
    return Exported(folder, sizes(folder), "To check: peft.PeftModel.from_pretrained(base, folder)")


def lora_to_export(model) -> LoraSummary:
    """Return what a model's adapters are. Raises ValueError if it has none."""
    lora = adopt(model)
    if lora is None:
        raise ValueError(
            "The model has no adapters to export. Call gl.enable_lora(model) and gl.fit() first."
        )
    return lora


def _config(lora: LoraSummary, rank: int, base: str | Path) -> dict:
    """Return PEFT's config for factors of this rank, whatever LoRA's own is."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        # PEFT divides alpha by its own rank; this keeps LoRA's scale, alpha / rank.
        "lora_alpha": lora.alpha * rank / lora.rank,
        "target_modules": [NAMES[name].split(".")[-1] for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def has_heads(layer) -> bool:
    """Return whether a layer has an A for each head: queries, keys and values do."""
    return len(kernel_shape(layer)) == 3 and layer.name != "attention_output"


def to_peft(a: np.ndarray, b: np.ndarray, *, heads: bool) -> tuple[np.ndarray, np.ndarray]:
    """Turn KerasHub's factors into PEFT's A, (rank, inputs), and B, (outputs, rank).

    Two heads of size 2 over 3 inputs, rank 1: PEFT's rank is 2, one for each head.

    >>> a = np.array([[[1], [2], [3]], [[4], [5], [6]]])
    >>> b = np.array([[7, 8]])
    >>> down, up = to_peft(a, b, heads=True)
    >>> print(down)
    [[1 2 3]
     [4 5 6]]
    >>> print(up)
    [[7. 0.]
     [8. 0.]
     [0. 7.]
     [0. 8.]]
    >>> np.array_equal(up @ down, np.concatenate([(a[0] @ b).T, (a[1] @ b).T]))
    True

    Args:
        a: With heads, shape (heads, inputs, rank). Without, (inputs, rank), or for the
            attention's output (heads, head size, rank): there, heads are inputs.
        b: Shape (rank, head size) or (rank, outputs).
        heads: Whether A has a factor for each head.
    """
    if not heads:
        return a.reshape(-1, a.shape[-1]).T, b.T
    # (heads, inputs, rank) to (heads * rank, inputs): row h * rank + r is A[h, :, r].
    down = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
    # The Kronecker product with the identity puts B.T on the diagonal, once for each
    # head: (heads * head size, heads * rank).
    up = np.kron(np.eye(len(a), dtype="float32"), b.T)
    return down, up


def read(model, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read an adapter in PEFT's format as `gl.load_adapter` needs it.

    Returns:
        A description with rank, alpha, targets, seed and run, and what
        `gemma_lora.json` adds of the base; and tensors by "<layer path>/a" and "/b", in
        KerasHub's shapes.

    Raises:
        ValueError: If it is not plain LoRA, or this model has no place for a tensor.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_plain(config)
    layers = linear_layers(model)
    factors = {}
    scales = {}
    for path, parts in _factors_of_peft(model, folder).items():
        scales[path] = _scale(path, parts, config, model)
        # Rows of zeros, as `export_peft` adds them, are no part of the update.
        used = np.flatnonzero(parts["A"].any(axis=1))
        used = used if len(used) else [0]
        factors[path] = _to_keras(
            parts["A"][used],
            parts["B"][:, used],
            kernel_shape(layers[path]),
            heads=has_heads(layers[path]),
        )
    targets = {path.split("/")[-1] for path in factors}
    rank = max(len(b) for _, b in factors.values())
    # We have one alpha for all layers. Where PEFT's scales differ, they go into B
    # instead.
    one_scale = len(set(scales.values())) == 1
    alpha = float(rank * next(iter(scales.values()))) if one_scale else float(rank)

    tensors = {}
    for path, layer in layers.items():
        if layer.name not in targets:
            continue
        # PEFT may leave a module out in some blocks; a zero update stands in for it.
        shape = kernel_shape(layer)
        a, b = factors.get(path, (np.zeros((*shape[:-1], 1)), np.zeros((1, shape[-1]))))
        # Every layer gets the largest rank that one of them needs. Zeros add nothing.
        missing = rank - len(b)
        tensors[f"{path}/a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        tensors[f"{path}/b"] = np.pad(b, [(0, missing), (0, 0)])
        if not one_scale:
            tensors[f"{path}/b"] = tensors[f"{path}/b"] * scales.get(path, 1.0)

    description = {"run": None}
    if (folder / DESCRIPTION_FILE).is_file():
        description |= json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    # Last, so that PEFT's own numbers win over those of the file beside them.
    description |= {
        "rank": rank,
        "alpha": alpha,
        "targets": sorted(targets, key=[*NAMES].index),
        "seed": None,
    }
    return description, tensors


def _check_plain(config: dict) -> None:
    """Raise ValueError unless a config is of plain LoRA: B A, the base unchanged."""
    used = [name for name in _NOT_PLAIN if config.get(name)]
    beginning = config.get("init_lora_weights")
    if beginning not in _BEGINNINGS:
        used.append(f"init_lora_weights={beginning!r}")
    if config.get("peft_type") != "LORA":
        used.append(f"peft_type={config.get('peft_type')!r}")
    if used:
        raise ValueError(
            f"it is not a plain LoRA adapter, it uses {', '.join(used)}. Merge it into its base "
            "with PEFT, and load the merged model"
        )


def _factors_of_peft(model, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read PEFT's tensors, by layer path.

    Returns:
        For each layer, "A" of shape (rank, inputs) and "B" of shape (outputs, rank).

    Raises:
        ValueError: If the model has no place for a tensor, or a layer has one factor
            only.
    """
    places = {}
    for index, block in enumerate(model.backbone.transformer_layers):
        for path, layer in linear_layers(model).items():
            if path.startswith(f"{block.name}/"):
                places[index, NAMES[layer.name]] = path
    factors: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = _TENSOR_NAME.fullmatch(name)
        path = match and places.get((int(match[1]), match[2]))
        if path is None:
            unknown.append(name)
        else:
            factors.setdefault(path, {})[match[3]] = np.asarray(tensor, "float32")
    if unknown:
        shown = ", ".join(f"{name!r:.80}" for name in unknown[:3])
        raise ValueError(
            f"this model has no place for {len(unknown)} of its tensors, such as {shown}"
        )
    if not factors:
        raise ValueError("it holds no tensors")
    halves = [path for path, parts in factors.items() if set(parts) != {"A", "B"}]
    if halves:
        raise ValueError(f"{', '.join(halves)}: only one of the factors A and B is there")
    return factors


def _scale(path: str, parts: dict[str, np.ndarray], config: dict, model) -> float:
    """Return the scale of a module's B A: alpha / rank, or alpha / sqrt(rank).

    Raises:
        ValueError: If its factors do not have the rank that the config gives it.
    """
    block_name, *_, layer_name = path.split("/")
    blocks = [block.name for block in model.backbone.transformer_layers]
    module = f"model.layers.{blocks.index(block_name)}.{NAMES[layer_name]}"
    rank = _for_module(module, config, "rank_pattern", "r")
    alpha = _for_module(module, config, "alpha_pattern", "lora_alpha")
    shapes = parts["A"].shape, parts["B"].shape
    if len(parts["A"]) != rank or shapes[1][1] != rank:
        raise ValueError(f"{path} has factors of shapes {shapes}, not of rank {rank}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _for_module(module: str, config: dict, pattern: str, default: str):
    """Return a module's own value where one of PEFT's patterns fits, else the default.

    A pattern fits a whole name, or the last parts of one.

    >>> config = {"r": 4, "rank_pattern": {"v_proj": 8}}
    >>> _for_module("model.layers.0.self_attn.v_proj", config, "rank_pattern", "r")
    8
    >>> _for_module("model.layers.0.self_attn.q_proj", config, "rank_pattern", "r")
    4
    """
    for name, value in (config.get(pattern) or {}).items():
        name = name.replace("language_model.", "")
        if re.fullmatch(rf"(.*\.)?({name})", module):
            return value
    return config[default]


def _to_keras(
    down: np.ndarray, up: np.ndarray, shape: tuple[int, ...], *, heads: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Turn PEFT's factors into KerasHub's: the way back of `to_peft`.

    The two heads of its example come back at rank 1, up to a factor that A and B share:

    >>> a = np.array([[[1], [2], [3]], [[4], [5], [6]]])
    >>> b = np.array([[7, 8]])
    >>> a2, b2 = _to_keras(*to_peft(a, b, heads=True), (2, 3, 2), heads=True)
    >>> a2.shape, b2.shape, np.allclose(a2 @ b2, a @ b)
    ((2, 3, 1), (1, 2), True)

    Args:
        down: PEFT's A, shape (rank, inputs).
        up: PEFT's B, shape (outputs, rank).
        shape: The shape of the layer's kernel.
        heads: Whether the layer has a factor A for each head.
    """
    *outer, last = shape
    if not heads:
        return down.T.reshape(*outer, -1), up.T
    # Head h of the update is down.T @ parts[h], with parts[h] of (rank, head size). All
    # heads must share one B, so we look for one basis of the rows of all parts: the
    # right singular vectors, (basis, head size), without those whose singular value is
    # rounding.
    parts = up.reshape(outer[0], last, -1).transpose(0, 2, 1)
    _, sizes, basis = np.linalg.svd(parts.reshape(-1, last), full_matrices=False)
    basis = basis[: max(1, int((sizes > 1e-6 * sizes[0]).sum()))]
    # The basis is orthonormal, so parts[h] = (parts[h] @ basis.T) @ basis. The first
    # factor goes into the head's own A: sum over r and d of down[r, i] parts[h, r, d]
    # basis[k, d].
    return np.einsum("ri,hrd,kd->hik", down, parts, basis, optimize=True), basis
