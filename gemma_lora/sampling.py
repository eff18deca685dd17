"""Ask a model: answers at once with `generate`, in pieces with `stream`.

KerasHub's `generate_step` runs a model over its prompts and then hands everything to
the model's sampler. Our `_Loop` stands in for the sampler: one loop that both functions
use. It draws with any sampler of `keras_hub.samplers`, and ends at a limit of its own.

All prompts of a batch end at the same place, so their answers begin together. The
padding stands in front, where no token looks at it.

Here are the batches of prompts, the loop, and the cut where an answer ends. `templates`
words a prompt, `tokens` encodes it, and `evaluation` judges the answers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import keras
import keras_hub
import numpy as np
from keras import ops
from keras_hub.models import CausalLM
from keras_hub.samplers import Sampler

from gemma_lora import runtime
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import one_at_a_time, state_of, template_of
from gemma_lora.options import is_number, whole_number, with_options
from gemma_lora.records import Prompts, as_prompts
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import Tokenizer, tokenizer_of

SamplerName: TypeAlias = Literal["greedy", "top_k", "top_p", "random", "beam"]

_SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    # The published recipe takes 5.
    "top_k": partial(keras_hub.samplers.TopKSampler, k=5),
    "top_p": partial(keras_hub.samplers.TopPSampler, p=0.9),
    "random": keras_hub.samplers.RandomSampler,
    "beam": partial(keras_hub.samplers.BeamSampler, num_beams=5),
}

# A temperature below this one is taken as 0.
_COLDEST = 1e-4

# How many prompts may be answered together.
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)

# Prompts are padded to multiples of this, so that only a few shapes are compiled.
_LENGTH_STEP = 32


@with_options
@one_at_a_time
def generate(
    model: CausalLM,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampler: SamplerName | Sampler | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    template: str | Template | None = "auto",
) -> str | list[str]:
    """Answer prompts. The answers come without the prompts.

    Prompts of similar length are answered together. The model's optimizer and its own
    sampler stay as they are.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> generate(model, "The capital of France is", template=None, max_new_tokens=2)
    'Paris'

    Args:
        model: A causal language model from `gl.load`.
        prompts: A text; a record with `instruction` and `context`; a chat, as a list of
            messages, of one question and perhaps a system turn; or many of these, as a
            list, a frame or a data set.
        max_new_tokens: The most tokens of an answer. None takes what is recommended for
            the model.
        sampler: "greedy", "top_k" (5, as in the recipe), "top_p" (0.9), "random" or
            "beam"; or a sampler of `keras_hub.samplers` with options of your own. None
            is "greedy", unless one of the next three says how to draw.
        temperature: Logits are divided by it before a token is drawn. 0 is "greedy".
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens whose probabilities sum to p, only.
        seed: The same seed and prompts give the same answers. None takes the seed of
            `gl.setup`.
        template: The template that words a prompt. "auto" takes the one the model was
            trained with, or else the one recommended for it. None takes prompts as they
            stand, tokens of turns included, for a base model to continue.

    Returns:
        One answer if `prompts` is a single prompt, else a list of answers in the order
        of the prompts.

    Raises:
        ValueError: A prompt is empty or not text, an argument is invalid,
            or "beam" is asked of a Gemma 3, for which KerasHub has no beam search.
        MemoryError: The batch does not fit. The text says what would.
    """
    single, prompts = as_prompts(prompts)
    sampler = chosen_sampler(sampler, temperature, top_k, top_p)
    answers = answers_to(model, prompts, sampler, template, max_new_tokens, seed)
    return answers[0] if single else answers


def answers_to(
    model,
    prompts: Sequence[str | Mapping],
    sampler: Sampler,
    template: str | Template | None,
    max_new_tokens: int | None,
    seed: int | None,
    count: Callable[[int], None] = lambda more: None,
) -> list[str]:
    """Answer many prompts, as `generate` does, and tell `count` each batch's size."""
    task = _task(model, prompts, template, max_new_tokens)
    tokenizer = tokenizer_of(model)
    decode, seeds = _decoder(model, sampler, seed)
    weights = _weights(model)
    sizes = [len(prompt) for prompt in task.prompts]
    batches = _batches(sizes)
    answers = [""] * len(sizes)
    for batch in batches:
        begin = padded_length(sizes[batch[-1]], max(sizes))
        # A short last batch is filled up: another shape would have to be compiled.
        inputs = padded(
            [task.prompts[i] for i in batch], len(batches[0]), begin, task.new_tokens, tokenizer
        )
        limit = begin + task.new_tokens
        with explained_out_of_memory(
            model, answering=True, prompts=len(batch), sequence_length=limit
        ):
            tokens, _, seeds = decode(weights, seeds, inputs, begin, limit=limit, ends=task.ends)
            tokens = np.asarray(tokens)
        for row, i in enumerate(batch):
            answer = tokens[row, begin:limit].tolist()
            answers[i] = tokenizer.decode(_until_end(answer, task.ends)).strip()
        count(len(batch))
    return answers


@with_options
def stream(
    model: CausalLM,
    prompt: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampler: SamplerName | Sampler | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    template: str | Template | None = "auto",
) -> Iterator[str]:
    """Answer one prompt, and yield the text in pieces as its tokens come.

    Joined, the pieces are what `generate` answers:

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> pieces = [*stream(model, "The capital of France is", template=None)]
    >>> "".join(pieces) == gl.generate(model, "The capital of France is", template=None)
    True

    Args:
        model, max_new_tokens, sampler, temperature, top_k, top_p, seed, template: As
            for `generate`.
        prompt: As for `generate`, but a single one.

    Yields:
        Text that continues the pieces before it. A piece holds whole characters only: a
        character of several tokens is yielded with the last of them.

    Raises:
        ValueError: As for `generate`. Also if the sampler keeps several answers at a
            time, as "beam" does, because none of them is certain before the end.
        MemoryError: The answer does not fit. The text says what would.
    """
    single, prompts = as_prompts(prompt)
    if not single:
        raise ValueError(f"gl.stream answers one prompt. Received: {len(prompts)}")
    task = _task(model, prompts, template, max_new_tokens)
    sampler = chosen_sampler(sampler, temperature, top_k, top_p)
    tokens = _streamed_tokens(model, sampler, seed, task)
    yield from _whole_characters(tokens, tokenizer_of(model))


def _streamed_tokens(model, sampler: Sampler, seed: int | None, task: "_Task") -> Iterator[int]:
    """Yield the tokens of one answer, each as soon as it is drawn."""
    decode, seeds = _decoder(model, sampler, seed, one_answer=True)
    weights = _weights(model)
    size = len(task.prompts[0])
    begin = padded_length(size, size)
    end = begin + task.new_tokens
    inputs = padded(task.prompts, 1, begin, task.new_tokens, tokenizer_of(model))
    explained = partial(
        explained_out_of_memory, model, answering=True, prompts=1, sequence_length=end
    )
    lock = state_of(model).lock
    with lock, explained():
        _, cache, _ = decode(weights, seeds, inputs, begin)
    for place in range(begin, end):
        # Between two tokens, others may ask.
        with lock, explained():
            tokens, cache, seeds = decode(weights, seeds, inputs, begin, start=place, cache=cache)
            token = int(np.asarray(tokens)[0, place])
        if token in task.ends:
            return
        yield token
        inputs["token_ids"] = tokens


