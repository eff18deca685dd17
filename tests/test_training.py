import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from families import EACH_FAMILY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemma_lora as gl
from gemma_lora import loss, training
from gemma_lora.batches import Batches
from gemma_lora.lora import lora_layers
from gemma_lora.loss import averages, frozen_values, measuring_step
from gemma_lora.tokens import encode
from gemma_lora.training import measure_loss

DOLLY = Path(__file__).parents[2] / "shared/data/dolly_open_qa_3000.jsonl"


@pytest.fixture(scope="module")
def world():
    train, held_out = gl.load_tiny_world()
    return train.select(range(64)), held_out.select(range(16))


def weights_of(model) -> dict[str, np.ndarray]:
    return {weight.path: np.asarray(weight).copy() for weight in model.weights}


def token_losses(model, encoded) -> np.ndarray:
    """Cross-entropy of each token that counts, in NumPy, row by row.

    Every row is padded behind its end, so that one shape serves all; no token sees what
    comes after it.
    """
    losses = []
    for inputs, targets, weights in encoded.examples:
        ids = np.zeros((1, int(encoded.lengths.max())), "int32")
        ids[0, : len(inputs)] = inputs
        logits = np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        logits = logits[0, : len(inputs)].astype("float64")
        highest = logits.max(-1, keepdims=True)
        log_sums = np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        log_probabilities = logits - highest - log_sums
        losses += [-log_probabilities[i, target] for i, target in enumerate(targets) if weights[i]]
    return np.array(losses)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_one_epoch_lowers_the_loss_of_each_family(random_model, world, family):
    model = random_model(family)
    gl.enable_lora(model, rank=8, targets="all_linear")
    history = gl.fit(model, world[0], epochs=3, batch_size=8, learning_rate=2e-2, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_loss_is_the_mean_over_real_tokens_whatever_the_batches(tiny, world):
    """The loss is the plain mean over response tokens: no padding, no batches."""
    expected = token_losses(tiny, encode(tiny, world[1])).mean()
    for batch_size in (3, 16):
        batches = Batches(encode(tiny, world[1]), batch_size=batch_size)
        assert measure_loss(tiny, batches)["loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_loss_is_that_of_evaluate(tiny_lora, world):
    history = gl.fit(tiny_lora, world[0], validation=world[1], verbose=0)
    measured = gl.evaluate(tiny_lora, world[1], answers=False)
    assert history.history["val_loss"][-1] == pytest.approx(measured.loss, rel=1e-6)
    assert history.history["val_accuracy"][-1] == pytest.approx(measured.token_accuracy, rel=1e-6)


def test_the_base_is_the_same_bit_for_bit_and_every_adapter_moves(tiny_lora, world):
    before = weights_of(tiny_lora)
    gl.fit(tiny_lora, world[0], verbose=0)
    for path, value in weights_of(tiny_lora).items():
        assert np.array_equal(value, before[path]) != ("lora" in path), path


def test_the_same_seed_gives_the_same_adapter_and_another_gives_another(tiny_factory, world):
    results = []
    for seed in (0, 0, 1):
        model = tiny_factory()
        gl.enable_lora(model, seed=0)
        gl.fit(model, world[0], seed=seed, verbose=0)
        results.append(np.asarray(next(iter(lora_layers(model).values())).lora_kernel_b))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_what_was_run_is_attached_and_shown(tiny_lora, world, capsys):
    gl.fit(tiny_lora, world[0], validation=world[1], verbose=2)
    out = capsys.readouterr().out
    assert out.startswith("One epoch is 17 steps. rows=64,")
    assert "learning_rate=0.005" in out
    assert max(map(len, out.splitlines()[:2])) <= 100
    run = tiny_lora.gemma_lora.run
    assert (run["rows"], run["epochs"], run["template"].name, run["seed"]) == (64, 1, "recipe", 0)
    assert run["history"]["val_loss"][0] > 0


def test_the_published_recipe_is_one_call_away(tiny_lora, world):
    gl.fit(
        tiny_lora,
        world[0].select(range(4)),
        batch_size=1,
        sequence_length=512,
        loss_on="all",
        verbose=0,
    )
    assert tiny_lora.gemma_lora.run["loss_on"] == "all"


def test_truncation_is_reported(tiny_lora, world, capsys):
    gl.fit(tiny_lora, world[0], sequence_length=40, verbose=2)
    assert "were cut to 40 tokens" in capsys.readouterr().out
    assert tiny_lora.gemma_lora.run["truncated"] > 0


def test_without_adapters_it_says_what_to_call(tiny, world):
    with pytest.raises(ValueError, match=r"gl\.enable_lora"):
        gl.fit(tiny, world[0])


def test_a_base_that_would_train_is_refused(tiny_lora, world):
    tiny_lora.trainable = True
    with pytest.raises(ValueError, match="base weights do too"):
        gl.fit(tiny_lora, world[0])


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"batch_size": 0}, {"loss_on": "answer"}]
)
def test_wrong_options_are_refused_before_anything_changes(tiny_lora, world, wrong):
    before = weights_of(tiny_lora)
    with pytest.raises(ValueError, match="Received"):
        gl.fit(tiny_lora, world[0], **wrong)
    assert all(np.array_equal(value, before[path]) for path, value in weights_of(tiny_lora).items())


