"""`gl.enable_lora`, and what a model with adapters computes, counts and trains."""

import jax
import keras_hub
import numpy as np
import pytest
from families import EACH_FAMILY, randomize

import gemma_lora as gl
from gemma_lora.lora import adapter_weights, fingerprints, kernel_shape, linear_layers, lora_layers
from gemma_lora.training import check_only_adapters_train

FULL = pytest.mark.full
IDS = {"token_ids": np.arange(2, 18).reshape(2, 8), "padding_mask": np.ones((2, 8), "int32")}


def logits(model) -> np.ndarray:
    """What a model computes for two rows of eight tokens."""
    return np.asarray(model(IDS))


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("targets", ["all_linear", pytest.param("query_value", marks=FULL)])
def test_enabled_off_and_merged(random_model, family, targets):
    """Its logits are those of the base first, and those of its kernels at last."""
    model = random_model(family)
    base = logits(model)
    gl.enable_lora(model, rank=3, alpha=5, targets=targets)
    assert np.array_equal(logits(model), base)
    randomize_adapters(model)
    tuned = logits(model)
    assert np.abs(tuned - base).max() > 1e-3
    with gl.adapters_off(model):
        assert np.array_equal(logits(model), base)
    assert np.array_equal(logits(model), tuned)
    gl.merge(model)
    difference = np.abs(logits(model) - tuned).max()
    assert difference < 1e-4 * np.abs(tuned).max()
    assert np.abs(base - tuned).max() > 100 * difference


def test_adapters_come_back_after_an_error_inside(random_model):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)
    tuned = logits(model)
    with pytest.raises(KeyError), gl.adapters_off(model):
        raise KeyError
    assert np.array_equal(logits(model), tuned)


def test_adapters_off_compiles_nothing_again(random_model, caplog):
    model = random_model("gemma")
    gl.enable_lora(model)
    randomize_adapters(model)

    def compiled() -> list[str]:
        return [message for message in caplog.messages if message.startswith("Compiling")]

    with gl.adapters_off(model):
        # Zeros and copies are also compiled the first time.
        pass
    with jax.log_compiles():
        gl.generate(model, "What is the capital of France?", max_new_tokens=4)
        assert compiled()
        caplog.clear()
        with gl.adapters_off(model):
            gl.generate(model, "What is the capital of France?", max_new_tokens=4)
        assert not compiled()


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_only_adapters_are_trainable_and_the_summary_counts_them(random_model, family):
    model = random_model(family)
    base = model.count_params()
    summary = gl.enable_lora(model, rank=5, targets="all_linear")
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_variables)
    assert summary.trainable == trainable == model.count_params() - base
    assert summary.layers == dict.fromkeys(summary.targets, 2)
    assert "LoRA of rank 5" in str(summary)
    assert "<table" in summary._repr_html_()


# Of the published models: layers, query heads, key/value heads, width, feed-forward
# width, head width.
@pytest.mark.parametrize(
    ("shape", "targets", "trainable"),
    [
        # gemma_2b_en
        ((18, 8, 1, 2048, 32768, 256), "query_value", 1_363_968),
        pytest.param((18, 8, 1, 2048, 32768, 256), "all_linear", 5_806_080, marks=FULL),
        # gemma2_2b_en
        pytest.param((26, 8, 4, 2304, 18432, 256), "query_value", 2_928_640, marks=FULL),
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

    # Shapes only: no weights are made.
    jax.eval_shape(build)
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


@pytest.fixture(scope="module")
def plain(random_model):
    """A model without adapters, for calls that raise and so change nothing."""
    return random_model("gemma")


@pytest.fixture(scope="module")
def shared(random_model):
    """A model with adapters of rank 2, for calls that raise and so change nothing."""
    model = random_model("gemma")
    gl.enable_lora(model, rank=2)
    return model


@pytest.mark.parametrize(
    "other", [{"rank": 3}, {"alpha": 8}, {"targets": "all_linear"}, {"seed": 7}]
)
def test_twice_with_other_options_says_how_to_start_afresh(shared, other):
    with pytest.raises(ValueError, match=r"take them off first: gl\.remove_adapter\(model\)"):
        gl.enable_lora(shared, **{"rank": 2, **other})


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
def test_wrong_options_raise(plain, options, message):
    with pytest.raises(ValueError, match=message):
        gl.enable_lora(plain, **options)
    assert not lora_layers(plain)


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
    layers = list(lora_layers(model).values())
    assert not np.array_equal(layers[0].lora_kernel_a, layers[2].lora_kernel_a)


@pytest.mark.parametrize("family", ["gemma", pytest.param("gemma3", marks=FULL)])
def test_adapters_of_a_bfloat16_base_are_float32(random_model, family):
    model = random_model(family, dtype="bfloat16")
    base = logits(model)
    gl.enable_lora(model)
    for layer in lora_layers(model).values():
        assert layer.lora_kernel_a.dtype == layer.lora_kernel_b.dtype == "float32"
        assert layer._kernel.dtype == "bfloat16"
    assert np.array_equal(logits(model), base)


def test_something_that_is_no_gemma_raises():
    with pytest.raises(TypeError, match="Received: dict"):
        gl.enable_lora({})


def test_a_fingerprint_is_that_of_the_base(random_model):
    model = random_model("gemma")
    shapes = [kernel_shape(layer) for layer in linear_layers(model).values()]
    before = fingerprints(model)
    gl.enable_lora(model, targets="all_linear")
    randomize_adapters(model)
    assert fingerprints(model) == before
    assert [kernel_shape(layer) for layer in linear_layers(model).values()] == shapes
    assert fingerprints(random_model("gemma", dtype="bfloat16")) == before
    other = fingerprints(random_model("gemma", seed=1))
    assert {name for name in before if other[name] != before[name]} == {"weights"}


def randomize_adapters(model, seed=0):
    """Draw A and B as after training: B is zero before."""
    randomize(adapter_weights(model), seed)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("q_proj", "query"), ("down_proj", "ffw_linear"), ("all-linear", "all_linear")],
)
def test_names_of_peft_are_told_by_ours(tiny, name, ours):
    with pytest.raises(ValueError, match=f"No layer is named '{name}'.* Did you mean '{ours}'"):
        gl.enable_lora(tiny, targets=[name])
