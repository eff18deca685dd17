"""llama.cpp runs what we export, and Transformers reads it: the same as we compute.

llama.cpp comes as the package xllamacpp. Ollama and LM Studio are built on it. Its GELU
is a table in half precision, so even in float32 it differs in the fourth digit.
"""

import families
import numpy as np
import pytest
import requests
from families import FAMILIES, random_gemma
from test_lora import randomize_adapters

import gemma_lora as gl
from gemma_lora.tokens import tokenizer_of

llama = pytest.importorskip("xllamacpp", reason="needs the extra `peers`")
pytestmark = pytest.mark.peers

# Longer than the windows of the small models.
PROMPT = "What should I do on a trip to Europe? The capital of France is far from Peru. " * 2
TEXTS = [
    PROMPT,
    "1 2 3\n\n\tdéjà vu 🙂   and\n\n\n  so on ",
    " begins with a space; 3.14159, don't, naïve, Ⅷ, 東京",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
]
# How far a log-probability of llama.cpp's may be from ours, by the dtype of the file.
LIMITS = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 6e-2, "q8_0": 0.3}


def serve(path, adapters=()):
    """Start llama.cpp in this process, as exact as it can be."""
    params = llama.CommonParams()
    params.model.path = str(path)
    params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter)) for adapter in adapters]
    params.n_ctx = 512
    params.n_parallel = 1
    params.verbosity = 0
    params.warmup = params.fit_params = False
    # Two threads of it wait for each other by running, on cores that others use.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # By default it keeps keys and values in half precision.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.Server(params)