def test_keras_callbacks_work(tiny_lora, world):
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: seen.append(logs["loss"])
    )
    gl.fit(tiny_lora, world[0], callbacks=[callback], verbose=0)
    assert len(seen) == len(Batches(encode(tiny_lora, world[0]), batch_tokens=224))


def test_the_record_is_of_the_weights_that_a_callback_put_back(tiny_lora, world):
    best = keras.callbacks.EarlyStopping("val_loss", patience=9, restore_best_weights=True)
    worse = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 if epoch else 5e-3)
    options = {"validation": world[1], "epochs": 2, "callbacks": [best, worse], "verbose": 0}
    losses = gl.fit(tiny_lora, world[0], **options).history["val_loss"]
    assert min(losses) < losses[-1]
    assert tiny_lora.gemma_lora.run["held_out_loss"]["tuned"] == pytest.approx(min(losses), 1e-5)


def test_ctrl_c_leaves_a_usable_model_and_a_history(tiny_lora, world):
    interrupt = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: (
            os.kill(os.getpid(), signal.SIGINT) if step == 1 else None
        )
    )
    history = gl.fit(
        tiny_lora, world[0], validation=world[1], epochs=50, callbacks=[interrupt], verbose=0
    )
    assert len(history.history["loss"]) == 1
    assert gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Failing(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise OSError("the disk is gone")


def test_a_callback_that_fails_costs_nothing_of_what_was_learned(tiny_lora, world):
    before = weights_of(tiny_lora)
    optimizer = tiny_lora.optimizer
    with pytest.raises(OSError, match="the disk is gone"):
        gl.fit(tiny_lora, world[0], callbacks=[Failing()], verbose=0)
    after = weights_of(tiny_lora)
    assert all(np.array_equal(after[p], before[p]) != ("lora" in p) for p in before)
    assert tiny_lora.optimizer is optimizer


def test_a_step_that_fails_leaves_base_and_adapters_as_they_were(tiny_lora, world, monkeypatch):
    """The third step deletes its arguments, as XLA does when memory runs out."""
    before = weights_of(tiny_lora)
    compiled = loss.training_step

    def breaking(model, optimizer):
        step, calls = compiled(model, optimizer), []

        def third_fails(adapters, moments, *rest):
            calls.append(1)
            if len(calls) < 3:
                return step(adapters, moments, *rest)
            for array in [*adapters, *moments]:
                array.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return third_fails

    monkeypatch.setattr(training, "training_step", breaking)
    with pytest.raises(MemoryError, match="Out of memory while training"):
        gl.fit(tiny_lora, world[0], verbose=0)
    assert all(np.array_equal(value, before[path]) for path, value in weights_of(tiny_lora).items())
    monkeypatch.undo()
    gl.fit(tiny_lora, world[0].select(range(8)), verbose=0)


def test_callbacks_see_the_weights_and_the_optimizer_of_each_step(tiny_lora, world):
    """A callback that zeroes B and sets the learning rate is obeyed at each step."""
    layers = lora_layers(tiny_lora).values()
    rates = []

    class Meddler(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))
            self.model.optimizer.learning_rate = 1e-3
            for layer in layers:
                assert np.any(layer.lora_kernel_b)
                layer.lora_kernel_b.assign(np.zeros(layer.lora_kernel_b.shape))

    gl.fit(tiny_lora, world[0].select(range(16)), callbacks=[Meddler()], verbose=0)
    assert rates[0] == pytest.approx(5e-3) and rates[1:] == pytest.approx([1e-3] * len(rates[1:]))
    assert not any(np.any(layer.lora_kernel_b) for layer in layers)


