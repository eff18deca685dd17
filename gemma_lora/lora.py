"""Put low-rank adapters on a model's layers, switch them off, merge them, remove them.

LoRA (Hu et al., 2021, arXiv:2106.09685) keeps a layer's kernel W frozen and learns its
update as a product of two thin matrices: W + (alpha / rank) A B. The pair A, B is the
layer's *adapter*. Keras calls the two `lora_kernel_a` and `lora_kernel_b`.

This file holds an adapter's life in a loaded model, and what identifies the base model
that it belongs to. How adapters learn is in `loss` and `training`; how they are saved
and exported is in `formats`.
"""

import difflib
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops
from keras_hub.models import CausalLM

from gemma_lora import runtime
from gemma_lora.models import Merge, one_at_a_time, state_of
from gemma_lora.options import is_number, some_texts, whole_number, with_options
from gemma_lora.tables import ShowsAsTable, Table

# The layers of a decoder block that can take an adapter, in the order of its
# computation. The first four belong to attention, the others to the feed-forward part.
ATTENTION = ("query", "key", "value", "attention_output")
ALL_LINEAR = (*ATTENTION, "ffw_gating", "ffw_gating_2", "ffw_linear")

# The usual choices, by name. Keras's own `enable_lora` takes query and value.
TARGETS = {"query_value": ("query", "value"), "all_linear": ALL_LINEAR}
# What Transformers calls them.
NAMES_IN_TRANSFORMERS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}
Targets: TypeAlias = Literal["query_value", "all_linear"] | Sequence[str]

# How many values of each kernel enter the fingerprint of a base.
_SAMPLED = 256


def linear_layers(model) -> dict[str, keras.Layer]:
    """Return all layers that can take an adapter, by their path within the model.

    A path looks like "decoder_block_0/attention/query".
    """
    layers = {}
    for block in model.backbone.transformer_layers:
        for layer in _parts_of(block):
            if layer.name in ALL_LINEAR and hasattr(layer, "enable_lora"):
                inner = "attention/" if layer.name in ATTENTION else ""
                layers[f"{block.name}/{inner}{layer.name}"] = layer
    return layers


def target_names(model) -> list[str]:
    """Return the names of layers that can take an adapter, in `ALL_LINEAR` order."""
    names = {layer.name for layer in linear_layers(model).values()}
    return sorted(names, key=ALL_LINEAR.index)


def lora_layers(model) -> dict[str, keras.Layer]:
    """Return the layers that have an adapter, by path."""
    return {path: layer for path, layer in linear_layers(model).items() if _has_adapter(layer)}


def adapter_weights(model) -> list[keras.Variable]:
    """Return A and B of each layer that has an adapter."""
    weights = []
    for layer in lora_layers(model).values():
        weights += [layer.lora_kernel_a, layer.lora_kernel_b]
    return weights


def _parts_of(layer) -> list[keras.Layer]:
    """Return a layer or model, and all layers within it."""
    # private: `_flatten_layers` of Keras's layers
    return list(layer._flatten_layers())


def _has_adapter(layer) -> bool:
    # private: `lora_enabled` of Keras's layers
    return layer.lora_enabled


def kernel_variable(layer) -> keras.Variable:
    """Return the variable that holds a layer's W, without its adapter."""
    # private: `_kernel` of Keras's layers. The public `kernel` is W + A B while the
    # layer has an adapter.
    return layer._kernel


