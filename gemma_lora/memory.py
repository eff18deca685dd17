"""What a run will need of memory, known before anything is downloaded, and said again where memory runs out.

For the backend at hand, the training step and the generation loop are compiled for arrays that do not exist, and the
compiler says what it would reserve. For a device that is not there, the same parts are counted.
"""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import keras
import keras_hub
import psutil

from gemma_lora.access.fetch import Source
from gemma_lora.lora import ALL_LINEAR, enable_lora, resolve_targets
from gemma_lora.loss import CHUNK, frozen_values, optimizer_for, start_state, training_step
from gemma_lora.models import TINY, local_folder, recommended, state_of
from gemma_lora.tables import ShowsAsTable, Table


def _geometry(
    layers: int, query: int, key_value: int, hidden: int, intermediate: int, head: int, **more
) -> dict:
    names = (
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
        "head_dim",
    )
    return (
        dict(zip(names, (layers, query, key_value, hidden, intermediate, head), strict=True)) | more
    )


# The text part of every size, as the arguments of KerasHub's backbones: Gemma 1 and 2 count gate and value in
# intermediate_dim together, Gemma 3 counts one of them. Tests compare them with KerasHub's own parameter counts.
_NORMS = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
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
BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
}  # of a weight, and of an activation
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
        shapes = (
            (heads, hidden, head),
            (kv, hidden, head),
            (kv, hidden, head),
            (heads, head, hidden),
            gate,
            gate,
        )
        return dict(zip(ALL_LINEAR, (*shapes, (inner, hidden)), strict=True))

    @property
    def parameters(self) -> int:
        """Parameters of the base: embedding, kernels and norms."""
        g = self.geometry
        norms = (
            2 + g.get("use_post_ffw_norm", False) + g.get("use_post_attention_norm", False)
        ) * g["hidden_dim"]
        norms += 2 * g["head_dim"] * (self.is_gemma3 and g.get("use_query_key_norm", True))
        layer = sum(map(math.prod, self.kernels.values())) + norms
        return (g["vocabulary_size"] + 1) * g["hidden_dim"] + g["num_layers"] * layer

    @property
    def trainable(self) -> int:
        """Parameters of the adapters: A is like the kernel but ends in rank, B is (rank, the kernel's last axis)."""
        shapes = [self.kernels[name] for name in self.targets]
        return self.geometry["num_layers"] * sum(
            self.rank * (math.prod(s[:-1]) + s[-1]) for s in shapes
        )

    def counted(self) -> tuple[Parts, int]:
        """Estimate a training step's parts, and the peak of generation, in bytes.

        The factors for activations and logits were fitted to what XLA's CPU compiler reserves for 36 random shapes in
        float32 (within 15 %); GPUs differ.
        """
        g, (weight, active) = self.geometry, BYTES[self.dtype]
        layers, tokens = g["num_layers"], self.batch_size * self.sequence_length
        heads, queries = g["num_query_heads"], g["num_query_heads"] * g["head_dim"]
        inner = self.kernels["ffw_linear"][0]
        a_token = (
            4 * g["hidden_dim"] + 4.4 * inner + 3.7 * queries + 2.3 * heads * self.sequence_length
        )
        parts = Parts(
            weights=self.parameters * weight,
            adapters=4 * self.trainable,
            gradients=4 * self.trainable,
            optimizer=8 * self.trainable,  # AdamW's two moments
            activations=int(layers * tokens * a_token * active),
            logits=3
            * 4
            * min(tokens, CHUNK)
            * g["vocabulary_size"],  # with softmax and gradient; in float32
        )
        cache = (
            2
            * layers
            * self.prompts
            * self.sequence_length
            * g["num_key_value_heads"]
            * g["head_dim"]
            * active
        )
        at_once = (
            self.prompts
            * self.sequence_length
            * (2 * inner + 2 * heads * self.sequence_length)
            * active
        )
        return parts, parts.weights + parts.adapters + 2 * cache + at_once

    def compiled(self) -> tuple[Parts, int]:
        """Have the compiler say what it would reserve on this backend; no weight exists at any time."""
        model = None
        optimizer = optimizer_for(recommended(TINY))

        def build():
            nonlocal model
            model = self._build()
            model.sampler = keras_hub.samplers.GreedySampler()
            enable_lora(model, rank=self.rank, targets=self.targets, seed=0)
            return start_state(model, optimizer), frozen_values(model)

        state, frozen = jax.eval_shape(build)

        def array(rows: int, dtype: str):
            return jax.ShapeDtypeStruct((rows, self.sequence_length), dtype)

        rows = self.batch_size
        inputs = {"token_ids": array(rows, "int32"), "padding_mask": array(rows, "int32")}
        batch = (inputs, array(rows, "int32"), array(rows, "float32"))
        training = training_step(model, optimizer).lower(*state, frozen, batch).compile()

        def answer(frozen, adapters, inputs):
            variables = itertools.chain(
                zip(model.non_trainable_variables, frozen, strict=True),
                zip(model.trainable_variables, adapters, strict=True),
            )
            with keras.StatelessScope(state_mapping=variables):
                return model.generate_step(inputs, stop_token_ids=(1,))

        prompts = {
            "token_ids": array(self.prompts, "int32"),
            "padding_mask": array(self.prompts, "bool"),
        }
        generation = jax.jit(answer).lower(frozen, state.adapters, prompts).compile()

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
        return geometry_of_config(
            config.get("config", {}), config.get("class_name", "another format"), name
        )
    presets, handle = keras_hub.models.CausalLM.presets, Source(name).handle
    known = next(
        (p for n, p in presets.items() if n == name or p["kaggle_handle"].endswith(f"//{handle}")),
        None,
    )
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
        raise ValueError(
            f"Budgets are for Gemma 1, 2 and 3. Received: {name!r}, which is of {class_name}"
        )
    vision = config.get("vision_encoder") is not None
    geometry = {
        key: value for key, value in config.items() if key not in ("name", "trainable", "dtype")
    }
    if class_name == "Gemma3Backbone":
        geometry |= {"image_size": None, "vision_encoder": None}
    return geometry, vision


