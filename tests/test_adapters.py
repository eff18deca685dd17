import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES
from safetensors.numpy import load_file, save_file
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora.formats.adapter import _checksum, _tensors
from gemma_lora.lora import ALL_LINEAR, lora_layers
from gemma_lora.sampling import template_of


@pytest.mark.parametrize("targets", ["query_value", "all_linear"])
@pytest.mark.parametrize("family", FAMILIES)
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
    about = json.loads((gl.save_adapter(tiny_tuned, tmp_path) / "adapter.json").read_text())
    assert about["base"] == "tiny_gemma_en"
    assert about["run"]["learning_rate"] == 0.005
    assert set(load_file(tmp_path / "adapter.safetensors")) == {
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
    with pytest.raises(FileNotFoundError, match="hf://me/mine is an address: download it"):
        gl.load_adapter(tiny, "hf://me/mine")


def test_saving_again_replaces_and_leaves_no_parts(random_model, tmp_path):
    model = random_model("gemma")
    gl.enable_lora(model)
    for seed in (1, 2):
        randomize_adapters(model, seed)
        gl.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter.safetensors",
    ]
    layer = lora_layers(model)["decoder_block_0/attention/query"]
    assert np.array_equal(
        load_file(tmp_path / "adapter.safetensors")["decoder_block_0/attention/query/b"],
        layer.lora_kernel_b,
    )


def test_the_file_holds_losses_and_versions_and_no_path_of_the_machine(tmp_path):
    gl.load("tiny_gemma_en").save_to_preset(str(tmp_path / "my-base"))
    model = gl.load(tmp_path / "my-base")
    train, held_out = gl.load_tiny_world()
    gl.enable_lora(model)
    gl.fit(model, train.select(range(40)), validation=held_out.select(range(8)), verbose=0)
    gl.save_adapter(model, tmp_path / "mine")
    about = json.loads((tmp_path / "mine/adapter.json").read_text())
    assert about["base"] == "my-base"
    assert str(tmp_path) not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "mine").iterdir()
    )
    losses = about["run"]["held_out_loss"]
    assert losses["tuned"] == about["run"]["history"]["val_loss"][-1] < losses["base"]
    with gl.adapters_off(model):
        assert gl.evaluate(model, held_out.select(range(8)), answers=False).loss == pytest.approx(
            losses["base"], 1e-5
        )
    assert set(about["versions"]) == {"gemma-lora", "keras", "keras-hub", "jax"}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_save_that_is_cut_off_leaves_an_adapter(random_model, tmp_path, monkeypatch, step):
    """The process ends at one of the three renames of a second save: what is there is the old one, or the new."""
    model = random_model("gemma")
    gl.enable_lora(model)
    outputs = []
    for seed in (1, 2):
        randomize_adapters(model, seed)
        outputs.append(logits(model))
        if seed == 1:
            gl.save_adapter(model, tmp_path)
    replace, calls = Path.replace, []

    def cut_off(self, target):
        calls.append(target)
        if len(calls) == step:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gl.save_adapter(model, tmp_path)
    monkeypatch.undo()
    fresh = random_model("gemma")
    gl.load_adapter(fresh, tmp_path)
    assert np.array_equal(logits(fresh), outputs[0])
    gl.save_adapter(model, tmp_path)
    gl.load_adapter(fresh, tmp_path)
    assert np.array_equal(logits(fresh), outputs[1])
    assert not [*tmp_path.glob("*.part"), *tmp_path.glob("*.old")]


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


def test_switching_between_adapters_of_one_shape_compiles_nothing(tiny_lora, tmp_path):
    for seed in (1, 2):
        randomize_adapters(tiny_lora, seed)
        gl.save_adapter(tiny_lora, tmp_path / str(seed))
    answers = []
    gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=8)
    (_, function), *_ = tiny_lora.gemma_lora.samplers.values()
    (jitted,) = [
        c.cell_contents for c in function.__closure__ if hasattr(c.cell_contents, "_cache_size")
    ]
    for seed in (1, 2, 1):
        gl.load_adapter(tiny_lora, tmp_path / str(seed))
        answers.append(gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=8))
    assert jitted._cache_size() == 1
    assert answers[0] == answers[2] != answers[1]


@pytest.fixture
def saved(random_model, tmp_path):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    return gl.save_adapter(model, tmp_path / "saved")


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


