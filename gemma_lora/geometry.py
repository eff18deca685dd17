"""The shapes of the Gemmas, and what a run on each takes: counted, or compiled for arrays that do not exist."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import keras
import keras_hub

from gemma_lora.lora import ALL_LINEAR, enable_lora, factored
from gemma_lora.loss import CHUNK, TokenTrainer, optimizer_for
from gemma_lora.models import TINY, local_folder, recommended
from gemma_lora.sources import Source


def _geometry(layers: int, query: int, key_value: int, hidden: int, intermediate: int, head: int, **more) -> dict:
    names = ("num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim")
    return dict(zip(names, (layers, query, key_value, hidden, intermediate, head), strict=True)) | more


# The text part of every size, as the arguments of KerasHub's backbones: Gemma 1 and 2 count gate and value in
# intermediate_dim together, Gemma 3 counts one of them. Tests compare them with KerasHub's own parameter counts.
_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True, "use_sliding_window_attention": True}
_GEMMA = {"vocabulary_size": 256_000}
_GEMMA2 = {**_GEMMA, **_NORMS, "attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0}
_GEMMA3 = {
    "vocabulary_size": 262_144,
    "image_size": None,
    "vision_encoder": None,
    "sliding_window_size": 1024,
    **_NORMS,
}
GEOMETRIES = {
    "gemma_2b": _geometry(18, 8, 1, 2048, 32768, 256, **_GEMMA),
    "gemma_7b": _geometry(28, 16, 16, 3072, 49152, 256, **_GEMMA),
    "vault_gemma_1b": _geometry(26, 4, 4, 1152, 13824, 256, **_GEMMA),
    "gemma2_2b": _geometry(26, 8, 4, 2304, 18432, 256, **_GEMMA2),
    "gemma2_9b": _geometry(42, 16, 8, 3584, 28672, 256, **_GEMMA2),
    "gemma2_27b": _geometry(46, 32, 16, 4608, 73728, 128, **_GEMMA2),
    "gemma3_270m": _geometry(18, 4, 1, 640, 2048, 256, **_GEMMA3),
    "gemma3_1b": _geometry(26, 4, 1, 1152, 6912, 256, **_GEMMA3),
    "gemma3_4b": _geometry(34, 8, 4, 2560, 10240, 256, **_GEMMA3),
    "gemma3_12b": _geometry(48, 16, 8, 3840, 15360, 256, **_GEMMA3),
    "gemma3_27b": _geometry(62, 32, 16, 5376, 21504, 128, **_GEMMA3),
}
_VISION = range(410_000_000, 430_000_000)  # parameters of Gemma 3's vision encoder
BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)}  # of a weight, and of an activation
BYTES |= {"mixed_bfloat16": (4, 2), "mixed_float16": (4, 2)}


@dataclass(frozen=True)
class Parts:
    """Bytes of a training step: what lies there all the time, and what its peak adds."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Need:
    """A model, and what is to be done with it."""

    preset: str
    geometry: dict
    rank: int
    targets: tuple[str, ...]
    sequence_length: int
    batch_size: int
    dtype: str
    prompts: int

    @property
    def is_gemma3(self) -> bool:
        return "image_size" in self.geometry

    @cached_property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's linear kernels, by name."""
        g = self.geometry
        heads, kv, hidden, head = (
            g[f"{n}"] for n in ("num_query_heads", "num_key_value_heads", "hidden_dim", "head_dim")
        )
        inner = g["intermediate_dim"] // (1 if self.is_gemma3 else 2)
        gate = (hidden, inner)
        shapes = ((heads, hidden, head), (kv, hidden, head), (kv, hidden, head), (heads, head, hidden), gate, gate)
        return dict(zip(ALL_LINEAR, (*shapes, (inner, hidden)), strict=True))

    @property
    def parameters(self) -> int:
        """Parameters of the base: embedding, kernels and norms."""
        g = self.geometry
        norms = (2 + g.get("use_post_ffw_norm", False) + g.get("use_post_attention_norm", False)) * g["hidden_dim"]
        norms += 2 * g["head_dim"] * (self.is_gemma3 and g.get("use_query_key_norm", True))
        layer = sum(map(math.prod, self.kernels.values())) + norms
        return (g["vocabulary_size"] + 1) * g["hidden_dim"] + g["num_layers"] * layer

    @property
    def trainable(self) -> int:
        """Parameters of the adapters: A is like the kernel but ends in rank, B is (rank, the kernel's last axis)."""
        shapes = [self.kernels[name] for name in self.targets]
        return self.geometry["num_layers"] * sum(self.rank * (math.prod(s[:-1]) + s[-1]) for s in shapes)

    def counted(self) -> tuple[Parts, int]:
        """Estimate a training step's parts, and the peak of generation, in bytes.

        The factors for activations and logits were fitted to what XLA's CPU compiler reserves for 36 random shapes in
        float32 (within 15 %); GPUs differ.
        """
        g, (weight, active) = self.geometry, BYTES[self.dtype]
        layers, tokens = g["num_layers"], self.batch_size * self.sequence_length
        heads, queries = g["num_query_heads"], g["num_query_heads"] * g["head_dim"]
        inner = self.kernels["ffw_linear"][0]
        a_token = 4 * g["hidden_dim"] + 4.4 * inner + 3.7 * queries + 2.3 * heads * self.sequence_length
        parts = Parts(
            weights=self.parameters * weight,
            adapters=4 * self.trainable,
            gradients=4 * self.trainable,
            optimizer=8 * self.trainable,  # AdamW's two moments
            activations=int(layers * tokens * a_token * active),
            logits=3 * 4 * min(tokens, CHUNK) * g["vocabulary_size"],  # with softmax and gradient; in float32
        )
        cache = 2 * layers * self.prompts * self.sequence_length * g["num_key_value_heads"] * g["head_dim"] * active
        at_once = self.prompts * self.sequence_length * (2 * inner + 2 * heads * self.sequence_length) * active
        return parts, parts.weights + parts.adapters + 2 * cache + at_once

    def compiled(self) -> tuple[Parts, int]:
        """Have the compiler say what it would reserve on this backend; no weight exists at any time."""
        model, trainer = None, None

        def build():
            nonlocal model, trainer
            model = self._build()
            model.sampler = keras_hub.samplers.GreedySampler()
            enable_lora(model, rank=self.rank, targets=self.targets, seed=0)
            trainer = TokenTrainer(model)
            trainer.compile(optimizer=optimizer_for(recommended(TINY)))
            trainer.optimizer.build(trainer.trainable_variables)
            groups = trainer.trainable_variables, trainer.optimizer.variables, trainer.metrics_variables
            return [v.value for v in trainer.non_trainable_variables], tuple([v.value for v in vs] for vs in groups)

        frozen, own = jax.eval_shape(build)

        def array(rows: int, dtype: str):
            return jax.ShapeDtypeStruct((rows, self.sequence_length), dtype)

        rows = self.batch_size
        data = {"token_ids": array(rows, "int32"), "padding_mask": array(rows, "int32")}
        step = jax.jit(trainer.pure_step, donate_argnums=1)
        training = step.lower(frozen, own, (data, array(rows, "int32"), array(rows, "float32"))).compile()

        def answer(frozen, adapters, inputs):
            variables = itertools.chain(
                zip(trainer.non_trainable_variables, frozen, strict=True),
                zip(trainer.trainable_variables, adapters, strict=True),
            )
            with keras.StatelessScope(state_mapping=variables), factored(model):
                return model.generate_step(inputs, stop_token_ids=(1,))

        prompts = {"token_ids": array(self.prompts, "int32"), "padding_mask": array(self.prompts, "bool")}
        generation = jax.jit(answer).lower(frozen, own[0], prompts).compile()

        counted = self.counted()[0]
        peak = _bytes(training)
        rest = peak - replace(counted, activations=0).total
        logits = counted.logits + min(rest, 0)  # of a small peak, less than was counted
        return replace(counted, logits=logits, activations=max(rest, 0)), _bytes(generation)

    def _build(self) -> keras_hub.models.CausalLM:
        family = "Gemma3" if self.is_gemma3 else "Gemma"
        backbone = getattr(keras_hub.models, f"{family}Backbone")(**self.geometry, dtype=self.dtype)
        return getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)


