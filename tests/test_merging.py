"""`gl.merge` and `gl.remove_adapter`: what they leave, and what can be undone."""

import numpy as np
import pytest
from families import FAMILIES
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora import lora as merging
from gemma_lora.lora import lora_layers
from gemma_lora.models import template_of

FULL = pytest.mark.full


def tuned(model, **options):
    gl.enable_lora(model, **{"rank": 3, "alpha": 6, "targets": "all_linear", **options})
    randomize_adapters(model)
    return logits(model).astype("float32")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gemma2", "bfloat16"),
        ("gemma3", "float32"),
        *(pytest.param(family, "float32", marks=FULL) for family in FAMILIES if family != "gemma3"),
        *(
            pytest.param(family, "bfloat16", marks=FULL)
            for family in FAMILIES
            if family != "gemma2"
        ),
    ],
)
def test_a_merged_model_computes_the_same_without_adapters(random_model, family, dtype):
    model = random_model(family, dtype=dtype)
    paths = {weight.path for weight in model.weights}
    before = tuned(model)
    gl.merge(model)
    assert {weight.path for weight in model.weights} == paths
    assert not lora_layers(model)
    rounding = 1e-5 if dtype == "float32" else 0.05
    assert np.abs(logits(model).astype("float32") - before).max() < rounding * np.abs(before).max()


@pytest.mark.parametrize(
    ("dtype", "keep"),
    [
        ("float32", False),
        ("bfloat16", True),
        pytest.param("float32", True, marks=FULL),
        pytest.param("bfloat16", False, marks=FULL),
    ],
)
def test_remove_adapter_leaves_the_model_as_loaded(random_model, dtype, keep):
    model, fresh = random_model("gemma2", dtype=dtype), random_model("gemma2", dtype=dtype)
    policies = [layer.dtype_policy.name for layer in fresh._flatten_layers()]
    tuned(model)
    if keep:
        gl.merge(model, keep=True)
    gl.remove_adapter(model)
    assert np.array_equal(logits(model), logits(fresh))
    assert [weight.path for weight in model.weights] == [weight.path for weight in fresh.weights]
    assert [w.path for w in model.trainable_weights] == [w.path for w in fresh.trainable_weights]
    assert [layer.dtype_policy.name for layer in model._flatten_layers()] == policies
    # Nothing to remove is no fault, and other adapters can follow.
    gl.remove_adapter(model)
    gl.enable_lora(model, rank=2, targets="query_value")


def test_what_was_compiled_for_one_adapter_is_not_used_for_another(tiny_factory):
    """The two layers have adapters of the same shapes, and here of the same values."""
    model = tiny_factory()
    answers = []
    for targets in ("ffw_gating", "ffw_gating_2"):
        tuned(model, targets=targets)
        answers.append(gl.generate(model, "What is a foal?", max_new_tokens=8))
        gl.remove_adapter(model)
    assert answers[0] != answers[1]


def test_kernels_that_were_not_kept_are_gone_and_that_is_said(random_model):
    model = random_model("gemma")
    tuned(model)
    gl.merge(model)
    with pytest.raises(ValueError, match=r"load the model again, gl\.load"):
        gl.remove_adapter(model)
    merged = logits(model)
    tuned(model)
    # The merged model is the base of a second adapter.
    gl.remove_adapter(model)
    assert np.array_equal(logits(model), merged)


@pytest.mark.parametrize("keep", [True, False])
def test_only_the_first_merge_of_a_model_can_keep(random_model, keep):
    model = random_model("gemma")
    base = logits(model)
    tuned(model, targets="query_value")
    gl.merge(model, keep=keep)
    merged = logits(model)
    both = tuned(model, targets="all_linear")
    with pytest.raises(ValueError, match=r"Merge for good, gl\.merge\(model\)"):
        gl.merge(model, keep=True)
    assert np.array_equal(logits(model), both)
    gl.remove_adapter(model)
    assert np.array_equal(logits(model), base if keep else merged)


