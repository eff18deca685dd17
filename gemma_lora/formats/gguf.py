"""Export a model as one GGUF file, which llama.cpp, Ollama and LM Studio run.

From top to bottom: what llama.cpp can compute, the metadata that it wants (the model's
shape, its vocabulary, its template), the weights, the check that the file holds what
the model has, the Modelfile for Ollama, an adapter alone, and the export that writes
them. What the parts of a Gemma are called in such a file is in `access.gguf`, which
also reads one.
"""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from string import Formatter
from typing import Literal, get_args

import numpy as np
from keras_hub.models import CausalLM
from tqdm import tqdm

from gemma_lora.access.gguf import (
    LAYERS_OF_27B,
    ROWS,
    WAVELENGTH,
    GGUFFile,
    import_gguf,
    is_gguf,
    is_norm,
    layers_by_tensor,
)
from gemma_lora.formats.card import (
    base_name,
    licence_of,
    terms_of,
    title_of,
    write_file,
    written_whole,
)
from gemma_lora.formats.peft import has_heads, lora_to_export, to_peft
from gemma_lora.formats.transformers import Exported, chat_template, matrix, transformers_config
from gemma_lora.lora import kernel_shape, lora_layers, merged_kernel
from gemma_lora.models import note_of, template_of
from gemma_lora.options import a_path, with_options
from gemma_lora.runtime import quiet
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import Tokenizer, tokenizer_of

DType = Literal["float32", "float16", "bfloat16", "q8_0"]

# For each dtype: the encoding of its matrices and the kind of file, by their names in
# the package gguf; and how far rounding may move a weight, as a share of the largest in
# its tensor. In q8_0, 127 steps lead from 0 to the largest of 32 neighbours.
_ENCODINGS = {
    "float32": ("F32", "ALL_F32", 1e-6),
    "float16": ("F16", "MOSTLY_F16", 2**-11),
    "bfloat16": ("BF16", "MOSTLY_BF16", 2**-8),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0", 1 / 200),
}

# In the metadata: a file with this mark near its beginning may be written again.
MADE_BY = "gemma_lora.export_gguf"
# The same in a Modelfile.
_MADE_BY_LINE = "# Written by gemma_lora. Delete this line to keep your changes.\n"

# In llama.cpp, all layers but the last of so many see no further than the window.
_PERIOD = {"gemma": 1, "gemma2": 2, "gemma3": 6}

# Pieces that a text may hold in SentencePiece, and that act on the model: chat programs
# must neither show them nor take them from what a user writes.
_CONTROL = ("<start_of_turn>", "<end_of_turn>")

# What the check encodes: runs of spaces, accents, and a character of four bytes.
_TEXT = "1 2 3\n\n\tdéjà vu 🙂   on a trip to Europe"


def _check_computed(config: dict, family: str) -> None:
    """Raise ValueError if llama.cpp would compute another model than KerasHub does.

    Some of a Gemma is fixed in llama.cpp, and cannot be said in a file.

    Args:
        config: What Transformers' config.json says of the model.
        family: "gemma", "gemma2" or "gemma3".
    """
    layers = config["num_hidden_layers"]
    divisor = config["head_dim"]
    if layers == LAYERS_OF_27B.get(family):
        divisor = config["hidden_size"] // config["num_attention_heads"]
    types = config.get("layer_types", [])
    period = _PERIOD[family]
    usual_types = [
        "full_attention" if layer % period == period - 1 else "sliding_attention"
        for layer in range(len(types))
    ]
    caps = [bool(config.get(f"{place}_logit_softcapping")) for place in ("attn", "final")]
    checks = [
        ("queries divided by the root of", config.get("query_pre_attn_scalar", divisor), divisor),
        ("a soft cap of attention", caps[0], family == "gemma2"),
    ]
    if family == "gemma2":
        checks.append(("a soft cap of the output", caps[1], True))
    if family == "gemma2" or "sliding_attention" in types:
        checks.append(("the layers' attention", types, usual_types))
    if family == "gemma3" and "sliding_attention" in types:
        rope = config["rope_parameters"]["sliding_attention"]
        usual_rope = {"rope_type": "default", "rope_theta": 10_000.0}
        checks.append(("rotary positions within a window", rope, usual_rope))
    for what, has, usual in checks:
        if has != usual:
            raise ValueError(
                f"llama.cpp computes a {family} of {layers} layers with {what}: {usual}. No GGUF "
                f"file can say otherwise, and this model has: {has}."
            )


