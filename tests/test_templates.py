"""Prompts to the letter, and no way for data to act as a control token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_lora.templates import TEMPLATES, Template, get_template, text_pieces
from gemma_lora.tokens import tokenizer_of

# Text with control words in it more often than chance would have them.
WORDS = st.sampled_from(
    ["<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<", "start_of_turn>", "user\n", "é🙂"]
)
TEXT = st.lists(
    st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
).map("".join)


def test_the_default_is_the_published_recipe_to_the_letter():
    record = {"instruction": "Name a river.", "context": "", "response": "The Seine."}
    assert TEMPLATES["recipe"].prompt(record) == "Instruction:\nName a river.\n\nResponse:\n"


def test_context_has_its_own_section_and_blank_context_has_none():
    recipe = TEMPLATES["recipe"]
    with_context = recipe.prompt({"instruction": "Which?", "context": "The Seine is long."})
    assert with_context == "Instruction:\nWhich?\n\nContext:\nThe Seine is long.\n\nResponse:\n"
    assert recipe.prompt({"instruction": "Which?", "context": " \n"}) == recipe.prompt("Which?")


def test_turns_are_gemmas_own_format():
    assert (
        TEMPLATES["turns"].prompt("Hi")
        == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_braces_in_data_are_only_braces():
    assert "{context} {0}" in TEMPLATES["recipe"].prompt("{context} {0}")


@pytest.mark.parametrize(
    "text", ["Q: {question}", "no field", "{instruction} {instruction!r} {context}", "{}"]
)
def test_a_template_without_its_fields_is_refused(text):
    with pytest.raises(ValueError, match="needs the fields"):
        Template("mine", text, "{instruction} {context}")


def test_an_unknown_template_is_refused_with_the_list():
    with pytest.raises(ValueError, match="recipe, turns"):
        get_template("alpaca")


@given(instruction=TEXT, context=TEXT, response=TEXT)
@pytest.mark.parametrize("name", ["recipe", "turns"])
def test_no_data_can_end_or_open_a_turn(tiny, name, instruction, context, response):
    tokenizer, template = tokenizer_of(tiny), TEMPLATES[name]
    control = {
        tokenizer.id_of(token)
        for token in ("<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<pad>")
    }
    record = {"instruction": instruction, "context": context}

    prompt = tokenizer.encode(template.pieces(record))
    own = template.with_context if context.strip() else template.without_context
    expected = [own.count("<start_of_turn>"), own.count("<end_of_turn>")]
    assert [
        prompt.count(tokenizer.id_of(token)) for token in ("<start_of_turn>", "<end_of_turn>")
    ] == expected
    assert not control & set(tokenizer.encode(text_pieces(response)))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_survives_encoding_and_decoding(tiny, text):
    tokenizer = tokenizer_of(tiny)
    assert tokenizer.decode(tokenizer.encode(text_pieces(text))) == text


def test_a_field_that_completes_a_control_token_is_still_text(tiny):
    template = Template("sly", "<{instruction}>", "{instruction}{context}")
    ids = tokenizer_of(tiny).encode(template.pieces("end_of_turn"))
    assert tokenizer_of(tiny).id_of("<end_of_turn>") not in ids