@dataclass(frozen=True, repr=False)
class LoraSummary(ShowsAsTable):
    """What `enable_lora` did. Shows as a table.

    Attributes:
        rank, alpha, targets, seed: The options, with defaults filled in.
        layers: For each target, how many layers have an adapter.
        parameters: For each target, how many parameters those adapters have.
        base_parameters: Parameters of the frozen base model.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int | None
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
        """Return a row for each target, and their sum."""
        rows = [
            {"target": name, "layers": self.layers[name], "parameters": self.parameters[name]}
            for name in self.targets
        ]
        total = sum(self.layers.values())
        rows.append({"target": "all", "layers": total, "parameters": self.trainable})
        caption = (
            f"LoRA of rank {self.rank}, alpha {self.alpha:g}: {self.trainable:,} trainable "
            f"parameters beside {self.base_parameters:,} frozen ones, {self.share:.3%} of all"
        )
        return Table(rows, caption=caption)


@with_options
@one_at_a_time
def enable_lora(
    model: CausalLM,
    *,
    rank: int = 4,
    targets: Targets = "query_value",
    alpha: float | None = None,
    seed: int | None = None,
) -> LoraSummary:
    """Freeze a model and put low-rank adapters on some of its layers.

    B starts at zero, so no output changes. Calling it again with the same options only
    re-freezes the base.

    >>> import gemma_lora as gl
    >>> enable_lora(gl.load("tiny_gemma_en"), rank=4, targets=["query"]).layers
    {'query': 4}

    Args:
        model: A causal language model from `gl.load`.
        rank: Rank of the update. Keras gives each query head an A of its own, so the
            update of a query layer, flattened to a matrix, can have rank * heads.
        targets: "query_value" (the published recipe), "all_linear", or a list of layer
            names.
        alpha: The update is scaled by alpha / rank. None means alpha = rank, a scale of
            1, as in the recipe.
        seed: Draws A, by He's uniform initializer. None means the seed of `gl.setup`.

    Raises:
        ValueError: An option is invalid, or the model has other adapters already.
    """
    state = state_of(model)
    names = resolve_targets(targets, target_names(model))
    rank = whole_number("rank", rank)
    seed = None if seed is None else runtime.checked_seed(seed)
    alpha = rank if alpha is None else alpha
    if not is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha is a positive number. Received: alpha={alpha!r:.80}")
    alpha = float(alpha)
    if adopt(model) is not None:
        _check_same_options(state.lora, rank, alpha, names, seed)
        _freeze_base(model)
        return state.lora

    seed = runtime.checked_seed(seed)
    base_parameters = model.count_params()
    # Remember who trained before, so that `detach` can restore it.
    parts = (*_parts_of(model), *model.variables)
    state.trainable = [(part, part.trainable) for part in parts]
    for index, layer in enumerate(linear_layers(model).values()):
        if layer.name in names:
            _add_adapter(layer, rank, alpha, _initializer(seed, index))
    _freeze_base(model)
    state.lora = _summary(model, rank, alpha, names, seed, base_parameters)
    return state.lora


def redraw(model, seed: int) -> None:
    """Give adapters the values that `enable_lora` begins with: A drawn, B zero."""
    for index, layer in enumerate(linear_layers(model).values()):
        if _has_adapter(layer):
            a = layer.lora_kernel_a
            a.assign(_initializer(seed, index)(a.shape, a.dtype))
            layer.lora_kernel_b.assign(jnp.zeros(layer.lora_kernel_b.shape))
    state_of(model).lora = replace(state_of(model).lora, seed=seed)
    state_of(model).run = None


def _initializer(seed: int, index: int) -> keras.initializers.Initializer:
    """Return what draws A of the layer with that number: each draws its own."""
    return keras.initializers.HeUniform(seed=(1000 * seed + index) % 2**32)


def adopt(model) -> LoraSummary | None:
    """Return what a model's adapters are; None if it has none.

    Adapters that KerasHub's own `model.backbone.enable_lora(rank)` made become ours.

    Raises:
        ValueError: They have several ranks, or stand on a part of the blocks only.
    """
    state = state_of(model)
    layers = lora_layers(model)
    # private: `lora_enabled` of Keras's embeddings
    if getattr(model.backbone.token_embedding, "lora_enabled", False):
        raise ValueError(
            "The token embedding has an adapter, which gl can neither train nor save. Load the "
            "model again, and call gl.enable_lora(model)."
        )
    if state.lora is not None or not layers:
        return state.lora
    options = {(layer.lora_rank, float(layer.lora_alpha)) for layer in layers.values()}
    present = {layer.name for layer in layers.values()}
    names = tuple(name for name in target_names(model) if name in present)
    all_of_them = {path for path, layer in linear_layers(model).items() if layer.name in names}
    if len(options) > 1 or all_of_them != {*layers}:
        raise ValueError(
            f"The model has adapters that gl did not make: {len(layers)} of the "
            f"{len(all_of_them)} layers {', '.join(names)}, with (rank, alpha) of "
            f"{sorted(options)}. gl keeps one rank for all layers of a name. Load the model again."
        )
    [(rank, alpha)] = options
    for layer in layers.values():
        if not layer.quantization_mode:
            layer.call = partial(_call_factored, layer)
    adapters = sum(math.prod(weight.shape) for weight in adapter_weights(model))
    base_parameters = model.count_params() - adapters
    state.lora = _summary(model, rank, alpha, names, None, base_parameters)
    # What was compiled before computed W + A B.
    state.steps.clear()
    state.samplers.clear()
    return state.lora


def check_not_empty(model) -> None:
    """Raise ValueError if Keras has emptied a model's adapters.

    When `model.load_weights` reads a file into layers with adapters, Keras puts all of
    it into the kernels and leaves A and B zero. From there they learn nothing.
    """
    layers = [*lora_layers(model).values()]
    if layers and not np.any(np.asarray(layers[0].lora_kernel_a.value)):
        raise ValueError(
            "The adapters are empty, A and B are zero: model.load_weights has put what it read "
            "into the base. Load the base again, and call load_weights before gl.enable_lora; or "
            "keep adapters by gl.save_adapter and gl.load_adapter."
        )


def _summary(model, rank, alpha, names, seed, base_parameters) -> LoraSummary:
    """Count the adapters of each target."""
    layers = dict.fromkeys(names, 0)
    parameters = dict.fromkeys(names, 0)
    for layer in lora_layers(model).values():
        layers[layer.name] += 1
        parameters[layer.name] += math.prod(layer.lora_kernel_a.shape)
        parameters[layer.name] += math.prod(layer.lora_kernel_b.shape)
    return LoraSummary(rank, alpha, names, seed, layers, parameters, base_parameters)


def resolve_targets(targets, present: Sequence[str]) -> tuple[str, ...]:
    """Return the layer names that `targets` means, in the order of `present`.

    >>> resolve_targets("query_value", ALL_LINEAR)
    ('query', 'value')

    Args:
        targets: A name of `TARGETS`, the name of a layer, or a list of such names.
        present: The layer names to choose from.

    Raises:
        ValueError: A name is not among them. The message suggests a similar one.
    """
    if isinstance(targets, str):
        targets = TARGETS.get(targets, (targets,))
    names = tuple(some_texts("targets", targets))
    if not names:
        raise ValueError(
            f"targets names at least one layer, of: {', '.join(present)}. Received: {targets!r}"
        )
    for name in names:
        if name not in present:
            similar = difflib.get_close_matches(str(name), [*present, *TARGETS], n=1)
            parts = {full.split(".")[-1]: ours for ours, full in NAMES_IN_TRANSFORMERS.items()}
            similar = [parts[name]] if name in parts else similar
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(
                f"No layer is named {name!r}. This model's LoRA targets are: "
                f"{', '.join(present)}; or {', '.join(TARGETS)} for a usual choice of them.{hint}"
            )
    return tuple(name for name in present if name in names)


def _check_same_options(old: LoraSummary, rank: int, alpha: float, names: tuple, seed) -> None:
    """Raise ValueError if a model's adapters were made with other options."""
    same_seed = seed is None or seed == old.seed
    if (old.rank, old.alpha, old.targets) == (rank, alpha, names) and same_seed:
        return
    raise ValueError(
        f"The model has adapters already: rank={old.rank}, alpha={old.alpha:g}, "
        f"targets={list(old.targets)}, seed={old.seed}. To start afresh with others, "
        "take them off first: gl.remove_adapter(model)."
    )


