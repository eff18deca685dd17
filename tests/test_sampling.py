import json
from concurrent.futures import ThreadPoolExecutor

import datasets
import keras
import keras_hub
import numpy as np
import pandas as pd
import pytest
from families import FAMILIES

import gemma_lora as gl
from gemma_lora import sampling
from gemma_lora.models import state_of
from gemma_lora.tokens import tokenizer_of

QUESTION = "What is the capital of France?"
START = "The capital of France is"
full = pytest.mark.full


class Scripted(keras_hub.samplers.Sampler):
    """Draws given tokens one after the other, whatever the model says."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        # Its state is a seed and a count of draws; both start at zero with seed=0.
        self.draws = keras.random.SeedGenerator(0)

    def get_next_token(self, probabilities):
        token = keras.ops.convert_to_tensor(self.tokens)[self.draws.next()[1]]
        return keras.ops.repeat(token, probabilities.shape[0])


@pytest.fixture
def steps(monkeypatch):
    """Names of models, one for each time that `generate_step` was traced to compile."""
    traced = []
    for kind in (keras_hub.models.GemmaCausalLM, keras_hub.models.Gemma3CausalLM):

        def spy(model, *args, original=kind.generate_step, **options):
            traced.append(model.name)
            return original(model, *args, **options)

        monkeypatch.setattr(kind, "generate_step", spy)
    return traced


# The answers are KerasHub's


def keras_hubs_answer(model, prompt: str, sampler, new_tokens: int) -> str:
    size = len(tokenizer_of(model).prompt(None, prompt))
    model.compile(sampler=sampler)
    return model.generate(prompt, max_length=size + new_tokens)[len(prompt) :].strip()


def test_greedy_is_what_keras_hub_answers(tiny):
    prompt = gl.TEMPLATES["recipe"].prompt(QUESTION)
    tiny.compile(sampler="greedy")
    theirs = tiny.generate(prompt, max_length=64, strip_prompt=True)
    ours = gl.generate(tiny, QUESTION, max_new_tokens=20)
    assert ours
    assert theirs.strip().startswith(ours)


def quick(chosen: list, every: list) -> list:
    """Rows for the quick run, and the others for the full one."""
    return [*chosen, *[pytest.param(row, marks=full) for row in every if row not in chosen]]


PAIRS = [
    (family, sampler)
    for family in FAMILIES
    for sampler in ("greedy", "top_k", "top_p", "random", "beam")
    if (family, sampler) != ("gemma3", "beam")
]


@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=full)])
@pytest.mark.parametrize(
    "pair",
    quick([("gemma", "top_p"), ("gemma_many_kv", "beam"), ("gemma3", "top_k")], PAIRS),
    ids=str,
)
def test_every_family_answers_as_keras_hub_does(random_model, pair, adapters):
    family, name = pair
    model = random_model(family)
    if adapters:
        gl.enable_lora(model, rank=2)
    sampler = sampling.chosen_sampler(name)
    # KerasHub's own sampler, which starts from our seed.
    seed = {"seed": 4} if sampler.variables else {}
    theirs = keras_hubs_answer(model, QUESTION, sampler.from_config(sampler.get_config() | seed), 8)
    options = {"sampler": name, "template": None, "max_new_tokens": 8, "seed": 4}
    assert gl.generate(model, QUESTION, **options) == theirs
    if name != "beam":
        assert "".join(gl.stream(model, QUESTION, **options)) == theirs


@pytest.mark.parametrize("family", quick(["gemma2"], FAMILIES))
@pytest.mark.parametrize("mode", quick(["int8"], ["int4"]))
def test_a_quantized_base_answers_as_keras_hub_does(random_model, family, mode):
    model = random_model(family)
    model.backbone.quantize(mode)
    gl.enable_lora(model, rank=2)
    theirs = keras_hubs_answer(model, QUESTION, "greedy", 8)
    options = {"template": None, "max_new_tokens": 8}
    assert gl.generate(model, QUESTION, **options) == theirs
    assert "".join(gl.stream(model, QUESTION, **options)) == theirs


@pytest.mark.parametrize("family", quick(["gemma3"], FAMILIES))
def test_prompts_of_several_lengths_are_answered_as_by_themselves(random_model, family):
    model = random_model(family)
    prompts = [QUESTION, QUESTION * 2]
    together = gl.generate(model, prompts, template=None, max_new_tokens=8)
    assert together == [keras_hubs_answer(model, prompt, "greedy", 8) for prompt in prompts]


def test_what_keras_hub_cannot_do_is_said(random_model):
    with pytest.raises(ValueError, match="no beam search with Gemma 3"):
        gl.generate(random_model("gemma3"), QUESTION, sampler="beam")


# Prompts, seeds, limits


@pytest.mark.parametrize("sampler", quick(["top_p", "beam"], ["greedy", "top_k", "random"]))
def test_the_same_seed_gives_the_same_answer(tiny, sampler):
    first = gl.generate(tiny, QUESTION, sampler=sampler, seed=2, max_new_tokens=8)
    gl.generate(tiny, QUESTION, sampler=sampler, seed=3, max_new_tokens=8)
    assert gl.generate(tiny, QUESTION, sampler=sampler, seed=2, max_new_tokens=8) == first


def test_another_seed_gives_another_answer(tiny):
    answers = {
        gl.generate(tiny, QUESTION, sampler="top_p", seed=seed, max_new_tokens=8)
        for seed in range(5)
    }
    assert len(answers) > 1


def test_a_list_in_is_a_list_out_in_order(tiny):
    prompts = [f"{QUESTION} {'Really? ' * i}" for i in (5, 0, 9, 2)]
    together = gl.generate(tiny, prompts, max_new_tokens=8)
    assert together == [gl.generate(tiny, prompt, max_new_tokens=8) for prompt in prompts]


def test_no_prompts_no_answers(tiny):
    assert gl.generate(tiny, []) == []


def test_template_none_continues_the_text(tiny):
    assert gl.generate(tiny, START, template=None, max_new_tokens=3).startswith("Paris")


def test_context_reaches_the_prompt(tiny):
    with_context = {"instruction": QUESTION, "context": "The capital of Japan is Tokyo. " * 3}
    answers = gl.generate(tiny, [QUESTION, with_context], max_new_tokens=16)
    assert answers[0] != answers[1]


def test_max_new_tokens_bounds_every_answer(tiny):
    prompts = [QUESTION, QUESTION * 6]
    tokenizer = tokenizer_of(tiny)
    for answer in gl.generate(tiny, prompts, max_new_tokens=3):
        assert len(tokenizer.encode([answer])) <= 4  # cut text may encode otherwise, by a token


@pytest.mark.parametrize(
    "sampler",
    [keras_hub.samplers.RandomSampler(temperature=10.0), keras_hub.samplers.BeamSampler()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_no_token_is_computed_beyond_the_limit(tiny, sampler):
    """But for one: a sampler's own loop ends with an end token at the limit."""
    inputs = sampling.padded([[2, 30, 31], [2, 30, 31, 32]], 2, 32, 32, tokenizer_of(tiny))
    decode, seeds = sampling._decoder(tiny, sampler, 0)
    tokens, _, _ = decode(sampling._weights(tiny), seeds, inputs, 32, limit=37, ends=(1,))
    tokens = np.asarray(tokens)
    assert tokens[:, 32:37].all()
    assert set(tokens[:, 37]) <= {0, 1}
    assert not tokens[:, 38:].any()


