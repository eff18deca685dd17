"""Measure a model on held-out records, and show base and tuned side by side.

Three measures are here: loss per token, the share of answers that are right word for
word, and how much texts repeat themselves. `measure_loss` in `training` runs the
batches, and `generate` in `sampling` asks the questions.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from keras_hub.models import CausalLM
from keras_hub.samplers import Sampler

from gemma_lora.batches import Batches
from gemma_lora.lora import adapters_off, lora_layers
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import check_text_alone, one_at_a_time, state_of, template_of
from gemma_lora.options import one_of, some_texts, whole_number, with_options
from gemma_lora.progress import counted
from gemma_lora.records import Prompts, Records, as_prompts, as_records, checked_record
from gemma_lora.sampling import SamplerName, answers_to, chosen_sampler, generate
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import Template, text_pieces
from gemma_lora.tokens import Encoded, encode, shift_for_next_token, tokenizer_of
from gemma_lora.training import measure_loss

# A function of an answer and its record, or the name of one.
Judge: TypeAlias = Literal["exact", "contains", "starts"] | Callable[[str, dict[str, str]], bool]

# Of a normal distribution, 95 % lie within so many standard deviations.
_Z = 1.96


@dataclass(frozen=True, repr=False)
class Evaluation(ShowsAsTable):
    """What `evaluate` measured. Shows as a table.

    Attributes:
        loss: Mean cross-entropy of the response tokens, end token included, in nats a
            token.
        token_accuracy: Share of those tokens that are the most likely one.
        truncated, dropped: Records whose response was cut, or had no room at all.
        right, asked: For each category, how many answers were right, and how many
            questions were asked. Empty if none were.
        answers: The answers, in the order of the records.
        judged: What "right" means here, in words.
    """

    loss: float
    token_accuracy: float
    truncated: int = 0
    dropped: int = 0
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    judged: str = "answers right word for word"

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def share(self, *categories: str) -> float:
        """Return the share of right answers over some categories, or over all.

        >>> right, asked = {"open_qa": 9, "other": 0}, {"open_qa": 10, "other": 10}
        >>> measured = Evaluation(0.5, 0.9, right=right, asked=asked)
        >>> measured.share("open_qa"), measured.share()
        (0.9, 0.45)

        Raises:
            ValueError: No question was asked, or none of such a category.
        """
        chosen = categories or tuple(self.asked)
        if not chosen:
            raise ValueError(
                "No question was asked, so there is no share. Call gl.evaluate(..., answers=True), "
                'or with judge="contains".'
            )
        if unknown := set(chosen) - set(self.asked):
            raise ValueError(
                f"No question of category {sorted(unknown)} was asked; there are: "
                f"{sorted(self.asked)}."
            )
        return sum(self.right[name] for name in chosen) / sum(self.asked[name] for name in chosen)

    def interval(self, *categories: str) -> tuple[float, float]:
        """Return the 95 % confidence interval of `share`, by Wilson (1927).

        It shows how far off the share could be, given how few questions were asked. It
        also holds near 0 and 1, and for few questions.

        >>> low, high = Evaluation(0.5, 0.9, right={"a": 9}, asked={"a": 10}).interval()
        >>> f"{low:.2f} to {high:.2f}"
        '0.60 to 0.98'
        """
        share = self.share(*categories)
        n = sum(self.asked[name] for name in categories or self.asked)
        # The ends are the two solutions p of (share - p)^2 = z^2 p (1 - p) / n: true
        # shares from which the measured one is just z standard deviations away.
        middle = share + _Z**2 / (2 * n)
        reach = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        low = (middle - reach) / (1 + _Z**2 / n)
        high = (middle + reach) / (1 + _Z**2 / n)
        # At 0 and 1, rounding could leave the share itself outside.
        return min(low, share), max(high, share)

    def table(self) -> Table:
        """Return a row for each category, under a caption with the loss."""
        rows = []
        for name, asked in self.asked.items():
            low, high = self.interval(name)
            rows.append(
                {
                    "category": name,
                    "asked": asked,
                    "right": self.right[name],
                    "share": f"{self.share(name):.1%}",
                    "95 % interval": f"{low:.0%} to {high:.0%}",
                }
            )
        caption = (
            f"loss {self.loss:.3f} a token, perplexity {self.perplexity:.2f}, "
            f"accuracy {self.token_accuracy:.1%}"
        )
        if self.truncated or self.dropped:
            caption += f" ({self.truncated:,} records cut, {self.dropped:,} left out)"
        if rows:
            caption += f"; {self.judged}:"
        return Table(rows, caption=caption)


@with_options
@one_at_a_time
def evaluate(
    model: CausalLM,
    records: Records,
    *,
    answers: bool | None = None,
    judge: Judge | None = None,
    max_new_tokens: int | None = None,
    template: str | Template | None = None,
) -> Evaluation:
    """Measure the loss per token on records, and the share of right answers.

    >>> import gemma_lora as gl
    >>> _, held_out = gl.load_tiny_world()
    >>> model = gl.load("tiny_gemma_en")
    >>> found = gl.evaluate(model, held_out.select([0]), judge="contains")
    >>> found.judged, found.share()
    ('answers that hold the response', 0.0)

    Args:
        model: With or without adapters.
        records: Held-out records.
        answers: Whether to ask every question (greedy) and judge the answers. None asks
            where exact answers can be expected, on the small world, and where there is
            a judge.
        judge: When an answer is right: if it is the record's "response" word for word
            ("exact", which None means too), "contains" it, or "starts" with it; or a
            function of an answer and its record, which returns True or False.
        max_new_tokens: The most tokens of an answer, as in `generate`.
        template: As in `fit`. None means the template of training, or the one
            recommended for the model.

    Raises:
        ValueError: A record is invalid, or there is no such judge.
        TypeError: The judge returned something else than True or False.
        MemoryError: Memory ran out. The message names settings that should fit.
    """
    state = state_of(model)
    judged, is_right = _judge(judge)
    if template is None:
        template = template_of(model)
    # Records are cut as in training.
    run = state.run or {}
    length = run.get("sequence_length", state.settings.sequence_length)
    rows = [*as_records(records)]
    encoded = encode(model, rows, template=template, sequence_length=length)
    loss, accuracy = _measure(model, encoded)
    measured = Evaluation(
        loss=loss,
        token_accuracy=accuracy,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        judged=judged,
    )
    if answers is None:
        answers = judge is not None or state.settings.exact_answers
    if not answers:
        return measured
    checked = [checked_record(row, {}) for row in rows]
    with counted("Questions", len(checked)) as count:
        greedy = chosen_sampler(None)
        given = answers_to(model, checked, greedy, template, max_new_tokens, None, count)
    right, asked = _right_of(checked, given, is_right)
    return replace(measured, right=right, asked=asked, answers=given)


def _right_of(
    records: Sequence[dict], answers: Sequence[str], is_right: Callable[[str, dict], bool]
) -> tuple[dict[str, int], dict[str, int]]:
    """Count by category: (right answers, questions), the largest category first."""
    asked = Counter(record["category"] or "all" for record in records)
    right = Counter()
    for record, answer in zip(records, answers, strict=True):
        right[record["category"] or "all"] += is_right(answer, record)
    categories = [name for name, _ in asked.most_common()]
    return {name: right[name] for name in categories}, {name: asked[name] for name in categories}


# For each: what it counts, and how, from the words of an answer and of a response.
_JUDGES = {
    "exact": ("answers right word for word", lambda answer, response: answer == response),
    "contains": ("answers that hold the response", lambda answer, response: response in answer),
    "starts": ("answers that begin with the response", str.startswith),
}


def _judge(judge: Judge | None) -> tuple[str, Callable[[str, dict], bool]]:
    """Return what a judge counts, in words, and a function that says yes or no.

    White space does not matter to the judges with a name.
    """
    if callable(judge):
        name = getattr(judge, "__name__", type(judge).__name__)
        return f"answers that are right by {name}", partial(_yes_or_no, judge, name)
    name = one_of("judge", "exact" if judge is None else judge, (*_JUDGES,))
    judged, compare_texts = _JUDGES[name]

    def by_words(answer: str, record: dict) -> bool:
        return compare_texts(*(" ".join(text.split()) for text in (answer, record["response"])))

    return judged, by_words


def _yes_or_no(judge: Callable, name: str, answer: str, record: dict) -> bool:
    """Ask a judge of the caller's. Raises TypeError if it says neither yes nor no."""
    said = judge(answer, record)
    if not isinstance(said, bool | np.bool_):
        raise TypeError(
            f"A judge returns True or False. {name} returned {said!r:.60}. Compare a score with a "
            "limit of yours."
        )
    return bool(said)