def _add_adapter(layer, rank: int, alpha: float, initializer) -> None:
    """Put an adapter on a layer, and compute the layer by factors from now on."""
    if layer.dtype_policy.name in ("bfloat16", "float16"):
        # Adapters learn in float32, whatever the base is. `detach` sets this back.
        layer.dtype_policy = keras.DTypePolicy(f"mixed_{layer.dtype_policy.name}")
    layer.enable_lora(rank, lora_alpha=alpha, a_initializer=initializer)
    # Keras itself computes quantized layers by factors.
    if not layer.quantization_mode:
        layer.call = partial(_call_factored, layer)


def _freeze_base(model) -> None:
    # A frozen parent would hide the adapters below it.
    model.trainable = True
    adapters = {id(weight) for weight in adapter_weights(model)}
    for variable in model.variables:
        variable.trainable = id(variable) in adapters


def _call_factored(layer, inputs, training=None):
    """Compute x W + (alpha / rank) (x A) B: a layer with its adapter.

    Keras would add A B to W at every call, and its gradient would be as large as W. By
    factors, only thin matrices are multiplied. We write the factors as products of two
    matrices, because XLA's CPU takes several times as long for thin einsums.

    The comments show the shapes of a query layer, with equation "btd,ndh->btnh": b rows
    of t tokens, width d, n heads of size h. Its W is (n, d, h), A is (n, d, rank), and
    B is (rank, h).
    """
    # private: `lora_enabled` of Keras's layers. Without it, the layer's own `call` is
    # x W, of shape (b, t, n, h).
    layer.lora_enabled = False
    try:
        output = type(layer).call(layer, inputs, training=training)
    finally:
        layer.lora_enabled = True
    a = layer.lora_kernel_a
    b = layer.lora_kernel_b

    # A keeps the kernel's axes but for the last, which is the rank. Some of them are
    # summed over, here d, axis 1; the others are kept in the result, here n, axis 0. A
    # dense layer has no equation.
    terms, result = getattr(layer, "equation", "...x,xy->...y").split("->")
    kernel = terms.split(",")[1]
    summed = [axis for axis, name in enumerate(kernel) if name not in result]
    kept = [axis for axis, name in enumerate(kernel[:-1]) if name in result]
    width = math.prod(a.shape[axis] for axis in summed)

    # (n, d, rank) -> (d, n, rank) -> (d, n * rank)
    a = ops.reshape(ops.transpose(a, (*summed, *kept, a.ndim - 1)), (width, -1))
    # (b, t, d) -> (b * t, d), times A: (b * t, n * rank)
    low = ops.matmul(ops.reshape(inputs, (-1, width)), a)
    # (b * t * n, rank), times B: (b * t * n, h)
    update = ops.matmul(ops.reshape(low, (-1, b.shape[0])), b)
    return output + layer.lora_alpha / layer.lora_rank * ops.reshape(update, output.shape)


