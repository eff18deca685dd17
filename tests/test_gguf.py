"""GGUF: what is written comes back, and what cannot be read or written is said."""

import re
import sys

import families
import gguf
import jinja2
import keras
import keras_hub
import numpy as np
import pytest
from families import EACH_FAMILY, random_gemma
from test_lora import randomize_adapters

import gemma_lora as gl
from gemma_lora.access import gguf as reading
from gemma_lora.access.gguf import GGUFFile
from gemma_lora.formats import gguf as writing
from gemma_lora.lora import linear_layers
from gemma_lora.templates import TEMPLATES, named
from gemma_lora.tokens import tokenizer_of

# Runs of spaces and line breaks, accents, a character of four bytes, and turns.
TEXT = "1 2 3\n\n\n\tdéjà vu 🙂   in <start_of_turn>Europe <eos>"
WITH_TEMPLATE_OF = '{{Ask}} 🙂\u00a0{instruction}\n{instruction} "!"'
OWN = gl.Template("own", WITH_TEMPLATE_OF, "{instruction} {context}")


def tuned(family, **options):
    model = random_gemma(family, **options)
    gl.enable_lora(model, rank=3, alpha=6, targets="all_linear")
    randomize_adapters(model)
    return model


def config_of(model) -> dict:
    config = model.backbone.get_config()
    return {name: value for name, value in config.items() if name not in ("name", "dtype")}


def pairs(ours, theirs):
    """Go through the weights of two models, as arrays."""
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        yield one.path, np.asarray(one.value, "float32"), np.asarray(other.value, "float32")


def tensors_of(path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_export_comes_back(tmp_path, monkeypatch, family):
    # Matrices are read and written a few rows at a time.
    monkeypatch.setattr(reading, "ROWS", 24)
    monkeypatch.setattr(writing, "ROWS", 24)
    model = tuned(family)
    adapters = [np.array(weight.value) for weight in model.trainable_variables]
    result = gl.export_gguf(model, tmp_path / "new/x.gguf")
    assert "weights bit for bit, config and tokenizer as in the model" in result.checked
    assert [*result.files] == ["x.gguf", "Modelfile"]
    for weight, before in zip(model.trainable_variables, adapters, strict=True):
        assert np.array_equal(weight.value, before)

    again = gl.load(tmp_path / "new/x.gguf")
    gl.merge(model)
    assert type(again) is type(model)
    assert config_of(again) == config_of(model)
    assert tokenizer_of(again).encode([TEXT]) == tokenizer_of(model).encode([TEXT])
    for name, ours, theirs in pairs(model, again):
        # The file holds norms plus one.
        assert np.abs(ours - theirs).max() <= (1.2e-7 if "scale" in name else 0), name


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 1 / 200)]
)
def test_weights_are_rounded_as_asked(tmp_path, dtype, limit):
    model = random_gemma("gemma2")
    result = gl.export_gguf(model, tmp_path / "x.gguf", dtype=dtype)
    assert f"weights within {result.difference:.1e}" in result.checked
    for name, ours, theirs in pairs(model, gl.load(tmp_path / "x.gguf")):
        assert np.abs(ours - theirs).max() <= limit * np.abs(ours).max(), name


def test_a_model_in_bfloat16_is_written_bit_for_bit(tmp_path):
    model = random_gemma("gemma3", dtype="bfloat16")
    assert gl.export_gguf(model, tmp_path / "x.gguf", dtype="bfloat16").difference == 0
    for name, ours, theirs in pairs(model, gl.load(tmp_path / "x.gguf", dtype="bfloat16")):
        assert np.array_equal(ours, theirs), name


def test_rows_that_q8_0_cannot_cut_stay_in_float16(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SHAPE, "hidden_dim", 40)
    result = gl.export_gguf(random_gemma("gemma"), tmp_path / "x.gguf", dtype="q8_0")
    kinds = {
        name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "x.gguf").items()
    }
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    odd = [*kinds.values()].count("F16")
    assert f"{odd} matrices are in float16: their rows are no multiple of 32" in result.checked


