"""Check the answers to the notebooks' exercises.

A wrong answer gets a hint that names the misconception behind it:

>>> steps(3, rows=20, batch_size=8, epochs=2)
Not yet. That is one epoch. There are 2.
>>> steps(6, rows=20, batch_size=8, epochs=2)
Right. 3 batches an epoch, 2 epochs.

Each function is one exercise, named by its notebook. Each but `rubric` returns a
`Verdict`. An answer of None is still to be given. Nothing here is used by the rest of
the library.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

from gemma_lora.batches import SHAPE_STEP
from gemma_lora.evaluation import distinct
from gemma_lora.tables import Table


@dataclass(frozen=True, repr=False)
class Verdict:
    """Say whether an answer is right, and why, or give a hint.

    Attributes:
        right: Whether it is right.
        text: The reason, or the hint.
        given: Whether there was an answer at all.
    """

    right: bool
    text: str
    given: bool = True

    def _word_and_color(self) -> tuple[str, str]:
        if self.right:
            return "Right.", "#188038"
        if self.given:
            return "Not yet.", "#d93025"
        return "Your turn.", "#1a73e8"

    def __repr__(self) -> str:
        word, _ = self._word_and_color()
        return f"{word} {self.text}"

    def _repr_html_(self) -> str:
        _, color = self._word_and_color()
        style = f"border-left:4px solid {color};padding:4px 10px"
        return f'<div style="{style}">{html.escape(repr(self))}</div>'


def template(text: str | None) -> Verdict:
    """02: write a prompt template of your own, as a question and an answer."""
    if text is None:
        return _open
    if not isinstance(text, str):
        return Verdict(False, f"A template is text. You gave a {type(text).__name__}.")
    try:
        fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
    except ValueError as error:
        return Verdict(False, f"Its braces do not match: {error}.")
    if fields & {"response", "answer"}:
        return Verdict(
            False,
            "It holds the response, which you do not have when you ask. A prompt ends before it.",
        )
    if fields != {"instruction"}:
        return Verdict(
            False,
            f"A question fills the field {{instruction}}, that alone. You have {sorted(fields)}.",
        )
    after = text.split("{instruction}")[-1]
    if not after.strip():
        return Verdict(
            False,
            "Nothing marks the end of the question, so the model may write more of it. Add a cue.",
        )
    if after.endswith(" "):
        return Verdict(
            False,
            "It ends in a space, but a word's space is part of its token: '▁Paris'. "
            "End it in a line break.",
        )
    if not after.endswith("\n"):
        return Verdict(
            False,
            "A response would follow your cue without a space: 'Answer:Paris'. "
            "End it in a line break.",
        )
    return Verdict(
        True, "One field, a cue for the answer, and a line break, after which a response may start."
    )


def loss_weights(answer: Sequence[int] | None, *, prompt: int, response: int) -> Verdict:
    """02: say which targets count.

    `prompt` and `response` are numbers of ids, the end token included.
    """
    if answer is None:
        return _open
    targets = prompt + response - 1
    try:
        answer = [{0: 0, 1: 1}[weight] for weight in answer]
    except (KeyError, TypeError):
        return Verdict(False, "Answer with a list of zeros and ones, such as [0, 0, 1].")
    if len(answer) != targets:
        return Verdict(
            False,
            f"You gave {len(answer)} weights for {targets} targets. Targets are the ids moved "
            "on by one: the first id is never a target.",
        )
    if answer == [0] * (prompt - 1) + [1] * response:
        why = f"so {prompt - 1} zeros come before {response} ones."
        return Verdict(
            True, f"The last id of the prompt already predicts the first of the response, {why}"
        )
    if all(answer):
        return Verdict(
            False,
            "So the model learns to write prompts too: that is loss_on='all'. "
            "Leave the prompt out.",
        )
    if answer == [0] * prompt + [1] * (response - 1):
        return Verdict(
            False,
            "One zero too many: the last id of the prompt predicts the first of the response.",
        )
    if answer[-1] == 0:
        return Verdict(
            False, "Without the last target, the end token, the model never learns to stop."
        )
    return Verdict(
        False,
        "A weight is 1 where the target belongs to the response, end token included, and else 0.",
    )


def sequence_length(answer: int | None, *, lengths: Sequence[int], cut: float = 0.05) -> Verdict:
    """02: find the shortest sequence length that cuts few enough records.

    It is a multiple of 16, and cuts at most the share `cut` of them.
    """
    lengths = np.asarray(lengths)
    choices = range(SHAPE_STEP, int(lengths.max()) + 2 * SHAPE_STEP, SHAPE_STEP)
    right = next(length for length in choices if np.mean(lengths > length) <= cut)
    wrong = _not_a_number(answer)
    if wrong is not None:
        return wrong
    share = np.mean(lengths > answer)
    if answer == right:
        return Verdict(
            True, f"It cuts {share:.1%}, and {right - SHAPE_STEP} would cut more than {cut:.0%}."
        )
    if answer % SHAPE_STEP:
        return Verdict(
            False, f"Shapes are multiples of {SHAPE_STEP} tokens. Round up to the next one."
        )
    if answer < right:
        middle = (
            "Half of all records are longer than the median. "
            if answer <= np.median(lengths) + SHAPE_STEP
            else ""
        )
        return Verdict(False, f"{middle}It cuts {share:.1%} of the records: too many.")
    return Verdict(
        False,
        f"It cuts {share:.1%}, but longer is not safer: every step would compute padding. "
        "A shorter one does.",
    )


def sampler(answer: str | None) -> Verdict:
    """03: name the sampler that always gives the same answer, at the least work."""
    hints = {
        "top_k": "It draws among the 5 most likely tokens: another seed, another answer.",
        "top_p": "It draws among the most likely tokens that make up 90 %: "
        "another seed, another answer.",
        "random": "It draws among all tokens. A seed repeats a draw, it does not take it away.",
        "beam": "It draws nothing, true, but follows five answers at once: five times the work.",
    }
    why = "It takes the most likely token each time; nothing is drawn, so no seed matters."
    names = f"Answer with a name: 'greedy', {', '.join(map(repr, hints))}."
    return _choice(answer, "greedy", why, hints, names)


def new_tokens(answer: int | None, *, prompt: int, max_length: int) -> Verdict:
    """03: say how many tokens KerasHub's `max_length` leaves for the answer."""
    hints = {
        max_length: "max_length counts the prompt too: it is the length of the whole sequence.",
        prompt: "That is the prompt. The answer gets what is left of max_length.",
        prompt + max_length: "max_length is not added to the prompt, it includes it.",
    }
    why = (
        f"{max_length} - {prompt}. A longer question leaves a shorter answer; gl.generate "
        "counts new tokens instead."
    )
    return _number(
        answer, max_length - prompt, why, hints, "Take the prompt's tokens from max_length."
    )


