"""Estimate a run's memory before any download, and again when memory runs out.

For this machine, the programs of training and answering are compiled for arrays that
have a shape but no values, and the compiler says how much it would reserve. For a
device that is not here, the same parts are counted with a formula.

The file goes from a model's shape to what is counted, to what the compiler says, to a
table of devices, and to advice for a run that does not fit. How a program is run is in
`loss`, `training` and `sampling`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import keras
import keras_hub
import psutil

from gemma_lora.access.fetch import Source
from gemma_lora.access.gguf import GGUFFile, is_gguf
from gemma_lora.access.preset import backbone_config
from gemma_lora.lora import ALL_LINEAR, Targets, enable_lora, resolve_targets
from gemma_lora.loss import CHUNK, frozen_values, optimizer_for, start_state, training_step
from gemma_lora.models import TINY, local_place, recommended, state_of
from gemma_lora.options import one_of, whole_number, with_options
from gemma_lora.tables import ShowsAsTable, Table

GIB = 2**30

# Bytes of a weight and of an activation.
BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "mixed_bfloat16": (4, 2),
    "mixed_float16": (4, 2),
}

# About what programs can use of a device's memory, in GiB. The driver keeps the rest.
DEVICES = {"T4": 14.6, "L4": 22.0, "A100 40 GB": 39.4, "A100 80 GB": 79.1}

# A peak above this share of a device's memory fits "just": estimates can be off.
_SAFE = 0.95

# Advice does not go below this many tokens, and names this preset as a smaller one.
_SHORTEST = 64
_SMALL = "gemma3_270m"


# What the architectures share, as arguments of KerasHub's backbones.
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


def _geometry(
    family: dict, layers: int, heads: int, key_value_heads: int, hidden: int, inner: int, head: int
) -> dict:
    return {
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": key_value_heads,
        "hidden_dim": hidden,
        "intermediate_dim": inner,
        "head_dim": head,
        **family,
    }


# The text part of every size. The columns are layers, query heads, key/value heads,
# hidden width, feed-forward width and head width. Gemma 1 and 2 count gate and value
# together in the feed-forward width, Gemma 3 counts one of them. Tests compare each row
# with KerasHub's own count of parameters.
GEOMETRIES = {
    "gemma_2b": _geometry(_GEMMA, 18, 8, 1, 2048, 32768, 256),
    "gemma_7b": _geometry(_GEMMA, 28, 16, 16, 3072, 49152, 256),
    "vault_gemma_1b": _geometry(_GEMMA, 26, 4, 4, 1152, 13824, 256),
    "gemma2_2b": _geometry(_GEMMA2, 26, 8, 4, 2304, 18432, 256),
    "gemma2_9b": _geometry(_GEMMA2, 42, 16, 8, 3584, 28672, 256),
    "gemma2_27b": _geometry(_GEMMA2, 46, 32, 16, 4608, 73728, 128),
    "gemma3_270m": _geometry(_GEMMA3, 18, 4, 1, 640, 2048, 256),
    "gemma3_1b": _geometry(_GEMMA3, 26, 4, 1, 1152, 6912, 256),
    "gemma3_4b": _geometry(_GEMMA3, 34, 8, 4, 2560, 10240, 256),
    "gemma3_12b": _geometry(_GEMMA3, 48, 16, 8, 3840, 15360, 256),
    "gemma3_27b": _geometry(_GEMMA3, 62, 32, 16, 5376, 21504, 128),
}

# Parameters of Gemma 3's vision encoder, which a preset may have beside its text part.
_VISION = range(410_000_000, 430_000_000)


def _is_gemma3(geometry: dict) -> bool:
    return "image_size" in geometry


def kernel_shapes(geometry: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one decoder block's linear kernels, by name.

    >>> kernel_shapes(GEOMETRIES["gemma_2b"])["query"]
    (8, 2048, 256)
    """
    hidden = geometry["hidden_dim"]
    head = geometry["head_dim"]
    heads = geometry["num_query_heads"]
    key_value_heads = geometry["num_key_value_heads"]
    inner = geometry["intermediate_dim"]
    if not _is_gemma3(geometry):
        inner //= 2
    return {
        "query": (heads, hidden, head),
        "key": (key_value_heads, hidden, head),
        "value": (key_value_heads, hidden, head),
        "attention_output": (heads, head, hidden),
        "ffw_gating": (hidden, inner),
        "ffw_gating_2": (hidden, inner),
        "ffw_linear": (inner, hidden),
    }


