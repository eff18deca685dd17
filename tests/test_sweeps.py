"""Many runs with other settings: what each finds, what is kept, and what is left."""

import json
import os
import signal

import keras
import numpy as np
import pandas as pd
import pytest
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora import sweeps
from gemma_lora.lora import lora_layers


@pytest.fixture(scope="module")
def world():
    train, held_out = gl.load_tiny_world()
    return train.select(range(24)), held_out.select(range(8))


def test_a_run_finds_what_it_finds_by_hand(tiny_factory, world):
    train, held_out = world
    found = gl.sweep(
        tiny_factory(), train, validation=held_out, rows=[None, 12], seeds=3, answers=True
    )
    assert [*found["rows"]] == [24, 12]
    model = tiny_factory()
    gl.enable_lora(model, rank=4, seed=3)
    gl.fit(model, train.select(range(12)), seed=3, verbose=0)
    by_hand = gl.evaluate(model, held_out, answers=True)
    run = found.iloc[1]
    assert run["loss"] == pytest.approx(by_hand.loss, abs=1e-6)
    assert run["right"] == by_hand.share()
    assert run["parameters"] == model.gemma_lora.lora.trainable
    assert run["learning_rate"] == gl.recommended(model).learning_rate
    assert run["seconds"] > 0


def test_the_model_ends_as_it_was(tiny_factory, world):
    train, held_out = world
    model = tiny_factory()
    before = logits(model)
    gl.sweep(model, train, validation=held_out, answers=False)
    assert not lora_layers(model)
    assert np.array_equal(logits(model), before)

    gl.enable_lora(model, rank=2, alpha=3, targets="all_linear", seed=5)
    gl.fit(model, train, verbose=0)
    randomize_adapters(model)
    lora, run, before = model.gemma_lora.lora, model.gemma_lora.run, logits(model)
    gl.sweep(model, train, validation=held_out, targets=[["key"]], answers=False)
    assert (model.gemma_lora.lora, model.gemma_lora.run) == (lora, run)
    assert np.array_equal(logits(model), before)
    assert all(weight.trainable for weight in model.trainable_variables)


def test_adapters_are_made_once_for_all_runs_that_share_them(tiny_factory, world, monkeypatch):
    made = []
    enable = sweeps.enable_lora
    monkeypatch.setattr(sweeps, "enable_lora", lambda *a, **o: made.append(o) or enable(*a, **o))
    gl.sweep(
        tiny_factory(),
        world[0],
        validation=world[1],
        rank=[1, 2],
        learning_rate=[1e-3, 5e-3],
        seeds=[0, 1],
        answers=False,
    )
    assert [options["rank"] for options in made] == [1, 2]


def test_what_is_in_the_file_is_not_run_again(tiny_factory, world, tmp_path, monkeypatch):
    train, held_out = world
    options = {"validation": held_out, "answers": False, "file": tmp_path / "new/found.jsonl"}
    first = gl.sweep(tiny_factory(), train, **options, learning_rate=[1e-3, 5e-3])
    lines = options["file"].read_text().splitlines()
    assert len(lines) == 2
    # As a process leaves it that dies while it writes.
    options["file"].write_text("\n".join([lines[0], lines[1][:40]]))

    ran = []
    one = sweeps.fit
    monkeypatch.setattr(sweeps, "fit", lambda *a, **o: ran.append(o) or one(*a, **o))
    again = gl.sweep(tiny_factory(), train, **options, learning_rate=[1e-3, 5e-3, 1e-2])
    assert [run["learning_rate"] for run in ran] == [5e-3, 1e-2]
    same = ["learning_rate", "loss", "parameters"]
    pd.testing.assert_frame_equal(again[same][:2], first[same])
    readable = [line for line in options["file"].read_text().splitlines() if line.endswith("}")]
    assert len([json.loads(line) for line in readable]) == 3

    ran.clear()
    gl.sweep(tiny_factory(), train.select(range(20)), **options, learning_rate=1e-3)
    assert len(ran) == 1, "other records are another sweep"


def test_ctrl_c_keeps_what_is_complete_and_the_model(tiny_factory, world, tmp_path, monkeypatch):
    model = tiny_factory()
    file = tmp_path / "found.jsonl"

    class Press(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            os.kill(os.getpid(), signal.SIGINT)

    one = sweeps.fit

    def pressed_in_the_second(*arguments, **options):
        callbacks = [Press()] if options["learning_rate"] == 5e-3 else []
        return one(*arguments, **options, callbacks=callbacks)

    monkeypatch.setattr(sweeps, "fit", pressed_in_the_second)
    rates = [1e-3, 5e-3, 1e-2]
    options = {"validation": world[1], "answers": False, "file": file, "learning_rate": rates}
    with pytest.raises(KeyboardInterrupt, match="Runs that are complete are in its file"):
        gl.sweep(model, world[0], **options)
    assert len(file.read_text().splitlines()) == 1
    assert not lora_layers(model)


def test_a_run_that_diverges_has_no_loss(tiny_factory, world, monkeypatch):
    def diverge(*arguments, **options):
        raise FloatingPointError("The loss is nan")

    monkeypatch.setattr(sweeps, "fit", diverge)
    found = gl.sweep(tiny_factory(), world[0], validation=world[1], learning_rate=[0.1])
    assert np.isnan(found["loss"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": []}, "rank has no value to try"),
        ({"rank": [0]}, "rank is a whole number, 1 or more"),
        ({"rows": [25]}, "There are 24 records to learn from. Received: rows=25"),
        ({"targets": ["querry"]}, "Did you mean 'query'"),
        ({"epochs": 1.5}, "epochs is a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_said(tiny, world, options, message):
    with pytest.raises(ValueError, match=message):
        gl.sweep(tiny, world[0], validation=world[1], **options)


def test_an_unknown_setting_is_said(tiny, world):
    with pytest.raises(TypeError, match=r"sweep has no option 'ranks'. Did you mean 'rank'"):
        gl.sweep(tiny, world[0], validation=world[1], ranks=[1])
