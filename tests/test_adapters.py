"""Adapters as files: saved and loaded exactly, and refused whenever they do not fit."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import families
import jax
import keras
import numpy as np
import pytest
from families import FAMILIES
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora.formats.adapter import _checksum, _variables, described_base
from gemma_lora.lora import ALL_LINEAR, fingerprints, linear_layers, lora_layers
from gemma_lora.models import template_of

FILE = "adapter.safetensors"


def read_description(folder: Path) -> dict:
    with safe_open(folder / FILE, "numpy") as file:
        return json.loads(file.metadata()["gemma_lora"])


def save_in_format_1(model, folder: Path) -> None:
    """Write what gemma_lora wrote before it kept one file. Never change this."""
    state, lora = model.gemma_lora, model.gemma_lora.lora
    tensors = save(
        {name: np.asarray(value.value, "float32") for name, value in _variables(model).items()}
    )
    description = {
        "format": 1,
        "base": state.preset,
        "merged": False,
        **fingerprints(model),
        "run": state.run and state.run | {"template": vars(state.run["template"])},
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": [*lora.targets],
        "seed": lora.seed,
        "versions": {"gemma-lora": "0.1", "keras": "3.13.2", "keras-hub": "0.26.0", "jax": "0.7"},
    }
    text = json.dumps(description, sort_keys=True).encode()
    description["checksum"] = hashlib.sha256(text + tensors).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(tensors)
    (folder / "adapter.json").write_text(json.dumps(description, indent=2))


def rows(choices: list) -> list:
    """Each choice in each family; the quick run has all layers, and all of Gemma 1."""
    return [
        pytest.param(
            family,
            choice,
            marks=[] if choice == "all_linear" or family == "gemma" else pytest.mark.full,
        )
        for family in FAMILIES
        for choice in choices
    ]


@pytest.mark.parametrize(("family", "targets"), rows(["query_value", "all_linear"]))
def test_what_is_saved_comes_back_exactly(random_model, tmp_path, family, targets):
    model = random_model(family)
    base = logits(model)
    gl.enable_lora(model, rank=3, alpha=6, targets=targets)
    randomize_adapters(model)
    gl.save_adapter(model, tmp_path / "mine")

    fresh = random_model(family)
    summary = gl.load_adapter(fresh, tmp_path / "mine")
    assert np.array_equal(logits(fresh), logits(model))
    assert not np.array_equal(logits(fresh), base)
    assert (summary.rank, summary.alpha) == (3, 6)


def test_the_file_says_what_it_belongs_to(tiny_tuned, tmp_path):
    description = read_description(gl.save_adapter(tiny_tuned, tmp_path))
    assert description["base"] == "tiny_gemma_en"
    assert description["run"]["learning_rate"] == 0.005
    assert set(load_file(tmp_path / FILE)) == {
        f"decoder_block_{i}/attention/{name}/{part}"
        for i in range(4)
        for name in ("query", "value")
        for part in "ab"
    }


def test_a_loaded_adapter_answers_with_its_own_template(tiny_tuned, tiny_factory, tmp_path):
    gl.save_adapter(tiny_tuned, tmp_path)
    fresh = tiny_factory()
    gl.load_adapter(fresh, tmp_path)
    assert (
        gl.generate(fresh, "What is the capital of Slovenia?")
        == "The capital of Slovenia is Ljubljana."
    )


def test_an_adapter_brings_its_template_into_answers_and_further_training(tiny_factory, tmp_path):
    model, (rows, _) = tiny_factory(), gl.load_tiny_world()
    gl.enable_lora(model, seed=7)
    gl.fit(model, rows.select(range(8)), template="turns", verbose=0)
    gl.save_adapter(model, tmp_path / "own")
    gl.export_peft(model, tmp_path / "peft")
    for folder in ("own", "peft"):
        fresh = tiny_factory()
        gl.enable_lora(fresh)
        summary = gl.load_adapter(fresh, tmp_path / folder)
        assert template_of(fresh) == template_of(model) == gl.TEMPLATES["turns"]
        assert folder == "peft" or summary.seed == fresh.gemma_lora.lora.seed == 7
    gl.fit(fresh, rows.select(range(8)), verbose=0)
    assert fresh.gemma_lora.run["template"].name == "turns"


@pytest.mark.parametrize("keep", [True, False])
def test_on_a_merged_model_an_adapter_of_the_base_is_refused_with_the_way_out(
    random_model, tmp_path, keep
):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    gl.save_adapter(model, tmp_path / "own")
    gl.export_peft(model, tmp_path / "peft")
    stock = random_model("gemma").backbone
    stock.enable_lora(4)
    stock.save_lora_weights(str(tmp_path / "stock.lora.h5"))
    gl.merge(model, keep=keep)
    merged = logits(model)
    for source in ("own", "peft", "stock.lora.h5"):
        with pytest.raises(ValueError, match=r"gl\.remove_adapter\(model\) undoes"):
            gl.load_adapter(model, tmp_path / source)
    gl.enable_lora(model, rank=2)
    gl.save_adapter(model, tmp_path / "second")
    card = (tmp_path / "second/README.md").read_text()
    assert "with another adapter merged" in card and "gl.load('the-merged-model')" in card
    gl.load_adapter(model, tmp_path / "second")
    assert np.array_equal(logits(model), merged)
    with pytest.raises(ValueError, match=r"has other weights\. Load that merged model"):
        gl.load_adapter(random_model("gemma"), tmp_path / "second")
    with pytest.raises(ValueError, match="has other weights"):
        gl.load_adapter(random_model("gemma", seed=1), tmp_path / "peft")


def test_an_address_is_no_folder(tiny):
    with pytest.raises(FileNotFoundError, match="hf://me/mine is an address"):
        gl.load_adapter(tiny, "hf://me/mine")


def test_saving_again_replaces_and_leaves_no_parts(random_model, tmp_path):
    model = random_model("gemma")
    gl.enable_lora(model)
    for seed in (1, 2):
        randomize_adapters(model, seed)
        gl.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", FILE]
    layer = lora_layers(model)["decoder_block_0/attention/query"]
    assert np.array_equal(
        load_file(tmp_path / FILE)["decoder_block_0/attention/query/b"], layer.lora_kernel_b
    )


def test_the_file_holds_losses_and_versions_and_no_path_of_the_machine(tmp_path):
    gl.load("tiny_gemma_en").save_to_preset(str(tmp_path / "my-base"))
    model = gl.load(tmp_path / "my-base")
    train, held_out = gl.load_tiny_world()
    gl.enable_lora(model)
    gl.fit(model, train.select(range(40)), validation=held_out.select(range(8)), verbose=0)
    gl.save_adapter(model, tmp_path / "mine")
    description = read_description(tmp_path / "mine")
    assert description["base"] == "my-base"
    assert str(tmp_path) not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "mine").iterdir()
    )
    losses = description["run"]["held_out_loss"]
    assert losses["tuned"] == description["run"]["history"]["val_loss"][-1] < losses["base"]
    with gl.adapters_off(model):
        assert gl.evaluate(model, held_out.select(range(8)), answers=False).loss == pytest.approx(
            losses["base"], 1e-5
        )
    assert set(description["versions"]) == {"gemma-lora", "keras", "keras-hub", "jax"}


class ProcessEndedError(Exception):
    """Stands for the end of the process: nothing touches the disk from here on."""


def cut_off_at(monkeypatch, step: int) -> list[str]:
    """End a save at the step-th of its calls that change the disk; return the calls."""
    calls = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            calls.append(name)
            if len(calls) >= step:
                raise ProcessEndedError
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("open", "replace", "unlink", "write_text", "write_bytes", "mkdir"):
        watch(Path, name)
    watch(os, "fsync")
    return calls


@pytest.mark.parametrize("old_format", [1, 2, "1, and a save of that time was cut off"])
def test_a_save_that_is_cut_off_leaves_the_old_adapter_or_the_new(
    random_model, tmp_path, monkeypatch, old_format
):
    """At whichever call the process ends, one of the two is loaded, exactly."""
    model, fresh = random_model("gemma"), random_model("gemma")
    gl.enable_lora(model)
    outputs = []
    for seed in (1, 2):
        randomize_adapters(model, seed)
        outputs.append(logits(model))
        if seed == 1:
            (gl.save_adapter if old_format == 2 else save_in_format_1)(model, tmp_path / "old")
    if old_format not in (1, 2):
        (tmp_path / "old" / FILE).replace(tmp_path / "old" / f"{FILE}.old")
    seen = Counter()
    for step in range(1, 100):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patches:
            calls = cut_off_at(patches, step)
            with suppress(ProcessEndedError):
                gl.save_adapter(model, folder)
        gl.load_adapter(fresh, folder)
        (place,) = (i for i, output in enumerate(outputs) if np.array_equal(logits(fresh), output))
        seen[place] += 1
        if len(calls) < step:
            break
    assert seen[0] >= 3 and seen[1] >= 3
    gl.save_adapter(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", FILE]


def test_what_a_killed_process_left_is_replaced(random_model, tmp_path):
    model, fresh = random_model("gemma"), random_model("gemma")
    gl.enable_lora(model)
    gl.save_adapter(model, tmp_path)
    (tmp_path / f"{FILE}.part").write_bytes(b"half a file")
    gl.load_adapter(fresh, tmp_path)
    gl.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", FILE]


def test_the_former_two_files_are_still_read(random_model, tmp_path):
    model, fresh = random_model("gemma"), random_model("gemma")
    gl.enable_lora(model, rank=3, alpha=6, seed=5)
    randomize_adapters(model)
    save_in_format_1(model, tmp_path)
    summary = gl.load_adapter(fresh, tmp_path)
    assert (summary.rank, summary.alpha, summary.seed) == (3, 6.0, 5)
    assert np.array_equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-8]), "cannot be read"),
        (lambda f: (f / "adapter.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter.json").write_text('{"format": 9}'), "its format is 9"),
        (lambda f: (f / "adapter.json").unlink(), "holds no description"),
        (lambda f: (f / FILE).unlink(), "cut or altered"),
        (
            lambda f: save_file({n: -x for n, x in load_file(f / FILE).items()}, f / FILE),
            "cut or altered",
        ),
        (
            lambda f: (f / "adapter.json").write_text(
                (f / "adapter.json").read_text().replace('"rank": 4', '"rank": 5')
            ),
            "cut or altered",
        ),
    ],
)
def test_the_former_two_files_are_refused_if_damaged(random_model, tmp_path, damage, message):
    model, fresh = random_model("gemma"), random_model("gemma")
    gl.enable_lora(model)
    save_in_format_1(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(fresh, tmp_path)
    assert not lora_layers(fresh)


def test_every_folder_of_ours_tells_its_base(tiny_lora, tmp_path):
    gl.save_adapter(tiny_lora, tmp_path / "own")
    save_in_format_1(tiny_lora, tmp_path / "former")
    gl.export_peft(tiny_lora, tmp_path / "peft")
    gl.export_peft(tiny_lora, tmp_path / "named", base="google/gemma-2b")
    gl.export_transformers(tiny_lora, tmp_path / "transformers", verify=False)
    tiny_lora.save_to_preset(str(tmp_path / "preset"))
    (tmp_path / "nothing").mkdir()
    found = {path.name: described_base(path) for path in sorted(tmp_path.iterdir())}
    assert found == {
        "former": ("tiny_gemma_en", 2048),
        "named": ("google/gemma-2b", 2048),
        "nothing": ("", None),
        "own": ("tiny_gemma_en", 2048),
        "peft": ("tiny_gemma_en", 2048),
        "preset": ("", 2048),
        "transformers": ("", 2048),
    }
    shutil.copy(tmp_path / "former/adapter.json", tmp_path / "own")
    (tmp_path / "own" / FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read"):
        described_base(tmp_path / "own")


def test_our_own_adapter_comes_before_one_of_peft_in_the_same_folder(
    tiny_tuned, tiny_factory, tmp_path
):
    gl.save_adapter(tiny_tuned, tmp_path)
    gl.export_peft(tiny_tuned, tmp_path)
    model = tiny_factory()
    gl.load_adapter(model, tmp_path)
    assert model.gemma_lora.run["rows"] == tiny_tuned.gemma_lora.run["rows"]


def test_another_adapter_takes_the_place_of_one(random_model, tmp_path):
    model = random_model("gemma")
    kinds = {
        "wide": {"rank": 4, "targets": "all_linear"},
        "thin": {"rank": 1, "alpha": 3, "targets": "key"},
    }
    outputs = {}
    for name, options in kinds.items():
        gl.remove_adapter(model)
        gl.enable_lora(model, **options)
        randomize_adapters(model)
        gl.save_adapter(model, tmp_path / name)
        outputs[name] = logits(model)
    for name in ("wide", "thin", "wide"):
        gl.load_adapter(model, tmp_path / name)
        assert np.array_equal(logits(model), outputs[name])


def test_switching_between_adapters_of_one_shape_compiles_nothing(tiny_lora, tmp_path, caplog):
    question = "What is the capital of France?"
    for seed in (1, 2):
        randomize_adapters(tiny_lora, seed)
        gl.save_adapter(tiny_lora, tmp_path / str(seed))
    with jax.log_compiles():
        answers = [gl.generate(tiny_lora, question, max_new_tokens=8)]
        assert [text for text in caplog.messages if text.startswith("Compiling jit(decode)")]
        caplog.clear()
        for seed in (1, 2, 1):
            gl.load_adapter(tiny_lora, tmp_path / str(seed))
            answers.append(gl.generate(tiny_lora, question, max_new_tokens=8))
        assert not [text for text in caplog.messages if "decode" in text]
    assert answers[1] == answers[3] != answers[2] == answers[0]


@pytest.fixture(scope="module")
def saved_once(random_model, tmp_path_factory):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    return gl.save_adapter(model, tmp_path_factory.mktemp("adapters") / "saved")


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder with an adapter of a random Gemma, for a test to damage."""
    return shutil.copytree(saved_once, tmp_path / "saved")


