"""Solutions are right, wrong answers get the hint that names the misconception."""

import html
import re
from itertools import pairwise

import keras
import nbformat
import numpy as np
import pytest

import gemma_lora as gl
from notebooks import NOTEBOOKS

# For each exercise: wrong answers that learners give, and what the hint must speak of.
WRONG = {
    "template": [
        ("Question: {instruction}\nAnswer: {response}\n", "holds the response"),
        ("Question: {instruction}\nAnswer: ", "ends in a space"),
        ("Question: {instruction}\nAnswer:", "follow your cue without a space"),
        ("Question: {question}\nAnswer:\n", r"\['question'\]"),
        ("{instruction}\n", "Nothing marks the end"),
        ("Question: {instruction\n", "braces"),
        (7, "is text"),
    ],
    "loss_weights": [
        ([0] * 7 + [1] * 4, "11 weights for 10 targets"),
        ([1] * 10, "loss_on='all'"),
        ([0] * 7 + [1] * 3, "One zero too many"),
        ([0] * 6 + [1] * 3 + [0], "never learns to stop"),
        ([0] * 3 + [1] * 7, "belongs to the response"),
        ("0000001111", "list of zeros and ones"),
    ],
    "sequence_length": [
        (112, "longer is not safer"),
        (256, "longer is not safer"),
        (48, "Half of all records"),
        (80, "too many"),
        (83, "multiples of 16"),
        ("long", "Answer with a number"),
    ],
    "sampler": [
        ("top_k", "another seed"),
        ("beam", "five times the work"),
        ("random", "A seed repeats"),
        (3, "a name"),
    ],
    "new_tokens": [
        (64, "counts the prompt too"),
        (49, "That is the prompt"),
        (113, "includes it"),
        (20, "Take the"),
    ],
    "distinct_share": [
        (5, "Divide by all pairs"),
        (5 / 7, "only 6 pairs"),
        (4 / 7, "single words"),
        (1 / 6, "share of repeats"),
        (0.9, "List the"),
    ],
    "adapter_parameters": [
        (16_896, "That is rank 4"),
        (8_448, "That is one layer"),
        (16_896 * 16, "not with its square"),
        (5 * 192 * 48 * 4, "frozen weights themselves"),
        (1, "query heads"),
    ],
    "steps": [
        (162, "That is one epoch"),
        (2580, "a batch of 8"),
        (20_640, "fewer steps, not more"),
        (322, "is a step all the same"),
        (323, "mixes two epochs"),
        (5, "Batches in an epoch"),
    ],
    "best_epoch": [
        (4, "by heart"),
        (1, "counted from 1"),
        (3, "risen again"),
        (True, "Answer with a number"),
    ],
    "questions_needed": [
        (384, "worst case"),
        (35, "twice as far"),
        (553, "half the reach"),
        (20, "square root"),
        (float("nan"), "Answer with a number"),
    ],
    "fair_comparison": [
        ("A", "seen these"),
        ("B", "Two things changed"),
        ("D", "choose what"),
        (1, "a letter"),
    ],
    "perplexity_of": [
        (2**0.69, "nats, not bits"),
        (0.69, "the loss itself"),
        (0.5, "mean probability"),
        (9, "exp"),
    ],
}


def exercises():
    """Every exercise of the notebooks, with the name of its check as the id.

    Yields (cell, code of the solution that unfolds under it).
    """
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for cell, below in pairwise(cells):
            if "exercise" in cell.metadata.get("tags", []):
                solution = re.fullmatch(
                    r"<details><summary>Solution</summary>\n<pre><code>(.*?)</code></pre>\n<br>\n<p>.+</p>\n</details>",
                    below.source,
                    re.DOTALL,
                )
                assert solution, f"{path.name}: no solution unfolds under {cell.id}"
                yield pytest.param(
                    cell,
                    html.unescape(solution[1]),
                    id=re.search(r"gl\.exercises\.(\w+)", cell.source)[1],
                )


@pytest.fixture
def namespace(tiny):
    """What the notebooks have made before their exercises."""
    heads = tiny.backbone.num_query_heads + tiny.backbone.num_key_value_heads
    encoded = gl.encode(tiny, gl.load_tiny_world()[0])
    return {
        "gl": gl,
        "np": np,
        "model": tiny,
        "shape": tiny.backbone,
        "heads": heads,
        "encoded": encoded,
    }


