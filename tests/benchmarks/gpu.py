"""Measure one GPU: gemma_lora beside stock KerasHub and Transformers + PEFT.

    python tests/benchmarks/gpu.py [--only PART,PART] [--skip PART] [--seconds 420]

Every weight is random and is made on the device. Each part runs in its own process,
because JAX keeps a GPU's memory until its process ends. Each result is one line of
JSON. It is printed at once and appended to gpu.jsonl in the folder $OUT (the current
folder if OUT is unset), so a run that is cut off keeps what it had measured.
`gpu_results.py` turns the lines into one file.

After --seconds, no new part and no new measurement starts. With --tiny-geometry every
part runs on small shapes, which needs no GPU: a rehearsal, not a measurement.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median

from contenders import compile_as_recipe

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parents[2]
VOCABULARY = REPOSITORY / "gemma_lora/tiny/tiny_gemma_en/assets/tokenizer/vocabulary.spm"
TINY_VOCABULARY = 2048
# The id of the token <eos>.
END = 1
PACKAGES = ("keras", "keras-hub", "jax", "numpy", "torch", "transformers", "peft")
GIB = 2**30
LOWERED = "0.90"
# Words of an error that a smaller reservation of memory may cure.
STARVED = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory", "CUDA", "cuBLAS", "cublas")

# Dense bfloat16 FLOP/s, from the data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
FLOPS_FORMULA = (
    "FLOPs a step = 4 x (parameters outside the embedding) x tokens + 4 x vocabulary x hidden"
    " x learned tokens: forward, and backward through activations; the base is frozen, so it"
    " has no weight gradients. Products of queries and keys are not counted."
)


def geometry(layers, query_heads, key_value_heads, hidden, intermediate, vocabulary) -> dict:
    """Return the arguments of a KerasHub backbone; every head has 256 values."""
    return {
        "num_layers": layers,
        "num_query_heads": query_heads,
        "num_key_value_heads": key_value_heads,
        "hidden_dim": hidden,
        "intermediate_dim": intermediate,
        "head_dim": 256,
        "vocabulary_size": vocabulary,
    }


# Gemma 1 counts gate and value together in intermediate_dim, Gemma 3 one of them. We
# do not take the table of gemma_lora.memory: the process that measures PEFT has no Keras.
GEOMETRIES = {
    "gemma_2b": geometry(18, 8, 1, 2048, 32768, 256_000),
    "gemma_7b": geometry(28, 16, 16, 3072, 49152, 256_000),
    "gemma3_270m": geometry(18, 4, 1, 640, 2048, 262_144),
}
SHRUNK = {
    "num_layers": 2,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "head_dim": 16,
    "vocabulary_size": 4096,
}

# Rows, tokens a row, and steps of one timed round: short steps need more of them.
SHAPES = ((1, 256, 40), (4, 512, 12), (8, 1024, 6))
# One long row, where a block's activations are most of the memory.
LONG = ((1, 8192, 3),)
SHRUNK_SHAPES = ((1, 64, 4), (2, 96, 3), (2, 128, 3))
ROUNDS = 3
PROMPTS = (1, 64)
PROMPT_TOKENS = 32
NEW_TOKENS = 128


@dataclass
class Session:
    """One part in its own process: where its results go, and when it must stop."""

    part: str
    until: float
    tiny: bool
    lines: Path
    succeeded: int = 0
    error: str = ""

    @property
    def shapes(self) -> tuple:
        """Return the shapes to train on, smallest first: a memory peak only rises."""
        return SHRUNK_SHAPES if self.tiny else SHAPES

    @property
    def long(self) -> tuple:
        """Return the shape of one long row."""
        return ((1, 256, 3),) if self.tiny else LONG

    @property
    def new_tokens(self) -> int:
        """Return how many tokens each answer has."""
        return 16 if self.tiny else NEW_TOKENS

    def geometry(self, name: str) -> dict:
        """Return a model's shape, or a small one like it."""
        shape = GEOMETRIES[name]
        if not self.tiny:
            return shape
        heads = {"num_query_heads": 4, "num_key_value_heads": min(2, shape["num_key_value_heads"])}
        return shape | SHRUNK | heads

    def emit(self, what: str, **values) -> None:
        """Print a result as one line of JSON, and append it to the file."""
        line = json.dumps({"part": self.part, "what": what, **values})
        print(line, flush=True)
        with self.lines.open("a") as file:
            file.write(line + "\n")

    def measure(self, what: str, function: Callable[[], dict], **labels) -> bool:
        """Report what a function returns, or its error. Return whether it worked."""
        if time.time() > self.until:
            self.emit(what, **labels, skipped="out of time")
            return True
        start = time.monotonic()
        try:
            values = function()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            values = {"error": last_lines(error)}
        self.succeeded += "error" not in values
        values["wall_seconds"] = round(time.monotonic() - start, 1)
        self.emit(what, **labels, **values)
        gc.collect()
        return "error" not in values

    def measure_keras(self, what: str, function: Callable[[], dict], **labels) -> None:
        """Measure as Keras has it. If that fails, try again with plain attention."""
        if self.measure(what, function, **labels):
            return
        if not self.succeeded and starved(self.error):
            # The parent starts this part again, with less memory reserved.
            sys.exit(f"Starved: {self.error[:200]}")
        if fused_attention():
            plain_attention()
            self.measure(what, function, **labels, attention="plain, after an error")