def test_dropout_draws_again_at_each_step(random_model, world):
    model = random_model("gemma", dropout=0.5)
    gl.enable_lora(model, seed=0)
    history = gl.fit(model, world[0].select(range(4)), epochs=3, learning_rate=1e-12, verbose=0)
    assert len(set(history.history["loss"])) == 3


@pytest.mark.skipif(
    not DOLLY.exists(), reason="the real Dolly rows lie beside the project, and are not here"
)
def test_an_epoch_over_real_dolly_lowers_the_held_out_loss(tiny_lora, compiled_well):
    rows = gl.load_records(DOLLY)
    train, held_out = rows.select(range(400)), rows.select(range(2900, 3000))
    before = gl.evaluate(tiny_lora, held_out, answers=False).loss
    history = gl.fit(tiny_lora, train, validation=held_out, verbose=0)
    assert history.history["val_loss"][-1] < before - 0.3


def test_the_curve_is_the_loss_of_each_part_of_an_epoch(tiny_factory):
    model, train = tiny_factory(), gl.load_tiny_world()[0].select(range(100))
    gl.enable_lora(model)
    history = gl.fit(
        model, train, epochs=2, batch_size=2, learning_rate=1e-12, verbose=0
    )  # so that nothing changes
    epochs, losses = zip(*history.curve, strict=True)
    assert len(losses) == 40
    assert epochs[19] == 1
    assert epochs[39] == 2
    batches = Batches(encode(model, train), batch_size=2, seed=0)
    adapters = [variable.value for variable in model.trainable_variables]
    step, frozen = measuring_step(model), frozen_values(model)
    for epoch, points in enumerate((history.curve[:20], history.curve[20:])):
        batches.start(epoch)
        order = [batches[i] for i in range(len(batches))]
        steps = [0, *(round(epoch % 1 * len(order)) or len(order) for epoch, _ in points)]
        for start, stop, (_, expected) in zip(steps, steps[1:], points, strict=False):
            sums = np.zeros(3, "float32")
            for batch in order[start:stop]:
                sums = step(sums, adapters, frozen, batch)
            assert abs(expected - averages(sums)["loss"]) < 1e-3


TEXTS = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        [
            "",
            " ",
            "a",
            "word " * 25_000,
            "\x00\x07",
            "\u202eabc",
            "👩‍👩‍👧‍👦",
            "مرحبا",
            "a\ud800",
            "<eos><pad>",
        ]
    ),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=5),
    size=st.fixed_dictionaries(
        {},
        optional={
            "batch_size": st.integers(-1, 3),
            "batch_tokens": st.integers(-1, 300),
            "epochs": st.integers(0, 2),
        },
    ),
    length=st.integers(0, 60),
    loss_on=st.sampled_from(["response", "all", "prompt"]),
)
def test_any_records_and_options_train_or_say_why_not(tiny_lora, records, size, length, loss_on):
    names = ("instruction", "context", "response")
    rows = [dict(zip(names, texts, strict=True)) for texts in records]
    before = weights_of(tiny_lora)
    try:
        history = gl.fit(
            tiny_lora, rows, sequence_length=length, loss_on=loss_on, **size, verbose=0
        )
    except ValueError as error:
        assert re.search(r"Received|Record \d|no records|none leaves room", str(error)), error
        assert all(
            np.array_equal(value, before[path]) for path, value in weights_of(tiny_lora).items()
        )
        return
    assert all(np.isfinite(loss) for loss in history.history["loss"])
    assert len(history.history["loss"]) == size.get("epochs", 1)