def _shape(config: dict, family: str) -> dict:
    """Return the metadata on a model's shape, from its config in Transformers."""
    names = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    shape = {key: config[name] for key, name in names.items() if config.get(name)}
    if "sliding_attention" in config.get("layer_types", []):
        shape["attention.sliding_window"] = config["sliding_window"]
    if family == "gemma3":
        shape["rope.freq_base"] = WAVELENGTH[family]
        rope = config["rope_parameters"]["full_attention"]
        if rope["rope_type"] == "linear":
            shape |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in shape:
            shape[name] = float(shape[name])
    return {f"{family}.{key}": value for key, value in shape.items()}


def _vocabulary(model) -> dict:
    """Return the metadata on a model's tokenizer, its template of tuning included."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.preprocessor.tokenizer.proto)
    kinds = proto.SentencePiece
    texts, scores, types = [], [], []
    for piece in proto.pieces:
        by_hand = piece.type == kinds.USER_DEFINED
        # llama.cpp looks for such pieces in the text as it was written.
        texts.append(piece.piece.replace("▁", " ") if by_hand else piece.piece)
        scores.append(piece.score)
        types.append(kinds.CONTROL if piece.piece in _CONTROL else piece.type)
    rows = model.backbone.vocabulary_size
    if len(texts) > rows:
        raise ValueError(
            f"The tokenizer has {len(texts):,} pieces, and the embedding only {rows:,} rows. "
            "Load the model with the tokenizer that belongs to it."
        )
    # Some embeddings have rows to spare, and every row must have a name.
    for row in range(len(texts), rows):
        texts.append(f"[PAD{row}]")
        scores.append(-10_000.0)
        types.append(kinds.UNUSED)
    tokenizer = tokenizer_of(model)
    template = get_template(template_of(model))
    vocabulary = {
        "model": "llama",
        "pre": "default",
        "tokens": texts,
        "scores": scores,
        "token_type": types,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.id_of("<eos>"),
        "unknown_token_id": tokenizer.id_of("<unk>"),
        "padding_token_id": tokenizer.pad_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
    }
    if template.end != "<eos>":
        vocabulary["eot_token_id"] = tokenizer.id_of(template.end)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    metadata["tokenizer.chat_template"] = chat_template(template)
    if note := note_of(model):
        metadata["gemma_lora.note"] = note
    return metadata


def _general(model, kind: str, dtype: str) -> dict:
    """Return the metadata on what the file is, where it comes from, and its licence."""
    gguf = import_gguf()
    _, file_type, _ = _ENCODINGS[dtype]
    return {
        "general.type": kind,
        "gemma_lora.made_by": MADE_BY,
        "general.name": title_of(model),
        "general.license": licence_of(model),
        "general.tags": ["gemma", "lora", "text-generation"],
        "general.base_model.count": 1,
        "general.base_model.0.name": base_name(model),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
    }


def _rows_shape(layer) -> tuple[int, ...]:
    """Return the shape of a layer's weights in a file, without computing them."""
    if is_norm(layer):
        return tuple(layer.scale.shape)
    if hasattr(layer, "embeddings"):
        return tuple(layer.embeddings.shape)
    # Only the shape is looked at: nothing is held.
    return matrix(layer, np.broadcast_to(np.float32(0), kernel_shape(layer))).shape


