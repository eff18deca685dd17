"""Train the adapters: one epoch or many, with validation, and a record of what was run.

`fit` settles the options, `_run` keeps the record, and `_train` is the loop: it reads
from a batch to a Keras `History`. What a step computes is in `loss`; how records become
batches is in `tokens` and `batches`; what a run shows and saves is in `progress` and
`checkpoints`.
"""

import hashlib
import math
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import keras
from keras.callbacks import Callback
from keras_hub.models import CausalLM

from gemma_lora import runtime
from gemma_lora.batches import Batches
from gemma_lora.checkpoints import Checkpoint, Checkpoints
from gemma_lora.lora import adapter_weights, adapters_off, adopt, check_not_empty, fingerprints
from gemma_lora.loss import (
    TrainState,
    averages,
    copied,
    frozen_values,
    measuring_step,
    optimizer_for,
    start_state,
    training_step,
)
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import (
    Run,
    Settings,
    check_text_alone,
    counted_epochs,
    one_at_a_time,
    recommended,
    state_of,
    template_of,
)
from gemma_lora.options import is_number, whole_number, with_options
from gemma_lora.progress import LossCurve, Progress
from gemma_lora.records import Records, as_records
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import Encoded, encode


class History(ShowsAsTable, keras.callbacks.History):
    """Keras's record of a run, which shows as a table.

    Attributes:
        history: Values by name, one for each epoch: "loss" in nats a token that counts,
            "accuracy", and "val_loss" and "val_accuracy" with held-out records.
        curve: Pairs of (epochs done, training loss since the point before), 20 an
            epoch.
    """

    curve: list[tuple[float, float]] = ()

    def table(self) -> Table:
        """Return a row for each epoch."""
        rows = []
        for place, epoch in enumerate(self.epoch):
            row = {"epoch": epoch + 1}
            for name, values in self.history.items():
                row[name.replace("val_", "held-out ")] = values[place]
            rows.append(row)
        return Table(rows)


@with_options
@one_at_a_time
def fit(
    model: CausalLM,
    train: Records,
    *,
    validation: Records | None = None,
    epochs: int = 1,
    learning_rate: float | None = None,
    sequence_length: int | None = None,
    batch_tokens: int | None = None,
    template: str | Template | None = None,
    seed: int | None = None,
    checkpoint_dir: str | Path | None = None,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    loss_on: Literal["response", "all"] = "response",
    checkpoint_every: int = 100,
    callbacks: Callback | Sequence[Callback] = (),
    verbose: Literal["auto", 0, 1, 2] = "auto",
) -> History:
    """Train a model's adapters, and only them.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> _ = gl.enable_lora(model, rank=4)
    >>> rows = [{"question": "Why?", "answer": "So."}]
    >>> history = gl.fit(model, rows, epochs=2, verbose=0)
    >>> history.table().columns
    ['epoch', 'accuracy', 'loss']

    What is left out is as `recommended(model)` says; the first line shows it all.
    Ctrl-C ends training after a step and leaves a usable model. Called again, `fit`
    goes on training the same adapters. The published recipe is `fit(model, train,
    batch_size=1, sequence_length=256, loss_on="all")`.

    Args:
        model: A model with adapters, from `enable_lora`.
        train: Records to learn from: what `load_records` returns, or what it reads.
        validation: Records to measure the loss on after each epoch.
        epochs: How often every record is learned from.
        learning_rate: AdamW's, the same for the whole run.
        sequence_length: Most tokens of prompt and response. Longer responses are cut.
        batch_tokens: Tokens a step. Short records share a row, unseen by each other.
        template: Name of a template, or a `Template`, for prompts here and later in
            `generate`. None keeps that of an adapter trained before, or loaded.
        seed: Order of the records. None means the seed of `gl.setup`.
        checkpoint_dir: A folder for checkpoints. The same call goes on from the newest.

        batch_size: Rarely needed, as all below: records a step, whatever their length,
            instead of `batch_tokens`.
        weight_decay: AdamW's. Biases and norm scales are not decayed.
        loss_on: "response", or "all" to learn the prompt as well.
        checkpoint_every: Steps from one checkpoint to the next.
        callbacks: Keras callbacks. During the run, `model.optimizer` is the run's own.
        verbose: "auto" shows a bar, or lines in a log; 2 a line an epoch; 0 nothing.

    Returns:
        A Keras `History` of loss and accuracy per token that counts, which shows as a
        table and has the loss curve as its attribute `curve`.

    Raises:
        ValueError: An option or a record is invalid, there are no adapters, or a base
            weight is trainable.
        MemoryError: Memory ran out. The message names settings that should fit.
        FloatingPointError: The loss became NaN or infinite.
    """
    check_only_adapters_train(model)
    chosen = {"template": template, "sequence_length": sequence_length}
    chosen |= {"batch_tokens": batch_tokens, "learning_rate": learning_rate}
    chosen |= {"weight_decay": weight_decay}
    epochs = whole_number("epochs", epochs)
    settings = _settings(model, chosen, batch_size)
    seed = runtime.checked_seed(seed)
    _check_display(verbose)
    callbacks = _checked_callbacks(callbacks)
    data = _prepare(model, train, validation, settings, batch_size, loss_on, seed)
    run = _record(data, settings, epochs, batch_size, loss_on, seed)
    if verbose != 0:
        _announce(run, data)
    kept = None if checkpoint_dir is None else (checkpoint_dir, checkpoint_every)
    return _run(model, data, settings, run, callbacks, kept, verbose)