def distinct_share(answer: float | None, *, text: str) -> Verdict:
    """03: compute distinct-2 of a text by hand."""
    words = text.split()
    right = distinct([text])
    pairs = len(words) - 1
    different = round(right * pairs)
    over_words = different / len(words)
    single_words = len(set(words)) / len(words)
    hints = {
        different: "That is how many pairs differ. Divide by all pairs.",
        over_words: f"There are {len(words)} words but only {pairs} pairs of neighbours.",
        1 - right: "That is the share of repeats: 1 minus what is asked.",
        single_words: "Those are single words (distinct-1). Count pairs of neighbours.",
    }
    why = f"{different} different pairs of {pairs}."
    otherwise = "List the pairs of neighbouring words, and count those that differ."
    return _number(answer, right, why, hints, otherwise, within=0.007)


def adapter_parameters(answer: int | None, *, model, rank: int) -> Verdict:
    """04: count what adapters of a rank train, on query and value of all layers."""
    shape = model.backbone
    heads = shape.num_query_heads + shape.num_key_value_heads
    one_layer = heads * shape.hidden_dim * rank + 2 * rank * shape.head_dim
    right = one_layer * shape.num_layers
    at_rank_4 = right // rank * 4
    by_square = right // rank * rank**2
    frozen = heads * shape.hidden_dim * shape.head_dim * shape.num_layers
    hints = {
        one_layer: f"That is one layer. There are {shape.num_layers}.",
        at_rank_4: (
            "That is rank 4. A has a column, and B a row, for each of the rank's directions."
        ),
        by_square: "A and B each grow with the rank, not with its square.",
        frozen: "Those are the frozen weights themselves. LoRA trains two thin factors instead.",
    }
    why = (
        f"{one_layer:,} in each of {shape.num_layers} layers: "
        "the count grows in step with the rank."
    )
    otherwise = (
        "(query heads + key/value heads) · width · rank + 2 · rank · head width, for each layer."
    )
    return _number(answer, right, why, hints, otherwise)


