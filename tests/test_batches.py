"""Every record once an epoch, in batches of one shape, at little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import RECORDS

from gemma_lora.batches import Batches
from gemma_lora.tokens import Encoded, Example, encode


def test_every_record_is_in_an_epoch_exactly_once_in_one_shape(tiny):
    records = [{"instruction": "a " * n, "context": "", "response": f"{n}"} for n in range(1, 60)]
    encoded = encode(tiny, records)
    for size in ({"batch_size": 4}, {"batch_tokens": 300}):
        batches = Batches(encoded, **size, seed=0)
        orders = []
        for epoch in range(2):
            batches.start(epoch)
            order = [
                tuple(ids[numbers == number])
                for features, *_ in batches
                for ids, numbers in zip(
                    features["token_ids"], features["padding_mask"], strict=True
                )
                for number in range(1, numbers.max() + 1)
            ]
            assert sorted(order) == sorted(tuple(example.inputs) for example in encoded.examples)
            orders.append(order)
        assert orders[0] != orders[1]


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=300),
    batch_size=st.one_of(st.none(), st.integers(1, 20)),
    tokens=st.integers(1, 2000),
    epoch=st.integers(0, 5),
)
def test_whatever_the_lengths_each_record_comes_once_whole_and_in_one_shape(
    lengths, batch_size, tokens, epoch
):
    examples = [
        Example([number] * length, [number] * length, [1] * length)
        for number, length in enumerate(lengths)
    ]
    encoded = Encoded(examples, pad_id=-1, numbers=[*range(len(lengths))])
    batches = Batches(encoded, batch_size=batch_size, batch_tokens=tokens, seed=0)
    batches.start(epoch)
    rows, width = batches.shape
    assert rows == batch_size or (
        batch_size is None and rows * width <= max(tokens, max(lengths) + 15)
    )
    seen = []
    for step, (features, targets, weights) in enumerate(batches):
        ids, numbers = features["token_ids"], features["padding_mask"]
        assert ids.shape == numbers.shape == targets.shape == weights.shape == batches.shape
        assert (ids == targets).all()
        assert ((weights == 1) == (numbers > 0)).all()
        assert ((ids == -1) == (numbers == 0)).all()
        in_batch = []
        for row in range(rows):
            for number in range(1, numbers[row].max() + 1):
                record = ids[row][numbers[row] == number]
                assert (record == record[0]).all() and len(record) == lengths[record[0]]
                in_batch.append(record[0])
        assert in_batch == batches.rows(step)
        assert len(ids[ids >= 0]) == batches.tokens()[step] == batches.tokens(learned=False)[step]
        seen += in_batch
    assert sorted(seen) == [*range(len(lengths))]


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 3000).astype(int).clip(3, 256)
    encoded = Encoded([Example([0] * n, [0] * n, [1] * n) for n in lengths], 0)
    for batch_tokens in (256, 1024):
        batches = Batches(encoded, batch_tokens=batch_tokens)
        assert lengths.sum() / (len(batches) * np.prod(batches.shape)) > 0.97


def of_lengths(lengths) -> Encoded:
    examples = [Example([7] * n, [8] * n, [1] * n) for n in lengths]
    return Encoded(examples, pad_id=0, numbers=[*range(len(lengths))])


def test_shuffling_mixes_records_and_keeps_every_row_as_full():
    lengths = np.random.default_rng(1).integers(3, 60, 400)
    batches = Batches(of_lengths(lengths), batch_tokens=256, seed=0)
    rows_of_epochs = []
    for epoch in range(3):
        batches.start(epoch)
        rows_of_epochs.append([tuple(row) for rows in batches._order for row in rows])
    first, *others = [
        sorted(sorted(lengths[list(row)].tolist()) for row in rows) for rows in rows_of_epochs
    ]
    assert all(other == first for other in others)
    # Records that nobody shares a length with can only move with their row.
    assert len(set(rows_of_epochs[0]) & set(rows_of_epochs[1])) < len(rows_of_epochs[0]) / 4


def test_without_a_seed_records_keep_their_order():
    batches = Batches(of_lengths([5, 9, 5, 7]), batch_size=2)
    batches.start(1)
    assert [batches.rows(step) for step in range(2)] == [[0, 1], [2, 3]]


def test_an_index_outside_of_the_epoch_is_refused():
    batches = Batches(of_lengths([5] * 9), batch_size=2, seed=0)
    batches.start(0, step=3)
    assert len(list(batches)) == len(batches) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError, match="2 batches"):
            batches[index]


@pytest.mark.parametrize("name", ["batch_size", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8"])
def test_sizes_that_are_no_numbers_of_rows_or_tokens_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is a whole number.* Received: {name}={value!r}"):
        Batches(of_lengths([5]), **{name: value})


def test_an_epoch_can_begin_at_a_step(tiny):
    whole, rest = (Batches(encode(tiny, RECORDS * 20), batch_size=4, seed=0) for _ in range(2))
    whole.start(3)
    rest.start(3, step=5)
    assert len(rest) == len(whole) - 5
    for i in range(len(rest)):
        assert np.array_equal(rest[i][1], whole[i + 5][1])
        assert rest.rows(i + 5) == whole.rows(i + 5)


def test_the_same_seed_gives_the_same_order(tiny):
    encoded = encode(tiny, RECORDS * 20)
    one, two, other = (Batches(encoded, batch_size=4, seed=seed) for seed in (1, 1, 2))
    first = [np.concatenate([batch[1] for batch in batches]) for batches in (one, two, other)]
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_padding_weighs_nothing(tiny):
    features, _, weights = Batches(encode(tiny, RECORDS), batch_size=4)[0]
    assert (weights[features["padding_mask"] == 0] == 0).all()
    assert weights.sum() == sum(sum(example.weights) for example in encode(tiny, RECORDS).examples)