def starved(error: str) -> bool:
    """Return whether an error may come of reserving all of a GPU's memory."""
    lowered = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == LOWERED
    return not lowered and any(word in error for word in STARVED)


def last_lines(error: Exception) -> list[str]:
    """Return an error's message and the last places it passed, cut for a log."""
    places = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    message = f"{type(error).__name__}: {error}".strip().splitlines()
    kept = message if len(message) <= 8 else [*message[:4], "...", *message[-4:]]
    return [*places[-4:], *(line[:300] for line in kept)]


def inner_parameters(name: str, shape: dict) -> int:
    """Return the parameters of all linear layers: all but embedding and norms."""
    hidden, head = shape["hidden_dim"], shape["head_dim"]
    heads = shape["num_query_heads"] + shape["num_key_value_heads"]
    halves = 1 if name.startswith("gemma3") else 2
    layer = 2 * hidden * head * heads + 3 * hidden * shape["intermediate_dim"] // halves
    return shape["num_layers"] * layer


def flop_values(rate: float, device: str, name: str, shape: dict) -> dict:
    """Return FLOP/s, if every token is learned, and its share of the device's peak."""
    inner, logits = inner_parameters(name, shape), shape["vocabulary_size"] * shape["hidden_dim"]
    flops = rate * 4 * (inner + logits)
    values = {"tflops": round(flops / 1e12, 2)}
    peak = next((peak for card, peak in PEAK_FLOPS.items() if card in device), None)
    if peak:
        values["utilisation"] = round(flops / peak, 4)
    return values


def rate_values(tokens: int, steps: int, seconds: list[float]) -> dict:
    """Return a median rate, from the seconds of rounds of equal steps."""
    typical = median(seconds)
    return {
        "real_tokens_per_second": round(tokens * steps / typical, 1),
        "step_ms": round(1000 * typical / steps, 3),
        "rounds_ms_per_step": [round(1000 * value / steps, 3) for value in seconds],
        "steps_per_round": steps,
    }


# Keras on JAX: ours and the published recipe


def start_keras(*, ours: bool):
    """Settle the backend, ours by `gl.setup`, stock as the published recipe does."""
    if ours:
        import gemma_lora as gl

        gl.setup(seed=0)
        return gl
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "1.00")
    import keras

    keras.utils.set_random_seed(0)
    return None


def device_name() -> str:
    """Return the name of the device that JAX computes on."""
    import jax

    return jax.devices()[0].device_kind


