"""The private or undocumented names of other packages that the library touches exist.

A new release of Keras, KerasHub, kagglehub or JAX may rename any of them without a
word. Then this file fails, in one readable place, on every set of versions that we
test. In the library, a comment `# private: ...` stands above each use.
"""

import pkgutil
import re
from pathlib import Path

import jax
import kagglehub
import keras
import keras_hub
import pytest
from families import random_gemma

import gemma_lora as gl
from gemma_lora.lora import linear_layers, lora_layers

LIBRARY = Path(gl.__file__).parent

# Part of a model: the names on it, in every family.
ON_MODELS = {
    "model": (
        "sampler generate_step call_with_cache generate_function train_function test_function "
        "predict_function _flatten_layers"
    ),
    "backbone": "transformer_layers token_embedding layer_norm layer_norm_epsilon _flatten_layers",
    "embedding": "embeddings _embeddings tie_weights reverse_dtype logit_soft_cap",
    "block": "attention pre_attention_norm pre_ffw_norm _compute_attention_mask _flatten_layers",
    "attention": "query_head_dim_normalize",
    "layer": (
        "_kernel _untrack_variable enable_lora lora_enabled lora_alpha lora_rank "
        "lora_kernel_a lora_kernel_b quantization_mode dtype_policy"
    ),
    "tokenizer": "proto",
    "sampler": "run_loop get_next_token compute_probabilities variables",
}
# The same, for the families that have them.
ON_SOME_MODELS = {
    ("gemma2", "block"): (
        "use_post_attention_norm use_post_ffw_norm post_attention_norm post_ffw_norm"
    ),
    ("gemma2", "attention"): ("logit_soft_cap use_sliding_window_attention sliding_window_size"),
    ("gemma2", "backbone"): "final_logit_soft_cap",
    ("gemma3", "block"): (
        "use_post_attention_norm use_post_ffw_norm post_attention_norm post_ffw_norm"
    ),
    ("gemma3", "attention"): (
        "use_sliding_window_attention sliding_window_size "
        "rope_wavelength rope_scaling_factor use_query_key_norm query_norm key_norm"
    ),
    ("gemma3", "backbone"): "vision_encoder",
}
IN_PACKAGES = [
    "datasets.config.HF_DATASETS_CACHE",
    "gguf.GGUFReader._get",
    "gguf.GGUFReader._get_field_parts",
    "gguf.GGUFReader.gguf_scalar_to_np",
    "huggingface_hub.constants.HF_HUB_CACHE",
    "huggingface_hub.utils.validate_repo_id",
    "kagglehub.cache.get_cached_path",
    "kagglehub.config.KaggleApiCredentials",
    "kagglehub.config.clear_kaggle_credentials",
    "kagglehub.config.get_cache_folder",
    "kagglehub.config.get_kaggle_credentials",
    "kagglehub.config.set_kaggle_api_token",
    "kagglehub.config.set_kaggle_credentials",
    "kagglehub.handle.parse_model_handle",
    "keras.StatelessScope.get_current_value",
    "keras.initializers.VarianceScaling.__call__",
    "keras.optimizers.Optimizer.stateless_apply",
]
# Documented, in spite of the underscore: what IPython asks for, and methods of named
# tuples.
DOCUMENTED = {"_repr_html_", "_asdict", "_replace"}
FAMILIES = ["gemma", "gemma2", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request):
    """The parts of a small model with adapters, and its family."""
    model = random_gemma(request.param)
    gl.enable_lora(model)
    block = model.backbone.transformer_layers[0]
    model.compile(sampler="greedy")
    return request.param, {
        "model": model,
        "backbone": model.backbone,
        "embedding": model.backbone.token_embedding,
        "block": block,
        "attention": block.attention,
        "layer": next(iter(lora_layers(model).values())),
        "tokenizer": model.preprocessor.tokenizer,
        "sampler": model.sampler,
    }


@pytest.mark.parametrize("part", ON_MODELS)
def test_every_family_has(parts, part):
    family, objects = parts
    names = f"{ON_MODELS[part]} {ON_SOME_MODELS.get((family, part), '')}".split()
    assert [name for name in names if not hasattr(objects[part], name)] == []


def test_layers_that_take_adapters_are_found_by_their_names(parts):
    _, objects = parts
    names = {path.split("/", 1)[1] for path in linear_layers(objects["model"])}
    assert names == {
        "attention/query", "attention/key", "attention/value", "attention/attention_output",
        "ffw_gating", "ffw_gating_2", "ffw_linear",
    }  # fmt: skip


@pytest.mark.parametrize("name", IN_PACKAGES)
def test_the_package_has(name):
    assert pkgutil.resolve_name(name) is not None


def test_presets_say_where_they_are_and_how_large():
    preset = keras_hub.models.CausalLM.presets["gemma_2b_en"]
    assert preset["kaggle_handle"].startswith("kaggle://keras/gemma/")
    assert preset["metadata"]["params"] > 2e9


def test_a_seed_generator_is_its_seed_and_a_count():
    state = keras.random.SeedGenerator(5).state
    assert state.dtype == "uint32"
    assert state.value.tolist() == [5, 0]


def test_a_kaggle_handle_says_its_framework():
    handle = kagglehub.handle.parse_model_handle("keras/gemma/keras/gemma_2b_en/3")
    assert handle.framework_enum()


def test_jax_counts_the_memory_of_a_compiled_function():
    counted = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((8, 8))).compile().memory_analysis()
    for name in ("argument", "output", "alias", "temp"):
        assert getattr(counted, f"{name}_size_in_bytes") >= 0
    assert hasattr(jax.devices()[0], "memory_stats")


def test_every_private_name_that_the_library_touches_is_listed():
    listed = " ".join([*ON_MODELS.values(), *ON_SOME_MODELS.values(), *IN_PACKAGES])
    touched = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        own = set(re.findall(r"(?:def |self\.|cls\.)(_[a-z]\w*)", source))
        for name in re.findall(r"(?<!self)(?<!cls)\.(_[a-z]\w*)", source):
            # A name that the file defines itself is the library's own.
            if name not in own:
                touched.setdefault(name, path.name)
    missing = {name: file for name, file in touched.items() if name not in listed.split()}
    assert missing.keys() <= DOCUMENTED, missing
