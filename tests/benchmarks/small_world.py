"""What one epoch of LoRA does to `tiny_gemma_en`, for several seeds: the numbers of the README's table.

python tests/benchmarks/small_world.py [seeds]
"""

import datetime
import os
import platform
import statistics
import sys
import time
from itertools import pairwise

import gemma_lora as gl

gl.setup(seed=0)

import keras  # noqa: E402

from gemma_lora.tables import Table  # noqa: E402
from gemma_lora.tiny.corpus import corpus  # noqa: E402

EXACT = ("open_qa", "closed_qa")
VARIANTS = {
    "query and value, rank 4": {"rank": 4, "targets": "query_value"},
    "all linear layers, rank 4": {"rank": 4, "targets": "all_linear"},
    "all linear layers, rank 8": {"rank": 8, "targets": "all_linear"},
}


def measure(seed: int, lora: dict) -> dict:
    """Tune one model for one epoch, and measure it on held-out subjects."""
    train, held_out = gl.load_tiny_world()
    prose = corpus(documents=200, seed=1)
    gl.setup(seed=seed)
    model = gl.load("tiny_gemma_en")
    before = {
        "share": gl.evaluate(model, held_out).share(*EXACT),
        "prose": gl.perplexity(model, prose),
    }
    summary = gl.enable_lora(model, **lora)
    ends = [time.monotonic()]
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: ends.append(time.monotonic())
    )
    gl.fit(model, train, callbacks=[clock], verbose=0)
    steps = sorted(later - earlier for earlier, later in pairwise(ends))
    after = gl.evaluate(model, held_out)
    return {
        "trainable": summary.trainable,
        "before": before["share"],
        **{name: after.share(name) for name in after.asked},
        "+".join(EXACT): after.share(*EXACT),
        "loss": after.loss,
        "prose before": before["prose"],
        "prose after": gl.perplexity(model, prose),
        # Two of the steps compiled a shape first: the longest ones.
        "warm epoch seconds": sum(steps[:-2]) / (len(steps) - 2) * len(steps),
        "with compiling": ends[-1] - ends[0],
    }


if __name__ == "__main__":
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    rows = []
    for name, lora in VARIANTS.items():
        for seed in seeds:
            rows.append({"adapters": name, "seed": seed, **measure(seed, lora)})
            print(rows[-1], flush=True)
    caption = f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    print(Table(rows, caption=caption))
    for name in VARIANTS:
        shares = [row["+".join(EXACT)] for row in rows if row["adapters"] == name]
        print(f"{name}: mean {statistics.mean(shares):.1%}, worst {min(shares):.1%}")