def _bytes(compiled) -> int:
    """What a compiled program holds at its peak, by its own account: inputs, outputs that are not inputs, scratch."""
    m = compiled.memory_analysis()
    own = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return own + m.temp_size_in_bytes


def geometry_of(name: str) -> tuple[dict, bool]:
    """The shape of a preset's text part, and whether it has a vision part beside it."""
    if folder := local_folder(name):
        config = json.loads((folder / "config.json").read_text())
        return geometry_of_config(config.get("config", {}), config.get("class_name", "another format"), name)
    presets, handle = keras_hub.models.CausalLM.presets, Source(name).handle
    known = next((p for n, p in presets.items() if n == name or p["kaggle_handle"].endswith(f"//{handle}")), None)
    count = known["metadata"].get("params", 0) if known else 0
    for geometry in GEOMETRIES.values():
        own = Need(name, geometry, 1, (), 1, 1, "float32", 1).parameters
        if count == own or count - own in _VISION:
            return geometry, count != own
    raise ValueError(
        f"The shape of {name!r} is not known without downloading it. Known are KerasHub's presets of Gemma 1, 2 and 3, "
        "by name or kaggle:// handle, folders, and loaded models."
    )


def geometry_of_config(config: dict, class_name: str, name: str) -> tuple[dict, bool]:
    if class_name not in ("GemmaBackbone", "Gemma3Backbone"):
        raise ValueError(f"Budgets are for Gemma 1, 2 and 3. Received: {name!r}, which is of {class_name}")
    vision = config.get("vision_encoder") is not None
    geometry = {key: value for key, value in config.items() if key not in ("name", "trainable", "dtype")}
    if class_name == "Gemma3Backbone":
        geometry |= {"image_size": None, "vision_encoder": None}
    return geometry, vision
