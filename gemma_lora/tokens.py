"""Turn records into token ids, with a weight for each target; and show them in colour.

Three steps, from top to bottom: a `Tokenizer` turns text into ids; `encode` turns
records into rows of inputs, targets and weights; `show_tokens` shows such rows. How
text is cut so that data cannot act as a control token is in `templates`; how rows share
a batch is in `batches`.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import keras_hub
import numpy as np
import sentencepiece
from keras_hub.models import CausalLM

from gemma_lora.models import TINY, from_preset, local_place, state_of
from gemma_lora.options import one_of, whole_number, with_options
from gemma_lora.records import (
    Records,
    WrongColumnsError,
    as_records,
    checked_record,
    unused_columns,
    warn_of_unused,
)
from gemma_lora.runtime import quiet
from gemma_lora.tables import TokenView
from gemma_lora.templates import Template, get_template, text_pieces, turn_tokens_in


class Tokenizer:
    """A model's SentencePiece vocabulary, used directly.

    It works alike on every version of KerasHub, and it is quick.

    Args:
        keras_tokenizer: The tokenizer of a KerasHub model's preprocessor.

    Raises:
        ValueError: There is no tokenizer, or it has no SentencePiece vocabulary.
    """

    def __init__(self, keras_tokenizer):
        # private: `proto`, the bytes of the vocabulary's file.
        proto = getattr(keras_tokenizer, "proto", None)
        if not proto:
            raise ValueError(
                "The model has no SentencePiece tokenizer. "
                "Load it with gl.load(), preprocessor included."
            )
        with quiet():
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.bos_id = keras_tokenizer.start_token_id
        self.pad_id = keras_tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self._pieces)

    def __repr__(self) -> str:
        return f"Tokenizer of {len(self):,} tokens, with encode, decode and tokens"

    def encode(self, pieces: list[str]) -> list[int]:
        """Encode each piece by itself and join the ids."""
        return [token_id for ids in self._pieces.encode(pieces) for token_id in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; control tokens vanish."""
        # SentencePiece takes Python's integers only, not NumPy's.
        return self._pieces.decode([int(token_id) for token_id in ids])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the token of each id, made visible.

        ▁ is a space, ⏎ a line break, and `<0x..>` a byte that has no token.
        """
        tokens = self._pieces.id_to_piece([int(token_id) for token_id in ids])
        return [token.replace("\n", "⏎") for token in tokens]

    def id_of(self, token: str) -> int:
        """Return the id of a control token such as `<eos>`. Raises ValueError."""
        token_id = self._pieces.piece_to_id(token)
        if token_id == self._pieces.unk_id() and token != "<unk>":
            raise ValueError(
                f"The model's vocabulary has no token {token!r}. Choose another template."
            )
        return token_id

    def prompt(self, template: str | Template | None, record: str | Mapping[str, str]) -> list[int]:
        """Encode `<bos>` and the rendered prompt, or the bare text.

        With `template=None`, `record` is a text and is encoded as it stands: a turn's
        token in it is that token, as in a template.
        """
        if template is None:
            return [self.bos_id, *self.encode([record.removeprefix("<bos>")])]
        return [self.bos_id, *self.encode(get_template(template).pieces(record))]


def load_tokenizer(preset: str | Path = TINY) -> Tokenizer:
    """Load a model's tokenizer without its weights: a download of a few megabytes.

    It is enough to prepare data.

    >>> tokenizer = load_tokenizer("tiny_gemma_en")
    >>> tokenizer.tokens(tokenizer.encode(["Name a river."]))
    ['N', 'ame', '▁a', '▁river', '.']

    Args:
        preset: As in `gl.load`.

    Raises:
        ValueError, RuntimeError: As in `gl.load`.
    """
    place = local_place(preset)
    return Tokenizer(from_preset(keras_hub.tokenizers.Tokenizer, preset, place))


def tokenizer_of(model) -> Tokenizer:
    """Return the model's `Tokenizer`, made once. A `Tokenizer` is its own."""
    if isinstance(model, Tokenizer):
        return model
    state = state_of(model)
    if state.tokenizer is None:
        state.tokenizer = Tokenizer(getattr(model.preprocessor, "tokenizer", None))
    return state.tokenizer


class Example(NamedTuple):
    """One training row: three lists of equal length."""

    inputs: list[int]
    targets: list[int]
    weights: list[int]


def shift_for_next_token(
    prompt: list[int], response: list[int], *, loss_on: Literal["response", "all"] = "response"
) -> Example:
    """Turn a prompt and its response into inputs, targets and loss weights.

    >>> shift_for_next_token([2, 7, 8], [9, 1])
    Example(inputs=[2, 7, 8, 9], targets=[7, 8, 9, 1], weights=[0, 0, 1, 1])

    The weight of a target is 1 where it belongs to the response, or everywhere with
    `loss_on="all"`. All three have shape (len(prompt) + len(response) - 1,).
    """
    ids = prompt + response
    learned = len(prompt) - 1 if loss_on == "response" else 0
    return Example(ids[:-1], ids[1:], [0] * learned + [1] * (len(ids) - 1 - learned))


