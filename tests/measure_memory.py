# ruff: noqa: E402, I001 (the setup comes before Keras)
"""Measure the memory that training and answering need, beside what a budget says.

python tests/measure_memory.py quick|full

It prints JSON rows, and runs on Linux only. The peak is that of the process's resident
memory, reset before each measurement. What is left when all arrays are gone is
subtracted.
"""

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from unittest import mock

import gemma_lora as gl

gl.setup(seed=0)

import jax
import keras_hub
from gemma_lora import training
from gemma_lora.models import state_of
from gemma_lora.tokens import tokenizer_of

MIB = 2**20
SMALL = {
    "vocabulary_size": 8_000, "num_layers": 4, "num_query_heads": 4, "num_key_value_heads": 1,
    "hidden_dim": 320, "intermediate_dim": 2560, "head_dim": 80,
}  # fmt: skip
MIDDLE = {
    "vocabulary_size": 32_000, "num_layers": 8, "num_query_heads": 8, "num_key_value_heads": 1,
    "hidden_dim": 768, "intermediate_dim": 6144, "head_dim": 96,
}  # fmt: skip
LARGE = {
    "vocabulary_size": 64_000, "num_layers": 16, "num_query_heads": 8, "num_key_value_heads": 1,
    "hidden_dim": 1024, "intermediate_dim": 8192, "head_dim": 128,
}  # fmt: skip
MANY_KV = {"num_key_value_heads": 4}
NORMS = {
    "use_post_ffw_norm": True, "use_post_attention_norm": True, "num_key_value_heads": 2,
    "use_sliding_window_attention": True, "sliding_window_size": 128,
}  # fmt: skip
GEMMA2 = {**NORMS, "attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0}
GEMMA3 = {**NORMS, "image_size": None, "vision_encoder": None}

# Each row: model, its geometry if it is random, dtype, rank, targets, batch size (or
# prompts), sequence length.
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
# On a CPU, XLA leaves products to a library that takes room of its own, which no
# account shows: with a long prompt, some arrays of the feed-forward layers. It matters
# little where the weights are the most of it.
ANSWERING = {
    # It varies by a fifth while other programs run.
    "quick": [],
    "full": [
        ("tiny_gemma_en", None, "float32", 4, "query_value", 32, 512),
        ("Gemma 1", MIDDLE, "float32", 4, "query_value", 2, 192),
        ("Gemma 2", MIDDLE | GEMMA2, "float32", 4, "all_linear", 2, 192),
        ("Gemma 2", LARGE | GEMMA2, "float32", 4, "query_value", 2, 256),
        ("Gemma 3", MIDDLE | GEMMA3, "bfloat16", 4, "query_value", 1, 192),
    ],
}


def main(which: str) -> None:
    """Print a row for each measurement of TRAINING and ANSWERING."""
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
    """Measure one row: the peak, and the budget by count and by the compiler."""
    model = gl.load(name, dtype=dtype) if geometry is None else random_gemma(geometry, dtype)
    gl.enable_lora(model, rank=rank, targets=targets)
    size = {"prompts": rows} if answering else {"batch_size": rows}
    budget = gl.memory_budget(model, sequence_length=length, **size)
    if answering:
        counted = budget.estimated_generation
        compiled = budget.generation
        peak = answer(model, rows, length)
    else:
        counted = budget.estimate.total
        compiled = budget.training
        peak = train(model, rows, length)
    return {
        "what": "answering" if answering else "training",
        "model": name,
        "parameters": budget.parameters,
        "dtype": dtype,
        "targets": targets,
        "rank": rank,
        "rows": rows,
        "length": length,
        "counted": counted,
        "compiled": compiled,
        "measured": peak,
    }


def random_gemma(geometry: dict, dtype: str):
    """Make a model of this geometry, with the tokenizer of the small one."""
    family = "Gemma3" if "image_size" in geometry else "Gemma"
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**geometry, dtype=dtype)
    model = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    state_of(model).tokenizer = tokenizer = gl.load_tokenizer()
    # The small model's vocabulary does not have all ids of a larger one.
    tokenizer.decode = lambda ids: ""
    return model


def train(model, rows: int, length: int) -> int:
    """Return the peak of the steps after the first, which compiles."""
    record = {"instruction": "Name rivers.", "context": "", "response": "river " * length}
    settings = {"batch_size": rows, "sequence_length": length, "verbose": 0}
    wait = training._wait_for_step_before

    def begin_peak(sums, index: int) -> None:
        wait(sums, index)
        if index == 1:
            reset(sums)

    # Not a Keras callback: for callbacks, `fit` keeps copies of adapters and optimizer.
    with mock.patch.object(training, "_wait_for_step_before", begin_peak):
        gl.fit(model, [record] * (3 * rows), **settings)
    assert model.gemma_lora.run["tokens"] == 3 * rows * length
    return what_goes_with(model.variables)


def answer(model, rows: int, length: int) -> int:
    """Return the peak of answering prompts a second time; the first compiles."""
    prompt = "river " * (length - 40)
    assert length - 64 < len(tokenizer_of(model).prompt(None, prompt)) + 2 <= length
    gl.generate(model, [prompt] * rows, template=None, max_new_tokens=2)
    reset()
    gl.generate(model, [prompt] * rows, template=None, max_new_tokens=2)
    return what_goes_with(model.variables)


def reset(computed=None) -> None:
    """Wait for `computed`, and begin a new peak."""
    jax.block_until_ready(computed)
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def what_goes_with(variables: list) -> int:
    """Return the peak since `reset`, less what stays without these arrays."""
    peak = status("VmHWM")
    for variable in variables:
        if not variable.value.is_deleted():
            variable.value.delete()
    trim()
    return peak - status("VmRSS")


def trim() -> None:
    """Return memory that is free to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(key: str) -> int:
    """Read a size from the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
