"""Put low-rank adapters on a model's layers, count them, and switch them off and on.

LoRA (Hu et al., 2021, arXiv:2106.09685) keeps a weight W frozen and learns its update as a product of two thin
matrices: W + (alpha / rank) A B. Keras calls A and B `lora_kernel_a` and `lora_kernel_b`.
"""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from gemma_lora import runtime
from gemma_lora.models import Merge, state_of
from gemma_lora.tables import ShowsAsTable, Table

ALL_LINEAR = (
    "query",
    "key",
    "value",
    "attention_output",
    "ffw_gating",
    "ffw_gating_2",
    "ffw_linear",
)
_SAMPLED = 256  # values of each kernel in the fingerprint of a base
TARGETS = {"query_value": ("query", "value"), "all_linear": ALL_LINEAR}


@dataclass(frozen=True, repr=False)
class LoraSummary(ShowsAsTable):
    """What `enable_lora` did, shown as a table: for each target, layers with an adapter, and trainable parameters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    layers: dict[str, int]
    parameters: dict[str, int]
    base_parameters: int

    @property
    def trainable(self) -> int:
        """Trainable parameters in all."""
        return sum(self.parameters.values())

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all, adapters included."""
        return self.trainable / (self.base_parameters + self.trainable)

    def table(self) -> Table:
        """A row for each target, and their sum."""
        rows = [
            {"target": n, "layers": self.layers[n], "parameters": self.parameters[n]}
            for n in self.targets
        ]
        rows.append(
            {"target": "all", "layers": sum(self.layers.values()), "parameters": self.trainable}
        )
        caption = (
            f"LoRA of rank {self.rank}, alpha {self.alpha:g}: {self.trainable:,} trainable parameters beside "
            f"{self.base_parameters:,} frozen ones, {self.share:.3%} of all"
        )
        return Table(rows, caption=caption)


def linear_layers(model) -> dict[str, keras.Layer]:
    """All layers that can take an adapter, by path within the model, such as "decoder_block_0/attention/query"."""
    found = {}
    for block in model.backbone.transformer_layers:
        for layer in block._flatten_layers():
            if layer.name in ALL_LINEAR and hasattr(layer, "enable_lora"):
                inner = "attention/" if layer.name in ALL_LINEAR[:4] else ""
                found[f"{block.name}/{inner}{layer.name}"] = layer
    return found


def target_names(model) -> list[str]:
    """The names of the layers that can take an adapter, in the order of `ALL_LINEAR`."""
    return sorted({layer.name for layer in linear_layers(model).values()}, key=ALL_LINEAR.index)


def lora_layers(model) -> dict[str, keras.Layer]:
    """The layers that have an adapter, by path."""
    return {path: layer for path, layer in linear_layers(model).items() if layer.lora_enabled}


def kernel_shape(layer) -> tuple[int, ...]:
    """The shape of a layer's kernel, also where it is packed into four bits a value."""
    if layer.lora_enabled:
        return (*layer.lora_kernel_a.shape[:-1], layer.lora_kernel_b.shape[-1])
    return jax.eval_shape(lambda: ops.convert_to_tensor(layer.kernel)).shape  # nothing is unpacked


def fingerprints(model) -> dict:
    """What tells a base from others: architecture, shapes of kernels, and a sum over some values of each.

    The values are rounded to bfloat16, so that a base has one fingerprint in float32 and in bfloat16; float16 has one
    of its own.
    """
    layers = linear_layers(model)
    kernels = {"token_embedding": model.backbone.token_embedding._embeddings}
    kernels |= {path: layer._kernel for path, layer in layers.items()}
    shapes = {"token_embedding": (model.backbone.vocabulary_size, model.backbone.hidden_dim)}
    shapes |= {path: kernel_shape(layer) for path, layer in layers.items()}
    sums = {"shapes": hashlib.sha256(repr(shapes).encode()), "weights": hashlib.sha256()}
    for kernel in kernels.values():
        places = np.linspace(0, np.prod(kernel.shape) - 1, _SAMPLED).astype("int64")
        values = np.asarray(kernel.value[np.unravel_index(places, kernel.shape)])
        sums["weights"].update(values.astype(jnp.bfloat16).tobytes())
    found = {
        "architecture": type(model.backbone).__name__,
        "vocabulary_size": model.backbone.vocabulary_size,
    }
    return found | {name: digest.hexdigest()[:16] for name, digest in sums.items()}


def adapter_weights(model) -> list[keras.Variable]:
    """A and B of each layer that has an adapter."""
    return [
        weight
        for layer in lora_layers(model).values()
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b)
    ]