def count_parameters(geometry: dict) -> int:
    """Count a base model's parameters: embedding, kernels and norms.

    >>> count_parameters(GEOMETRIES["gemma_2b"])
    2506172416
    """
    hidden = geometry["hidden_dim"]
    kernels = sum(math.prod(shape) for shape in kernel_shapes(geometry).values())
    # Two norms before attention and feed-forward part, and up to two after them.
    norms = 2 * hidden
    if geometry.get("use_post_ffw_norm", False):
        norms += hidden
    if geometry.get("use_post_attention_norm", False):
        norms += hidden
    if _is_gemma3(geometry) and geometry.get("use_query_key_norm", True):
        norms += 2 * geometry["head_dim"]
    embedding = geometry["vocabulary_size"] * hidden
    last_norm = hidden
    return embedding + geometry["num_layers"] * (kernels + norms) + last_norm


def geometry_of(preset: str) -> tuple[dict, bool]:
    """Return the shape of a preset's text part, and whether it has a vision part.

    Raises:
        ValueError: The preset is not a Gemma, or its shape is not known without a
            download.
    """
    place = local_place(preset)
    if place and is_gguf(place):
        class_name, config = GGUFFile(place).config()
        return geometry_of_config(config, class_name, preset), False
    if place:
        class_name, config, with_pictures = backbone_config(place)
        return geometry_of_config(config, class_name, preset), with_pictures

    # KerasHub lists its presets with their parameters, which no two shapes share.
    parameters = _listed_parameters(preset)
    for geometry in GEOMETRIES.values():
        text = count_parameters(geometry)
        if parameters == text:
            return geometry, False
        if parameters - text in _VISION:
            return geometry, True
    raise ValueError(
        f"The shape of {preset!r} is not known without downloading it. Known are KerasHub's "
        "presets of Gemma 1, 2 and 3, by name or kaggle:// handle, folders, and loaded models."
    )


def _listed_parameters(preset: str) -> int:
    """Return the parameters that KerasHub lists for a preset; 0 if it lists none."""
    handle = Source(preset).handle
    for name, entry in keras_hub.models.CausalLM.presets.items():
        if name == preset or entry["kaggle_handle"].endswith(f"//{handle}"):
            return entry["metadata"].get("params", 0)
    return 0


def geometry_of_config(config: dict, class_name: str, name: str) -> dict:
    """Return the shape of a text part, from the configuration of a KerasHub backbone.

    Raises:
        ValueError: `class_name` is not that of a Gemma backbone.
    """
    if class_name not in ("GemmaBackbone", "Gemma3Backbone"):
        raise ValueError(
            f"Budgets are for Gemma 1, 2 and 3. Received: {name!r}, which is of {class_name}"
        )
    geometry = {
        key: value for key, value in config.items() if key not in ("name", "trainable", "dtype")
    }
    if class_name == "Gemma3Backbone":
        geometry |= {"image_size": None, "vision_encoder": None}
    return geometry


@dataclass(frozen=True)
class Parts:
    """Bytes of a training step.

    Attributes:
        weights, adapters, gradients, optimizer: What is held all the time.
        activations, logits: What a step adds at its peak.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: all parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Need:
    """A model, and what it is to be used for.

    Attributes:
        preset: The name that is shown.
        geometry: Arguments of KerasHub's backbone, as in `GEOMETRIES`.
        rank, targets: Those of the adapters.
        sequence_length: Tokens of a row in training, of prompt and answer together in
            answering.
        batch_size: Rows of a training step.
        dtype: One of `BYTES`.
        prompts: How many are answered at once.
    """

    preset: str
    geometry: dict
    rank: int
    targets: tuple[str, ...]
    sequence_length: int
    batch_size: int
    dtype: str
    prompts: int

    @property
    def parameters(self) -> int:
        """Parameters of the base model."""
        return count_parameters(self.geometry)

    @property
    def trainable(self) -> int:
        """Parameters of the adapters.

        A is like the kernel but ends in rank; B is (rank, the kernel's last axis).
        """
        shapes = kernel_shapes(self.geometry)
        a_layer = 0
        for name in self.targets:
            *others, last = shapes[name]
            a_layer += self.rank * (math.prod(others) + last)
        return self.geometry["num_layers"] * a_layer

    def count_training(self) -> Parts:
        """Estimate the parts of a training step.

        The factors for activations and logits were fitted to what XLA's CPU compiler
        reserves for 36 random shapes in float32 (within 15 %). GPUs differ.
        """
        weight, activation = BYTES[self.dtype]
        geometry = self.geometry
        heads = geometry["num_query_heads"]
        inner, hidden = kernel_shapes(geometry)["ffw_linear"]
        tokens = self.batch_size * self.sequence_length
        # Values that a layer keeps of each token for the way back: of its width, of the
        # feed-forward part, of the queries, and of the attention scores, one for each
        # other token of the row.
        a_token = (
            4 * hidden
            + 4.4 * inner
            + 3.7 * heads * geometry["head_dim"]
            + 2.3 * heads * self.sequence_length
        )
        return Parts(
            weights=self.parameters * weight,
            adapters=4 * self.trainable,
            gradients=4 * self.trainable,
            # AdamW's two moments.
            optimizer=8 * self.trainable,
            activations=int(geometry["num_layers"] * tokens * a_token * activation),
            # A chunk of them in float32, with their softmax and gradient.
            logits=3 * 4 * min(tokens, CHUNK) * geometry["vocabulary_size"],
        )

    def count_answering(self) -> int:
        """Estimate the peak of answering, in bytes."""
        weight, activation = BYTES[self.dtype]
        geometry = self.geometry
        heads = geometry["num_query_heads"]
        inner, _ = kernel_shapes(geometry)["ffw_linear"]
        tokens = self.prompts * self.sequence_length
        # Keys and values of each layer, which are copied once.
        a_layer = geometry["num_key_value_heads"] * geometry["head_dim"]
        cache = 2 * geometry["num_layers"] * tokens * a_layer * activation
        # What one layer holds while the prompts are read.
        at_once = tokens * (2 * inner + 2 * heads * self.sequence_length) * activation
        return self.parameters * weight + 4 * self.trainable + 2 * cache + at_once

    def counted(self) -> tuple[Parts, int]:
        """Return `count_training` and `count_answering`."""
        return self.count_training(), self.count_answering()

    def compiled(self) -> tuple[Parts, int]:
        """Let the compiler say what it would reserve on this backend.

        Returns:
            The parts of a training step, and the peak of answering, in bytes. The
            compiler says only the peak of a step; what is not counted for other parts
            is put down to activations.
        """
        training, answering = compile_peaks(self)
        counted = self.count_training()
        rest = training - replace(counted, activations=0).total
        if rest >= 0:
            return replace(counted, activations=rest), answering
        # Small logits take less than counted.
        return replace(counted, activations=0, logits=counted.logits + rest), answering

    def build(self) -> keras_hub.models.CausalLM:
        """Build a model of this shape. Within `jax.eval_shape` it takes no memory."""
        models = keras_hub.models
        if _is_gemma3(self.geometry):
            backbone = models.Gemma3Backbone(**self.geometry, dtype=self.dtype)
            return models.Gemma3CausalLM(backbone=backbone, preprocessor=None)
        backbone = models.GemmaBackbone(**self.geometry, dtype=self.dtype)
        return models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def compile_peaks(need: Need) -> tuple[int, int]:
    """Compile training and answering, and return the peak of each, in bytes.

    The step is the one that `gl.fit` runs. All arrays are abstract: they have a shape
    and a dtype, but no values. So no weight exists at any time.
    """
    optimizer = optimizer_for(recommended(TINY))
    built = []

    def build():
        model = need.build()
        enable_lora(model, rank=need.rank, targets=need.targets, seed=0)
        built.append(model)
        return start_state(model, optimizer), frozen_values(model)

    state, frozen = jax.eval_shape(build)
    model = built[0]

    def array(rows: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, need.sequence_length), dtype)

    rows = need.batch_size
    inputs = {"token_ids": array(rows, "int32"), "padding_mask": array(rows, "int32")}
    batch = (inputs, array(rows, "int32"), array(rows, "float32"))
    training = training_step(model, optimizer).lower(*state, frozen, batch).compile()

    def answer(frozen, adapters, prompts):
        values = [
            *zip(model.non_trainable_variables, frozen, strict=True),
            *zip(model.trainable_variables, adapters, strict=True),
        ]
        with keras.StatelessScope(state_mapping=values):
            return model.generate_step(prompts, stop_token_ids=(1,))

    model.sampler = keras_hub.samplers.GreedySampler()
    prompts = {
        "token_ids": array(need.prompts, "int32"),
        "padding_mask": array(need.prompts, "bool"),
    }
    answering = jax.jit(answer).lower(frozen, state.adapters, prompts).compile()
    return _peak(training), _peak(answering)


def _peak(program: jax.stages.Compiled) -> int:
    """Return what a program holds at its peak, by the compiler's account, in bytes."""
    # private: the fields of `memory_analysis`, which JAX does not document
    sizes = program.memory_analysis()
    # An output that takes the place of an input is counted once.
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


@dataclass(frozen=True, repr=False)
class MemoryBudget(ShowsAsTable):
    """What a run needs. Shows as a table of devices.

    Each part of training is also an attribute, in bytes: `budget.logits`.

    Attributes:
        need: The model and the settings.
        parts: Bytes of a training step on this backend.
        generation: Peak of answering on this backend, in bytes.
        compiled: Whether the compiler said so; otherwise both were counted.
        vision: Whether the preset has a vision encoder, which is not budgeted.
    """

    need: Need
    parts: Parts
    generation: int
    compiled: bool
    vision: bool

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
        """Peak of training on this backend, in bytes."""
        return self.parts.total

    @property
    def estimate(self) -> Parts:
        """Bytes of a training step as counted, for devices that are not here."""
        return self.need.count_training()

    @property
    def estimated_generation(self) -> int:
        """Peak of answering as counted, in bytes, for devices that are not here."""
        return self.need.count_answering()

    def devices(self) -> list[dict]:
        """Return a row for this machine and for each of `DEVICES`.

        Memory and peaks are in GiB. "fits" says "yes", "just" or "no", for training and
        answering together, and "nearest that fits" names settings instead of a "no".
        """
        name, capacity = this_machine()
        rows = [self._row(f"this machine ({name})", capacity, here=True)]
        rows += [self._row(device, size * GIB, here=False) for device, size in DEVICES.items()]
        return rows

    def _row(self, device: str, capacity: float, *, here: bool) -> dict:
        if here:
            training = self.training
            generation = self.generation
            source = "compiled" if self.compiled else "estimate"
            bfloat16 = _bfloat16_saves_memory()
        else:
            training = self.estimate.total
            generation = self.estimated_generation
            source = "estimate"
            bfloat16 = True
        peak = max(training, generation)
        nearest = ""
        if peak <= _SAFE * capacity:
            fits = "yes"
        elif peak <= capacity:
            fits = "just"
        else:
            fits = "no"
            # Advice is by count. If the compiler says more, that leaves less room.
            more = max(1.0, training / self.estimate.total, generation / self.estimated_generation)
            nearest = self.in_words(self.nearest(capacity / more, bfloat16=bfloat16))
        return {
            "device": device,
            "GiB": round(capacity / GIB, 2),
            "training": round(training / GIB, 2),
            "generation": round(generation / GIB, 2),
            "from": source,
            "fits": fits,
            "nearest that fits": nearest,
        }

    def nearest(
        self, capacity: float, *, bfloat16: bool = True, answering: bool = False
    ) -> dict | None:
        """Return the settings to change so that the estimate stays within `capacity`.

        The batch is halved first, and the prompts that are answered at once; then the
        sequence length, down to 64. Only if that is not enough, the same is tried in
        bfloat16.

        >>> memory_budget("gemma_2b_en", batch_size=8, compile=False).nearest(16 * GIB)
        {'batch_size': 2}
        >>> memory_budget("gemma_2b_en", compile=False).nearest(8 * GIB)
        {'dtype': 'bfloat16'}

        Args:
            capacity: Bytes of the device.
            bfloat16: Whether bfloat16 is a way out, see `_bfloat16_saves_memory`.
            answering: If true, only answering has to fit.

        Returns:
            The settings that differ, as arguments of `memory_budget`. None if nothing
            fits.
        """
        room = _SAFE * capacity
        dtypes = [self.need.dtype]
        if bfloat16 and self.need.dtype == "float32":
            dtypes.append("bfloat16")
        for dtype in dtypes:
            need = replace(self.need, dtype=dtype)
            while True:
                trains = answering or need.count_training().total <= room
                answers = need.count_answering() <= room
                if trains and answers:
                    old = vars(self.need)
                    return {name: new for name, new in vars(need).items() if new != old[name]}
                if not trains and need.batch_size > 1:
                    need = replace(need, batch_size=need.batch_size // 2)
                elif not answers and need.prompts > 1:
                    need = replace(need, prompts=need.prompts // 2)
                elif need.sequence_length > _SHORTEST:
                    shorter = max(_SHORTEST, need.sequence_length // 2)
                    need = replace(need, sequence_length=shorter)
                else:
                    break
        return None

    def in_words(self, changes: dict | None) -> str:
        """Return what `nearest` returned as text: "batch_size=1, dtype='bfloat16'"."""
        if changes is not None:
            return ", ".join(f"{name}={value!r}" for name, value in changes.items())
        if self.parameters > count_parameters(GEOMETRIES[_SMALL]):
            return f"no setting of this preset; a smaller preset is {_SMALL}"
        return "no setting of this preset; free memory first"

    def table(self) -> Table:
        """Return a row for each device."""
        need = self.need
        layers = ", ".join(need.targets)
        if len(need.targets) == len(ALL_LINEAR):
            layers = "all linear layers"
        text = ", its text part alone" if self.vision else ""
        caption = (
            f"{need.preset}{text}: {need.parameters:,} parameters, {need.dtype}, "
            f"rank {need.rank} on {layers}, "
            f"{need.batch_size} x {need.sequence_length} tokens; in GiB"
        )
        return Table(self.devices(), caption=caption)


@with_options
def memory_budget(
    preset: str | Path | keras_hub.models.CausalLM,
    *,
    rank: int = 4,
    targets: Targets = "query_value",
    sequence_length: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    prompts: int = 1,
    compile: bool = True,  # noqa: A002
) -> MemoryBudget:
    """Estimate the memory of training and answering, without a download or a weight.

    >>> memory_budget("gemma_2b_en", compile=False).parameters
    2506172416

    Args:
        preset: What `gl.load` takes, of Gemma 1, 2 or 3, or a model. Of a multimodal
            preset the text part is budgeted.
        rank, targets: As in `enable_lora`. A model's own adapters take precedence.
        sequence_length, batch_size, dtype: None means what is recommended for the
            preset, as in `gl.load` and `gl.fit`.
        prompts: How many are answered at once, each with its answer within
            `sequence_length` tokens.
        compile: Whether to ask the compiler of this backend, or only to count. It takes
            some seconds, 10 for Gemma 2B.

    Raises:
        ValueError: The preset's shape is not known, or a setting is invalid.
    """
    if isinstance(preset, keras_hub.models.CausalLM):
        settings = recommended(preset)
        state = state_of(preset)
        name = state.preset
        config = preset.backbone.get_config()
        geometry = geometry_of_config(config, type(preset.backbone).__name__, name)
        vision = config.get("vision_encoder") is not None
        dtype = dtype or preset.backbone.dtype_policy.name
        if state.lora:
            rank = state.lora.rank
            targets = state.lora.targets
    else:
        name = str(preset)
        settings = recommended(name)
        geometry, vision = geometry_of(name)
    if sequence_length is None:
        sequence_length = settings.sequence_length
    sizes = {"rank": rank, "sequence_length": sequence_length, "prompts": prompts}
    if batch_size is not None:
        sizes["batch_size"] = batch_size
    sizes = {size: whole_number(size, value) for size, value in sizes.items()}
    sizes.setdefault("batch_size", max(1, settings.batch_tokens // sequence_length))
    dtype = settings.dtype if dtype is None else dtype
    one_of("dtype", dtype, (*BYTES,))
    targets = resolve_targets(targets, ALL_LINEAR)
    need = Need(name, geometry, targets=targets, dtype=dtype, **sizes)
    parts, generation = need.compiled() if compile else need.counted()
    return MemoryBudget(need, parts, generation, compiled=compile, vision=vision)


def this_machine() -> tuple[str, int]:
    """Return the device that JAX uses, and how many bytes this process can have."""
    device = jax.devices()[0]
    # private: `memory_stats` of JAX's devices, and its keys. It is None on a CPU.
    if stats := device.memory_stats():
        return device.device_kind, stats["bytes_limit"]
    free = psutil.virtual_memory().available
    return device.device_kind, free + psutil.Process().memory_info().rss


def _bfloat16_saves_memory() -> bool:
    """Return whether bfloat16 is a way out here. A CPU computes it in float32."""
    return jax.default_backend() != "cpu"


@contextmanager
def explained_out_of_memory(model, *, answering: bool, **settings) -> Iterator[None]:
    """Within this context, running out of memory raises an error that says what fits.

    Args:
        model: The model at work.
        answering: Whether it answers. If not, it trains.
        settings: The settings in use, as arguments of `memory_budget`.

    Raises:
        MemoryError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        # JAX has no class of its own for this, only these words.
        text = str(error)
        said = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
        if not said and not isinstance(error, MemoryError):
            raise
        doing = "answering" if answering else "training"
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        # Without its traceback, whose frames hold the arrays that filled the memory.
        raise MemoryError(
            f"Out of memory while {doing} with {shown}. {_advice(model, answering, settings)}"
            "The model is as it was before this call, and need not be loaded again."
        ) from error.with_traceback(None)


def _advice(model, answering: bool, settings: dict) -> str:
    """Return what the settings need, what the device has, and what should fit."""
    try:
        budget = memory_budget(model, compile=False, **settings)
    except ValueError:
        # Only a Gemma has a budget.
        return ""
    device, capacity = this_machine()
    peak = budget.generation if answering else budget.training
    # It did not fit, whatever the estimate says: other programs also take memory.
    room = min(capacity, 0.8 * peak)
    changes = budget.nearest(room, bfloat16=_bfloat16_saves_memory(), answering=answering)
    nearest = budget.in_words(changes)
    if answering:
        # `generate` has no arguments of these names.
        nearest = nearest.replace("prompts=", "prompts asked at once: ")
        nearest = nearest.replace("sequence_length=", "tokens in all: ")
    return (
        f"By estimate that needs {peak / GIB:.2f} GiB, of which {budget.weights / GIB:.2f} are "
        f"weights; this device ({device}) has {capacity / GIB:.2f}. "
        f"Nearest that should fit: {nearest}. "
    )
