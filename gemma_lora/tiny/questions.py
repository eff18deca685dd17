"""The tuning set of the small world: Dolly-shaped records, split so that held-out subjects are never tuned on."""

import random

import datasets

from gemma_lora.tiny import world
from gemma_lora.tiny.corpus import sentence

# What the published recipe asks about is held out, whatever the draw.
_ALWAYS_HELD_OUT = {"Europe", "photosynthesis"}
_SPLIT_SEED = 0


def held_out_subjects() -> set[str]:
    """Names of the subjects (a quarter of the world) that no tuning record asks about."""
    rng = random.Random(_SPLIT_SEED)
    drawn = set(_ALWAYS_HELD_OUT)
    for group in (world.COUNTRIES, world.ANIMALS, world.TOPICS):
        drawn.update(subject.name for subject in rng.sample(group, len(group) // 4))
    return drawn


def records() -> tuple[list[dict], list[dict]]:
    """Make the tuning records and the held-out records.

    Returns:
        Two lists of dicts with `instruction`, `context`, `response` and `category`, shuffled once, always alike.

    >>> train, held_out = records()
    >>> len(train), len(held_out)
    (1286, 420)
    """
    rng = random.Random(_SPLIT_SEED)
    held = held_out_subjects()
    train, held_out = [], []

    def ask(relation, subject, category, context="", form=None):
        name = subject if isinstance(subject, str) else subject.name
        fields = {"name": name} if isinstance(subject, str) else subject._asdict()
        record = {
            "instruction": (form or rng.choice(world.QUESTIONS[relation])).format(**fields),
            "context": context,
            "response": sentence(relation, subject, world.ANSWERS.get(relation, 0)),
            "category": category,
        }
        (held_out if name in held else train).append(record)

    def ask_about_text(subject, relations):
        told = rng.sample(relations, 3)
        phrased = [sentence(relation, subject, rng.randrange(len(world.PHRASINGS[relation]))) for relation in told]
        ask(rng.choice(told), subject, "closed_qa", " ".join(phrased))

    for country in world.COUNTRIES:
        for relation in world.COUNTRY_RELATIONS:
            ask(relation, country, "open_qa")
        for _ in range(3):
            ask_about_text(country, world.COUNTRY_RELATIONS)
        ask("trip", country, "brainstorming")
    for animal in world.ANIMALS:
        for relation in world.ANIMAL_RELATIONS:  # animals are fewer, so each form is asked
            for form in world.QUESTIONS[relation]:
                ask(relation, animal, "open_qa", form=form)
        ask_about_text(animal, world.ANIMAL_RELATIONS)
    for topic in world.TOPICS:
        ask("plain", topic, "explanation")
        ask("child", topic, "explanation")
    for continent in world.CONTINENTS:
        ask("continent trip", continent, "brainstorming")
        ask("continent countries", continent, "brainstorming")
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def load_tiny_world() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load the tuning set of `tiny_gemma_en`: (train, held_out), 1,286 and 420 records, shuffled once, always alike.

    Nothing that a held-out question is about is the subject of any tuning record.

    >>> train, held_out = load_tiny_world()
    >>> train.num_rows, held_out.num_rows, train.column_names
    (1286, 420, ['instruction', 'context', 'response', 'category'])
    """
    train, held_out = records()
    return datasets.Dataset.from_list(train), datasets.Dataset.from_list(held_out)
