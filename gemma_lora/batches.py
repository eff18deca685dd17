"""From records to batches: token ids, targets, and a weight for each target."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import keras
import numpy as np

from gemma_lora.records import checked_record
from gemma_lora.tables import TokenView
from gemma_lora.templates import get_template, text_pieces
from gemma_lora.tokenizer import tokenizer_of

_WIDE = 2048  # tokens of a row whose attention costs a small model about as much as all its layers' products do
SHAPE_STEP = 16  # lengths are padded to multiples of this many tokens


class Example(NamedTuple):
    """One training row: three lists of equal length."""

    inputs: list[int]
    targets: list[int]
    weights: list[int]


def shift_for_next_token(prompt: list[int], response: list[int], *, loss_on: str = "response") -> Example:
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
    model, records: Iterable[Mapping[str, str]], *, template="recipe", sequence_length=256, loss_on="response"
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
        prompt, response = tokenizer.prompt(template, record), tokenizer.encode(text_pieces(record["response"]))
        encoded.full_lengths.append(len(prompt) + len(response))
        room = sequence_length - len(prompt)  # the end token is only ever a target, so it needs no room
        if room < 1:
            encoded.dropped += 1
            continue
        encoded.truncated += len(response) > room
        encoded.numbers.append(number)
        encoded.examples.append(shift_for_next_token(prompt, [*response[:room], end], loss_on=loss_on))
    if not encoded.full_lengths:
        raise ValueError("There are no records.")
    if not encoded.examples:
        raise ValueError(
            f"Of {encoded.dropped:,} rows, none leaves room for a response within sequence_length={sequence_length}. "
            "Raise sequence_length, shorten the prompts, or look at what the rows hold."
        )
    return encoded


def show_tokens(model, records, *, template="recipe", sequence_length=256, loss_on="response") -> TokenView:
    """Show records as tokens, in colour: what training on them only reads, what it learns, and padding.

    Args:
        model, template, sequence_length, loss_on: As in `encode`.
        records: One record or a few. Several are padded to the longest; one without room for a response is left out.
    """
    tokenizer = tokenizer_of(model)
    records = [records] if isinstance(records, Mapping) else list(records)
    encoded = encode(tokenizer, records, template=template, sequence_length=sequence_length, loss_on=loss_on)
    rows = []
    for example in encoded.examples:
        ids, learned = [example.inputs[0], *example.targets], [0, *example.weights]
        kinds = ["learned" if weight else "read" for weight in learned]
        rows.append([*zip(tokenizer.tokens(ids), ids, kinds, strict=True)])
    longest, pad = max(map(len, rows)), ("<pad>", tokenizer.pad_id, "padding")
    return TokenView([row + [pad] * (longest - len(row)) for row in rows])


class Batches(keras.utils.PyDataset):
    """Batches for Keras, all of one shape, every record exactly once an epoch: short records share a row.

    Each batch is `({"token_ids", "padding_mask"}, targets, weights)`, int32, int32, int32 and float32 of shape `shape`.
    `padding_mask` numbers the records of a row, from 1, and is 0 at padding: `TokenTrainer` lets a token attend to its
    own record alone, so that a record's loss and gradient are what they would be if it had the row for itself.

    Args:
        batch_size: Rows of every batch, one record a row. None packs records into rows.
        batch_tokens: Tokens of a batch, padding included; but at least the longest record.
        seed: Records and batches are shuffled anew each epoch, by seed and epoch alone; None keeps their order.
    """

    def __init__(
        self, encoded: Encoded, *, batch_size: int | None = None, batch_tokens: int = 1024, seed: int | None = None
    ):
        super().__init__()
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size counts rows, 1 or more. Received: {batch_size!r}")
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens counts tokens, 1 or more. Received: {batch_tokens!r}")
        self._encoded, self._seed, lengths = encoded, seed, encoded.lengths
        longest = -(-int(lengths.max()) // SHAPE_STEP) * SHAPE_STEP
        if batch_size:
            self._rows, self.shape = [[i] for i in range(len(lengths))], (batch_size, longest)
        else:
            found = []
            for width in [longest * n for n in (1, 2, 3, 4) if n == 1 or longest * n <= batch_tokens]:
                rows = _pack(lengths.tolist(), width)
                size = min(max(1, batch_tokens // width), len(rows))
                tokens = -(-len(rows) // size) * size * width
                found.append((tokens * (1 + width / _WIDE), width, size, rows))
            _, width, size, self._rows = min(found)
            self.shape = size, width
        self.start(0)

    def start(self, epoch: int, *, step: int = 0) -> None:
        """Draw the order of an epoch, and begin at a step of it. (Keras's own hooks count no epochs.)"""
        rows, lengths = self._rows, self._encoded.lengths
        if self._seed is not None:
            rng = np.random.default_rng([self._seed, epoch])
            shuffled, swapped = rng.permutation(len(lengths)), np.empty(len(lengths), int)
            # Records of the same length swap places: other records share a row, and each row is as full as it was.
            swapped[np.argsort(lengths, kind="stable")] = shuffled[np.argsort(lengths[shuffled], kind="stable")]
            rows = [swapped[rows[i]].tolist() for i in rng.permutation(len(rows))]
        self._order = [rows[i : i + self.shape[0]] for i in range(0, len(rows), self.shape[0])]
        self.epoch, self.first = epoch, step

    def rows(self, step: int) -> list[int]:
        """The numbers of a batch's records."""
        return [self._encoded.numbers[i] for row in self._order[step] for i in row]

    def tokens(self, *, learned: bool = True) -> np.ndarray:
        """Tokens in each batch of the whole epoch, those that count in the loss or all: int array (batches,)."""
        sizes = np.array([sum(e.weights) if learned else len(e.inputs) for e in self._encoded.examples])
        return np.array([sum(sizes[row].sum() for row in rows) for rows in self._order])

    def __len__(self) -> int:
        return len(self._order) - self.first

    def __getitem__(self, index: int):
        token_ids, targets = (np.full(self.shape, self._encoded.pad_id, "int32") for _ in range(2))
        numbers, weights = np.zeros(self.shape, "int32"), np.zeros(self.shape, "float32")
        for row, records in enumerate(self._order[self.first + index]):
            start = 0
            for number, i in enumerate(records, 1):
                example = self._encoded.examples[i]
                part = slice(start, start := start + len(example.inputs))
                token_ids[row, part], targets[row, part], weights[row, part] = example
                numbers[row, part] = number
        return {"token_ids": token_ids, "padding_mask": numbers}, targets, weights


def _pack(lengths: list[int], width: int) -> list[list[int]]:
    """Put records into rows of `width` tokens: the longest first, each where it leaves least room (best fit)."""
    rows, with_room = [], [[] for _ in range(width + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], width + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, width
        else:
            row = with_room[room].pop()
        rows[row].append(i)
        with_room[room - lengths[i]].append(row)
    return rows
