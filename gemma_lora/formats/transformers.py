"""Export a model for Transformers, and have Transformers read it back.

From top to bottom: what the parts of a Gemma are called in both libraries, the config,
the weights, the tokenizer and the settings of generation, the export that writes them
all, and the check that Transformers computes the same. An adapter alone is exported by
`peft.py`. Nothing here reads such a folder for KerasHub, which has a reader of its own:
`gl.load(folder)`.
"""

import json
import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import keras
import numpy as np
import psutil
from huggingface_hub import split_state_dict_into_shards_factory
from keras_hub.models import CausalLM
from safetensors.numpy import save_file

from gemma_lora.formats.card import model_card, write_card, write_file, write_json
from gemma_lora.lora import NAMES_IN_TRANSFORMERS, kernel_shape, linear_layers, merged_kernel
from gemma_lora.models import NOTE_IN_JINJA, check_text_alone, template_of, write_note
from gemma_lora.options import a_path, with_options
from gemma_lora.sampling import generate
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import tokenizer_of

# Norms, by their names in Transformers and as attributes in KerasHub. Gemma 1 has two
# in a block, and Transformers calls the one before the MLP "post attention". Gemma 2
# and 3 have four.
# private: attributes of KerasHub's decoder blocks and attention layers
_TWO_NORMS = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
_FOUR_NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_QUERY_KEY_NORMS = {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}

# In config.json: a folder with this mark in it may be written to again.
MADE_BY = "gemma_lora.export_transformers"
# Bytes of a file of weights. A larger model is written in several.
_SHARD = 4 * 2**30

_CHECK_AGAIN = "call export_transformers(model, folder, verify=True)"
# What the check asks. The last has runs of spaces, accents and a character of four
# bytes, and is longer than the sliding windows of small models.
_PROMPTS = (
    "What should I do on a trip to Europe?",
    "The capital of France is",
    "1 2 3\n\n\tdéjà vu 🙂 " * 8,
)


def _check_exportable(model) -> None:
    """Raise ValueError if a model is no Gemma of text alone, quantized, or not tied."""
    backbone = model.backbone
    kind = type(backbone).__name__
    # private: the two attributes that tell other Gemmas from those that we can export
    ties_weights = getattr(backbone.token_embedding, "tie_weights", True)
    check_text_alone(model)
    if kind not in ("GemmaBackbone", "Gemma3Backbone"):
        raise ValueError(
            f"Gemma 1, Gemma 2 and Gemma 3 text models can be exported. Received: {kind}"
        )
    layers = linear_layers(model)
    quantized = [path for path, layer in layers.items() if layer.quantization_mode]
    if quantized:
        raise ValueError(
            f"{len(quantized)} of {len(layers)} layers are quantized, such as {quantized[0]}. "
            "Load the preset that the base was quantized from, and export that."
        )
    if not ties_weights:
        raise ValueError(
            "The output layer has its own weights. Outside KerasHub, Gemma's output shares the "
            "weights of the embedding, so this model cannot be exported."
        )


