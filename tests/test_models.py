"""A preset by name, folder or handle, and what is recommended for it."""

import os
import warnings
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
from families import random_gemma
from keras_hub.src.models.gemma3.gemma3_vision_encoder import Gemma3VisionEncoder
from sentencepiece import sentencepiece_model_pb2

import gemma_lora as gl
from gemma_lora import models
from gemma_lora.access.preset import proto_from_json
from gemma_lora.lora import linear_layers


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

    def save_to_preset(self, preset_dir):
        pass


# The template of tuning, by every way that a model leaves and comes back

OWN = gl.Template("qa", "Question: {instruction}\nAnswer:\n", "{context}\n{instruction}\nAnswer:\n")


def as_preset(model, place):
    gl.merge(model)
    model.save_to_preset(str(place))
    return place


def as_preset_twice(model, place):
    gl.load(as_preset(model, place / "first")).save_to_preset(str(place / "again"))
    return place / "again"


def for_transformers(model, place):
    gl.export_transformers(model, place, verify=False)
    return place


def as_gguf(model, place):
    gl.export_gguf(model, place / "x.gguf")
    return place / "x.gguf"


def gguf_of_a_preset(model, place):
    return as_gguf(gl.load(as_preset(model, place / "first")), place)


WAYS = [as_preset, as_preset_twice, for_transformers, as_gguf, gguf_of_a_preset]


@pytest.fixture(scope="module", params=[OWN, "turns"], ids=["own", "turns"])
def tuned_with(request, tiny_factory, tmp_path_factory):
    """A template, and a way to make models that were tuned with it."""
    template, adapter = request.param, tmp_path_factory.mktemp("adapter")
    model = tiny_factory()
    gl.enable_lora(model)
    gl.fit(model, gl.load_tiny_world()[0].select(range(4)), template=template, verbose=0)
    gl.save_adapter(model, adapter)

    def make():
        model = tiny_factory()
        gl.load_adapter(model, adapter)
        return model

    return template, make


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_comes_back_knows_its_template(tuned_with, tmp_path, way):
    template, make = tuned_with
    place = way(make(), tmp_path)
    assert models.template_of(gl.load(place)) == template
    assert gl.recommended(str(place)).template == template


@pytest.mark.parametrize("way", [gl.save_adapter, gl.export_peft])
def test_an_adapter_that_comes_back_knows_its_template(tuned_with, tiny_factory, tmp_path, way):
    template, make = tuned_with
    way(make(), tmp_path)
    model = tiny_factory()
    gl.load_adapter(model, tmp_path)
    assert models.template_of(model) == gl.templates.get_template(template)


def test_an_adapter_that_does_not_know_its_template_says_so(
    tuned_with, tiny_factory, tmp_path, capsys
):
    _, make = tuned_with
    gl.export_peft(make(), tmp_path)
    (tmp_path / models.NOTE).unlink()
    gl.load_adapter(tiny_factory(), tmp_path)
    assert "does not say which template" in capsys.readouterr().out


def test_a_model_that_was_never_tuned_leaves_no_note(tuned_with, tiny, tmp_path):
    _, make = tuned_with
    as_preset(make(), tmp_path)
    tiny.save_to_preset(str(tmp_path))
    assert not (tmp_path / models.NOTE).exists()
    assert gl.recommended(str(tmp_path)).template == "recipe"


@pytest.mark.parametrize("text", ["{", "[]", '{"template": {"name": "x"}}'])
def test_a_note_that_cannot_be_read_is_said(tiny, tmp_path, text):
    tiny.save_to_preset(str(tmp_path))
    (tmp_path / models.NOTE).write_text(text)
    with pytest.raises(ValueError, match="Save the model again, or delete that file"):
        gl.load(tmp_path)


def test_a_chat_template_of_transformers_tells_an_instruction_tuned_model(tiny, tmp_path):
    gl.export_transformers(tiny, tmp_path, verify=False)
    assert gl.recommended(str(tmp_path)).template == "recipe"
    (tmp_path / "chat_template.jinja").write_text("<start_of_turn>{{ messages }}")
    assert gl.recommended(str(tmp_path)).template == "turns"


