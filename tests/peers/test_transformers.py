"""The small model and our loss against Transformers: same weights, another library."""

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora.lora import lora_layers
from gemma_lora.models import TINY_FOLDER
from gemma_lora.tokens import encode, tokenizer_of

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def peer(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    tiny.export_to_transformers(str(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples(tiny):
    return encode(tiny, gl.load_tiny_world()[1].select(range(20))).examples


def test_logits_agree(tiny, peer, examples):
    for example in examples[:5]:
        ids = np.array([example.inputs])
        ours = np.asarray(tiny({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        with torch.no_grad():
            theirs = peer(torch.tensor(ids)).logits.numpy()
        assert np.abs(ours - theirs).max() < 1e-3


def test_the_loss_per_real_token_is_what_transformers_computes(tiny, peer, examples):
    """Transformers averages over labels other than -100: here, over the response."""
    total = count = 0
    for example in examples:
        ids = [*example.inputs, example.targets[-1]]
        labels = [-100] + [
            t if w else -100 for t, w in zip(example.targets, example.weights, strict=True)
        ]
        with torch.no_grad():
            loss = peer(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * sum(example.weights), count + sum(example.weights)
    ours = gl.evaluate(tiny, gl.load_tiny_world()[1].select(range(20)), answers=False).loss
    assert ours == pytest.approx(total / count, rel=1e-4)


def test_greedy_answers_are_the_same(tiny, peer):
    tokenizer, prompts = tokenizer_of(tiny), ["The capital of France is", "A young lion is called"]
    ours = gl.generate(tiny, prompts, template=None, max_new_tokens=12)
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = tokenizer.prompt(None, prompt)
        out = peer.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        new = out[0, len(ids) :].tolist()
        assert tokenizer.decode(new[: new.index(1)] if 1 in new else new).strip() == answer


def test_peft_and_keras_agree_on_the_update(random_model):
    """With one A for all heads, Keras's update is PEFT's B A times alpha / rank."""
    peft = pytest.importorskip("peft")
    model = random_model("gemma")
    gl.enable_lora(model, rank=2, alpha=6, targets=["value"])
    layer = next(iter(lora_layers(model).values()))
    layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=layer.lora_kernel_b.shape))

    base = torch.nn.Sequential(
        torch.nn.Linear(layer._kernel.shape[1], layer._kernel.shape[2], bias=False)
    )
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    ).base_model.model[0]
    head = 0
    with torch.no_grad():
        wrapped.base_layer.weight.copy_(torch.tensor(np.asarray(layer._kernel)[head].T.copy()))
        wrapped.lora_A["default"].weight.copy_(
            torch.tensor(np.asarray(layer.lora_kernel_a)[head].T.copy())
        )
        wrapped.lora_B["default"].weight.copy_(
            torch.tensor(np.asarray(layer.lora_kernel_b).T.copy())
        )
    x = np.random.default_rng(1).normal(size=(1, 3, layer._kernel.shape[1])).astype("float32")
    with torch.no_grad():
        theirs = wrapped(torch.tensor(x)).numpy()
    assert np.abs(np.asarray(layer(x))[:, :, head] - theirs).max() < 1e-5


def test_a_folder_that_transformers_has_saved_again_is_loaded(tiny, tmp_path):
    """Transformers 5 saves the vocabulary as tokenizer.json alone."""
    gl.export_transformers(tiny, tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs/tokenizer.model").exists()
    again = gl.load(tmp_path / "theirs")
    own = tokenizer_of(tiny)
    texts = [row["response"] for row in gl.load_tiny_world()[1]]
    for text in [*texts, "naïve  café\n\n日本 <start_of_turn>user\nHi 12 \t x"]:
        assert tokenizer_of(again).encode([text]) == own.encode([text])
    prompt = "The capital of France is"
    assert gl.generate(again, prompt, max_new_tokens=8) == gl.generate(
        tiny, prompt, max_new_tokens=8
    )
    budget = gl.memory_budget(tmp_path / "theirs", compile=False)
    assert budget.parameters == tiny.count_params()


def test_of_a_gemma_3_with_pictures_the_text_part_computes_the_same(tmp_path):
    text = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    vocabulary = TINY_FOLDER / "assets/tokenizer/vocabulary.spm"
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    model = gl.load(tmp_path)
    assert model.backbone.vision_encoder is None
    assert gl.memory_budget(tmp_path, compile=False).parameters == model.count_params()
    ids = np.random.default_rng(0).integers(8, 2048, (1, 24))
    ours = np.asarray(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    with torch.no_grad():
        theirs = whole(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-4
