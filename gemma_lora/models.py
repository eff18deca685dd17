"""Load a Gemma by name, and know what is recommended for it."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import keras_hub

from gemma_lora.access.fetch import fetch
from gemma_lora.runtime import quiet, return_memory
from gemma_lora.templates import Template

TINY = "tiny_gemma_en"
TINY_VOCABULARY = 2048  # no published Gemma has so few tokens
TINY_FOLDER = Path(__file__).parent / "tiny" / TINY


@dataclass(frozen=True)
class Settings:
    """What the helpers use where nothing else is asked for. The defaults are the published recipe's."""

    template: str = "recipe"
    learning_rate: float = 5e-5
    wide_learning_rate: float | None = (
        None  # where more than two kinds of layers have adapters, if it differs
    )
    weight_decay: float = 0.01
    batch_tokens: int = 256  # of a step, padding included
    sequence_length: int = 256
    max_new_tokens: int = 256
    dtype: str = "float32"
    exact_answers: bool = False  # whether answers can be right word for word


# Settings by model. The small model's were chosen on a fifth of its tuning subjects, not on the held-out ones.
_SMALL = Settings(
    learning_rate=5e-3,
    wide_learning_rate=2e-3,
    batch_tokens=224,
    max_new_tokens=64,
    exact_answers=True,
)
_SETTINGS = {TINY: _SMALL}


@dataclass
class Merge:
    """What was merged: the summary of its adapters, its run, and the kernels from before, by layer, if kept."""

    lora: Any
    run: dict | None
    kernels: list[tuple] | None


@dataclass
class State:
    """What the library remembers of a model, as its attribute `gemma_lora`."""

    preset: str
    settings: Settings
    local: bool = False  # whether the preset was a folder of this machine
    lora: Any = None  # the summary of enable_lora
    run: dict | None = None  # the record of the last training run
    trainable: list | None = (
        None  # layers and weights, and whether they trained before the adapters came
    )
    merges: list = field(default_factory=list)  # the last `Merge` into the kernels, if any
    tokenizer: Any = None
    steps: dict = field(default_factory=dict)  # compiled, see `loss`
    samplers: dict = field(default_factory=dict)


def recommended(model) -> Settings:
    """The settings for a model, or for a preset's name: one table for all helpers.

    >>> recommended("tiny_gemma_en").learning_rate, recommended("gemma_2b_en").learning_rate
    (0.005, 5e-05)
    >>> recommended("gemma_instruct_2b_en").template
    'turns'
    """
    if not isinstance(model, str):
        state = state_of(model)
        wide = state.lora and len(state.lora.targets) > 2 and state.settings.wide_learning_rate
        return replace(state.settings, learning_rate=wide) if wide else state.settings
    settings = _SETTINGS.get(Path(model).name, Settings())
    return (
        replace(settings, template="turns")
        if re.search(r"instruct|[-_]it([-_/]|$)", model)
        else settings
    )


def state_of(model) -> State:
    """What the library remembers of a model; made anew for a model that it did not load itself."""
    if not isinstance(model, keras_hub.models.CausalLM):
        raise TypeError(
            f"The model is a keras_hub causal language model, as gl.load() returns it. Received: {type(model).__name__}"
        )
    if not hasattr(model, "gemma_lora"):
        model.gemma_lora = State(preset=model.name, settings=recommended(model.name))
    return model.gemma_lora


def template_of(model) -> str | Template:
    """The template of the model's training run, or the one recommended for it."""
    state = state_of(model)
    return state.run["template"] if state.run else state.settings.template


def load(preset: str | Path = TINY, *, dtype: str | None = None) -> keras_hub.models.CausalLM:
    """Load a model and its tokenizer.

    Args:
        preset: "tiny_gemma_en", the small teaching model that is part of this package; the name of a KerasHub preset
            such as "gemma_2b_en" or "gemma2_2b_en"; a handle such as "kaggle://..." or "hf://..."; or a folder that
            holds a saved preset.
        dtype: "float32", "bfloat16" or another Keras dtype policy. None takes what `recommended` says.

    Raises:
        ValueError: There is no preset or folder of that name.
        RuntimeError: The preset could not be fetched. The text says why (no credentials, no consent to the licence, no
            such model, a server's fault, no network, a full disk) and what to do; `reason` says it in one word.
    """
    name = str(preset)
    settings = recommended(name)
    model = from_preset(
        keras_hub.models.CausalLM, name, dtype=keras.dtype_policies.get(dtype or settings.dtype)
    )
    model.gemma_lora = State(preset=name, settings=settings, local=local_folder(preset) is not None)
    for block in (
        model.backbone.transformer_layers
    ):  # what KerasHub forgets: Gemma 2 and 3 27B divide by another root
        block.attention.query_head_dim_normalize = getattr(block, "query_head_dim_normalize", True)
    return_memory()  # loading needs some weights twice for a while
    return model


def from_preset(kind: type, preset: str | Path, **options):
    """Make a KerasHub object of a kind, such as `CausalLM`, from what `load` takes as `preset`; errors as there."""
    folder = local_folder(preset)
    if folder is None:
        return fetch(str(preset), lambda source: kind.from_preset(source, **options))
    with quiet():
        return kind.from_preset(str(folder), **options)


def local_folder(preset: str | Path) -> Path | None:
    """The folder that `preset` is; None if it is to be fetched; a ValueError if it is neither."""
    name = str(preset)
    folder = TINY_FOLDER if name == TINY else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"The folder {folder} holds no preset: it has no config.json. Was it saved completely?"
            )
        return folder
    known = keras_hub.models.CausalLM.presets
    if name not in known and "/" not in name:
        gemmas = ", ".join(
            sorted(known_name for known_name in known if known_name.startswith("gemma"))
        )
        raise ValueError(
            f"No preset or folder is named {name!r}. There are: {TINY}, {gemmas}; see keras.io/keras_hub."
        )
    return None