# What was set in Keras


@pytest.fixture
def keras_settings():
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("choose", "name", "weights"),
    [
        (lambda: keras.config.set_floatx("bfloat16"), "bfloat16", "bfloat16"),
        (lambda: keras.config.set_dtype_policy("bfloat16"), "bfloat16", "bfloat16"),
        (lambda: keras.config.set_dtype_policy("mixed_bfloat16"), "mixed_bfloat16", "float32"),
    ],
)
def test_a_dtype_that_was_set_in_keras_is_taken(keras_settings, choose, name, weights):
    choose()
    model = gl.load()
    assert model.backbone.dtype_policy.name == name
    assert model.backbone.token_embedding.embeddings.dtype == weights
    assert gl.memory_budget("tiny_gemma_en", compile=False).need.dtype == name
    assert gl.memory_budget(model, compile=False).need.dtype == name
    assert gl.load(dtype="float32").backbone.dtype_policy.name == "float32"


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
        gl.load("my_model")


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


# What is no model, and how it is found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2b", "Did you mean 'gemma_2b_en'"),
        ("gemma3-270m", r"Did you mean 'gemma3_270m'"),
        ("google/gemma-2b", "Online it is hf://google/gemma-2b, if"),
        ("google/gemma/keras/gemma_2b_en", "Online it is kaggle://google/gemma/keras/gemma_2b_en"),
        (
            "/content/drive/MyDrive/gemma",
            r"There is no folder or preset '/content/drive/MyDrive/gemma'\.$",
        ),
        ("./missing", r"There is no folder or preset './missing'\.$"),
        ("missing.gguf", "There is no file missing.gguf"),
    ],
)
def test_a_wrong_name_is_told_the_right_one(name, message):
    with pytest.raises(ValueError, match=message):
        gl.load(name)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter.safetensors", "holds an adapter, not a model. Load it by gl.load_adapter"),
        ("adapter_config.json", "holds an adapter, not a model"),
        ("x.gguf", r"holds GGUF files. Load one: gl.load\('.*x.gguf'\)"),
        ("README.md", "holds no preset"),
    ],
)
def test_a_folder_of_something_else_is_told_its_call(tmp_path, file, message):
    (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=message):
        gl.load(tmp_path)


def test_a_file_is_no_preset(tmp_path):
    (tmp_path / "x.keras").write_text("x")
    with pytest.raises(ValueError, match="is a file, and"):
        gl.load(tmp_path / "x.keras")


@pytest.mark.parametrize("mode", ["int8", pytest.param("int4", marks=pytest.mark.full)])
def test_a_quantized_preset_is_loaded_as_it_is(tiny_factory, tmp_path, mode):
    model = tiny_factory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.backbone.quantize(mode)
    model.save_to_preset(str(tmp_path))
    again = gl.load(tmp_path)
    assert {layer.quantization_mode for layer in linear_layers(again).values()} == {mode}
    question = "What is the capital of France?"
    assert gl.generate(again, question) == gl.generate(model, question)


# Presets that KerasHub loads otherwise, or not at all


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory):
    """A folder with a Gemma 3 that has a part for pictures, and the model itself."""
    text = random_gemma("gemma3")
    config = text.backbone.get_config()
    size = 16
    encoder = Gemma3VisionEncoder(
        image_size=size,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        output_dim=config["hidden_dim"],
    )
    backbone = keras_hub.models.Gemma3Backbone(
        **config | {"image_size": size, "vision_encoder": encoder}
    )
    model = keras_hub.models.Gemma3CausalLM(preprocessor=text.preprocessor, backbone=backbone)
    folder = tmp_path_factory.mktemp("pictures")
    model.save_to_preset(folder)
    return folder, model


