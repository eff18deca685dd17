"""The README's claims about the small model, for several seeds."""

import pytest
from benchmarks.small_world import EXACT, VARIANTS, measure


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("adapters", "share"), zip(VARIANTS, (0.85, 0.93, 0.93), strict=True))
def test_one_epoch_teaches_to_answer_about_held_out_subjects(adapters, share, seed):
    row = measure(seed, VARIANTS[adapters])
    assert row["before"] <= 0.05
    assert row["+".join(EXACT)] >= share
    assert row["warm epoch seconds"] <= 15