def memory() -> dict:
    """Return GiB in use and this process's peak, of the GPU or else of the host."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"peak_gib": round(peak, 3), "memory_of": "host"}
    names = {"peak_gib": "peak_bytes_in_use", "in_use_gib": "bytes_in_use"}
    return {name: round(stats[key] / GIB, 3) for name, key in names.items() if key in stats}


def fused_attention() -> bool:
    """Return whether KerasHub would use JAX's fused attention here."""
    import jax
    from keras_hub.src.models.gemma.gemma_attention import CachedGemmaAttention

    untouched = CachedGemmaAttention._use_fused_attention_op.__name__ != "never"
    return untouched and jax.default_backend() == "gpu"


def plain_attention() -> None:
    """Have KerasHub compute attention as products and a softmax from now on."""
    from keras_hub.src.models.gemma.gemma_attention import CachedGemmaAttention
    from keras_hub.src.models.gemma3.gemma3_attention import CachedGemma3Attention

    def never(layer) -> bool:
        return False

    # private: Keras's switch for flash attention does not reach KerasHub's Gemma.
    CachedGemmaAttention._use_fused_attention_op = never
    CachedGemma3Attention._use_fused_attention_op = never


def compute_blocks_twice() -> None:
    """Have each block keep only its input, and compute the rest again going backward."""
    import jax
    from keras_hub.src.models.gemma.gemma_decoder_block import GemmaDecoderBlock

    plain = GemmaDecoderBlock.call

    def call(block, x, padding_mask=None, **options):
        if options:
            return plain(block, x, padding_mask=padding_mask, **options)
        return jax.checkpoint(lambda x, mask: plain(block, x, padding_mask=mask))(x, padding_mask)

    GemmaDecoderBlock.call = call


def vocabulary_proto(size: int) -> bytes:
    """Return the small model's vocabulary, filled up with unused tokens to `size`.

    A random model answers with any token of its vocabulary, and each needs a text. Two
    serialized messages in a row are one message that has the pieces of both.
    """
    proto = bytearray(VOCABULARY.read_bytes())
    for number in range(TINY_VOCABULARY, size):
        text = f"⟨{number}⟩".encode()
        # A piece: its text (field 1) and a score of -100,000 (field 2, a float).
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x50\xc3\xc7"
        proto += b"\x0a" + bytes([len(piece)]) + piece
    return bytes(proto)


def random_gemma(name: str, dtype: str, shape: dict):
    """Build a Gemma whose weights are drawn on the device by Keras's initializers."""
    import keras_hub

    models, more = keras_hub.models, {}
    if name.startswith("gemma3"):
        family = "Gemma3"
        more = {
            "image_size": None,
            "vision_encoder": None,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "use_sliding_window_attention": True,
            "sliding_window_size": 512,
        }
    else:
        family = "Gemma"
    backbone = getattr(models, f"{family}Backbone")(dtype=dtype, **shape, **more)
    # Gemma 1's, even for Gemma 3, whose own wants TensorFlow: only its text matters.
    tokenizer = models.GemmaTokenizer(proto=vocabulary_proto(shape["vocabulary_size"]))
    preprocessor = models.GemmaCausalLMPreprocessor(tokenizer)
    kind = getattr(models, f"{family}CausalLM")
    model = kind(backbone=backbone, preprocessor=preprocessor)
    draw_embeddings(model)
    return model


def draw_embeddings(model) -> None:
    """Draw embeddings as wide as a trained Gemma's, but zero for the token `<eos>`.

    Its logit is zero then, and the largest of all random logits is positive, so a
    greedy answer cannot end early. `<bos>` must not be zero: it begins every row, and
    gradients through norms of zeros overflow.
    """
    import jax

    variable = model.backbone.token_embedding.embeddings
    shape, dtype = variable.shape, variable.dtype

    @jax.jit
    def draw(key):
        values = jax.random.normal(key, shape, dtype) * shape[1] ** -0.5
        return values.at[END].set(0)

    variable.assign(draw(jax.random.key(0)))


def texts_of(model, count: int, words: int, *, exact: bool = False) -> list[str]:
    """Return texts of random words; with `exact`, of one token each."""
    import numpy as np

    tokenizer = model.preprocessor.tokenizer
    pieces = [tokenizer.id_to_token(number) for number in range(TINY_VOCABULARY)]
    choice = [piece[1:] for piece in pieces if piece[:1] == "▁" and piece[1:].isalpha()]
    rng, texts = np.random.default_rng(0), []
    while len(texts) < count:
        text = " " + " ".join(rng.choice(choice, words))
        if not exact or len(np.asarray(tokenizer(text)).tolist()) == words:
            texts.append(text)
    return texts