def test_spare_rows_of_the_embedding_get_names(tmp_path):
    model = random_gemma("gemma")
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=2050, num_key_value_heads=1, **families.SHAPE
    )
    padded = keras_hub.models.GemmaCausalLM(backbone, model.preprocessor)
    gl.export_gguf(padded, tmp_path / "x.gguf")
    again = gl.load(tmp_path / "x.gguf")
    assert again.backbone.vocabulary_size == 2050
    assert tokenizer_of(again).tokens([2049]) == ["[PAD2049]"]
    assert tokenizer_of(again).encode([TEXT]) == tokenizer_of(model).encode([TEXT])


def go(template: str, *messages: tuple[str, str]) -> str:
    """Render messages as Ollama does, which runs a template in Go.

    It has what system turns say as `.System`, and all turns as `.Messages`.
    """
    answer, with_system, question = re.fullmatch(
        r'{{ \$system := .System }}{{ range .Messages }}{{ if eq .Role "assistant" }}(.*)'
        r'{{ else if eq .Role "user" }}{{ if \$system }}(.*){{ \$system = "" }}'
        r"{{ else }}(.*){{ end }}{{ end }}{{ end }}",
        template,
        re.DOTALL,
    ).groups()
    system = "\n\n".join(content for role, content in messages if role == "system")
    text = ""
    for role, content in messages:
        if role not in ("user", "assistant"):
            continue
        said = answer if role == "assistant" else with_system if system else question
        values = {".Content": content, "$system": system}
        text += re.sub(
            r'{{ (?:"\\U([0-9a-f]{8})"|(\.Content|\$system)) }}',
            lambda action, values=values: (
                chr(int(action[1], 16)) if action[1] else values[action[2]]
            ),
            said,
        )
        system = "" if role == "user" else system
    return text


@pytest.mark.parametrize("template", [*TEMPLATES.values(), OWN], ids=lambda template: template.name)
def test_the_template_of_tuning_goes_along(tmp_path, template):
    model = random_gemma("gemma3")
    model.gemma_lora = gl.load("tiny_gemma_en").gemma_lora
    model.gemma_lora.run = {"template": template}
    gl.export_gguf(model, tmp_path / "my model.gguf")
    question = 'What is a "foal"?'
    file = GGUFFile(tmp_path / "my model.gguf")
    chat = jinja2.Template(file._read("tokenizer.chat_template"), keep_trailing_newline=True)
    said = chat.render(messages=[{"role": "user", "content": question}], bos_token="<bos>")
    assert said == "<bos>" + template.prompt(question)
    ends = {"<eos>": None, "<end_of_turn>": 5}
    assert file._read("tokenizer.ggml.eot_token_id") == ends[template.end]

    modelfile = (tmp_path / "Modelfile").read_text("utf-8")
    assert "FROM ./my model.gguf\n" in modelfile
    assert f'PARAMETER stop "{template.end}"\n' in modelfile
    [for_ollama] = re.findall(r'TEMPLATE """(.*?)"""\n', modelfile, re.DOTALL)
    assert go(for_ollama, ("user", question)) == template.prompt(question)
    end = template.end + template.between
    assert go(for_ollama, ("assistant", "A horse.")) == f"A horse.{end}"
    messages = (("system", "Be short."), ("user", question), ("assistant", "So."), ("user", "Why?"))
    with_system = template.prompt({"instruction": question, "context": "Be short."})
    assert go(for_ollama, *messages) == f"{with_system}So.{end}{template.prompt('Why?')}"
    chat_messages = [{"role": role, "content": content} for role, content in messages]
    said = chat.render(messages=chat_messages, bos_token="<bos>")
    assert said == f"<bos>{go(for_ollama, *messages)}"
    # Ollama's parser reads them, and drops what cannot be printed.
    assert all(letter.isprintable() or letter == "\n" for letter in modelfile)
    assert gl.recommended(str(tmp_path / "my model.gguf")).template == named(template)


