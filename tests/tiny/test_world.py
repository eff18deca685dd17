from collections import Counter

import pytest
import sentencepiece
from packaging.version import Version

import gemma_lora as gl
from gemma_lora.tiny import build, world
from gemma_lora.tiny.corpus import corpus, sentence
from gemma_lora.tiny.questions import held_out_subjects

FOLDER = build.PRESET


def test_the_world_is_as_large_as_promised():
    assert len(world.COUNTRIES) >= 100
    assert len(world.COUNTRY_RELATIONS) >= 7
    assert len(world.ANIMALS) >= 40
    assert len(world.ANIMAL_RELATIONS) >= 5
    assert len(world.TOPICS) >= 40
    assert all(len(phrasings) >= 4 for phrasings in world.PHRASINGS.values())


def test_subjects_have_one_entry_each_and_only_ascii():
    for group in (world.COUNTRIES, world.ANIMALS, world.TOPICS):
        names = Counter(subject.name for subject in group)
        assert max(names.values()) == 1
        assert all(
            value.isascii() and value.strip() == value for subject in group for value in subject
        )
    for name in ("capital", "landmark", "dish", "nature"):
        assert max(Counter(getattr(country, name) for country in world.COUNTRIES).values()) == 1
    assert {country.continent for country in world.COUNTRIES} == set(world.CONTINENTS)


def test_the_countries_that_stand_for_a_continent_lie_in_it():
    continent_of = {country.name: country.continent for country in world.COUNTRIES}
    for continent, names in world.CONTINENTS.items():
        assert {continent_of[name] for name in names} == {continent}


def test_every_fact_has_its_sentences():
    for relation in world.COUNTRY_RELATIONS:
        for phrasing in range(len(world.PHRASINGS[relation])):
            for country in world.COUNTRIES:
                told = sentence(relation, country, phrasing).lower()
                assert getattr(country, relation).lower() in told
                assert country.name.lower() in told


def test_the_corpus_is_the_same_for_a_seed_and_tells_everything():
    text = corpus(documents=4000, seed=0)
    assert text == corpus(documents=4000, seed=0)
    assert text[:50] != corpus(documents=50, seed=1)
    joined = "\n".join(text)
    for country in world.COUNTRIES:
        assert all(getattr(country, relation) in joined for relation in world.COUNTRY_RELATIONS)
    assert all(topic.plain in joined and topic.child in joined for topic in world.TOPICS)


def test_the_corpus_holds_no_instruction_and_no_template():
    joined = "\n".join(corpus(documents=build.DOCUMENTS, seed=build.SEED))
    for mark in ("Instruction:", "Response:", "?", "<start_of_turn>", "Explain "):
        assert mark not in joined
    questions = [template.split("{")[0] for forms in world.QUESTIONS.values() for template in forms]
    assert not [question for question in questions if question in joined]


@pytest.mark.skipif(
    Version(sentencepiece.__version__) < Version("0.2.3"),
    reason="older trainers abort Python where a required character does not occur in the corpus",
)
def test_the_vocabulary_of_the_package_is_that_of_the_build():
    documents = corpus(documents=build.DOCUMENTS, seed=build.SEED)
    shipped = (FOLDER / "assets/tokenizer/vocabulary.spm").read_bytes()
    assert build.train_vocabulary(documents) == shipped


def test_the_vocabulary_is_laid_out_like_gemmas():
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(FOLDER / "assets/tokenizer/vocabulary.spm")
    )
    assert [pieces.id_to_piece(i) for i in range(6)] == [
        "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
    ]  # fmt: skip
    text = "Zażółć 🙂\n\n\ttwo\nlines  twice\r\n"
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert pieces.unk_id() not in ids


def test_the_preset_is_small_and_knows_its_facts_as_prose(tiny):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 12_000_000
    prompts = [
        sentence("capital", country).rsplit(" is ", 1)[0] + " is" for country in world.COUNTRIES
    ]
    answers = gl.generate(tiny, prompts, template=None, max_new_tokens=12)
    known = [
        answer.startswith(country.capital)
        for answer, country in zip(answers, world.COUNTRIES, strict=True)
    ]
    assert sum(known) >= 0.97 * len(known)


def test_no_held_out_subject_is_tuned_on():
    train, held_out = gl.load_tiny_world()
    subjects = held_out_subjects()
    everyone = {
        s.name for group in (world.COUNTRIES, world.ANIMALS, world.TOPICS) for s in group
    } | set(world.CONTINENTS)

    def asked_about(instruction: str) -> set[str]:
        named = {n for n in everyone if f" {n}" in instruction.replace("?", " ").replace(".", " ")}
        return {n for n in named if not any(n != longer and n in longer for longer in named)}

    for record in train:
        assert not asked_about(record["instruction"]) & subjects, record
    assert sum(bool(asked_about(record["instruction"]) & subjects) for record in held_out) >= 300


@pytest.mark.parametrize(
    "instruction",
    [
        "What should I do on a trip to Europe?",
        "Explain the process of photosynthesis in a way that a child could understand.",
    ],
)
def test_the_recipes_own_questions_are_held_out(instruction):
    train, held_out = gl.load_tiny_world()
    assert instruction in held_out["instruction"]
    assert instruction not in train["instruction"]
