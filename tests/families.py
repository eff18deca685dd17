"""Small random models of every Gemma family, over the vocabulary of `tiny_gemma_en`."""

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

import gemma_lora

VOCABULARY = Path(gemma_lora.__file__).parent / "tiny/tiny_gemma_en/assets/tokenizer/vocabulary.spm"
SHAPE = dict(num_layers=2, num_query_heads=4, hidden_dim=32, intermediate_dim=64, head_dim=8)
FAMILIES = ("gemma", "gemma_many_kv", "gemma2", "gemma3")
# For parametrize. Gemma 3 has classes of its own in KerasHub. Gemma 2 goes through each
# branch of those that it shares with Gemma 1, and `tiny_gemma_en` is a Gemma 1.
EACH_FAMILY = [
    pytest.param(family, marks=[] if family in ("gemma2", "gemma3") else pytest.mark.full)
    for family in FAMILIES
]


def random_gemma(family: str, dtype: str = "float32", seed: int = 0, **options):
    """Make a small model of a family in FAMILIES, its weights drawn from the seed."""
    keras.utils.clear_session(free_memory=False)
    vocabulary = VOCABULARY.read_bytes()
    shape = SHAPE | {
        "num_key_value_heads": 1 if family == "gemma" else 2,
        "dtype": dtype,
        **options,
    }
    models = keras_hub.models
    if family == "gemma3":
        tokenizer = models.Gemma3Tokenizer(proto=vocabulary, has_vision_tokens=False)
        backbone = models.Gemma3Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            image_size=None,
            vision_encoder=None,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=16,
            **shape,
        )
        preprocessor = models.Gemma3CausalLMPreprocessor(
            tokenizer=tokenizer, image_converter=None, sequence_length=64
        )
        model = models.Gemma3CausalLM(preprocessor=preprocessor, backbone=backbone)
    else:
        tokenizer = models.GemmaTokenizer(proto=vocabulary)
        extra = {}
        if family == "gemma2":
            extra = dict(
                use_post_ffw_norm=True,
                use_post_attention_norm=True,
                attention_logit_soft_cap=50.0,
                final_logit_soft_cap=30.0,
                use_sliding_window_attention=True,
                sliding_window_size=16,
            )
        backbone = models.GemmaBackbone(
            vocabulary_size=tokenizer.vocabulary_size(), **shape, **extra
        )
        model = models.GemmaCausalLM(
            backbone, models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=64)
        )
    randomize(model.weights, seed)
    return model


def randomize(weights, seed: int = 0) -> None:
    """Draw every weight from the seed alone, no matter what was drawn before.

    NumPy draws: JAX would compile a program for each shape.
    """
    for i, weight in enumerate(weights):
        if "seed" not in weight.path:
            draw = np.random.default_rng([seed, i])
            weight.assign(draw.normal(scale=0.1, size=weight.shape).astype("float32"))
