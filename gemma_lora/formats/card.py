"""The page that goes with an adapter or a model: what it is, what it was made from, how to load it, and its terms."""

import hashlib
import json
import re
from pathlib import Path

from gemma_lora.lora import fingerprints
from gemma_lora.models import TINY_VOCABULARY, state_of

_MARK = (
    "<!-- written by gemma_lora, {} -->"  # with a sum of the rest: what was edited is the user's
)
_LOAD = {
    "adapter": 'model = gl.load({base!r})\ngl.load_adapter(model, "this-folder")',
    "transformers": 'model = transformers.AutoModelForCausalLM.from_pretrained("this-folder")',
    "peft": "base = transformers.AutoModelForCausalLM.from_pretrained(BASE)  # in Transformers' format\n"
    'model = peft.PeftModel.from_pretrained(base, "this-folder")',
    "keras": 'model = gl.load("this-folder")',
}
_LIBRARY = {
    "adapter": "keras-hub",
    "transformers": "transformers",
    "peft": "peft",
    "keras": "keras-hub",
}
_IMPORTS = {"transformers": "import transformers", "peft": "import peft\nimport transformers"}


def model_card(model, *, kind: str = "keras") -> str:
    """Text of a model card, Markdown with the head that the Hugging Face Hub reads.

    Args:
        model: As tuned, or merged.
        kind: What the card goes with: "adapter", "transformers", "peft" or "keras", a saved KerasHub preset.
    """
    state = state_of(model)
    base, merge, run = base_name(model), state.merges[-1] if state.merges else None, state.run
    lora, tiny = (
        state.lora or (merge and merge.lora),
        model.backbone.vocabulary_size == TINY_VOCABULARY,
    )
    head = {"license": "apache-2.0" if tiny else "gemma", "library_name": _LIBRARY[kind]}
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in head.items()),
        "pipeline_tag: text-generation",
    ]
    lines += [
        "tags: [gemma, lora]",
        "---",
        "",
        f"# {base}" + (", tuned with LoRA" if lora or run else ""),
        "",
    ]
    load = _IMPORTS.get(kind, "import gemma_lora as gl"), _LOAD[kind].format(base=base)
    if merge and kind == "adapter":
        first = f"# the base is {base} with another adapter merged into it: save that model, too"
        load = load[0], first, _LOAD[kind].format(base="the-merged-model")
    lines += ["## Load it", "", "```python", *load, "```", "", "## What it is", ""]
    kin = "a small teaching model, none of Google's" if tiny else "a model of the Gemma family"
    lines += [f"- Base: `{base}`, {kin}."]
    if lora:
        merged = ", merged into the kernels" if kind == "transformers" or state.lora is None else ""
        lines += [
            f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}{merged}."
        ]
    if run:
        lines += [
            f"- Prompt template: `{run['template'].name}`. Other wordings of a prompt fare worse.",
            f"- Trained on {run['rows']:,} records, {run['tokens']:,} tokens, {run['epochs']} epoch(s); learning rate "
            f"{run['learning_rate']:g}, seed {run['seed']}, loss on {run['loss_on']}.",
            "- Data: say here where the records are from, and under which licence.",
        ]
    if measured := (run or {}).get("held_out_loss"):
        lines += [
            f"- Held-out loss per token: {measured['base']:.4f} before, {measured['tuned']:.4f} after."
        ]
    lines += ["", "## Use and limits", ""]
    lines += [
        "Made to learn and to try out. Answers can be wrong, also where they sound sure; check them before use."
    ]
    lines += ["It answers in the manner of its training records, and was measured on nothing else."]
    lines += ["", "## Licence", ""]
    if tiny:
        lines += ["The base is part of gemma_lora, Apache-2.0."]
    else:
        lines += [
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They "
            "travel with every model derived from it, this one included; whoever gets it has to get the terms, too."
        ]
    return _marked("\n".join(lines) + "\n")


def about(model) -> dict:
    """What an adapter belongs to, in JSON's types: its base, with fingerprints, and the record of its training."""
    state = state_of(model)
    run = None if state.run is None else state.run | {"template": vars(state.run["template"])}
    found = {
        "base": base_name(model),
        "merged": bool(state.merges),
        **fingerprints(model),
        "run": run,
    }
    return json.loads(json.dumps(found, default=float))


def base_name(model) -> str:
    """The preset that a model was loaded as; of a folder its name alone, as its path says things about a machine."""
    state = state_of(model)
    return Path(state.preset).resolve().name if state.local else state.preset


def write_card(folder: Path, text: str) -> None:
    """Write README.md, but over no page that somebody else wrote, or edited."""
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    unmarked = re.sub(_MARK.format(r"\w+"), "", before)
    if not before or unmarked != before == _marked(unmarked):
        path.write_text(text, encoding="utf-8")


def _marked(text: str) -> str:
    """Put a mark behind the head of a card, into the line that is left free there."""
    mark = _MARK.format(hashlib.sha256(text.encode()).hexdigest()[:16])
    return text.replace("---\n\n#", f"---\n{mark}\n#", 1)