def _parts(layer) -> Iterator[tuple[slice, np.ndarray]]:
    """Go through a layer's weights, adapter merged, as a file has them: in rows.

    Yields:
        Which rows, and their weights in float32. A norm's rows are single numbers.
    """
    if is_norm(layer):
        # Gemma multiplies by 1 + scale, llama.cpp by what stands in the file.
        rows = np.asarray(layer.scale.value, "float32") + 1
    elif hasattr(layer, "embeddings"):
        rows = np.asarray(layer.embeddings.value)
    else:
        rows = matrix(layer, merged_kernel(layer))
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        yield part, np.ascontiguousarray(rows[part], "float32")


def _encodings(layers: dict, dtype: str) -> dict:
    """Return the encoding of each tensor: as in llama.cpp, norms stay in float32.

    Rows that q8_0 cannot cut into blocks of 32 stay in float16.
    """
    gguf = import_gguf()
    kinds = gguf.GGMLQuantizationType
    wanted = kinds[_ENCODINGS[dtype][0]]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    encodings = {}
    for name, layer in layers.items():
        shape = _rows_shape(layer)
        encodings[name] = wanted if shape[-1] % block == 0 else kinds.F16
        if len(shape) == 1:
            encodings[name] = kinds.F32
    return encodings


def _write(path: Path, family: str, metadata: dict, layers: dict, encodings: dict) -> None:
    """Write a file, one tensor after the other: memory never holds more than one."""
    gguf = import_gguf()
    with closing(gguf.GGUFWriter(None, family)) as writer:
        _add(writer, metadata)
        sizes = {}
        for name, layer in layers.items():
            shape = _rows_shape(layer)
            block, width = gguf.GGML_QUANT_SIZES[encodings[name]]
            size = math.prod(shape) // block * width
            writer.add_tensor_info(name, shape, np.dtype("float32"), size, encodings[name])
            sizes[name] = (shape[0], size // shape[0])
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, layer in _slowly(layers, "Writing"):
            content = np.empty(sizes[name], np.uint8)
            for part, rows in _parts(layer):
                _check_range(name, rows, encodings[name])
                rounded = gguf.quantize(rows, encodings[name])
                content[part] = rounded.view(np.uint8).reshape(len(rows), -1)
            writer.write_tensor_data(content)


def _add(writer, metadata: dict) -> None:
    """Add metadata to a writer, each value as the kind that llama.cpp wants."""
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)


def _check_range(name: str, rows: np.ndarray, encoding) -> None:
    """Raise ValueError if a weight is no number, or too large for its encoding."""
    largest = max(rows.max(), -rows.min())
    limit = np.finfo("float16" if encoding.name in ("F16", "Q8_0") else "float32").max
    # NaN is within no limit, hence `not`.
    if not largest <= limit:
        raise ValueError(
            f"{name} has weights of up to {largest:g}, and the encoding {encoding.name} ends at "
            f'{limit:g}. Export with dtype="bfloat16", or look for what went wrong in training.'
        )


def _slowly(layers: dict, what: str):
    """Go through layers, with a bar of progress if that takes some seconds."""
    return tqdm(layers.items(), what, unit="tensor", delay=5, mininterval=1, leave=False)


def _read_back(model, path: Path, layers: dict, dtype: str) -> float:
    """Compare what a file holds with the model: weights, config and token ids.

    Returns:
        The largest difference between two weights.

    Raises:
        RuntimeError: They differ by more than rounding.
    """
    file = GGUFFile(path)
    _, config = file.config()
    ours = model.backbone.get_config()
    wrong = [name for name, value in config.items() if not _is_same(ours.get(name, value), value)]
    with quiet():
        tokenizer = Tokenizer(file.tokenizer())
    if tokenizer.encode([_TEXT]) != tokenizer_of(model).encode([_TEXT]):
        wrong.append("the tokenizer")
    worst = 0.0
    limit = _ENCODINGS[dtype][2]
    for name, layer in _slowly(layers, "Reading back"):
        difference = largest = 0.0
        for part, rows in _parts(layer):
            largest = max(largest, float(rows.max()), -float(rows.min()))
            apart = float(np.abs(file.rows(name, part) - rows).max())
            # `maximum` and `not` let NaN through, and then fail.
            difference = float(np.maximum(difference, apart))
        if not difference <= limit * largest:
            wrong.append(f"{name} (by {difference:.1e})")
        worst = max(worst, difference)
    if wrong:
        raise RuntimeError(f"{path} reads otherwise than the model: {', '.join(wrong[:5])}.")
    return worst


