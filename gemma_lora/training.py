"""Train the adapters: one epoch or many, validation, and a record of what was run."""

import hashlib
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import keras
from keras import ops

from gemma_lora import runtime
from gemma_lora.batches import Batches
from gemma_lora.checkpoints import Checkpoints
from gemma_lora.lora import adapter_weights, adapters_off, fingerprints
from gemma_lora.loss import optimizer_for, stop_after_step, trainer_of
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import recommended, state_of, template_of
from gemma_lora.progress import LossCurve, Progress
from gemma_lora.templates import get_template
from gemma_lora.tokens import Encoded, encode


def fit(
    model,
    train,
    *,
    validation=None,
    template=None,
    epochs: int = 1,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    loss_on: str = "response",
    seed: int | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    callbacks=(),
    verbose: int | str = "auto",
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
            None goes on with that of an adapter which was trained before, or loaded.
        epochs: How often every record is learned from.
        batch_tokens: Tokens a step. Short records share a row, and none sees another of it.
        batch_size: Records a step, whatever their length. None leaves it to `batch_tokens`.
        sequence_length: Most tokens of prompt and response together; longer responses are cut, and counted.
        learning_rate, weight_decay: Of AdamW; biases and norm scales are not decayed, as in the recipe.
        loss_on: "response", or "all" to learn the prompt too.
        seed: Order of the records. None means the seed of `gl.setup`.
        checkpoint_dir: A folder for checkpoints. The same call again goes on from the newest, to the same adapter.
        checkpoint_every: Steps from one checkpoint to the next.
        callbacks: As in Keras `fit`; their `model` is the trainer, which has the model's own layers.
        verbose: "auto" shows real tokens a second, loss and time left as it suits a notebook, a terminal or a log; 2 a
            line after each epoch; 0 nothing.
    """
    state = state_of(model)
    if batch_size and batch_tokens:
        raise ValueError(
            f"Choose one of batch_size and batch_tokens. Received: {batch_size!r} and {batch_tokens!r}"
        )
    given = {"template": template, "sequence_length": sequence_length, "batch_tokens": batch_tokens}
    given |= {"learning_rate": learning_rate, "weight_decay": weight_decay}
    given["template"] = template or template_of(model)
    settings = replace(
        recommended(model), **{name: value for name, value in given.items() if value is not None}
    )
    seed = runtime.default_seed if seed is None else seed
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is a whole number, 1 or more. Received: epochs={epochs!r}")
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate is positive. Received: {settings.learning_rate!r}")
    check_only_adapters_train(model)

    options = {
        "template": settings.template,
        "sequence_length": settings.sequence_length,
        "loss_on": loss_on,
    }
    encoded = encode(model, train, **options)
    size = {"batch_size": batch_size, "batch_tokens": settings.batch_tokens}
    batches = Batches(encoded, **size, seed=seed)
    held_out = (
        encode(model, validation, **options) if validation is not None and len(validation) else None
    )
    run = {
        "rows": len(encoded.examples),
        "tokens": int(encoded.lengths.sum()),
        "epochs": epochs,
        **({"batch_size": batch_size} if batch_size else {}),
        **{
            name: getattr(settings, name)
            for name in given
            if not (batch_size and name == "batch_tokens")
        },
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
    curve, epoch, step, history, saved = LossCurve(batches), 0, 0, keras.callbacks.History(), None
    if checkpoint_dir is not None:
        same = {**run, **fingerprint(model, encoded)}
        same.pop("epochs")  # more of them go on from fewer
        saved = Checkpoints(
            checkpoint_dir, trainer, batches, run=same, curve=curve, every=checkpoint_every
        )
        saved.resume()
        epoch, step, history.history = saved.epoch, saved.step, saved.history
    history.epoch = [*range(epoch)]
    start, progress = time.monotonic(), Progress(batches, curve, epochs=epochs, verbose=verbose)

    def after_step(logs, arrays):
        curve.after_step(logs)
        progress.after_step()
        if saved:
            saved.after_step(arrays)

    trainer.after_step = after_step
    options = {
        "validation_data": None if held_out is None else Batches(held_out, **size),
        "callbacks": [curve, *([saved] if saved else []), progress, *callbacks],
        "shuffle": False,  # Batches shuffles, by the seed; Keras would draw from Python's global generator
        "verbose": 0,
    }
    shape = dict(zip(("batch_size", "sequence_length"), batches.shape, strict=True))
    with (
        explained_out_of_memory(model, answering=False, **shape),
        restored_if_lost(trainer),
        stop_after_step(trainer),
    ):
        trainer.stop_training = False
        while epoch < epochs and not trainer.stop_training:
            batches.start(epoch, step=step)
            last = (
                epoch + 1 if step else epochs
            )  # an epoch of which a part was done before has a length of its own
            done = trainer.fit(batches, initial_epoch=epoch, epochs=last, **options)
            history.epoch += done.epoch
            for name, values in done.history.items():
                history.history[name] = (
                    history.history.get(name, [])[: len(history.epoch) - len(values)] + values
                )
            epoch, step = last, 0
        if held_out and "val_loss" in history.history and not trainer.stop_training:
            tuned = history.history["val_loss"][-1]
            if callbacks:  # one may have put back the weights of an earlier epoch
                tuned = trainer.evaluate(options["validation_data"], verbose=0, return_dict=True)[
                    "loss"
                ]
            with adapters_off(model):
                base = trainer.evaluate(options["validation_data"], verbose=0, return_dict=True)[
                    "loss"
                ]
            if not trainer.stop_training:  # else: Ctrl-C, and the loss of a part
                run["held_out_loss"] = {"base": float(base), "tuned": float(tuned)}
    history.curve = curve.points
    state.run = run | {
        "template": get_template(settings.template),
        "epochs": len(history.epoch),
        "truncated": encoded.truncated,
        "dropped": encoded.dropped,
        "seconds": round(time.monotonic() - start, 1),
        "history": {
            name: [float(value) for value in values] for name, values in history.history.items()
        },
    }
    return history


def fingerprint(model, encoded: Encoded) -> dict[str, str]:
    """Short sums that tell base models, adapters and rows apart."""
    shapes = [(weight.path, *weight.shape) for weight in adapter_weights(model)]
    contents = {"base": repr(fingerprints(model)).encode(), "adapters": repr(shapes).encode()}
    contents["content of the rows"] = repr(encoded.examples).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents.items()}


def check_only_adapters_train(model) -> None:
    """Raise a ValueError unless the model's trainable weights are its adapters, all of them."""
    adapters = {weight.path for weight in adapter_weights(model)}
    if not adapters:
        raise ValueError(
            "The model has no adapters to train. Call gl.enable_lora(model, rank=4) first."
        )
    training = {weight.path for weight in model.trainable_variables}
    extra, frozen = training - adapters, adapters - training
    if extra or frozen:
        wrong = (
            f"{len(extra):,} base weights do too"
            if extra
            else f"{len(frozen):,} of them are frozen"
        )
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
    except BaseException as error:
        if isinstance(error, FloatingPointError) or any(
            _is_lost(variable) for variable, _ in [*frozen, *own]
        ):
            for variable, value in [*frozen, *own]:
                variable.assign(value)
        raise


def _is_lost(variable: keras.Variable) -> bool:
    try:
        variable._value.block_until_ready()  # Keras takes values away while it trains, and a failed step's raise here
        return False
    except Exception:
        return True
