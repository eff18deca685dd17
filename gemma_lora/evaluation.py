"""Measure a model on what it has not seen, and show base and tuned side by side."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma_lora.batches import Batches
from gemma_lora.lora import adapters_off, lora_layers
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import state_of, template_of
from gemma_lora.sampling import generate
from gemma_lora.tables import ShowsAsTable, Table
from gemma_lora.templates import text_pieces
from gemma_lora.tokens import Encoded, encode, shift_for_next_token, tokenizer_of
from gemma_lora.training import measure_loss


@dataclass(frozen=True, repr=False)
class Evaluation(ShowsAsTable):
    """What `evaluate` measured. Shows as a table.

    Attributes:
        loss: Mean cross-entropy of the response tokens, end token included, in nats a token.
        token_accuracy: Share of those tokens that are the most likely one.
        truncated, dropped: Records whose response was cut, or had no room at all.
        right, asked: For each category, answers right word for word, and questions asked; empty if none were.
        answers: The answers, in the order of the records.
    """

    loss: float
    token_accuracy: float
    truncated: int = 0
    dropped: int = 0
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def share(self, *categories: str) -> float:
        """Share of right answers over some categories, or over all.

        >>> Evaluation(0.5, 0.9, right={"open_qa": 9, "other": 0}, asked={"open_qa": 10, "other": 10}).share("open_qa")
        0.9
        """
        chosen = categories or tuple(self.asked)
        if not chosen:
            raise ValueError(
                "No question was asked, so there is no share. Call gl.evaluate(..., answers=True)."
            )
        if unknown := set(chosen) - set(self.asked):
            raise ValueError(
                f"No question of category {sorted(unknown)} was asked; there are: {sorted(self.asked)}."
            )
        return sum(self.right[name] for name in chosen) / sum(self.asked[name] for name in chosen)

    def interval(self, *categories: str) -> tuple[float, float]:
        """95 % confidence interval of `share`, by Wilson (1927): right near 0 and 1 too, and for few questions.

        >>> low, high = Evaluation(0.5, 0.9, right={"open_qa": 9}, asked={"open_qa": 10}).interval()
        >>> f"{low:.2f} to {high:.2f}"
        '0.60 to 0.98'
        """
        share, z = self.share(*categories), 1.96
        n = sum(self.asked[name] for name in categories or self.asked)
        middle = share + z**2 / (2 * n)
        reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low, high = (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)
        return min(low, share), max(
            high, share
        )  # at 0 and 1 rounding would leave the share itself out

    def table(self) -> Table:
        """A row for each category, under a caption with the loss."""
        rows = []
        for name, asked in self.asked.items():
            low, high = self.interval(name)
            row = {
                "category": name,
                "asked": asked,
                "right": self.right[name],
                "share": f"{self.share(name):.1%}",
            }
            rows.append(row | {"95 % interval": f"{low:.0%} to {high:.0%}"})
        caption = f"loss {self.loss:.3f} a token, perplexity {self.perplexity:.2f}, accuracy {self.token_accuracy:.1%}"
        if self.truncated or self.dropped:
            caption += f" ({self.truncated:,} records cut, {self.dropped:,} left out)"
        return Table(rows, caption=caption + ("; answers right word for word:" if rows else ""))


def evaluate(model, records, *, answers: bool | None = None, template=None) -> Evaluation:
    """Measure loss per real token on records, and the share of answers that are right word for word.

    Args:
        model: With or without adapters.
        records: Held-out records.
        answers: Whether to ask every question (greedy) and compare the answers. None asks where exact answers can be
            expected: on the small world.
        template: As in `fit`. None means the template of training, or the one recommended for the model.
    """
    state = state_of(model)
    template = template_of(model) if template is None else template
    length = (state.run or {}).get("sequence_length", state.settings.sequence_length)
    encoded = encode(model, records, template=template, sequence_length=length)
    measured = (*_measure(model, encoded), encoded.truncated, encoded.dropped)
    if not (state.settings.exact_answers if answers is None else answers):
        return Evaluation(*measured)
    given = generate(model, list(records), template=template)
    asked, right = Counter(), Counter()
    for record, answer in zip(records, given, strict=True):
        category = record.get("category") or "all"
        asked[category] += 1
        right[category] += answer.split() == record["response"].split()
    order = [name for name, _ in asked.most_common()]
    return Evaluation(*measured, {c: right[c] for c in order}, {c: asked[c] for c in order}, given)


def perplexity(model, texts: Sequence[str]) -> float:
    """Perplexity per token of plain texts, without a template: what tuning costs a model in what it knew before.

    Each text is read from `<bos>` to `<eos>` and cut to the recommended sequence length.
    """
    tokenizer, length = tokenizer_of(model), state_of(model).settings.sequence_length
    end = tokenizer.id_of("<eos>")
    texts = [texts] if isinstance(texts, str) else texts
    examples = [
        shift_for_next_token(
            [tokenizer.bos_id], [*tokenizer.encode(text_pieces(text)), end][:length]
        )
        for text in texts
        if text.strip()
    ]
    if not examples:
        raise ValueError("There is no text to measure.")
    return math.exp(_measure(model, Encoded(examples, tokenizer.pad_id))[0])


def _measure(model, encoded: Encoded) -> tuple[float, float]:
    """Loss and accuracy per token that counts."""
    batches = Batches(encoded, batch_tokens=state_of(model).settings.batch_tokens)
    shape = dict(zip(("batch_size", "sequence_length"), batches.shape, strict=True))
    with explained_out_of_memory(model, answering=False, **shape):
        logs = measure_loss(model, batches)
    return logs["loss"], logs["accuracy"]


def compare(
    model,
    prompts: Sequence[str | Mapping],
    *,
    sampler="greedy",
    seed: int | None = None,
    max_new_tokens=None,
) -> Table:
    """Ask base and tuned the same, from one loaded model, side by side. The options are those of `generate`."""
    if not lora_layers(model):
        raise ValueError(
            "The model has no adapters, so nothing to compare. Call gl.enable_lora() and gl.fit()."
        )
    prompts = [prompts] if isinstance(prompts, str | Mapping) else prompts
    options = {"sampler": sampler, "seed": seed, "max_new_tokens": max_new_tokens}
    tuned = generate(model, prompts, **options)
    with adapters_off(model):
        base = generate(model, prompts, **options)
    records = [{"instruction": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    columns = {
        "prompt": [record["instruction"] for record in records],
        "base": base,
        "tuned": tuned,
    }
    if any(record.get("response") for record in records):
        columns["response"] = [record.get("response", "") for record in records]
    return Table(
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        width=40,
    )


def distinct(texts: Sequence[str], *, n: int = 2) -> float:
    """Different n-grams of words, divided by all n-grams, over all texts: distinct-n.

    1 means that no n words follow each other twice; the lower, the more is said again. (Li et al., 2016,
    arXiv:1510.03055, divide by all words instead.)

    >>> distinct(["the sea the sea the sun"])
    0.6
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n counts words, 1 or more. Received: {n!r}")
    texts = [texts] if isinstance(texts, str) else texts
    words = [text.split() for text in texts]
    ngrams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    if not ngrams:
        raise ValueError(f"No text has {n} words. Received: {list(texts)!r:.80}")
    return len(set(ngrams)) / len(ngrams)