def _is_same(ours, read) -> bool:
    """Return whether a value of a config came back. A file rounds to float32."""
    if isinstance(ours, float) and isinstance(read, float):
        return bool(np.isclose(ours, read))
    return ours == read


def ollama_template(template: Template) -> str:
    """Return a template as Ollama's Modelfile wants it, in the syntax of Go.

    Ollama puts `<bos>` before it, because the file's `add_bos_token` says so. What the
    system says is the context of the first question, as in `chat_template`. Turns of
    other roles are left out.

    >>> from gemma_lora.templates import TEMPLATES
    >>> 'else if eq .Role "user"' in ollama_template(TEMPLATES["recipe"])
    True
    """
    fields = {"instruction": "{{ .Content }}", "context": "{{ $system }}"}

    def in_go(text: str) -> str:
        parts = Formatter().parse(text)
        return "".join(_go_text(literal) + fields.get(field, "") for literal, field, _, _ in parts)

    question = in_go(template.without_context)
    with_system = in_go(template.with_context)
    answer = f"{{{{ .Content }}}}{_go_text(template.end + template.between)}"
    return (
        '{{ $system := .System }}{{ range .Messages }}{{ if eq .Role "assistant" }}'
        f'{answer}{{{{ else if eq .Role "user" }}}}{{{{ if $system }}}}{with_system}'
        f'{{{{ $system = "" }}}}{{{{ else }}}}{question}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}'
    )


def _go_text(text: str) -> str:
    r"""Return a text for a template of Go, odd letters as actions.

    >>> print(_go_text("Ask {it}"))
    Ask {{ "\U0000007b" }}it}
    """
    # A brace could begin an action, quotes could end the template, and Ollama's parser
    # drops what cannot be printed, such as a no-break space.
    return "".join(
        letter
        if letter == "\n" or (letter.isprintable() and letter not in '{"')
        else f'{{{{ "\\U{ord(letter):08x}" }}}}'
        for letter in text
    )


def modelfile(model, name: str) -> str:
    """Return the text of a Modelfile, from which `ollama create` makes a model.

    Args:
        model: The model whose template of tuning, and whose licence, it names.
        name: The GGUF file beside it.
    """
    template = get_template(template_of(model))
    return (
        f"{_MADE_BY_LINE}"
        f"FROM ./{name}\n"
        f'TEMPLATE """{ollama_template(template)}"""\n'
        f'PARAMETER stop "{template.end}"\n'
        "# Greedy answers, as `gl.generate` gives them.\n"
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"
        f'LICENSE """{terms_of(model)}"""\n'
    )


def _export_adapter(model, path: Path, family: str, layers: dict) -> Exported:
    """Write a model's adapters in PEFT's shapes, as llama.cpp takes them.

    llama.cpp scales each product by alpha / its own rank, which is larger where a layer
    has an A for each head. So B is written larger by as much.
    """
    gguf = import_gguf()
    lora = lora_to_export(model)
    adapted = {id(layer) for layer in lora_layers(model).values()}
    metadata = {"adapter.type": "lora", "adapter.lora.alpha": lora.alpha}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, closing(gguf.GGUFWriter(None, family)) as writer:
        _add(writer, _general(model, "adapter", "float32") | metadata)
        for name, layer in layers.items():
            if id(layer) not in adapted:
                continue
            a = np.asarray(layer.lora_kernel_a.value, "float32")
            b = np.asarray(layer.lora_kernel_b.value, "float32")
            down, up = to_peft(a, b, heads=has_heads(layer))
            up = up * (len(down) / lora.rank)
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(down, "float32"))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(up, "float32"))
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    checked = f"To check, with the base as GGUF: llama-server -m BASE.gguf --lora {path.name}"
    return Exported(path.parent, {path.name: path.stat().st_size}, checked)