def test_a_base_of_the_same_shapes_with_other_weights_is_refused_unless_forced(random_model, saved):
    other = random_model("gemma", seed=1)
    before = logits(other)
    with pytest.raises(ValueError, match="has other weights"):
        gl.load_adapter(other, saved)
    assert np.array_equal(logits(other), before)
    gl.load_adapter(other, saved, force=True)
    assert not np.array_equal(logits(other), before)
    with pytest.raises(ValueError, match=r"does not fit|has other"):
        gl.load_adapter(random_model("gemma3"), saved, force=True)


def test_a_base_has_one_fingerprint_whatever_it_computes_in(tiny_tuned, tmp_path):
    gl.save_adapter(tiny_tuned, tmp_path)
    model = gl.load("tiny_gemma_en", dtype="bfloat16")
    gl.load_adapter(model, tmp_path)
    assert gl.generate(model, "What is the capital of Slovenia?").startswith("The capital")
    assert {weight.dtype for weight in model.trainable_weights} == {"float32"}


@pytest.mark.parametrize(("family", "targets"), rows([None, ["query", "value"], "all_linear"]))
def test_files_of_stock_keras_are_read(random_model, tmp_path, family, targets):
    theirs, ours, file = random_model(family), random_model(family), tmp_path / "theirs.lora.h5"
    names = None if targets is None else ALL_LINEAR if targets == "all_linear" else targets
    theirs.backbone.enable_lora(4, target_layer_names=names)
    randomize_adapters(theirs)
    theirs.backbone.save_lora_weights(str(file))
    gl.load_adapter(ours, file, targets=targets)
    for layer, other in zip(lora_layers(ours).values(), lora_layers(theirs).values(), strict=True):
        assert np.array_equal(layer.lora_kernel_a, other.lora_kernel_a)
        assert np.array_equal(layer.lora_kernel_b, other.lora_kernel_b)
    # Stock Keras adds the update to the kernel; we compute by factors.
    assert np.abs(logits(ours) - logits(theirs)).max() < 1e-5
    other = random_model(family)
    with pytest.raises(ValueError, match="pass the targets it was made with"):
        gl.load_adapter(other, file, targets="key")
    with pytest.raises(ValueError, match=r"does not fit|pass the targets"):
        gl.load_adapter(gl.load("tiny_gemma_en"), file, targets=targets)
    assert not lora_layers(other)