def steps(answer: int | None, *, rows: int, batch_size: int, epochs: int) -> Verdict:
    """04: count how often the optimizer changes the weights."""
    one_epoch = math.ceil(rows / batch_size)
    rounded_down = rows // batch_size * epochs
    across_epochs = math.ceil(rows * epochs / batch_size)
    hints = {
        one_epoch: f"That is one epoch. There are {epochs}.",
        rows * epochs: f"Each step takes a batch of {batch_size} records, not one.",
        rows * batch_size * epochs: "A larger batch means fewer steps, not more: divide.",
        rounded_down: "The last batch is not full, and is a step all the same: round up.",
        across_epochs: "No batch mixes two epochs: round up in each of them.",
    }
    why = f"{one_epoch:,} batches an epoch, {epochs} epochs."
    otherwise = "Batches in an epoch (rounded up), times epochs."
    return _number(answer, one_epoch * epochs, why, hints, otherwise)


def best_epoch(
    answer: int | None, *, training: Sequence[float], held_out: Sequence[float]
) -> Verdict:
    """04: say after which epoch (counted from 1) to stop, given the two curves."""
    right = int(np.argmin(held_out)) + 1
    by_heart = "There the *training* loss is lowest: the model has learned these records by heart."
    hints = {
        right - 1: "Epochs are counted from 1 here, Python's indices from 0.",
        right + 1: "By then the held-out loss has risen again.",
        int(np.argmin(training)) + 1: f"{by_heart} Watch the records that it was not trained on.",
    }
    if right < len(held_out):
        why = f"From epoch {right + 1} on only the training loss still falls: that is memorising."
    else:
        why = "The held-out loss still falls at the end: one more epoch may pay."
    return _number(answer, right, why, hints, "Find the epoch with the lowest held-out loss.")


def questions_needed(answer: int | None, *, share: float, reach: float) -> Verdict:
    """05: count the questions that a 95 % interval needs.

    It reaches `reach` to each side of a `share` of right answers.
    """
    z = 1.96
    right = z**2 * share * (1 - share) / reach**2
    worst_case = round(z**2 / (4 * reach**2))
    twice_the_reach = round(right / 4)
    half_the_reach = round(right * 4)
    one_over_reach = round(1 / reach)
    hints = {
        worst_case: "Enough, but more than you need: that is the worst case, a share of 50 %.",
        twice_the_reach: (
            "That reaches twice as far to each side. Half the reach takes four times the questions."
        ),
        half_the_reach: (
            "That is for half the reach: it is asked for to each side, not as the whole width."
        ),
        one_over_reach: (
            "The interval shrinks with the square root of the count, not with the count."
        ),
    }
    why = f"1.96² · {share:g} · {1 - share:.2g} / {reach:g}² is {right:.0f}."
    otherwise = "1.96 · sqrt(share · (1 - share) / n) is the reach. Solve for n."
    return _number(answer, right, why, hints, otherwise, within=0.1)


