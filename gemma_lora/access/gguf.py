"""Read a model from a GGUF file: what llama.cpp, Ollama and LM Studio keep.

A GGUF file holds a model's shape, its vocabulary and its weights, most of them rounded
to a few bits. Here: what the parts of a Gemma are called in such a file, the check that
the file can be read, its shape, its tokenizer, and the model with all weights widened.
The package `gguf` reads the file's format. Not here: writing one (`formats.gguf`).
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from gemma_lora.access.preset import sentencepiece_proto
from gemma_lora.runtime import return_memory

# The parts of a decoder block: by their names in the file, the attributes of KerasHub's
# blocks. Gemma 1 has no norm after attention and feed-forward part, and of the three
# families only Gemma 3 has norms of queries and keys.
# private: attributes of KerasHub's decoder blocks and attention layers
_EVERY_BLOCK = {
    "attn_norm": "pre_attention_norm",
    "attn_q": "attention.query_dense",
    "attn_k": "attention.key_dense",
    "attn_v": "attention.value_dense",
    "attn_output": "attention.output_dense",
    "ffn_norm": "pre_ffw_norm",
    "ffn_gate": "gating_ffw",
    "ffn_up": "gating_ffw_2",
    "ffn_down": "ffw_linear",
}
_NORMS_AFTER = {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_ffw_norm"}
_QUERY_KEY_NORMS = {"attn_q_norm": "attention.query_norm", "attn_k_norm": "attention.key_norm"}
BLOCK_PARTS = {
    "gemma": _EVERY_BLOCK,
    "gemma2": _EVERY_BLOCK | _NORMS_AFTER,
    "gemma3": _EVERY_BLOCK | _NORMS_AFTER | _QUERY_KEY_NORMS,
}

# Layers of the two Gemmas whose queries are divided by the root of hidden width / heads
# instead of the head width's. A GGUF file does not say so: llama.cpp goes by the number
# of layers, and so do we.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}

# Wavelength of the rotary positions, which KerasHub does not let a model choose. That
# of Gemma 3 counts in layers that see the whole text.
WAVELENGTH = {"gemma": 10_000.0, "gemma2": 10_000.0, "gemma3": 1_000_000.0}

# The first bytes of every GGUF file, and the versions of the format that can be read.
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

# Rows of a matrix that are widened or rounded at once: a whole embedding would take its
# size several times over.
ROWS = 4096


def is_gguf(path: str | Path) -> bool:
    """Return whether a name is that of a GGUF file, which need not exist.

    >>> is_gguf("gemma-3-270m-Q8_0.gguf"), is_gguf("gemma3_270m")
    (True, False)
    """
    return Path(path).suffix.lower() == ".gguf"


def import_gguf():
    """Return the package `gguf`. Raises ImportError with the way to install it."""
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "GGUF files take the package `gguf`, which is not installed: pip install gguf"
        ) from None
    return gguf


class GGUFFile:
    """A file that holds a Gemma 1, Gemma 2 or Gemma 3 text model.

    It is opened, not loaded: weights stay on disk until `model` reads them.

    Args:
        path: The file.

    Attributes:
        family: "gemma", "gemma2" or "gemma3": the file's `general.architecture`.

    Raises:
        ImportError: The package `gguf` is not installed.
        ValueError: The file is not GGUF, or of a version that cannot be read; it is cut
            off; or it holds something else than a text Gemma.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._gguf = import_gguf()
        _check_beginning(self.path)
        try:
            reader = _quick_reader(self._gguf)(self.path)
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path} is cut off or damaged: its size or contents are not what its header "
                f"says ({error}). Fetch the file again."
            ) from None
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.family = self._read("general.architecture")
        self._check_contents()

    def _read(self, key: str, default=None):
        """Return a value of the metadata. In a key, {} stands for the family."""
        field = self._fields.get(key.format(getattr(self, "family", "")))
        return default if field is None else field.contents()

    def _needed(self, key: str):
        """Return a value like `_read`. Raises ValueError if the file has none."""
        value = self._read(key)
        if value is None:
            raise ValueError(
                f"{self.path} says nothing of {key.format(self.family)}, which every such file "
                "should. Was it converted completely?"
            )
        return value

    def _check_contents(self) -> None:
        """Raise ValueError if this is no whole text Gemma that KerasHub can compute."""
        kind = self._read("general.type", "model")
        parts = self._read("split.count", 1)
        if kind != "model":
            raise ValueError(f"{self.path} holds no model: its type is {kind!r}.")
        if parts > 1:
            raise ValueError(
                f"{self.path} is one of {parts} parts of a model. Join them first: "
                "llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        if self.family not in BLOCK_PARTS:
            raise ValueError(
                f"GGUF files of Gemma 1, 2 and 3 can be loaded. {self.path} is of the "
                f"architecture {self.family!r}."
            )
        wavelength = self._read("{}.rope.freq_base", WAVELENGTH[self.family])
        epsilon = self._read("{}.attention.layer_norm_rms_epsilon", 1e-6)
        for name, value, usual in (
            ("rope.freq_base", wavelength, WAVELENGTH[self.family]),
            ("attention.layer_norm_rms_epsilon", epsilon, 1e-6),
        ):
            if not np.isclose(value, usual, rtol=1e-4):
                raise ValueError(
                    f"KerasHub computes this family with {name} = {usual:g} alone. "
                    f"{self.path} says {value:g}."
                )
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Raise ValueError if a tensor is missing, or the output has weights apart."""
        names = tensor_names(self.family, self._needed("{}.block_count"))
        missing = [name for name in names if name not in self._tensors]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of the {len(names)} tensors of such a model, "
                f"such as {missing[0]}. Was the file converted completely?"
            )
        output = self._tensors.get("output.weight")
        embedding = self._tensors["token_embd.weight"]
        if output is not None and not np.array_equal(output.data, embedding.data):
            raise ValueError(
                f"In {self.path} the output layer has its own weights. Gemma's output shares "
                "those of the embedding, and KerasHub knows no other."
            )

    def config(self) -> tuple[str, dict]:
        """Return the class of KerasHub's backbone, and its arguments but the dtype."""
        hidden = self._needed("{}.embedding_length")
        heads = self._needed("{}.attention.head_count")
        layers = self._needed("{}.block_count")
        is_gemma3 = self.family == "gemma3"
        config = {
            # A file counts dimensions from the last.
            "vocabulary_size": int(self._tensors["token_embd.weight"].shape[1]),
            "num_layers": layers,
            "num_query_heads": heads,
            "num_key_value_heads": self._read("{}.attention.head_count_kv", heads),
            "hidden_dim": hidden,
            # Gemma 1 and 2 count both halves of the gate in KerasHub, Gemma 3 one.
            "intermediate_dim": self._needed("{}.feed_forward_length") * (1 if is_gemma3 else 2),
            "head_dim": self._read("{}.attention.key_length", hidden // heads),
        }
        if self.family == "gemma":
            return "GemmaBackbone", config
        window = self._read("{}.attention.sliding_window", None if is_gemma3 else 4096)
        config |= {
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "query_head_dim_normalize": layers != LAYERS_OF_27B[self.family],
            "final_logit_soft_cap": self._read("{}.final_logit_softcapping"),
            "use_sliding_window_attention": bool(window),
        }
        if window:
            config["sliding_window_size"] = window
        if not is_gemma3:
            cap = self._read("{}.attn_logit_softcapping", 50.0)
            return "GemmaBackbone", config | {"attention_logit_soft_cap": cap}
        config |= {"image_size": None, "vision_encoder": None}
        if self._read("{}.rope.scaling.type", "none") == "linear":
            config["global_rope_scaling_factor"] = self._read("{}.rope.scaling.factor")
        return "Gemma3Backbone", config

    def tokenizer(self):
        """Return KerasHub's tokenizer, over the vocabulary as a SentencePiece model."""
        proto = self._sentencepiece()
        if self.family == "gemma3":
            return keras_hub.models.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)
        return keras_hub.models.GemmaTokenizer(proto=proto)

    def _sentencepiece(self) -> bytes:
        """Return the vocabulary as the bytes of a SentencePiece model.

        Kinds of pieces have the same numbers in both formats. In the file, pieces
        defined by hand hold plain spaces, and a file calls turns, `<start_of_turn>`,
        control tokens.
        """
        kind = self._read("tokenizer.ggml.model")
        if kind != "llama":
            raise ValueError(
                f"{self.path} has a tokenizer of the kind {kind!r}. Gemma's is SentencePiece, "
                'which GGUF calls "llama".'
            )
        names = ("tokens", "scores", "token_type")
        vocabulary = (self._needed(f"tokenizer.ggml.{name}") for name in names)
        prefix = bool(self._read("tokenizer.ggml.add_space_prefix", False))
        return sentencepiece_proto(*vocabulary, dummy_prefix=prefix)

    def note(self) -> str | None:
        """Return what `export_gguf` noted of the tuning, as JSON; None without it."""
        return self._read("gemma_lora.note")

    def is_instruction_tuned(self) -> bool:
        """Return whether the file says that its model was tuned to take turns.

        Its template decides. Without one, the names of model and file do.
        """
        template = self._read("tokenizer.chat_template")
        if template is not None:
            return "<start_of_turn>" in template
        names = [self._read("general.finetune", ""), self._read("general.name", "")]
        words = re.split(r"[\W_]+", " ".join([*names, self.path.stem]).lower())
        return "it" in words or "instruct" in words

    def model(self, dtype) -> keras_hub.models.CausalLM:
        """Build the model in KerasHub, every weight widened to a dtype policy.

        Raises ValueError if the policy is a quantized one, or a tensor has a shape or
        an encoding that cannot be read.
        """
        policy = keras.dtype_policies.get(dtype)
        if policy.quantization_mode:
            raise ValueError(
                "Weights of a GGUF file are widened to a floating-point dtype, such as "
                f'"float32" or "bfloat16". Received: dtype={policy.name!r}'
            )
        models = keras_hub.models
        class_name, config = self.config()
        with _zeros_at_first():
            backbone = getattr(models, class_name)(dtype=policy, **config)
        family = class_name.removesuffix("Backbone")
        options = {"image_converter": None} if family == "Gemma3" else {}
        make_preprocessor = getattr(models, f"{family}CausalLMPreprocessor")
        preprocessor = make_preprocessor(tokenizer=self.tokenizer(), **options)
        for name, layer in layers_by_tensor(backbone, self.family).items():
            self._assign(name, layer)
        make_model = getattr(models, f"{family}CausalLM")
        return make_model(backbone=backbone, preprocessor=preprocessor)

    def _assign(self, name: str, layer) -> None:
        """Give a layer of KerasHub the weights that the file has for it."""
        variable = variable_of(layer)
        tensor = self._tensors[name]
        rows = _as_rows(layer, variable.shape)
        if tuple(reversed(tensor.shape.tolist())) != rows:
            raise ValueError(
                f"In {self.path}, {name} has the shape {tuple(reversed(tensor.shape.tolist()))}. "
                f"The rest of the file asks for {rows}."
            )
        # Zeros go before weights come, so that memory holds only one of them.
        variable.value.delete()
        return_memory()
        values = _empty(rows, jnp.dtype(variable.dtype))
        for start in range(0, rows[0], ROWS):
            part = slice(start, start + ROWS)
            # Gemma multiplies by 1 + scale. The file holds the sum.
            values[part] = self.rows(name, part) - is_norm(layer)
        variable.assign(_from_rows(layer, values, variable.shape))

    def rows(self, name: str, part: slice) -> np.ndarray:
        """Return some rows of a tensor in float32, whatever its encoding."""
        tensor = self._tensors[name]
        try:
            return self._gguf.dequantize(tensor.data[part], tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.path} holds {tensor.name} in the encoding {tensor.tensor_type.name}, which "
                "the package gguf cannot widen. Take a file in Q8_0, Q4_K_M, F16 or BF16."
            ) from None


