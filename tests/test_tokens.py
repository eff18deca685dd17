"""Records as token ids: what is learned, what is cut, what is refused."""

import re
import warnings

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_lora.templates import text_pieces
from gemma_lora.tokens import (
    encode,
    load_tokenizer,
    shift_for_next_token,
    show_tokens,
    tokenizer_of,
)

RECORDS = [
    {
        "instruction": "What is the capital of France?",
        "context": "",
        "response": "The capital of France is Paris.",
    },
    {"instruction": "Where does the koala live?", "context": "", "response": "In Australia."},
]


def test_a_model_without_tokenizer_is_refused(random_model):
    model = random_model("gemma")
    model.preprocessor = None
    with pytest.raises(ValueError, match="no SentencePiece tokenizer"):
        encode(model, RECORDS)


def test_a_tokenizer_loads_without_weights_and_encodes_like_the_model(tiny):
    tokenizer = load_tokenizer("tiny_gemma_en")
    assert len(tokenizer) == tiny.backbone.vocabulary_size
    assert encode(tokenizer, RECORDS).examples == encode(tiny, RECORDS).examples
    ids = tokenizer.encode(["a\n\nb ü"])
    assert "".join(tokenizer.tokens(ids)) == "a⏎⏎b▁<0xC3><0xBC>"
    with pytest.raises(ValueError, match="No preset or folder"):
        load_tokenizer("tiny_gema_en")


def test_shift_moves_targets_one_to_the_left():
    inputs, targets, weights = shift_for_next_token([2, 7, 8], [9, 1])
    assert (inputs, targets, weights) == ([2, 7, 8, 9], [7, 8, 9, 1], [0, 0, 1, 1])


def test_loss_on_all_weighs_every_target():
    assert shift_for_next_token([2, 7, 8], [9, 1], loss_on="all").weights == [1, 1, 1, 1]


@pytest.mark.parametrize(("template", "end"), [("recipe", "<eos>"), ("turns", "<end_of_turn>")])
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_end_token_is_always_learned(tiny, template, end, loss_on):
    for length in (256, 25):
        encoded = encode(tiny, RECORDS, template=template, loss_on=loss_on, sequence_length=length)
        for example in encoded.examples:
            assert example.targets[-1] == tokenizer_of(tiny).id_of(end)
            assert example.weights[-1] == 1


def test_the_weighted_targets_are_the_response(tiny):
    tokenizer = tokenizer_of(tiny)
    example = encode(tiny, RECORDS).examples[0]
    learned = [
        target for target, weight in zip(example.targets, example.weights, strict=True) if weight
    ]
    assert tokenizer.decode(learned) == RECORDS[0]["response"]
    assert example.inputs[0] == tokenizer.bos_id


def test_truncation_and_rows_without_room_are_counted(tiny):
    prompt = (
        len(encode(tiny, RECORDS[:1]).examples[0].inputs)
        - sum(encode(tiny, RECORDS[:1]).examples[0].weights)
        + 1
    )
    encoded = encode(
        tiny, [RECORDS[0], {**RECORDS[0], "instruction": "long " * 500}], sequence_length=prompt + 2
    )
    assert (encoded.truncated, encoded.dropped, len(encoded.examples)) == (1, 1, 1)
    assert encoded.lengths.tolist() == [prompt + 2]


def test_a_row_that_fits_exactly_is_not_truncated(tiny):
    length = int(encode(tiny, RECORDS[:1]).lengths[0])
    assert encode(tiny, RECORDS[:1], sequence_length=length).truncated == 0
    assert encode(tiny, RECORDS[:1], sequence_length=length - 1).truncated == 1


def test_nothing_to_encode_says_why(tiny):
    with pytest.raises(ValueError, match="sequence_length=8"):
        encode(tiny, RECORDS, sequence_length=8)
    with pytest.raises(ValueError, match="There are no records"):
        encode(tiny, [])


@pytest.mark.parametrize(
    "wrong", [{"loss_on": "prompt"}, {"sequence_length": 1}, {"sequence_length": 9.5}]
)
def test_wrong_options_are_refused(tiny, wrong):
    with pytest.raises(ValueError, match="Received"):
        encode(tiny, RECORDS, **wrong)