def test_a_merge_without_keep_is_final_and_lets_go_of_kept_kernels(random_model):
    model = random_model("gemma")
    tuned(model, targets="query_value")
    gl.merge(model, keep=True)
    both = tuned(model, targets="all_linear")
    gl.merge(model)
    assert np.abs(logits(model) - both).max() < 1e-5 * np.abs(both).max()
    assert model.gemma_lora.merged.kernels is None
    with pytest.raises(ValueError, match="load the model again"):
        gl.remove_adapter(model)


def test_a_merge_that_is_interrupted_changes_nothing(random_model, monkeypatch):
    model = random_model("gemma")
    base, before = logits(model), tuned(model)
    kernels, whole = iter(range(99)), merging.merged_kernel

    def interrupted(layer):
        if next(kernels) == 4:
            raise KeyboardInterrupt
        return whole(layer)

    monkeypatch.setattr(merging, "merged_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gl.merge(model, keep=True)
    assert np.array_equal(logits(model), before)
    monkeypatch.undo()
    gl.merge(model, keep=True)
    assert np.abs(logits(model) - before).max() < 1e-5 * np.abs(before).max()
    gl.remove_adapter(model)
    assert np.array_equal(logits(model), base)


def test_a_second_adapter_comes_off_a_merged_model_with_its_record(random_model):
    model = random_model("gemma")
    rows, _ = gl.load_tiny_world()
    gl.enable_lora(model)
    gl.fit(model, rows.select(range(8)), template="turns", verbose=0)
    gl.merge(model)
    merged = logits(model)
    assert template_of(model).name == "turns"
    gl.enable_lora(model)
    gl.fit(model, rows.select(range(20)), template="recipe", verbose=0)
    assert template_of(model).name == "recipe"
    gl.remove_adapter(model)
    assert np.array_equal(logits(model), merged)
    assert template_of(model).name == "turns" and "on 8 records" in gl.model_card(model)
    with pytest.raises(ValueError, match="load the model again"):
        gl.remove_adapter(model)


def test_the_record_of_the_last_merge_is_the_models(random_model):
    model = random_model("gemma")
    for rank in (1, 2):
        gl.enable_lora(model, rank=rank)
        model.gemma_lora.run = {"rows": rank}
        gl.merge(model)
        merge = model.gemma_lora.merged
        assert (merge.lora.rank, merge.run, model.gemma_lora.run) == (rank, *[{"rows": rank}] * 2)


def test_a_quantized_base_takes_adapters_but_no_merge_and_stays_frozen(random_model):
    model = random_model("gemma")
    model.backbone.quantize("int8")
    model.backbone.transformer_layers[0].attention.trainable = False
    before = [(weight.path, weight.trainable) for weight in model.weights]
    tuned(model)
    with pytest.raises(ValueError, match="quantized"):
        gl.merge(model)
    gl.remove_adapter(model)
    assert [(weight.path, weight.trainable) for weight in model.weights] == before


def test_a_merged_model_is_saved_as_an_ordinary_preset(tiny_tuned, tmp_path):
    questions = list(gl.load_tiny_world()[1].select(range(8)))
    answers = gl.generate(tiny_tuned, questions, max_new_tokens=48)
    gl.save_adapter(tiny_tuned, tmp_path / "adapter")
    model = gl.load("tiny_gemma_en")
    gl.load_adapter(model, tmp_path / "adapter")
    gl.merge(model)
    # With the template of its tuning, which a merged model still knows.
    assert gl.generate(model, questions, max_new_tokens=48) == answers
    model.save_to_preset(str(tmp_path / "merged"))
    merged = gl.load(tmp_path / "merged")
    assert gl.generate(merged, questions, template="recipe", max_new_tokens=48) == answers


def test_nothing_to_merge(random_model):
    with pytest.raises(ValueError, match="no adapters to merge"):
        gl.merge(random_model("gemma"))
