"""A model's vocabulary, and a record as token ids with a weight for each target."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import keras_hub
import numpy as np
import sentencepiece

from gemma_lora.models import TINY, from_preset, state_of
from gemma_lora.records import checked_record
from gemma_lora.runtime import quiet
from gemma_lora.tables import TokenView
from gemma_lora.templates import Template, get_template, text_pieces


class Tokenizer:
    """A model's SentencePiece vocabulary, used directly: the same on every version of KerasHub, and quick."""

    def __init__(self, keras_tokenizer):
        if keras_tokenizer is None or not getattr(keras_tokenizer, "proto", None):
            raise ValueError(
                "The model has no SentencePiece tokenizer: load it with gl.load(), preprocessor included."
            )
        with quiet():
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=keras_tokenizer.proto)
        self.bos_id, self.pad_id = keras_tokenizer.start_token_id, keras_tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, pieces: list[str]) -> list[int]:
        """Encode each piece by itself and join the ids."""
        return [token for ids in self._pieces.encode(pieces) for token in ids]

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text; control tokens vanish."""
        return self._pieces.decode([int(token) for token in ids])

    def tokens(self, ids: list[int]) -> list[str]:
        """The token of each id, made visible: ▁ is a space, ⏎ a line break, `<0x..>` a byte without a token."""
        return [
            token.replace("\n", "⏎")
            for token in self._pieces.id_to_piece([int(token) for token in ids])
        ]

    def id_of(self, token: str) -> int:
        """The id of a control token such as `<eos>`."""
        token_id = self._pieces.piece_to_id(token)
        if token_id == self._pieces.unk_id() and token != "<unk>":
            raise ValueError(
                f"The model's vocabulary has no token {token!r}; choose another template."
            )
        return token_id

    def prompt(self, template: str | Template | None, record: str | Mapping[str, str]) -> list[int]:
        """Encode `<bos>` and the rendered prompt; with `template=None`, the text as it stands."""
        pieces = text_pieces(record) if template is None else get_template(template).pieces(record)
        return [self.bos_id, *self.encode(pieces)]


def load_tokenizer(preset: str | Path = TINY) -> Tokenizer:
    """Load a model's tokenizer without its weights: enough to prepare data, and a download of a few megabytes.

    >>> tokenizer = load_tokenizer("tiny_gemma_en")
    >>> tokenizer.tokens(tokenizer.encode(["Name a river."]))
    ['N', 'ame', '▁a', '▁river', '.']
    """
    return Tokenizer(from_preset(keras_hub.tokenizers.Tokenizer, preset))


def tokenizer_of(model) -> Tokenizer:
    """The model's `Tokenizer`, made once; a `Tokenizer` is its own."""
    if isinstance(model, Tokenizer):
        return model
    state = state_of(model)
    state.tokenizer = state.tokenizer or Tokenizer(getattr(model.preprocessor, "tokenizer", None))
    return state.tokenizer


class Example(NamedTuple):
    """One training row: three lists of equal length."""

    inputs: list[int]
    targets: list[int]
    weights: list[int]


def shift_for_next_token(
    prompt: list[int], response: list[int], *, loss_on: str = "response"
) -> Example:
    """Turn a prompt and its response into inputs, targets and loss weights.

    >>> shift_for_next_token([2, 7, 8], [9, 1])
    Example(inputs=[2, 7, 8, 9], targets=[7, 8, 9, 1], weights=[0, 0, 1, 1])

    The weight of a target is 1 where it belongs to the response, or everywhere with `loss_on="all"`. All three have
    shape (len(prompt) + len(response) - 1,).
    """
    ids = prompt + response
    learned = len(prompt) - 1 if loss_on == "response" else 0
    return Example(ids[:-1], ids[1:], [0] * learned + [1] * (len(ids) - 1 - learned))


@dataclass
class Encoded:
    """Encoded records; how many were cut or, for want of room, dropped; and the tokens of all before any cut."""

    examples: list[Example]
    pad_id: int
    numbers: list[int] = field(default_factory=list)  # of the records that the examples are of
    truncated: int = 0
    dropped: int = 0
    full_lengths: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> np.ndarray:
        """Real tokens in each row: int array of shape (rows,)."""
        return np.array([len(example.inputs) for example in self.examples])


def encode(
    model,
    records: Iterable[Mapping[str, str]],
    *,
    template="recipe",
    sequence_length=256,
    loss_on="response",
) -> Encoded:
    """Encode records for training. Every response ends in the template's end token, and that is learned.

    A response that is too long is cut so that the end token still fits, as KerasHub's own packer does.

    Args:
        model: The model whose vocabulary to use, or a tokenizer from `load_tokenizer`.
        records: Dicts with instruction, context and response, such as a `datasets.Dataset`.
        template: Name of a template, or a `Template`.
        sequence_length: Most input tokens a row may have.
        loss_on: "response", or "all" to learn the prompt too, as the published recipe does.

    Raises:
        ValueError: A record is none, or none has room for a response.
    """
    if loss_on not in ("response", "all"):
        raise ValueError(f'loss_on is "response" or "all". Received: {loss_on!r}')
    if not isinstance(sequence_length, int) or sequence_length < 2:
        raise ValueError(f"sequence_length counts tokens, 2 or more. Received: {sequence_length!r}")
    tokenizer, template = tokenizer_of(model), get_template(template)
    end = tokenizer.id_of(template.end)
    encoded = Encoded([], tokenizer.pad_id)
    for number, row in enumerate(records):
        try:
            record = checked_record(row, {})
        except ValueError as error:
            wrong = f'Record {number}: {error} gl.load_records(..., on_error="skip") leaves such records out.'
            raise ValueError(wrong) from None
        prompt, response = (
            tokenizer.prompt(template, record),
            tokenizer.encode(text_pieces(record["response"])),
        )
        encoded.full_lengths.append(len(prompt) + len(response))
        room = sequence_length - len(
            prompt
        )  # the end token is only ever a target, so it needs no room
        if room < 1:
            encoded.dropped += 1
            continue
        encoded.truncated += len(response) > room
        encoded.numbers.append(number)
        encoded.examples.append(
            shift_for_next_token(prompt, [*response[:room], end], loss_on=loss_on)
        )
    if not encoded.full_lengths:
        raise ValueError("There are no records.")
    if not encoded.examples:
        raise ValueError(
            f"Of {encoded.dropped:,} rows, none leaves room for a response within sequence_length={sequence_length}. "
            "Raise sequence_length, shorten the prompts, or look at what the rows hold."
        )
    return encoded


def show_tokens(
    model, records, *, template="recipe", sequence_length=256, loss_on="response"
) -> TokenView:
    """Show records as tokens, in colour: what training on them only reads, what it learns, and padding.

    Args:
        model, template, sequence_length, loss_on: As in `encode`.
        records: One record or a few. Several are padded to the longest; one without room for a response is left out.
    """
    tokenizer = tokenizer_of(model)
    records = [records] if isinstance(records, Mapping) else list(records)
    encoded = encode(
        tokenizer, records, template=template, sequence_length=sequence_length, loss_on=loss_on
    )
    rows = []
    for example in encoded.examples:
        ids, learned = [example.inputs[0], *example.targets], [0, *example.weights]
        kinds = ["learned" if weight else "read" for weight in learned]
        rows.append([*zip(tokenizer.tokens(ids), ids, kinds, strict=True)])
    longest, pad = max(map(len, rows)), ("<pad>", tokenizer.pad_id, "padding")
    return TokenView([row + [pad] * (longest - len(row)) for row in rows])