def run(cell, namespace: dict, answer: str):
    """Run an exercise's cell with an answer in place of None; return what it shows."""
    source, replaced = re.subn(
        r"^(MY_\w+) = None.*$", lambda _: answer, cell.source, flags=re.MULTILINE
    )
    assert replaced == 1
    *lines, last = source.splitlines()
    exec("\n".join(lines), namespace)
    return eval(last, namespace)


@pytest.mark.parametrize(("cell", "solution"), exercises())
def test_the_solution_is_right_and_none_is_not_yet_an_answer(cell, solution, namespace):
    assert run(cell, namespace, solution).right
    unanswered = run(cell, namespace, re.search(r"^MY_\w+ = None", cell.source, re.MULTILINE)[0])
    assert not unanswered.right
    assert str(unanswered).startswith("Your turn.")


@pytest.mark.parametrize(("cell", "solution"), exercises())
def test_wrong_answers_get_a_hint_that_names_the_misconception(cell, solution, namespace, request):
    name = request.node.callspec.id
    assert len(WRONG[name]) >= 2
    variable = re.search(r"^MY_\w+", cell.source, re.MULTILINE)[0]
    for answer, hint in WRONG[name]:
        verdict = run(cell, namespace | {"nan": float("nan")}, f"{variable} = {answer!r}")
        assert not verdict.right, answer
        assert re.search(hint, verdict.text), (answer, verdict)
        assert str(verdict).startswith("Not yet.")


def test_answers_of_other_types_are_judged_alike(tiny):
    check = gl.exercises
    assert check.loss_weights(np.array([0, 0, 1, 1]), prompt=3, response=2).right
    assert check.fair_comparison(" c").right
    assert check.sampler("Greedy").right
    assert check.adapter_parameters(np.int64(16_896), model=tiny, rank=4).right
    assert check.new_tokens(15.0, prompt=49, max_length=64).right
    assert check.perplexity_of(keras.ops.exp(0.69), loss=0.69).right
    assert not check.perplexity_of(2**0.1, loss=0.1).right
    assert check.loss_weights([1, 1], prompt=1, response=2).right
    assert "by heart" in check.best_epoch(3, training=[3, 2, 1], held_out=[3, 2, 4]).text
    assert "one more epoch" in check.best_epoch(3, training=[3, 2, 1], held_out=[3, 2, 1]).text
    for odd in ([[0], [1]], {}, "x", 1.5):
        assert not check.loss_weights(odd, prompt=3, response=2).right
        assert not check.fair_comparison(odd).right
        assert not check.steps(odd, rows=10, batch_size=4, epochs=1).right


def test_every_notebook_from_02_to_05_has_three_exercises_and_all_are_tested():
    found = {path.stem[:2]: path.read_text().count('"exercise"') for path in NOTEBOOKS}
    assert all(found[number] >= 3 for number in ("02", "03", "04", "05"))
    assert {case.id for case in exercises()} == set(WRONG)


def test_a_verdict_is_escaped_in_html():
    assert "&lt;b&gt;" in gl.exercises.Verdict(False, "<b>")._repr_html_()


def test_the_rubric_shows_marks_and_their_means():
    table = gl.Table([{"prompt": "one", "tuned": ""}, {"prompt": "two", "tuned": ""}])
    marked = gl.exercises.rubric(table, [[2, 2, 0], [2, 1, None]])
    assert marked[0] == {"prompt": "one", "coherent": "yes", "relevant": "yes", "right": "no"}
    assert marked[1]["right"] == "to do"
    assert marked[2] == {
        "prompt": "mean",
        "coherent": "2.0 of 2",
        "relevant": "1.5 of 2",
        "right": "0.0 of 2",
    }
    for wrong in ([[2, 2, 0]], [[2, 2, 0], [1, 1]], [[2, 2, 3], [0, 0, 0]], [2, 2]):
        with pytest.raises(ValueError, match="three marks"):
            gl.exercises.rubric(table, wrong)
