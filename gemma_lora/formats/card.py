"""Write the model card, the page README.md that goes with an adapter or a model.

A card says what the model is, what it was made from, how to load it, and on which
terms. The Hugging Face Hub reads its head. Here is also what every format records of a
model (its base and its training run), and how each of them writes a file. Sending is
not done here: that is `upload.py`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from keras_hub.models import CausalLM

from gemma_lora.lora import LoraSummary, fingerprints
from gemma_lora.models import TINY_VOCABULARY, epochs_in_words, state_of
from gemma_lora.options import one_of, with_options

# For each kind of folder: the library that reads it, and the lines that load it.
_LIBRARY = {
    "adapter": "keras-hub",
    "transformers": "transformers",
    "peft": "peft",
    "keras": "keras-hub",
}
_LOAD = {
    "adapter": """\
import gemma_lora as gl
model = gl.load({base!r})
gl.load_adapter(model, "this-folder")""",
    "transformers": """\
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained("this-folder")""",
    "peft": """\
import peft
import transformers
base = transformers.AutoModelForCausalLM.from_pretrained(BASE)  # in Transformers' format
model = peft.PeftModel.from_pretrained(base, "this-folder")""",
    "keras": """\
import gemma_lora as gl
model = gl.load("this-folder")""",
}
_GEMMA_TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at \
ai.google.dev/gemma/terms. They travel with every model derived from it, this one included: \
whoever receives it must receive the terms as well."""

_PAGE = """\
---
license: {license}
library_name: {library}
pipeline_tag: text-generation
tags: [gemma, lora]
---

# {title}

## Load it

```python
{load}
```

## What it is

{facts}

## Use and limits

Made to learn and to try out. Answers can be wrong even when they sound confident: check them.
It answers in the manner of its training records, and was measured on nothing else.

## Licence

{terms}
"""

# A comment that no reader sees, with a digest of the rest of the page. As long as the
# digest fits, nobody has edited the page, and it may be replaced.
_MARK = "<!-- written by gemma_lora, {} -->"
_MARK_PATTERN = re.compile(_MARK.format(r"(\w{16})"))


@with_options
def model_card(
    model: CausalLM, *, kind: Literal["adapter", "transformers", "peft", "keras"] = "keras"
) -> str:
    """Return the text of a model card: Markdown with the head that the Hub reads.

    Args:
        model: The model, as tuned or merged.
        kind: What the card goes with: "adapter", "transformers", "peft", or "keras" for
            a saved KerasHub preset.

    Raises:
        ValueError: `kind` is anything else.
    """
    one_of("kind", kind, (*_LOAD,))
    state = state_of(model)
    merged = state.merged
    lora = state.lora or (merged and merged.lora)
    tiny = _is_tiny(model)
    base = base_name(model)

    load = _LOAD[kind].format(base=base)
    if merged and kind == "adapter":
        warning = f"# The base is {base} with another adapter merged into it: also save that model."
        load = f"{warning}\n{_LOAD[kind].format(base='the-merged-model')}"
    kin = "a small teaching model, not one of Google's" if tiny else "a model of the Gemma family"
    facts = [f"- Base: `{base}`, {kin}."]
    if lora:
        in_kernels = kind == "transformers" or state.lora is None
        facts.append(_fact_of_lora(lora, in_kernels))
    if state.run:
        facts += _facts_of_run(state.run)
    page = _PAGE.format(
        license=licence_of(model),
        library=_LIBRARY[kind],
        title=title_of(model),
        load=load,
        facts="\n".join(facts),
        terms=terms_of(model),
    )
    return page + _MARK.format(_digest(page + "\n")) + "\n"


def _is_tiny(model) -> bool:
    return model.backbone.vocabulary_size == TINY_VOCABULARY


def title_of(model) -> str:
    """Return what a model is called: its base, and whether it was tuned."""
    state = state_of(model)
    is_tuned = state.lora or state.merged or state.run
    return f"{base_name(model)}, tuned with LoRA" if is_tuned else base_name(model)


def licence_of(model) -> str:
    """Return the licence of a model's base, by its name on the Hugging Face Hub."""
    return "apache-2.0" if _is_tiny(model) else "gemma"


def terms_of(model) -> str:
    """Return the sentence on licence that goes with everything made from a model."""
    return "The base is part of gemma_lora, Apache-2.0." if _is_tiny(model) else _GEMMA_TERMS


def _fact_of_lora(lora: LoraSummary, in_kernels: bool) -> str:
    targets = ", ".join(lora.targets)
    where = ", merged into the kernels" if in_kernels else ""
    return f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {targets}{where}."


def _facts_of_run(run: dict) -> list[str]:
    """Say in list items how a model was trained, and with what effect."""
    facts = [
        f"- Prompt template: `{run['template'].name}`. Prompts worded otherwise do worse.",
        f"- Trained on {run['rows']:,} records ({run['tokens']:,} tokens) for "
        f"{epochs_in_words(run)}{_steps_of(run)}; learning rate {run['learning_rate']:g}, seed "
        f"{run['seed']}, loss on {run['loss_on']}.",
        "- Data: say here where the records are from, and under which licence.",
    ]
    if losses := run.get("held_out_loss"):
        before, after = losses["base"], losses["tuned"]
        facts.append(f"- Held-out loss per token: {before:.4f} before, {after:.4f} after.")
    return facts


def _steps_of(run: dict) -> str:
    """Say how many steps a run had that ended before its time."""
    return "" if float(run["epochs"]).is_integer() else f" ({run['steps']:,} steps), then stopped"


def describe(model) -> dict:
    """Return what an adapter belongs to, its base and its training run, as JSON has it.

    The base is its name, whether another adapter was merged into it (`merged`), and its
    fingerprints. The run is the record that `gl.fit` left, or None.
    """
    state = state_of(model)
    run = None if state.run is None else state.run | {"template": vars(state.run["template"])}
    merged = state.merged is not None
    description = {"base": base_name(model), "merged": merged, **fingerprints(model), "run": run}
    return json.loads(json.dumps(description, default=float))


def base_name(model) -> str:
    """Return the name of the preset that a model was loaded from.

    Of a folder this is the last part alone: its whole path would tell others about a
    machine.
    """
    state = state_of(model)
    return Path(state.preset).resolve().name if state.local else state.preset


def write_card(folder: Path, page: str) -> None:
    """Write README.md, unless somebody else wrote or edited the one in the folder."""
    path = folder / "README.md"
    if not path.is_file() or _is_unedited(path.read_text(encoding="utf-8", errors="replace")):
        write_file(path, page.encode())


def _is_unedited(page: str) -> bool:
    """Return whether we wrote a page, and nobody has changed it since."""
    mark = _MARK_PATTERN.search(page)
    return page == "" or (mark is not None and mark[1] == _digest(_MARK_PATTERN.sub("", page)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: dict) -> None:
    """Write a dict as a JSON file, indented for people."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: if the process ends, the old content is there or the new."""
    with written_whole(path) as part:
        part.write_bytes(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Within this context, write to the path that it gives, "<name>.part".

    At the end that file becomes `path`, once the disk has it. After an error nothing
    is left of it, and the old content stays.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
