import contextlib
import math
import os
import signal

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import evaluation, training
from gemma_lora.evaluation import Evaluation
from gemma_lora.tiny.corpus import corpus


@pytest.fixture(scope="module")
def held_out():
    return gl.load_tiny_world()[1].select(range(12))


def test_loss_falls_and_answers_become_right_with_tuning(tiny_tuned):
    held_out = gl.load_tiny_world()[1].filter(
        lambda category: category == "open_qa", input_columns="category"
    )
    held_out = held_out.select(range(40))
    after = gl.evaluate(tiny_tuned, held_out)
    with gl.adapters_off(tiny_tuned):
        before = gl.evaluate(tiny_tuned, held_out)
    assert before.share() <= 0.05
    assert after.share() >= 0.8
    assert after.loss < before.loss
    assert len(after.answers) == 40


def test_shares_add_up():
    measured = Evaluation(1.0, 0.5, right={"a": 3, "b": 0}, asked={"a": 4, "b": 4})
    assert (measured.share("a"), measured.share()) == (0.75, 0.375)
    assert measured.perplexity == pytest.approx(math.e)
    assert "75.0%" in str(measured)
    with pytest.raises(ValueError, match="there are"):
        measured.share("c")


def test_answers_are_asked_for_only_where_they_can_be_exact(tiny, random_model, held_out):
    assert gl.evaluate(tiny, held_out.select(range(2))).asked
    assert not gl.evaluate(random_model("gemma"), held_out.select(range(2))).asked


def test_perplexity_of_prose_the_model_knows_is_low(tiny):
    known = gl.perplexity(tiny, ["The capital of France is Paris."])
    assert known < gl.perplexity(tiny, ["Paris France is the The capital of."])
    with pytest.raises(ValueError, match="no text"):
        gl.perplexity(tiny, ["  "])


def test_perplexity_is_the_same_with_adapters_off(tiny_tuned):
    prose = corpus(documents=5, seed=1)
    tuned = gl.perplexity(tiny_tuned, prose)
    with gl.adapters_off(tiny_tuned):
        assert gl.perplexity(tiny_tuned, prose) != tuned


def test_compare_shows_base_and_tuned_side_by_side(tiny_tuned, held_out):
    table = gl.compare(tiny_tuned, ["What is the capital of Slovenia?", held_out[0]])
    assert table[0]["tuned"] == "The capital of Slovenia is Ljubljana."
    assert table[0]["base"] != table[0]["tuned"]
    assert table[1]["response"] == held_out[0]["response"]
    assert "Ljubljana" in str(table)
    assert "Ljubljana" in table._repr_html_()


def test_compare_needs_adapters(tiny):
    with pytest.raises(ValueError, match="no adapters"):
        gl.compare(tiny, ["Hi"])


def test_one_text_is_one_document(tiny):
    text = "The capital of France is Paris."
    assert gl.perplexity(tiny, text) == gl.perplexity(tiny, [text])


def test_what_was_cut_is_told(tiny):
    record = {"instruction": "Say much.", "context": "", "response": "much " * 500}
    measured = gl.evaluate(tiny, [record], answers=False)
    assert measured.truncated == 1
    assert "1 records cut" in str(measured)


def test_ctrl_c_while_measuring_leaves_a_usable_model(tiny, monkeypatch):
    def interrupt(sums, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "_wait_for_step_before", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gl.evaluate(tiny, gl.load_tiny_world()[1].select(range(40)), answers=False)
    assert gl.generate(
        tiny, "The capital of France is", template=None, max_new_tokens=3
    ).startswith("Paris")


def test_the_interval_holds_the_true_share_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for share, n in ((0.5, 20), (0.9, 100), (0.02, 50)):
        held = 0
        for right in rng.binomial(n, share, size=2000):
            low, high = Evaluation(0.5, 0.9, right={"a": int(right)}, asked={"a": n}).interval()
            assert 0 <= low <= right / n <= high <= 1
            held += low <= share <= high
        assert 0.92 <= held / 2000 <= 0.99


def test_distinct_counts_pairs_over_all_texts():
    assert gl.distinct(["a b c", "a b"]) == 2 / 3
    assert gl.distinct(["a a a"], n=1) == 1 / 3
    assert gl.distinct("ab ab ab") == 1 / 2
    with pytest.raises(ValueError, match="n is a whole number, 1 or more"):
        gl.distinct(["a b"], n=0)
    with pytest.raises(ValueError, match="No text has 2 words"):
        gl.distinct(["", "one"])


RIVER = {"instruction": "Name a river.", "response": "The Danube"}


@pytest.mark.parametrize(
    ("judge", "answers", "right"),
    [
        ("exact", ["The Danube", "The  Danube", "The Danube.", "the Danube"], 2),
        ("starts", ["The Danube, in Europe", "It is The Danube"], 1),
        ("contains", ["It is The\nDanube.", "A river"], 1),
        (lambda answer, record: record["response"].lower() in answer.lower(), ["the danube!"], 1),
        (lambda answer, record: np.bool_(len(answer) > 3), ["yes", "no, no"], 1),
    ],
)
def test_answers_are_judged_as_one_asks(tiny, monkeypatch, judge, answers, right):
    monkeypatch.setattr(evaluation, "answers_to", lambda *arguments: answers)
    found = gl.evaluate(tiny, [RIVER] * len(answers), judge=judge)
    assert (found.right, found.asked) == ({"all": right}, {"all": len(answers)})
    assert found.judged in str(found)


def test_a_judge_says_yes_or_no(tiny):
    with pytest.raises(TypeError, match=r"A judge returns True or False. rouge returned 0.3"):

        def rouge(answer, record):
            return 0.3

        gl.evaluate(tiny, [RIVER], judge=rouge, max_new_tokens=2)
    with pytest.raises(ValueError, match=r'"contains" or "starts". Received: judge=\'close\''):
        gl.evaluate(tiny, [RIVER], judge="close")


def test_questions_are_counted_while_they_are_answered(tiny, monkeypatch):
    counted = []

    @contextlib.contextmanager
    def bar(what, total):
        yield counted.append
        counted.append((what, total))

    monkeypatch.setattr(evaluation, "counted", bar)
    rows = gl.load_tiny_world()[1].select(range(100))
    gl.evaluate(tiny, rows, answers=True, max_new_tokens=2)
    *batches, end = counted
    assert (sum(batches), end) == (100, ("Questions", 100))
    assert len(batches) > 1


def test_plain_texts_are_no_records(tiny):
    with pytest.raises(TypeError, match="texts is a text, or a list of texts"):
        gl.perplexity(tiny, [RIVER])