def _run(
    model,
    data: "_Data",
    settings: Settings,
    run: dict,
    callbacks: Sequence[Callback],
    kept: tuple[str | Path, int] | None,
    verbose: int | str,
) -> History:
    """Train as `run` says, and attach the record of it to the model."""
    started = time.monotonic()
    epochs = run["epochs"]
    earlier = _epochs_so_far(model)
    optimizer = optimizer_for(settings)
    begin = Checkpoint(0, 0, {}, None, start_state(model, optimizer))
    checkpoints = None
    if kept is not None:
        folder, every = kept
        which = _same_run(model, run, data.encoded)
        checkpoints = Checkpoints(folder, which, begin.state, every=every, earlier=earlier)
        begin = checkpoints.newest() or begin
        earlier = checkpoints.earlier
    if earlier and verbose != 0 and (begin.epoch, begin.step) == (0, 0):
        print(f"Before, these adapters were trained for {counted_epochs(earlier)}. They go on.")
    curve = LossCurve(data.batches, begin.curve)
    progress = Progress(data.batches, curve, epochs=epochs, verbose=verbose)
    shape = dict(zip(("batch_size", "sequence_length"), data.batches.shape, strict=True))
    with explained_out_of_memory(model, answering=False, **shape), _ctrl_c() as pressed:
        params = {"epochs": epochs, "steps": len(data.batches), "verbose": 0}
        live = _Live(model, optimizer, begin.state, callbacks, params, pressed)
        try:
            history = _train(live, data, begin, epochs, (curve, progress, checkpoints))
        except BaseException:
            if live.kept:
                # Adapters that have learned from prompts must be asked like them.
                _attach(model, run, settings, live.steps, data, earlier)
            raise
        if "val_loss" in history.history and not pressed:
            run |= _before_and_after(live, data.held_out_batches)
    _attach(model, run, settings, live.steps, data, earlier)
    state_of(model).run |= {
        "truncated": data.encoded.truncated,
        "dropped": data.encoded.dropped,
        "seconds": round(time.monotonic() - started, 1),
        "history": {name: [*map(float, values)] for name, values in history.history.items()},
    }
    return history