def test_of_a_gemma_3_with_pictures_the_text_part_is_loaded_and_trained(with_pictures):
    folder, whole = with_pictures
    model = gl.load(folder)
    assert model.backbone.vision_encoder is None
    pairs = zip(model.backbone.transformer_layers, whole.backbone.transformer_layers, strict=True)
    for layer, other in [*pairs, (model.backbone.layer_norm, whole.backbone.layer_norm)]:
        for weight, same in zip(layer.weights, other.weights, strict=True):
            assert np.array_equal(weight.numpy(), same.numpy())
    budget = gl.memory_budget(folder, compile=False)
    assert budget.vision
    assert budget.parameters == model.count_params()
    gl.enable_lora(model)
    rows = [{"question": "Why?", "answer": "So."}] * 4
    assert gl.fit(model, rows, validation=rows, verbose=0).history["loss"][0] > 0
    assert isinstance(gl.generate(model, "Why?", max_new_tokens=2), str)


def test_a_vocabulary_in_json_alone_gives_the_same_tokens(tmp_path):
    """As Transformers 5 saves it; the file is made here from the vocabulary."""
    own = gl.load_tokenizer()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((models.TINY_FOLDER / "assets/tokenizer/vocabulary.spm").read_bytes())
    content = tokenizer_json(proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto_from_json(content))
    train, held_out = gl.load_tiny_world()
    texts = [row["response"] for row in [*train, *held_out]]
    texts += ["naïve  café\n\n日本 <start_of_turn>user\nHi<end_of_turn> 12 \t x", " so", "<bos>"]
    for text in texts:
        assert pieces.encode(text) == own.encode([text])


def tokenizer_json(proto) -> dict:
    """Write a SentencePiece vocabulary as Transformers does: pairs in their order."""
    kinds = proto.SentencePiece
    scores = {p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}
    vocabulary = {p.piece: number for number, p in enumerate(proto.pieces)}
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [f"{a} {b}" for a, b in cuts if a in vocabulary and b in vocabulary]
    added = [
        {"id": number, "content": p.piece}
        for number, p in enumerate(proto.pieces)
        if p.type in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)
    ]
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": merges}
    return {"model": model, "added_tokens": added}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "no tokenizer like Gemma's .* type 'WordPiece'"),
        (
            {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}},
            "has no <pad>",
        ),
    ],
)
def test_another_kind_of_vocabulary_is_said(content, message):
    with pytest.raises(ValueError, match=message):
        proto_from_json(content)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("model.keras", "keras.saving.load_model"),
        ("best.weights.h5", r"model.load_weights\(file\)"),
        ("mine.lora.h5", "gl.load_adapter"),
        ("adapter.safetensors", "Pass the folder"),
    ],
)
def test_a_file_that_is_no_preset_names_the_call_that_takes_it(tmp_path, name, call):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=call):
        gl.load(tmp_path / name)


def test_a_preset_is_a_name_or_a_path():
    with pytest.raises(TypeError, match=r"A preset is a name such as .* Received: list, \['a'\]"):
        gl.load(["a"])
    with pytest.raises(ValueError, match="dtype is a Keras dtype policy, such as"):
        gl.load(dtype="half")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_preset_has_dtypes_of_its_own(tmp_path, mode):
    model = random_gemma("gemma")
    model.backbone.quantize(mode)
    model.save_to_preset(tmp_path)
    assert models._is_quantized(tmp_path)
    with pytest.raises(ValueError, match="is quantized: each of its layers has a dtype"):
        gl.load(tmp_path, dtype="float32")


def test_a_model_is_quantized_after_it_is_loaded():
    with pytest.raises(ValueError, match=r"model.backbone.quantize\('int8'\)"):
        gl.load(dtype="int8_from_float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config.json cannot be read"),
        ("[]", "is of no model: it is a list"),
        ('{"model_type": "llama"}', "of the kind 'llama', and not a Gemma"),
    ],
)
def test_a_folder_of_something_else_is_said(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        gl.load(tmp_path)


def test_a_model_with_pictures_that_gl_did_not_load_is_said(with_pictures):
    _, whole = with_pictures
    with pytest.raises(ValueError, match=r"gl works on its text part. Load that"):
        gl.fit(whole, [{"question": "Why?", "answer": "So."}])