@contextmanager
def adapters_off(model: CausalLM) -> Iterator[None]:
    """Within this context the model computes exactly what its base does.

    Every B is set to zero, and restored at the end. Nothing is compiled again.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = enable_lora(model)
    >>> with adapters_off(model):
    ...     answer = gl.generate(model, "What is the capital of Slovenia?")
    """
    with state_of(model).lock:
        variables = [layer.lora_kernel_b for layer in lora_layers(model).values()]
        # Copies, because assigning may overwrite a value in place.
        values = [ops.copy(variable.value) for variable in variables]
        for variable in variables:
            variable.assign(ops.zeros(variable.shape, variable.dtype))
        try:
            yield
        finally:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


@with_options
@one_at_a_time
def merge(model: CausalLM, *, keep: bool = False) -> None:
    """Fold the adapters into the kernels, W + (alpha / rank) A B, and take them off.

    An ordinary model is left: `model.save_to_preset(folder)` saves it as a KerasHub
    preset, and `gl.load(folder)` reads that. The sum is taken in float32 and rounded to
    the kernel's dtype. The model still knows the template it was tuned with.

    Only the first merge of a model can keep the kernels from before, so that
    `remove_adapter` can undo it. A merge without `keep` is final: it also drops the
    kernels that an earlier merge kept.

    While it merges, the kernels from before are held in the host's memory. If it fails
    or is interrupted, the model stays as it was.

    Args:
        model: A model with adapters, not quantized.
        keep: Keep the kernels from before.

    Raises:
        ValueError: There are no adapters, a kernel is quantized and cannot hold the
            sum, or `keep` is asked for on a model that was merged before.
    """
    state = state_of(model)
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            "The model has no adapters to merge. Call gl.enable_lora(model) or gl.load_adapter() "
            "first."
        )
    if keep and state.merged:
        raise ValueError(
            "Only the first merge of a model can keep the kernels from before, and this model was "
            "merged before. Merge for good, gl.merge(model); if you want the adapter later, save "
            "it first, gl.save_adapter(model, folder)."
        )
    for path, layer in layers.items():
        if layer.quantization_mode:
            raise ValueError(
                f"{path} is quantized ({layer.quantization_mode}) and cannot hold the sum of "
                f"kernel and adapter. Load the preset that the base was quantized from, "
                "load the adapter, and merge there."
            )
    before = [(layer, np.array(kernel_variable(layer).value)) for layer in layers.values()]
    try:
        for layer in layers.values():
            kernel_variable(layer).assign(merged_kernel(layer))
    except BaseException:
        # Ctrl-C as well must not leave half of the kernels merged.
        _restore(before)
        raise
    state.merged = Merge(state.lora, state.run, before if keep else None)
    detach(model)


def merged_kernel(layer) -> np.ndarray:
    """Return a layer's kernel with its adapter, if it has one.

    A has the kernel's shape but for the last axis, which is the rank: (heads, hidden,
    rank) for a query. B has shape (rank, last axis).

    Returns:
        An array of the kernel's shape and dtype. The sum is taken in float32.
    """
    kernel = np.asarray(kernel_variable(layer).value)
    if not _has_adapter(layer):
        return kernel
    a = np.asarray(layer.lora_kernel_a.value, "float32")
    b = np.asarray(layer.lora_kernel_b.value, "float32")
    update = layer.lora_alpha / layer.lora_rank * (a @ b)
    return (kernel.astype("float32") + update).astype(kernel.dtype)


