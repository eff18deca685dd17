"""From records to batches: token ids, targets, and a weight for each target."""

import keras
import numpy as np

from gemma_lora.tokens import Encoded

_WIDE = 2048  # tokens of a row whose attention costs a small model about as much as all its layers' products do
SHAPE_STEP = 16  # lengths are padded to multiples of this many tokens


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
        self,
        encoded: Encoded,
        *,
        batch_size: int | None = None,
        batch_tokens: int = 1024,
        seed: int | None = None,
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
            for width in [
                longest * n for n in (1, 2, 3, 4) if n == 1 or longest * n <= batch_tokens
            ]:
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
            swapped[np.argsort(lengths, kind="stable")] = shuffled[
                np.argsort(lengths[shuffled], kind="stable")
            ]
            rows = [swapped[rows[i]].tolist() for i in rng.permutation(len(rows))]
        self._order = [rows[i : i + self.shape[0]] for i in range(0, len(rows), self.shape[0])]
        self.epoch, self.first = epoch, step

    def rows(self, step: int) -> list[int]:
        """The numbers of a batch's records."""
        return [self._encoded.numbers[i] for row in self._order[step] for i in row]

    def tokens(self, *, learned: bool = True) -> np.ndarray:
        """Tokens in each batch of the whole epoch, those that count in the loss or all: int array (batches,)."""
        sizes = np.array(
            [sum(e.weights) if learned else len(e.inputs) for e in self._encoded.examples]
        )
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