def _attach(model, run: dict, settings: Settings, steps: int, data: "_Data", earlier) -> None:
    """Attach a run's record to its model, with what was really done."""
    done = steps / data.batches.steps_an_epoch
    really = {"epochs": int(done) if done.is_integer() else round(done, 4), "steps": steps}
    if earlier:
        really["earlier_epochs"] = earlier
    template = {"template": get_template(settings.template)}
    state_of(model).run = Run(run | template | really)


def _train(
    live: "_Live",
    data: "_Data",
    begin: Checkpoint,
    epochs: int,
    watchers: tuple[LossCurve, Progress, Checkpoints | None],
) -> History:
    """Run the loop from `begin` to the last epoch, and return the history."""
    curve, progress, checkpoints = watchers
    step = training_step(live.model, live.optimizer)
    frozen = frozen_values(live.model)
    first = begin.step
    steps_run = 0
    live.steps = begin.epoch * data.batches.steps_an_epoch + begin.step
    with live:
        live.tell("on_train_begin")
        live.history.epoch = [*range(begin.epoch)]
        live.history.history = begin.history
        for epoch in range(begin.epoch, epochs):
            data.batches.start(epoch, step=first)
            if first == 0:
                # Else the epoch is resumed, and goes on with its sums.
                live.state = live.state._replace(sums=jnp.zeros(3))
            curve.start_epoch(epoch)
            progress.start_epoch(epoch)
            live.tell("on_epoch_begin", epoch)
            done = first
            for batch in data.batches:
                live.tell("on_train_batch_begin", done)
                _wait_for_step_before(live.state.sums, steps_run)
                steps_run += 1
                live.state, changed = step(*live.state, frozen, batch)
                for index, value in changed.items():
                    frozen[index] = value
                live.steps += 1
                curve.after_step(live.state.sums)
                progress.after_step()
                live.tell("on_train_batch_end", done, live.logs())
                done += 1
                if checkpoints and done % checkpoints.every == 0:
                    checkpoints.save(live.checkpoint(epoch, done, curve))
                if live.stopped:
                    break
            curve.end_epoch()
            logs = averages(live.state.sums)
            if data.held_out_batches and not live.pressed:
                logs |= _validate(live, data.held_out_batches)
            progress.end_epoch(logs)
            live.tell("on_epoch_end", epoch, logs)
            if checkpoints:
                complete = done == data.batches.steps_an_epoch
                place = (epoch + 1, 0) if complete else (epoch, done)
                checkpoints.save(live.checkpoint(*place, curve))
            if live.stopped:
                break
            first = 0
        live.tell("on_train_end")
    live.history.curve = curve.points
    return live.history