def complete(server, prompt, **options) -> dict:
    """Ask for a greedy completion, and return the first choice, with usage."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 64, **options}
    reply = server.handle_completions(body)
    return reply["choices"][0] | {"usage": reply["usage"]}


def difference(model, server, prompt=PROMPT) -> float:
    """Return the largest difference between two log-probabilities of next tokens.

    Each of llama.cpp's tokens must be the best here too, or as good as that.
    """
    reply = complete(server, prompt, max_tokens=12, logprobs=40)
    steps = reply["logprobs"]["content"]
    ids = tokenizer_of(model).prompt(None, prompt)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    row = np.array([[*ids, *(step["id"] for step in steps)]])
    logits = model({"token_ids": row, "padding_mask": np.ones_like(row)})
    logits = np.asarray(logits, "float64")[0, len(ids) - 1 :]
    ours = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for step, row in zip(steps, ours[:-1], strict=True):
        found += [abs(one["logprob"] - row[one["id"]]) for one in step["top_logprobs"]]
        assert row[step["id"]] > row.max() - 2 * max(found)
    return max(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(tmp_path, family):
    model = random_gemma(family)
    gl.export_gguf(model, tmp_path / "base.gguf")
    gl.enable_lora(model, rank=3, alpha=6, targets="all_linear")
    randomize_adapters(model)
    found = {}
    for dtype in LIMITS:
        gl.export_gguf(model, tmp_path / f"{dtype}.gguf", dtype=dtype)
        found[dtype] = difference(model, serve(tmp_path / f"{dtype}.gguf"))
    gl.export_gguf(model, tmp_path / "adapter.gguf", adapter_only=True)
    server = serve(tmp_path / "base.gguf", [tmp_path / "adapter.gguf"])
    found["base and adapter"] = difference(model, server)
    print(f"{family} |", " | ".join(f"{name} {value:.1e}" for name, value in found.items()))
    for name, value in found.items():
        assert value < LIMITS.get(name, LIMITS["float32"]), name
    with gl.adapters_off(model):
        assert difference(model, serve(tmp_path / "base.gguf")) < LIMITS["float32"]


def test_llama_cpp_knows_caps_and_long_positions_of_gemma_3(tmp_path, monkeypatch):
    """One layer sees the whole text, with stretched positions; the output is capped."""
    monkeypatch.setitem(families.SHAPE, "num_layers", 7)
    model = random_gemma("gemma3", final_logit_soft_cap=3.0, global_rope_scaling_factor=8.0)
    gl.export_gguf(model, tmp_path / "x.gguf")
    assert difference(model, serve(tmp_path / "x.gguf")) < LIMITS["float32"]


@pytest.fixture(scope="module")
def files(tiny_tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for dtype in LIMITS:
        gl.export_gguf(tiny_tuned, folder / f"{dtype}.gguf", dtype=dtype)
    return folder


@pytest.fixture(scope="module")
def answers(tiny_tuned):
    """Forty held-out questions, and the greedy answer to each."""
    held_out = [*gl.load_tiny_world()[1].select(range(40))]
    return held_out, gl.generate(tiny_tuned, held_out, max_new_tokens=64)


@pytest.mark.parametrize("dtype", LIMITS)
def test_llama_cpp_gives_the_same_answers(tiny_tuned, files, answers, dtype):
    held_out, ours = answers
    server = serve(files / f"{dtype}.gguf")
    template = tiny_tuned.gemma_lora.run["template"]
    theirs = [complete(server, template.prompt(record)) for record in held_out]
    assert {answer["finish_reason"] for answer in theirs} == {"stop"}
    same = sum(answer["text"].strip() == our for answer, our in zip(theirs, ours, strict=True))
    print(f"{dtype}: {same} of 40 answers, {difference(tiny_tuned, server):.1e}")
    assert same == 40 if dtype == "float32" else same >= 36


def test_llama_cpp_encodes_the_same(tiny_tuned, files):
    server = serve(files / "float32.gguf")
    tokenizer = tokenizer_of(tiny_tuned)
    texts = TEXTS + [row["response"] for row in gl.load_tiny_world()[0].select(range(100))]
    for text in texts:
        body = {"content": text, "add_special": True, "parse_special": True}
        reply = requests.post(f"{server.listening_address}/tokenize", json=body, timeout=60)
        assert reply.json()["tokens"] == [tokenizer.bos_id, *tokenizer.encode([text])], text


@pytest.mark.parametrize("name", gl.TEMPLATES)
def test_a_chat_in_llama_cpp_is_rendered_as_in_training(tiny_tuned, tmp_path, name):
    """One `<bos>`, the template of tuning, and an end where the template has it."""
    run = tiny_tuned.gemma_lora.run
    tiny_tuned.gemma_lora.run = run | {"template": gl.TEMPLATES[name]}
    try:
        gl.export_gguf(tiny_tuned, tmp_path / "x.gguf")
    finally:
        tiny_tuned.gemma_lora.run = run
    server = serve(tmp_path / "x.gguf")
    tokenizer = tokenizer_of(tiny_tuned)
    question = "What is the capital of Slovenia?"
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    reply = server.handle_chat_completions(body | {"max_tokens": 64})
    ids = tokenizer.prompt(name, question)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    answer = reply["choices"][0]["message"]["content"].strip()
    assert answer == gl.generate(tiny_tuned, question, template=name, max_new_tokens=64)
    end = tokenizer.id_of(gl.TEMPLATES[name].end)
    ended = complete(server, ids, logit_bias=[[end, 100.0]])
    assert (ended["finish_reason"], ended["text"]) == ("stop", "")


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_transformers_reads_the_file(tmp_path, monkeypatch, family, dtype):
    """Transformers reads no Gemma 1 from GGUF, and takes every head for 256 wide."""
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setitem(families.SHAPE, "head_dim", 256)
    model = random_gemma(family)
    gl.export_gguf(model, tmp_path / "x.gguf", dtype=dtype)
    ids = np.random.default_rng(0).integers(10, 400, (2, 24))
    ours = gl.load(tmp_path / "x.gguf")({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = other.eval()(torch.tensor(ids)).logits.numpy()
    apart = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"{family} {dtype}: {apart:.1e} of the largest logit")
    assert apart < 1e-3
