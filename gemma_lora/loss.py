"""The loss of a training step, per real token: what is compiled, and what a memory budget is taken of."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

import jax
import jax.numpy as jnp
import keras
from keras import ops

from gemma_lora.lora import overridden
from gemma_lora.models import Settings, state_of
from gemma_lora.runtime import return_memory

CHUNK = 256  # tokens whose logits are held at once: with Gemma's vocabulary of 256,000, 262 MB in float32


def chunked_cross_entropy(project: Callable, hidden, targets, weights, *, gradient: bool):
    """Sum weight * cross-entropy (nats), and weight * whether the likeliest token is right, by chunks of logits.

    Tokens that count come first, and chunks without any are skipped. The gradient of a chunk is computed right after
    its logits, while they are there, as in Liger-Kernel (Hsu et al., 2024, arXiv:2410.10989).

    >>> hidden, targets, weights = jnp.eye(3), jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.0])
    >>> losses, hits = chunked_cross_entropy(lambda rows: 9 * rows, hidden, targets, weights, gradient=False)
    >>> round(float(losses), 6), float(hits)
    (0.000494, 2.0)

    Args:
        project: From hidden states (n, width) to logits (n, vocabulary).
        hidden, targets, weights: Shapes (tokens, width), (tokens,) and (tokens,).
        gradient: Whether the sum of losses is to have one, with regard to `hidden` alone.
    """

    def measure(rows, targets, weights):
        logits = project(rows).astype("float32")
        truth = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        highest = jnp.max(
            logits, axis=1
        )  # an argmax would take XLA's CPU longer than all the rest here
        losses = weights * (jax.nn.logsumexp(logits, axis=1) - truth)
        hits = (truth == highest) / jnp.sum(logits == highest[:, None], axis=1)  # a tie is shared
        return jnp.sum(losses), jnp.sum(weights * hits)

    def chunk(sums, part):
        def count(part):
            if not gradient:
                return measure(*part), jnp.zeros((), hidden.dtype)
            (losses, hits), slope = jax.value_and_grad(measure, has_aux=True)(*part)
            return (losses, hits), slope

        def skip(part):
            return (0.0, 0.0), jnp.zeros_like(part[0] if gradient else 0.0, hidden.dtype)

        more, slope = jax.lax.cond(jnp.any(part[2] != 0), count, skip, part)
        return jax.tree.map(jnp.add, sums, more), slope

    size = min(CHUNK, len(targets))
    order = jnp.argsort(weights == 0, stable=True)
    room = -(-len(targets) // size) * size - len(targets)
    parts = [
        jnp.pad(rows[order], [(0, room)] + [(0, 0)] * (rows.ndim - 1))
        for rows in (hidden, targets, weights)
    ]
    parts[0] = jax.lax.stop_gradient(parts[0])
    (losses, hits), slopes = jax.lax.scan(
        chunk, (0.0, 0.0), [rows.reshape(-1, size, *rows.shape[1:]) for rows in parts]
    )
    if gradient:
        slopes = slopes.reshape(-1, hidden.shape[1])[: len(targets)]
        own = jnp.vdot(hidden[order].astype("float32"), slopes.astype("float32"))
        losses += own - jax.lax.stop_gradient(
            own
        )  # zero, with the gradient that was computed above
    return losses, hits


class TokenTrainer(keras.Model):
    """A model's own layers, trained on the mean over tokens that count.

    Keras's compiled losses average over padding too. Here the loss of a batch, and the epoch's loss and accuracy, are
    sum(weight * value) / sum(weight), in nats a token.
    """

    def __init__(self, model):
        super().__init__(inputs=model.backbone.input, outputs=model.backbone.output)
        self._embedding = model.backbone.token_embedding
        self._contexts = lambda: records_apart(model)  # Keras would track the model itself
        self._steps = 0
        self.after_step: Callable | None = (
            None  # Keras's hooks run in other threads, or wait for the loss of each step
        )
        self._token_metrics = [keras.metrics.Mean(name="loss"), keras.metrics.Mean(name="accuracy")]

    @property
    def metrics(self) -> list[keras.Metric]:
        """Loss and accuracy over all the tokens of an epoch that count."""
        return self._token_metrics

    def call(self, inputs, training=None, mask=None):
        """The backbone's hidden states, shape (rows, length, width); `padding_mask` numbers the records of a row."""
        with self._contexts():
            return super().call(inputs, training=training, mask=mask)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Cross-entropy in nats for each token that counts; `y_pred` are the backbone's hidden states."""
        rows = (
            ops.reshape(y_pred, [-1, y_pred.shape[-1]]),
            ops.reshape(y, [-1]),
            ops.reshape(sample_weight, [-1]),
        )
        losses, hits = chunked_cross_entropy(
            lambda h: self._embedding(h, reverse=True), *rows, gradient=training
        )
        tokens = ops.sum(sample_weight)
        for metric, total in zip(self._token_metrics, (losses, hits), strict=True):
            metric.total.assign_add(total)  # as update_state(values, sample_weight) would
            metric.count.assign_add(tokens)
        return losses / ops.maximum(tokens, 1.0)

    def pure_step(self, frozen, own, data):
        """One step as a pure function, which is what gets compiled: (logs, what trains, frozen values that changed).

        `own` is (adapters, optimizer, metrics). Only these are given away to be overwritten: Keras's own step gives the
        frozen weights away, too, and they are gone when a step fails.
        """
        adapters, optimizer, metrics = own
        logs, (adapters, left, optimizer, metrics) = self.train_step(
            (adapters, frozen, optimizer, metrics), data
        )
        changed = {
            i: new for i, (old, new) in enumerate(zip(frozen, left, strict=True)) if new is not old
        }
        return logs, (adapters, optimizer, metrics), changed

    def _wait_for(self, arrays: list) -> None:
        """On a CPU wait for the step before: this one can have its scratch memory then, and no second is needed.

        The C library may have put something small there; what is left of it goes back to the system now and then.
        """
        if jax.default_backend() == "cpu":
            jax.block_until_ready(arrays)
            self._steps += 1
            if self._steps < 4 or self._steps % 100 == 0:
                return_memory()

    def make_train_function(self, force: bool = False):
        """Compile `pure_step`, in the form that Keras calls."""
        if self.train_function is None or force:
            compiled, self._steps = jax.jit(self.pure_step, donate_argnums=1), 0

            def train_function(state, iterator):
                adapters, frozen, optimizer, metrics = state
                own, batch = (adapters, optimizer, metrics), next(iterator)
                self._wait_for(metrics)
                logs, (adapters, optimizer, metrics), changed = compiled(frozen, own, batch)
                frozen = [changed.get(i, value) for i, value in enumerate(frozen)]
                if self.after_step:
                    self.after_step(logs, [*adapters, *optimizer, *metrics])
                return logs, (adapters, frozen, optimizer, metrics)

            self.train_function = train_function

    def make_test_function(self, force: bool = False):
        """The same for a step that only measures: it gives nothing away, and puts all back if it fails."""
        if self.test_function is None or force:

            def measure(state, data):
                logs, (_, _, metrics) = self.test_step(state, data)
                return logs, metrics

            compiled, self._steps = jax.jit(measure), 0

            def test_function(state, iterator):
                try:
                    batch = next(iterator)
                    self._wait_for(state[-1])
                    logs, metrics = compiled(state, batch)
                except BaseException:
                    variables = (
                        self.trainable_variables,
                        self.non_trainable_variables,
                        self.metrics_variables,
                    )
                    for variable, value in zip(chain(*variables), chain(*state), strict=True):
                        variable.assign(
                            value
                        )  # Keras took them away for the time of the evaluation
                    raise
                return logs, (state[0], state[1], metrics)

            self.test_function = test_function


