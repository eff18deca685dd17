"""One template renders both what a model is trained on and what it is asked with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter

# Token names that would act on the model if they were read from data.
_CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|bos|eos|pad|unk|mask|start_of_image|end_of_image|img)>"
)


@dataclass(frozen=True)
class Template:
    """How a record becomes a prompt.

    >>> print(TEMPLATES["recipe"].prompt({"instruction": "Name a river."}))
    Instruction:
    Name a river.
    <BLANKLINE>
    Response:
    <BLANKLINE>

    Attributes:
        name: What runs and adapters record.
        without_context: Text with the field {instruction}.
        with_context: Text with the fields {instruction} and {context}, for records that have a context.
        end: The token that ends a response, learned in training and stopped at in generation.
    """

    name: str
    without_context: str
    with_context: str
    end: str = "<eos>"

    def __post_init__(self):
        for text, needed in (
            (self.without_context, {"instruction"}),
            (self.with_context, {"instruction", "context"}),
        ):
            fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
            if fields != needed:
                raise ValueError(
                    f"A template's text needs the fields {sorted(needed)}, each as {{field}}. Received: {text!r}"
                )

    def prompt(self, record: str | Mapping[str, str]) -> str:
        """Render a record with `instruction` and perhaps `context`, or an instruction alone, up to the response."""
        return "".join(self.pieces(record))

    def pieces(self, record: str | Mapping[str, str]) -> list[str]:
        """Render like `prompt`, cut where tokens must not join: each piece is to be encoded by itself.

        Control tokens of the template stay whole. The same words inside the record's own fields are cut, so that they
        reach the model as text: no row of data can end or open a turn.

        >>> TEMPLATES["recipe"].pieces("What is <eos>?")
        ['Instruction:\\nWhat is <', 'eos>?\\n\\nResponse:\\n']
        """
        fields = {"instruction": record, "context": ""} if isinstance(record, str) else record
        template = (
            self.with_context if (fields.get("context") or "").strip() else self.without_context
        )
        text, data = "", []
        for literal, field, _, _ in Formatter().parse(template):
            text += literal
            if field is not None:
                data.append((len(text), len(text) + len(fields[field])))
                text += fields[field]
        return _cut(text, data)


def text_pieces(text: str) -> list[str]:
    """Cut all control tokens in a text, such as a response, for the same reason as `Template.pieces`."""
    return _cut(text, [(0, len(text))])


def _cut(text: str, data: list[tuple[int, int]]) -> list[str]:
    cuts = [
        found.start() + 1
        for found in _CONTROL.finditer(text)
        if any(found.start() < stop and start < found.end() for start, stop in data)
    ]
    return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


TEMPLATES: dict[str, Template] = {
    # The published recipe's; its variant for context is ours, in the same manner.
    "recipe": Template(
        name="recipe",
        without_context="Instruction:\n{instruction}\n\nResponse:\n",
        with_context="Instruction:\n{instruction}\n\nContext:\n{context}\n\nResponse:\n",
    ),
    # Gemma's own turns, for instruction-tuned presets: https://ai.google.dev/gemma/docs/core/prompt-structure
    "turns": Template(
        name="turns",
        without_context="<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
        with_context="<start_of_turn>user\n{instruction}\n\n{context}<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
    ),
}


def get_template(template: str | Template) -> Template:
    """Look a template up by name; a name that there is not is a ValueError."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(
            f"No template is named {template!r}. There are: {', '.join(TEMPLATES)}; or pass a gl.Template of your own."
        )
    return TEMPLATES[template]
