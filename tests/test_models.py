import keras_hub
import pytest

import gemma_lora as gl


def test_the_small_model_is_a_real_gemma(tiny):
    assert isinstance(tiny, keras_hub.models.GemmaCausalLM)
    assert tiny.gemma_lora.preset == "tiny_gemma_en"
    assert tiny.dtype_policy.name == "float32"


def test_a_folder_loads_like_a_name(tiny, tmp_path):
    tiny.save_to_preset(str(tmp_path / "copy"))
    copy = gl.load(tmp_path / "copy")
    question = "The capital of France is"
    assert gl.generate(copy, question, template=None, max_new_tokens=5) == gl.generate(
        tiny, question, template=None, max_new_tokens=5
    )


def test_dtype_is_what_was_asked_for():
    model = gl.load("tiny_gemma_en", dtype="bfloat16")
    assert model.backbone.token_embedding.embeddings.dtype == "bfloat16"


def test_settings_follow_the_name():
    recipe, tiny = gl.recommended("gemma_2b_en"), gl.recommended("tiny_gemma_en")
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch_tokens) == (5e-5, 0.01, 256)
    assert (recipe.sequence_length, recipe.template) == (256, "recipe")
    assert not recipe.exact_answers
    assert tiny.exact_answers
    assert gl.recommended("gemma3_instruct_270m").template == "turns"


def test_a_model_that_gl_did_not_load_is_welcome(random_model):
    assert gl.recommended(random_model("gemma")).learning_rate == 5e-5


def test_an_unknown_name_shows_the_gemmas():
    with pytest.raises(ValueError, match=r"tiny_gemma_en, .*gemma_2b_en"):
        gl.load("gemma_3b_en")


def test_a_folder_without_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        gl.load(tmp_path)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="Received: NoneType"):
        gl.generate(None, "Hi")


def test_adapters_on_all_linear_layers_have_a_learning_rate_of_their_own(tiny_factory):
    model = tiny_factory()
    gl.enable_lora(model, targets="all_linear")
    assert gl.recommended(model).learning_rate == 2e-3


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("kaggle://keras/gemma/keras/gemma_instruct_2b_en/3", "turns"),
        ("hf://google/gemma-2b-it", "turns"),
        ("translategemma_4b_it", "turns"),
        ("kaggle://keras/gemma/keras/gemma_2b_en/3", "recipe"),
        ("/tmp/with_items/gemma_2b_en", "recipe"),
    ],
)
def test_instruction_tuned_presets_are_known_by_any_handle(name, template):
    assert gl.recommended(name).template == template