# Records in every form


def test_records_in_any_form_are_learned_alike(tiny_factory, tmp_path):
    """Each form is encoded alike: see test_tokens."""
    rows = gl.load_tiny_world()[0].select(range(8))
    names = {"instruction": "question", "response": "Answer"}
    renamed = rows.rename_columns(names).select_columns(["question", "context", "Answer"])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    measured = []
    for train, validation in (
        (rows, rows),
        (str(tmp_path / "rows.jsonl"), renamed.to_iterable_dataset()),
    ):
        model = tiny_factory()
        gl.enable_lora(model)
        history = gl.fit(model, train, validation=validation, verbose=0).history
        loss = gl.evaluate(model, renamed.to_pandas(), answers=False).loss
        measured.append((history["loss"], history["val_loss"], loss))
    assert measured[0] == measured[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": keras.optimizers.schedules.CosineDecay(1e-3, 10)}, "same for the whole"),
        (
            {"learning_rate": "5e-5"},
            "learning_rate is a number, .* such as 0.005. Received: '5e-5'",
        ),
        ({"weight_decay": None, "learning_rate": True}, "learning_rate is a number"),
    ],
)
def test_a_rate_that_is_no_number_is_said(tiny_lora, options, message):
    with pytest.raises(ValueError, match=message):
        gl.fit(tiny_lora, gl.load_tiny_world()[0].select(range(4)), **options)


def test_texts_are_no_records(tiny_lora):
    with pytest.raises(
        ValueError, match=r"Record 0: a record has named fields.*'Instruction"
    ) as raised:
        gl.fit(tiny_lora, ["Instruction:\nName a river.\n\nResponse:\nThe Sava."])
    assert "skip" not in str(raised.value)


def test_a_second_run_says_what_the_adapters_have_learned(tiny_lora, world, capsys):
    rows = world[0].select(range(8))
    gl.fit(tiny_lora, rows, epochs=2)
    assert "Before, these adapters" not in capsys.readouterr().out
    gl.fit(tiny_lora, rows)
    assert (
        "Before, these adapters were trained for 2 epochs. They go on." in capsys.readouterr().out
    )
    run = tiny_lora.gemma_lora.run
    assert (run["epochs"], run["earlier_epochs"]) == (1, 2)
    assert "for 1 epoch, after 2 epochs before" in gl.model_card(tiny_lora)
    gl.remove_adapter(tiny_lora)
    gl.enable_lora(tiny_lora)
    gl.fit(tiny_lora, rows)
    assert "earlier_epochs" not in tiny_lora.gemma_lora.run