def test_the_loop_stops_when_every_row_has_ended(tiny):
    """An end token in a prompt ends nothing."""
    sampler = Scripted([40, 41, 1, 42, 43])
    inputs = sampling.padded([[2, 30], [2, 30, 1, 32]], 2, 4, 28, tokenizer_of(tiny))
    decode, seeds = sampling._decoder(tiny, sampler, 0)
    tokens, _, seeds = decode(sampling._weights(tiny), seeds, inputs, 4, limit=32, ends=(1, 106))
    assert np.asarray(tokens)[:, :9].tolist() == [
        [0, 0, 2, 30, 40, 41, 1, 0, 0],
        [2, 30, 1, 32, 40, 41, 1, 0, 0],
    ]
    assert np.asarray(seeds).tolist() == [[0, 3]]


@pytest.mark.parametrize("family", quick(["gemma3"], FAMILIES))
def test_padding_before_a_prompt_changes_nothing(random_model, family):
    """Nor does what stands in other rows, or which side the vocabulary is on."""
    model = random_model(family)
    prompt = tokenizer_of(model).prompt(None, QUESTION)
    decode, seeds = sampling._decoder(model, sampling.chosen_sampler("greedy"), 0)

    def answer(rows, begin):
        inputs = sampling.padded(rows, 1, begin, 8, tokenizer_of(model))
        # What nobody looks at may be anything.
        for row, first in zip(inputs["token_ids"], inputs["first"], strict=True):
            row[:first] = 7
        limit = begin + 8
        tokens, _, _ = decode(
            sampling._weights(model), seeds, inputs, begin, limit=limit, ends=(1,)
        )
        return np.asarray(tokens)[0, begin:limit].tolist()

    alone = answer([prompt], len(prompt))
    assert answer([prompt], len(prompt) + 13) == alone
    assert answer([prompt, [*prompt, *prompt]], 2 * len(prompt) + 5) == alone


