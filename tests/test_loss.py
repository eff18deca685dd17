"""The chunked loss against the plain one; a step against its rows one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import EACH_FAMILY
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gemma_lora as gl
from gemma_lora.batches import Batches
from gemma_lora.loss import CHUNK, chunked_cross_entropy, frozen_values, records_apart, token_loss
from gemma_lora.tokens import encode


def plain(project, hidden, targets, weights):
    logits = project(hidden)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return jnp.sum(weights * losses), jnp.sum(weights * (jnp.argmax(logits, axis=1) == targets))


# Each shape takes seconds to compile. So `make test` has a tail behind a chunk, whole
# chunks, and two that are drawn; `make test-full` draws many.
@settings(max_examples=settings().max_examples // 50)
@example(tokens=CHUNK + 1, vocabulary=5, share=0.3, capped=True, seed=0)
@example(tokens=3 * CHUNK, vocabulary=5, share=1.0, capped=False, seed=0)
@given(
    st.sampled_from([1, 7, CHUNK, CHUNK + 1, 3 * CHUNK]) | st.integers(1, 3 * CHUNK),
    st.integers(2, 50),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(0, 999),
)
def test_it_is_the_plain_loss_with_its_gradient(tokens, vocabulary, share, capped, seed):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(8, vocabulary)), "float32")
    hidden = jnp.asarray(3 * rng.normal(size=(tokens, 8)), "float32")
    targets = jnp.asarray(rng.integers(0, vocabulary, tokens), "int32")
    weights = jnp.asarray((rng.random(tokens) < share) * rng.random(tokens), "float32")

    def project(rows):
        return 5 * jnp.tanh(rows @ table / 5) if capped else rows @ table

    for gradient in (True, False):
        found = chunked_cross_entropy(project, hidden, targets, weights, gradient=gradient)
        np.testing.assert_allclose(
            found, plain(project, hidden, targets, weights), rtol=1e-5, atol=1e-5
        )
    slopes = [
        jax.grad(lambda hidden, loss=loss: loss(hidden)[0])(hidden)
        for loss in (
            lambda hidden: chunked_cross_entropy(project, hidden, targets, weights, gradient=True),
            lambda hidden: plain(project, hidden, targets, weights),
        )
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-5)


def gradients(model, batches) -> tuple[list, float]:
    """Sums of the gradients of all batches, each times its tokens, and the tokens."""
    adapters, frozen = [v.value for v in model.trainable_variables], frozen_values(model)
    gradient = jax.jit(jax.grad(partial(token_loss, model, gradient=True), has_aux=True))
    sums, tokens = [0.0] * len(adapters), 0.0
    for batch in (batches[i] for i in range(len(batches))):
        slopes, (counts, _) = gradient(adapters, frozen, batch)
        count = float(counts[2])
        assert count == batch[2].sum()
        sums = [
            total + count * np.asarray(slope, "float64")
            for total, slope in zip(sums, slopes, strict=True)
        ]
        tokens += count
    return sums, tokens


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_batches_have_the_gradient_of_their_rows_one_by_one(random_model, family):
    model = random_model(family)
    gl.enable_lora(model, rank=2, targets="all_linear")
    for name, layer in gl.lora.lora_layers(
        model
    ).items():  # B is zero at first, and then A has no gradient
        layer.lora_kernel_b.assign(
            0.1 * np.random.default_rng(len(name)).normal(size=layer.lora_kernel_b.shape)
        )
    encoded = encode(model, gl.load_tiny_world()[0].select(range(12)))
    together, tokens = gradients(model, Batches(encoded, batch_tokens=300, seed=0))
    alone, same = gradients(model, Batches(encoded, batch_size=1))
    assert tokens == same
    for one, other in zip(together, alone, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_the_logits_of_a_whole_batch_are_never_there(tiny_lora):
    """The compiler reserves less for a long batch than its logits alone would take."""
    need = gl.memory_budget(tiny_lora, batch_size=64, sequence_length=256, compile=False).need
    vocabulary = tiny_lora.backbone.vocabulary_size
    text = jax.jit(
        lambda h, t, w: chunked_cross_entropy(
            lambda r: r @ jnp.ones((4, vocabulary)), h, t, w, gradient=True
        )
    )
    tokens = need.batch_size * need.sequence_length
    shapes = [
        jax.ShapeDtypeStruct(*one)
        for one in (((tokens, 4), "float32"), ((tokens,), "int32"), ((tokens,), "float32"))
    ]
    reserved = text.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert reserved < 4 * tokens * vocabulary / 10


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_no_record_sees_another_of_its_row(random_model, family):
    """Another record before it, or none: the hidden states of a record are the same."""
    model = random_model(family)
    rng = np.random.default_rng(0)
    one, other, third = (rng.integers(4, 200, (1, n)) for n in (9, 20, 20))
    hidden = []
    for before in (other, third):
        ids = np.concatenate([before, one, one], axis=1)
        numbers = np.array([[1] * 20 + [2] * 9 + [3] * 9])
        with records_apart(model):
            states = model.backbone({"token_ids": ids, "padding_mask": numbers})
        hidden.append(np.asarray(states)[0])
    alone = np.asarray(model.backbone({"token_ids": one, "padding_mask": np.ones_like(one)}))[0]
    for part in (hidden[0][20:29], hidden[1][20:29], hidden[0][29:]):
        np.testing.assert_allclose(part, alone, atol=1e-5)
    whole = model.backbone(
        {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    )  # and the model is as it was
    assert np.abs(np.asarray(whole)[0, 20:29] - alone).max() > 1e-3


def test_no_logits_for_tokens_that_do_not_count():
    """On a CPU, a chunk is cut behind its last token that counts, rounded up to 32."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(100, 8)), "float32")
    table = jnp.asarray(rng.normal(size=(8, 50)), "float32")
    targets = jnp.asarray(rng.integers(0, 50, 100))
    computed = []

    def project(rows):
        jax.debug.callback(lambda: computed.append(len(rows)))
        return rows @ table

    @jax.jit
    def ours(hidden, weights):
        return chunked_cross_entropy(project, hidden, targets, weights, gradient=True)[0]

    for learned in (0, 1, 31, 32, 33, 64, 99, 100):
        weights = jnp.asarray(rng.permutation(np.arange(100) < learned), "float32")
        found = jax.value_and_grad(ours)(hidden, weights)
        jax.effects_barrier()
        wanted = jax.value_and_grad(
            lambda hidden, weights=weights: plain(lambda x: x @ table, hidden, targets, weights)[0]
        )(hidden)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert computed == [32, 32, 32, 64, 64, 100, 100] or jax.default_backend() != "cpu"
