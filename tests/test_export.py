"""Exports: what is written, what KerasHub reads of it, and what is refused."""

import hashlib
import json
from types import SimpleNamespace

import families
import jinja2
import numpy as np
import pytest
from families import EACH_FAMILY, FAMILIES
from safetensors.numpy import load_file, save_file
from test_lora import logits, randomize_adapters

import gemma_lora as gl
from gemma_lora.formats import card as cards
from gemma_lora.formats import transformers as transformers_format
from gemma_lora.lora import NAMES_IN_TRANSFORMERS, linear_layers, lora_layers, merged_kernel
from gemma_lora.templates import TEMPLATES, Template
from gemma_lora.tokens import tokenizer_of


def tuned(model, **options):
    gl.enable_lora(model, **{"rank": 3, "alpha": 6, "targets": "all_linear", **options})
    randomize_adapters(model)
    return model


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_keras_hub_reads_what_is_exported(random_model, tmp_path, family):
    """KerasHub reads Transformers' format without torch; other readers: tests/peers."""
    model = tuned(random_model(family))
    before = logits(model)
    gl.export_transformers(model, tmp_path, verify=False)
    assert np.array_equal(logits(model), before)
    again = gl.load(tmp_path)
    assert type(again) is type(model)
    assert np.abs(logits(again) - before).max() < 1e-5


def test_large_weights_are_written_in_several_files(random_model, tmp_path, monkeypatch):
    model = tuned(random_model("gemma2"))
    monkeypatch.setattr(transformers_format, "_SHARD", 40_000)
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"of an older export")
    result = gl.export_transformers(model, tmp_path, verify=False)
    files = [name for name in result.files if name.endswith(".safetensors")]
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file: {*load_file(tmp_path / file)} for file in files} == {
        file: {name for name, place in index.items() if place == file} for file in files
    }
    assert np.abs(logits(gl.load(tmp_path)) - logits(model)).max() < 1e-5


def test_what_broke_off_can_be_done_again(random_model, tmp_path, monkeypatch):
    model, saved = random_model("gemma"), transformers_format.write_json

    def full(path, content):
        if path.name == "tokenizer_config.json":
            raise OSError(28, "No space left on device")
        saved(path, content)

    monkeypatch.setattr(transformers_format, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        gl.export_transformers(model, tmp_path, verify=False)
    monkeypatch.undo()
    gl.export_transformers(model, tmp_path, verify=False)
    assert not [*tmp_path.glob("*.part")]


OWN = gl.Template("own", '{{Ask}} 🙂 {instruction}\n{instruction} "!"', "{instruction} {context}")


@pytest.mark.parametrize("template", [*gl.TEMPLATES.values(), OWN])
def test_the_chat_template_and_the_stop_tokens_are_those_of_the_tuning(
    tiny_factory, tmp_path, template
):
    model, rows = tiny_factory(), gl.load_tiny_world()[0].select(range(4))
    gl.enable_lora(model)
    gl.fit(model, rows, template=template, verbose=0)
    gl.export_transformers(model, tmp_path, verify=False)
    chat = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": 'What is a "foal"?'}]
    said = jinja2.Template(chat, keep_trailing_newline=True).render(
        messages=messages, bos_token="<bos>"
    )
    assert said == "<bos>" + template.prompt(messages[0]["content"])
    tokenizer = tokenizer_of(model)
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.id_of("<eos>"), tokenizer.id_of(template.end)} == {*ends}


