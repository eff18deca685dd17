"""Take an adapter off a model, or fold it into the model's kernels for good."""

import keras
import numpy as np

from gemma_lora.lora import lora_layers
from gemma_lora.models import Merge, state_of


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
        raise ValueError("The adapter was merged without keep=True: load the model again, gl.load(...).")
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
        raise ValueError("The model has no adapters to merge. Call gl.enable_lora(model) or gl.load_adapter() first.")
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
        if layer.dtype_policy.name == f"mixed_{layer._kernel.dtype}":  # enable_lora changed it
            layer.dtype_policy = keras.DTypePolicy(layer._kernel.dtype)
    for part, trainable in state.trainable or [(model, True)] * bool(layers):  # layers first: they set what is below
        part.trainable = trainable
    state.lora = state.trainer = state.trainable = None
    state.samplers.clear()
    for name in ("generate_function", "train_function", "test_function", "predict_function"):
        setattr(model, name, None)  # compiled for these variables; another adapter of the same shapes would find it


def merged_kernel(layer) -> np.ndarray:
    """A layer's kernel with its adapter, if it has one: in the kernel's shape and dtype.

    A has the kernel's shape but for the last axis, which is `rank` (a query's is (heads, hidden, rank)); B has shape
    (rank, last axis).
    """
    kernel = np.asarray(layer._kernel.value)
    if not layer.lora_enabled:
        return kernel
    a, b = (np.asarray(x.value, "float32") for x in (layer.lora_kernel_a, layer.lora_kernel_b))
    return (kernel.astype("float32") + layer.lora_alpha / layer.lora_rank * (a @ b)).astype(kernel.dtype)
