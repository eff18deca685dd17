"""What an audit of records finds, and that it finds nothing in clean ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_lora as gl
from gemma_lora.records import question_of

CLEAN = [
    {"question": "What is the capital of France?", "answer": "The capital of France is Paris."},
    {"question": "What is the capital of Spain?", "answer": "The capital of Spain is Madrid."},
    {"question": "How do bees find their way home?", "answer": "They remember the sun's place."},
    {"question": "Name a river in Europe.", "answer": "The Danube"},
]


def found(train, held_out=None) -> dict[str, list[int]]:
    return {f"{f.what} ({f.where})": f.rows for f in gl.audit(train, held_out).findings}


def row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def test_clean_records_have_no_finding():
    audit = gl.audit(CLEAN[:2], CLEAN[2:])
    assert audit.findings == []
    assert str(audit) == "Looked at 2 train, 2 held out: nothing found"


def test_doubles_are_found_whatever_their_case_and_blanks():
    rows = [
        *CLEAN,
        row("what is the  capital of France ?", "The capital of france is Paris."),
        row("Name a river in Europe", "The Rhine"),
        row("How do the bees find their way home?", "By smell."),
    ]
    assert found(rows) == {
        "the same record again (train)": [4],
        "the same question, another answer (train)": [5],
        "nearly the same question (train)": [6],
    }
    audit = gl.audit(rows)
    assert audit.rows() == [4, 5, 6]
    assert "(like row 2: How do bees find their way home?)" in str(audit.table()["example"])


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("…", "a response without a word"),
        ("word and word or " * 200, "a very long response"),
        ("I do not know that. " * 12, "a response that repeats itself"),
        ("It is a long story, " + "which began in another time and at another place, and " * 2
         + "then", "a long response without a sign at its end"),
    ],
)  # fmt: skip
def test_responses_that_no_model_should_learn_are_found(answer, what):
    assert found([*CLEAN, row("Why?", answer)])[f"{what} (train)"] == [4]


def test_leaks_are_found_by_question_and_by_answer():
    held_out = [
        row("what is the capital of Spain", "Madrid"),
        row("How do the bees find their way home?", "By smell."),
        row("Paris is the capital of which land?", "The capital of France is Paris."),
        row("Name a sea.", "The Danube"),
    ]
    assert found(CLEAN, held_out) == {
        "a question that training has, too (held out)": [0],
        "nearly a question of training (held out)": [1],
        "an answer of training, word for word (held out)": [2],
    }


def test_a_split_of_load_records_has_no_question_on_both_sides():
    rows = [row(f"Is {n // 2} odd{'?' if n % 2 else ' ?'}", f"Look at {n}.") for n in range(40)]
    train, held_out = gl.load_records(rows, held_out=0.3, seed=0)
    assert "a question that training has, too (held out)" not in found(train, held_out)


def test_the_small_world_is_as_clean_as_it_says():
    train, held_out = (part.select(range(400)) for part in gl.load_tiny_world())
    leaks = {what: rows for what, rows in found(train, held_out).items() if "held out" in what}
    assert "a question that training has, too (held out)" not in leaks


def test_a_wrong_record_is_said():
    with pytest.raises(ValueError, match="no 'response' among the fields"):
        gl.audit([{"question": "Why?"}])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=12))
def test_every_row_after_the_first_of_its_question_is_a_double(pairs):
    rows = [row(f"Question {q}", f"Answer {a}") for q, a in pairs]
    audit = gl.audit(rows)
    first = {}
    for number, record in enumerate(rows):
        first.setdefault(record["question"], number)
    doubles = {n for n in range(len(rows)) if n not in first.values()}
    kinds = ("the same record again", "the same question, another answer")
    assert {n for f in audit.findings if f.what in kinds for n in f.rows} == doubles
    assert question_of({"instruction": "A  b!", "context": ""}) == "a b"