class _Live:
    """A run's state, and what the model and Keras callbacks get to see of it.

    Each step overwrites the state in place. So while a run goes on, the model keeps the
    adapters from before; callbacks are shown copies. As a context, it gives the model
    the new adapters at the end, or, where a step has failed, leaves it the old ones.

    Attributes:
        state: What the last step left.
        history: Keras's record of the run.
        pressed: Not empty once Ctrl-C was pressed.
        steps: Steps that are done, those before a resumption included.
        kept: At the end, whether the model has what the steps have learned.
    """

    def __init__(self, model, optimizer, state: TrainState, callbacks, params: dict, pressed: list):
        self.model = model
        self.optimizer = optimizer
        self.state = state
        self.pressed = pressed
        self.history = History()
        self.steps = 0
        self.kept = False
        self.callbacks = [*callbacks]
        self._heard: dict[str, bool] = {}
        hooks = [*callbacks, self.history]
        self._hooks = keras.callbacks.CallbackList(hooks, model=model, **params)
        self._adapters_before = [variable.value for variable in model.trainable_variables]
        self._optimizer_before = getattr(model, "optimizer", None)

    def __enter__(self):
        self.model.stop_training = False
        # Callbacks that change the learning rate look for it here.
        self.model.optimizer = self.optimizer
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.model.optimizer = self._optimizer_before
        # A step that failed may have taken its arguments along.
        failed = error is not None and not _are_usable(self.state.adapters)
        diverged = isinstance(error, FloatingPointError)
        lost = failed or diverged
        self.kept = not lost and self.steps > 0
        adapters = self._adapters_before if lost else self.state.adapters
        _assign(self.model.trainable_variables, adapters)

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C or a callback asks for an end."""
        return bool(self.pressed) or self.model.stop_training

    def tell(self, hook: str, *arguments) -> None:
        """Call a hook of every callback, and take over what it changed."""
        heard = self.hears(hook)
        if heard:
            shown = copied(self.state)
            _assign(self.model.trainable_variables, shown.adapters)
            _assign(self.optimizer.variables, shown.moments)
        getattr(self._hooks, hook)(*arguments)
        if heard:
            sums = self.state.sums
            self.state = start_state(self.model, self.optimizer)._replace(sums=sums)

    def hears(self, hook: str) -> bool:
        """Whether a callback does anything at a hook. Most do nothing at each step."""
        if hook not in self._heard:
            # Keras's on_train_batch_end calls on_batch_end, which is older.
            names = (hook, hook.replace("train_batch", "batch"))
            methods = [getattr(callback, name) for callback in self.callbacks for name in names]
            inherited = [getattr(keras.callbacks.Callback, name) for name in names]
            functions = [getattr(method, "__func__", method) for method in methods]
            self._heard[hook] = any(function not in inherited for function in functions)
        return self._heard[hook]

    def logs(self) -> dict[str, float] | None:
        """Return the epoch's averages; None if nobody asks, as reading them waits."""
        return averages(self.state.sums) if self.hears("on_train_batch_end") else None

    def checkpoint(self, epoch: int, step: int, curve: LossCurve) -> Checkpoint:
        """Return where the run stands, with the history of complete epochs."""
        history = {name: values[:epoch] for name, values in self.history.history.items()}
        return Checkpoint(epoch, step, history, curve.saved(epoch, step), self.state)


def _validate(live: _Live, batches: Batches) -> dict[str, float]:
    """Measure a run's held-out loss; {} if Ctrl-C was pressed meanwhile."""
    live.tell("on_test_begin")
    adapters = live.state.adapters
    measured = measure_loss(
        live.model, batches, adapters=adapters, pressed=live.pressed, tell=live.tell
    )
    logs = {f"val_{name}": value for name, value in measured.items()}
    if logs:
        live.tell("on_test_end", logs)
    return logs


def measure_loss(
    model,
    batches: Batches,
    *,
    adapters: list | None = None,
    pressed: Sequence = (),
    tell: Callable = lambda hook, *arguments: None,
) -> dict[str, float]:
    """Measure loss (nats a token) and accuracy on batches.

    Args:
        model: The model.
        batches: What to measure on.
        adapters: Values for `model.trainable_variables`. None takes the model's own.
        pressed: Ends the measuring once it is not empty.
        tell: Called before and after each batch, as in `_Live.tell`.

    Returns:
        {"loss": ..., "accuracy": ...}, or {} if it was ended: the loss of some of the
        records would be a wrong number.
    """
    step = measuring_step(model)
    if adapters is None:
        adapters = [variable.value for variable in model.trainable_variables]
    frozen = frozen_values(model)
    sums = jnp.zeros(3)
    for index, batch in enumerate(batches):
        tell("on_test_batch_begin", index)
        _wait_for_step_before(sums, index)
        sums = step(sums, adapters, frozen, batch)
        tell("on_test_batch_end", index)
        if pressed:
            return {}
    return averages(sums)


def _before_and_after(live: _Live, batches: Batches) -> dict[str, dict[str, float]]:
    """Measure the held-out loss of base and tuned; {} once Ctrl-C was pressed."""
    tuned = live.history.history["val_loss"][-1]
    if live.callbacks:
        # A callback may have put back the weights of an earlier epoch.
        tuned = measure_loss(live.model, batches, pressed=live.pressed).get("loss")
    with adapters_off(live.model):
        base = measure_loss(live.model, batches, pressed=live.pressed).get("loss")
    return {} if live.pressed else {"held_out_loss": {"base": base, "tuned": tuned}}