GIB = 2**30
_SAFE = 0.95  # what is estimated to need more of a device than this fits only just
# What programs can use of a device's memory, about, in GiB: the driver keeps the rest.
DEVICES = {"T4": 14.6, "L4": 22.0, "A100 40 GB": 39.4, "A100 80 GB": 79.1}


@dataclass(frozen=True, repr=False)
class MemoryBudget(ShowsAsTable):
    """What a run needs, shown as a table of devices; each part in bytes is an attribute, such as `budget.logits`.

    `parts` and `generation` are for the backend at hand, compiled if `compiled`; `estimate` and
    `estimated_generation` are what was counted, for devices that are not there.
    """

    need: Need
    parts: Parts
    generation: int
    estimate: Parts
    estimated_generation: int
    compiled: bool
    vision: bool  # whether the preset has a vision encoder, which is not budgeted

    def __getattr__(self, name: str) -> int:
        if name in Parts.__dataclass_fields__:
            return getattr(self.parts, name)
        raise AttributeError(
            f"A memory budget has no {name!r}. Its parts: {', '.join(Parts.__dataclass_fields__)}."
        )

    @property
    def parameters(self) -> int:
        """Parameters of the base model."""
        return self.need.parameters

    @property
    def training(self) -> int:
        """Peak of training on the backend at hand, in bytes."""
        return self.parts.total

    def devices(self) -> list[dict]:
        """Rows for this machine and usual GPUs: memory and peaks in GiB, whether both fit, and what would."""
        name, capacity = this_machine()
        here = (self.training, self.generation, "compiled" if self.compiled else "estimate")
        rows = [(f"this machine ({name})", capacity, *here)]
        there = (self.estimate.total, self.estimated_generation, "estimate")
        rows += [(device, size * GIB, *there) for device, size in DEVICES.items()]
        found = []
        for device, size, training, generation, how in rows:
            peak = max(training, generation)
            fits = "yes" if peak <= _SAFE * size else "just" if peak <= size else "no"
            row = {"device": device, "GiB": size, "training": training, "generation": generation}
            row = {
                key: round(value / GIB, 2) if key != "device" else value
                for key, value in row.items()
            }
            room = size / max(
                1.0, training / self.estimate.total
            )  # where the compiler counts more than we do
            nearest = "" if fits != "no" else self.nearest(room, bfloat16=device in DEVICES)
            found.append(row | {"from": how, "fits": fits, "nearest that fits": nearest})
        return found

    def nearest(self, capacity: float, *, bfloat16: bool = True, answering: bool = False) -> str:
        """The least change of settings with which an estimate stays within `capacity` bytes, as arguments.

        Args:
            capacity: Bytes of the device.
            bfloat16: Whether that is a way out. On a CPU it is none: each product is computed in float32.
            answering: Whether only the peak of generation counts, and prompts are what can change.
        """
        need, choices = self.need, []
        for options in itertools.product(
            [(0, need.batch_size)] if answering else _halved(need.batch_size, 1),
            _halved(need.sequence_length, 64),
            enumerate(
                [need.dtype]
                + ["bfloat16"] * (bfloat16 and not answering and need.dtype == "float32")
            ),
            enumerate(
                [need.targets] + [("query", "value")] * (len(need.targets) > 2 and not answering)
            ),
            _halved(need.prompts, 1) if answering else [(0, need.prompts)],
        ):
            names = ("batch_size", "sequence_length", "dtype", "targets", "prompts")
            values = dict(zip(names, (option[1] for option in options), strict=True))
            parts, generation = replace(need, **values).counted()
            if max(parts.total * (not answering), generation) <= _SAFE * capacity:
                choices.append((sum(option[0] for option in options), len(choices), values))
        if not choices:
            return _smaller(need, capacity)
        changed = {
            key: value for key, value in min(choices)[2].items() if value != getattr(need, key)
        }
        return ", ".join(
            f"{key}={list(v) if isinstance(v, tuple) else v!r}" for key, v in changed.items()
        )

    def table(self) -> Table:
        """A row for each device."""
        need = self.need
        layers = (
            "all linear layers" if len(need.targets) == len(ALL_LINEAR) else ", ".join(need.targets)
        )
        text = ", its text part alone" if self.vision else ""
        caption = f"{need.preset}{text}: {need.parameters:,} parameters, {need.dtype}, rank {need.rank} on {layers}, "
        caption += f"{need.batch_size} x {need.sequence_length} tokens; in GiB"
        return Table(self.devices(), caption=caption)