def enable_lora(
    model,
    *,
    rank: int = 4,
    targets="query_value",
    alpha: float | None = None,
    seed: int | None = None,
) -> LoraSummary:
    """Freeze a model and put low-rank adapters on some of its layers.

    B starts at zero, so no output changes. Called again with the same options, it only freezes the base anew;
    with others it is a ValueError.

    Args:
        model: A causal language model from `gl.load`.
        rank: Rank of the update. Keras gives each query head an A of its own, so a query layer's update, flattened to
            a matrix, reaches rank * heads.
        targets: "query_value" (the published recipe), "all_linear", or a list of layer names.
        alpha: The update is scaled by alpha / rank. None means alpha = rank, a scale of 1, as in the recipe.
        seed: Draws A, by He's uniform initializer. None means the seed of `gl.setup`.
    """
    state = state_of(model)
    layers = linear_layers(model)
    names = resolve_targets(targets, target_names(model))
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is a whole number, 1 or more. Received: rank={rank!r}")
    alpha = float(rank if alpha is None else alpha)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is a positive number. Received: alpha={alpha!r}")
    if (present := {layer.name for layer in lora_layers(model).values()}) and state.lora is None:
        raise ValueError(
            f"The model has adapters on {sorted(present)} that gl did not make. Load the model again."
        )
    if state.lora is not None:
        old = state.lora
        if (old.rank, old.alpha, old.targets) != (rank, alpha, names) or seed not in (
            None,
            old.seed,
        ):
            raise ValueError(
                f"The model has adapters already: rank={old.rank}, alpha={old.alpha:g}, targets={list(old.targets)}, "
                f"seed={old.seed}. To start afresh with others, take them off first: gl.remove_adapter(model)."
            )
        _freeze_base(model)
        return old

    seed = runtime.default_seed if seed is None else seed
    base = model.count_params()
    state.trainable = [
        (part, part.trainable) for part in (*model._flatten_layers(), *model.variables)
    ]
    for index, layer in enumerate(layers.values()):
        if layer.name in names:
            initializer = keras.initializers.HeUniform(
                seed=(1000 * seed + index) % 2**32
            )  # each layer its own A
            if layer.dtype_policy.name in (
                "bfloat16",
                "float16",
            ):  # adapters learn in float32, whatever the base is
                layer.dtype_policy = keras.DTypePolicy(f"mixed_{layer.dtype_policy.name}")
            layer.enable_lora(rank, lora_alpha=alpha, a_initializer=initializer)
            if not layer.quantization_mode:  # Keras itself computes quantized layers by factors
                layer.call = partial(_call_factored, layer)  # until `detach` takes it off
    _freeze_base(model)
    layer_counts, parameters = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for layer in lora_layers(model).values():
        layer_counts[layer.name] += 1
        parameters[layer.name] += math.prod(layer.lora_kernel_a.shape) + math.prod(
            layer.lora_kernel_b.shape
        )
    state.lora = LoraSummary(rank, alpha, names, seed, layer_counts, parameters, base)
    return state.lora