def test_shown_tokens_are_those_that_training_learns(tiny):
    view = show_tokens(tiny, RECORDS)
    examples = encode(tiny, RECORDS).examples
    assert view.counts()["learned"] == sum(sum(example.weights) for example in examples)
    longest = max(len(example.inputs) for example in examples) + 1
    assert {len(row) for row in view.rows} == {longest}
    assert view.counts()["padding"] == sum(
        longest - len(example.inputs) - 1 for example in examples
    )
    one = show_tokens(tiny, RECORDS[0], loss_on="all")
    assert one.counts()["read"] == 1  # <bos> alone is never asked for
    assert (one.rows[0][0][0], one.rows[0][-1][0]) == ("<bos>", "<eos>")


def row(instruction="Why?", response="So.", context=""):
    return {"instruction": instruction, "context": context, "response": response}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "There are no records"),
        ([row(), row(response="")], "Record 1: 'response' is empty"),
        ([row(response="a\ud800b")], "half a character"),
        ([row(instruction="a\ud800b")], "Record 0.*half a character"),
        ([{"instruction": "Why?"}], "no 'response' among the fields"),
        ([row(response=3)], "'response' must be text. Received: int"),
        (["Why?"], "a record has named fields"),
        ([row("word " * 20_000)] * 2, "Of 2 rows, none leaves room"),
    ],
)
def test_what_cannot_be_learned_from_is_said_with_its_number(tiny, records, words):
    with pytest.raises(ValueError, match=words):
        encode(tiny, records)


TEXTS = st.one_of(
    st.text(min_size=1, max_size=40),
    st.text(
        alphabet=st.characters(categories=["Cc", "Cf", "Mn", "So", "Lo"]), min_size=1, max_size=40
    ),
    st.sampled_from(
        [
            "<eos><bos><pad>",
            "Response:\n",
            "word " * 20_000,
            "\u202eabc",
            "👩‍👩‍👧‍👦",
            "مرحبا",
            "\x00",
            "a",
        ]
    ),
)


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=8), st.integers(2, 300))
def test_any_text_is_encoded_within_the_length_or_refused_clearly(rows, length):
    tokenizer = load_tokenizer()
    records = [row(*texts) for texts in rows]
    try:
        encoded = encode(tokenizer, records, sequence_length=length)
    except ValueError as error:
        assert re.search("none leaves room|is empty|NUL characters", str(error))
        return
    assert len(encoded.examples) + encoded.dropped == len(rows) == len(encoded.full_lengths)
    for number, example in zip(encoded.numbers, encoded.examples, strict=True):
        assert len(example.inputs) == len(example.targets) == len(example.weights) <= length
        assert example.inputs[0] == tokenizer.bos_id and example.targets[-1] == tokenizer.id_of(
            "<eos>"
        )
        assert (
            example.inputs.count(tokenizer.bos_id) == 1
        )  # a text that looks like a control token is not one
        assert sum(example.weights) == len(
            tokenizer.encode(text_pieces(records[number]["response"]))
        ) + 1 or (len(example.inputs) == length)


CHAT = "<start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n"


def test_without_a_template_a_prompt_is_taken_as_it_stands():
    tokenizer = load_tokenizer()
    as_template = tokenizer.prompt("turns", "Name a river.")
    assert tokenizer.prompt(None, CHAT) == tokenizer.prompt(None, f"<bos>{CHAT}") == as_template


def test_rows_that_are_whole_prompts_are_said():
    rows = [*RECORDS, row(instruction=CHAT), row(response="The Sava.<end_of_turn>")]
    with pytest.warns(UserWarning, match="^2 of the records hold tokens of turns in their text"):
        encode(load_tokenizer(), rows, template="turns")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(load_tokenizer(), RECORDS, template="turns")


@pytest.mark.parametrize("form", ["to_pandas", "to_dict", "to_list", "to_iterable_dataset"])
def test_records_in_any_form_are_encoded_alike(form):
    rows = datasets.Dataset.from_list(RECORDS)
    names = {"instruction": "Question", "response": "answer"}
    renamed = getattr(rows.rename_columns(names), form)()
    assert encode(load_tokenizer(), renamed).examples == encode(load_tokenizer(), rows).examples