def _check_beginning(path: Path) -> None:
    """Raise ValueError if a file does not begin as a GGUF file that we can read."""
    with path.open("rb") as file:
        beginning = file.read(8)
    if beginning[:4] != _MAGIC:
        raise ValueError(
            f"{path} is no GGUF file: it begins with {beginning[:4]!r}, not {_MAGIC!r}. "
            "Was a web page or a pointer to the file downloaded in its place?"
        )
    version = int.from_bytes(beginning[4:], "little")
    if version not in _VERSIONS:
        raise ValueError(
            f"{path} is of version {version} of GGUF. Versions {_VERSIONS[0]} and {_VERSIONS[1]} "
            "can be read. Convert the model again, with a llama.cpp of today."
        )


def _quick_reader(gguf) -> type:
    """Return the package's reader, but with arrays of metadata read at once.

    Its own goes from value to value, which takes 18 s and 0.7 GB for the 262,144 tokens
    of Gemma 3.
    """
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        # private: `_get_field_parts` and `_get` of the package's reader
        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = kinds(int(self._get(orig_offs, np.uint32)[0]))
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            if kind == kinds.STRING:
                end, texts = _strings(self.data, start, count)
                return end - orig_offs, texts, [*range(count)], [kinds.ARRAY, kind]
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            if len(values) < count:
                raise ValueError("an array ends behind the end of the file")
            return start + values.nbytes - orig_offs, [values], [0], [kinds.ARRAY, kind]

    return Reader