def test_a_long_prompt_is_not_answered_among_many_short_ones():
    def rows(sizes):
        return len(sampling._batches(sizes)[0])

    assert rows([8] * 15 + [3000]) == 2
    assert rows([8, 9, 9, 10]) == 4
    assert rows([20] * 64) == 64
    assert [len(batch) for batch in sampling._batches([20] * 70)] == [32, 32, 6]


# Samplers, and what is compiled


def test_optimizer_sampler_and_compiled_function_of_the_model_stay(tiny):
    optimizer = keras.optimizers.AdamW(3e-4)
    sampler = keras_hub.samplers.TopKSampler(k=3)
    tiny.compile(optimizer=optimizer, sampler=sampler)
    own_function = tiny.make_generate_function()
    seed = np.array(sampler.variables[0])
    # Asked for by itself, the model's own sampler is as safe as any other.
    gl.generate(tiny, QUESTION, sampler=sampler, max_new_tokens=4)
    assert [*gl.stream(tiny, QUESTION, sampler=sampler, max_new_tokens=4)]
    assert tiny.optimizer is optimizer
    assert tiny.sampler is sampler
    assert tiny.generate_function is own_function
    assert np.array_equal(sampler.variables[0], seed)


@pytest.mark.parametrize("stops", quick([KeyboardInterrupt], [RuntimeError]))
@pytest.mark.parametrize("ask", [gl.generate, lambda *args, **named: [*gl.stream(*args, **named)]])
def test_a_call_that_breaks_off_leaves_the_model_as_it_was(tiny, ask, stops):
    class Broken(keras_hub.samplers.GreedySampler):
        broken = True

        def get_next_token(self, probabilities):
            if self.broken:
                raise stops
            return super().get_next_token(probabilities)

    sampler, before = Broken(), (tiny.sampler, tiny.generate_function)
    options = {"template": None, "max_new_tokens": 2}
    with pytest.raises(stops):
        ask(tiny, START, sampler=sampler, **options)
    assert (tiny.sampler, tiny.generate_function) == before
    sampler.broken = False
    assert "".join(ask(tiny, START, sampler=sampler, **options)) == "Paris"


def test_what_was_compiled_for_an_equal_sampler_is_used_again(tiny_lora, steps):
    def ask(**options):
        options = {"max_new_tokens": 4} | options
        gl.generate(tiny_lora, QUESTION, **options)
        [*gl.stream(tiny_lora, QUESTION, **options)]

    ask(sampler="top_k", seed=1)
    # The loop; and the pass over the prompt and one token.
    assert len(steps) == 3
    ask(sampler=keras_hub.samplers.TopKSampler(k=5, seed=9), seed=2)
    ask(sampler="top_k", max_new_tokens=5)
    with gl.adapters_off(tiny_lora):
        ask(sampler="top_k")
    assert len(steps) == 3
    gl.generate(tiny_lora, QUESTION, sampler=keras_hub.samplers.TopKSampler(k=4), max_new_tokens=4)
    assert len(steps) == 4
    gl.remove_adapter(tiny_lora)
    assert not state_of(tiny_lora).samplers


def test_a_sampler_of_ones_own_is_used(tiny):
    narrow = keras_hub.samplers.TopKSampler(k=1)
    assert gl.generate(tiny, QUESTION, sampler=narrow, max_new_tokens=8) == gl.generate(
        tiny, QUESTION, max_new_tokens=8
    )


def test_a_sampler_whose_config_does_not_tell_all_is_not_mixed_up(tiny):
    tokenizer = tokenizer_of(tiny)
    for word in ("Paris", "river"):
        tokens = tokenizer.encode([word])
        options = {"template": None, "max_new_tokens": len(tokens), "seed": 0}
        assert gl.generate(tiny, START, sampler=Scripted(tokens), **options) == word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ""}, "A prompt is text"),
        ({"prompts": [QUESTION, None]}, "A prompt is text"),
        (
            {"prompts": {"frage": QUESTION}},
            r"record with an instruction .* Received the fields \['frage'\]",
        ),
        ({"prompts": {"instruction": QUESTION, "context": 5}}, "'context' must be text"),
        ({"prompts": [{"role": "user", "content": "a"}] * 2}, "has one user turn"),
        ({"prompts": {"instruction": QUESTION, "history": [["a", "b"]]}}, "earlier turns"),
        ({"prompts": QUESTION, "sampler": "greddy"}, "greedy, top_k"),
        ({"prompts": QUESTION, "template": "alpaca"}, "recipe, turns"),
        ({"prompts": QUESTION, "max_new_tokens": 0}, "1 or more"),
    ],
)
def test_wrong_arguments_are_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        gl.generate(tiny, **arguments)


# Streaming


@pytest.mark.parametrize("sampler", quick(["top_p"], ["greedy", "top_k", "random"]))
@pytest.mark.parametrize(
    "prompt", quick([{"instruction": "Who?", "context": "é 日本 🌍 " * 3}], [QUESTION])
)
def test_streamed_pieces_are_the_answer(tiny, sampler, prompt):
    options = {"sampler": sampler, "seed": 4, "max_new_tokens": 24}
    pieces = [*gl.stream(tiny, prompt, **options)]
    assert "".join(pieces) == gl.generate(tiny, prompt, **options)
    assert len(pieces) > 3 and all(pieces)


def test_a_piece_holds_whole_characters(tiny):
    """Also where the end token, or the limit, cuts a character in two."""
    tokenizer = tokenizer_of(tiny)
    globe = tokenizer.encode([" 🌍"])
    assert len(globe) > 4, "the vocabulary is to lack this character"
    tokens = [*tokenizer.encode([" a 🌍"]), *globe[:-1], tokenizer.id_of("<eos>"), *[0] * 16]
    options = {"sampler": Scripted(tokens), "seed": 0}
    for new_tokens in (16, 10, 3):
        pieces = [*gl.stream(tiny, QUESTION, max_new_tokens=new_tokens, **options)]
        assert "".join(pieces) == gl.generate(tiny, QUESTION, max_new_tokens=new_tokens, **options)
        assert all(pieces) and not any("\ufffd" in piece for piece in pieces[:-1])
        assert new_tokens == 3 or "🌍" in pieces[1]


def test_a_stream_can_be_left_and_another_answer_asked_for_between(tiny):
    sampler, stream = tiny.sampler, gl.stream(tiny, QUESTION, max_new_tokens=8)
    first = next(stream)
    answer = gl.generate(tiny, QUESTION, max_new_tokens=8)
    assert first + "".join(stream) == answer
    next(gl.stream(tiny, QUESTION, max_new_tokens=8))
    assert tiny.sampler is sampler


# Prompts in every form


@pytest.mark.parametrize(
    "prompt",
    [
        {"Question": QUESTION},
        {"messages": [{"role": "user", "content": QUESTION}]},
        [{"role": "user", "content": QUESTION}],
        [{"from": "human", "value": QUESTION, "role": "user", "content": QUESTION}],
        {"instruction": QUESTION, "response": "Paris.", "id": 3, "context": None},
    ],
)
def test_a_single_prompt_in_any_form_gets_one_answer(tiny, prompt):
    assert gl.generate(tiny, prompt, max_new_tokens=8) == gl.generate(
        tiny, QUESTION, max_new_tokens=8
    )
    assert "".join(gl.stream(tiny, prompt, max_new_tokens=8)) == gl.generate(
        tiny, QUESTION, max_new_tokens=8
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: pd.DataFrame(rows),
        lambda rows: datasets.Dataset.from_list(rows),
        lambda rows: iter(rows),
        lambda rows: tuple(row["question"] for row in rows),
        lambda rows: {"question": [row["question"] for row in rows]},
        lambda rows: [[{"role": "user", "content": row["question"]}] for row in rows],
        lambda rows: pd.DataFrame(rows)["question"],
        lambda rows: np.array([row["question"] for row in rows]),
    ],
)
def test_many_prompts_in_any_form_get_an_answer_each(tiny, form):
    rows = [{"question": QUESTION}, {"question": "Name a river."}]
    alone = [gl.generate(tiny, row["question"], max_new_tokens=6) for row in rows]
    assert gl.generate(tiny, form(rows), max_new_tokens=6) == alone


def test_a_system_turn_is_the_context(tiny):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    record = {"instruction": QUESTION, "context": "Be brief."}
    assert gl.generate(tiny, chat, max_new_tokens=8) == gl.generate(tiny, record, max_new_tokens=8)


