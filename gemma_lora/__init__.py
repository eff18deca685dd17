"""Fine-tune Gemma with LoRA in Keras: the helpers behind the notebooks.

    import gemma_lora as gl

    gl.setup(seed=0)
    model = gl.load("tiny_gemma_en")
    train, held_out = gl.load_tiny_world()
    gl.enable_lora(model, rank=4)
    gl.fit(model, train, validation=held_out)
    gl.compare(model, ["What should I do on a trip to Europe?"])

Importing the package is quick and imports no Keras: each name loads its module when it is first used.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported

_NAMES_IN = {
    "runtime": ("override_parameters", "setup"),
    "tables": ("Table",),
    "access.kaggle": ("find_credentials", "kaggle_login"),
    "records": ("COLUMNS", "load_dolly", "load_records"),
    "tiny.questions": ("load_tiny_world",),
    "templates": ("TEMPLATES", "Template"),
    "models": ("load", "recommended"),
    "tokens": ("encode", "load_tokenizer", "shift_for_next_token", "show_tokens"),
    "lora": ("adapters_off", "enable_lora", "merge", "remove_adapter"),
    "memory": ("memory_budget",),
    "checks": ("check",),
    "training": ("fit",),
    "sampling": ("generate", "stream"),
    "evaluation": ("compare", "distinct", "evaluate", "perplexity"),
    "formats.card": ("model_card",),
    "formats.transformers": ("export_transformers",),
    "formats.peft": ("export_peft",),
    "formats.adapter": ("load_adapter", "save_adapter"),
    "figures": (
        "plot_bars",
        "plot_before_after",
        "plot_history",
        "plot_lengths",
        "plot_lora",
        "plot_memory",
    ),
    "formats.upload": ("upload",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str):
    if name == "exercises":
        return importlib.import_module("gemma_lora.exercises")
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module 'gemma_lora' has no attribute {name!r}. It has: {', '.join(__all__)}."
        )
    value = getattr(importlib.import_module(f"gemma_lora.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
