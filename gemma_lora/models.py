"""Load a Gemma by name, and know what is recommended for it.

Here is everything that depends on *which* model it is: where its files are, its
recommended settings, and what the library remembers of a model that is loaded. Beside a
saved model stands a note, `gemma_lora.json`, with the template that it was tuned with.
Downloads are in `access.fetch`; adapters are in `lora`.
"""

import difflib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import keras
import keras_hub

from gemma_lora.access.fetch import fetch
from gemma_lora.access.gguf import GGUFFile, is_gguf
from gemma_lora.access.preset import load_preset, read_config
from gemma_lora.options import with_options
from gemma_lora.runtime import quiet, quiet_warnings, return_memory
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import Template, get_template, named

P = ParamSpec("P")
R = TypeVar("R")

TINY = "tiny_gemma_en"
# Tokens in the small model's vocabulary. No published Gemma has so few.
TINY_VOCABULARY = 2048
TINY_FOLDER = Path(__file__).parent / "tiny" / TINY


@dataclass(frozen=True)
class Settings:
    """What the helpers use where you ask for nothing else.

    The defaults are the published recipe's.

    Attributes:
        template: The template for prompts: its name, or a `Template` of your own that a
            saved model was tuned with.
        learning_rate: Of AdamW.
        wide_learning_rate: The same where more than two kinds of layers have adapters.
            None means that it does not differ.
        weight_decay: Of AdamW.
        batch_tokens: Tokens of a training step, padding included.
        sequence_length: Most input tokens of a record.
        max_new_tokens: Most tokens of an answer.
        dtype: Keras dtype policy of the weights.
        exact_answers: Whether answers can be right word for word.
    """

    template: str | Template = "recipe"
    learning_rate: float = 5e-5
    wide_learning_rate: float | None = None
    weight_decay: float = 0.01
    batch_tokens: int = 256
    sequence_length: int = 256
    max_new_tokens: int = 256
    dtype: str = "float32"
    exact_answers: bool = False


# The settings that differ from the recipe's, by the last part of a preset's name. Those
# of the small model were chosen on a fifth of its tuning subjects, not on the held-out
# ones.
_SETTINGS = {
    TINY: Settings(
        learning_rate=5e-3,
        wide_learning_rate=2e-3,
        batch_tokens=224,
        max_new_tokens=64,
        exact_answers=True,
    ),
    "gemma3_270m": Settings(learning_rate=5e-4, wide_learning_rate=2e-4),
}

# The file beside a saved model or adapter that says what its own format has no place
# for.
NOTE = "gemma_lora.json"

# In a chat template of ours, the same stands behind this word, as a comment.
NOTE_IN_JINJA = "gemma_lora: "

# Folders and files may have any name. Of these we know the model by its shape: layers
# and hidden width.
_SHAPES = {(18, 640): "gemma3_270m"}


@dataclass
class Merge:
    """What `merge` put into the kernels of a model, so that it can be taken out again.

    Attributes:
        lora: The summary of the adapters that were merged.
        run: The record of their training run, or None.
        kernels: The kernels from before, by layer; None if they were not kept.
    """

    lora: Any
    run: dict | None
    kernels: list[tuple] | None


class Run(ShowsAsTable, dict):
    """The record of a training run: a dict, which shows as a table.

    >>> Run(rows=1286, epochs=1, seed=0)
    what    value
    rows    1,286
    epochs      1
    seed        0
    """

    def table(self) -> Table:
        """Return a row for each entry, without the lists of losses."""
        shown = []
        for name, value in self.items():
            if isinstance(value, Template):
                value = value.name
            if name == "held_out_loss":
                value = ", ".join(f"{which} {loss:.4f}" for which, loss in value.items())
            if not isinstance(value, dict):
                shown.append({"what": name.replace("_", " "), "value": value})
        return Table(shown)