def _whole_characters(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Decode tokens as they come, and hold back the bytes of an unfinished character.

    A character that the vocabulary lacks is several tokens, one for each of its UTF-8
    bytes. Until the last byte has come, the decoded text ends in U+FFFD, the
    replacement character.
    """
    ids = []
    text = ""
    said = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).strip()
        if len(text) > len(said) and not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    if len(text) > len(said):
        yield text[len(said) :]


# What is asked for


class _Task(NamedTuple):
    """Prompts as token ids, ids that end an answer, and an answer's most tokens."""

    prompts: list[list[int]]
    ends: tuple[int, ...]
    new_tokens: int


def _task(
    model, prompts: Sequence, template: str | Template | None, max_new_tokens: int | None
) -> _Task:
    """Check what a caller asks for, and encode it.

    Raises ValueError if an argument is not valid.
    """
    tokenizer = tokenizer_of(model)
    new_tokens = max_new_tokens
    if new_tokens is None:
        new_tokens = state_of(model).settings.max_new_tokens
    new_tokens = whole_number("max_new_tokens", new_tokens)
    if isinstance(template, str) and template == "auto":
        template = template_of(model)
    ends = {tokenizer.id_of("<eos>")}
    if template is not None:
        template = get_template(template)
        ends.add(tokenizer.id_of(template.end))
    encoded = []
    for prompt in prompts:
        if template is None and not isinstance(prompt, str):
            if prompt.get("context"):
                raise ValueError(
                    "Without a template, a prompt has no place for a context or a system turn. "
                    "Write it into the text, or leave template=None out."
                )
            prompt = prompt["instruction"]
        encoded.append(tokenizer.prompt(template, prompt))
    return _Task(encoded, tuple(sorted(ends)), new_tokens)


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Cut an answer before its first end token.

    >>> _until_end([7, 8, 1, 9], ends=(1, 106))
    [7, 8]
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens


# Batches of prompts


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Choose which prompts are answered together: their indices, from short to long.

    In a larger batch a row costs less, but each is padded to the longest prompt. All
    batches have the same size, but the last may be short.

    >>> _batches([8, 9, 9, 10])
    [[0, 1, 2, 3]]
    >>> _batches([8, 3000, 9])
    [[0], [2], [1]]
    """
    by_length = sorted(range(len(sizes)), key=sizes.__getitem__)

    def batches_of(rows: int) -> list[list[int]]:
        return [by_length[i : i + rows] for i in range(0, len(by_length), rows)]

    def cost(rows: int) -> int:
        # Drawing a token for n rows costs about 16 + n: most of it is reading the
        # weights. An answer is taken to have 32 tokens, and a token of a prompt to cost
        # one: less where prompts are short, more where they are long.
        return sum(32 * (16 + rows) + rows * sizes[batch[-1]] for batch in batches_of(rows))

    return batches_of(min(_BATCH_SIZES, key=cost))


def padded_length(needed: int, longest: int) -> int:
    """Choose how many tokens to pad prompts to, so that few shapes are compiled.

    That is what the longest batch needs, or a half or a fourth of it and so on, but at
    least `needed`; rounded up to a multiple of 32.

    >>> padded_length(300, longest=1000), padded_length(250, longest=1000)
    (512, 256)
    """
    length = longest
    while needed * 2 <= length:
        length //= 2
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def padded(
    prompts: list[list[int]], rows: int, begin: int, new_tokens: int, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Make a batch of prompts that all end where their answers begin.

    Args:
        prompts: Token ids, a list for each prompt.
        rows: At least so many rows. It is raised to a power of two, and the last prompt
            fills up rows that are left over.
        begin: The place of the first new token, counted from the start of a row.
        new_tokens: Most tokens of an answer. Their room is padded like the prompts.
        tokenizer: It knows the id that pads.

    Returns:
        `token_ids`, int32, shape (rows, length); `padding_mask`, bool, of the same
        shape, true before `begin`; and `first`, int32, shape (rows,): the place of each
        prompt's first token.

    >>> from types import SimpleNamespace
    >>> batch = padded([[2, 7], [2, 7, 8]], 2, 4, 1, SimpleNamespace(pad_id=0))
    >>> batch["token_ids"][:, :5].tolist(), batch["first"].tolist()
    ([[0, 0, 2, 7, 0], [0, 2, 7, 8, 0]], [2, 1])
    """
    rows = 1 << (rows - 1).bit_length()
    length = begin + -(-new_tokens // _LENGTH_STEP) * _LENGTH_STEP
    token_ids = np.full((rows, length), tokenizer.pad_id, "int32")
    first = np.zeros(rows, "int32")
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        first[row] = begin - len(prompt)
        token_ids[row, first[row] : begin] = prompt
    mask = np.broadcast_to(np.arange(length) < begin, token_ids.shape)
    return {"token_ids": token_ids, "padding_mask": mask, "first": first}


# The loop


class _Loop(Sampler):
    """Draw tokens: the loop of `generate`, or one turn of it for `stream`.

    KerasHub's `generate_step` runs the model over the prompts and then calls this
    object with everything it prepared, as it would call any sampler. It does so while
    JAX traces it, so arrays here stand for values that are not known yet.

    With a `limit`, the loop draws until every row has ended or the limit is reached.
    With `start` and `cache`, it draws the one token at that place. With neither it
    draws nothing, and leaves the cache of the prompts to begin with.

    Args:
        sampler: The sampler that draws each token.
        limit: The first place, counted from the start of a row, that gets no token.
        ends: Ids of the tokens that end an answer.
        start: The place of a single token, after the prompt of a single row.
        cache: The attribute `cache` that the call before has left.
    """

    def __init__(self, sampler: Sampler, limit=None, ends=None, start=None, cache=None):
        super().__init__()
        self.sampler = sampler
        self.limit = limit
        self.ends = ends
        self.start = start
        self.cache = cache

    def __call__(
        self,
        next,  # noqa: A002, KerasHub's name
        prompt,
        cache,
        index,
        mask,
        stop_token_ids=None,
        hidden_states=None,
        model=None,
    ):
        """Fill answers into `prompt`, and return it.

        Args:
            next: Takes token ids, a cache and a place; returns the logits for the token
                at that place, hidden states and the new cache.
            prompt: Token ids, shape (rows, length), int32.
            cache: Keys and values of the prompts, for `next`.
            index: The first place to fill: where the prompts end.
            mask: True before that place, shape (rows, length), bool.
            stop_token_ids: Not used: `ends` says it.
            hidden_states, model: What a sampler's own loop and `run_loop` need.
        """
        next_logits, cache = _by_layer(_with_quick_logits(model, next), cache)

        def draw(tokens, cache, place):
            logits, _, cache = next_logits(tokens, cache, place)
            probabilities = self.sampler.compute_probabilities(logits)
            token = ops.cast(self.sampler.get_next_token(probabilities), tokens.dtype)
            return ops.slice_update(tokens, [0, place], token[:, None]), cache

        def turn(tokens, cache, place, ended):
            tokens, cache = draw(tokens, cache, place)
            is_end = ops.any(tokens[:, place, None] == ops.stack(self.ends), axis=1)
            return tokens, cache, place + 1, ended | is_end

        def unfinished(tokens, cache, place, ended):
            return ops.logical_not(ops.all(ended))

        if self.start is not None:
            # Nothing needs what `generate_step` has just computed from the prompts, so
            # the compiler leaves that out of the program.
            tokens, self.cache = draw(prompt, self.cache, self.start)
            return tokens
        if self.limit is None:
            self.cache = cache
            return prompt
        if _has_own_loop(self.sampler):
            next_logits = self._ending_at_the_limit(next_logits)
            return self.sampler(
                next_logits, prompt, cache, index, mask, self.ends, hidden_states, model
            )
        # KerasHub's while loop: it also carries the sampler's seed from turn to turn.
        tokens, _, _, _ = self.sampler.run_loop(
            unfinished,
            turn,
            model=model,
            loop_vars=(prompt, cache, index, ops.zeros_like(mask[:, 0])),
            maximum_iterations=self.limit - index,
        )
        return tokens

    def _ending_at_the_limit(self, next_logits: Callable) -> Callable:
        """Leave only the end token possible from the limit on.

        A sampler's own loop knows no limit but the end of the rows. It stops when every
        answer has ended. An end token of probability 1 changes no answer's score.
        """

        def next_or_end(tokens, cache, place):
            logits, hidden, cache = next_logits(tokens, cache, place)
            is_end = ops.arange(logits.shape[-1]) == self.ends[0]
            only_end = ops.cast(ops.where(is_end, 0.0, -1e9), logits.dtype)
            return ops.where(place < self.limit, logits, only_end), hidden, cache

        return next_or_end


def _with_quick_logits(model, next_logits: Callable) -> Callable:
    """On a CPU, let `next_logits` multiply by the embedding from the other side.

    hidden E^T and (E hidden^T)^T are equal. For 8 rows and Gemma's vocabulary, XLA's
    CPU takes 50 ms for the first and 27 ms for the second; for one row, the first is
    quicker.
    """
    # private: attributes of KerasHub's ReversibleEmbedding
    embedding = model.backbone.token_embedding
    is_plain = (
        embedding.tie_weights
        and embedding.reverse_dtype is None
        and embedding.quantization_mode is None
    )
    if jax.default_backend() != "cpu" or not is_plain:
        return next_logits
    cap = embedding.logit_soft_cap

    def with_quick_logits(tokens, cache, place):
        logits, hidden, cache = next_logits(tokens, cache, place)
        if len(hidden) > 1:
            # Nothing needs KerasHub's logits then, so the compiler leaves them out.
            columns = ops.matmul(embedding.embeddings, ops.transpose(hidden))
            # Without the barrier, XLA changes the sides back.
            logits = ops.transpose(jax.lax.optimization_barrier(columns))
            logits = logits if cap is None else ops.tanh(logits / cap) * cap
        return logits, hidden, cache

    return with_quick_logits


def _by_layer(next_logits: Callable, cache: Any) -> tuple[Callable, Any]:
    """Take a cache apart into a key and a value for each layer; adapt `next_logits`."""
    # private: Gemma 1 and 2, and Gemma 3 up to KerasHub 0.30, keep one array of shape
    # (rows, layers, 2, length, heads, head size). For every token they take it apart
    # and stack it again from its layers, which copies all of it. Where the loop carries
    # the layers by themselves, stacking and taking apart cancel out, and the compiler
    # drops both. On a CPU a token then takes 6 % less time with 64 rows of 128 tokens,
    # and 14 % less with 16 rows of 900.
    if not hasattr(cache, "shape"):
        return next_logits, cache

    def apart(stacked):
        return [(stacked[:, layer, 0], stacked[:, layer, 1]) for layer in range(stacked.shape[1])]

    def next_by_layer(tokens, pairs, place):
        stacked = ops.stack([ops.stack(pair, axis=1) for pair in pairs], axis=1)
        logits, hidden, stacked = next_logits(tokens, stacked, place)
        return logits, hidden, apart(stacked)

    return next_by_layer, apart(cache)


def _has_own_loop(sampler: Sampler) -> bool:
    """Whether a sampler brings a loop of its own, to keep several answers at a time."""
    return type(sampler).__call__ is not Sampler.__call__


# The compiled function


def _decoder(
    model, sampler: Sampler, seed: int | None, *, one_answer: bool = False
) -> tuple[Callable, list[np.ndarray]]:
    """Return the compiled loop for a model and a sampler, and the loop's first seeds.

    The model's state keeps the function. An equal sampler gets the same one again.

    Raises ValueError if the sampler cannot answer here: beam search with Gemma 3, or a
    loop of its own where `one_answer` is to be drawn token by token.
    """
    key = _key(sampler)
    name = type(sampler).__name__
    if one_answer and _has_own_loop(sampler):
        raise ValueError(
            f"{name} keeps several answers at a time, so none is certain before the end. "
            "Call gl.generate, or choose sampler='greedy', 'top_k' or 'top_p'."
        )
    is_beam = isinstance(sampler, keras_hub.samplers.BeamSampler)
    if is_beam and isinstance(model, keras_hub.models.Gemma3CausalLM):
        raise ValueError(
            "KerasHub has no beam search with Gemma 3. Choose sampler='greedy', 'top_k' or 'top_p'."
        )
    vocabulary = model.backbone.vocabulary_size
    if (getattr(sampler, "k", None) or 1) > vocabulary:
        raise ValueError(
            f"top_k is at most {vocabulary:,}, the size of the vocabulary. Received: {sampler.k:,}"
        )
    compiled = state_of(model).samplers
    if key not in compiled:
        compiled[key] = _compiled(model, sampler)
    first = runtime.checked_seed(seed)
    # private: the state of a Keras SeedGenerator is its seed and a count of draws.
    return compiled[key], [np.array([first, 0], "uint32") for _ in sampler.variables]


def _compiled(model, sampler: Sampler) -> Callable:
    """Make `decode`, a pure function: what `_Loop` does with a batch of prompts.

    It returns token ids, the loop's cache, and the seeds for the next call. A `cache`
    that is passed in is used up. Weights are arguments, so adapters may change without
    compiling again.
    """

    def decode(weights, seeds, inputs, begin, limit=None, ends=None, start=None, cache=None):
        loop = _Loop(sampler, limit, ends, start, cache)
        variables = [*model.weights, *sampler.variables]
        values = zip(variables, [*weights, *seeds], strict=True)
        with (
            keras.StatelessScope(state_mapping=values) as scope,
            _padded_in_front(model, inputs["first"], begin),
        ):
            own_sampler = model.sampler
            try:
                # Only while JAX traces, that is, once for every shape.
                model.sampler = loop
                outputs = model.generate_step(inputs, stop_token_ids=None)
            finally:
                model.sampler = own_sampler
        seeds = [scope.get_current_value(variable) for variable in sampler.variables]
        return outputs["token_ids"], loop.cache, seeds

    return jax.jit(decode, static_argnames="begin", donate_argnames="cache")


@contextmanager
def _padded_in_front(model, first, begin: int) -> Iterator[None]:
    """Within this context prompts end at `begin`, and no token sees what pads them.

    KerasHub expects prompts at the start of their rows: it begins to draw where the
    shortest ends, and passes over the tokens of longer ones one by one. Here all end at
    the same place. Positions count from the start of the row, not of the prompt;
    Gemma's rotary attention depends on differences of positions alone.

    KerasHub also reads the places of answers to come together with the prompts. Here it
    reads the prompts only.

    Args:
        model: The model, while JAX traces `generate_step`.
        first: The place of each prompt's first token, shape (rows,).
        begin: The place of the first new token.
    """
    # private: `_compute_attention_mask` of KerasHub's Gemma blocks, whose last argument
    # is the place of the first query; and that `generate_step` calls `call_with_cache`,
    # first with whole rows, then with one token a row.
    blocks = model.backbone.transformer_layers

    def own_prompt(block, x, padding_mask, *rest):
        causal = type(block)._compute_attention_mask(block, x, None, *rest)
        keys = ops.arange(causal.shape[2])
        queries = ops.arange(causal.shape[1])[:, None] + rest[-1]
        # Beam search has several rows for each prompt.
        firsts = ops.repeat(first, causal.shape[0] // first.shape[0])
        # Padding looks at itself, because a softmax over nothing would not be a number.
        seen = ops.logical_or(keys >= firsts[:, None, None], keys == queries)
        return ops.cast(ops.logical_and(causal, seen), "int32")

    whole_rows = model.call_with_cache

    def prompts_only(token_ids, *rest, **options):
        return whole_rows(token_ids[:, :begin], *rest, **options)

    for block in blocks:
        block._compute_attention_mask = partial(own_prompt, block)
    model.call_with_cache = prompts_only
    try:
        yield
    finally:
        del model.call_with_cache
        for block in blocks:
            del block._compute_attention_mask


def _weights(model) -> list[jax.Array]:
    return [weight.value for weight in model.weights]


def chosen_sampler(
    sampler: str | Sampler | None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sampler:
    """Return the sampler of KerasHub that a caller asks for.

    >>> type(chosen_sampler(None, temperature=0.7, top_p=0.9)).__name__
    'TopPSampler'

    Raises:
        ValueError: No sampler has that name, an option is invalid, or the sampler does
            not take it.
    """
    options = _drawing_options(temperature, top_k, top_p)
    if isinstance(sampler, Sampler):
        if options:
            raise ValueError(
                f"{type(sampler).__name__} has options of its own. Give it {', '.join(options)} "
                "where you make it, or pass no sampler."
            )
        return sampler
    greedy = options.get("temperature") == 0
    if sampler is None:
        sampler = _fitting_sampler(options, greedy)
        if greedy:
            return _SAMPLERS[sampler]()
    if not isinstance(sampler, str) or sampler not in _SAMPLERS:
        raise ValueError(
            f"No sampler is named {sampler!r:.80}. There are: {', '.join(_SAMPLERS)}; or pass one "
            "of keras_hub.samplers."
        )
    taken = {"random": ("temperature",), "top_k": ("temperature", "k")}
    taken["top_p"] = ("temperature", "k", "p")
    if unfit := [name for name in options if name not in taken.get(sampler, ())]:
        name = {"k": "top_k", "p": "top_p"}.get(unfit[0], unfit[0])
        fitting = [which for which, names in taken.items() if unfit[0] in names]
        raise ValueError(
            f"sampler={sampler!r} takes no {name}. These do: {', '.join(fitting)}; or leave the "
            "sampler out."
        )
    if greedy:
        raise ValueError(f"temperature=0 takes the likeliest token, but sampler={sampler!r} draws.")
    return _SAMPLERS[sampler](**options)


def _drawing_options(temperature, top_k, top_p) -> dict[str, float | int]:
    """Check the options that say how to draw; return them by KerasHub's names."""
    options = {}
    if temperature is not None:
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature is a number, 0 or more. Received: temperature={temperature!r:.80}"
            )
        # So low, logits / temperature would be infinite, and the likeliest wins anyway.
        options["temperature"] = float(temperature) if temperature >= _COLDEST else 0.0
    if top_k is not None:
        options["k"] = whole_number("top_k", top_k)
    if top_p is not None:
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(f"top_p is above 0, and at most 1. Received: top_p={top_p!r:.80}")
        options["p"] = float(top_p)
    return options


def _fitting_sampler(options: dict, greedy: bool) -> str:
    """Return the name of the sampler that takes such options."""
    if greedy or not options:
        return "greedy"
    return "top_p" if "p" in options else "top_k" if "k" in options else "random"


def _key(sampler: Sampler) -> tuple:
    """Return a key that equal samplers share whatever their seed."""
    if type(sampler).__module__.startswith("keras_hub."):
        options = sampler.get_config()
        options.pop("seed", None)
        return (type(sampler), repr(options))
    # The configuration of a sampler from elsewhere may not tell everything. Its id is
    # unique, because the function compiled for it keeps it alive.
    return (type(sampler), id(sampler))
