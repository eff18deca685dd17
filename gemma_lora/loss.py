"""The loss of a training step, per real token, and the two programs that are compiled.

Two ideas live here. `chunked_cross_entropy` is the loss itself, which never holds the
logits of a whole batch. `training_step` and `measuring_step` wrap it into the pure
functions that JAX compiles; `training.fit` calls them, and `memory` asks the compiler
about them. Nothing here loops over batches, prints or saves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
from keras import ops

from gemma_lora.models import Settings, state_of

# Logits are held for so many tokens at once. With Gemma's vocabulary of 256,000 that is
# 262 MB in float32. A batch of the recommended size is one chunk; larger ones are
# split.
CHUNK = 256

# A chunk is computed up to a multiple of so many tokens.
_CUT = 32


def chunked_cross_entropy(
    project: Callable, hidden, targets, weights, *, gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """Sum cross-entropy and right predictions over tokens that count, by chunks.

    The gradient of a chunk is computed right after its logits, while they exist, as in
    Liger-Kernel (Hsu et al., 2024, arXiv:2410.10989). No logits are computed for tokens
    that do not count, but for a few that fill up the last chunk.

    >>> hidden, targets = jnp.eye(3), jnp.array([0, 1, 0])
    >>> weights = jnp.array([1.0, 1.0, 0.0])
    >>> losses, right = chunked_cross_entropy(
    ...     lambda rows: 9 * rows, hidden, targets, weights, gradient=False
    ... )
    >>> round(float(losses), 6), float(right)
    (0.000494, 2.0)

    Args:
        project: From hidden states (n, width) to logits (n, vocabulary).
        hidden: Hidden states, shape (tokens, width).
        targets: The next token of each, int, shape (tokens,).
        weights: 1 for a token that counts, 0 for one that does not; float, (tokens,).
        gradient: If true, also compute the gradient with respect to `hidden`. Only then
            can the result be differentiated.

    Returns:
        The sum of weight * cross-entropy, in nats, and the sum of weight * whether the
        likeliest token is the target. Both are float32 scalars.
    """
    size = min(CHUNK, len(targets))
    # Tokens that count come first, so that the last chunks are empty.
    order = jnp.argsort(weights == 0, stable=True)

    def in_chunks(rows):
        rows = rows[order]
        rows = jnp.pad(rows, [(0, -len(rows) % size)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(-1, size, *rows.shape[1:])

    def add(sums, chunk):
        # A chunk is cut behind its last token that counts.
        first = [partial(_first_rows, project, gradient, n) for n in _cuts(size)]
        cut = jnp.searchsorted(jnp.array(_cuts(size)), jnp.sum(chunk[2] != 0))
        counts, slope = jax.lax.switch(cut, first, chunk)
        return jax.tree.map(jnp.add, sums, counts), slope

    # JAX must not differentiate the scan: it would keep the logits of every chunk.
    chunks = in_chunks(jax.lax.stop_gradient(hidden)), in_chunks(targets), in_chunks(weights)
    (losses, right), slopes = jax.lax.scan(add, (0.0, 0.0), chunks)
    if gradient:
        # `hidden . slopes` minus itself is zero, but its gradient with respect to
        # `hidden` is `slopes`: so the loss gets the gradient that the scan has computed
        # already.
        slopes = slopes.reshape(-1, hidden.shape[1])[: len(targets)]
        carrier = jnp.vdot(hidden[order].astype("float32"), slopes.astype("float32"))
        losses += carrier - jax.lax.stop_gradient(carrier)
    return losses, right


def _cuts(size: int) -> list[int]:
    """Return the numbers of rows at which a chunk may be cut: 0, ..., size.

    Each is compiled. On a CPU that takes little, and a step's logits are most of its
    time, so there are many; elsewhere a chunk is computed as a whole or not at all.

    >>> _cuts(64) if jax.default_backend() == "cpu" else [0, 32, 64]
    [0, 32, 64]
    """
    step = _CUT if jax.default_backend() == "cpu" else size
    return [*range(0, size, step), size]


def _first_rows(project: Callable, gradient: bool, n: int, chunk: tuple) -> tuple:
    """Return the sums of a chunk's first n rows, and their gradient; 0 for the rest."""
    size = len(chunk[0])
    if n == 0:
        return (0.0, 0.0), jnp.zeros_like(chunk[0]) if gradient else ()
    counts, slope = _cross_entropy(project, *(part[:n] for part in chunk), gradient=gradient)
    return counts, jnp.pad(slope, [(0, size - n), (0, 0)]) if gradient else ()


def _cross_entropy(project: Callable, rows, targets, weights, *, gradient: bool) -> tuple:
    """Return a chunk's two sums, and its gradient with respect to the rows.

    The gradient of logits is softmax(logits) - 1 at the target, times the weight.
    Written out, it is one pass over the logits; JAX's own takes three.
    """
    logits, pull = jax.vjp(project, rows) if gradient else (project(rows), None)
    dtype = logits.dtype
    logits = logits.astype("float32")
    truth = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    highest = jnp.max(logits, axis=1)
    scaled = jnp.exp(logits - highest[:, None])
    totals = jnp.sum(scaled, axis=1)
    losses = weights * (jnp.log(totals) + highest - truth)
    # XLA's CPU takes longer for an argmax than for everything else here, so we compare
    # with the maximum. Where several tokens share it, each is right to its share.
    # They are counted by a product, because XLA would hold the logits longer for a sum.
    ties = (logits == highest[:, None]).astype("float32") @ jnp.ones(logits.shape[1])
    right = (truth == highest) / ties
    counts = jnp.sum(losses), jnp.sum(weights * right)
    if not gradient:
        return counts, ()
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    slopes = scaled * (weights / totals)[:, None] - is_target * weights[:, None]
    return counts, pull(slopes.astype(dtype))[0]


