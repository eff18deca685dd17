"""Look through records for what spoils training or its measurement, and name the rows.

Nothing is dropped or changed: `audit` counts, shows an example of each finding, and
knows the numbers of the rows. What a record is stands in `records`; how records are
split without leaks, in `load_records`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from gemma_lora.options import with_options
from gemma_lora.records import Records, as_records, checked_record, question_of
from gemma_lora.tables import ShowsAsTable, Table

# Questions that share so large a part of the weight of their words are nearly the same.
_NEAR = 0.8
# A word in more questions than this tells nothing about any of them.
_COMMON = 200
# A response is very long if it has so many times the median's characters, and at least
# so many.
_TIMES_LONGER = 20
_LONG = 2000
# A response of so many words repeats itself if fewer of its runs of three differ.
_MANY_WORDS = 40
_DIFFERENT = 0.5


@dataclass(frozen=True)
class Finding:
    """One kind of trouble: what it is, in which rows, and an example.

    Attributes:
        what: In words.
        where: "train" or "held out": what `rows` counts in.
        rows: Numbers of the rows, from 0.
        example: The first of them, in short.
    """

    what: str
    where: str
    rows: list[int]
    example: str


@dataclass(frozen=True, repr=False)
class Audit(ShowsAsTable):
    """What `audit` found. Shows as a table.

    Attributes:
        sizes: How many rows were looked at, by "train" and "held out".
        findings: Each `Finding` that has rows.
    """

    sizes: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    def rows(self, where: str = "train") -> list[int]:
        """Return the numbers of all rows in which anything was found."""
        return sorted({row for f in self.findings if f.where == where for row in f.rows})

    def table(self) -> Table:
        """Return a row for each finding."""
        looked_at = ", ".join(f"{count:,} {name}" for name, count in self.sizes.items())
        rows = [
            {
                "finding": finding.what,
                "in": finding.where,
                "rows": len(finding.rows),
                "example": finding.example,
            }
            for finding in self.findings
        ]
        caption = f"Looked at {looked_at}: {'' if rows else 'nothing found'}".rstrip(": ")
        return Table(rows, caption=caption)


@with_options
def audit(train: Records, held_out: Records | None = None) -> Audit:
    """Look for doubles, leaks, and responses that are empty, cut, or run away.

    >>> asked = {"question": "Why?", "answer": "So."}
    >>> found = audit([asked, {"question": "why ?", "answer": "No."}])
    >>> found.findings[0].what, found.findings[0].rows
    ('the same question, another answer', [1])

    Two questions are the same if they differ in case, blanks and the sign at their end
    alone. They are nearly the same if they share 80 % of the weight of their words,
    where rare words weigh more (Jaccard's coefficient, weighted). The same question in
    quite other words is not found, but its answer may be: a held-out answer that
    training has word for word is named.

    Args:
        train: Records to learn from, as in `fit`.
        held_out: Records to measure on, as in `fit`.

    Returns:
        What was found; it shows as a table.

    Raises:
        ValueError: A record is invalid.
    """
    parts = {"train": [checked_record(row, {}) for row in as_records(train)]}
    if held_out is not None:
        parts["held out"] = [checked_record(row, {}) for row in as_records(held_out)]
    findings = []
    for where, records in parts.items():
        findings += _doubles(where, records)
        findings += _responses(where, records)
    if held_out is not None:
        findings += _leaks(**{name.replace(" ", "_"): part for name, part in parts.items()})
    sizes = {where: len(records) for where, records in parts.items()}
    return Audit(sizes, [finding for finding in findings if finding.rows])


def _doubles(where: str, records: list[dict]) -> list[Finding]:
    """Find records that repeat one before them, as a whole or in their question."""
    first: dict[str, int] = {}
    whole, other_answer = [], []
    for row, record in enumerate(records):
        before = records[first.setdefault(question_of(record), row)]
        if before is record:
            continue
        same = _words(before["response"]) == _words(record["response"])
        (whole if same else other_answer).append(row)
    single = [*first.values()]
    questions = [question_of(records[row]) for row in single]
    near = {b: a for a, b in _near_pairs(questions, questions) if a < b}
    nearly = sorted(single[row] for row in near)
    like = {single[b]: single[a] for b, a in near.items()}
    return [
        _finding("the same record again", where, whole, records),
        _finding("the same question, another answer", where, other_answer, records),
        _finding("nearly the same question", where, nearly, records, like=(like, records)),
    ]


def _responses(where: str, records: list[dict]) -> list[Finding]:
    """Find responses that no model should learn to give."""
    typical = median([len(record["response"]) for record in records]) if records else 0
    limit = max(_LONG, _TIMES_LONGER * typical)
    found = defaultdict(list)
    for row, record in enumerate(records):
        text = record["response"].strip()
        if not re.search(r"\w", text):
            found["a response without a word"].append(row)
        elif len(text) > limit:
            found["a very long response"].append(row)
        if _repeats_itself(text):
            found["a response that repeats itself"].append(row)
        # A sentence of this length ends in a sign.
        if len(text) > 80 and re.search(r"[\w,;:(\-]$", text) and "\n" not in text[-80:]:
            found["a long response without a sign at its end"].append(row)
    return [_finding(what, where, rows, records, show="response") for what, rows in found.items()]


def _repeats_itself(text: str) -> bool:
    """Return whether much of a text is said again and again."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(words) >= _MANY_WORDS and len(set(runs)) < _DIFFERENT * len(runs)


def _leaks(train: list[dict], held_out: list[dict]) -> list[Finding]:
    """Find held-out records that training has seen."""
    asked = {question_of(record): row for row, record in enumerate(train)}
    said = {_words(record["response"]): row for row, record in enumerate(train)}
    same, same_answer = [], []
    for row, record in enumerate(held_out):
        if question_of(record) in asked:
            same.append(row)
        elif len(record["response"].split()) > 3 and _words(record["response"]) in said:
            same_answer.append(row)
    ours = [question_of(record) for record in train]
    theirs = [question_of(record) for record in held_out]
    near = {b: a for a, b in _near_pairs(ours, theirs) if ours[a] != theirs[b]}
    return [
        _finding("a question that training has, too", "held out", same, held_out),
        _finding(
            "nearly a question of training", "held out", sorted(near), held_out, like=(near, train)
        ),
        _finding(
            "an answer of training, word for word",
            "held out",
            same_answer,
            held_out,
            show="response",
        ),
    ]


def _near_pairs(ours: list[str], theirs: list[str]) -> Iterable[tuple[int, int]]:
    """Yield the places of questions that are nearly the same.

    A word weighs log(1 + N / n) if n of N questions have it (inverse document
    frequency), so that a name makes a question another one, and "the" does not.
    """
    words_of = [set(re.findall(r"\w+", text)) for text in ours]
    rows_with = defaultdict(list)
    for row, words in enumerate(words_of):
        for word in words:
            rows_with[word].append(row)

    def weight(words: set[str]) -> float:
        return sum(math.log1p(len(ours) / max(len(rows_with.get(w, ())), 1)) for w in words)

    for place, text in enumerate(theirs):
        words = set(re.findall(r"\w+", text))
        rare = [rows_with[w] for w in words if 0 < len(rows_with.get(w, ())) <= _COMMON]
        for row in {row for rows in rare for row in rows}:
            there = words_of[row]
            if ours[row] != text and weight(words & there) >= _NEAR * weight(words | there):
                yield row, place


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _finding(
    what: str,
    where: str,
    rows: list[int],
    records: list[dict],
    *,
    show: str = "instruction",
    like: tuple[dict[int, int], list[dict]] | None = None,
) -> Finding:
    """Make a finding, with its first row as the example."""
    example = ""
    if rows:
        example = f"row {rows[0]}: {_short(records[rows[0]][show])}"
        if like:
            others, there = like
            other = others[rows[0]]
            example += f" (like row {other}: {_short(there[other][show])})"
    return Finding(what, where, rows, example)


def _short(text: str) -> str:
    """Return a text's beginning, and its end if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"
