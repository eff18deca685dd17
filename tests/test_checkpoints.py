"""Runs that die: each goes on from its newest checkpoint, to the very same adapter."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.lora import adapter_weights

TRAIN = """
import sys
import gemma_lora as gl
import numpy as np
gl.setup(seed=0)
folder, out, epochs, pause = sys.argv[1:]
model = gl.load()
gl.enable_lora(model)
import keras, time
wait = lambda step, logs: time.sleep(float(pause))
slow = keras.callbacks.LambdaCallback(on_train_batch_end=wait)
train, held_out = gl.load_tiny_world()
options = {"validation": held_out.select(range(8))}
options["checkpoint_dir"] = folder if folder != "none" else None
print("ready", flush=True)
options |= {"epochs": int(epochs), "checkpoint_every": 3, "callbacks": [slow], "verbose": 0}
history = gl.fit(model, train.select(range(96)), **options)
from gemma_lora.lora import adapter_weights
arrays = {weight.path: np.asarray(weight.value) for weight in adapter_weights(model)}
for name, values in history.history.items():
    arrays[name] = np.array(values)
arrays["curve"] = np.array(history.curve)
np.savez(out, **arrays)
"""


def start(folder, out, epochs, pause=0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", TRAIN, str(folder), str(out), str(epochs), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.full
@pytest.mark.parametrize("kills", [5, 25])
def test_killed_at_random_moments_it_ends_with_the_very_same_adapter(tmp_path, kills):
    epochs = 2 + kills // 4  # each try gets some steps further
    assert start("none", tmp_path / "whole.npz", epochs).wait(timeout=300) == 0
    moments, reached = random.Random(kills), []
    for kill in range(kills):
        process = start(tmp_path / "run", tmp_path / "killed.npz", epochs, pause=0.1)
        assert process.stdout.readline() == "ready\n"
        deadline, before = (
            time.monotonic() + 60,
            {path.name for path in (tmp_path / "run").glob("*.npz")},
        )
        while {
            path.name for path in (tmp_path / "run").glob("*.npz")
        } == before and time.monotonic() < deadline:
            time.sleep(0.01)  # it has begun
        time.sleep(moments.uniform(0, 0.7 * 10 / kills))
        process.kill()
        process.wait()
        reached.append(
            max((path.stem for path in (tmp_path / "run").glob("*.npz")), default="nothing")
        )
        print(f"kill {kill + 1}: newest checkpoint {reached[-1]}")
        assert not (tmp_path / "killed.npz").exists(), "the run was over before it was killed"
    assert reached == sorted(reached) and len(set(reached)) > 1
    assert start(tmp_path / "run", tmp_path / "killed.npz", epochs).wait(timeout=300) == 0
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "killed.npz") as killed:
        assert whole.files == killed.files
        for name in whole.files:
            assert np.array_equal(whole[name], killed[name]) or (
                name == "curve" and np.allclose(whole[name], killed[name], rtol=1e-6)
            ), name


@pytest.fixture(scope="module")
def rows():
    return gl.load_tiny_world()[0].select(range(48))


def adapter_of(model) -> list[np.ndarray]:
    return [np.asarray(weight.value).copy() for weight in adapter_weights(model)]


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def stop_after(step: int) -> keras.callbacks.Callback:
    def interrupt(at, logs):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)

    return keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)


def test_ctrl_c_and_the_same_call_again_is_one_run(tiny_factory, rows, tmp_path, capsys):
    whole, parts = tiny_factory(), tiny_factory()
    for model in (whole, parts):
        gl.enable_lora(model)
    history = gl.fit(whole, rows, verbose=0)
    gl.fit(parts, rows, checkpoint_dir=tmp_path, callbacks=[stop_after(4)], verbose=0)
    assert not same(adapter_of(whole), adapter_of(parts))
    again = gl.fit(parts, rows, checkpoint_dir=tmp_path, verbose=0)
    assert "Going on from" in capsys.readouterr().out
    assert same(adapter_of(whole), adapter_of(parts))
    assert again.history == history.history and again.epoch == history.epoch == [0]
    assert np.allclose(again.curve, history.curve, rtol=1e-6)


def test_a_finished_run_is_not_run_again_and_more_epochs_go_on(tiny_factory, rows, tmp_path):
    whole, parts = tiny_factory(), tiny_factory()
    for model in (whole, parts):
        gl.enable_lora(model)
    history = gl.fit(whole, rows, epochs=2, verbose=0)
    gl.fit(parts, rows, checkpoint_dir=tmp_path, verbose=0)
    done = adapter_of(parts)
    again = gl.fit(parts, rows, checkpoint_dir=tmp_path, verbose=0)
    assert same(done, adapter_of(parts)) and len(again.history["loss"]) == 1
    further = gl.fit(parts, rows, epochs=2, checkpoint_dir=tmp_path, verbose=0)
    assert same(adapter_of(whole), adapter_of(parts))
    assert further.history == history.history
    assert parts.gemma_lora.run["epochs"] == 2


@pytest.mark.parametrize(
    "option", [{"learning_rate": 1e-4}, {"seed": 1}, {"rows": 40}, {"rank": 2}]
)
def test_another_run_in_the_folder_is_refused_by_name(tiny_factory, rows, tmp_path, option):
    model = tiny_factory()
    gl.enable_lora(model)
    gl.fit(model, rows, checkpoint_dir=tmp_path, verbose=0)
    before = sorted(tmp_path.iterdir())
    if "rank" in option:
        model = tiny_factory()
        gl.enable_lora(model, rank=option.pop("rank"))
    part = rows.select(range(option.pop("rows", 48)))
    adapter = adapter_of(model)
    with pytest.raises(ValueError, match="another run") as raised:
        gl.fit(model, part, checkpoint_dir=tmp_path, verbose=0, **option)
    assert all(name in str(raised.value) for name in option)
    assert sorted(tmp_path.iterdir()) == before and same(adapter, adapter_of(model))


def test_a_base_with_an_adapter_merged_into_it_is_another_run(tiny_factory, rows, tmp_path):
    model = tiny_factory()
    gl.enable_lora(model)
    gl.fit(model, rows, checkpoint_dir=tmp_path, verbose=0)
    gl.merge(model)
    gl.enable_lora(model)
    with pytest.raises(ValueError, match="another run: base"):
        gl.fit(model, rows, checkpoint_dir=tmp_path, verbose=0)


def test_adapters_that_a_checkpoint_takes_the_place_of_are_said(tiny_factory, rows, tmp_path):
    model = tiny_factory()
    gl.enable_lora(model)
    gl.fit(model, rows, seed=7, verbose=0)
    gl.save_adapter(model, tmp_path / "started from")
    gl.fit(model, rows, checkpoint_dir=tmp_path / "run", callbacks=[stop_after(4)], verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.load_adapter(model, tmp_path / "started from")
        gl.fit(model, rows, checkpoint_dir=tmp_path / "run", verbose=0)
        gl.fit(model, rows, checkpoint_dir=tmp_path / "run", verbose=0)
        done = adapter_of(model)
        gl.fit(model, rows, seed=8, verbose=0)
    with pytest.warns(UserWarning, match="adapters are replaced"):
        gl.fit(model, rows, checkpoint_dir=tmp_path / "run", verbose=0)
    assert same(done, adapter_of(model))


def test_a_checkpoint_in_mid_epoch_is_enough_for_the_very_same_adapter(
    tiny_factory, rows, tmp_path
):
    """What a kill leaves: the newest file is of some step, and its process is gone."""
    whole, parts = tiny_factory(), tiny_factory()
    for model in (whole, parts):
        gl.enable_lora(model)
    history = gl.fit(whole, rows, epochs=2, checkpoint_dir=tmp_path / "whole", verbose=0)

    class Killed(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 8:
                raise SystemExit

    options = {"epochs": 2, "checkpoint_dir": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(SystemExit):
        gl.fit(parts, rows, callbacks=[Killed()], verbose=0, **options)
    assert max((tmp_path / "run").iterdir()).stem == "0000-00000006"
    parts = tiny_factory()
    gl.enable_lora(parts)
    again = gl.fit(parts, rows, verbose=0, **options)
    assert same(adapter_of(whole), adapter_of(parts))
    assert again.history == history.history
    assert np.allclose(again.curve, history.curve, rtol=1e-6)


DAMAGES = {
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a byte changed": lambda content: (
        content[:-5000] + bytes([content[-5000] ^ 1]) + content[-4999:]
    ),
    "no archive": lambda content: b"something else",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tiny_factory, rows, tmp_path, damage, capsys
):
    whole, parts = tiny_factory(), tiny_factory()
    for model in (whole, parts):
        gl.enable_lora(model)
    gl.fit(whole, rows, verbose=0)
    gl.fit(
        parts,
        rows,
        checkpoint_dir=tmp_path,
        checkpoint_every=2,
        callbacks=[stop_after(4)],
        verbose=0,
    )
    newest = max(tmp_path.glob("*.npz"))
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    gl.fit(parts, rows, checkpoint_dir=tmp_path, checkpoint_every=2, verbose=0)
    out = capsys.readouterr().out
    assert f"{newest.name} is damaged" in out and "Going on from" in out
    assert same(adapter_of(whole), adapter_of(parts))


def test_two_files_are_kept_and_none_half_written(tiny_lora, rows, tmp_path):
    (tmp_path / "0000-00000001.part").write_bytes(b"of a process that was killed")
    gl.fit(tiny_lora, rows, checkpoint_dir=tmp_path, checkpoint_every=2, verbose=0)
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "0001-00000000.npz").is_file()


def test_a_folder_that_cannot_be_written_is_said_before_training(tiny_lora, rows, tmp_path):
    (tmp_path / "file").write_text("no folder")
    before = adapter_of(tiny_lora)
    with pytest.raises(OSError, match=r"Nothing was trained\. Choose another checkpoint_dir"):
        gl.fit(tiny_lora, rows, checkpoint_dir=tmp_path / "file", verbose=0)
    assert same(before, adapter_of(tiny_lora))


def test_a_disk_that_fills_is_a_warning_and_the_checkpoint_before_stays(tiny_lora, rows, tmp_path):
    fill = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda step, logs: (
            step == 4 and (tmp_path / "0000-00000006.part").symlink_to("/dev/full")
        )
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gl.fit(
            tiny_lora,
            rows,
            checkpoint_dir=tmp_path,
            checkpoint_every=3,
            callbacks=[fill, stop_after(6)],
            verbose=0,
        )
    said = [str(one.message) for one in caught if "No checkpoint" in str(one.message)]
    assert len(said) == 1 and "the disk is full" in said[0] and "Training goes on" in said[0]
    assert {path.stem for path in tmp_path.glob("*.npz")} >= {"0000-00000003"}


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_how_many_steps_is_a_whole_number(tiny_lora, rows, tmp_path, every):
    with pytest.raises(ValueError, match="checkpoint_every"):
        gl.fit(tiny_lora, rows, checkpoint_dir=tmp_path, checkpoint_every=every, verbose=0)


def test_a_loss_that_is_no_number_ends_with_step_and_rows_and_the_adapter_from_before(
    tiny_lora, rows, tmp_path
):
    gl.fit(tiny_lora, rows, checkpoint_dir=tmp_path, verbose=0)
    before = adapter_of(tiny_lora)
    with pytest.raises(
        FloatingPointError, match=r"The loss is (nan|inf) since step \d+ of epoch 1.*lower"
    ) as raised:
        gl.fit(
            tiny_lora,
            rows,
            learning_rate=1e30,
            epochs=3,
            checkpoint_dir=tmp_path / "other",
            verbose=0,
        )
    assert "records" in str(raised.value)
    assert same(before, adapter_of(tiny_lora))
    assert gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=3)
    for path in (tmp_path / "other").glob("*.npz"):
        with np.load(path) as file:
            assert all(np.isfinite(file[name]).all() for name in file.files[1:])
