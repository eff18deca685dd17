"""Fine-tune Gemma with LoRA in Keras: the helpers behind the notebooks.

    import gemma_lora as gl

    gl.setup(seed=0)
    model = gl.load("tiny_gemma_en")
    train, held_out = gl.load_data(model)
    gl.enable_lora(model, rank=4)
    gl.fit(model, train, validation=held_out)
    gl.compare(model, ["What should I do on a trip to Europe?"])

Importing this package is quick and does not import Keras: each public name imports its
module when it is first used. The names come from the modules below, listed in the order
in which they are best read.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if "keras" not in sys.modules:
    # Keras reads this once, when it is imported.
    os.environ.setdefault("KERAS_BACKEND", "jax")

# The public names of each module. The modules stand in reading order.
_NAMES_IN = {
    "runtime": ("setup", "override_parameters"),
    "tables": ("Table",),
    "access.kaggle": ("find_credentials", "kaggle_login"),
    "records": ("COLUMNS", "load_data", "load_dolly", "load_records"),
    "audits": ("audit",),
    "tiny.questions": ("load_tiny_world",),
    "templates": ("TEMPLATES", "Template", "get_template"),
    "models": ("load", "recommended"),
    "tokens": ("load_tokenizer", "shift_for_next_token", "encode", "show_tokens"),
    "lora": ("enable_lora", "adapters_off", "merge", "remove_adapter"),
    "memory": ("memory_budget",),
    "checks": ("check",),
    "training": ("fit",),
    "sampling": ("generate", "stream"),
    "evaluation": ("compare", "distinct", "evaluate", "perplexity"),
    "sweeps": ("sweep",),
    "figures": (
        "plot_bars",
        "plot_before_after",
        "plot_history",
        "plot_lengths",
        "plot_lora",
        "plot_memory",
    ),
    "formats.card": ("model_card",),
    "formats.transformers": ("export_transformers",),
    "formats.peft": ("export_peft",),
    "formats.gguf": ("export_gguf",),
    "formats.adapter": ("load_adapter", "save_adapter"),
    "formats.upload": ("upload",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [*_MODULE_OF]

if TYPE_CHECKING:
    # Never run. Editors and type checkers read these imports, because they cannot
    # follow the table above. A test compares the two.
    # ruff: noqa: F401
    from gemma_lora import exercises
    from gemma_lora.access.kaggle import find_credentials, kaggle_login
    from gemma_lora.audits import audit
    from gemma_lora.checks import check
    from gemma_lora.evaluation import compare, distinct, evaluate, perplexity
    from gemma_lora.figures import (
        plot_bars,
        plot_before_after,
        plot_history,
        plot_lengths,
        plot_lora,
        plot_memory,
    )
    from gemma_lora.formats.adapter import load_adapter, save_adapter
    from gemma_lora.formats.card import model_card
    from gemma_lora.formats.gguf import export_gguf
    from gemma_lora.formats.peft import export_peft
    from gemma_lora.formats.transformers import export_transformers
    from gemma_lora.formats.upload import upload
    from gemma_lora.lora import adapters_off, enable_lora, merge, remove_adapter
    from gemma_lora.memory import memory_budget
    from gemma_lora.models import load, recommended
    from gemma_lora.records import COLUMNS, load_data, load_dolly, load_records
    from gemma_lora.runtime import override_parameters, setup
    from gemma_lora.sampling import generate, stream
    from gemma_lora.sweeps import sweep
    from gemma_lora.tables import Table
    from gemma_lora.templates import TEMPLATES, Template, get_template
    from gemma_lora.tiny.questions import load_tiny_world
    from gemma_lora.tokens import encode, load_tokenizer, shift_for_next_token, show_tokens
    from gemma_lora.training import fit


def __getattr__(name: str):
    """Import the module of a public name when the name is first used."""
    if name == "exercises":
        # This is a module itself: `gl.exercises.steps(...)`.
        return importlib.import_module("gemma_lora.exercises")
    if name not in _MODULE_OF:
        import difflib

        by_small_letters = {known.lower(): known for known in __all__}
        similar = difflib.get_close_matches(name.lower(), by_small_letters, n=1)
        hint = f" Did you mean {by_small_letters[similar[0]]!r}?" if similar else ""
        raise AttributeError(f"module 'gemma_lora' has no attribute {name!r}.{hint} See dir(gl).")
    module = importlib.import_module(f"gemma_lora.{_MODULE_OF[name]}")
    value = getattr(module, name)
    # From now on Python finds the name without calling this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "exercises"])