def test_what_a_file_says_of_itself(tiny, tmp_path, monkeypatch):
    gl.export_gguf(tiny, tmp_path / "x.gguf", dtype="q8_0")
    file = GGUFFile(tmp_path / "x.gguf")
    said = {name: file._read(f"general.{name}") for name in ("name", "license", "file_type")}
    assert said == {"name": "tiny_gemma_en", "license": "apache-2.0", "file_type": 7}
    assert "Gemma Terms of Use" not in (tmp_path / "Modelfile").read_text()
    monkeypatch.setattr("gemma_lora.formats.card.TINY_VOCABULARY", 0)
    gl.export_gguf(tiny, tmp_path / "x.gguf")
    assert "Gemma Terms of Use" in (tmp_path / "Modelfile").read_text()
    assert GGUFFile(tmp_path / "x.gguf")._read("general.license") == "gemma"


def test_what_was_changed_by_hand_stays(tmp_path):
    model = random_gemma("gemma")
    for name in ("x.gguf", "other.gguf"):
        (tmp_path / name).write_bytes(b"GGUF of somebody else")
        with pytest.raises(ValueError, match=r"gl did not export .* Choose another name"):
            gl.export_gguf(model, tmp_path / name)
        (tmp_path / name).unlink()
        gl.export_gguf(model, tmp_path / name)
        gl.export_gguf(model, tmp_path / name)
    modelfile = tmp_path / "Modelfile"
    assert "FROM ./other.gguf" in modelfile.read_text()
    mine = modelfile.read_text().split("\n", 1)[1].replace("temperature 0", "temperature 1")
    modelfile.write_text(mine)
    gl.export_gguf(model, tmp_path / "x.gguf")
    assert modelfile.read_text() == mine


