"""Export a model for Transformers, and have Transformers read it back: the same logits, tokens and token ids."""

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Formatter

import jax
import numpy as np
import psutil
from safetensors.numpy import save_file

from gemma_lora.formats.card import model_card, write_card
from gemma_lora.lora import linear_layers, merged_kernel
from gemma_lora.sampling import generate, template_of
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import tokenizer_of

# Layers by their names in KerasHub and in Transformers.
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}


MADE_BY = "gemma_lora.export_transformers"  # in config.json: such a folder may be written to again
_SHARD = 4 * 2**30  # bytes a file


def transformers_config(model) -> dict:
    """What Transformers' config.json says of a model; a ValueError if it has no words for it."""
    backbone, tokenizer = model.backbone, tokenizer_of(model)
    blocks = backbone.transformer_layers
    attention, kind = blocks[0].attention, type(backbone).__name__
    if (
        kind not in ("GemmaBackbone", "Gemma3Backbone")
        or getattr(backbone, "vision_encoder", None) is not None
    ):
        raise ValueError(
            f"Gemma 1, Gemma 2 and Gemma 3 text models can be exported. Received: {kind}"
        )
    if quantized := [
        path for path, layer in linear_layers(model).items() if layer.quantization_mode
    ]:
        raise ValueError(
            f"{quantized[0]} is quantized. Load the base in bfloat16 or float32, and export that."
        )
    if not getattr(backbone.token_embedding, "tie_weights", True):
        raise ValueError(
            "The output has weights of its own; Gemmas in Transformers share those of the embedding."
        )
    norms = [
        bool(getattr(blocks[0], name, False))
        for name in ("use_post_attention_norm", "use_post_ffw_norm")
    ]
    capped = (
        getattr(attention, "logit_soft_cap", None),
        getattr(backbone, "final_logit_soft_cap", None),
    )
    name = "gemma3_text" if kind == "Gemma3Backbone" else "gemma2" if all(norms) else "gemma"
    if (
        all(norms) == (name == "gemma")
        or any(norms) != all(norms)
        or (name == "gemma" and any(capped))
    ):
        raise ValueError(
            f"Transformers has no Gemma with these norms and soft caps: {norms}, {capped}."
        )
    config = {
        "architectures": [
            {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[name] + "ForCausalLM"
        ],
        "model_type": name,
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": blocks[0].gating_ffw._kernel.shape[-1],
        "head_dim": backbone.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "max_position_embeddings": 32768 if name == "gemma3_text" else 8192,
        "dtype": str(blocks[0].attention.query_dense._kernel.dtype),
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.id_of("<eos>"),
        "made_by": MADE_BY,
    }
    if name == "gemma":
        return config
    windows = [block.attention.use_sliding_window_attention for block in blocks]
    scale = (
        backbone.head_dim
        if attention.query_head_dim_normalize
        else backbone.hidden_dim // backbone.num_query_heads
    )
    config |= {
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": attention.sliding_window_size,
        "query_pre_attn_scalar": scale,
        "attn_logit_softcapping": capped[0],
        "final_logit_softcapping": capped[1],
    }
    if name == "gemma3_text":
        full, ropes = {"rope_type": "default", "rope_theta": 1e6}, {}
        for block, layer_type in zip(blocks, config["layer_types"], strict=True):
            factor = block.attention.rope_scaling_factor
            rope = (
                {"rope_type": "default"}
                if factor == 1
                else {"rope_type": "linear", "factor": factor}
            )
            ropes[layer_type] = rope | {"rope_theta": block.attention.rope_wavelength}
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": full} | ropes
    return config


def write_model(model, folder: Path, config: dict) -> None:
    """Write the weights, the config, the settings of generation and the tokenizer; the weights first."""
    tokenizer = tokenizer_of(model)
    _write_weights(model, folder)
    write_json(folder / "config.json", config)
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("pad", "bos")}
    ends = {config["eos_token_id"], tokenizer.id_of(get_template(template_of(model)).end)}
    write_json(folder / "generation_config.json", ids | {"eos_token_id": sorted(ends)})
    _write_tokenizer(model, folder)


def matrix(layer, kernel: np.ndarray) -> np.ndarray:
    """A kernel of KerasHub as torch's Linear has it, (outputs, inputs): heads become part of the one or the other.

    Queries, keys and values: (heads, hidden, head size) to (heads * head size, hidden). The attention's output:
    (heads, head size, hidden) to (hidden, heads * head size). Others: (inputs, outputs) to (outputs, inputs).
    """
    if kernel.ndim == 2 or layer.name == "attention_output":
        return kernel.reshape(-1, kernel.shape[-1]).T
    return kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1])