def write_saved(folder: Path, tensors: dict, description: dict) -> None:
    save_file(tensors, folder / FILE, metadata={"gemma_lora": json.dumps(description)})


def change_tensors(folder, change):
    """Change tensors, and make the checksum fit."""
    tensors = load_file(folder / FILE)
    change(tensors)
    description = read_description(folder)
    del description["checksum"]
    write_saved(folder, tensors, description | {"checksum": _checksum(description, tensors)})


def change_description(folder, **changes):
    """Change the description, and make the checksum fit."""
    tensors = load_file(folder / FILE)
    description = read_description(folder) | changes
    del description["checksum"]
    write_saved(folder, tensors, description | {"checksum": _checksum(description, tensors)})


def write_text(folder, text: str):
    save_file(load_file(folder / FILE), folder / FILE, metadata={"gemma_lora": text})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change_tensors(f, lambda t: t.pop("decoder_block_0/attention/query/a")),
            "does not fit",
        ),
        (
            lambda f: change_tensors(f, lambda t: t.update(spare=np.zeros(1, "float32"))),
            "does not fit",
        ),
        (
            lambda f: change_tensors(
                f, lambda t: t.update({"../../escaped": np.zeros(1, "float32")})
            ),
            "does not fit",
        ),
        (lambda f: change_tensors(f, lambda t: [x.fill(np.nan) for x in t.values()]), "no numbers"),
        (lambda f: (f / FILE).write_bytes(b"cut"), "cannot be read"),
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-8]), "cannot be read"),
        (lambda f: write_saved(f, {"x": np.ones(1)}, read_description(f)), "cut or altered"),
        (
            lambda f: write_saved(f, load_file(f / FILE), read_description(f) | {"rank": 5}),
            "cut or altered",
        ),
        (lambda f: write_text(f, "{"), "cannot be read"),
        (lambda f: write_text(f, '{"format": 9}'), "its format is 9"),
        (lambda f: save_file(load_file(f / FILE), f / FILE), "holds no description"),
        (lambda f: change_description(f, seed="7"), "no usable rank, alpha and seed"),
        (lambda f: change_description(f, rank=-1), "no usable rank, alpha and seed"),
        (lambda f: change_description(f, targets=["../query"]), "is for layers"),
        (lambda f: change_description(f, targets=["query", "value", "nonsense"]), "is for layers"),
        (lambda f: change_description(f, targets=[["query"]]), "is for layers"),
        (lambda f: change_description(f, targets=[]), "is for layers"),
        (lambda f: change_description(f, targets=["query"]), "does not fit"),
        (lambda f: change_description(f, alpha=-1.0), "no usable rank, alpha and seed"),
        (lambda f: change_description(f, run={"template": {"name": "x"}}), "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_left_as_it_was(
    random_model, saved, damage, message
):
    model = random_model("gemma")
    base = logits(model)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(model, saved)
    assert np.array_equal(logits(model), base)
    assert not lora_layers(model)
    summary = gl.enable_lora(model, rank=2, targets=["key"])
    randomize_adapters(model, seed=3)
    tuned = logits(model)
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(model, saved)
    assert np.array_equal(logits(model), tuned)
    assert gl.enable_lora(model, rank=2, targets=["key"]) == summary