def test_what_broke_off_leaves_the_old_file(tmp_path, monkeypatch):
    model = random_gemma("gemma")
    gl.export_gguf(model, tmp_path / "x.gguf")
    before = (tmp_path / "x.gguf").read_bytes()

    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space"):
        gl.export_gguf(model, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == before


def test_a_file_that_reads_otherwise_is_an_error(tmp_path, monkeypatch):
    model = random_gemma("gemma")
    monkeypatch.setattr(gguf, "quantize", lambda rows, kind: rows * 1.001)
    with pytest.raises(RuntimeError, match=r"reads otherwise than the model: token_embd.weight"):
        gl.export_gguf(model, tmp_path / "x.gguf")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("family", "owner", "attribute", "value", "message"),
    [
        ("gemma", "backbone", "vision_encoder", object(), "gl works on its text part"),
        ("gemma", "embedding", "tie_weights", False, "its own weights"),
        ("gemma", "attention", "use_sliding_window_attention", True, "sees the whole text"),
        ("gemma", "attention", "query_head_dim_normalize", False, "root of the head size"),
        ("gemma", "backbone", "layer_norm_epsilon", 1e-5, "last norm adds 1e-05"),
        ("gemma2", "attention", "logit_soft_cap", None, "soft cap of attention: True"),
        ("gemma2", "backbone", "final_logit_soft_cap", None, "soft cap of the output: True"),
        ("gemma2", "attention", "use_sliding_window_attention", False, "layers' attention"),
        ("gemma3", "attention", "logit_soft_cap", 50.0, "soft cap of attention: False"),
        ("gemma3", "attention", "use_sliding_window_attention", False, "layers' attention"),
        ("gemma3", "block", "use_post_attention_norm", False, "these norms"),
        ("gemma3", "attention", "use_query_key_norm", False, "norms of queries and keys"),
        ("gemma3", "every attention", "rope_scaling_factor", 2.0, "positions within a window"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path, monkeypatch, family, owner, attribute, value, message
):
    model = random_gemma(family)
    backbone = model.backbone
    block = backbone.transformer_layers[0]
    owners = {
        "backbone": [backbone],
        "embedding": [backbone.token_embedding],
        "block": [block],
        "attention": [block.attention],
        "every attention": [block.attention for block in backbone.transformer_layers],
    }
    for one in owners[owner]:
        monkeypatch.setattr(one, attribute, value, raising=False)
    with pytest.raises(ValueError, match=message):
        gl.export_gguf(model, tmp_path / "new/x.gguf")
    assert not [*tmp_path.iterdir()]


def test_queries_divided_by_another_root_are_refused_but_for_27b(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SHAPE, "head_dim", 16)
    model = random_gemma("gemma2")
    model.backbone.query_head_dim_normalize = False
    for block in model.backbone.transformer_layers:
        block.attention.query_head_dim_normalize = False
    with pytest.raises(ValueError, match="of 2 layers with queries divided by the root of: 16"):
        gl.export_gguf(model, tmp_path / "x.gguf")
    # llama.cpp knows the 27B by its number of layers.
    monkeypatch.setitem(writing.LAYERS_OF_27B, "gemma2", 2)
    gl.export_gguf(model, tmp_path / "x.gguf")
    assert not gl.load(tmp_path / "x.gguf").backbone.query_head_dim_normalize


def test_gemma_3_may_have_a_cap_long_positions_and_no_window(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SHAPE, "num_layers", 7)
    options = {"final_logit_soft_cap": 29.9, "global_rope_scaling_factor": 8.0}
    model = random_gemma("gemma3", **options)
    gl.export_gguf(model, tmp_path / "x.gguf")
    config = config_of(gl.load(tmp_path / "x.gguf"))
    assert config.pop("final_logit_soft_cap") == pytest.approx(29.9)
    assert config | options == config_of(model) | options
    monkeypatch.setitem(families.SHAPE, "num_layers", 2)
    with_windows = keras_hub.models.Gemma3Backbone
    monkeypatch.setattr(
        keras_hub.models,
        "Gemma3Backbone",
        lambda **shape: with_windows(**shape | {"use_sliding_window_attention": False}),
    )
    model = random_gemma("gemma3")
    monkeypatch.undo()
    gl.export_gguf(model, tmp_path / "x.gguf")
    again = gl.load(tmp_path / "x.gguf")
    assert not again.backbone.transformer_layers[0].attention.use_sliding_window_attention


def test_options_that_are_none_are_said(tmp_path):
    model = random_gemma("gemma")
    with pytest.raises(ValueError, match="dtype is one of float32, float16, bfloat16, q8_0"):
        gl.export_gguf(model, tmp_path / "x.gguf", dtype="q4_0")
    with pytest.raises(ValueError, match=r'ends in ".gguf"'):
        gl.export_gguf(model, tmp_path)
    with pytest.raises(ValueError, match="no adapters to export"):
        gl.export_gguf(model, tmp_path / "x.gguf", adapter_only=True)
    linear_layers(model)["decoder_block_1/ffw_linear"].quantize("int8")
    with pytest.raises(ValueError, match="1 of 14 layers are quantized"):
        gl.export_gguf(model, tmp_path / "x.gguf")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (1e5, "q8_0"), (np.nan, "float32")])
def test_weights_that_an_encoding_cannot_hold_are_refused(tmp_path, value, dtype):
    model = random_gemma("gemma")
    kernel = linear_layers(model)["decoder_block_1/ffw_linear"].kernel
    kernel.assign(kernel + value)
    with pytest.raises(ValueError, match=r"blk.1.ffn_down.weight has weights of up to"):
        gl.export_gguf(model, tmp_path / "x.gguf", dtype=dtype)
    assert not [*tmp_path.iterdir()]


