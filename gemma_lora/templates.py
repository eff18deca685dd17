"""Render records as prompts: one template for training and for asking.

Here text becomes text, cut into pieces. Turning the pieces into token ids is in
`tokens`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter

# Token names that would act on the model if they were read from data.
_CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|bos|eos|pad|unk|mask|start_of_image|end_of_image|img)>"
)


# What opens or ends a turn or a text, here or in other models' chats.
_TURN = re.compile(
    r"<(?:start_of_turn|end_of_turn|bos|eos)>|<\|(?:im_start|im_end|eot_id|endoftext)\|>"
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
        name: The name that runs and adapters record.
        without_context: Text with the field {instruction}.
        with_context: Text with the fields {instruction} and {context}, for records that
            have a context.
        end: The token that ends a response. Training teaches it, generation stops at
            it.
        between: In a talk of several turns, what stands between that token and the next
            question.

    Raises:
        ValueError: A text does not have exactly these fields.
    """

    name: str
    without_context: str
    with_context: str
    end: str = "<eos>"
    between: str = ""

    def __post_init__(self):
        for text, needed in (
            (self.without_context, {"instruction"}),
            (self.with_context, {"instruction", "context"}),
        ):
            fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
            if fields != needed:
                raise ValueError(
                    f"A template's text needs the fields {sorted(needed)}, each as {{field}}. "
                    f"Received: {text!r}"
                )

    def prompt(self, record: str | Mapping[str, str]) -> str:
        """Render a record up to its response.

        Args:
            record: An instruction, or a dict with `instruction` and perhaps `context`.
        """
        return "".join(self.pieces(record))

    def pieces(self, record: str | Mapping[str, str]) -> list[str]:
        """Render like `prompt`, cut into pieces that must be encoded one by one.

        Control tokens of the template stay whole. The same words inside the record's
        own fields are cut, so that they reach the model as text: no row of data can end
        or open a turn.

        >>> TEMPLATES["recipe"].pieces("What is <eos>?")
        ['Instruction:\\nWhat is <', 'eos>?\\n\\nResponse:\\n']
        """
        fields = {"instruction": record, "context": ""} if isinstance(record, str) else record
        template = (
            self.with_context if (fields.get("context") or "").strip() else self.without_context
        )
        text = ""
        # Where the record's own fields stand in the text: (start, stop).
        data = []
        for literal, field, _, _ in Formatter().parse(template):
            text += literal
            if field is not None:
                data.append((len(text), len(text) + len(fields[field])))
                text += fields[field]
        return _cut(text, data)


def text_pieces(text: str) -> list[str]:
    """Cut every control token in a text that is data, such as a response.

    The reason is that of `Template.pieces`.

    >>> text_pieces("The end is <eos>.")
    ['The end is <', 'eos>.']
    """
    return _cut(text, [(0, len(text))])


def turn_tokens_in(record: Mapping[str, str]) -> list[str]:
    """Return the first token of a turn that is written out in a record, if any.

    >>> turn_tokens_in({"instruction": "<start_of_turn>user", "response": "So."})
    ['<start_of_turn>']
    """
    found = _TURN.search("\n".join(record.values()))
    return [found[0]] if found else []


def _cut(text: str, data: list[tuple[int, int]]) -> list[str]:
    """Cut a text after the first letter of each control token that touches data.

    One that lies only partly within data is also cut: the template "<{instruction}>"
    must not turn the instruction "eos" into a token.
    """
    cuts = [
        token.start() + 1
        for token in _CONTROL.finditer(text)
        if any(token.start() < stop and start < token.end() for start, stop in data)
    ]
    return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


TEMPLATES: dict[str, Template] = {
    # The published recipe's; its variant for context is ours, in the same manner.
    "recipe": Template(
        name="recipe",
        without_context="Instruction:\n{instruction}\n\nResponse:\n",
        with_context="Instruction:\n{instruction}\n\nContext:\n{context}\n\nResponse:\n",
    ),
    # Gemma's own turns, for instruction-tuned presets:
    # https://ai.google.dev/gemma/docs/core/prompt-structure
    "turns": Template(
        name="turns",
        without_context="<start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
        with_context=(
            "<start_of_turn>user\n{instruction}\n\n{context}<end_of_turn>\n<start_of_turn>model\n"
        ),
        end="<end_of_turn>",
        between="\n",
    ),
}


def named(template: str | Template) -> str | Template:
    """Return the name of a template if it is one of `TEMPLATES`, else the template.

    >>> named(TEMPLATES["turns"])
    'turns'
    """
    template = get_template(template)
    return template.name if template == TEMPLATES.get(template.name) else template


def get_template(template: str | Template) -> Template:
    """Look a template up by name; a `Template` is its own.

    >>> print(get_template("turns").prompt("Why?"))
    <start_of_turn>user
    Why?<end_of_turn>
    <start_of_turn>model
    <BLANKLINE>

    Args:
        template: One of `TEMPLATES`, or what `recommended(model).template` holds.

    Raises:
        ValueError: There is no such template.
    """
    if isinstance(template, Template):
        return template
    if not isinstance(template, str):
        raise ValueError(
            f"A template is a name ({', '.join(TEMPLATES)}) or a gl.Template of your own. "
            f"Received: {type(template).__name__}, {template!r:.60}"
        )
    if template not in TEMPLATES:
        raise ValueError(
            f"No template is named {template!r}. There are: {', '.join(TEMPLATES)}; or pass a "
            "gl.Template of your own."
        )
    return TEMPLATES[template]