def _strings(data, start: int, count: int) -> tuple[int, list[memoryview]]:
    """Return where a list of strings ends, and the bytes of each."""
    view = memoryview(data)
    texts = []
    for _ in range(count):
        end = start + 8 + int.from_bytes(view[start : start + 8], "little")
        if end > len(view):
            raise ValueError("a text ends behind the end of the file")
        texts.append(view[start + 8 : end])
        start = end
    return start, texts


@contextmanager
def _zeros_at_first() -> Iterator[None]:
    """Within this context, Keras draws no weights: they are zeros until they are read.

    Drawing Gemma's embedding takes four times its memory.
    """
    # private: the method that every initializer of KerasHub's Gemma uses
    kind = keras.initializers.VarianceScaling
    drawn = kind.__call__
    kind.__call__ = lambda self, shape, dtype=None: jnp.zeros(shape, dtype)
    try:
        yield
    finally:
        kind.__call__ = drawn


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an array whose memory JAX takes over on a CPU, instead of copying it."""
    aligned = 64
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + aligned, np.uint8)
    start = -memory.ctypes.data % aligned
    return memory[start : start + size].view(dtype).reshape(shape)


def tensor_names(family: str, layers: int) -> list[str]:
    """Name the tensors of a model, in the order of a forward pass.

    >>> tensor_names("gemma", 1)[:3]
    ['token_embd.weight', 'blk.0.attn_norm.weight', 'blk.0.attn_q.weight']
    """
    blocks = [f"blk.{i}.{part}.weight" for i in range(layers) for part in BLOCK_PARTS[family]]
    return ["token_embd.weight", *blocks, "output_norm.weight"]


def layers_by_tensor(backbone, family: str) -> dict[str, keras.layers.Layer]:
    """Map the name of each tensor in a file to the layer of KerasHub that has it."""
    layers = [backbone.token_embedding]
    for block in backbone.transformer_layers:
        layers += [attrgetter(attribute)(block) for attribute in BLOCK_PARTS[family].values()]
    layers.append(backbone.layer_norm)
    names = tensor_names(family, len(backbone.transformer_layers))
    return dict(zip(names, layers, strict=True))


def variable_of(layer) -> keras.Variable:
    """Return the one variable of an embedding, a norm or a linear layer."""
    for name in ("embeddings", "scale", "kernel"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AttributeError(f"{layer} has neither embeddings nor scale nor kernel.")


def is_norm(layer) -> bool:
    """Return whether a layer is a norm, whose scale a file holds plus one."""
    return hasattr(layer, "scale")


# The shapes of kernels. A file has (outputs, inputs), as torch's Linear has, and heads
# are part of the outputs, or of the inputs:
#
#   query, key, value   (heads, hidden, head size)   (heads * head size, hidden)
#   attention_output    (heads, head size, hidden)   (hidden, heads * head size)
#   the others          (inputs, outputs)            (outputs, inputs)


def _as_rows(layer, shape: tuple) -> tuple[int, ...]:
    """Return the shape that a layer's weights have in a file."""
    if len(shape) == 1 or hasattr(layer, "embeddings"):
        return tuple(shape)
    if len(shape) == 2:
        return (shape[1], shape[0])
    if layer.name == "attention_output":
        return (shape[2], shape[0] * shape[1])
    return (shape[0] * shape[2], shape[1])


def _from_rows(layer, rows: np.ndarray, shape: tuple) -> np.ndarray:
    """Bring a file's weights into the shape of KerasHub's."""
    if len(shape) == 1 or hasattr(layer, "embeddings"):
        return rows
    if len(shape) == 2 or layer.name == "attention_output":
        return rows.T.reshape(shape)
    heads, hidden, head_size = shape
    return rows.reshape(heads, head_size, hidden).transpose(0, 2, 1)