def _traits(model) -> SimpleNamespace:
    """Read what tells one Gemma from another, all of it in this one place.

    Lists have an entry for each block. Nothing is read with a default: an attribute
    that KerasHub renames must end in an error, not in a wrong config.

    Raises:
        ValueError: If nobody but KerasHub has such a Gemma.
    """
    # private: what is read here of a backbone, its blocks and their attention layers
    backbone = model.backbone
    blocks = backbone.transformer_layers
    attentions = [block.attention for block in blocks]
    traits = SimpleNamespace(
        family="gemma",
        dtype=backbone.token_embedding.embeddings.dtype,
        post_norms=(blocks[0].use_post_attention_norm, blocks[0].use_post_ffw_norm),
        query_key_norms=False,
        attention_cap=attentions[0].logit_soft_cap,
        output_cap=backbone.final_logit_soft_cap,
        divides_by_head_size=attentions[0].query_head_dim_normalize,
        windowed=[attention.use_sliding_window_attention for attention in attentions],
        window=attentions[0].sliding_window_size,
    )
    if type(backbone).__name__ == "Gemma3Backbone":
        traits.family = "gemma3_text"
        traits.query_key_norms = attentions[0].use_query_key_norm
        traits.wavelengths = [attention.rope_wavelength for attention in attentions]
        traits.stretches = [attention.rope_scaling_factor for attention in attentions]
    elif all(traits.post_norms):
        traits.family = "gemma2"
    caps = (traits.attention_cap, traits.output_cap)
    wants_post_norms = traits.family != "gemma"
    fits = all(bool(norm) == wants_post_norms for norm in traits.post_norms)
    if not fits or (traits.family == "gemma" and any(caps)):
        raise ValueError(
            "Outside KerasHub there is no Gemma with these norms after attention and MLP: "
            f"{traits.post_norms}, and these soft caps: {caps}."
        )
    if backbone.layer_norm_epsilon != 1e-6:
        raise ValueError(
            "Outside KerasHub, all norms of a Gemma add the same epsilon. This model's last norm "
            f"adds {backbone.layer_norm_epsilon:g}, and KerasHub computes the others with 1e-06."
        )
    if traits.family == "gemma3_text" and not traits.query_key_norms:
        raise ValueError("Outside KerasHub, every Gemma 3 has norms of queries and keys.")
    if traits.family == "gemma" and (any(traits.windowed) or not traits.divides_by_head_size):
        raise ValueError(
            "Outside KerasHub, every Gemma 1 sees the whole text, and divides queries by the root "
            "of the head size."
        )
    return traits


def transformers_config(model) -> dict:
    """Return the content of Transformers' config.json for a model.

    Raises:
        ValueError: If the model is quantized, or Transformers cannot express it.
    """
    _check_exportable(model)
    traits = _traits(model)
    family = traits.family
    backbone = model.backbone
    tokenizer = tokenizer_of(model)
    architecture = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[family]
    gates = [layer for layer in linear_layers(model).values() if layer.name == "ffw_gating"]
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": family,
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": len(backbone.transformer_layers),
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        # KerasHub's own `intermediate_dim` counts both halves of the gate.
        "intermediate_size": kernel_shape(gates[0])[-1],
        "head_dim": backbone.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "max_position_embeddings": 32768 if family == "gemma3_text" else 8192,
        "dtype": traits.dtype,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.id_of("<eos>"),
        "made_by": MADE_BY,
    }
    if family == "gemma":
        return config

    scale = backbone.head_dim
    if not traits.divides_by_head_size:
        scale = backbone.hidden_dim // backbone.num_query_heads
    layer_types = [
        "sliding_attention" if windowed else "full_attention" for windowed in traits.windowed
    ]
    config |= {
        "layer_types": layer_types,
        "sliding_window": traits.window,
        "query_pre_attn_scalar": scale,
        "attn_logit_softcapping": traits.attention_cap,
        "final_logit_softcapping": traits.output_cap,
    }
    if family == "gemma3_text":
        config["rope_parameters"] = _rope_parameters(traits, layer_types)
    return config


def _rope_parameters(traits: SimpleNamespace, layer_types: list[str]) -> dict:
    """Return how Gemma 3 rotates positions, for each type of layer."""
    # Transformers asks for both types even of a model that has layers of one type
    # alone.
    unused = {"rope_type": "default", "rope_theta": 1e6}
    parameters = {"full_attention": unused, "sliding_attention": unused}
    for layer_type, theta, stretch in zip(
        layer_types, traits.wavelengths, traits.stretches, strict=True
    ):
        rope = {"rope_type": "default"}
        if stretch != 1:
            rope = {"rope_type": "linear", "factor": stretch}
        parameters[layer_type] = rope | {"rope_theta": theta}
    return parameters


def matrix(layer, kernel: np.ndarray) -> np.ndarray:
    """Bring a kernel into the shape of torch's Linear, (outputs, inputs).

    Heads become part of the outputs, or of the inputs:

    | layer              | in KerasHub                | in Transformers            |
    |--------------------|----------------------------|----------------------------|
    | query, key, value  | (heads, hidden, head size) | (heads * head size, hidden)|
    | attention_output   | (heads, head size, hidden) | (hidden, heads * head size)|
    | the others         | (inputs, outputs)          | (outputs, inputs)          |
    """
    if kernel.ndim == 2 or layer.name == "attention_output":
        return kernel.reshape(-1, kernel.shape[-1]).T
    return kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1])


