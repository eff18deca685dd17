"""The loss of a training step, per real token: what is compiled, and what a memory budget is taken of."""

from itertools import chain

import jax
import keras
from keras import ops

from gemma_lora.models import Settings, state_of


class TokenTrainer(keras.Model):
    """A model's own layers, trained on the mean over tokens that count.

    Keras's compiled losses average over padding too. Here the loss of a batch, and the epoch's loss and accuracy, are
    sum(weight * value) / sum(weight), in nats a token.
    """

    def __init__(self, model):
        super().__init__(inputs=model.input, outputs=model.output)
        self._token_metrics = [keras.metrics.Mean(name="loss"), keras.metrics.Mean(name="accuracy")]

    @property
    def metrics(self) -> list[keras.Metric]:
        """Loss and accuracy over all the tokens of an epoch that count."""
        return self._token_metrics

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Cross-entropy in nats for each token that counts."""
        logits = ops.cast(y_pred, "float32")
        losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        hits = ops.cast(ops.equal(ops.argmax(logits, axis=-1), ops.cast(y, "int32")), "float32")
        for metric, values in zip(self._token_metrics, (losses, hits), strict=True):
            # Flat: Keras would first average over each row, and so weigh a token by its row's padding.
            metric.update_state(ops.reshape(values, [-1]), sample_weight=ops.reshape(sample_weight, [-1]))
        return ops.sum(losses * sample_weight) / ops.maximum(ops.sum(sample_weight), 1.0)

    def pure_step(self, frozen, own, data):
        """One step as a pure function, which is what gets compiled: (logs, what trains, frozen values that changed).

        `own` is (adapters, optimizer, metrics). Only these are given away to be overwritten: Keras's own step gives the
        frozen weights away, too, and they are gone when a step fails.
        """
        adapters, optimizer, metrics = own
        logs, (adapters, left, optimizer, metrics) = self.train_step((adapters, frozen, optimizer, metrics), data)
        changed = {i: new for i, (old, new) in enumerate(zip(frozen, left, strict=True)) if new is not old}
        return logs, (adapters, optimizer, metrics), changed

    def make_train_function(self, force: bool = False):
        """Compile `pure_step`, in the form that Keras calls."""
        if keras.config.backend() != "jax":
            super().make_train_function(force)
        elif self.train_function is None or force:
            compiled = jax.jit(self.pure_step, donate_argnums=1)

            def train_function(state, iterator):
                adapters, frozen, optimizer, metrics = state
                own = adapters, optimizer, metrics
                logs, (adapters, optimizer, metrics), changed = compiled(frozen, own, next(iterator))
                frozen = [changed.get(i, value) for i, value in enumerate(frozen)]
                return logs, (adapters, frozen, optimizer, metrics)

            self.train_function = train_function

    def make_test_function(self, force: bool = False):
        """The same for a step that only measures: it gives nothing away, and puts all back if it fails."""
        if keras.config.backend() != "jax":
            super().make_test_function(force)
        elif self.test_function is None or force:

            def measure(state, data):
                logs, (_, _, metrics) = self.test_step(state, data)
                return logs, metrics

            compiled = jax.jit(measure)

            def test_function(state, iterator):
                try:
                    logs, metrics = compiled(state, next(iterator))
                except BaseException:
                    variables = self.trainable_variables, self.non_trainable_variables, self.metrics_variables
                    for variable, value in zip(chain(*variables), chain(*state), strict=True):
                        variable.assign(value)  # Keras took them away for the time of the evaluation
                    raise
                return logs, (state[0], state[1], metrics)

            self.test_function = test_function


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