@with_options
def export_gguf(
    model: CausalLM, path: str | Path, *, dtype: DType = "float32", adapter_only: bool = False
) -> Exported:
    """Write a model, its adapter merged, as one GGUF file, and a Modelfile beside it.

    llama.cpp, Ollama and LM Studio run the file, and `gl.load` reads it. It holds the
    weights, the tokenizer and the template of tuning. The model itself stays as it is.

    Args:
        model: A Gemma 1, Gemma 2 or Gemma 3 text model, with or without adapters.
        path: The file, whose name ends in ".gguf". An export there is replaced, and so
            is the Modelfile of one.
        dtype: How the matrices are kept: "float32", "float16", "bfloat16", or "q8_0",
            8 bits for a weight and 16 for each block of 32. Norms stay in float32.
            Matrices whose rows are no multiple of 32 stay in float16 under "q8_0".
        adapter_only: Write only the adapter, in float32, for llama.cpp to add to the
            base: to a GGUF file of the same model, exported without adapters. There is
            no Modelfile then.

    Returns:
        The files, and a sentence on the check: a whole model is read again, and
        compared tensor by tensor.

    Raises:
        ImportError: The package `gguf` is not installed.
        ValueError: The model is quantized, or llama.cpp computes no such Gemma; a
            weight is too large for its encoding; `path` is a file that gl did not
            export; or `adapter_only` is set and the model
            has no adapter.
        RuntimeError: The file that was written differs from the model.
    """
    path = a_path("path", path)
    _check_options(path, dtype)
    config = transformers_config(model)
    family = config["model_type"].removesuffix("_text")
    _check_computed(config, family)
    layers = layers_by_tensor(model.backbone, family)
    if adapter_only:
        return _export_adapter(model, path, family, layers)
    metadata = _general(model, "model", dtype) | _shape(config, family) | _vocabulary(model)
    encodings = _encodings(layers, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        _write(part, family, metadata, layers, encodings)
        difference = _read_back(model, part, layers, dtype)
    place = path.with_name("Modelfile")
    if not place.exists() or _MADE_BY_LINE.encode() in _beginning(place):
        write_file(place, modelfile(model, path.name).encode())
    files = {file.name: file.stat().st_size for file in (path, place)}
    return Exported(path.parent, files, _sentence(difference, dtype, encodings), difference)


def _check_options(path: Path, dtype: str) -> None:
    """Raise ValueError if an option is invalid, or somebody else's file is there."""
    import_gguf()
    if dtype not in _ENCODINGS:
        raise ValueError(f"dtype is one of {', '.join(get_args(DType))}. Received: {dtype!r}")
    if not is_gguf(path):
        raise ValueError(f'The name of a GGUF file ends in ".gguf". Received: {path}')
    if path.exists() and MADE_BY.encode() not in _beginning(path):
        raise ValueError(f"gl did not export {path}, and does not replace it. Choose another name.")


def _sentence(difference: float, dtype: str, encodings: dict) -> str:
    """Say what the check found, and how to ask the model."""
    weights = f"weights within {difference:.1e}" if difference else "weights bit for bit"
    odd = sum(kind.name == "F16" for kind in encodings.values()) if dtype == "q8_0" else 0
    note = f" {odd} matrices are in float16: their rows are no multiple of 32." if odd else ""
    return (
        f"Read back: {weights}, config and tokenizer as in the model.{note} To ask it: "
        "ollama create NAME -f Modelfile, then ollama run NAME."
    )


def _beginning(path: Path) -> bytes:
    """Return the first bytes of a file; of anything else, none."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(4096)
