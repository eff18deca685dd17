# ruff: noqa: E402, I001 (the setup comes before Keras)
"""Measure what training and answering really need of memory, beside what a budget says. Linux only; prints JSON rows.

The peak is that of the process's resident memory, set back before; taken off is what is left when all arrays are gone.
"""

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import gemma_lora as gl

gl.setup(seed=0)

import jax
import keras
import keras_hub
from gemma_lora.tokens import tokenizer_of
from gemma_lora.models import state_of

MIB = 2**20
SMALL = {"vocabulary_size": 8_000, "num_layers": 4, "num_query_heads": 4, "num_key_value_heads": 1}
SMALL |= {"hidden_dim": 320, "intermediate_dim": 2560, "head_dim": 80}
MIDDLE = {
    "vocabulary_size": 32_000,
    "num_layers": 8,
    "num_query_heads": 8,
    "num_key_value_heads": 1,
}
MIDDLE |= {"hidden_dim": 768, "intermediate_dim": 6144, "head_dim": 96}
LARGE = {
    "vocabulary_size": 64_000,
    "num_layers": 16,
    "num_query_heads": 8,
    "num_key_value_heads": 1,
}
LARGE |= {"hidden_dim": 1024, "intermediate_dim": 8192, "head_dim": 128}
MANY_KV = {"num_key_value_heads": 4}
NORMS = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
NORMS |= {"num_key_value_heads": 2, "sliding_window_size": 128}
GEMMA2 = {**NORMS, "attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0}
GEMMA3 = {**NORMS, "image_size": None, "vision_encoder": None}

# (model, its geometry if it is random, dtype, rank, targets, batch size or prompts, sequence length)
TRAINING = {
    "quick": [
        ("tiny_gemma_en", None, "float32", 4, "query_value", 32, 256),
        ("Gemma 2", SMALL | GEMMA2, "bfloat16", 4, "all_linear", 4, 256),
    ],
    "full": [
        ("tiny_gemma_en", None, "float32", 8, "all_linear", 16, 512),
        ("tiny_gemma_en", None, "bfloat16", 4, "query_value", 32, 256),
        ("Gemma 1", SMALL, "float32", 4, "query_value", 8, 256),
        ("Gemma 1, many kv", SMALL | MANY_KV, "float32", 8, "all_linear", 8, 256),
        ("Gemma 2", SMALL | GEMMA2, "float32", 4, "query_value", 8, 256),
        ("Gemma 3", SMALL | GEMMA3, "float32", 4, "all_linear", 4, 256),
        ("Gemma 3", SMALL | GEMMA3, "bfloat16", 4, "query_value", 8, 256),
        ("Gemma 1", MIDDLE, "float32", 4, "query_value", 4, 128),
        ("Gemma 1", LARGE, "float32", 4, "query_value", 1, 256),
        ("Gemma 1, many kv", LARGE | MANY_KV, "float32", 8, "all_linear", 2, 256),
        ("Gemma 2", LARGE | GEMMA2, "float32", 4, "all_linear", 2, 256),
        ("Gemma 3", LARGE | GEMMA3, "float32", 4, "query_value", 2, 256),
        ("Gemma 3", LARGE | GEMMA3, "bfloat16", 4, "query_value", 2, 256),
    ],
}
# The library that XLA has products computed by on a CPU takes room of its own, which no account shows: with a long
# prompt, some arrays of the feed-forward layers. Where the weights weigh most, it is little.
ANSWERING = {
    "quick": [],  # it varies by a fifth where other programs run at the same time
    "full": [
        ("tiny_gemma_en", None, "float32", 4, "query_value", 32, 512),
        ("Gemma 1", MIDDLE, "float32", 4, "query_value", 2, 192),
        ("Gemma 2", MIDDLE | GEMMA2, "float32", 4, "all_linear", 2, 192),
        ("Gemma 2", LARGE | GEMMA2, "float32", 4, "query_value", 2, 256),
        ("Gemma 3", MIDDLE | GEMMA3, "bfloat16", 4, "query_value", 1, 192),
    ],
}


def main(which: str) -> None:
    for answering in (False, True):
        for row in (ANSWERING if answering else TRAINING)[which]:
            start = time.monotonic()
            values = measured(*row, answering=answering)
            print(json.dumps(values | {"seconds": round(time.monotonic() - start, 1)}), flush=True)


def measured(
    name: str,
    geometry,
    dtype: str,
    rank: int,
    targets: str,
    rows: int,
    length: int,
    *,
    answering: bool,
) -> dict:
    model = gl.load(name, dtype=dtype) if geometry is None else random_gemma(geometry, dtype)
    gl.enable_lora(model, rank=rank, targets=targets)
    size = {"prompts": rows} if answering else {"batch_size": rows}
    budget = gl.memory_budget(model, sequence_length=length, **size)
    counted, compiled = budget.estimate.total, budget.training
    if answering:
        counted, compiled = budget.estimated_generation, budget.generation
    peak = (answer if answering else train)(model, rows, length)
    values = {
        "what": "answering" if answering else "training",
        "model": name,
        "parameters": budget.parameters,
    }
    values |= {"dtype": dtype, "targets": targets, "rank": rank, "rows": rows, "length": length}
    return values | {"counted": counted, "compiled": compiled, "measured": peak}


def random_gemma(geometry: dict, dtype: str):
    family = "Gemma3" if "image_size" in geometry else "Gemma"
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**geometry, dtype=dtype)
    model = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    state_of(model).tokenizer = tokenizer = gl.load_tokenizer()
    tokenizer.decode = lambda ids: ""  # the vocabulary of the small model has not all of them
    return model


def train(model, rows: int, length: int) -> int:
    """Peak of the steps after the first, which compiles."""
    record = {"instruction": "Name rivers.", "context": "", "response": "river " * length}
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: step or reset(logs["loss"])
    )
    callback.async_safe = True  # as in use: Keras need not wait for each step
    settings = {"batch_size": rows, "sequence_length": length, "verbose": 0}
    gl.fit(model, [record] * (3 * rows), callbacks=[callback], **settings)
    assert model.gemma_lora.run["tokens"] == 3 * rows * length
    trainer = model.gemma_lora.trainer
    return what_goes_with(trainer.variables + trainer.optimizer.variables)


def answer(model, rows: int, length: int) -> int:
    prompt = "river " * (length - 40)
    assert length - 64 < len(tokenizer_of(model).prompt(None, prompt)) + 2 <= length
    gl.generate(model, [prompt] * rows, template=None, max_new_tokens=2)
    reset()
    gl.generate(model, [prompt] * rows, template=None, max_new_tokens=2)
    return what_goes_with(model.variables)


def reset(computed=None) -> None:
    jax.block_until_ready(computed)
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def what_goes_with(variables: list) -> int:
    """The peak since `reset`, less what stays without these arrays."""
    peak = status("VmHWM")
    for variable in variables:
        if not variable.value.is_deleted():
            variable.value.delete()
    trim()
    return peak - status("VmRSS")


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