def _sources(model) -> dict[str, keras.Variable | keras.Layer]:
    """Map a tensor's name in Transformers to the variable or linear layer behind it."""
    backbone = model.backbone
    layers = linear_layers(model)
    traits = _traits(model)
    norms = _TWO_NORMS if traits.family == "gemma" else _FOUR_NORMS
    sources = {"model.embed_tokens.weight": backbone.token_embedding.embeddings}
    for index, block in enumerate(backbone.transformer_layers):
        prefix = f"model.layers.{index}"
        for name, attribute in norms.items():
            sources[f"{prefix}.{name}.weight"] = getattr(block, attribute).scale
        if traits.query_key_norms:
            for name, attribute in _QUERY_KEY_NORMS.items():
                sources[f"{prefix}.{name}.weight"] = getattr(block.attention, attribute).scale
        for path, layer in layers.items():
            if path.startswith(f"{block.name}/"):
                sources[f"{prefix}.{NAMES_IN_TRANSFORMERS[layer.name]}.weight"] = layer
    sources["model.norm.weight"] = backbone.layer_norm.scale
    return sources


def _array(source: keras.Variable | keras.Layer) -> np.ndarray:
    """Return the array of a variable, or of a linear layer with its adapter merged."""
    if isinstance(source, keras.Layer):
        return np.ascontiguousarray(matrix(source, merged_kernel(source)))
    return np.asarray(source.value)


def _write_weights(model, folder: Path) -> None:
    """Write the weights in one file, or in several with an index, adapters merged.

    Arrays are made one file at a time, so that host memory never holds more than one
    file's weights. An older export in the folder is deleted once the new one is
    complete beside it.
    """
    sources = _sources(model)
    width = jnp.dtype(_traits(model).dtype).itemsize
    sizes = {}
    for name, source in sources.items():
        shape = kernel_shape(source) if isinstance(source, keras.Layer) else source.shape
        sizes[name] = math.prod(shape) * width
    # The Hub's own function decides which tensor goes into which file, by the sizes
    # alone.
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD,
    )
    parts = {name: folder / f"{name}.part" for name in plan.filename_to_tensors}
    try:
        for name, tensors in plan.filename_to_tensors.items():
            arrays = {tensor: _array(sources[tensor]) for tensor in tensors}
            save_file(arrays, parts[name], metadata={"format": "pt"})
        for path in folder.iterdir():
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name):
                path.unlink()
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(model, folder: Path) -> None:
    """Write the vocabulary, and what Transformers must know to use it as Gemma's."""
    tokenizer = tokenizer_of(model)
    write_file(folder / "tokenizer.model", model.preprocessor.tokenizer.proto)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(tokenizer.id_of(token)): {"content": token, "special": True} for token in special
        },
        "chat_template": chat_template(get_template(template_of(model))),
    }
    write_json(folder / "tokenizer_config.json", config)


def chat_template(template: Template) -> str:
    """Return a template in Jinja, so that a chat asks as training did.

    Transformers' `apply_chat_template` and servers use it. A system turn is the context
    of the question after it, as in `gl.load_records`. Content may be text, or a list of
    parts, of which those of type "text" are read.

    >>> from gemma_lora.templates import TEMPLATES
    >>> '{{ "Instruction:\\\\n" + text + ' in chat_template(TEMPLATES["recipe"])
    True
    """
    # Doubled braces are Jinja's own, in an f-string. What is set within a loop is
    # forgotten after its turn, but for the attributes of a namespace.
    answer = f"{{{{ text + {json.dumps(template.end + template.between)} }}}}"
    return (
        '{{ bos_token }}{% set asked = namespace(context="") %}{% for message in messages %}'
        '{% if message["content"] is string %}{% set text = message["content"] %}{% else %}'
        '{% set text = message["content"] | selectattr("type", "equalto", "text")'
        ' | map(attribute="text") | join("\n\n") %}{% endif %}'
        '{% if message["role"] in ["assistant", "model"] %}'
        f"{answer}"
        '{% elif message["role"] in ["system", "developer"] %}'
        '{% if asked.context %}{% set text = asked.context + "\n\n" + text %}{% endif %}'
        "{% set asked.context = text %}"
        '{% elif message["role"] not in ["user", "human"] %}'
        '{{ raise_exception("There is no place for a turn of " + message["role"]) }}'
        "{% elif asked.context | trim %}"
        f"{_in_jinja(template.with_context)}"
        '{% set asked.context = "" %}{% else %}'
        f"{_in_jinja(template.without_context)}"
        "{% endif %}{% endfor %}"
        # What Transformers saves again keeps this, and nothing else of the template.
        f"{{# {NOTE_IN_JINJA}{_noted(template)} #}}"
    )