@dataclass(repr=False)
class State:
    """What the library remembers of a model, as its attribute `gemma_lora`.

    Attributes:
        preset: The name or folder that the model was loaded from.
        settings: What is recommended for it; `recommended` reads them from here.
        local: Whether the preset was a folder of this machine.
        noted: The template that it was saved with, or None.
        lora: The summary that `enable_lora` returned; None without adapters.
        run: The record of the last training run, a `Run`: template, rows, settings,
            seed, losses, and what was really done. `generate`, `compare` and
            `save_adapter` read it. None before any run.
        trainable: Layers and weights, and whether each trained before the adapters
            came, so that `remove_adapter` can restore it. None without adapters.
        merged: The last `Merge` into the kernels, or None.
        tokenizer: The model's `tokens.Tokenizer`, once somebody needed it.
        steps: What `fit` and `evaluate` compiled, so that a second call need not.
        samplers: What `generate` and `stream` compiled, for the same reason.
        lock: Held by whatever computes with the model: see `one_at_a_time`.
    """

    preset: str
    settings: Settings
    local: bool = False
    noted: str | Template | None = None
    lora: Any = None
    run: Run | None = None
    trainable: list | None = None
    merged: Merge | None = None
    tokenizer: Any = None
    steps: dict = field(default_factory=dict)
    samplers: dict = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock, compare=False)

    def __repr__(self) -> str:
        """Say in a few lines what the model is and what was done to it."""
        template = self.run["template"] if self.run else self.settings.template
        said = [f"{self.preset}, asked with the template {get_template(template).name!r}"]
        if self.lora:
            targets = ", ".join(self.lora.targets)
            said.append(f"adapters of rank {self.lora.rank} on {targets} (.lora has more)")
        if self.run:
            said.append(
                f"trained on {self.run['rows']:,} records for {epochs_in_words(self.run)} "
                "(.run has more)"
            )
        if self.merged:
            said.append("an adapter is merged into its kernels")
        return "\n".join(said)


def epochs_in_words(run: Mapping) -> str:
    """Return how long a run was, and the adapters' runs before it.

    >>> epochs_in_words({"epochs": 1, "earlier_epochs": 2})
    '1 epoch, after 2 epochs before'
    """
    earlier = run.get("earlier_epochs")
    before = f", after {counted_epochs(earlier)} before" if earlier else ""
    return counted_epochs(run["epochs"]) + before


def counted_epochs(count: float) -> str:
    """Return "1 epoch", "2 epochs" or "0.25 epochs"."""
    return f"{count:g} epoch{'' if count == 1 else 's'}"


@with_options
def load(preset: str | Path = TINY, *, dtype: str | None = None) -> keras_hub.models.CausalLM:
    """Load a model and its tokenizer.

    Args:
        preset: "tiny_gemma_en", the small teaching model that is part of this package;
            the name of a KerasHub preset such as "gemma_2b_en" or "gemma2_2b_en"; a
            handle such as "kaggle://..." or "hf://..."; a folder that holds a saved
            preset; or a GGUF file of Gemma 1, 2 or 3, whose weights are widened to the
            dtype.
        dtype: "float32", "bfloat16" or another Keras dtype policy. None takes the one
            that `recommended` names: what you have set in Keras for all models, or
            float32.

    Returns:
        A KerasHub model. Its attribute `gemma_lora` is what this library remembers of
        it.

    Raises:
        ImportError: A GGUF file needs the package `gguf`.
        ValueError: No preset, folder or file has that name, or the file is damaged or
            holds another model.
        RuntimeError: The preset could not be downloaded. The text says why (no
            credentials, no consent to the licence, no such model, a server's fault, no
            network, a full disk) and what to do; `reason` says it in one word.
    """
    name = str(preset)
    place = local_place(preset)
    looks = _look_at(name)
    settings = _settings_for(name, looks)
    options = {"dtype": _policy(settings.dtype if dtype is None else dtype)}
    if place is not None and _is_quantized(place):
        if dtype is not None:
            raise ValueError(
                f"{preset} is quantized: each of its layers has a dtype of its own. Leave dtype "
                "out, or load the preset that it was made from."
            )
        options = {}
    model = from_preset(keras_hub.models.CausalLM, name, place, **options)
    model.gemma_lora = State(
        preset=name, settings=settings, local=place is not None, noted=looks.template
    )
    _save_with_note(model)
    _restore_query_scale(model)
    # Loading holds some weights twice for a while.
    return_memory()
    return model


def _policy(dtype) -> keras.DTypePolicy:
    """Return the dtype policy of Keras that a name means. Raises ValueError."""
    try:
        policy = keras.dtype_policies.get(dtype)
    except (NotImplementedError, TypeError, ValueError):
        raise ValueError(
            'dtype is a Keras dtype policy, such as "float32", "bfloat16" or "mixed_bfloat16". '
            f"Received: dtype={dtype!r:.80}"
        ) from None
    if policy.quantization_mode:
        raise ValueError(
            "A model is loaded first, and quantized then: model.backbone.quantize('int8'). "
            f"Received: dtype={policy.name!r}"
        )
    return policy


def _is_quantized(place: Path) -> bool:
    """Return whether a folder holds a KerasHub preset that was quantized."""
    config = place / "config.json"
    # private: how Keras writes the policies of a quantized model
    kinds = re.findall(r'"(\w*DTypePolicy)"', config.read_text("utf-8")) if config.is_file() else []
    return any(kind not in ("DTypePolicy", "FloatDTypePolicy") for kind in kinds)


def _chosen_in_keras() -> str | None:
    """Return the dtype policy that the user has set for all models, or None.

    That is `keras.config.set_dtype_policy`, `set_floatx` or Keras's file of settings.
    """
    # Keras's policy may be older than its floatx, and does not follow it then.
    for name in (keras.config.dtype_policy().name, keras.config.floatx()):
        if name != "float32":
            return name
    return None


def recommended(model: keras_hub.models.CausalLM | str) -> Settings:
    """Return the settings for a model or a preset's name: one table for all helpers.

    >>> recommended("tiny_gemma_en").learning_rate
    0.005
    >>> recommended("gemma_2b_en").learning_rate
    5e-05
    >>> recommended("gemma_instruct_2b_en").template
    'turns'
    """
    if isinstance(model, str):
        return _settings_for(model, _look_at(model))
    state = state_of(model)
    wide_rate = state.settings.wide_learning_rate
    if wide_rate and state.lora and len(state.lora.targets) > 2:
        return replace(state.settings, learning_rate=wide_rate)
    return state.settings


def _settings_for(preset: str, looks: "_Looks") -> Settings:
    """Return the settings for a preset's name, and what its files say."""
    is_tuned = looks.is_tuned
    if is_tuned is None:
        # Instruction-tuned presets: "gemma_instruct_2b_en", "gemma-2b-it", ...
        is_tuned = re.search(r"instruct|[-_]it([-_/.]|$)", preset)
    settings = _SETTINGS.get(_SHAPES.get(looks.shape, Path(preset).name), Settings())
    if is_tuned:
        settings = Settings(template="turns")
    template = looks.template or settings.template
    return replace(settings, template=template, dtype=_chosen_in_keras() or settings.dtype)


class _Looks(NamedTuple):
    """What the files of a preset say, where its name may not.

    Attributes:
        shape: Layers and hidden width, or None.
        is_tuned: Whether it is instruction-tuned; None where only its name may say so.
        template: What it was tuned with, by name if it is one of `TEMPLATES`; or None.
    """

    shape: tuple[int, int] | None = None
    is_tuned: bool | None = None
    template: str | Template | None = None


def _look_at(preset: str) -> _Looks:
    """Look into a folder or a GGUF file, if the preset is one.

    Raises:
        ValueError: The note of tuning cannot be read.
    """
    place = Path(preset).expanduser()
    if is_gguf(place) and place.is_file():
        file = GGUFFile(place)
        _, config = file.config()
        shape = (config["num_layers"], config["hidden_dim"])
        template = _noted_template(file.note(), place, "Export the model again.")
        return _Looks(shape, file.is_instruction_tuned(), template)
    if not (place / "config.json").is_file():
        return _Looks()
    config = read_config(place)
    # The format of KerasHub, or that of Transformers.
    config = config.get("config", config)
    layers = config.get("num_layers", config.get("num_hidden_layers"))
    shape = (layers, config.get("hidden_dim", config.get("hidden_size")))
    chat_template = _chat_template(place)
    is_tuned = None if chat_template is None else "<start_of_turn>" in chat_template
    note = place / NOTE
    text = note.read_text("utf-8") if note.is_file() else None
    if text is None and NOTE_IN_JINJA in (chat_template or ""):
        text = chat_template.split(NOTE_IN_JINJA)[1].split("#}")[0]
    way_out = "Save the model again, or delete that file and pass template=... yourself."
    return _Looks(shape, is_tuned, _noted_template(text, note, way_out))


def _chat_template(folder: Path) -> str | None:
    """Return Transformers' template for chats, in Jinja; None if a folder has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    if (folder / "tokenizer_config.json").is_file():
        template = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        return None if template.get("chat_template") is None else str(template["chat_template"])
    return None


def _noted_template(text: str | None, place: Path, way_out: str) -> str | Template | None:
    """Read a note as `note_of` writes it. Raises ValueError, with the way out."""
    if text is None:
        return None
    try:
        return named(Template(**json.loads(text)["template"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} does not say the template of tuning as gemma_lora writes it: {error!r}. "
            f"{way_out}"
        ) from None


def note_of(model) -> str | None:
    """Return the note to keep beside a model, as JSON; None if it was never tuned.

    The note is the template of tuning, here or before the model was loaded.
    """
    state = state_of(model)
    if not (state.run or state.noted):
        return None
    return json.dumps({"template": vars(get_template(template_of(model)))}, ensure_ascii=False)


def write_note(model, folder: Path) -> None:
    """Write the note beside a model. A note of another model in its place goes."""
    note = note_of(model)
    if note is None:
        (folder / NOTE).unlink(missing_ok=True)
    else:
        (folder / NOTE).write_text(note + "\n", encoding="utf-8")


def _save_with_note(model) -> None:
    """Have `model.save_to_preset` keep the template, which KerasHub's format cannot."""
    # private: it stands in for a public method, on this model alone.
    save_weights_and_config = model.save_to_preset

    def save_to_preset(preset_dir, *args, **options):
        save_weights_and_config(preset_dir, *args, **options)
        write_note(model, Path(preset_dir))

    model.save_to_preset = save_to_preset


def state_of(model) -> State:
    """Return what the library remembers of a model.

    A model that `load` did not load gets a new `State` here, under its own name.

    Raises:
        TypeError: This is not a causal language model of KerasHub.
    """
    if not isinstance(model, keras_hub.models.CausalLM):
        raise TypeError(
            "The model must be a keras_hub causal language model, as gl.load() returns it. "
            f"Received: {type(model).__name__}"
        )
    if not hasattr(model, "gemma_lora"):
        model.gemma_lora = State(preset=model.name, settings=recommended(model.name))
    return model.gemma_lora


def check_text_alone(model) -> None:
    """Raise ValueError if a model has a part for pictures, which `load` leaves out."""
    if getattr(model.backbone, "vision_encoder", None) is not None:
        raise ValueError(
            "The model has a part for pictures, and gl works on its text part. Load that: "
            "gl.load(preset) instead of from_preset."
        )


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of a model wait until other threads are done with the model.

    A server such as Flask's or Gradio's calls from several threads. While JAX traces a
    program, and while adapters are off or trained, a model must not serve another.
    """

    @wraps(function)
    def waits(*args: P.args, **options: P.kwargs) -> R:
        model = args[0] if args else options["model"]
        with state_of(model).lock:
            return function(*args, **options)

    return waits


def template_of(model) -> str | Template:
    """Return the template of the model's training run, or the recommended one."""
    state = state_of(model)
    return state.run["template"] if state.run else state.settings.template


