import jax
import keras_hub
import numpy as np
import pytest
from families import FAMILIES, randomize

import gemma_lora as gl
from gemma_lora.lora import adapter_weights, adapters_off, lora_layers
from gemma_lora.training import check_only_adapters_train

IDS = {"token_ids": np.arange(2, 18).reshape(2, 8), "padding_mask": np.ones((2, 8), "int32")}


def logits(model) -> np.ndarray:
    return np.asarray(model(IDS))


@pytest.mark.parametrize("targets", ["query_value", "all_linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_enabling_changes_no_output(random_model, family, targets):
    model = random_model(family)
    before = logits(model)
    gl.enable_lora(model, rank=3, targets=targets)
    assert np.array_equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_exactly_the_base_and_comes_back(random_model, family):
    model = random_model(family)
    base = logits(model)
    gl.enable_lora(model, targets="all_linear")
    randomize_adapters(model)
    tuned = logits(model)
    assert np.abs(tuned - base).max() > 1e-3
    with gl.adapters_off(model):
        assert np.array_equal(logits(model), base)
    assert np.array_equal(logits(model), tuned)


def test_adapters_come_back_after_an_error_inside(random_model):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    tuned = logits(model)
    with pytest.raises(KeyError), gl.adapters_off(model):
        raise KeyError
    assert np.array_equal(logits(model), tuned)


def test_adapters_off_compiles_nothing_anew(tiny_lora):
    randomize_adapters(tiny_lora)
    gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=4)
    with jax.log_compiles(), gl.adapters_off(tiny_lora):
        (_, function), *_ = tiny_lora.gemma_lora.samplers.values()
        compiled = function.__closure__
        gl.generate(tiny_lora, "What is the capital of France?", max_new_tokens=4)
    jitted = next(
        cell.cell_contents for cell in compiled if hasattr(cell.cell_contents, "_cache_size")
    )
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trainable_and_the_summary_counts_them(random_model, family):
    model = random_model(family)
    base = model.count_params()
    summary = gl.enable_lora(model, rank=5, targets="all_linear")
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_variables)
    assert summary.trainable == trainable == model.count_params() - base
    assert summary.layers == dict.fromkeys(summary.targets, 2)
    assert "LoRA of rank 5" in str(summary)
    assert "<table" in summary._repr_html_()


# (layers, query heads, key/value heads, width, feed-forward width, head width) of the published models.
@pytest.mark.parametrize(
    ("shape", "targets", "trainable"),
    [
        ((18, 8, 1, 2048, 32768, 256), "query_value", 1_363_968),  # gemma_2b_en
        ((18, 8, 1, 2048, 32768, 256), "all_linear", 5_806_080),
        ((26, 8, 4, 2304, 18432, 256), "query_value", 2_928_640),  # gemma2_2b_en
    ],
)
def test_counts_are_the_published_ones(shape, targets, trainable):
    layers, heads, kv_heads, width, feed_forward, head = shape
    counted = []

    def build():
        backbone = keras_hub.models.GemmaBackbone(
            vocabulary_size=256_000,
            num_layers=layers,
            num_query_heads=heads,
            num_key_value_heads=kv_heads,
            hidden_dim=width,
            intermediate_dim=feed_forward,
            head_dim=head,
        )
        counted.append(
            gl.enable_lora(keras_hub.models.GemmaCausalLM(backbone), rank=4, targets=targets)
        )

    jax.eval_shape(build)  # shapes only: no weights are made
    assert counted[0].trainable == trainable


def test_twice_with_the_same_options_is_fine_and_freezes_again(random_model):
    model = random_model("gemma")
    first = gl.enable_lora(model, rank=2)
    randomize_adapters(model)
    tuned = logits(model)
    model.backbone.trainable = True
    with pytest.raises(ValueError, match="base weights do too"):
        check_only_adapters_train(model)
    assert gl.enable_lora(model, rank=2) == first
    check_only_adapters_train(model)
    assert np.array_equal(logits(model), tuned)


@pytest.mark.parametrize(
    "other", [{"rank": 3}, {"alpha": 8}, {"targets": "all_linear"}, {"seed": 7}]
)
def test_twice_with_other_options_says_how_to_start_afresh(random_model, other):
    model = random_model("gemma")
    gl.enable_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"take them off first: gl\.remove_adapter\(model\)"):
        gl.enable_lora(model, **{"rank": 2, **other})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["querry"]}, "Did you mean 'query'"),
        ({"targets": "all_liner"}, "Did you mean 'all_linear'"),
        ({"targets": []}, "at least one layer"),
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"alpha": -1}, "alpha=-1"),
    ],
)
def test_wrong_options_are_refused(random_model, options, message):
    model = random_model("gemma")
    with pytest.raises(ValueError, match=message):
        gl.enable_lora(model, **options)
    assert not lora_layers(model)


def test_targets_may_be_a_list_of_names(random_model):
    summary = gl.enable_lora(random_model("gemma"), targets=["value", "key"])
    assert summary.targets == ("key", "value")


def test_alpha_scales_the_update(random_model):
    outputs = []
    for alpha in (4, 8):
        model = random_model("gemma")
        base = logits(model)
        gl.enable_lora(model, rank=4, alpha=alpha, targets=["value"])
        for layer in lora_layers(model).values():
            layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 1e-4))
        outputs.append(logits(model) - base)
    assert np.abs(outputs[1]).max() == pytest.approx(2 * np.abs(outputs[0]).max(), rel=0.1)


def test_the_seed_draws_a(random_model):
    drawn = {}
    for seed in (0, 0, 1):
        model = random_model("gemma")
        gl.enable_lora(model, seed=seed)
        a = np.concatenate(
            [np.asarray(layer.lora_kernel_a).ravel() for layer in lora_layers(model).values()]
        )
        drawn.setdefault(seed, []).append(a)
    assert np.array_equal(*drawn[0])
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    layers = list(lora_layers(random_lora(random_model)).values())
    assert not np.array_equal(layers[0].lora_kernel_a, layers[2].lora_kernel_a)


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_adapters_of_a_bfloat16_base_are_float32(random_model, family):
    model = random_model(family, dtype="bfloat16")
    base = logits(model)
    gl.enable_lora(model)
    for layer in lora_layers(model).values():
        assert layer.lora_kernel_a.dtype == layer.lora_kernel_b.dtype == "float32"
        assert layer._kernel.dtype == "bfloat16"
    assert np.array_equal(logits(model), base)


def test_what_is_no_gemma_is_refused():
    with pytest.raises(TypeError, match="Received: dict"):
        gl.enable_lora({})


def random_lora(random_model):
    model = random_model("gemma")
    gl.enable_lora(model)
    return model


def randomize_adapters(model, seed=0):
    randomize(adapter_weights(model), seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["query_value", "all_linear"])
def test_by_factors_the_outputs_are_those_of_the_merged_layers(random_model, family, targets):
    model = random_model(family)
    gl.enable_lora(model, rank=3, alpha=5, targets=targets)
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_kernel_b.assign(np.random.default_rng(i).normal(size=layer.lora_kernel_b.shape))
    ids = np.random.default_rng(0).integers(4, 200, (2, 11))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    by_factors = np.asarray(model(inputs))
    with adapters_off(model):
        off = np.asarray(model(inputs))
    gl.merge(model)
    merged = np.asarray(model(inputs))
    assert np.abs(by_factors - merged).max() < 1e-4 * np.abs(merged).max()
    assert np.abs(off - merged).max() > 100 * np.abs(by_factors - merged).max()
