"""Train the adapters: one epoch or many, validation, and a record of what was run."""

import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import keras
import numpy as np
from keras import ops

from gemma_lora import runtime
from gemma_lora.batches import Batches, encode
from gemma_lora.lora import adapter_weights
from gemma_lora.loss import optimizer_for, trainer_of
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import recommended, state_of
from gemma_lora.templates import get_template


class LossCurve(keras.callbacks.Callback):
    """Collect the training loss of each twentieth of an epoch, per token that counts.

    Keras logs the mean since the epoch began; the difference of two such sums is the loss in between.
    """

    async_safe = True  # or Keras would wait for the loss of every step

    def __init__(self, batches: Batches):
        super().__init__()
        self.points, self._batches = [], batches

    def on_epoch_begin(self, epoch, logs=None):
        steps = range(len(self._batches))
        self._means, self._tokens = {}, np.cumsum([float(self._batches[step][2].sum()) for step in steps])

    def on_train_batch_end(self, step, logs=None):
        if (step + 1) * 20 // len(self._batches) > step * 20 // len(self._batches):
            self._means[step] = logs["loss"]  # still on the device

    def on_epoch_end(self, epoch, logs=None):
        old_total = old_tokens = 0.0
        for step, mean in sorted(self._means.items()):
            tokens = self._tokens[step]
            total = float(mean) * tokens
            loss = (total - old_total) / max(tokens - old_tokens, 1.0)
            self.points.append((epoch + (step + 1) / len(self._batches), float(loss)))
            old_total, old_tokens = total, tokens


def fit(
    model,
    train,
    *,
    validation=None,
    template=None,
    epochs: int = 1,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    loss_on: str = "response",
    seed: int | None = None,
    callbacks=(),
    verbose="auto",
) -> keras.callbacks.History:
    """Train a model's adapters on records, and nothing else of it: a base that would train too is a ValueError.

    What is left open is taken from `recommended(model)`, and shown in the first line. The published recipe is
    `fit(model, train, batch_size=1, sequence_length=256, loss_on="all")`. Ctrl-C ends training after the step at
    hand and leaves a usable model and its history: a Keras `History` of loss and accuracy per token that counts. Its
    attribute `curve` holds (epochs done, training loss since the point before), at most 20 points an epoch. If a step
    fails, the weights are those from before; out of memory, the MemoryError names settings that should fit.

    Args:
        model: A model with adapters, from `enable_lora`.
        train: Records to learn from.
        validation: Records to measure the loss on after each epoch.
        template: Name of a template or a `Template`; prompts are rendered by it in training and, later, in `generate`.
        epochs: How often every record is learned from.
        batch_size: Records a step.
        sequence_length: Most tokens of prompt and response together; longer responses are cut, and counted.
        learning_rate, weight_decay: Of AdamW; biases and norm scales are not decayed, as in the recipe.
        loss_on: "response", or "all" to learn the prompt too.
        seed: Order of the records. None means the seed of `gl.setup`.
        callbacks, verbose: As in Keras `fit`; the callbacks' `model` is the trainer, which has the model's own layers.
    """
    state = state_of(model)
    given = {"template": template, "batch_size": batch_size, "sequence_length": sequence_length}
    given |= {"learning_rate": learning_rate, "weight_decay": weight_decay}
    settings = replace(recommended(model), **{name: value for name, value in given.items() if value is not None})
    seed = runtime.default_seed if seed is None else seed
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is a whole number, 1 or more. Received: epochs={epochs!r}")
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate is positive. Received: {settings.learning_rate!r}")
    check_only_adapters_train(model)

    options = {"template": settings.template, "sequence_length": settings.sequence_length, "loss_on": loss_on}
    encoded = encode(model, train, **options)
    batches = Batches(encoded, batch_size=settings.batch_size, seed=seed)
    held_out = encode(model, validation, **options) if validation is not None and len(validation) else None
    run = {
        "rows": len(encoded.examples),
        "tokens": int(encoded.lengths.sum()),
        "epochs": epochs,
        **{name: getattr(settings, name) for name in given},
        "template": get_template(settings.template).name,
        "loss_on": loss_on,
        "seed": seed,
    }
    if verbose != 0:
        shown = ", ".join(f"{name}={value}" for name, value in run.items())
        print(textwrap.fill(f"One epoch is {len(batches):,} steps. {shown}", width=100))
        for name, part in (("training", encoded), ("validation", held_out)):
            if part is not None and (part.truncated or part.dropped):
                print(
                    f"Of the {name} records, {part.truncated:,} were cut to {settings.sequence_length} tokens and "
                    f"{part.dropped:,} left out, as their prompt alone is longer."
                )

    trainer = trainer_of(model)
    trainer.compile(optimizer=optimizer_for(settings))
    curve = LossCurve(batches)
    start = time.monotonic()
    shape = {"batch_size": settings.batch_size, "sequence_length": batches.lengths[-1]}
    with explained_out_of_memory(model, answering=False, **shape), restored_if_lost(trainer), stop_after_step(trainer):
        history = trainer.fit(
            batches,
            validation_data=None if held_out is None else Batches(held_out, batch_size=settings.batch_size),
            epochs=epochs,
            callbacks=[curve, *callbacks],
            shuffle=False,  # Batches shuffles, by the seed; Keras would draw from Python's global generator
            verbose=verbose,
        )
    history.curve = curve.points
    state.run = run | {
        "template": get_template(settings.template),
        "epochs": len(history.epoch),
        "truncated": encoded.truncated,
        "dropped": encoded.dropped,
        "seconds": round(time.monotonic() - start, 1),
        "history": {name: [float(value) for value in values] for name, values in history.history.items()},
    }
    return history


def check_only_adapters_train(model) -> None:
    """Raise a ValueError unless the model's trainable weights are its adapters, all of them."""
    adapters = {weight.path for weight in adapter_weights(model)}
    if not adapters:
        raise ValueError("The model has no adapters to train. Call gl.enable_lora(model, rank=4) first.")
    training = {weight.path for weight in model.trainable_variables}
    extra, frozen = training - adapters, adapters - training
    if extra or frozen:
        wrong = f"{len(extra):,} base weights do too" if extra else f"{len(frozen):,} of them are frozen"
        raise ValueError(
            f"Only the adapters should train, but {wrong}: {min(extra or frozen)!r} is one. Setting `trainable` on a "
            "model does that. Call gl.enable_lora() again, with the options it had: it freezes the base anew."
        )


@contextmanager
def restored_if_lost(trainer: keras.Model) -> Iterator[None]:
    """If a step fails and takes the weights with it, put back those from before: on JAX a step overwrites its input."""
    frozen = [(variable, variable.value) for variable in trainer.non_trainable_variables]
    own = [(variable, ops.copy(variable.value)) for variable in trainer.trainable_variables]
    try:
        yield
    except BaseException:
        if any(_is_lost(variable) for variable, _ in [*frozen, *own]):
            for variable, value in [*frozen, *own]:
                variable.assign(value)
        raise


def _is_lost(variable: keras.Variable) -> bool:
    try:
        variable._value.block_until_ready()  # Keras takes values away while it trains, and a failed step's raise here
        return False
    except Exception:
        return True


@contextmanager
def stop_after_step(trainer: keras.Model) -> Iterator[None]:
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
