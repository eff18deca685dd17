"""Measure a Gemma that Google trained: what tuning changes, and speed beside the peers.

    python tests/benchmarks/real_gemma.py answers MODEL DATA.jsonl --prose RECORDS.jsonl
    python tests/benchmarks/real_gemma.py speed MODEL DATA.jsonl

MODEL is whatever `gl.load` takes, such as a GGUF file of Gemma 3 270M. DATA are rows of
Dolly, of which we tune on the first --rows and measure on rows 2000 to 2199; settings
were chosen on earlier rows (`sweep.py`). Results go into results/real_gemma_DEVICE.json,
each part beside what the file has already.
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
HELD_OUT = range(2000, 2200)
NEW_TOKENS = 128
# Before and after are shown for these held-out rows: each twentieth, not chosen.
SHOWN = range(0, 200, 20)


def answers(options) -> dict:
    """Return losses, answers and their measures, of the base and after one epoch."""
    import gemma_lora as gl

    gl.setup(seed=0)
    model = gl.load(options.model)
    data = gl.load_records(options.data)
    train = data.select(range(options.rows))
    held_out = data.select(HELD_OUT)
    prose = [row["context"] for row in gl.load_records(options.prose) if row["context"]]
    gl.enable_lora(model, rank=4)
    before = measured(model, held_out, prose)
    print(json.dumps(before["summary"]), flush=True)
    start = time.monotonic()
    gl.fit(model, train, verbose=2)
    seconds = time.monotonic() - start
    after = measured(model, held_out, prose)
    losses = np.array([before["losses"], after["losses"]])
    tokens = np.array(before["tokens"])
    picked = np.random.default_rng(0).integers(0, len(tokens), (10_000, len(tokens)))
    resampled = losses[:, picked].sum(-1) / tokens[picked].sum(-1)
    difference = np.percentile(resampled[1] - resampled[0], (2.5, 97.5))
    for one, values in zip((before, after), resampled, strict=True):
        one["summary"]["loss_interval"] = np.percentile(values, (2.5, 97.5)).round(4).tolist()
    shown = [
        {
            "prompt": held_out[i]["instruction"],
            "base": before["answers"][i],
            "tuned": after["answers"][i],
            "response": held_out[i]["response"],
        }
        for i in SHOWN
    ]
    return {
        "rows": options.rows,
        "run": {
            name: value
            for name, value in model.gemma_lora.run.items()
            if isinstance(value, int | float | str)
        },
        "seconds": round(seconds, 1),
        "before": before["summary"],
        "after": after["summary"],
        "loss_difference_interval": difference.round(4).tolist(),
        "shown": shown,
    }


def measured(model, held_out, prose: list[str]) -> dict:
    """Return each record's loss, each answer, and a summary of both."""
    import gemma_lora as gl
    from gemma_lora import sampling

    losses, tokens = record_losses(model, held_out)
    cuts = []
    cut_at_end = sampling._until_end

    def noted(ids, ends):
        kept = cut_at_end(ids, ends)
        cuts.append((len(kept), len(kept) < len(ids)))
        return kept

    # private: where `generate` cuts an answer, which tells whether it ended by itself
    sampling._until_end = noted
    start = time.monotonic()
    texts = gl.generate(model, list(held_out), max_new_tokens=NEW_TOKENS)
    seconds = time.monotonic() - start
    sampling._until_end = cut_at_end
    # Short factual questions: their reference has at most five words.
    short = [i for i, row in enumerate(held_out) if len(row["response"].split()) <= 5]
    holds = [plain(held_out[i]["response"]) in plain(texts[i]) for i in short]
    summary = {
        "loss": round(sum(losses) / sum(tokens), 4),
        "ended": sum(ended for _, ended in cuts) / len(cuts),
        "mean_tokens": float(np.mean([length for length, _ in cuts])),
        "distinct_2": round(float(np.mean([one_distinct(text) for text in texts])), 4),
        "short_questions": len(short),
        "short_hold_the_reference": sum(holds),
        "prose_perplexity": round(gl.perplexity(model, prose), 3),
        "answer_seconds": round(seconds, 1),
    }
    return {"losses": losses, "tokens": tokens, "answers": texts, "summary": summary}


def plain(text: str) -> str:
    """Return a text without case, punctuation and articles, to look for one in another."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return f" {' '.join(word for word in words if word not in ('a', 'an', 'the'))} "


def one_distinct(text: str) -> float:
    """Return the share of a text's pairs of words that differ; 1 for a single word."""
    import gemma_lora as gl

    return gl.distinct(text) if len(text.split()) > 1 else 1.0


def record_losses(model, records) -> tuple[list[float], list[int]]:
    """Return for each record the sum of its losses, and how many tokens count."""
    import jax
    import keras

    from gemma_lora.batches import Batches
    from gemma_lora.loss import records_apart
    from gemma_lora.tokens import encode

    @jax.jit
    def token_losses(weights, features, targets):
        scope = keras.StatelessScope(list(zip(model.weights, weights, strict=True)))
        with scope, records_apart(model):
            hidden = model.backbone(features)
            logits = model.backbone.token_embedding(hidden, reverse=True).astype("float32")
        picked = jax.numpy.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    batches = Batches(encode(model, records), batch_tokens=256)
    sums, tokens = np.zeros(len(records)), np.zeros(len(records), int)
    for index in range(len(batches)):
        features, targets, weights = batches[index]
        values = [weight.value for weight in model.weights]
        found = np.asarray(token_losses(values, features, targets)) * weights
        for row, members in enumerate(batches._order[index]):
            for number, record in enumerate(members, start=1):
                of_record = features["padding_mask"][row] == number
                sums[record] += found[row][of_record].sum()
                tokens[record] += int(weights[row][of_record].sum())
    return sums.tolist(), tokens.tolist()


def speed(options) -> dict:
    """Return rates of training and answering: ours, the recipe, Transformers and PEFT."""
    from training import measure

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = options.data.read_text().splitlines()[: options.rows]
        folder.joinpath("texts.jsonl").write_text("\n".join(texts) + "\n")
        found = {"rows": options.rows}
        measure("prepare_real", folder, model=str(options.model))
        size = {"rows": options.rows, "length": 256, "dtype": "float32"}
        ways = {
            "gl.fit": ("ours", {"repeats": 2, "loss_on": "response", "batch_tokens": None}),
            "PEFT": ("peft", {"repeats": 1, "tried_rows": 16}),
            "published recipe": ("recipe", {"repeats": 1}),
        }
        for name, (way, more) in ways.items():
            found[name] = measure(way, folder, **size, **more)
        for library in ("ours", "transformers"):
            found[f"answers, {library}"] = measure("real_answers", folder, library=library)
    for name in ways:
        rates = [t / s for t, s in zip(found[name]["tokens"], found[name]["seconds"], strict=True)]
        found[name]["rate"] = round(float(np.median(rates)), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("answers", "speed"))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--rows", type=int)
    options = parser.parse_args()
    options.rows = options.rows or {"answers": 1000, "speed": 64}[options.part]
    found = {"answers": answers, "speed": speed}[options.part](options)
    from training import device, version

    name = device()
    out = HERE / "results" / f"real_gemma_{name.replace(' ', '_')}.json"
    kept = json.loads(out.read_text()) if out.is_file() else {}
    libraries = ("keras", "keras-hub", "jax", "torch", "transformers", "peft")
    about = {
        "model": options.model.name,
        "device": name,
        "date": str(datetime.date.today()),
        "versions": {library: version(library) for library in libraries},
    }
    out.write_text(json.dumps(kept | {options.part: about | found}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