def fit_ours(gl, model, name: str, shape: dict, rows: int, length: int, steps: int) -> dict:
    """Time `gl.fit` on full rows: a round that compiles, then those that count."""
    import keras

    records = [
        {"instruction": "Say something.", "context": "", "response": text}
        for text in texts_of(model, rows * steps, length)
    ]
    estimate = gl.memory_budget(
        model, batch_size=rows, sequence_length=length, compile=False
    ).training
    before = memory()
    ends = [time.monotonic()]
    # It hooks epochs alone. A hook on batches would have Keras wait for each step.
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.monotonic())
    )
    history = gl.fit(
        model,
        records,
        epochs=1 + ROUNDS,
        batch_size=rows,
        sequence_length=length,
        template="recipe",
        loss_on="all",
        callbacks=[clock],
        verbose=0,
    )
    tokens = model.gemma_lora.run["tokens"]
    if tokens != rows * steps * length:
        raise RuntimeError(f"Rows are not full: {tokens} tokens in {rows * steps} x {length}")
    return keras_values(name, shape, rows * length, steps, ends, before) | {
        "estimated_gib": round(estimate / GIB, 3),
        "losses": [round(loss, 4) for loss in history.history["loss"]],
    }


def keras_values(
    name: str, shape: dict, tokens: int, steps: int, ends: list[float], before: dict
) -> dict:
    """Return rates and memory, from the times at which rounds ended."""
    first, *seconds = (later - earlier for earlier, later in pairwise(ends))
    values = rate_values(tokens, steps, seconds)
    values |= flop_values(values["real_tokens_per_second"], device_name(), name, shape)
    after = memory()
    return {
        **values,
        "compile_seconds": round(first - median(seconds), 2),
        **after,
        # A peak that was there before the steps is not theirs.
        "peak_is_of_these_steps": after["peak_gib"] > before["peak_gib"],
        "attention_fused": fused_attention(),
    }


def generate_ours(gl, session: Session, model, count: int) -> dict:
    """Time `gl.generate` on prompts of equal length, after a call that compiles."""
    prompts = texts_of(model, count, PROMPT_TOKENS - 1, exact=True)
    new, seconds = session.new_tokens, []
    for _ in range(1 + ROUNDS):
        start = time.monotonic()
        answers = gl.generate(model, prompts, template=None, max_new_tokens=new, seed=0)
        seconds.append(time.monotonic() - start)
    first, *warm = seconds
    tokenizer = model.preprocessor.tokenizer
    return {
        "new_tokens_per_second": round(count * new / median(warm), 1),
        "seconds": [round(value, 3) for value in warm],
        "compile_seconds": round(first - median(warm), 2),
        "tokens_in_answers": [tokens_in(tokenizer, answer) for answer in answers[:2]],
        **memory(),
        "attention_fused": fused_attention(),
    }


def tokens_in(tokenizer, answer: str) -> int:
    """Return about how many tokens an answer had: none of them may have ended it."""
    filler = re.findall("⟨[0-9]+⟩", answer)
    rest = re.sub("⟨[0-9]+⟩", "", answer)
    return len(filler) + len(tokenizer(rest))


def train_ours(
    session: Session,
    dtype: str,
    shapes,
    *,
    name: str = "gemma_2b",
    targets: str = "query_value",
    quantize: str | None = None,
    answer: tuple[int, ...] = (),
    remat: bool = False,
) -> None:
    """Build one model, and measure its steps and, with `answer`, its answers."""
    gl = start_keras(ours=True)
    if remat:
        compute_blocks_twice()
    shape = session.geometry(name)
    start = time.monotonic()
    model = random_gemma(name, dtype, shape)
    if quantize:
        model.backbone.quantize(quantize)
    gl.enable_lora(model, rank=4, targets=targets)
    labels = {"library": "gl", "model": name, "dtype": dtype, "targets": targets}
    labels["base"] = quantize or dtype
    if remat:
        labels["remat"] = True
    session.emit(
        "built",
        **labels,
        wall_seconds=round(time.monotonic() - start, 1),
        parameters=model.backbone.count_params(),
        **memory(),
    )
    for rows, length, steps in shapes:
        session.measure_keras(
            "train",
            lambda r=rows, n=length, s=steps: fit_ours(gl, model, name, shape, r, n, s),
            **labels,
            shape=[rows, length],
        )
    for count in answer:
        session.measure_keras(
            "answer", lambda c=count: generate_ours(gl, session, model, c), **labels, prompts=count
        )


