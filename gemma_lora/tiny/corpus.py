"""The prose that `tiny_gemma_en` was pretrained on: the facts of `world.py`, told over and over in other words."""

import random
from collections.abc import Iterator

from gemma_lora.tiny import world

_COUNTRY_OF = {country.name: country for country in world.COUNTRIES}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fields(relation: str, subject) -> dict:
    if isinstance(subject, str):
        a, b, c = (_COUNTRY_OF[name] for name in world.CONTINENTS[subject])
        fields = {"name": subject, "a": a, "b": b, "c": c, "A": _capitalised(a.name)}
    else:
        fields = subject._asdict()
        fields["value"] = fields["text"] = fields.get(relation, "")
    return fields | {"Name": _capitalised(fields["name"]), "Value": _capitalised(fields.get("value", ""))}


def sentence(relation: str, subject, phrasing: int = 0) -> str:
    """Tell one fact of the world.

    >>> france = next(country for country in world.COUNTRIES if country.name == "France")
    >>> sentence("capital", france)
    'The capital of France is Paris.'
    >>> sentence("capital", france, phrasing=1)
    'Paris is the capital of France.'

    Args:
        relation: A key of `world.PHRASINGS`.
        subject: A `Country`, `Animal` or `Topic`; for the relations of a continent, its name.
        phrasing: Which of the relation's phrasings to use.
    """
    return _capitalised(world.PHRASINGS[relation][phrasing].format(**_fields(relation, subject)))


def _shuffled_for_ever(items, rng: random.Random) -> Iterator:
    """All items in a new order, again and again: every subject is told about equally often."""
    while True:
        yield from rng.sample(items, len(items))


def corpus(*, documents: int, seed: int = 0) -> list[str]:
    """Write short documents about the world. The same arguments give the same text, byte for byte.

    A third of the documents are paragraphs about one subject. The others are notes under a heading, each on one fact
    of a subject and then on some more.

    >>> corpus(documents=3) == corpus(documents=3)
    True

    Args:
        documents: How many to write, of 10 to 150 words each.
        seed: Another seed tells the same facts in other combinations: held-out prose.
    """
    rng = random.Random(seed)
    relations_of = (
        [(country, (*world.COUNTRY_RELATIONS, "trip")) for country in world.COUNTRIES]
        + [(animal, world.ANIMAL_RELATIONS) for animal in world.ANIMALS]
        + [(topic, ("plain", "child")) for topic in world.TOPICS]
        + [(continent, ("continent trip", "continent countries")) for continent in world.CONTINENTS]
    )
    subjects = _shuffled_for_ever(relations_of, rng)
    facts = _shuffled_for_ever([(relation, *entry) for entry in relations_of for relation in entry[1]], rng)

    def tell(relation, subject) -> str:
        return sentence(relation, subject, rng.randrange(len(world.PHRASINGS[relation])))

    def paragraph() -> str:
        subject, relations = next(subjects)
        told = rng.sample(relations, rng.randint(min(2, len(relations) - 1), len(relations)))
        return " ".join(tell(relation, subject) for relation in told)

    def note() -> str:
        relation, subject, relations = next(facts)
        title = rng.choice(world.TITLES[relation]).format(**_fields(relation, subject))
        heading = rng.choice(world.HEADINGS).format(title=title, Title=_capitalised(title))
        others = [other for other in relations if other != relation]
        told = [relation, *rng.sample(others, rng.randint(1, min(3, len(others))))]
        text = " ".join(tell(relation, subject) for relation in told)
        return heading + ("" if heading.endswith("\n") else " ") + text

    def page() -> str:
        # Some pages hold several documents, so that newlines are part of what the model knows.
        return "\n\n".join(rng.choice([paragraph, note, note])() for _ in range(rng.choice([1, 1, 1, 2])))

    return [page() for _ in range(documents)]
