"""A preset by name, folder or handle, and what is recommended for it."""

import os
import warnings
from pathlib import Path

import keras_hub
import pytest

import gemma_lora as gl
from gemma_lora import models


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


def test_a_model_remembers_where_it_came_from(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_restore_query_scale", lambda model: None)
    monkeypatch.setattr(models, "from_preset", lambda kind, name, folder, **_: SimpleModel())
    for preset, local in (("tiny_gemma_en", True), (tmp_path, True), ("gemma_2b_en", False)):
        (tmp_path / "config.json").write_text("{}")
        state = gl.load(preset).gemma_lora
        assert (state.preset, state.local) == (str(preset), local)


class SimpleModel:
    """Takes any attribute."""


def test_a_preset_is_looked_up_once(monkeypatch):
    asked = []
    look = models.local_place
    monkeypatch.setattr(models, "local_place", lambda name: asked.append(name) or look(name))
    gl.load("tiny_gemma_en")
    assert asked == ["tiny_gemma_en"]


def warn_like_keras():
    code = "import warnings\nwarnings.warn('`build()` was called on layer x')"
    exec(compile(code, "layer.py", "exec"), {"__name__": "keras.src.layers.layer"})


class Noisy:
    """In place of a KerasHub class: it warns like Keras 3.15 with KerasHub 0.29."""

    @classmethod
    def from_preset(cls, source, **options):
        warn_like_keras()
        os.write(2, b"I0000 00:00:1.2 3 cudart_stub.cc:31] Could not find cuda drivers\n")
        return source, options


def test_warnings_of_libraries_are_held_back_while_a_preset_loads(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(models, "fetch", lambda name, load: load(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert models.from_preset(Noisy, "x", tmp_path, a=1) == (str(tmp_path), {"a": 1})
        assert capfd.readouterr().err == ""
        # The progress of a download goes to stderr, so nothing there is held back.
        assert models.from_preset(Noisy, Path("hf:/a/b"), None) == (str(Path("hf:/a/b")), {})
        assert "cudart" in capfd.readouterr().err
        with pytest.raises(UserWarning, match="build"):
            warn_like_keras()


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