def records_apart(model) -> AbstractContextManager:
    """Within this context a token attends to those of its own record, before it: `padding_mask` numbers the records.

    Positions count from the start of a row; Gemma's attention depends on their differences alone.
    """

    def own_record(block, x, numbers, *rest):
        causal = type(block)._compute_attention_mask(block, x, None, *rest)
        return ops.cast(
            ops.logical_and(causal, numbers[:, :, None] == numbers[:, None, :]), "int32"
        )

    return overridden(model.backbone.transformer_layers, "_compute_attention_mask", own_record)


def trainer_of(model) -> TokenTrainer:
    """The model's trainer: one a model, so that what it compiled is used again."""
    state = state_of(model)
    if state.trainer is None:
        state.trainer = TokenTrainer(model)
        state.trainer.compile()
    return state.trainer


def optimizer_for(settings: Settings) -> keras.optimizers.Optimizer:
    """AdamW, as in the published recipe: biases and norm scales are not decayed."""
    optimizer = keras.optimizers.AdamW(settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer


@contextmanager
def stop_after_step(trainer: TokenTrainer) -> Iterator[None]:
    """Let Ctrl-C end a run between steps: within a step, JAX holds the only copy of the weights."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        trainer.stop_training = trainer.stop_evaluating = True
        print("\nStopping after this step. The model stays usable.")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