def perplexity_of(answer: float | None, *, loss: float) -> Verdict:
    """05: turn a loss in nats a token into perplexity."""
    right = math.exp(loss)
    hints = {
        2**loss: "That is 2 to the loss. Keras's loss is in nats, not bits: the base is e.",
        loss: "That is the loss itself. Perplexity is its exponential.",
        math.exp(-loss): "That is the mean probability of a right token. Perplexity is 1 over it.",
    }
    why = f"exp({loss:g}): as unsure as a choice among {right:.2f} equally likely tokens."
    return _number(answer, right, why, hints, "Perplexity is exp(loss).", within=0.01)


def fair_comparison(answer: str | None) -> Verdict:
    """05: choose which of four comparisons shows what tuning did."""
    hints = {
        "A": "The model has seen these very answers: memorising would look the same as learning.",
        "B": "Two things changed at once. The difference may be the sampler's.",
        "D": "You would choose what you want to see. "
        "Choose the questions before you read an answer.",
    }
    why = "Only the adapters differ, and no tuning record was about what is asked."
    return _choice(answer, "C", why, hints, "Answer with a letter: 'A', 'B', 'C' or 'D'.")


def rubric(table: Table, marks: Sequence[Sequence[int | None]]) -> Table:
    """05: mark answers yourself: is each one coherent, relevant and right?

    Args:
        table: What `gl.compare` returned.
        marks: For each row of the table, three marks: 2 yes, 1 partly, 0 no, None not
            read yet.

    Raises:
        ValueError: `marks` has another shape or other marks.
    """
    if len(marks) != len(table.rows) or not all(map(_are_three_marks, marks)):
        raise ValueError(
            f"marks has {len(table.rows)} rows of three marks, each 0, 1, 2 or None. "
            f"Received: {marks!r:.80}"
        )
    names = ("coherent", "relevant", "right")
    rows = []
    for row, given in zip(table.rows, marks, strict=True):
        words = [_mark(mark) for mark in given]
        rows.append({"prompt": row["prompt"], **dict(zip(names, words, strict=True))})
    means = []
    for column in zip(*marks, strict=True):
        read = [mark for mark in column if mark is not None]
        means.append(f"{np.mean(read):.1f} of 2" if read else "to do")
    return Table([*rows, {"prompt": "mean", **dict(zip(names, means, strict=True))}])


def _are_three_marks(row) -> bool:
    if not isinstance(row, Sequence) or len(row) != 3:
        return False
    return all(mark in (0, 1, 2, None) for mark in row)


_open = Verdict(False, "Replace None with your answer, and run this cell again.", given=False)


def _choice(answer, right: str, why: str, hints: dict[str, str], otherwise: str) -> Verdict:
    """Judge a choice among a few texts, in upper or lower case."""
    if answer is None:
        return _open
    text = str(answer).strip().lower()
    if text == right.lower():
        return Verdict(True, why)
    hint_for = {name.lower(): hint for name, hint in hints.items()}
    return Verdict(False, hint_for.get(text, otherwise))


def _mark(mark: int | None) -> str:
    return "to do" if mark is None else ("no", "partly", "yes")[int(mark)]


def _not_a_number(answer) -> Verdict | None:
    """Judge an answer that is not a number; None if it is one."""
    if answer is None:
        return _open
    try:
        # `math.isfinite` also takes the scalars of NumPy and JAX, which are numbers,
        # too.
        if isinstance(answer, bool | str) or not math.isfinite(answer):
            raise TypeError
    except TypeError:
        return Verdict(False, f"Answer with a number. You gave {answer!r:.40}.")
    return None


def _number(
    answer, right: float, why: str, hints: dict[float, str], otherwise: str, within: float = 0
) -> Verdict:
    """Judge a number.

    Args:
        why: Why it is right.
        hints: For each wrong number that learners give, a hint of its own.
        otherwise: The hint for any other number.
        within: How far a number may be off, as a share of it.
    """
    wrong = _not_a_number(answer)
    if wrong is not None:
        return wrong
    if math.isclose(answer, right, rel_tol=within):
        return Verdict(True, why)
    nearest = min(hints, key=lambda value: abs(answer - value))
    if math.isclose(answer, nearest, rel_tol=within):
        return Verdict(False, hints[nearest])
    return Verdict(False, otherwise)