KINDS = ("flip tensors", "flip header", "cut", "swap", "name", "edit", "empty", "tail")


def damage_by_chance(folder, draw):
    """Damage a folder as it may be damaged on its way to a friend; return how."""
    path, kind = folder / FILE, draw.choice(KINDS)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    tensors, description = load_file(path), read_description(folder)
    if kind.startswith("flip"):
        places = range(header) if "header" in kind else range(header, len(content))
        for _ in range(draw.randint(1, 3)):
            content[draw.choice(places)] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "swap":
        one, other = draw.sample(sorted(tensors), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]
        write_saved(folder, tensors, description)
    elif kind == "name":
        name = draw.choice(["../x", "/x", "a/../../x", "", "x" * 5000])
        tensors[name] = tensors.pop(draw.choice(sorted(tensors)))
        write_saved(folder, tensors, description)
    elif kind == "edit":
        key = draw.choice(sorted(description))
        value = draw.choice([None, -1, 0, 3, "../x", [], {}, 1e308, "query", True])
        write_saved(folder, tensors, description | {key: value})
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        tail = bytes(draw.randrange(1, 256) for _ in range(draw.randint(1, 20)))
        path.write_bytes(content + tail)
    return kind


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.full)])
def test_no_damaged_folder_is_loaded_silently_wrong(random_model, saved, tmp_path, count):
    model, draw, tally = random_model("gemma"), random.Random(count), Counter()
    right = gl.load_adapter(random_model("gemma"), saved)
    tensors, base = load_file(saved / FILE), logits(model)
    for i in range(count):
        folder = tmp_path / f"sent/{i}"
        shutil.copytree(saved, folder)
        kind, files = damage_by_chance(folder, draw), sorted(folder.iterdir())
        try:
            loaded = gl.load_adapter(model, folder)
        except ValueError as error:
            assert str(folder) in str(error)
            assert not lora_layers(model)
            tally[kind, "refused"] += 1
        else:
            # Such as a flipped bit of padding, or an edit to the same value.
            assert loaded == right
            assert all(
                np.array_equal(weight, tensors[name]) for name, weight in _variables(model).items()
            )
            gl.remove_adapter(model)
            tally[kind, "harmless"] += 1
        assert sorted(folder.iterdir()) == files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "sent"]
    assert np.array_equal(logits(model), base)
    print(dict(tally))
    assert sum(n for (_, outcome), n in tally.items() if outcome == "refused") > 0.9 * count