def test_after_ctrl_c_record_and_card_tell_the_steps_that_were_done(tiny_lora, world, monkeypatch):
    class Press(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                os.kill(os.getpid(), signal.SIGINT)

    rows = world[0].select(range(40))
    gl.fit(tiny_lora, rows, validation=rows.select(range(2)), callbacks=Press(), verbose=0)
    run = tiny_lora.gemma_lora.run
    steps = round(run["steps"] / run["epochs"])
    assert run["steps"] == 3
    assert run["epochs"] == round(3 / steps, 4) < 1
    assert "held_out_loss" not in run
    assert f"for {run['epochs']:g} epochs (3 steps), then stopped" in gl.model_card(tiny_lora)


def test_what_is_returned_and_remembered_can_be_read(tiny_lora, world):
    history = gl.fit(tiny_lora, world[0].select(range(8)), epochs=2, verbose=0)
    assert str(history).splitlines()[0].split() == ["epoch", "accuracy", "loss"]
    assert history.table()["epoch"] == [1, 2]
    assert history.to_pandas()["loss"].iloc[-1] == history.history["loss"][-1]
    state = repr(tiny_lora.gemma_lora)
    assert state.splitlines() == [
        "tiny_gemma_en, asked with the template 'recipe'",
        "adapters of rank 4 on query, value (.lora has more)",
        "trained on 8 records for 2 epochs (.run has more)",
    ]
    table = tiny_lora.gemma_lora.run.table()
    assert dict(zip(table["what"], table["value"], strict=True))["rows"] == 8
    assert repr(gl.load_tokenizer()).startswith("Tokenizer of 2,048 tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.1}, r"validation holds records, not a share .* held_out=0.1\) splits"),
        ({"callbacks": [5]}, "callbacks holds objects of keras.callbacks"),
        ({"verbose": 3}, 'verbose is "auto", 0, 1 or 2'),
        ({"weight_decay": -1}, "weight_decay is 0 or more"),
        ({"epochs": 10**30}, "epochs is at most 2,147,483,647"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_done(tiny_lora, world, options, message):
    with pytest.raises(ValueError, match=message):
        gl.fit(tiny_lora, world[0].select(range(2)), **options)


def test_numbers_may_be_numpys(tiny_lora, world):
    gl.fit(
        tiny_lora,
        world[0].select(range(4)),
        epochs=np.int64(1),
        sequence_length=np.int32(64),
        batch_size=np.int64(2),
        learning_rate=np.float32(1e-3),
        verbose=0,
    )
    assert json.dumps(tiny_lora.gemma_lora.run | {"template": None})


@pytest.mark.full
def test_with_keras_data_parallel_the_run_is_that_of_one_device(tmp_path):
    """In processes of their own: JAX counts its devices once."""
    script = """
import sys, gemma_lora as gl
gl.setup(seed=0)
import keras
if sys.argv[1] == "2":
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
model = gl.load()
gl.enable_lora(model)
rows = gl.load_tiny_world()[0].select(range(20))
print(gl.fit(model, rows, batch_size=3, verbose=0).history["loss"][0])
print(gl.generate(model, "Name a river.", max_new_tokens=4))
"""
    said = {}
    for count in ("1", "2"):
        flags = f"--xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-c", script, count],
            env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said[count] = done.stdout.splitlines()
    assert float(said["1"][0]) == pytest.approx(float(said["2"][0]), rel=1e-5)
    assert said["1"][1] == said["2"][1]


def test_a_run_that_dies_leaves_the_template_with_what_was_learned(tiny_factory, world):
    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise RuntimeError("died")

    own = gl.Template("qa", "Q: {instruction}\nA: ", "{context}\nQ: {instruction}\nA: ")
    model = tiny_factory()
    gl.enable_lora(model)
    with pytest.raises(RuntimeError, match="died"):
        gl.fit(model, world[0].select(range(40)), template=own, callbacks=Die(), verbose=0)
    assert model.gemma_lora.run["template"] == own
    assert model.gemma_lora.run["steps"] == 2
    assert "(2 steps), then stopped" in gl.model_card(model)


def test_a_callback_that_would_load_into_the_base_is_refused(tiny_lora, world, tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(ValueError, match="checkpoint_dir='a folder' takes its place"):
        gl.fit(tiny_lora, world[0].select(range(2)), callbacks=backup)


def test_columns_that_training_has_no_use_for_are_said(tiny_lora):
    rows = [{"question": "Why?", "answer": "So.", "Persona": "A pirate."}]
    with pytest.warns(UserWarning, match="not used: 'Persona'"):
        gl.fit(tiny_lora, rows, verbose=0)