def local_place(preset: str | Path) -> Path | None:
    """Return the folder or GGUF file that a preset is; None if it must be downloaded.

    Raises:
        TypeError: It is neither text nor a path.
        ValueError: It is neither: there is no such folder or file, and no preset of
            that name. Or the folder holds no preset.
    """
    if not isinstance(preset, str | Path):
        raise TypeError(
            "A preset is a name such as 'gemma_2b_en', a folder or a GGUF file. "
            f"Received: {type(preset).__name__}, {preset!r:.60}"
        )
    name = str(preset)
    place = TINY_FOLDER if name == TINY else Path(name).expanduser()
    if is_gguf(place) and place.is_file():
        return place
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ValueError(_why_no_preset(place))
        return place
    if is_gguf(place):
        raise ValueError(f"There is no file {place}.")
    if place.is_file():
        raise ValueError(
            f"{place} is a file, and gl.load takes a folder, a GGUF file or a preset's name."
            f"{_CALL_FOR.get(''.join(place.suffixes[-2:]), _CALL_FOR.get(place.suffix, ''))}"
        )
    known = keras_hub.models.CausalLM.presets
    if name in known or "://" in name:
        return None
    gemmas = sorted(preset for preset in known if preset.startswith("gemma"))
    if "/" not in name:
        plain = {_plain(preset): preset for preset in (TINY, *gemmas)}
        similar = [plain[match] for match in difflib.get_close_matches(_plain(name), plain, n=2)]
        if similar:
            hint = f"Did you mean {' or '.join(map(repr, similar))}?"
        else:
            hint = f"There are: {TINY}, {', '.join(gemmas)};"
        raise ValueError(f"No preset or folder is named {name!r}. {hint} See keras.io/keras_hub.")
    site = {2: "hf", 4: "kaggle"}.get(len(name.split("/")))
    hint = f" Online it is {site}://{name}, if it is there." if site and name[0].isalnum() else ""
    raise ValueError(f"There is no folder or preset {name!r}.{hint}")


# Which call takes a file that `load` does not, by the ends of its name.
_CALL_FOR = {
    ".keras": " Load it by keras.saving.load_model(file), then model.save_to_preset(folder).",
    ".weights.h5": " Load its base, without adapters: then model.load_weights(file) reads it; "
    "ask with template=... if it was tuned with one of your own.",
    ".lora.h5": " It is an adapter: gl.load_adapter(gl.load(base), file).",
    ".safetensors": " Pass the folder that it is in; an adapter's to gl.load_adapter(model, ...).",
}


def _plain(preset: str) -> str:
    """Return a preset's name without what is easily forgotten.

    >>> _plain("gemma_2b_en"), _plain("Gemma-2B")
    ('gemma2b', 'gemma2b')
    """
    return re.sub(r"_en$|[\W_]+", "", preset.lower())


def _why_no_preset(folder: Path) -> str:
    """Say what a folder without config.json is, and which call takes it."""
    for file, call in (
        ("adapter.safetensors", "gl.load_adapter(gl.load(base), folder)"),
        ("adapter_config.json", "gl.load_adapter(gl.load(base), folder)"),
    ):
        if (folder / file).is_file():
            return f"The folder {folder} holds an adapter, not a model. Load it by {call}."
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"The folder {folder} holds GGUF files. Load one: gl.load({str(ggufs[0])!r})."
    return f"The folder {folder} holds no preset: it has no config.json. Was it saved completely?"


def from_preset(kind: type, preset: str | Path, place: Path | None, **options):
    """Make a KerasHub object, such as a `CausalLM` or a `Tokenizer`, from a preset.

    Args:
        kind: Its class.
        preset: As in `load`.
        place: What `local_place` said of the preset. None downloads it.
        options: For the class's own `from_preset`.

    Raises:
        ImportError, RuntimeError, ValueError: As in `load`.
    """
    if place is None:
        # Not `quiet`: that would hold back the progress of the download.
        with quiet_warnings():
            return fetch(str(preset), lambda source: load_preset(kind, source, **options))
    with quiet():
        if not is_gguf(place):
            return load_preset(kind, str(place), **options)
        file = GGUFFile(place)
        is_model = issubclass(kind, keras_hub.models.CausalLM)
        return file.model(**options) if is_model else file.tokenizer()


def _restore_query_scale(model) -> None:
    """Set in each attention layer whether queries are divided by the head width's root.

    Gemma 2 27B and Gemma 3 27B divide by another root. In KerasHub a decoder block is
    told so, but always tells its attention layer True.
    """
    for block in model.backbone.transformer_layers:
        # private: `query_head_dim_normalize` of Gemma's blocks and attention layers.
        divides_by_head_width = getattr(block, "query_head_dim_normalize", True)
        # private: the same attribute, which KerasHub does not mean to be set.
        block.attention.query_head_dim_normalize = divides_by_head_width