def memory_budget(
    preset,
    *,
    rank: int = 4,
    targets="query_value",
    sequence_length: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    prompts: int = 1,
    compile: bool = True,  # noqa: A002
) -> MemoryBudget:
    """Say what training and answering would need of memory. Nothing is downloaded, and no weight is made.

    >>> memory_budget("gemma_2b_en", compile=False).parameters
    2506172416

    Args:
        preset: What `gl.load` takes, of Gemma 1, 2 or 3; of a multimodal preset the text part is budgeted. Or a model.
        rank, targets: As in `enable_lora`. A model that has adapters has them budgeted instead.
        sequence_length, batch_size, dtype: None means what is recommended for the preset: what `gl.load` and `gl.fit`
            use.
        prompts: How many are answered at once, each with its answer within `sequence_length` tokens.
        compile: Whether to ask the compiler of this backend (some seconds: Gemma 2B takes 10), or only to count.

    Raises:
        ValueError: The preset's shape is not known, or a setting makes no sense.
    """
    settings = recommended(preset if not isinstance(preset, Path) else str(preset))
    if isinstance(preset, keras_hub.models.CausalLM):
        state = state_of(preset)
        name, dtype = state.preset, dtype or preset.backbone.dtype_policy.name
        rank, targets = (state.lora.rank, state.lora.targets) if state.lora else (rank, targets)
        geometry, vision = geometry_of_config(
            preset.backbone.get_config(), type(preset.backbone).__name__, name
        )
    else:
        name = str(preset)
        geometry, vision = geometry_of(name)
    length = settings.sequence_length if sequence_length is None else sequence_length
    need = Need(
        name,
        geometry,
        rank,
        resolve_targets(targets, ALL_LINEAR),
        length,
        max(1, settings.batch_tokens // length) if batch_size is None else batch_size,
        dtype or settings.dtype,
        prompts,
    )
    for what in ("rank", "sequence_length", "batch_size", "prompts"):
        if type(getattr(need, what)) is not int or getattr(need, what) < 1:
            raise ValueError(
                f"{what} is a whole number, 1 or more. Received: {what}={getattr(need, what)!r}"
            )
    if need.dtype not in BYTES:
        raise ValueError(f"dtype is one of {', '.join(BYTES)}. Received: {need.dtype!r}")
    estimate = need.counted()
    return MemoryBudget(
        need, *(need.compiled() if compile else estimate), *estimate, compile, vision
    )


def this_machine() -> tuple[str, int]:
    """The name of the device that JAX uses, and the bytes that this process can have on it."""
    device = jax.devices()[0]
    if stats := device.memory_stats():
        return device.device_kind, stats["bytes_limit"]
    return (
        device.device_kind,
        psutil.virtual_memory().available + psutil.Process().memory_info().rss,
    )


@contextmanager
def explained_out_of_memory(model, *, answering: bool, **settings) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says what fits; `settings` are those of `memory_budget`."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if (
            not isinstance(error, MemoryError)
            and "RESOURCE_EXHAUSTED" not in text
            and "Out of memory" not in text
        ):
            raise
        doing = "answering" if answering else "training"
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        # Without its traceback, whose frames hold the arrays that filled the memory.
        raise MemoryError(
            f"Out of memory while {doing} with {shown}. {_advice(model, answering, settings)}The model is as it was "
            "before this call, and need not be loaded again."
        ) from error.with_traceback(None)