def train_stock(session: Session, dtype: str, lengths: tuple[int, ...] = (256, 512)) -> None:
    """Measure the published recipe on stock KerasHub: batch 1, loss on every token."""
    start_keras(ours=False)
    shape = session.geometry("gemma_2b")
    model = random_gemma("gemma_2b", dtype, shape)
    compile_as_recipe(model)
    labels = {"library": "stock", "model": "gemma_2b", "dtype": dtype, "base": dtype}
    steps_of = {256: 40, 512: 24}
    for length, steps in ((64, 4),) if session.tiny else [(n, steps_of[n]) for n in lengths]:
        session.measure_keras(
            "train",
            lambda n=length, s=steps: fit_stock(model, shape, n, s),
            **labels,
            targets="query_value",
            shape=[1, length],
        )


def fit_stock(model, shape: dict, length: int, steps: int) -> dict:
    """Time Keras's `fit` on strings, like the recipe; on arrays, if that fails."""
    import keras
    import numpy as np

    texts = texts_of(model, steps, length)
    model.preprocessor.sequence_length = length
    data = model.preprocessor(texts)
    if not np.asarray(data[0]["padding_mask"]).all():
        raise RuntimeError("The rows are not full.")
    before, how = memory(), "strings"
    ends = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.monotonic())
    )
    options = {"batch_size": 1, "epochs": 1 + ROUNDS, "callbacks": [clock], "verbose": 0}
    start = time.monotonic()
    try:
        history = model.fit(texts, **options)
    except (ImportError, ValueError, TypeError) as error:
        # Strings need TensorFlow or grain. Arrays skip the tokenizing, so are quicker.
        how = f"arrays, after {type(error).__name__}"
        ends.clear()
        start = time.monotonic()
        x, y, weights = data
        # KerasHub's own fit would look for a preprocessor; this one is Keras's.
        history = keras.Model.fit(model, x, y, sample_weight=weights, **options)
    return keras_values("gemma_2b", shape, length, steps, [start, *ends], before) | {
        "fit_on": how,
        "losses": [round(loss, 4) for loss in history.history["loss"]],
    }


# Transformers and PEFT