def _weights(model):
    """Names and arrays as Transformers has them, one after the other, adapters merged."""
    backbone = model.backbone
    yield "model.embed_tokens.weight", np.asarray(backbone.token_embedding.embeddings.value)
    layers = linear_layers(model)
    for i, block in enumerate(backbone.transformer_layers):
        norms = {"input_layernorm": block.pre_attention_norm}
        if getattr(block, "use_post_attention_norm", False):
            norms |= {"post_attention_layernorm": block.post_attention_norm}
            norms |= {"pre_feedforward_layernorm": block.pre_ffw_norm}
            norms |= {"post_feedforward_layernorm": block.post_ffw_norm}
        else:
            norms |= {"post_attention_layernorm": block.pre_ffw_norm}
        if getattr(block.attention, "use_query_key_norm", False):
            norms |= {
                "self_attn.q_norm": block.attention.query_norm,
                "self_attn.k_norm": block.attention.key_norm,
            }
        for name, norm in norms.items():
            yield f"model.layers.{i}.{name}.weight", np.asarray(norm.scale.value)
        for path, layer in layers.items():
            if path.startswith(f"{block.name}/"):
                kernel = np.ascontiguousarray(matrix(layer, merged_kernel(layer)))
                yield f"model.layers.{i}.{NAMES[layer.name]}.weight", kernel
    yield "model.norm.weight", np.asarray(backbone.layer_norm.scale.value)


def _write_weights(model, folder: Path) -> None:
    """One file, or several with an index, so that no more than a file's weights are copied at a time."""
    parts: dict[Path, list[str]] = {}  # files, and the tensors in each

    def write(tensors: dict) -> None:
        path = folder / f"model-{len(parts) + 1:05}.part"
        parts[path] = sorted(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    try:
        tensors, size = {}, 0
        for name, array in _weights(model):
            if tensors and size + array.nbytes > _SHARD:
                write(tensors)
                tensors, size = {}, 0
            tensors[name], size = array, size + array.nbytes
        write(tensors)
        for old in folder.iterdir():
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
                old.unlink()
        index = {}
        for i, (path, names) in enumerate(parts.items(), 1):
            target = (
                "model.safetensors"
                if len(parts) == 1
                else f"model-{i:05}-of-{len(parts):05}.safetensors"
            )
            path.replace(folder / target)
            index |= dict.fromkeys(names, target)
        if len(parts) > 1:
            write_json(
                folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index}
            )
    finally:
        for path in parts:
            path.unlink(missing_ok=True)


def _write_tokenizer(model, folder: Path) -> None:
    tokenizer = tokenizer_of(model)
    (folder / "tokenizer.model").write_bytes(model.preprocessor.tokenizer.proto)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    decoder = {str(tokenizer.id_of(token)): token for token in special}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
            "added_tokens_decoder": {
                i: {"content": token, "special": True} for i, token in decoder.items()
            },
            "chat_template": chat_template(get_template(template_of(model))),
        },
    )


