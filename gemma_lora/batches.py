"""Arrange encoded records in batches of one shape, several short records to a row.

One shape, because every new shape must be compiled. Several records to a row, because
the steps then compute little padding. This module knows nothing about the model: that a
token attends to its own record only is done in `loss`.
"""

import numpy as np

from gemma_lora.options import whole_number
from gemma_lora.tokens import Encoded

# Lengths are padded to multiples of this many tokens.
SHAPE_STEP = 16

# In a row of this many tokens, attention costs a small model about as much as the
# matrix products of all its layers.
_WIDE = 2048


class Batches:
    """Batches of one shape, with every record exactly once in an epoch.

    `batches[i]` is `({"token_ids", "padding_mask"}, targets, weights)`: int32, int32,
    int32 and float32 arrays of shape `shape`. `padding_mask` numbers the records of a
    row from 1, and is 0 at padding. Training lets a token attend to its own record
    only, so that a record's loss and gradient are what they would be if it had the row
    for itself.

    >>> from gemma_lora.tokens import Example
    >>> examples = [Example([7] * n, [8] * n, [1] * n) for n in (10, 4)]
    >>> batches = Batches(Encoded(examples, pad_id=0, numbers=[0, 1]), batch_tokens=16)
    >>> features, targets, weights = batches[0]
    >>> features["padding_mask"]
    array([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]], dtype=int32)

    Args:
        encoded: What `encode` returned.
        batch_size: Rows of every batch, one record to a row. None packs records into
            rows.
        batch_tokens: Tokens of a batch, padding included; but at least the longest
            record.
        seed: Records and batches are shuffled in each epoch, by seed and epoch alone.
            None keeps their order.

    Attributes:
        shape: Rows and tokens of every batch.
        epoch: The epoch whose order this is.
        first: The step of the epoch that `batches[0]` is; 0 unless it began in the
            middle.

    Raises:
        ValueError: `batch_size` or `batch_tokens` is not a positive whole number.
    """

    def __init__(
        self,
        encoded: Encoded,
        *,
        batch_size: int | None = None,
        batch_tokens: int = 1024,
        seed: int | None = None,
    ):
        batch_tokens = whole_number("batch_tokens", batch_tokens)
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size)
        self._encoded = encoded
        self._seed = seed
        lengths = encoded.lengths.tolist()
        # Rounded up to a multiple.
        longest = -(-max(lengths) // SHAPE_STEP) * SHAPE_STEP
        if batch_size is None:
            self._rows, self.shape = _packed(lengths, longest, batch_tokens)
        else:
            self._rows = [[record] for record in range(len(lengths))]
            self.shape = (batch_size, longest)
        self.start(0)

    def start(self, epoch: int, *, step: int = 0) -> None:
        """Draw the order of an epoch, and begin at one of its steps.

        Shuffling keeps how full each row is: records of the same length swap places,
        and then whole rows do. So every epoch has as many batches, and as little
        padding.

        >>> from gemma_lora.tokens import Example
        >>> examples = [Example([7] * n, [8] * n, [1] * n) for n in (10, 10, 6, 6)]
        >>> encoded = Encoded(examples, pad_id=0, numbers=[0, 1, 2, 3])
        >>> batches = Batches(encoded, batch_tokens=16, seed=0)
        >>> [batches.rows(step) for step in range(2)]
        [[1, 2], [0, 3]]
        >>> batches.start(1)
        >>> [batches.rows(step) for step in range(2)]
        [[1, 3], [0, 2]]
        """
        rows = self._rows
        if self._seed is not None:
            rng = np.random.default_rng([self._seed, epoch])
            other = _same_length(self._encoded.lengths, rng)
            rows = [other[rows[i]].tolist() for i in rng.permutation(len(rows))]
        size = self.shape[0]
        # For each step, its rows; for each row, the indices of its records.
        self._order = [rows[i : i + size] for i in range(0, len(rows), size)]
        self.epoch = epoch
        self.first = step

    def rows(self, step: int) -> list[int]:
        """Return the numbers of the records in the batch of a step of the epoch."""
        return [self._encoded.numbers[record] for row in self._order[step] for record in row]

    def tokens(self, *, learned: bool = True) -> np.ndarray:
        """Count the tokens in each batch of the whole epoch: int array (batches,).

        Args:
            learned: Count the targets that have a weight. False counts all but padding.
        """
        examples = self._encoded.examples
        sizes = np.array([sum(e.weights) if learned else len(e.inputs) for e in examples])
        return np.array([sum(sizes[row].sum() for row in rows) for rows in self._order])

    @property
    def steps_an_epoch(self) -> int:
        """The batches of a whole epoch."""
        return len(self._order)

    def __len__(self) -> int:
        """Count the batches from `first` to the end of the epoch."""
        return len(self._order) - self.first

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            # Python's `for batch in batches` ends here.
            raise IndexError(f"There are {len(self)} batches. Received: index={index}")
        token_ids = np.full(self.shape, self._encoded.pad_id, "int32")
        targets = np.full(self.shape, self._encoded.pad_id, "int32")
        weights = np.zeros(self.shape, "float32")
        numbers = np.zeros(self.shape, "int32")
        for row, records in enumerate(self._order[self.first + index]):
            start = 0
            for number, record in enumerate(records, start=1):
                example = self._encoded.examples[record]
                stop = start + len(example.inputs)
                token_ids[row, start:stop] = example.inputs
                targets[row, start:stop] = example.targets
                weights[row, start:stop] = example.weights
                numbers[row, start:stop] = number
                start = stop
        return {"token_ids": token_ids, "padding_mask": numbers}, targets, weights


def _packed(
    lengths: list[int], longest: int, batch_tokens: int
) -> tuple[list[list[int]], tuple[int, int]]:
    """Choose the width of a row and pack the records: (rows, shape of a batch).

    A row can be one to four times as wide as the longest record, if a batch has so many
    tokens. Wide rows can be filled better, and a batch of a few wide rows comes closer
    to `batch_tokens`. But a token attends to its whole row (the mask only hides the
    other records' tokens), so attention costs more in a wide row. We pack each way and
    take the cheapest, in units of a token's matrix products:

        cost of an epoch = tokens in it, padding included, times (1 + width / 2048)

    Five records of 100 tokens, in batches of at most 512 tokens:

        width   records a row   rows a batch   batches   tokens   cost
          112               1              4         2      896    945
          224               2              2         2      896    994
          336               3              1         2      672    782
          448               4              1         2      896   1092

    >>> _packed([100] * 5, longest=112, batch_tokens=512)
    ([[0, 1, 2], [3, 4]], (1, 336))
    """
    best_cost = float("inf")
    for times in (1, 2, 3, 4):
        width = times * longest
        if times > 1 and width > batch_tokens:
            break
        rows = _pack(lengths, width)
        # Never more rows than there are: with few records, a batch is smaller.
        size = min(max(1, batch_tokens // width), len(rows))
        batches = -(-len(rows) // size)
        cost = batches * size * width * (1 + width / _WIDE)
        if cost < best_cost:
            best_cost = cost
            best = rows, (size, width)
    return best


def _pack(lengths: list[int], width: int) -> list[list[int]]:
    """Put records into rows of `width` tokens, by "best fit decreasing".

    The longest record comes first, and each goes into the row where it leaves the least
    room. That takes at most about 11/9 as many rows as the best packing would (Johnson,
    1973), and hardly any more where lengths differ as much as those of real records.

    Rows of 8: record 0 (5 tokens) and record 3 (4) do not fit together, so each begins
    a row. Record 1 (3) fills up the first. Records 2 (2) and 4 (1) go into the second.

    >>> _pack([5, 3, 2, 4, 1], width=8)
    [[0, 1], [3, 2, 4]]
    """
    rows = []
    # For each number of free tokens, the rows that have just so many: a search over the
    # width of a row, and not over all the rows there are.
    rows_with_room = [[] for _ in range(width + 1)]
    longest_first = sorted(range(len(lengths)), key=lambda record: -lengths[record])
    for record in longest_first:
        length = lengths[record]
        rooms = (room for room in range(length, width + 1) if rows_with_room[room])
        room = next(rooms, None)
        if room is None:
            # No row has room for it.
            row = len(rows)
            rows.append([])
            room = width
        else:
            row = rows_with_room[room].pop()
        rows[row].append(record)
        rows_with_room[room - length].append(row)
    return rows


def _same_length(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw, for each record, a record of the same length that takes its place.

    Two lists of all records, both sorted by length. In the first, records of one length
    stand in their own order; in the second, in a random order. The record at a place of
    the first list is replaced by the record at the same place of the second:

        first    1 2 4 | 0 3     records of 3 tokens | of 5 tokens
        second   4 1 2 | 3 0     so 1 -> 4, 2 -> 1, 4 -> 2, 0 -> 3, 3 -> 0

    >>> lengths = np.array([5, 3, 3, 5, 3])
    >>> other = _same_length(lengths, np.random.default_rng(5))
    >>> other.tolist(), lengths[other].tolist()
    ([3, 4, 1, 0, 2], [5, 3, 3, 5, 3])

    Returns:
        An int array of shape (records,): each record once.
    """
    shuffled = rng.permutation(len(lengths))
    # A stable sort keeps the order of equals, so the second list is random within a
    # length.
    first = np.argsort(lengths, kind="stable")
    second = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    other = np.empty(len(lengths), int)
    other[first] = second
    return other