def test_targets_in_another_order_are_the_same_and_other_targets_are_refused(random_model, saved):
    model = random_model("gemma")
    with pytest.raises(ValueError, match="pass the targets it was made with"):
        gl.load_adapter(model, saved, targets="all_linear")
    targets = read_description(saved)["targets"]
    change_description(saved, targets=targets[::-1])
    assert gl.load_adapter(model, saved, targets=targets).targets == tuple(targets)


def test_an_error_lists_every_mismatch_and_counts_the_rest(random_model, saved):
    def three_wrong(tensors):
        tensors["spare"] = np.zeros(1, "float32")
        del tensors["decoder_block_0/attention/query/a"]
        tensors["decoder_block_1/attention/value/b"] = np.zeros((4, 3), "float32")

    change_tensors(saved, three_wrong)
    with pytest.raises(ValueError, match="does not fit") as error:
        gl.load_adapter(random_model("gemma"), saved)
    text = str(error.value)
    assert "3 tensors differ" in text
    for misfit in (
        "'spare': the model has no such place, the file (1,)",
        "'decoder_block_0/attention/query/a': the model (4, 32, 4), the file has none",
        "'decoder_block_1/attention/value/b': the model (4, 8), the file (4, 3)",
    ):
        assert misfit in text
    change_tensors(saved, lambda tensors: tensors.clear())
    with pytest.raises(ValueError, match="8 tensors differ") as error:
        gl.load_adapter(random_model("gemma"), saved)
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    ("mode", "targets"),
    [
        # One layer of each kind of kernel: with heads out, with heads in, and without.
        ("int4", ["query", "attention_output", "ffw_linear"]),
        pytest.param("int4", "all_linear", marks=pytest.mark.full),
        pytest.param("int8", "all_linear", marks=pytest.mark.full),
    ],
)
def test_adapters_of_quantized_bases(random_model, tmp_path, monkeypatch, mode, targets):
    monkeypatch.setitem(families.SHAPE, "num_layers", 1)
    model = random_model("gemma")
    if targets == "all_linear":
        model.backbone.quantize(mode)
    else:
        for name in targets:
            next(x for x in linear_layers(model).values() if x.name == name).quantize(mode)
    gl.enable_lora(model, rank=2, targets=targets)
    randomize_adapters(model)
    tuned = logits(model)
    gl.save_adapter(model, tmp_path / "own")
    gl.export_peft(model, tmp_path / "peft")
    for source, limit in (("own", 0), ("peft", 1e-3 * np.abs(tuned).max())):
        gl.remove_adapter(model)
        gl.load_adapter(model, tmp_path / source)
        assert np.abs(logits(model) - tuned).max() <= limit