class TrainState(NamedTuple):
    """Everything that a training step changes, as lists of arrays.

    Attributes:
        adapters: Values of `model.trainable_variables`: A and B of each adapted layer.
        moments: Values of `optimizer.variables`: AdamW's step count, rate and moments.
        sums: float32 (3,): losses, right predictions and tokens since the epoch began.
    """

    adapters: list
    moments: list
    sums: jax.Array


def start_state(model, optimizer: keras.optimizers.Optimizer) -> TrainState:
    """Return the state that training begins with: copies that a step may overwrite."""
    optimizer.build(model.trainable_variables)
    adapters = [variable.value for variable in model.trainable_variables]
    moments = [variable.value for variable in optimizer.variables]
    return copied(TrainState(adapters, moments, jnp.zeros(3)))


@jax.jit
def copied(state: TrainState) -> TrainState:
    """Copy every array of a state, as one program.

    Copied one by one, a small model's arrays would keep a GPU waiting.
    """
    return jax.tree.map(jnp.copy, state)


def frozen_values(model) -> list:
    """Return the values of every variable that training does not change."""
    return [variable.value for variable in model.non_trainable_variables]


def token_loss(model, adapters, frozen, batch, *, gradient: bool) -> tuple[jax.Array, tuple]:
    """Compute the mean loss of a batch over its tokens that count, as a pure function.

    Keras's own losses average over padding too.

    Args:
        model: The model. Its own values are not read.
        adapters: Values for `model.trainable_variables`.
        frozen: Values for `model.non_trainable_variables`.
        batch: What `Batches` yields: inputs, targets and weights.
        gradient: Whether the result is to be differentiated.

    Returns:
        The mean in nats a token, and a pair: float32 (3,) with losses, right
        predictions and tokens; and, by index, the frozen values that the model itself
        has changed (the random state of dropout; no published Gemma has any).
    """
    inputs, targets, weights = batch
    values = [
        *zip(model.trainable_variables, adapters, strict=True),
        *zip(model.non_trainable_variables, frozen, strict=True),
    ]
    with keras.StatelessScope(state_mapping=values) as scope, records_apart(model):
        hidden = model.backbone(inputs, training=gradient)
        losses, right = chunked_cross_entropy(
            partial(model.backbone.token_embedding, reverse=True),
            hidden.reshape(-1, hidden.shape[-1]),
            targets.reshape(-1),
            weights.reshape(-1),
            gradient=gradient,
        )
        left = map(scope.get_current_value, model.non_trainable_variables)
        changed = {i: value for i, value in enumerate(left) if value is not frozen[i]}
    tokens = jnp.sum(weights)
    return losses / jnp.maximum(tokens, 1.0), (jnp.stack([losses, right, tokens]), changed)


def training_step(model, optimizer: keras.optimizers.Optimizer) -> Callable:
    """Return the compiled step `(*state, frozen, batch) -> (state, changed)`.

    Adapters and moments are given away, to be overwritten. The frozen weights are an
    argument that is never donated, so a step that fails cannot take the base model with
    it. `changed` is that of `token_loss`.

    A model keeps its steps, so that a second run need not compile again: learning rate
    and moments are arguments, and of the optimizer only its weight decay is compiled
    in.
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: list, moments: list, sums, frozen: list, batch) -> tuple[TrainState, dict]:
        gradient = jax.grad(partial(token_loss, model, gradient=True), has_aux=True)
        gradients, (counts, changed) = gradient(adapters, frozen, batch)
        adapters, moments = optimizer.stateless_apply(moments, gradients, adapters)
        return TrainState(adapters, moments, sums + counts), changed

    return state_of(model).steps.setdefault(("train", optimizer.weight_decay), step)


def measuring_step(model) -> Callable:
    """Return the compiled step `(sums, adapters, frozen, batch) -> sums`.

    It only measures: validation and `gl.evaluate` share it.
    """

    @jax.jit
    def step(sums, adapters: list, frozen: list, batch):
        _, (counts, _) = token_loss(model, adapters, frozen, batch, gradient=False)
        return sums + counts

    return state_of(model).steps.setdefault("measure", step)


def averages(sums) -> dict[str, float]:
    """Turn sums into loss (nats a token) and accuracy, under Keras's names.

    >>> averages([6.0, 1.0, 4.0])
    {'loss': 1.5, 'accuracy': 0.25}
    """
    losses, right, tokens = map(float, sums)
    tokens = max(tokens, 1.0)
    return {"loss": losses / tokens, "accuracy": right / tokens}


@contextmanager
def records_apart(model) -> Iterator[None]:
    """Within this context each token attends only to its own record, up to itself.

    Short records share a row (see `batches`). There `padding_mask` numbers the records,
    and a token may look at another only if both have the same number. Positions count
    from the start of the row, not of the record; Gemma's rotary attention depends on
    differences of positions alone, so that changes nothing.
    """
    # private: `_compute_attention_mask` of KerasHub's Gemma blocks. It is replaced only
    # while a program is traced.
    blocks = model.backbone.transformer_layers

    def own_record(block, x, numbers, *rest):
        causal = type(block)._compute_attention_mask(block, x, None, *rest)
        same = numbers[:, :, None] == numbers[:, None, :]
        return ops.cast(ops.logical_and(causal, same), "int32")

    for block in blocks:
        block._compute_attention_mask = partial(own_record, block)
    try:
        yield
    finally:
        for block in blocks:
            del block._compute_attention_mask


def optimizer_for(settings: Settings) -> keras.optimizers.Optimizer:
    """Return AdamW as in the published recipe: it decays no bias or norm scale."""
    optimizer = keras.optimizers.AdamW(settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer
