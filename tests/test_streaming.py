import pytest
from families import FAMILIES

import gemma_lora as gl

QUESTION = "What is the capital of France?"


@pytest.mark.parametrize("sampler", ["greedy", "top_k", "top_p", "random"])
@pytest.mark.parametrize("prompt", [QUESTION, {"instruction": "Who?", "context": "é 日本 🌍 " * 3}])
def test_streamed_pieces_are_the_answer(tiny, sampler, prompt):
    options = {"sampler": sampler, "seed": 4, "max_new_tokens": 24}
    pieces = [*gl.stream(tiny, prompt, **options)]
    assert "".join(pieces) == gl.generate(tiny, prompt, **options)
    assert len(pieces) > 3 and all(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams(random_model, family):
    model = random_model(family)
    gl.enable_lora(model, rank=2)
    assert "".join(gl.stream(model, QUESTION, max_new_tokens=5)) == gl.generate(
        model, QUESTION, max_new_tokens=5
    )


def test_a_stream_can_be_left_and_another_answer_asked_for_between(tiny):
    sampler, stream = tiny.sampler, gl.stream(tiny, QUESTION, max_new_tokens=8)
    first = next(stream)
    answer = gl.generate(tiny, QUESTION, max_new_tokens=8)
    assert first + "".join(stream) == answer
    next(gl.stream(tiny, QUESTION, max_new_tokens=8))
    assert tiny.sampler is sampler


def test_what_cannot_be_streamed_is_said(tiny):
    with pytest.raises(ValueError, match="BeamSampler keeps several answers"):
        next(gl.stream(tiny, QUESTION, sampler="beam"))
    with pytest.raises(ValueError, match="A prompt is text"):
        next(gl.stream(tiny, ""))