def test_threads_get_the_answers_that_each_would_get_alone(tiny_factory):
    """As in a server: also while one streams, measures or switches adapters."""
    model = tiny_factory()
    gl.enable_lora(model)
    rows = gl.load_tiny_world()[1].select(range(4))
    tasks = [
        lambda: gl.generate(model, QUESTION, max_new_tokens=8),
        lambda: gl.generate(model, [START, QUESTION], max_new_tokens=5, sampler="top_k"),
        lambda: "".join(gl.stream(model, START, template=None, max_new_tokens=6)),
        lambda: str(gl.compare(model, [START], max_new_tokens=3)),
        lambda: gl.evaluate(model, rows, answers=False).loss,
    ]
    with ThreadPoolExecutor(len(tasks)) as pool:
        # The first round also compiles, all at once.
        rounds = [[*pool.map(lambda task: task(), tasks)] for _ in range(3)]
    assert rounds == [[task() for task in tasks]] * 3


def test_what_cannot_be_streamed_is_said(tiny):
    with pytest.raises(ValueError, match="BeamSampler keeps several answers"):
        next(gl.stream(tiny, QUESTION, sampler="beam"))
    with pytest.raises(ValueError, match="A prompt is text"):
        next(gl.stream(tiny, ""))


@pytest.mark.parametrize(
    ("options", "kind", "values"),
    [
        ({}, "GreedySampler", {}),
        ({"temperature": 0}, "GreedySampler", {}),
        ({"temperature": 0.7}, "RandomSampler", {"temperature": 0.7}),
        ({"top_k": np.int64(40)}, "TopKSampler", {"k": 40, "temperature": 1.0}),
        ({"top_p": 0.8, "top_k": 40}, "TopPSampler", {"p": 0.8, "k": 40}),
        ({"sampler": "top_k", "temperature": 2}, "TopKSampler", {"k": 5, "temperature": 2.0}),
        ({"sampler": "top_p"}, "TopPSampler", {"p": 0.9, "k": None}),
        ({"sampler": "beam"}, "BeamSampler", {"num_beams": 5}),
    ],
)
def test_options_choose_the_sampler(options, kind, values):
    sampler = sampling.chosen_sampler(**{"sampler": None} | options)
    assert type(sampler).__name__ == kind
    assert {name: getattr(sampler, name) for name in values} == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "greedy", "temperature": 0.7}, "sampler='greedy' takes no temperature"),
        ({"sampler": "random", "top_p": 0.7}, "takes no top_p. These do: top_p"),
        ({"sampler": "top_k", "temperature": 0}, "takes the likeliest token, but"),
        ({"sampler": keras_hub.samplers.RandomSampler(), "top_k": 2}, "has options of its own"),
        ({"temperature": -1}, "temperature is a number, 0 or more"),
        ({"top_p": 0}, "top_p is above 0, and at most 1"),
        ({"top_k": 4096}, "top_k is at most 2,048"),
    ],
)
def test_options_that_do_not_go_together_are_said(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        gl.generate(tiny, QUESTION, **options)


def test_a_temperature_near_zero_is_greedy_and_a_high_one_is_not(tiny):
    greedy = gl.generate(tiny, QUESTION, max_new_tokens=8)
    assert gl.generate(tiny, QUESTION, max_new_tokens=8, temperature=0) == greedy
    assert gl.generate(tiny, QUESTION, max_new_tokens=8, temperature=1e-3) == greedy
    assert gl.generate(tiny, QUESTION, max_new_tokens=8, temperature=5.0) != greedy
    streamed = "".join(gl.stream(tiny, QUESTION, max_new_tokens=8, temperature=0.7, seed=3))
    assert gl.generate(tiny, QUESTION, max_new_tokens=8, temperature=0.7, seed=3) == streamed


def test_a_row_of_a_frame_and_a_file_are_prompts(tiny, tmp_path):
    frame = pd.DataFrame([{"question": QUESTION, "answer": "So."}])
    alone = gl.generate(tiny, QUESTION, max_new_tokens=4)
    assert gl.generate(tiny, frame.iloc[0], max_new_tokens=4) == alone
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"question": QUESTION}) + "\n")
    assert gl.generate(tiny, file, max_new_tokens=4) == [alone]
    assert gl.generate(tiny, str(file), max_new_tokens=4) == [alone]


def test_without_a_template_nothing_is_dropped_in_silence(tiny):
    with pytest.raises(ValueError, match="Without a template, a prompt has no place for a context"):
        gl.generate(tiny, {"question": QUESTION, "context": "Read this."}, template=None)


def test_a_temperature_too_low_for_numbers_is_greedy(tiny):
    options = {"max_new_tokens": 8, "temperature": 1e-9}
    assert gl.generate(tiny, QUESTION, **options) == gl.generate(tiny, QUESTION, max_new_tokens=8)


def test_columns_that_a_prompt_has_no_use_for_are_said(tiny):
    with pytest.warns(UserWarning, match="not used: 'document'"):
        gl.generate(tiny, {"question": QUESTION, "document": "Read."}, max_new_tokens=1)