def test_another_base_is_refused(random_model, saved):
    with pytest.raises(ValueError, match="does not fit this model"):
        gl.load_adapter(random_model("gemma2"), saved)


def test_a_folder_without_adapter_and_a_model_without_adapters(random_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        gl.load_adapter(random_model("gemma"), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        gl.save_adapter(random_model("gemma"), tmp_path)


# Adapters that KerasHub's own `enable_lora` made


def test_stock_adapters_are_kept_like_ours(tiny_factory, tmp_path):
    model = tiny_factory()
    model.backbone.enable_lora(rank=3)
    gl.fit(model, gl.load_tiny_world()[0].select(range(8)), verbose=0)
    assert (model.gemma_lora.lora.rank, model.gemma_lora.lora.targets) == (3, ("query", "value"))
    gl.save_adapter(model, tmp_path / "ours")
    gl.export_peft(model, tmp_path / "peft")
    for folder in ("ours", "peft"):
        fresh = tiny_factory()
        gl.load_adapter(fresh, tmp_path / folder)
        assert np.abs(logits(fresh) - logits(model)).max() < 1e-5
    assert gl.enable_lora(model, rank=3) is model.gemma_lora.lora
    with pytest.raises(ValueError, match="has adapters already: rank=3"):
        gl.enable_lora(model, rank=4)


def test_stock_adapters_on_a_part_of_the_blocks_are_refused(tiny_factory, tmp_path):
    model = tiny_factory()
    model.backbone.transformer_layers[0].attention.query_dense.enable_lora(2)
    with pytest.raises(ValueError, match="1 of the 4 layers query"):
        gl.save_adapter(model, tmp_path)


def test_a_file_in_the_folder_stands_for_the_folder(tiny_factory, tmp_path):
    model = tiny_factory()
    gl.enable_lora(model)
    randomize_adapters(model)
    gl.save_adapter(model, tmp_path)
    other = tiny_factory()
    gl.load_adapter(other, tmp_path / "adapter.safetensors")
    for weight, same in zip(model.trainable_variables, other.trainable_variables, strict=True):
        assert np.array_equal(weight.numpy(), same.numpy())


def test_what_keras_saves_during_a_run_can_be_read_again(tiny_factory, tmp_path):
    model = tiny_factory()
    gl.enable_lora(model)
    file = tmp_path / "best.weights.h5"
    keep = keras.callbacks.ModelCheckpoint(file, save_weights_only=True, monitor="loss")
    gl.fit(model, [{"question": "Why?", "answer": "So."}], callbacks=keep, verbose=0)
    other = tiny_factory()
    with pytest.raises(ValueError, match=r"its adapter merged, .*model.load_weights\(file\)"):
        gl.load_adapter(other, file)
    other.load_weights(file)
    assert np.allclose(logits(other), logits(model), atol=1e-4)


def test_adapters_that_keras_has_emptied_are_not_trained_or_saved(tiny_factory, tmp_path):
    """It merges what it loads into the kernels, and leaves zeros that cannot learn."""
    model = tiny_factory()
    gl.enable_lora(model)
    model.save_weights(tmp_path / "all.weights.h5")
    model.load_weights(tmp_path / "all.weights.h5")
    with pytest.raises(ValueError, match=r"The adapters are empty, A and B are zero"):
        gl.fit(model, [{"question": "Why?", "answer": "So."}], verbose=0)
    with pytest.raises(ValueError, match=r"The adapters are empty, A and B are zero"):
        gl.save_adapter(model, tmp_path / "adapter")


def test_what_is_no_adapter_names_the_call_that_takes_it(tiny, tmp_path):
    tiny.save_to_preset(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"holds a model, not an adapter"):
        gl.load_adapter(tiny, tmp_path / "model")
    (tmp_path / "notes.txt").write_text("Water the basil.")
    with pytest.raises(FileNotFoundError, match=r"notes.txt is no adapter"):
        gl.load_adapter(tiny, tmp_path / "notes.txt")
    with pytest.raises(TypeError, match=r"source is a path, as text or a pathlib.Path"):
        gl.load_adapter(tiny, 5)