def test_weights_keep_their_dtype(random_model, tmp_path):
    gl.export_transformers(tuned(random_model("gemma", dtype="bfloat16")), tmp_path, verify=False)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        "bfloat16"
    }
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_with_another_model_is_left_alone(tiny, tmp_path):
    tiny.save_to_preset(str(tmp_path))
    (tmp_path / "README.md").write_text(gl.model_card(tiny))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a model that gl did not export"):
        gl.export_transformers(tiny, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_base_that_divides_by_another_root_is_computed_and_exported_so(
    random_model, tmp_path, monkeypatch
):
    """Gemma 2 27B: KerasHub's blocks are told, and do not tell their attention."""
    monkeypatch.setitem(families.SHAPE, "head_dim", 16)
    model = random_model("gemma2")
    gl.export_transformers(model, tmp_path / "one", verify=False)
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["query_pre_attn_scalar"] == 16
    # The other root: the hidden size, 32, by 4 heads.
    (tmp_path / "one/config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 8}))
    other = gl.load(tmp_path / "one")
    assert np.abs(logits(other) - logits(model)).max() > 1e-3
    gl.export_transformers(other, tmp_path / "two", verify=False)
    assert json.loads((tmp_path / "two/config.json").read_text())["query_pre_attn_scalar"] == 8


def test_the_result_says_what_was_checked(random_model, tmp_path):
    result = gl.export_transformers(random_model("gemma"), tmp_path, verify=False)
    assert "Not checked" in result._repr_html_()
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "README.md",
    } <= {*result.files}


def test_what_cannot_be_exported_is_said(random_model, tmp_path):
    model = random_model("gemma")
    linear_layers(model)["decoder_block_1/ffw_linear"].quantize("int8")
    with pytest.raises(ValueError, match="1 of 14 layers are quantized, such as decoder_block_1"):
        gl.export_transformers(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("family", "owner", "attribute", "value", "message"),
    [
        ("gemma", "backbone", "vision_encoder", object(), "gl works on its text part"),
        ("gemma", "embedding", "tie_weights", False, "its own weights"),
        ("gemma", "backbone", "final_logit_soft_cap", 30.0, "these soft caps"),
        ("gemma", "attention", "logit_soft_cap", 50.0, "these soft caps"),
        ("gemma", "block", "use_post_ffw_norm", True, "these norms"),
        ("gemma3", "block", "use_post_attention_norm", False, "these norms"),
    ],
)
def test_an_architecture_that_transformers_lacks_is_refused(
    random_model, tmp_path, monkeypatch, family, owner, attribute, value, message
):
    model = random_model(family)
    backbone = model.backbone
    block = backbone.transformer_layers[0]
    owners = {
        "backbone": backbone,
        "embedding": backbone.token_embedding,
        "block": block,
        "attention": block.attention,
    }
    monkeypatch.setattr(owners[owner], attribute, value, raising=False)
    with pytest.raises(ValueError, match=message):
        gl.export_transformers(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_verifying_needs_its_reader(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_format, "find_spec", lambda name: None)
    result = gl.export_transformers(tiny, tmp_path)
    assert "Not checked: torch and transformers not installed" in result.checked
    with pytest.raises(ValueError, match="pip install torch transformers"):
        gl.export_transformers(tiny, tmp_path, verify=True)


def test_verifying_needs_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_format, "find_spec", lambda name: name)
    free = SimpleNamespace(available=2**20)
    monkeypatch.setattr(transformers_format.psutil, "virtual_memory", lambda: free)
    assert "0.0 are free" in gl.export_transformers(tiny, tmp_path).checked


def test_the_card_says_what_it_is_and_a_page_of_the_users_stays(tiny_tuned, tmp_path, monkeypatch):
    gl.save_adapter(tiny_tuned, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "gl.load('tiny_gemma_en')" in card
    for page in ("mine", card.replace("say here where the records are from", "the small world's")):
        (tmp_path / "README.md").write_text(page)
        gl.save_adapter(tiny_tuned, tmp_path)
        assert (tmp_path / "README.md").read_text() == page
    # A card of the former kind, its mark below the head, counts as unedited as well.
    mark = card.splitlines()[-1]
    text = card.removesuffix(f"{mark}\n")
    former = hashlib.sha256(text.encode()).hexdigest()[:16]
    text = text.replace("---\n\n#", f"---\n<!-- written by gemma_lora, {former} -->\n#", 1)
    (tmp_path / "README.md").write_text(text)
    gl.save_adapter(tiny_tuned, tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    gl.export_peft(tiny_tuned, tmp_path)
    assert "peft.PeftModel" in (tmp_path / "README.md").read_text()
    assert "Gemma Terms of Use" not in card
    monkeypatch.setattr(cards, "TINY_VOCABULARY", 0)
    tiny_tuned.gemma_lora.preset = "gemma_2b_en"
    try:
        assert "Gemma Terms of Use" in gl.model_card(tiny_tuned, kind="transformers")
    finally:
        tiny_tuned.gemma_lora.preset = "tiny_gemma_en"


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param(
            family,
            targets,
            marks=[] if targets == "all_linear" or family == "gemma2" else pytest.mark.full,
        )
        for family in FAMILIES
        for targets in ("query_value", "all_linear", ("key", "attention_output"))
    ],
)
def test_to_peft_and_back(random_model, tmp_path, family, targets):
    model = tuned(random_model(family), targets=targets)
    gl.export_peft(model, tmp_path)
    fresh = random_model(family)
    summary = gl.load_adapter(fresh, tmp_path)
    assert (summary.rank, summary.alpha, summary.targets) == (3, 6.0, model.gemma_lora.lora.targets)
    assert np.abs(logits(fresh) - logits(model)).max() < 1e-5


def test_an_adapter_of_peft_that_keras_has_no_factors_for_gets_a_higher_rank(
    random_model, tmp_path
):
    """Each head has its own B: rank 2 in PEFT is rank 8, a head's size, in KerasHub."""
    model, numbers = random_model("gemma"), np.random.default_rng(0)
    gl.export_peft(tuned(model, rank=2, targets="query"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, tensor in tensors.items():
        shape = (2, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 2)
        tensors[name] = numbers.normal(size=shape).astype("float32")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    fresh = random_model("gemma")
    assert gl.load_adapter(fresh, tmp_path).rank == 8
    layer = fresh.backbone.transformer_layers[1].attention.query_dense
    update = (
        layer.lora_alpha
        / layer.lora_rank
        * (np.asarray(layer.lora_kernel_a) @ np.asarray(layer.lora_kernel_b))
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    expected = config["lora_alpha"] / 2 * tensors[name.format("B")] @ tensors[name.format("A")]
    assert np.allclose(transformers_format.matrix(layer, update), expected, atol=1e-5)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_asks_as_training_did(name):
    """Also with system turns, content in parts, and more than one question."""
    template = TEMPLATES[name]
    chat = jinja2.Template(transformers_format.chat_template(template))

    def said(*messages):
        turns = [{"role": role, "content": content} for role, content in messages]
        return chat.render(messages=turns, bos_token="<bos>")

    question, rule = "Name a river.", "Be brief."
    plain = template.prompt(question)
    with_rule = template.prompt({"instruction": question, "context": rule})
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    assert said(("user", question)) == f"<bos>{plain}"
    assert said(("user", parts)) == f"<bos>{plain}"
    assert said(("system", rule), ("user", question)) == f"<bos>{with_rule}"
    assert said(("system", " "), ("user", question)) == f"<bos>{plain}"
    both = template.prompt({"instruction": question, "context": f"{rule}\n\n{rule}"})
    assert said(("system", rule), ("system", rule), ("user", parts)) == f"<bos>{both}"
    talk = said(("system", rule), ("user", question), ("assistant", "The Sava."), ("user", "And?"))
    end = template.end + template.between
    assert talk == f"<bos>{with_rule}The Sava.{end}{template.prompt('And?')}"


def test_a_talk_in_turns_is_written_as_google_does():
    """https://ai.google.dev/gemma/docs/core/prompt-structure"""
    chat = jinja2.Template(transformers_format.chat_template(TEMPLATES["turns"]))
    messages = [
        {"role": "user", "content": "knock knock"},
        {"role": "model", "content": "who is there"},
        {"role": "user", "content": "Gemma"},
    ]
    assert chat.render(messages=messages, bos_token="<bos>") == (
        "<bos><start_of_turn>user\nknock knock<end_of_turn>\n"
        "<start_of_turn>model\nwho is there<end_of_turn>\n"
        "<start_of_turn>user\nGemma<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


ONE = np.ones((1, 1), "float32")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "not a plain LoRA adapter"),
        ({"use_dora": True}, "not a plain LoRA adapter"),
        ({"r": 3}, "not of rank"),
        ({"init_lora_weights": "pissa"}, "not a plain LoRA adapter"),
        ({"alora_invocation_tokens": [1]}, "not a plain LoRA adapter"),
        ({"rank_pattern": {"q_proj": 4}}, "not of rank"),
    ],
)
def test_other_adapters_of_peft_are_refused(random_model, tmp_path, change, message):
    gl.export_peft(tuned(random_model("gemma")), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(random_model("gemma"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "no tensors"),
        (lambda t: t.pop(LAYER.format("A")), "only one of the factors"),
        (lambda t: t.update({LAYER.format("magnitude_vector"): ONE}), "no place for 1 of its"),
        (lambda t: t.update({LAYER.replace(".0.", ".7.").format("A"): ONE}), "no place for"),
        (lambda t: t.update({"model.layers.0.mlp.lora_A.weight": ONE}), "no place for"),
        (lambda t: t.update({LAYER.format("B"): np.ones((32, 5), "float32")}), "not of rank"),
        (lambda t: t.update({LAYER.format("B"): np.ones((9, 12), "float32")}), "cannot be read"),
        (lambda t: t[LAYER.format("A")].fill(np.nan), "no numbers"),
    ],
)
def test_damaged_tensors_of_peft_are_refused(random_model, tmp_path, change, message):
    gl.export_peft(tuned(random_model("gemma"), targets="query"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = random_model("gemma")
    with pytest.raises(ValueError, match=message):
        gl.load_adapter(model, tmp_path)
    assert not lora_layers(model)


def test_peft_scales_by_the_square_root_with_rslora(random_model, tmp_path):
    gl.export_peft(tuned(random_model("gemma"), targets="attention_output"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    summary = gl.load_adapter(random_model("gemma"), tmp_path)
    assert summary.alpha / summary.rank == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_and_one_alpha_give_every_module_its_scale(random_model, tmp_path, family):
    """llama.cpp's converter keeps one alpha, and divides it by a tensor's rank."""
    model = tuned(random_model(family), targets="all_linear")
    gl.export_peft(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern"} & {*config}
    for index, block in enumerate(model.backbone.transformer_layers):
        for path, layer in lora_layers(model).items():
            if not path.startswith(f"{block.name}/"):
                continue
            name = f"base_model.model.model.layers.{index}.{NAMES_IN_TRANSFORMERS[layer.name]}"
            down, up = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
            update = np.asarray(merged_kernel(layer)) - np.asarray(layer._kernel)
            expected = transformers_format.matrix(layer, update)
            assert np.allclose(config["lora_alpha"] / len(down) * up @ down, expected, atol=1e-5)


@pytest.mark.parametrize(
    "prefix", ["base_model.model.model.language_model.", "base_model.model.language_model.model."]
)
def test_an_adapter_of_a_gemma_with_vision_is_read_for_its_text_part(
    random_model, tmp_path, prefix
):
    model = tuned(random_model("gemma3"))
    gl.export_peft(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {
        name.replace("base_model.model.model.", prefix): tensor for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    fresh = random_model("gemma3")
    gl.load_adapter(fresh, tmp_path)
    assert np.abs(logits(fresh) - logits(model)).max() < 1e-5


def test_peft_scales_modules_by_patterns_of_their_whole_names(random_model, tmp_path):
    model = tuned(random_model("gemma"), targets="value")
    gl.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pattern = {"model.layers.0.self_attn.v_proj": 60}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": pattern}))
    fresh = random_model("gemma")
    gl.load_adapter(fresh, tmp_path)
    scales = []
    for ours, theirs in zip(
        model.backbone.transformer_layers, fresh.backbone.transformer_layers, strict=True
    ):
        one, other = (np.asarray(merged_kernel(b.attention.value_dense)) for b in (ours, theirs))
        kernel = np.asarray(ours.attention.value_dense._kernel)
        scales.append(np.linalg.norm(other - kernel) / np.linalg.norm(one - kernel))
    assert scales == pytest.approx([60 / config["lora_alpha"], 1], rel=1e-3)


def test_the_template_comes_back_from_what_transformers_saves_again(tiny_factory, tmp_path):
    """Of a folder, Transformers keeps the chat template and not the note beside it."""
    own = Template("qa", "Q: {instruction} #}}\nA: ", "{context}\nQ: {instruction}\nA: ")
    model = tiny_factory()
    gl.enable_lora(model)
    gl.fit(model, [{"question": "Why?", "answer": "So."}], template=own, verbose=0)
    gl.export_transformers(model, tmp_path, verify=False)
    (tmp_path / "gemma_lora.json").unlink()
    assert gl.recommended(gl.load(tmp_path)).template == own


def test_an_exported_chat_template_refuses_turns_that_it_has_no_place_for():
    text = transformers_format.chat_template(TEMPLATES["recipe"])
    environment = jinja2.Environment()

    def refuse(message):
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(text)
    asked = {"role": "user", "content": "Why?"}
    developer = template.render(bos_token="", messages=[{**asked, "role": "developer"}, asked])
    system = template.render(bos_token="", messages=[{**asked, "role": "system"}, asked])
    assert developer == system
    with pytest.raises(ValueError, match="no place for a turn of tool"):
        template.render(bos_token="", messages=[{**asked, "role": "tool"}])