@with_options
@one_at_a_time
def perplexity(model: CausalLM, texts: str | Iterable[str]) -> float:
    """Measure the perplexity per token of plain texts, without a template.

    It shows what tuning costs a model of what it knew before. Each text is read from
    `<bos>` to `<eos>`, and cut to the recommended sequence length.

    Args:
        model: With or without adapters.
        texts: One text, or several.

    Raises:
        ValueError: There is no text, or nothing but white space.
        TypeError: They are no texts: records go to `evaluate`.
    """
    tokenizer = tokenizer_of(model)
    length = state_of(model).settings.sequence_length
    end = tokenizer.id_of("<eos>")
    examples = []
    for text in some_texts("texts", texts):
        if text.strip():
            ids = [*tokenizer.encode(text_pieces(text)), end]
            examples.append(shift_for_next_token([tokenizer.bos_id], ids[:length]))
    if not examples:
        raise ValueError("There is no text to measure.")
    loss, _ = _measure(model, Encoded(examples, tokenizer.pad_id))
    return math.exp(loss)


def _measure(model, encoded: Encoded) -> tuple[float, float]:
    """Return loss (nats) and accuracy, per token that counts."""
    check_text_alone(model)
    batches = Batches(encoded, batch_tokens=state_of(model).settings.batch_tokens)
    rows, length = batches.shape
    with explained_out_of_memory(model, answering=False, batch_size=rows, sequence_length=length):
        logs = measure_loss(model, batches)
    return logs["loss"], logs["accuracy"]


