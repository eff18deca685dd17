"""What a run will need of memory, known before anything is downloaded, and said again where memory runs out.

For the backend at hand, the training step and the generation loop are compiled for arrays that do not exist, and the
compiler says what it would reserve. For a device that is not there, the same parts are counted.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import keras_hub
import psutil

from gemma_lora.geometry import BYTES, Need, Parts, geometry_of, geometry_of_config
from gemma_lora.lora import ALL_LINEAR, resolve_targets
from gemma_lora.models import TINY, recommended, state_of
from gemma_lora.tables import ShowsAsTable, Table

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
        raise AttributeError(f"A memory budget has no {name!r}. Its parts: {', '.join(Parts.__dataclass_fields__)}.")

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
            row = {key: round(value / GIB, 2) if key != "device" else value for key, value in row.items()}
            room = size / max(1.0, training / self.estimate.total)  # where the compiler counts more than we do
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
            enumerate([need.dtype] + ["bfloat16"] * (bfloat16 and not answering and need.dtype == "float32")),
            enumerate([need.targets] + [("query", "value")] * (len(need.targets) > 2 and not answering)),
            _halved(need.prompts, 1) if answering else [(0, need.prompts)],
        ):
            names = ("batch_size", "sequence_length", "dtype", "targets", "prompts")
            values = dict(zip(names, (option[1] for option in options), strict=True))
            parts, generation = replace(need, **values).counted()
            if max(parts.total * (not answering), generation) <= _SAFE * capacity:
                choices.append((sum(option[0] for option in options), len(choices), values))
        if not choices:
            return _smaller(need, capacity)
        changed = {key: value for key, value in min(choices)[2].items() if value != getattr(need, key)}
        return ", ".join(f"{key}={list(v) if isinstance(v, tuple) else v!r}" for key, v in changed.items())

    def table(self) -> Table:
        """A row for each device."""
        need = self.need
        layers = "all linear layers" if len(need.targets) == len(ALL_LINEAR) else ", ".join(need.targets)
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
        geometry, vision = geometry_of_config(preset.backbone.get_config(), type(preset.backbone).__name__, name)
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
            raise ValueError(f"{what} is a whole number, 1 or more. Received: {what}={getattr(need, what)!r}")
    if need.dtype not in BYTES:
        raise ValueError(f"dtype is one of {', '.join(BYTES)}. Received: {need.dtype!r}")
    estimate = need.counted()
    return MemoryBudget(need, *(need.compiled() if compile else estimate), *estimate, compile, vision)


def this_machine() -> tuple[str, int]:
    """The name of the device that JAX uses, and the bytes that this process can have on it."""
    device = jax.devices()[0]
    if stats := device.memory_stats():
        return device.device_kind, stats["bytes_limit"]
    return device.device_kind, psutil.virtual_memory().available + psutil.Process().memory_info().rss


@contextmanager
def explained_out_of_memory(model, *, answering: bool, **settings) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says what fits; `settings` are those of `memory_budget`."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
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
    room = min(capacity, 0.8 * need)  # it did not fit, whatever the estimate says: something else takes memory, too
    nearest = budget.nearest(room, bfloat16=False, answering=answering)
    if answering:
        nearest = nearest.replace("prompts=", "prompts asked at once: ").replace("sequence_length=", "tokens in all: ")
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
            candidate = replace(smaller, dtype=dtype, sequence_length=min(length, need.sequence_length))
            parts, generation = candidate.counted()
            if candidate.parameters < need.parameters and max(parts.total, generation) <= capacity:
                settings = f"dtype={dtype!r}, batch_size=1, sequence_length={candidate.sequence_length}"
                return f"another preset: {name!r} with {settings}"
    return "nothing: free memory first"