def train_theirs(session: Session, *, steps: bool = True) -> None:
    """Measure Transformers + PEFT in bfloat16: training steps, if asked, then answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GemmaConfig

    shape, start = session.geometry("gemma_2b"), time.monotonic()
    config = GemmaConfig(
        vocab_size=shape["vocabulary_size"],
        hidden_size=shape["hidden_dim"],
        intermediate_size=shape["intermediate_dim"] // 2,
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        hidden_activation="gelu_pytorch_tanh",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    for weight in base.parameters():
        # Scaled by the width, like Keras's. Norms stay as they were made.
        if weight.ndim > 1:
            weight.data.normal_(std=weight.shape[-1] ** -0.5)
    adapters = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, adapters)
    labels = {"library": "transformers + peft", "model": "gemma_2b", "dtype": "bfloat16"}
    labels |= {"base": str(base.dtype).removeprefix("torch."), "targets": "query_value"}
    session.emit(
        "built",
        **labels,
        wall_seconds=round(time.monotonic() - start, 1),
        parameters=sum(weight.numel() for weight in base.parameters()),
        device=str(next(model.parameters()).device),
        attention=base.config._attn_implementation,
    )
    for rows, length, count in session.shapes if steps else ():
        session.measure(
            "train",
            lambda r=rows, n=length, s=count: fit_theirs(model, shape, r, n, s),
            **labels,
            shape=[rows, length],
        )
    for count in PROMPTS:
        session.measure(
            "answer", lambda c=count: generate_theirs(session, model, c), **labels, prompts=count
        )


def fit_theirs(model, shape: dict, rows: int, length: int, steps: int) -> dict:
    """Time a bare loop of forward, backward and AdamW on full rows."""
    import torch

    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.01)
    ids = torch.randint(8, TINY_VOCABULARY, (rows * steps, length), device=device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def one_round() -> float:
        start = time.monotonic()
        for batch in ids.split(rows):
            # Transformers shifts labels itself, so each row learns one token less.
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        last = loss.item()
        one_round.losses.append(round(last, 4))
        return time.monotonic() - start

    one_round.losses = []
    first, *seconds = [one_round() for _ in range(1 + ROUNDS)]
    values = rate_values(rows * length, steps, seconds)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    values |= flop_values(values["real_tokens_per_second"], device, "gemma_2b", shape)
    values |= {"first_round_seconds": round(first, 2), "losses": one_round.losses}
    if cuda:
        values["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return values


def generate_theirs(session: Session, model, count: int) -> dict:
    """Time greedy answers with a cache, with the adapter on and with the base alone."""
    import torch

    device = next(model.parameters()).device
    new = session.new_tokens
    model.eval()
    ids = torch.randint(8, TINY_VOCABULARY, (count, PROMPT_TOKENS), device=device)

    def answer(tokens: int) -> int:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        # Reading a value waits for the GPU.
        return output.shape[1] - ids.shape[1] + 0 * int(output[0, -1])

    def timed() -> float:
        start = time.monotonic()
        if (made := answer(new)) != new:
            raise RuntimeError(f"An answer has {made} tokens, not {new}.")
        return time.monotonic() - start

    answer(8)
    seconds = [timed() for _ in range(2)]
    with model.disable_adapter():
        base = timed()
    return {
        "new_tokens_per_second": round(count * new / median(seconds), 1),
        "base_alone_tokens_per_second": round(count * new / base, 1),
        "seconds": [round(value, 3) for value in seconds],
    }


# What is small


def smoke(session: Session) -> None:
    """Name the device, and run the library end to end on the small model."""
    gl = start_keras(ours=True)
    import jax

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    session.emit(
        "device",
        device=device.device_kind,
        platform=device.platform,
        memory_fraction=os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        limit_gib=limit and round(limit / GIB, 2),
        versions=versions(),
        flops_formula=FLOPS_FORMULA,
        peak_flops=PEAK_FLOPS,
    )
    session.measure("matmul", lambda: matmul(512 if session.tiny else 8192))
    session.measure("attention", attention)
    session.measure_keras("tiny model", lambda: tiny_model(gl))
    for dtype in ("float32", "bfloat16"):
        session.measure_keras("tiny loss", lambda d=dtype: tiny_loss(gl, d), dtype=dtype)


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, of those installed."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def matmul(size: int) -> dict:
    """Time a square bfloat16 product: what this device really reaches."""
    import jax
    import jax.numpy as jnp

    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        for _ in range(10):
            result = product(left, right)
        jax.block_until_ready(result)
        seconds.append((time.monotonic() - start) / 10)
    return {"size": size, "tflops": round(2 * size**3 / median(seconds) / 1e12, 1)}


def attention() -> dict:
    """Compare Keras's attention in bfloat16 with plain products in float32.

    Shapes are Gemma 2B's: eight query heads of 256 values that share one key head. On a
    GPU, Keras takes cuDNN's kernel where it can, and that one sees our mask as a bias.
    """
    import jax
    import jax.numpy as jnp
    from keras import ops
    from keras.src.backend.jax import nn

    keys = jax.random.split(jax.random.key(0), 3)
    tokens = 256
    query = jax.random.normal(keys[0], (2, tokens, 8, 256), jnp.bfloat16)
    key, value = (jax.random.normal(k, (2, tokens, 1, 256), jnp.bfloat16) for k in keys[1:])
    mask = jnp.tril(jnp.ones((2, 1, tokens, tokens), bool))

    def keras_way(query, key, value, mask):
        return ops.dot_product_attention(query, key, value, mask=mask, scale=1 / 16)

    def plain_way(query, key, value, mask):
        query, key, value = (x.astype("float32") for x in (query, key, value))
        with jax.default_matmul_precision("highest"):
            logits = jnp.einsum("bthd,bsxd->bhts", query, key) / 16
            weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
            return jnp.einsum("bhts,bsxd->bthd", weights, value)

    def errors(query, mask) -> list[float]:
        found = []
        for way in (keras_way, plain_way):

            def mean_square(*inputs, way=way):
                return jnp.mean(way(*inputs, mask).astype("float32") ** 2)

            gradients = jax.jit(jax.grad(mean_square, argnums=(0, 1, 2)))(query, key, value)
            found.append([jax.jit(way)(query, key, value, mask), *gradients])
        pairs = zip(*found, strict=True)
        return [
            round(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())), 5)
            for a, b in ([x.astype("float32") for x in pair] for pair in pairs)
        ]

    names = ("output", "query gradient", "key gradient", "value gradient")
    values = dict(zip(names, errors(query, mask), strict=True))
    values["output of one token"] = errors(query[:, -1:], mask[:, :, -1:])[0]
    # private: Keras's own test of whether cuDNN's kernel can be used.
    values["cudnn"] = bool(nn._can_use_flash_attention(query, key, value, None))
    return values


def tiny_model(gl) -> dict:
    """Load, train on 20 rows and answer: whether it runs at all."""
    model = gl.load("tiny_gemma_en")
    gl.enable_lora(model, rank=4)
    rows = [
        {"instruction": f"Name river {n}.", "context": "", "response": "The Danube is a river."}
        for n in range(20)
    ]
    history = gl.fit(model, rows, epochs=2, verbose=0)
    answer = gl.generate(model, "Name river 7.", max_new_tokens=16)
    return {"losses": history.history["loss"], "answer": answer}


def tiny_loss(gl, dtype: str) -> dict:
    """Measure the small model's loss: the same on every device but for rounding."""
    _, held_out = gl.load_tiny_world()
    model = gl.load("tiny_gemma_en", dtype=dtype)
    rows = [held_out[n] for n in range(64)]
    loss = gl.evaluate(model, rows, answers=False).loss
    return {"loss": round(float(loss), 5), "attention_fused": fused_attention()}


def budgets(session: Session) -> None:
    """Ask this device's compiler what steps and answers need; no weight is made."""
    gl = start_keras(ours=True)
    name = "tiny_gemma_en" if session.tiny else "gemma_2b_en"

    def ask(rows: int, length: int) -> dict:
        options = {"dtype": "bfloat16", "batch_size": rows, "sequence_length": length}
        parts = {}
        for how in ("estimated", "compiled"):
            budget = gl.memory_budget(name, **options, compile=how == "compiled")
            parts[f"{how}_gib"] = round(budget.training / GIB, 3)
            parts[f"{how}_answer_gib"] = round(budget.generation / GIB, 3)
        return parts

    for rows, length, _ in (*session.shapes[1:], session.shapes[0]):
        session.measure_keras(
            "budget",
            lambda r=rows, n=length: ask(r, n),
            model="gemma_2b",
            dtype="bfloat16",
            shape=[rows, length],
        )


# In order of value: first what has no figure yet. A step of Gemma 2B takes a minute to
# compile on an H100, so a part with one shape takes about as long.
PARTS = {
    "gl_answers": lambda s: train_ours(s, "bfloat16", (), answer=PROMPTS),
    "theirs_answers": lambda s: train_theirs(s, steps=False),
    "gl_270m": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], name="gemma3_270m"),
    "gl_all_linear": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], targets="all_linear"),
    "gl_int8": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], quantize="int8"),
    "gl_7b": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], name="gemma_7b"),
    "gl_remat": lambda s: train_ours(s, "bfloat16", s.shapes[2:], remat=True),
    "gl_int4": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], quantize="int4"),
    "gl_float32": lambda s: train_ours(s, "float32", s.shapes[1:2]),
    "gl_long_remat": lambda s: train_ours(s, "bfloat16", s.long, remat=True),
    "gl_long": lambda s: train_ours(s, "bfloat16", s.long),
    "gl_1x256": lambda s: train_ours(s, "bfloat16", s.shapes[:1]),
    # Measured on 2026-11-26.
    "gl_4x512": lambda s: train_ours(s, "bfloat16", s.shapes[1:2], answer=PROMPTS[1:]),
    "theirs_bfloat16": train_theirs,
    "stock_512": lambda s: train_stock(s, "bfloat16", (512,)),
    "gl_8x1024": lambda s: train_ours(s, "bfloat16", s.shapes[2:]),
    "smoke": smoke,
    "stock_float32": lambda s: train_stock(s, "float32"),
    "stock_bfloat16": lambda s: train_stock(s, "bfloat16"),
    "budgets": budgets,
}


# The parent: one process a part


def main() -> None:
    """Run the chosen parts, each in its own process, until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"parts in your order: {', '.join(PARTS)}")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--seconds", type=float, default=420, help="start nothing after these")
    parser.add_argument("--tiny-geometry", action="store_true", help="rehearse on small shapes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or ".")
    until = options.until or time.time() + options.seconds
    session = Session(options.child or "run", until, options.tiny_geometry, out / "gpu.jsonl")
    if options.child:
        PARTS[options.child](session)
        return
    only, skip = (text.split(",") if text else [] for text in (options.only, options.skip))
    if unknown := {*only, *skip} - {*PARTS}:
        parser.error(f"There is no part {min(unknown)!r}. Parts are: {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    session.emit("start", date=time.strftime("%Y-%m-%d"), gpu=nvidia_smi())
    begin = time.monotonic()
    for part in only or PARTS:
        if part in skip:
            continue
        if time.time() > until:
            session.emit("part", name=part, skipped="out of time")
            continue
        run_part(session, part)
    session.emit("end", seconds=round(time.monotonic() - begin, 1))


def nvidia_smi() -> str:
    """Return the card's name, memory and driver; empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def run_part(session: Session, part: str) -> None:
    """Run one part. If it starved at once, run it again with 90 % reserved."""
    size = session.lines.stat().st_size
    complaint = run_child(session, part)
    results = session.lines.read_text()[size:]
    worked = any(key in results for key in ("tokens_per_second", '"answer":', "compiled_gib"))
    if worked or not starved(complaint) or time.time() > session.until:
        return
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = LOWERED
    session.emit("memory fraction", value=LOWERED, after=part)
    run_child(session, part)


def run_child(session: Session, part: str) -> str:
    """Run a part in its own process. Return the end of its errors if it failed."""
    command = [sys.executable, str(HERE), "--child", part, "--until", str(session.until)]
    command += ["--tiny-geometry"] if session.tiny else []
    # Parts share what they compiled and tuned, so that later ones start sooner.
    cache = Path(tempfile.gettempdir()) / "gemma_lora_gpu_compiled"
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
    }
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if part.startswith("theirs"):
        # Carried packages are for Keras. Transformers goes with the machine's own.
        environment.pop("PYTHONPATH")
        environment["HF_HUB_OFFLINE"] = "1"
    log = session.lines.with_name("stderr.log")
    start = time.monotonic()
    # A process that hangs must not cost the parts after it.
    patience = min(300.0, max(30.0, session.until + 45 - time.time()))
    with log.open("a+b") as stderr:
        stderr.write(f"=== {part}\n".encode())
        stderr.flush()
        begin = stderr.tell()
        try:
            code = subprocess.run(
                command, stderr=stderr, env=environment, timeout=patience, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
        stderr.seek(begin)
        ending = stderr.read().decode(errors="replace").splitlines()[-12:] if code else []
    values = {"error": [line[:300] for line in ending]} if code else {}
    seconds = round(time.monotonic() - start, 1)
    session.emit("part", name=part, seconds=seconds, exit_status=code, **values)
    return "\n".join(ending)


if __name__ == "__main__":
    main()