@dataclass
class Encoded:
    """Encoded records, and what became of those that were too long.

    Attributes:
        examples: The rows.
        pad_id: The id that fills a row up.
        numbers: For each row, the number of its record, counted from 0.
        truncated: How many responses were cut.
        dropped: How many records have no row, because their prompt leaves no room.
        full_lengths: Tokens of every record, dropped ones included, before any cut.
    """

    examples: list[Example]
    pad_id: int
    numbers: list[int] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    full_lengths: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """Real tokens in each row: int array of shape (rows,)."""
        return np.array([len(example.inputs) for example in self.examples])


@with_options
def encode(
    model: CausalLM | Tokenizer,
    records: Records,
    *,
    template: str | Template = "recipe",
    sequence_length: int = 256,
    loss_on: Literal["response", "all"] = "response",
) -> Encoded:
    """Encode records for training.

    Every response ends in the template's end token, and that token is learned. A
    response that is too long is cut so that the end token still fits, as in KerasHub's
    own packer.

    Args:
        model: The model whose vocabulary to use, or a tokenizer from `load_tokenizer`.
        records: Dicts with instruction, context and response, such as a
            `datasets.Dataset`; or anything else that `load_records` reads.
        template: Name of a template, or a `Template`.
        sequence_length: Most input tokens of a row.
        loss_on: "response", or "all" to learn the prompt too, as the published recipe
            does.

    Returns:
        The rows, and counts of what was cut or dropped.

    Raises:
        ValueError: A row is not a valid record, or no record leaves room for a
            response.
    """
    one_of("loss_on", loss_on, ("response", "all"))
    sequence_length = whole_number("sequence_length", sequence_length, least=2)
    tokenizer = tokenizer_of(model)
    template = get_template(template)
    end = tokenizer.id_of(template.end)
    encoded = Encoded([], tokenizer.pad_id)
    with_turns = []
    unused: dict[str, None] = {}
    for number, row in enumerate(as_records(records)):
        record = _checked(number, row)
        unused |= dict.fromkeys(unused_columns(row))
        with_turns += turn_tokens_in(record)
        prompt = tokenizer.prompt(template, record)
        response = tokenizer.encode(text_pieces(record["response"]))
        encoded.full_lengths.append(len(prompt) + len(response))
        # The end token takes no room: it is only ever a target, never an input.
        room = sequence_length - len(prompt)
        if room < 1:
            encoded.dropped += 1
            continue
        if len(response) > room:
            encoded.truncated += 1
        encoded.numbers.append(number)
        encoded.examples.append(
            shift_for_next_token(prompt, [*response[:room], end], loss_on=loss_on)
        )
    if not encoded.full_lengths:
        raise ValueError("There are no records.")
    _warn_of_turns(with_turns)
    warn_of_unused(unused)
    if not encoded.examples:
        raise ValueError(
            f"Of {encoded.dropped:,} rows, none leaves room for a response within "
            f"sequence_length={sequence_length}. Raise sequence_length, shorten the prompts, "
            "or look at what the rows hold."
        )
    return encoded


def _warn_of_turns(tokens: list[str]) -> None:
    """Warn if records hold tokens of turns in their text: one of each such record."""
    if tokens:
        warnings.warn(
            f"{len(tokens):,} of the records hold tokens of turns in their text, such as "
            f"{tokens[0]!r}. They are read as letters, because data must not open or end a turn. "
            "If your rows are whole prompts, take these tokens out: a template puts them in.",
            stacklevel=3,
        )


def _checked(number: int, row) -> dict[str, str]:
    """Check a record as `load_records` does. The ValueError says its number."""
    try:
        return checked_record(row, {})
    except ValueError as error:
        helps = number or not isinstance(error, WrongColumnsError)
        way_out = ' gl.load_records(..., on_error="skip") leaves such records out.'
        raise ValueError(f"Record {number}: {error}{way_out if helps else ''}") from None


@with_options
def show_tokens(
    model: CausalLM | Tokenizer,
    records: Mapping[str, str] | Records,
    *,
    template: str | Template = "recipe",
    sequence_length: int = 256,
    loss_on: Literal["response", "all"] = "response",
) -> TokenView:
    """Show records as tokens in colour: what training reads, what it learns, and
    padding.

    Args:
        model, template, sequence_length, loss_on: As in `encode`.
        records: One record or a few. Shorter ones are padded to the longest. A record
            whose prompt leaves no room for a response is left out.

    Raises:
        ValueError: As in `encode`.
    """
    tokenizer = tokenizer_of(model)
    if isinstance(records, Mapping) and not any(isinstance(v, list) for v in records.values()):
        records = [records]
    encoded = encode(
        tokenizer, records, template=template, sequence_length=sequence_length, loss_on=loss_on
    )
    rows = []
    for example in encoded.examples:
        # Inputs and targets overlap in all but one token. This is the row before the
        # shift: <bos>, which is never a target, and then all the targets.
        ids = [example.inputs[0], *example.targets]
        kinds = ["read", *("learned" if weight else "read" for weight in example.weights)]
        rows.append(list(zip(tokenizer.tokens(ids), ids, kinds, strict=True)))
    longest = max(len(row) for row in rows)
    padding = ("<pad>", tokenizer.pad_id, "padding")
    return TokenView([row + [padding] * (longest - len(row)) for row in rows])
