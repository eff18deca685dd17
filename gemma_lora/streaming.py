"""Show an answer while it is made, token by token."""

from collections.abc import Callable, Iterator, Mapping

import jax
import keras
import numpy as np
from keras_hub.samplers import Sampler

from gemma_lora import runtime
from gemma_lora.lora import factored
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import state_of
from gemma_lora.sampling import encoded_prompts, named_sampler, padded, padded_length
from gemma_lora.templates import Template
from gemma_lora.tokenizer import tokenizer_of


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
    inputs = padded(encoded, 1, padded_length(size + new_tokens, size + new_tokens), tokenizer.pad_id)
    weights = [variable.value for variable in _weights(model)]
    with explained_out_of_memory(model, answering=True, prompts=1, sequence_length=size + new_tokens):
        cache = begin(weights, inputs)
    for index in range(size, size + new_tokens):
        token, cache, draws = proceed(weights, draws, inputs, cache, index)
        if int(token) in ends:
            return
        inputs["token_ids"][0, index] = token
        ids.append(int(token))
        text = tokenizer.decode(ids).strip()
        if len(text) > len(said) and not text.endswith("\ufffd"):  # else: some bytes of a character, not yet all
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
        raise ValueError(f"{type(sampler).__name__} keeps several answers at a time: none can be streamed.")
    begin, proceed, sampler = state_of(model).samplers.get(("stream", key), (None, None, sampler))

    def step(weights, draws, inputs, take: Callable):
        taken, before = [], model.sampler
        mapping = zip([*_weights(model), *sampler.variables], [*weights, *draws], strict=False)
        with keras.StatelessScope(state_mapping=mapping) as scope, factored(model):
            try:
                model.sampler = lambda next, prompt, cache, **_: taken.append(take(next, prompt, cache)) or prompt  # noqa: A006
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
        begin = jax.jit(lambda weights, inputs: step(weights, [], inputs, lambda next, prompt, cache: cache)[0])  # noqa: A006
        proceed = jax.jit(one_token, donate_argnums=3)
        state_of(model).samplers["stream", key] = begin, proceed, sampler
    return begin, proceed, [np.array([seed % 2**32, 0], "uint32") for _ in sampler.variables]
