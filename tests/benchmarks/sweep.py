"""Find settings for tuning a model: the held-out loss of many runs, and a figure.

    python tests/benchmarks/sweep.py MODEL DATA.jsonl --out results.json [--quick]

MODEL is whatever `gl.load` takes. Of DATA, the runs learn from rows 0 to 1799, and we
measure on rows 1800 to 1999. Later rows are never used, so they stay fit for a final
test. With `--prose RECORDS.jsonl` we also measure what tuning costs: the perplexity of
those records' contexts.

Each run is one line of JSON. It is printed at once and appended to results.jsonl, so a
sweep that is cut off goes on where it stopped. At the end, results.json gets all lines,
and results.png the figure. `--quick` does one run of each kind on a few rows: a rehearsal.

A GPU has room for several sweeps at a time: with `--targets` and `--rank`, each process
does a part, into the same file. Give each a share of the memory by the environment
variable XLA_PYTHON_CLIENT_MEM_FRACTION. A run's seconds then say little. On an H100,
looking for the quickest float32 products took minutes a program; with XLA_FLAGS set to
"--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0" it takes seconds.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import gemma_lora as gl

gl.setup(seed=0)

import jax  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from gpu import versions  # noqa: E402

from gemma_lora.progress import CUT, INK, TUNED, finished  # noqa: E402
from gemma_lora.tables import Table  # noqa: E402

RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
TARGETS = ("query_value", "all_linear")
RANKS = (4, 16)
ROWS = (1000, 250)
SEEDS = (0, 1)
TUNING = range(1800)
HELD_OUT = range(1800, 2000)
RECIPE = {"batch_size": 1, "batch_tokens": None, "loss_on": "all"}
COLORS = {4: TUNED, 16: "#e8710a"}


@dataclass(frozen=True)
class Run:
    """The settings of one run; the defaults are those of `gl.fit`."""

    targets: str
    rank: int
    learning_rate: float
    rows: int = 1000
    seed: int = 0
    epochs: int = 1
    batch_tokens: int | None = 256
    batch_size: int | None = None
    loss_on: str = "response"


@dataclass
class Sweep:
    """What is swept, on which model and rows, and where the lines go."""

    model: object
    train: list[dict]
    held_out: list[dict]
    prose: list[str]
    lines: Path
    until: float
    rates: tuple[float, ...] = RATES
    rows: tuple[int, ...] = ROWS
    seeds: tuple[int, ...] = SEEDS

    def emit(self, what: str, **values) -> None:
        """Print a line of JSON, and append it to the file."""
        line = json.dumps({"what": what, **values})
        print(line, flush=True)
        with self.lines.open("a") as file:
            file.write(line + "\n")

    def measure(self) -> dict:
        """Return the losses of the model as it is."""
        measured = gl.evaluate(self.model, self.held_out, answers=False)
        values = {"held_out_loss": measured.loss, "held_out_accuracy": measured.token_accuracy}
        if self.prose:
            values["prose_perplexity"] = gl.perplexity(self.model, self.prose)
        return {name: round(value, 5) for name, value in values.items()}

    def sweep(self, targets: str, rank: int) -> None:
        """Do every run of one kind of adapters.

        All runs share the adapters' variables, whose values go back to the start before
        each: so a step is compiled once for each shape of a batch.
        """
        starts = {}
        for seed in self.seeds:
            gl.remove_adapter(self.model)
            gl.enable_lora(self.model, rank=rank, targets=targets, seed=seed)
            starts[seed] = [np.array(weight.value) for weight in self.model.trainable_variables]
        if not any(line["what"] == "base" for line in read(self.lines)):
            self.emit("base", **self.measure())
        for run in self.runs(targets, rank):
            if time.time() > self.until:
                print("Out of time. The same command goes on from here.")
                return
            if run in finished_runs(self.lines):
                continue
            weights = zip(self.model.trainable_variables, starts[run.seed], strict=True)
            for weight, value in weights:
                weight.assign(value)
            self.emit("run", **asdict(run), **self.train_once(run))

    def runs(self, targets: str, rank: int):
        """Yield runs, the most telling first: later ones depend on what they found."""
        kind = Run(targets, rank, 0)
        first, *others = self.seeds
        yield from self.grid(kind, self.rows, [first])
        if (targets, rank) == ("query_value", 4):
            for seed, rows in product(self.seeds, self.rows):
                yield replace(kind, learning_rate=5e-5, seed=seed, rows=rows, **RECIPE)
        yield from self.grid(kind, self.rows[:1], others)
        best = self.rates.index(best_rate(self.lines, replace(kind, rows=self.rows[0])))
        lower = self.rates[max(0, best - 1) : best + 1]
        higher = self.rates[best : best + 2]
        if rank == 4:
            for seed in self.seeds:
                yield from self.grid(replace(kind, epochs=3), self.rows[:1], [seed], lower)
                yield from self.grid(
                    replace(kind, batch_tokens=1024), self.rows[:1], [seed], higher
                )
        yield from self.grid(kind, self.rows[1:], others)

    def grid(self, kind: Run, rows, seeds, rates=None):
        """Yield a kind of run with each number of rows, seed and learning rate."""
        for count, seed, rate in product(rows, seeds, rates or self.rates):
            yield replace(kind, rows=count, seed=seed, learning_rate=rate)

    def train_once(self, run: Run) -> dict:
        """Tune the adapters as a run says, and measure them."""
        options = asdict(run)
        for name in ("targets", "rank", "rows"):
            options.pop(name)
        # Of several epochs, each one's loss is that of a run that ends there.
        validation = self.held_out if run.epochs > 1 else None
        try:
            history = gl.fit(
                self.model, self.train[: run.rows], validation=validation, verbose=0, **options
            ).history
        except FloatingPointError:
            return {"diverged": True}
        values = {"loss": round(history["loss"][-1], 5), **self.measure()}
        if validation:
            values["held_out_by_epoch"] = [round(loss, 5) for loss in history["val_loss"]]
        values["device"] = jax.devices()[0].device_kind
        values["precision"] = jax.config.jax_default_matmul_precision
        return values | {"seconds": self.model.gemma_lora.run["seconds"]}


def read(lines: Path) -> list[dict]:
    """Return the lines that were written so far."""
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def kind_of(run: Run) -> Run:
    """Return a run's settings but for learning rate and seed."""
    return replace(run, learning_rate=0, seed=0)