@with_options
@one_at_a_time
def compare(
    model: CausalLM,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampler: SamplerName | Sampler | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Table:
    """Ask base and tuned the same, from one loaded model, side by side.

    Args:
        model: A model with adapters. For the base's answers they are switched off.
        prompts: One prompt or several, as in `generate`: texts, or records. The table
            has a column with the responses, if a record has one.
        max_new_tokens, sampler, temperature, top_k, top_p, seed: As in `generate`.

    Raises:
        ValueError: The model has no adapters, or as in `generate`.
    """
    if not lora_layers(model):
        raise ValueError(
            "The model has no adapters, so nothing to compare. Call gl.enable_lora() and gl.fit()."
        )
    _, prompts = as_prompts(prompts)
    sampler = chosen_sampler(sampler, temperature, top_k, top_p)
    options = {"sampler": sampler, "seed": seed, "max_new_tokens": max_new_tokens}
    tuned = generate(model, prompts, **options)
    with adapters_off(model):
        base = generate(model, prompts, **options)

    records = [{"instruction": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    with_responses = any(record.get("response") for record in records)
    rows = []
    for record, base_answer, tuned_answer in zip(records, base, tuned, strict=True):
        row = {"prompt": record["instruction"], "base": base_answer, "tuned": tuned_answer}
        if with_responses:
            row["response"] = record.get("response", "")
        rows.append(row)
    return Table(rows, width=40)


@with_options
def distinct(texts: str | Sequence[str], *, n: int = 2) -> float:
    """Return distinct-n: the share of all n-grams of words that differ from each other.

    1 means that no n words follow each other twice. The lower it is, the more is said
    again. (Li et al., 2016, arXiv:1510.03055, divide by the number of words instead.)

    >>> distinct(["the sea the sea the sun"])
    0.6

    Args:
        texts: One text, or several, whose n-grams are counted together.
        n: How many words.

    Raises:
        ValueError: `n` is not a positive integer, or no text has so many words.
    """
    n = whole_number("n", n)
    texts = some_texts("texts", texts)
    ngrams = []
    for text in texts:
        words = text.split()
        ngrams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not ngrams:
        raise ValueError(f"No text has {n} words. Received: {list(texts)!r:.80}")
    return len(set(ngrams)) / len(ngrams)