def resolve_targets(targets, present: Sequence[str]) -> tuple[str, ...]:
    """The layer names that `targets` means, of those present; others are a ValueError that suggests one."""
    names = TARGETS.get(targets, (targets,)) if isinstance(targets, str) else tuple(targets)
    for name in names:
        if name not in present:
            close = difflib.get_close_matches(str(name), [*present, *TARGETS], n=1)
            raise ValueError(
                f"No layer is named {name!r}. This model's LoRA targets are: {', '.join(present)}; or "
                f"{', '.join(TARGETS)} for a usual choice of them."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
    if not names:
        raise ValueError(
            f"targets names at least one layer, of: {', '.join(present)}. Received: {targets!r}"
        )
    return tuple(name for name in present if name in names)


def _freeze_base(model) -> None:
    model.trainable = True  # a frozen parent would hide its adapters
    adapters = {id(weight) for weight in adapter_weights(model)}
    for variable in model.variables:
        variable.trainable = id(variable) in adapters


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """Within this context the model is its base again, exactly, and nothing is compiled anew.

    Every B is set to zero, and put back at the end.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = enable_lora(model)
    >>> with adapters_off(model):
    ...     answer = gl.generate(model, "What is the capital of Slovenia?")
    """
    kept = [
        (layer.lora_kernel_b, keras.ops.copy(layer.lora_kernel_b.value))
        for layer in lora_layers(model).values()
    ]
    for b, _ in kept:
        b.assign(keras.ops.zeros(b.shape, b.dtype))
    try:
        yield
    finally:
        for b, value in kept:
            b.assign(value)


@contextmanager
def overridden(objects: Sequence, name: str, function: Callable) -> Iterator[None]:
    """Within this context each object has `function` as its method `name`."""
    for one in objects:
        setattr(one, name, partial(function, one))
    try:
        yield
    finally:
        for one in objects:
            delattr(one, name)


def _call_factored(layer, inputs, training=None):
    """`layer.call` by factors, as products of matrices: XLA's CPU takes several times as long for thin einsums."""
    layer.lora_enabled = False
    try:
        output = type(layer).call(layer, inputs, training=training)
    finally:
        layer.lora_enabled = True
    a, b = layer.lora_kernel_a, layer.lora_kernel_b
    terms, result = getattr(layer, "equation", "...x,xy->...y").split("->")
    kernel = terms.split(",")[1]
    summed = [axis for axis, name in enumerate(kernel) if name not in result]
    kept = [axis for axis, name in enumerate(kernel[:-1]) if name in result]
    width = math.prod(a.shape[axis] for axis in summed)
    a = ops.reshape(ops.transpose(a, (*summed, *kept, a.ndim - 1)), (width, -1))
    low = ops.matmul(ops.reshape(inputs, (-1, width)), a)  # (tokens, heads * rank)
    update = ops.reshape(ops.matmul(ops.reshape(low, (-1, b.shape[0])), b), output.shape)
    return output + layer.lora_alpha / layer.lora_rank * update


def remove_adapter(model) -> None:
    """Leave the model as it was loaded: without adapters, and with the kernels from before each `merge(keep=True)`.

    A model without adapters stays as it is. After a merge that kept nothing, the merged model is what adapters are
    taken off from.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = gl.enable_lora(model)
    >>> remove_adapter(model)
    >>> model.count_params()
    1943232

    Raises:
        ValueError: The adapter was merged, and the kernels from before were not kept.
    """
    merges = state_of(model).merges
    if merges and merges[-1].kernels is None and not lora_layers(model):
        raise ValueError(
            "The adapter was merged without keep=True: load the model again, gl.load(...)."
        )
    detach(model)
    while merges and merges[-1].kernels is not None:
        for layer, kernel in merges[-1].kernels:
            layer._kernel.assign(kernel)
        merges.pop()
    state_of(model).run = merges[-1].run if merges else None


def merge(model, *, keep: bool = False) -> None:
    """Fold the adapters into the kernels, W + (alpha / rank) A B, and remove them: an ordinary model is left.

    The sum is taken in float32 and rounded to the kernel's dtype. `model.save_to_preset(folder)` then saves an ordinary
    KerasHub preset, and `gl.load(folder)` reads it. The model still knows the template it was tuned with. Until all is
    done, the kernels from before are kept in the host's memory: what breaks off leaves the model as it was.

    Args:
        model: A model with adapters. Quantized kernels are a ValueError: they cannot hold the sum.
        keep: Keep the kernels from before, so that `remove_adapter` can put them back.
    """
    state, layers = state_of(model), lora_layers(model)
    if not layers:
        raise ValueError(
            "The model has no adapters to merge. Call gl.enable_lora(model) or gl.load_adapter() first."
        )
    for path, layer in layers.items():
        if layer.quantization_mode:
            raise ValueError(
                f"{path} is quantized ({layer.quantization_mode}) and cannot hold the sum of kernel and adapter. Load "
                f"the base unquantized, gl.load({state.preset!r}, dtype='bfloat16'), load the adapter, and merge there."
            )
    before = [(layer, np.array(layer._kernel.value)) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer._kernel.assign(merged_kernel(layer))
    except BaseException:
        for layer, kernel in before:
            layer._kernel.assign(kernel)
        raise
    state.merges.append(Merge(state.lora, state.run, before if keep else None))
    detach(model)


def detach(model) -> None:
    """Take the adapters' weights off the layers, and forget what was compiled with them."""
    state, layers = state_of(model), lora_layers(model)
    for layer in layers.values():
        for name in ("lora_kernel_a", "lora_kernel_b"):
            layer._untrack_variable(getattr(layer, name))
            setattr(layer, name, None)
        layer.lora_enabled = False
        vars(layer).pop("call", None)
        if layer.dtype_policy.name == f"mixed_{layer._kernel.dtype}":  # enable_lora changed it
            layer.dtype_policy = keras.DTypePolicy(layer._kernel.dtype)
    for part, trainable in state.trainable or [(model, True)] * bool(
        layers
    ):  # layers first: they set what is below
        part.trainable = trainable
    state.lora = state.trainable = None
    state.steps.clear()
    state.samplers.clear()
    for name in ("generate_function", "train_function", "test_function", "predict_function"):
        setattr(
            model, name, None
        )  # compiled for these variables; another adapter of the same shapes would find it


def merged_kernel(layer) -> np.ndarray:
    """A layer's kernel with its adapter, if it has one: in the kernel's shape and dtype.

    A has the kernel's shape but for the last axis, which is `rank` (a query's is (heads, hidden, rank)); B has shape
    (rank, last axis).
    """
    kernel = np.asarray(layer._kernel.value)
    if not layer.lora_enabled:
        return kernel
    a, b = (np.asarray(x.value, "float32") for x in (layer.lora_kernel_a, layer.lora_kernel_b))
    return (kernel.astype("float32") + layer.lora_alpha / layer.lora_rank * (a @ b)).astype(
        kernel.dtype
    )