@with_options
@one_at_a_time
def remove_adapter(model: CausalLM) -> None:
    """Take the adapters off, and undo a `merge(keep=True)`: the base as it was loaded.

    A model without adapters stays as it is. After a merge that kept nothing, the merged
    model is the base that later adapters are taken off from.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = gl.enable_lora(model)
    >>> remove_adapter(model)
    >>> model.count_params()
    1943232

    Raises:
        ValueError: There is nothing to take off but a merge that kept no kernels.
    """
    state = state_of(model)
    merged = state.merged
    if merged and merged.kernels is None and not lora_layers(model):
        raise ValueError(
            "The adapter was merged without keep=True: load the model again, gl.load(...)."
        )
    detach(model)
    if merged and merged.kernels is not None:
        _restore(merged.kernels)
        state.merged = None
    state.run = state.merged.run if state.merged else None


def _restore(kernels: list[tuple[keras.Layer, np.ndarray]]) -> None:
    for layer, kernel in kernels:
        kernel_variable(layer).assign(kernel)


def detach(model) -> None:
    """Take the adapters off the layers, and forget what was compiled with them.

    Kernels and the record of the training run stay as they are.
    """
    state = state_of(model)
    layers = list(lora_layers(model).values())
    for layer in layers:
        for name in ("lora_kernel_a", "lora_kernel_b"):
            # private: `_untrack_variable` of Keras's layers. Keras has no way back from
            # `enable_lora`, so this undoes what that did.
            layer._untrack_variable(getattr(layer, name))
            setattr(layer, name, None)
        layer.lora_enabled = False
        # Without the attribute, the class's own `call` is used again.
        vars(layer).pop("call", None)
        if layer.dtype_policy.name == f"mixed_{kernel_variable(layer).dtype}":
            # `_add_adapter` changed it.
            layer.dtype_policy = keras.DTypePolicy(kernel_variable(layer).dtype)

    if state.trainable is not None:
        # Layers stand before variables: setting a layer also sets everything below it.
        for part, trainable in state.trainable:
            part.trainable = trainable
    elif layers:
        # The adapters were not made by gl, so nothing is known of the time before.
        model.trainable = True
    state.lora = None
    state.trainable = None

    # These were compiled for the variables that are gone. Another adapter of the same
    # shapes would be mistaken for them.
    state.steps.clear()
    state.samplers.clear()
    # private: where Keras and KerasHub keep their compiled functions
    for name in ("generate_function", "train_function", "test_function", "predict_function"):
        setattr(model, name, None)


def kernel_shape(layer) -> tuple[int, ...]:
    """Return the shape of a layer's kernel, even if it is packed as four-bit values."""
    if _has_adapter(layer):
        return (*layer.lora_kernel_a.shape[:-1], layer.lora_kernel_b.shape[-1])
    # Only the shape is computed: nothing is unpacked.
    return jax.eval_shape(lambda: ops.convert_to_tensor(layer.kernel)).shape


def fingerprints(model) -> dict:
    """Return what tells a base from others, with or without adapters on it.

    The values are rounded to bfloat16, so that a base has the same fingerprint in
    float32 and in bfloat16. In float16 it has another one.

    Returns:
        "architecture" and "vocabulary_size"; "shapes", a hash of the shapes of all
        kernels; and "weights", a hash of some values of each kernel.
    """
    backbone = model.backbone
    # private: `_embeddings` of Keras's embedding layer. The public `embeddings` would
    # be unpacked first.
    kernels = [backbone.token_embedding._embeddings]
    shapes = {"token_embedding": (backbone.vocabulary_size, backbone.hidden_dim)}
    for path, layer in linear_layers(model).items():
        kernels.append(kernel_variable(layer))
        shapes[path] = kernel_shape(layer)

    weights = hashlib.sha256()
    for kernel in kernels:
        places = np.linspace(0, np.prod(kernel.shape) - 1, _SAMPLED).astype("int64")
        values = np.asarray(kernel.value[np.unravel_index(places, kernel.shape)])
        weights.update(values.astype(jnp.bfloat16).tobytes())
    return {
        "architecture": type(backbone).__name__,
        "vocabulary_size": backbone.vocabulary_size,
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }
