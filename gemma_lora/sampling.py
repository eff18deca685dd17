"""Ask a model: its answer only, stopped where it ends, repeatable."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import keras_hub
import numpy as np
from keras_hub.samplers import Sampler

from gemma_lora import runtime
from gemma_lora.batches import tokenizer_of
from gemma_lora.memory import explained_out_of_memory
from gemma_lora.models import state_of
from gemma_lora.templates import Template, get_template

_SAMPLERS = {
    "greedy": lambda: keras_hub.samplers.GreedySampler(),
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=5),  # the published recipe's
    "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.9),
    "random": lambda: keras_hub.samplers.RandomSampler(),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=5),
}
_BATCH = 64  # prompts answered together
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
    state = state_of(model)
    one = isinstance(prompts, str | Mapping)
    tokenizer = tokenizer_of(model)
    new_tokens = state.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise ValueError(f"max_new_tokens is a whole number, 1 or more. Received: {max_new_tokens!r}")
    if template == "auto":
        template = template_of(model)
    ends = {tokenizer.id_of("<eos>")}
    if template is not None:
        template = get_template(template)
        ends.add(tokenizer.id_of(template.end))
    encoded = []
    for prompt in [prompts] if one else prompts:
        text = prompt["instruction"] if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"A prompt is text, or a record with an instruction. Received: {prompt!r}")
        encoded.append(tokenizer.prompt(template, prompt if template else text))

    answers = [""] * len(encoded)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with _compiled(model, sampler, runtime.default_seed if seed is None else seed) as function:
        for start in range(0, len(by_length), _BATCH):
            rows = by_length[start : start + _BATCH]
            shape = {"prompts": len(rows), "sequence_length": len(encoded[rows[-1]]) + new_tokens}
            batch = [encoded[i] for i in rows]
            with explained_out_of_memory(model, answering=True, **shape):
                ids = [*_generate_ids(function, batch, new_tokens, tuple(sorted(ends)), tokenizer.pad_id)]
            for i, answer in zip(rows, ids, strict=True):
                answers[i] = tokenizer.decode(answer).strip()
    return answers[0] if one else answers


def template_of(model) -> str | Template:
    """The template of the model's training run, or the one recommended for it."""
    state = state_of(model)
    return state.run["template"] if state.run else state.settings.template


def _generate_ids(function, prompts: list[list[int]], new_tokens: int, ends: tuple[int, ...], pad_id: int):
    """Run the compiled loop on one batch, and yield the new ids of each prompt, up to its first end token."""
    rows = 1 << (len(prompts) - 1).bit_length()  # few shapes: batches are filled up to a power of two
    length = -(-(max(map(len, prompts)) + new_tokens) // _SHAPE_STEP) * _SHAPE_STEP
    token_ids, mask = np.full((rows, length), pad_id, "int32"), np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        token_ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    output = np.asarray(function({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=ends)["token_ids"])
    for row, prompt in enumerate(prompts):
        new = output[row, len(prompt) : len(prompt) + new_tokens].tolist()
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        yield new[:end]


@contextmanager
def _compiled(model, sampler: str | Sampler, seed: int) -> Iterator[Callable]:
    """Give the model a sampler for a while; what was compiled for an equal sampler before is used again."""
    if isinstance(sampler, str):
        if sampler not in _SAMPLERS:
            raise ValueError(f"No sampler is named {sampler!r}. There are: {', '.join(_SAMPLERS)}.")
        sampler = _SAMPLERS[sampler]()
    options = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    known = type(sampler).__module__.startswith("keras_hub.")  # of others, the config may not tell all
    compiled, key = state_of(model).samplers, (type(sampler), repr(options) if known else id(sampler))
    before = model.sampler, model.generate_function
    try:
        model.sampler, model.generate_function = compiled.get(key, (sampler, None))
        compiled[key] = (model.sampler, model.make_generate_function())
        for variable in model.sampler.variables:  # a sampler draws on from where it was: start it anew
            variable.assign(np.array([seed % 2**32, 0], dtype="uint32"))
        yield model.generate_function
    finally:
        model.sampler, model.generate_function = before
