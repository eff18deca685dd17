"""Ask a model: its answer only, stopped where it ends, repeatable; at once, or token by token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
import keras
import keras_hub
import numpy as np
from keras import ops
from keras_hub.samplers import Sampler

from gemma_lora import runtime
from gemma_lora.lora import overridden
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import state_of, template_of
from gemma_lora.templates import Template, get_template
from gemma_lora.tokens import tokenizer_of

_SAMPLERS = {
    "greedy": lambda: keras_hub.samplers.GreedySampler(),
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=5),  # the published recipe's
    "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.9),
    "random": lambda: keras_hub.samplers.RandomSampler(),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=5),
}
_BATCHES = (1, 2, 4, 8, 16, 32, 64)  # prompts answered together
_SHAPE_STEP = 64  # lengths are padded to multiples of this, so that few shapes are compiled


def generate(
    model,
    prompts: str | Mapping | Sequence[str | Mapping],
    *,
    sampler: str | Sampler = "greedy",
    template: str | Template | None = "auto",
    max_new_tokens: int | None = None,
    seed: int | None = None,
) -> str | list[str]:
    """Answer prompts: the answers only. Neither the optimizer nor the model's own sampler is touched.

    Args:
        model: A causal language model from `gl.load`.
        prompts: An instruction, a record with `instruction` and `context`, or a list of them.
        sampler: "greedy", "top_k" (5, as in the recipe), "top_p" (0.9), "random" or "beam"; or a sampler of
            `keras_hub.samplers` with options of your own.
        template: What renders a prompt. "auto" is the template of training, or the one recommended for the model;
            None takes prompts as they stand, for a base model to continue.
        max_new_tokens: Most tokens of an answer. None means what is recommended for the model.
        seed: The same seed and prompts give the same answers. None means the seed of `gl.setup`.
    """
    one = isinstance(prompts, str | Mapping)
    encoded, ends, new_tokens = encoded_prompts(
        model, [prompts] if one else prompts, template, max_new_tokens
    )
    tokenizer = tokenizer_of(model)
    answers, sizes = [""] * len(encoded), [len(ids) for ids in encoded]
    by_length = sorted(range(len(encoded)), key=sizes.__getitem__)
    rows = _rows(sorted(sizes))
    with _compiled(model, sampler, runtime.default_seed if seed is None else seed) as function:
        for start in range(0, len(by_length), rows):
            batch = by_length[start : start + rows]
            length = padded_length(sizes[batch[-1]] + new_tokens, max(sizes) + new_tokens)
            inputs = padded(
                [encoded[i] for i in batch], min(rows, len(encoded)), length, tokenizer.pad_id
            )
            inputs["limit"] = np.int32(sizes[batch[-1]] + new_tokens)
            with explained_out_of_memory(
                model, answering=True, prompts=len(batch), sequence_length=length
            ):
                output = np.asarray(function(inputs, stop_token_ids=ends)["token_ids"])
            for row, i in enumerate(batch):
                new = output[row, sizes[i] : sizes[i] + new_tokens].tolist()
                end = next((place for place, token in enumerate(new) if token in ends), len(new))
                answers[i] = tokenizer.decode(new[:end]).strip()
    return answers[0] if one else answers


def encoded_prompts(
    model, prompts, template, max_new_tokens
) -> tuple[list[list[int]], tuple[int, ...], int]:
    """Token ids of each prompt, ids that end an answer, and the most tokens of an answer."""
    tokenizer, state = tokenizer_of(model), state_of(model)
    new_tokens = state.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is a whole number, 1 or more. Received: {max_new_tokens!r}"
        )
    if template == "auto":
        template = template_of(model)
    ends = {tokenizer.id_of("<eos>")}
    if template is not None:
        template = get_template(template)
        ends.add(tokenizer.id_of(template.end))
    encoded = []
    for prompt in prompts:
        text = prompt["instruction"] if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"A prompt is text, or a record with an instruction. Received: {prompt!r}"
            )
        encoded.append(tokenizer.prompt(template, prompt if template else text))
    return encoded, tuple(sorted(ends)), new_tokens


def _rows(sizes: list[int]) -> int:
    """Prompts to answer together: KerasHub's loop begins at the shortest and ends with the longest of a batch."""

    def cost(rows: int) -> int:
        batches = [sizes[i : i + rows] for i in range(0, len(sizes), rows)]
        return sum(
            (batch[-1] - batch[0] + 32) * (16 + rows) for batch in batches
        )  # of about 32 new tokens each

    return min(_BATCHES, key=cost)


def padded_length(own: int, longest: int) -> int:
    """Tokens to pad a batch to: the longest's, or a fourth, a sixteenth of it, so that few shapes are compiled."""
    while own * 4 <= longest:
        longest //= 4
    return -(-longest // _SHAPE_STEP) * _SHAPE_STEP


def padded(prompts: list[list[int]], rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Inputs for a batch, filled up with its last prompt to a power of two rows."""
    rows = 1 << (rows - 1).bit_length()
    token_ids, mask = np.full((rows, length), pad_id, "int32"), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    return {"token_ids": token_ids, "padding_mask": mask}


@contextmanager
def _compiled(model, sampler: str | Sampler, seed: int) -> Iterator[Callable]:
    """Give the model a sampler for a while; what was compiled for an equal sampler before is used again."""
    sampler, key = named_sampler(sampler)
    if isinstance(sampler, keras_hub.samplers.BeamSampler) and isinstance(
        model, keras_hub.models.Gemma3CausalLM
    ):
        raise ValueError(
            "KerasHub has no beam search with Gemma 3. Take sampler='greedy', 'top_k' or 'top_p'."
        )
    compiled = state_of(model).samplers
    before = model.sampler, model.generate_function
    try:
        model.sampler, model.generate_function = compiled.get(key, (sampler, None))
        compiled[key] = (model.sampler, model.make_generate_function())
        for (
            variable
        ) in model.sampler.variables:  # a sampler draws on from where it was: start it anew
            variable.assign(np.array([seed % 2**32, 0], dtype="uint32"))
        with overridden([model], "generate_step", _generate_step):
            yield model.generate_function
    finally:
        model.sampler, model.generate_function = before


def _generate_step(model, inputs, stop_token_ids):
    """KerasHub's own, but it ends at `inputs["limit"]`, not with the row, and copies no caches at each token."""

    def run_loop(sampler, cond, body, model=None, loop_vars=None, maximum_iterations=None):
        steps = ops.minimum(
            maximum_iterations, inputs["limit"] - loop_vars[2]
        )  # from the shortest prompt's end
        return type(sampler).run_loop(sampler, cond, body, model, loop_vars, steps)

    def call_with_cache(model, token_ids, cache, cache_update_index, **options):
        if isinstance(cache, list):  # the compiler drops the stacking of what is then taken apart
            cache = ops.stack([ops.stack(pair, axis=1) for pair in cache], axis=1)
        *found, cache = type(model).call_with_cache(
            model, token_ids, cache, cache_update_index, **options
        )
        if hasattr(
            cache, "shape"
        ):  # one array, (prompts, layers, 2, tokens, heads, head size); Gemma 3 keeps pairs
            cache = [[cache[:, layer, 0], cache[:, layer, 1]] for layer in range(cache.shape[1])]
        return *found, cache

    with (
        overridden([model.sampler], "run_loop", run_loop),
        overridden([model], "call_with_cache", call_with_cache),
    ):
        return type(model).generate_step(model, inputs, stop_token_ids)


def named_sampler(sampler: str | Sampler) -> tuple[Sampler, tuple]:
    """A sampler, and what tells it from others but for the seed."""
    if isinstance(sampler, str):
        if sampler not in _SAMPLERS:
            raise ValueError(f"No sampler is named {sampler!r}. There are: {', '.join(_SAMPLERS)}.")
        sampler = _SAMPLERS[sampler]()
    options = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    known = type(sampler).__module__.startswith(
        "keras_hub."
    )  # of others, the config may not tell all
    return sampler, (type(sampler), repr(options) if known else id(sampler))


def stream(
    model,
    prompt: str | Mapping,
    *,
    sampler: str | Sampler = "greedy",
    template: str | Template | None = "auto",
    max_new_tokens: int | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Answer one prompt, and yield the text piece by piece as its tokens come: together, what `generate` answers.

    >>> import gemma_lora as gl
    >>> model = gl.load("tiny_gemma_en")
    >>> pieces = [*stream(model, "The capital of France is", template=None)]
    >>> "".join(pieces) == gl.generate(model, "The capital of France is", template=None)
    True

    The arguments are those of `generate`. A sampler that keeps several answers at a time, as "beam" does, is a
    ValueError: none of them is certain before the end.
    """
    encoded, ends, new_tokens = encoded_prompts(model, [prompt], template, max_new_tokens)
    tokenizer, size, ids, said = tokenizer_of(model), len(encoded[0]), [], ""
    begin, proceed, draws = _halves(model, sampler, runtime.default_seed if seed is None else seed)
    inputs = padded(
        encoded, 1, padded_length(size + new_tokens, size + new_tokens), tokenizer.pad_id
    )
    weights = [variable.value for variable in _weights(model)]
    with explained_out_of_memory(
        model, answering=True, prompts=1, sequence_length=size + new_tokens
    ):
        cache = begin(weights, inputs)
    for index in range(size, size + new_tokens):
        token, cache, draws = proceed(weights, draws, inputs, cache, index)
        if int(token) in ends:
            return
        inputs["token_ids"][0, index] = token
        ids.append(int(token))
        text = tokenizer.decode(ids).strip()
        if len(text) > len(said) and not text.endswith(
            "\ufffd"
        ):  # else: some bytes of a character, not yet all
            yield text[len(said) :]
            said = text
    if len(text) > len(said):
        yield text[len(said) :]


def _weights(model) -> list:
    return [*model.trainable_variables, *model.non_trainable_variables]


def _halves(model, sampler: str | Sampler, seed: int) -> tuple[Callable, Callable, list]:
    """KerasHub's `generate_step` in halves, the pass over the prompt and one token, and the sampler's seed.

    Each half runs the whole step with a sampler that takes out what it needs; the compiler drops the rest.
    """
    sampler, key = named_sampler(sampler)
    if type(sampler).__call__ is not Sampler.__call__:
        raise ValueError(
            f"{type(sampler).__name__} keeps several answers at a time: none can be streamed."
        )
    begin, proceed, sampler = state_of(model).samplers.get(("stream", key), (None, None, sampler))

    def step(weights, draws, inputs, take: Callable):
        taken, before = [], model.sampler
        mapping = zip([*_weights(model), *sampler.variables], [*weights, *draws], strict=False)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            try:
                model.sampler = lambda next, prompt, cache, **_: (
                    taken.append(take(next, prompt, cache)) or prompt
                )
                model.generate_step(inputs, stop_token_ids=None)
            finally:
                model.sampler = before
            return taken[0], [scope.get_current_value(variable) for variable in sampler.variables]

    def one_token(weights, draws, inputs, cache, index):
        def take(next, prompt, _):  # noqa: A002
            logits, _, new = next(prompt, cache, index)
            return sampler.get_next_token(sampler.compute_probabilities(logits))[0], new

        (token, new), draws = step(weights, draws, inputs, take)
        return token, new, draws

    if begin is None:
        begin = jax.jit(
            lambda weights, inputs: step(weights, [], inputs, lambda next, prompt, cache: cache)[0]
        )
        proceed = jax.jit(one_token, donate_argnums=3)
        state_of(model).samplers["stream", key] = begin, proceed, sampler
    return begin, proceed, [np.array([seed % 2**32, 0], "uint32") for _ in sampler.variables]
