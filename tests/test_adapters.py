import json

import numpy as np
import pytest
from families import FAMILIES
from safetensors.numpy import load_file, save_file
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora.lora import lora_layers


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
        f"decoder_block_{i}/attention/{name}/{part}" for i in range(4) for name in ("query", "value") for part in "ab"
    }


def test_a_loaded_adapter_answers_with_its_own_template(tiny_tuned, tiny_factory, tmp_path):
    gl.save_adapter(tiny_tuned, tmp_path)
    fresh = tiny_factory()
    gl.load_adapter(fresh, tmp_path)
    assert gl.generate(fresh, "What is the capital of Slovenia?") == "The capital of Slovenia is Ljubljana."


def test_saving_again_replaces_and_leaves_no_parts(random_model, tmp_path):
    model = random_model("gemma")
    gl.enable_lora(model)
    for seed in (1, 2):
        randomize_adapters(model, seed)
        gl.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    layer = lora_layers(model)["decoder_block_0/attention/query"]
    assert np.array_equal(
        load_file(tmp_path / "adapter.safetensors")["decoder_block_0/attention/query/b"], layer.lora_kernel_b
    )


@pytest.fixture
def saved(random_model, tmp_path):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    return gl.save_adapter(model, tmp_path / "saved")


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_tensors(f, lambda t: t.pop("decoder_block_0/attention/query/a")), "does not fit"),
        (lambda f: change_tensors(f, lambda t: t.update(spare=np.zeros(1, "float32"))), "does not fit"),
        (lambda f: change_tensors(f, lambda t: [x.fill(np.nan) for x in t.values()]), "no numbers"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"cut"), "cannot be read"),
        (lambda f: (f / "adapter.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter.json").write_text('{"format": 9}'), "cannot be read|format 9"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_left_as_it_was(random_model, saved, damage, message):
    model = random_model("gemma")
    base = logits(model)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(model, saved)
    assert np.array_equal(logits(model), base)
    assert not lora_layers(model)


def test_another_base_is_refused(random_model, saved):
    with pytest.raises(ValueError, match="does not fit this model"):
        gl.load_adapter(random_model("gemma2"), saved)


def test_a_folder_without_adapter_and_a_model_without_adapters(random_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        gl.load_adapter(random_model("gemma"), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        gl.save_adapter(random_model("gemma"), tmp_path)