def _noted(template: Template) -> str:
    """Return a template as JSON that cannot end a comment of Jinja."""
    return json.dumps({"template": vars(template)}).replace("#", "\\u0023")


def _in_jinja(text: str) -> str:
    """Return an expression for a template's text: strings and fields, joined.

    >>> _in_jinja("Q: {instruction}")
    '{{ "Q: " + text }}'
    """
    parts = []
    for literal, field, _, _ in Formatter().parse(text):
        if literal:
            parts.append(json.dumps(literal, ensure_ascii=False))
        if field:
            parts.append({"instruction": "text", "context": "asked.context"}[field])
    return f"{{{{ {' + '.join(parts)} }}}}"


def _write_generation_settings(model, folder: Path, config: dict) -> None:
    """Write which tokens begin and end a text; answers end as the template's do."""
    ends = {config["eos_token_id"], tokenizer_of(model).id_of(get_template(template_of(model)).end)}
    settings = {
        "pad_token_id": config["pad_token_id"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": sorted(ends),
    }
    write_json(folder / "generation_config.json", settings)


@dataclass(frozen=True, repr=False)
class Exported(ShowsAsTable):
    """What an export wrote, and what its reader made of it; shown as a table.

    Attributes:
        folder: Where it is.
        files: The bytes of each file in the folder.
        checked: A sentence on the check.
        difference: The largest difference between two logits, or for a GGUF file
            between two weights; None if nothing was checked.
    """

    folder: Path
    files: dict[str, int]
    checked: str
    difference: float | None = None

    def table(self) -> Table:
        """Return a table with a row for each file."""
        rows = [{"file": name, "bytes": size} for name, size in self.files.items()]
        return Table(rows, caption=self.checked)


@with_options
def export_transformers(
    model: CausalLM, folder: str | Path, *, verify: bool | None = None
) -> Exported:
    """Write a model, its adapter merged, in the format of Transformers.

    The folder gets weights, config, tokenizer, generation settings and a model card.
    The model itself stays as it is. Gemma 1, Gemma 2 and Gemma 3 text models can be
    exported, with any number of key/value heads.

    Args:
        model: A model with or without adapters. Its kernels are float32, bfloat16 or
            float16; the written weights have the same dtype.
        folder: Where to write; it is created if needed. An export in it is replaced.
        verify: Whether to load the folder with Transformers and compare. None compares
            where Transformers and torch are installed and memory suffices.

    Returns:
        The files, and a sentence that says how they were checked or how to check them.

    Raises:
        ValueError: If the model is quantized, or has an architecture that Transformers
            cannot express, or the folder holds a model that gl did not export.
        RuntimeError: If Transformers reads other token ids, logits or answers.
    """
    config = transformers_config(model)
    folder = a_path("folder", folder)
    old_config = folder / "config.json"
    if old_config.is_file() and MADE_BY not in old_config.read_text("utf-8"):
        raise ValueError(f"{folder} holds a model that gl did not export. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(model, folder)
    write_json(folder / "config.json", config)
    _write_generation_settings(model, folder, config)
    _write_tokenizer(model, folder)
    write_note(model, folder)
    write_card(folder, model_card(model, kind="transformers"))
    files = sizes(folder)
    reason = _reason_not_to_verify(model, verify, sum(files.values()))
    if reason:
        return Exported(folder, files, reason)
    return Exported(folder, files, *_verify(model, folder))


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _computes_in_float32(model) -> bool:
    return model.backbone.token_embedding.compute_dtype == "float32"


def _reason_not_to_verify(model, verify: bool | None, size: int) -> str:
    """Say why an export of `size` bytes is not checked; "" if it is.

    Raises:
        ValueError: If `verify` is true and a package is missing.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing and verify:
        raise ValueError(
            f"Verifying an export needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    if missing:
        missing = " and ".join(missing)
        return f"Not checked: {missing} not installed. To check, install and {_CHECK_AGAIN}."
    if verify is False:
        return f"Not checked, as asked. To check, {_CHECK_AGAIN}."
    # Transformers reads everything in float32, twice the bytes of half precision; and a
    # third more for what it computes.
    needed = size * (1.3 if _computes_in_float32(model) else 2.6)
    free = psutil.virtual_memory().available
    if verify is None and needed > free:
        memory = f"it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        return f"Not checked: {memory}. On a larger machine, {_CHECK_AGAIN}."
    return ""


def _verify(model, folder: Path) -> tuple[str, float]:
    """Read a folder with Transformers; compare token ids, logits and greedy answers.

    Returns:
        A sentence on the result, and the largest difference between two logits.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    version, encode, ask = _reader(folder)
    tokenizer = tokenizer_of(model)
    exact = _computes_in_float32(model)
    differences = []
    # Root mean square of the differences, as a share of the logits' own.
    shares = []
    # GPUs and TPUs would round float32 in products.
    with jax.default_matmul_precision("float32"):
        answers = generate(model, list(_PROMPTS), template=None, max_new_tokens=16)
    for prompt, answer in zip(_PROMPTS, answers, strict=True):
        ids = tokenizer.prompt(None, prompt)
        if encode(prompt) != ids:
            raise RuntimeError(f"Transformers' tokenizer encodes {prompt!r} otherwise, in {folder}")
        inputs = np.array([ids])
        with jax.default_matmul_precision("float32"):
            ours = model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})
        ours = np.asarray(ours).astype("float32")
        theirs, new_ids = ask(inputs, tokenizer.id_of("<eos>"))
        differences.append(float(np.abs(ours - theirs).max()))
        shares.append(float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(ours**2))))
        if exact and (new := tokenizer.decode(new_ids).strip()) != answer:
            raise RuntimeError(
                f"Transformers answers {prompt!r} otherwise: {new!r}, not {answer!r}, in {folder}"
            )
    worst = max(differences)
    share = max(shares)
    # Half precision alone moves logits by 0.5 to 1.1 %, a wrong config by 9 % and more.
    # NaN is within no limit, hence `not`.
    if not (worst <= 1e-4 if exact else share <= 0.05):
        raise RuntimeError(
            f"Transformers reads {folder}, but logits differ by {worst:.1e} ({share:.1%} of them)."
        )
    agreement = f"the same greedy tokens and logits within {worst:.1e}"
    if not exact:
        agreement = f"logits within {worst:.1e} ({share:.1%} of them), as half precision rounds"
    return f"Read back with Transformers {version}: {agreement}.", worst


def _reader(folder: Path):
    """Load a folder with Transformers, in float32 and without its progress bars.

    Returns:
        Its version; a function from a text to token ids; and a function from token ids
        of shape (1, tokens) and the id that ends a text to logits of shape (1, tokens,
        vocabulary) and the ids of a greedy answer of up to 16 tokens.
    """
    import torch
    import transformers

    bars = transformers.utils.logging
    showed_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        if showed_bars:
            bars.enable_progress_bar()
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ask(inputs: np.ndarray, end: int) -> tuple[np.ndarray, list[int]]:
        ids = torch.tensor(inputs)
        with torch.no_grad():
            logits = model(ids).logits.numpy()
            texts = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=end)
        return logits, texts[0, ids.shape[1] :].tolist()

    return transformers.__version__, lambda text: tokenizer(text)["input_ids"], ask