def chat_template(template: Template) -> str:
    """A template in Jinja, for `apply_chat_template` and servers: a question is asked as it was in training.

    >>> from gemma_lora.templates import TEMPLATES
    >>> print(chat_template(TEMPLATES["recipe"])[-86:])
    {{ "Instruction:\\n" + message["content"] + "\\n\\nResponse:\\n" }}{% endif %}{% endfor %}
    """
    parts = []
    for literal, field, _, _ in Formatter().parse(template.without_context):
        parts += [json.dumps(literal, ensure_ascii=False)] * bool(literal) + [
            'message["content"]'
        ] * bool(field)
    return (
        "{{ bos_token }}{% for message in messages %}"
        f'{{% if message["role"] == "assistant" %}}{{{{ message["content"] + {json.dumps(template.end)} }}}}'
        f"{{% else %}}{{{{ {' + '.join(parts)} }}}}{{% endif %}}"
        "{% endfor %}"
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_PROMPTS = (
    "What should I do on a trip to Europe?",
    "The capital of France is",
    "1 2 3\n\n\tdéjà vu 🙂 " * 8,
)


@dataclass(frozen=True, repr=False)
class Exported(ShowsAsTable):
    """The folder of an export, its files in bytes, and what came out when its reader read it."""

    folder: Path
    files: dict[str, int]
    checked: str
    difference: float | None = None  # the largest between two logits, if it was checked

    def table(self) -> Table:
        """A row a file."""
        rows = [{"file": name, "bytes": size} for name, size in self.files.items()]
        return Table(rows, caption=self.checked)


def export_transformers(model, folder: str | Path, *, verify: bool | None = None) -> Exported:
    """Write a model, its adapter merged, as Transformers reads it: weights, config, tokenizer, generation settings.

    The model itself stays as it is. For Gemma 1, Gemma 2 and Gemma 3 text models, any number of key/value heads.

    Args:
        model: With or without adapters; kernels in float32, bfloat16 or float16, which the weights keep.
        folder: Made if it is not there. Files of an export in it are replaced.
        verify: Load the folder with Transformers and compare. None does so where Transformers and torch are installed
            and there is memory for it; what was done, or how to do it, is in the result.

    Raises:
        ValueError: The model is quantized, or of an architecture that Transformers' Gemmas do not have; or the folder
            holds a model that is no export of gl's.
        RuntimeError: Transformers read the folder, and came to other logits, tokens or token ids.
    """
    config = transformers_config(model)
    folder = Path(folder).expanduser()
    if (folder / "config.json").is_file() and MADE_BY not in (folder / "config.json").read_text(
        "utf-8"
    ):
        raise ValueError(f"{folder} holds a model that gl did not export. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, folder, config)
    write_card(folder, model_card(model, kind="transformers"))
    files = sizes(folder)
    checked, difference = _verified(model, folder, verify, sum(files.values()))
    return Exported(folder, files, checked, difference)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def _verified(model, folder: Path, verify: bool | None, size: int) -> tuple[str, float | None]:
    """Read the folder with Transformers: a sentence on what came out, and the largest difference of two logits."""
    again = "call export_transformers(model, folder, verify=True)"
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        if verify:
            raise ValueError(
                f"To verify an export takes {' and '.join(missing)}: pip install {' '.join(missing)}"
            )
        return f"Not checked: {' and '.join(missing)} not installed. Install, and {again}.", None
    single = model.backbone.token_embedding.compute_dtype == "float32"
    needed, free = size * (1.3 if single else 2.6), psutil.virtual_memory().available
    if verify is None and needed > free:
        return (
            f"Not checked: it takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free. Elsewhere, {again}.",
            None,
        )
    if verify is False:
        return f"Not checked, as asked. To check, {again}.", None
    import torch
    import transformers

    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            bars.enable_progress_bar()
    encode, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of(model)
    differences, shares = (
        [],
        [],
    )  # of a prompt's logits: the largest; and their root mean square, of the logits' own
    with jax.default_matmul_precision("float32"):  # GPUs and TPUs else round float32 in products
        answers, end = (
            generate(model, list(_PROMPTS), template=None, max_new_tokens=16),
            tokenizer.id_of("<eos>"),
        )
    for prompt, answer in zip(_PROMPTS, answers, strict=True):
        ids = tokenizer.prompt(None, prompt)
        if encode(prompt)["input_ids"] != ids:
            raise RuntimeError(
                f"Transformers' tokenizer encodes {prompt!r} otherwise, in {folder}."
            )
        inputs = np.array([ids])
        with jax.default_matmul_precision("float32"):
            ours = np.asarray(
                model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})
            ).astype("float32")
        with torch.no_grad():
            theirs = peer(torch.tensor(inputs)).logits.numpy()
            new = peer.generate(
                torch.tensor(inputs), max_new_tokens=16, do_sample=False, eos_token_id=end
            )
        differences.append(float(np.abs(ours - theirs).max()))
        shares.append(float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(ours**2))))
        new = new[0, len(ids) :].tolist()
        if single and tokenizer.decode(new).strip() != answer:
            raise RuntimeError(
                f"Transformers answers {prompt!r} otherwise: {tokenizer.decode(new)!r}, not {answer!r}."
            )
    worst, share = max(differences), max(shares)
    # Half precision alone moved logits by 0.5 to 1.1 %, a wrong config by 9 % and more. NaN is within no limit.
    if not (worst <= 1e-4 if single else share <= 0.05):
        raise RuntimeError(
            f"Transformers reads {folder}, but logits differ by {worst:.1e} ({share:.1%} of them)."
        )
    what = f"the same greedy tokens and logits within {worst:.1e}"
    if not single:
        what = f"logits within {worst:.1e} ({share:.1%} of them), as half precision rounds"
    return f"Read back with Transformers {transformers.__version__}: {what}.", worst