def _wait_for_step_before(sums, count: int) -> None:
    """On a CPU, wait for a step before the next begins; `count` steps have begun.

    The next one can then have its scratch memory, and no second one is needed. The C
    library may have put something small into it. So at the beginning, and now and then,
    what is left over goes back to the system. The step after that is slower.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(sums)
        if count < 4 or count % 100 == 0:
            runtime.return_memory()


def _are_usable(arrays: list) -> bool:
    """Whether arrays hold values: no failed step was given them or computed them."""
    try:
        jax.block_until_ready(arrays)
    except Exception:
        return False
    return not any(array.is_deleted() for array in arrays)


def _assign(variables: list[keras.Variable], values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


@contextmanager
def _ctrl_c() -> Iterator[list]:
    """Yield a list that Ctrl-C fills, so that a run ends between two steps.

    Python allows signal handlers in the main thread only. Elsewhere nothing is caught.
    """
    pressed = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def stop(signum, frame):
        pressed.append(True)
        print("\nStopping after this step. The model stays usable.")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Data:
    """Records as a run needs them. Without validation, the held-out ones are None."""

    encoded: Encoded
    batches: Batches
    held_out: Encoded | None
    held_out_batches: Batches | None


def _prepare(model, train, validation, settings: Settings, batch_size, loss_on, seed) -> _Data:
    """Encode the records and put them into batches."""
    options = {
        "template": settings.template,
        "sequence_length": settings.sequence_length,
        "loss_on": loss_on,
    }
    size = {"batch_size": batch_size, "batch_tokens": settings.batch_tokens}
    encoded = encode(model, train, **options)
    data = _Data(encoded, Batches(encoded, **size, seed=seed), None, None)
    if is_number(validation) or isinstance(validation, bool):
        raise ValueError(
            f"validation holds records, not a share of them. Received: validation={validation!r}. "
            "train, held_out = gl.load_records(rows, held_out=0.1) splits them."
        )
    held_out = None if validation is None else [*as_records(validation)]
    if held_out:
        data.held_out = encode(model, held_out, **options)
        data.held_out_batches = Batches(data.held_out, **size)
    return data


def _settings(model, chosen: dict, batch_size: int | None) -> Settings:
    """Return what is recommended for a model, with what the caller chose instead."""
    batch_tokens = chosen["batch_tokens"]
    if batch_size is not None and batch_tokens is not None:
        raise ValueError(
            "Choose one of batch_size and batch_tokens. Received: "
            f"batch_size={batch_size!r}, batch_tokens={batch_tokens!r}"
        )
    if chosen["template"] is None:
        chosen["template"] = template_of(model)
    given = {name: value for name, value in chosen.items() if value is not None}
    for name in ("learning_rate", "weight_decay"):
        if name in given and not is_number(given[name]):
            raise ValueError(
                f"{name} is a number, the same for the whole run, such as "
                f"{getattr(recommended(model), name):g}. Received: {given[name]!r:.80}"
            )
    settings = replace(recommended(model), **given)
    if not 0 < settings.learning_rate < math.inf:
        raise ValueError(f"learning_rate is positive. Received: {settings.learning_rate!r}")
    if not 0 <= settings.weight_decay < math.inf:
        raise ValueError(f"weight_decay is 0 or more. Received: {settings.weight_decay!r}")
    # NumPy's numbers would not go into the record of the run.
    plain = {name: float(getattr(settings, name)) for name in ("learning_rate", "weight_decay")}
    for name, least in (("batch_tokens", 1), ("sequence_length", 2)):
        plain[name] = whole_number(name, getattr(settings, name), least=least)
    return replace(settings, **plain)


def _record(data: _Data, settings: Settings, epochs: int, batch_size, loss_on, seed) -> dict:
    """Return what is known of a run before it begins, in JSON's types."""
    size = {"batch_tokens": settings.batch_tokens}
    if batch_size is not None:
        size = {"batch_size": int(batch_size)}
    return {
        "rows": len(data.encoded.examples),
        "tokens": int(data.encoded.lengths.sum()),
        "epochs": epochs,
        **size,
        "sequence_length": settings.sequence_length,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "template": get_template(settings.template).name,
        "loss_on": loss_on,
        "seed": seed,
    }