def test_fewer_rows_than_pieces_are_refused(tmp_path, monkeypatch):
    model = random_gemma("gemma")
    monkeypatch.setattr(model.backbone, "vocabulary_size", 2000)
    with pytest.raises(ValueError, match="2,048 pieces, and the embedding only 2,000 rows"):
        gl.export_gguf(model, tmp_path / "x.gguf")


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_adapter_alone_holds_the_same_update(tmp_path, family):
    """With llama.cpp's scale, alpha / rows of A. That it reads them so: tests/peers."""
    model = tuned(family)
    result = gl.export_gguf(model, tmp_path / "x.gguf", adapter_only=True)
    assert [*result.files] == ["x.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    tensors = {name: tensor.data for name, tensor in tensors_of(tmp_path / "x.gguf").items()}
    layers = writing.layers_by_tensor(model.backbone, family.removesuffix("_many_kv"))
    names = [name for name in layers if f"{name}.lora_a" in tensors]
    assert len(tensors) == 2 * len(names) == 2 * 14
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        [(_, after)] = writing._parts(layers[name])
        layers[name].lora_enabled = False
        [(_, before)] = writing._parts(layers[name])
        update = after - before
        assert np.abs(6 / len(a) * b @ a - update).max() < 1e-6, name
    with pytest.raises(ValueError, match=r"x.gguf holds no model: its type is 'adapter'"):
        gl.load(tmp_path / "x.gguf")


# From here on: files that others wrote, or that are damaged.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "x.gguf"
    gl.export_gguf(random_gemma("gemma2"), path)
    return path


def rewritten(source, target, *, fields=(), drop=(), tensors=()):
    """Write a file again, with other metadata or tensors."""
    reader = gguf.GGUFReader(source)
    fields = dict(fields)
    family = fields.pop("general.architecture", "gemma2")
    writer = gguf.GGUFWriter(target, family)
    kept = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kept.pop("general.architecture")
    for name, field in kept.items():
        if name not in fields:
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1])
    for name, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(name, value, kind)
    arrays = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name not in drop}
    for name, array in (arrays | dict(tensors)).items():
        writer.add_tensor(name, np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "llama"}, "of the architecture 'llama'"),
        ({"general.type": "mmproj"}, "holds no model: its type is 'mmproj'"),
        ({"split.count": 3}, "one of 3 parts of a model. Join them first"),
        ({"gemma2.rope.freq_base": 500.0}, "rope.freq_base = 10000 alone"),
        ({"gemma2.attention.layer_norm_rms_epsilon": 1e-5}, "epsilon = 1e-06 alone"),
        ({"gemma2.block_count": 3}, "lacks 11 of the 35 tensors of such a model"),
        ({"gemma2.feed_forward_length": 48}, r"blk.0.ffn_gate.weight has the shape \(32, 32\)"),
        ({"gemma2.block_count": None}, "says nothing of gemma2.block_count"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer of the kind 'gpt2'"),
        ({"tokenizer.ggml.scores": None}, "says nothing of tokenizer.ggml.scores"),
    ],
)
def test_files_of_other_models_are_refused(exported, tmp_path, fields, message):
    path = rewritten(exported, tmp_path / "x.gguf", fields=fields)
    with pytest.raises(ValueError, match=message):
        gl.load(path)


def test_missing_and_other_tensors_are_refused(exported, tmp_path):
    path = rewritten(exported, tmp_path / "x.gguf", drop=["blk.1.attn_q.weight"])
    with pytest.raises(ValueError, match=r"lacks 1 of the 24 tensors .*blk.1.attn_q.weight"):
        gl.load(path)
    embedding = np.array(tensors_of(exported)["token_embd.weight"].data)
    same = rewritten(exported, tmp_path / "same.gguf", tensors={"output.weight": embedding})
    assert gl.load(same).backbone.num_layers == 2
    own = rewritten(exported, tmp_path / "own.gguf", tensors={"output.weight": embedding + 1})
    with pytest.raises(ValueError, match="the output layer has its own weights"):
        gl.load(own)