@pytest.mark.parametrize("targets", [None, ["query", "value"], "all_linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_stock_keras_are_read(random_model, tmp_path, family, targets):
    theirs, ours, file = random_model(family), random_model(family), tmp_path / "theirs.lora.h5"
    names = None if targets is None else ALL_LINEAR if targets == "all_linear" else targets
    theirs.backbone.enable_lora(4, target_layer_names=names)
    randomize_adapters(theirs)
    theirs.backbone.save_lora_weights(str(file))
    gl.load_adapter(ours, file, targets=targets)
    assert np.array_equal(logits(ours), logits(theirs))
    other = random_model(family)
    with pytest.raises(ValueError, match="pass the targets it was made with"):
        gl.load_adapter(other, file, targets="key")
    with pytest.raises(ValueError, match=r"does not fit|pass the targets"):
        gl.load_adapter(gl.load("tiny_gemma_en"), file, targets=targets)
    assert not lora_layers(other)


def change_tensors(folder, change):
    """Change tensors with the checksum made to fit."""
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    change_about(folder)


def change_about(folder, **changes):
    about = json.loads((folder / "adapter.json").read_text()) | changes
    about.pop("checksum")
    checksum = _checksum(about, (folder / "adapter.safetensors").read_bytes())
    (folder / "adapter.json").write_text(json.dumps(about | {"checksum": checksum}))


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
        (lambda f: (f / "adapter.safetensors").write_bytes(b"cut"), "cut or altered"),
        (lambda f: (f / "adapter.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter.json").write_text('{"format": 9}'), "its format is 9"),
        (lambda f: change_about(f, rank=-1), "no usable rank"),
        (lambda f: change_about(f, targets=["../query"]), "is for layers"),
        (lambda f: change_about(f, targets=["query", "value", "nonsense"]), "is for layers"),
        (lambda f: change_about(f, targets=[["query"]]), "is for layers"),
        (lambda f: change_about(f, targets=[]), "is for layers"),
        (lambda f: change_about(f, targets=["query"]), "does not fit"),
        (lambda f: change_about(f, alpha=-1.0), "no usable rank"),
        (lambda f: change_about(f, run={"template": {"name": "x"}}), "cannot be read"),
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


def damage_by_chance(folder, draw):
    """One of many ways in which a folder may reach a friend damaged; returns its name."""
    tensors, about = folder / "adapter.safetensors", folder / "adapter.json"
    kind = draw.choice(
        [
            "flip tensors",
            "flip json",
            "cut tensors",
            "cut json",
            "swap",
            "edit",
            "name",
            "empty",
            "tail",
        ]
    )
    if kind.startswith("flip"):
        path = tensors if "tensors" in kind else about
        content = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind.startswith("cut"):
        path = tensors if "tensors" in kind else about
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif kind in ("swap", "name"):
        found = load_file(tensors)
        one, other = draw.sample(sorted(found), 2)
        if kind == "swap":
            found[one], found[other] = found[other], found[one]
        else:
            found[draw.choice(["../x", "/x", "a/../../x", "", "x" * 5000])] = found.pop(one)
        save_file(found, tensors)
    elif kind == "edit":
        content = json.loads(about.read_text())
        key = draw.choice(sorted(content))
        content[key] = draw.choice([None, -1, 0, 3, "../x", [], {}, 1e308, "query", True])
        about.write_text(json.dumps(content))
    elif kind == "empty":
        draw.choice([tensors, about]).write_bytes(b"")
    else:
        with draw.choice([tensors, about]).open("ab") as file:
            file.write(bytes(draw.randrange(1, 256) for _ in range(draw.randint(1, 20))))
    return kind


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.full)])
def test_no_damaged_folder_is_loaded_silently_wrong(random_model, saved, tmp_path, count):
    model, draw, tally = random_model("gemma"), random.Random(count), Counter()
    right = gl.load_adapter(random_model("gemma"), saved)
    tensors, base = load_file(saved / "adapter.safetensors"), logits(model)
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
        else:  # such as a bit of a blank in the JSON, or an edit to what was there
            assert loaded == right
            assert all(
                np.array_equal(weight, tensors[name]) for name, weight in _tensors(model).items()
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
    about = json.loads((saved / "adapter.json").read_text())
    change_about(saved, targets=about["targets"][::-1])
    assert gl.load_adapter(model, saved, targets=about["targets"]).targets == tuple(
        about["targets"]
    )


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_of_quantized_bases(random_model, tmp_path, mode):
    model, fresh = random_model("gemma"), random_model("gemma")
    for one in (model, fresh):
        one.backbone.quantize(mode)
    gl.enable_lora(model, rank=2, targets="all_linear")
    randomize_adapters(model)
    gl.save_adapter(model, tmp_path / "own")
    gl.load_adapter(fresh, tmp_path / "own")
    assert np.array_equal(logits(fresh), logits(model))
    gl.export_peft(model, tmp_path / "peft")
    gl.load_adapter(fresh, tmp_path / "peft")
    assert np.abs(logits(fresh) - logits(model)).max() < 1e-3 * np.abs(logits(model)).max()


def test_another_base_is_refused(random_model, saved):
    with pytest.raises(ValueError, match="does not fit this model"):
        gl.load_adapter(random_model("gemma2"), saved)


def test_a_folder_without_adapter_and_a_model_without_adapters(random_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        gl.load_adapter(random_model("gemma"), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        gl.save_adapter(random_model("gemma"), tmp_path)