def run_of(line: dict) -> Run:
    """Return the settings of a run from its line."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def finished_runs(lines: Path) -> dict[Run, dict]:
    """Return the finished runs and their lines."""
    return {run_of(line): line for line in read(lines) if line["what"] == "run"}


def mean_losses(runs: dict[Run, dict], kind: Run) -> dict[float, float]:
    """Return the mean held-out loss over seeds of a kind of run, by learning rate.

    Some seeds are luckier, so a rate with fewer seeds than others is left out.
    """
    found = {}
    for run, line in runs.items():
        if kind_of(run) == kind_of(kind):
            found.setdefault(run.learning_rate, []).append(line.get("held_out_loss", math.inf))
    most = max(map(len, found.values()), default=0)
    return {rate: mean(found[rate]) for rate in sorted(found) if len(found[rate]) == most}


def best_rate(lines: Path, kind: Run) -> float:
    """Return the learning rate whose mean held-out loss is the lowest."""
    losses = mean_losses(finished_runs(lines), kind)
    return min(losses, key=losses.get)


def summary(runs: dict[Run, dict]) -> list[dict]:
    """Return a row for each kind of run: its best learning rate, and what that gives."""
    rows = []
    for kind in dict.fromkeys(map(kind_of, runs)):
        losses = mean_losses(runs, kind)
        best = min(losses, key=losses.get)
        lines = [
            line
            for run, line in runs.items()
            if replace(run, seed=0) == replace(kind, learning_rate=best)
        ]
        row = {name: value for name, value in asdict(kind).items() if name != "seed"}
        row |= {"learning_rate": best, "held_out_loss": round(losses[best], 4)}
        row["seeds"] = [line.get("held_out_loss") for line in lines]
        for name in ("held_out_by_epoch", "held_out_accuracy", "prose_perplexity"):
            values = [line[name] for line in lines if name in line]
            if values:
                row[name] = np.mean(values, axis=0).round(4).tolist()
        rows.append(row)
    return rows


def draw(found: dict, runs: dict[Run, dict], path: Path) -> None:
    """Draw held-out loss against learning rate: lines are seed 0, crosses other seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    base = found["base"]["held_out_loss"]
    losses = {run: line.get("held_out_loss", math.inf) for run, line in runs.items()}
    counts = sorted({run.rows for run in runs}, reverse=True)
    recipe = [loss for run, loss in losses.items() if run.batch_size and run.rows == counts[0]]
    for axes, targets in zip(panels, TARGETS, strict=True):
        for rank, rows in product(RANKS, counts):
            kind = Run(targets, rank, 0, rows)
            points = [(run, loss) for run, loss in losses.items() if kind_of(run) == kind]
            style = {"color": COLORS[rank], "linestyle": "-" if rows == counts[0] else ":"}
            first = sorted((run.learning_rate, loss) for run, loss in points if not run.seed)
            label = f"rank {rank}, {rows:,} rows"
            axes.plot(*np.reshape(first, (-1, 2)).T, marker="o", label=label, **style)
            others = [(run.learning_rate, loss) for run, loss in points if run.seed]
            axes.plot(*np.reshape(others, (-1, 2)).T, "x", color=COLORS[rank])
        axes.plot([], [], "x", color=INK, label="another seed")
        axes.axhline(base, color=INK, linestyle="--", label="not tuned")
        if recipe:
            label = f"published recipe, {counts[0]:,} rows"
            axes.axhline(mean(recipe), color=CUT, linestyle="--", label=label)
        axes.set(xscale="log", xlim=(min(RATES) / 1.5, max(RATES) * 1.5), xlabel="learning rate")
        axes.set_title(targets, loc="left", fontsize=11)
    # Runs that make the model much worse would flatten the others.
    gain = max(base - min(losses.values()), 0.01)
    panels[0].set_ylim(base - 1.1 * gain, base + 0.3 * gain)
    panels[0].set_ylabel("held-out loss (nats a token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
    finished(figure).savefig(path, dpi=110)


def collect(out: Path) -> None:
    """Turn the lines into one file of results, a table and a figure."""
    lines = read(out.with_suffix(".jsonl"))
    found = {line["what"]: line for line in lines if line["what"] in ("about", "base")}
    runs = finished_runs(out.with_suffix(".jsonl"))
    if not runs:
        return
    about = {name: value for name, value in found["about"].items() if name != "what"}
    base = {name: value for name, value in found["base"].items() if name != "what"}
    measured = [
        asdict(run) | {k: v for k, v in line.items() if k != "what"} for run, line in runs.items()
    ]
    found = {**about, "base": base, "best": summary(runs), "runs": measured}
    text = json.dumps(found, indent=1)
    out.write_text(text + "\n")
    draw(found, runs, out.with_suffix(".png"))
    columns = (
        "targets",
        "rank",
        "rows",
        "epochs",
        "batch_tokens",
        "learning_rate",
        "held_out_loss",
    )
    columns += ("prose_perplexity",)
    table = [{name: row.get(name, "") for name in columns} for row in found["best"]]
    print(Table(table, caption=f"{about['device']}, {about['date']}; base: {base}"))


def without_tensorflow() -> None:
    """Let KerasHub make Gemma 3's preprocessor where TensorFlow is not installed.

    We need its vocabulary alone.
    """
    # private: the check at the beginning of `Gemma3CausalLMPreprocessor`
    from keras_hub.src.models.gemma3 import gemma3_causal_lm_preprocessor

    gemma3_causal_lm_preprocessor.assert_tf_installed = lambda name: None


def main() -> None:
    """Read the command line, do the runs, and collect the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prose", type=Path, help="records whose contexts are read as prose")
    parser.add_argument("--targets", choices=TARGETS, action="append", help="these adapters alone")
    parser.add_argument("--rank", type=int, choices=RANKS, action="append", help="this rank alone")
    # By default, a GPU rounds the factors of float32 products to 10 bits.
    parser.add_argument("--precision", choices=("highest", "default"), default="highest")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after these")
    parser.add_argument("--quick", action="store_true", help="one run of each kind, on few rows")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", options.precision)
    without_tensorflow()
    rows = list(gl.load_records(options.data))
    prose = gl.load_records(options.prose) if options.prose else []
    sweep = Sweep(
        model=gl.load(options.model, dtype="float32"),
        train=[rows[number] for number in TUNING],
        held_out=[rows[number] for number in HELD_OUT],
        prose=[record["context"] for record in prose if record["context"].strip()],
        lines=options.out.with_suffix(".jsonl"),
        until=time.time() + options.seconds,
    )
    if options.quick:
        sweep = replace(sweep, rates=(5e-4,), rows=(40,), seeds=(0,), held_out=sweep.held_out[:20])
    sweep.emit(
        "about",
        model=Path(options.model).name,
        data=options.data.name,
        device=jax.devices()[0].device_kind,
        date=time.strftime("%Y-%m-%d"),
        versions=versions(),
        dtype="float32",
        tuning_rows=[TUNING.start, TUNING.stop],
        held_out_rows=[HELD_OUT.start, HELD_OUT.stop],
        prose_texts=len(sweep.prose),
    )
    for targets, rank in product(options.targets or TARGETS, options.rank or RANKS):
        sweep.sweep(targets, rank)
    collect(options.out)


if __name__ == "__main__":
    main()