def _advice(model, answering: bool, settings: dict) -> str:
    try:
        budget = memory_budget(model, compile=False, **settings)
    except ValueError:  # no Gemma: no budget
        return ""
    (device, capacity), need = this_machine(), budget.generation if answering else budget.training
    room = min(
        capacity, 0.8 * need
    )  # it did not fit, whatever the estimate says: something else takes memory, too
    nearest = budget.nearest(room, bfloat16=False, answering=answering)
    if answering:
        nearest = nearest.replace("prompts=", "prompts asked at once: ").replace(
            "sequence_length=", "tokens in all: "
        )
    return (
        f"By estimate that needs {need / GIB:.2f} GiB, of which {budget.weights / GIB:.2f} are weights; this device "
        f"({device}) has {capacity / GIB:.2f}. Nearest that should fit: {nearest}. "
    )


def _halved(value: int, least: int) -> list[tuple[int, int]]:
    """(how often halved, what is left), down to `least`."""
    steps = range(max(1, int(math.log2(max(value / least, 1))) + 1))
    return [(step, value >> step) for step in steps]


def _smaller(need: Need, capacity: float) -> str:
    """The largest other preset of which something fits, as arguments."""
    for name in ("gemma2_2b_en", "gemma_2b_en", "gemma3_1b", "gemma3_270m", TINY):
        geometry = geometry_of(name)[0]
        smaller = replace(need, preset=name, geometry=geometry, batch_size=1, prompts=1)
        for dtype, length in itertools.product(("float32", "bfloat16"), (256, 128)):
            candidate = replace(
                smaller, dtype=dtype, sequence_length=min(length, need.sequence_length)
            )
            parts, generation = candidate.counted()
            if candidate.parameters < need.parameters and max(parts.total, generation) <= capacity:
                settings = (
                    f"dtype={dtype!r}, batch_size=1, sequence_length={candidate.sequence_length}"
                )
                return f"another preset: {name!r} with {settings}"
    return "nothing: free memory first"