def test_an_encoding_that_nobody_can_widen_is_refused(exported, monkeypatch):
    def unknown(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(ValueError, match=r"token_embd.weight in the encoding F32, which"):
        gl.load(exported)


def test_damaged_files_are_refused(exported, tmp_path):
    path = tmp_path / "x.gguf"
    whole = exported.read_bytes()
    for content, message in [
        (b"", "no GGUF file: it begins with b''"),
        (b"<!doctype html><title>Sign in</title>", "Was a web page or a pointer"),
        (whole[:4] + bytes([9]) + whole[5:], "version 9 of GGUF. Versions 2 and 3"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            gl.load(path)
    # Within the header, metadata, tokens, list of tensors, and weights.
    for size in [6, 12, 20, 30, *np.linspace(40, len(whole) - 1, 60).astype(int)]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut off or damaged"):
            gl.load(path)


def test_a_missing_file_and_a_missing_package_are_said(exported, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no file .*none.gguf"):
        gl.load(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match=r"quantized then.*Received: dtype='int8"):
        gl.load(exported, dtype="int8_from_float32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        gl.load(exported)
    with pytest.raises(ImportError, match="pip install gguf"):
        gl.export_gguf(random_gemma("gemma"), tmp_path / "x.gguf")


def test_turns_of_a_file_that_calls_them_control_tokens(exported):
    """As llama.cpp's own converter does, and as we write them."""
    file = GGUFFile(exported)
    names = ("tokens", "token_type")
    pieces, types = (file._read(f"tokenizer.ggml.{name}") for name in names)
    kinds = dict(zip(pieces, types, strict=True))
    assert kinds["<start_of_turn>"] == kinds["<end_of_turn>"] == 3
    tokenizer = gl.load_tokenizer(exported)
    ids = tokenizer.prompt("turns", "What is a <end_of_turn>?")
    assert ids.count(tokenizer.id_of("<start_of_turn>")) == 2
    # The one in the question stays text.
    assert ids.count(tokenizer.id_of("<end_of_turn>")) == 1
    assert ids == gl.load_tokenizer().prompt("turns", "What is a <end_of_turn>?")


def test_names_tell_an_instruction_tuned_file_where_no_template_does(exported, tmp_path):
    for name, file_name, template in [
        ("Gemma 3 1b It", "x.gguf", "turns"),
        ("Gemma 3 1b", "gemma_3_1b-it.Q8_0.gguf", "turns"),
        ("Gemma 3 1b", "x.gguf", "recipe"),
    ]:
        fields = {"tokenizer.chat_template": None, "general.name": name}
        path = rewritten(exported, tmp_path / file_name, fields=fields)
        assert gl.recommended(str(path)).template == template


def test_a_file_is_checked_and_budgeted_like_a_preset(exported):
    found = gl.check(str(exported))
    assert found["licence"]["found"] == f"not needed: {exported} is a file"
    assert "training takes about" in found["memory"]["found"]
    budget = gl.memory_budget(exported, compile=False)
    assert budget.parts == gl.memory_budget(random_gemma("gemma2"), compile=False).parts


def test_arrays_are_read_as_the_package_reads_them(exported):
    """# private: `_get_field_parts` of its reader, which takes a value at a time."""
    slow = gguf.GGUFReader(exported)
    quick = GGUFFile(exported)
    assert slow.fields.keys() == quick._fields.keys()
    for name, field in slow.fields.items():
        assert quick._fields[name].contents() == field.contents(), name
    assert [tensor.name for tensor in slow.tensors] == [*quick._tensors]


def test_keras_draws_weights_again_after_a_file_was_read(exported, monkeypatch):
    drawn = keras.initializers.VarianceScaling.__call__
    gl.load(exported)
    assert keras.initializers.VarianceScaling.__call__ is drawn

    def broken(*args, **options):
        raise MemoryError

    monkeypatch.setattr(keras_hub.models, "GemmaBackbone", broken)
    with pytest.raises(MemoryError):
        gl.load(exported)
    assert keras.initializers.VarianceScaling.__call__ is drawn