def _announce(run: dict, data: _Data) -> None:
    """Print a run's settings, and how many records were cut or left out."""
    shown = ", ".join(f"{name}={value}" for name, value in run.items())
    print(textwrap.fill(f"One epoch is {len(data.batches):,} steps. {shown}", width=100))
    for name, part in (("training", data.encoded), ("validation", data.held_out)):
        if part is not None and (part.truncated or part.dropped):
            print(
                f"Of the {name} records, {part.truncated:,} were cut to "
                f"{run['sequence_length']} tokens and {part.dropped:,} left out, as their prompt "
                "alone is longer."
            )


def _same_run(model, run: dict, encoded: Encoded) -> dict:
    """Return what two calls must share for one to resume the other's run."""
    shapes = [(weight.path, *weight.shape) for weight in adapter_weights(model)]
    contents = {
        "base": fingerprints(model),
        "adapters": shapes,
        "content of the rows": encoded.examples,
    }
    sums = {
        name: hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        for name, content in contents.items()
    }
    # A run of more epochs goes on from one of fewer.
    options = {name: value for name, value in run.items() if name != "epochs"}
    return options | sums


def _epochs_so_far(model) -> float:
    """Return how many epochs the adapters on a model were trained for."""
    state = state_of(model)
    merged = state.merged.run if state.merged else None
    if state.run is None or state.run is merged:
        return 0
    return state.run["epochs"] + state.run.get("earlier_epochs", 0)


def _check_display(verbose) -> None:
    if type(verbose) not in (str, int) or verbose not in ("auto", 0, 1, 2):
        raise ValueError(f'verbose is "auto", 0, 1 or 2. Received: verbose={verbose!r:.80}')


def _checked_callbacks(callbacks) -> list[Callback]:
    """Return callbacks as a list; a single one may stand by itself."""
    several = isinstance(callbacks, list | tuple)
    callbacks = [*callbacks] if several else [callbacks]
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ValueError(
                "BackupAndRestore would load its file into the frozen base. gl.fit resumes by "
                "itself: checkpoint_dir='a folder' takes its place."
            )
        if not isinstance(callback, Callback):
            raise ValueError(
                "callbacks holds objects of keras.callbacks, such as EarlyStopping(). Received: "
                f"{callback!r:.80}"
            )
    return callbacks


def check_only_adapters_train(model) -> None:
    """Check that a model's trainable weights are its adapters, all of them.

    Raises:
        ValueError: There are no adapters, one is frozen, or a base weight trains.
    """
    check_text_alone(model)
    adopt(model)
    adapters = {weight.path for weight in adapter_weights(model)}
    if not adapters:
        raise ValueError(
            "The model has no adapters to train. Call gl.enable_lora(model, rank=4) first."
        )
    check_not_empty(model)
    training = {weight.path for weight in model.trainable_variables}
    extra = training - adapters
    frozen = adapters - training
    if extra or frozen:
        wrong = f"{len(extra):,} base weights do too" if extra else f"{len(frozen):,} are frozen"
        raise ValueError(
            f"Only the adapters should train, but {wrong}: {min(extra or frozen)!r} is one. "
            "Setting `trainable` on a model does that. Call gl.enable_lora() again with the "
            "options it had: it freezes the base."
        )
