"""Training, ours beside the published recipe on stock KerasHub and beside Transformers + PEFT: same rows, geometry and
starting weights, one process each in turn. Prints tables; writes
results/training_DEVICE.json and a figure.

python tests/benchmarks/training.py [--rows 1000] [--repeats 3] [--data DOLLY.jsonl]

Ours and PEFT learn from all rows in each repeat; the recipe, whose steps are all alike,
from a part in each. For a GPU there is gpu.py.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

import gemma_lora as gl
from gemma_lora.figures import plot_bars
from gemma_lora.tables import Table

HERE = Path(__file__).parent
ROWS = HERE.parents[2] / "shared/data/dolly_open_qa_3000.jsonl"
SMALL = {"num_layers": 6, "num_query_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
SMALL |= {"hidden_dim": 256, "intermediate_dim": 2048, "vocabulary_size": 8_000}


def measure(what: str, folder: Path, environment: dict | None = None, **options) -> dict:
    """Run a function of contenders.py in a process of its own, and wait for it."""
    print(f"{what} {options} …", flush=True)
    fresh = {
        "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(dir=folder)
    }  # else a run before has compiled for it
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **fresh, **(environment or {})}
    command = [
        sys.executable,
        HERE / "contenders.py",
        what,
        json.dumps({"folder": str(folder), **options}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} {options} failed: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print("   ", json.dumps(found), flush=True)
    return options | found


def speeds(
    folder: Path, rows: int, repeats: int, lengths: tuple[int, ...], dtypes: tuple[str, ...]
) -> dict:
    """Every contender's epochs over the same rows, for each sequence length."""
    found, size = {}, {"rows": rows, "repeats": repeats}
    for length in lengths:
        size["length"] = length
        found[f"published recipe, {length}"] = measure("recipe", folder, **size, dtype=dtypes[0])
        for loss_on in ("response", "all") if length == lengths[0] else ("response",):
            name = f"gl.fit, {length}" + (", loss on all" if loss_on == "all" else "")
            found[name] = measure("ours", folder, **size, loss_on=loss_on, dtype=dtypes[0])
        for dtype in dtypes:
            found[f"PEFT {dtype}, {length}"] = measure("peft", folder, **size, dtype=dtype)
    for result in found.values():
        result["rate"] = median(
            t / s for t, s in zip(result["tokens"], result["seconds"], strict=True)
        )
    return found


def speed_table(found: dict) -> Table:
    """Real tokens a second, and the ratios of ours to the others at the same length."""
    rows = []
    for name, result in found.items():
        own = found[f"gl.fit, {result['length']}"]["rate"]
        row = {
            "contender": name,
            "real tokens/s": f"{result['rate']:,.0f}",
            "ours is": f"{own / result['rate']:.2f} x",
        }
        row |= {
            "compiling": f"{result.get('compiling', 0):.1f} s",
            "peak memory": f"{result['peak MiB']:,.0f} MiB",
        }
        rows.append(row)
    return Table(rows)


def small_world(folder: Path, repeats: int) -> dict:
    """On `tiny_gemma_en`: time to the recipe's loss, the first step cold and warm, and cost by the number of rows."""
    recipe = measure("tiny_recipe", folder)
    ours = measure("tiny_ours", folder, target=recipe["loss"])
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    first = {}
    for turn in range(repeats):
        for state in ("cold", "warm"):
            if state == "cold":
                compiled["JAX_COMPILATION_CACHE_DIR"] += str(turn)
            first.setdefault(state, []).append(measure("first_step", folder, compiled)["from fit"])
    scale = [measure("scale", folder, rows=rows, repeats=repeats) for rows in (300, 1000, 3000)]
    return {"recipe": recipe, "ours": ours, "first step": first, "scale": scale}


def small_world_table(found: dict) -> Table:
    """What `small_world` found, as ratios."""
    recipe, ours, first, scale = (found[name] for name in ("recipe", "ours", "first step", "scale"))
    costs = [1e6 * median(row["seconds"]) / row["tokens"] for row in scale]
    cold, warm = (median(first[state]) for state in ("cold", "warm"))
    rows = [("seconds to the first step: cold, warm", f"{cold:.2f}", f"{warm:.2f}", cold / warm)]
    for key, name in (("seconds", ""), ("with compiling", ", with compiling")):
        name = f"seconds to the recipe's held-out loss{name}"
        rows.append((name, f"{recipe[key]:.1f}", f"{ours[key]:.2f}", recipe[key] / ours[key]))
    for i, other in ((1, "1,000"), (2, "3,000")):
        rows.append(
            (
                f"microseconds a real token: 300 rows, {other}",
                f"{costs[0]:.0f}",
                f"{costs[i]:.0f}",
                costs[0] / costs[i],
            )
        )
        peaks = scale[0]["peak MiB"], scale[i]["peak MiB"]
        rows.append(
            (
                f"peak MiB: 300 rows, {other}",
                f"{peaks[0]:,.0f}",
                f"{peaks[1]:,.0f}",
                peaks[0] / peaks[1],
            )
        )
    names = ("tiny_gemma_en", "recipe, or before", "gl.fit, or after", "ratio")
    return Table([dict(zip(names, (*row[:3], f"{row[3]:.2f}"), strict=True)) for row in rows])


def answering(folder: Path) -> dict:
    """Seconds for 64 prompts of mixed lengths, with compiling and without."""
    return {
        how: measure("answers", folder, how=how) for how in ("stock", "stock, own lengths", "ours")
    }


def device() -> str:
    """Name this machine for a file: its GPU, or else how many cores it has."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(query[0]):
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        if names.strip():
            return names.splitlines()[0].strip()
    return f"{os.cpu_count()} CPU cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROWS)
    options = parser.parse_args()
    name = device()
    out = HERE / "results" / f"training_{name.replace(' ', '_')}.json"
    out.parent.mkdir(exist_ok=True)
    found = {
        "device": name,
        "processor": platform.processor() or platform.machine(),
        "date": str(datetime.date.today()),
    }
    found |= {"rows": options.rows, "repeats": options.repeats}
    found["versions"] = {
        library: version(library)
        for library in ("keras", "keras-hub", "jax", "torch", "transformers", "peft")
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = gl.load_records(options.data) if options.data.is_file() else gl.load_dolly(rows=3000)
        folder.joinpath("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dtypes = ("float32", "bfloat16")
        found["model"] = measure("prepare", folder, geometry=SMALL, dtype=dtypes[0])
        found["speed"] = speeds(folder, options.rows, options.repeats, (256, 512), dtypes)
        found["step"] = {
            str(shape): measure("steps", folder, shape=shape, repeats=7)
            for shape in ((4, 256), (2, 512))
        }
        found["tiny"] = small_world(folder, options.repeats)
        found["answers"] = answering(folder)
    out.write_text(json.dumps(found, indent=1) + "\n")
    report(found, out)


def report(found: dict, out: Path) -> None:
    """Print the tables, and draw the figure."""
    caption = f"{found['device']}, {found['date']}, " + ", ".join(
        f"{k} {v}" for k, v in found["versions"].items()
    )
    print(
        f"\n{caption}; {found['rows']} rows, medians of {found['repeats']}\n\n{speed_table(found['speed'])}\n"
    )
    for shape, one in found.get("step", {}).items():
        bare = median(one["bare"])
        print(
            f"a step of {shape}: {1000 * bare:.0f} ms bare; gl.fit {median(one['query_value']) / bare:.2f} x of it, ",
            end="",
        )
        print(
            f"all linear layers {median(one['all_linear']) / median(one['query_value']):.2f} x of query and value"
        )
    if "tiny" in found:
        print(f"\n{small_world_table(found['tiny'])}\n")
        ours, *others = (found["answers"][how] for how in ("ours", "stock", "stock, own lengths"))
        for other in others:
            whole, compiled = (
                theirs / own for theirs, own in zip(other["seconds"], ours["seconds"], strict=True)
            )
            tokens = compiled * ours["tokens"] / other["tokens"]
            print(
                f"64 prompts x 64 new tokens: gl.generate {whole:.2f} x the prompts a second of {other['how']}",
                end="",
            )
            print(
                f", compiles included; {compiled:.2f} x compiled, {tokens:.2f} x the tokens a second"
            )
    rates = {name: result["rate"] for name, result in found["speed"].items()}
    figure = plot_bars(
        rates, title=f"Real tokens a second ({found['device']}, {found['date']})", form="{:,.0f}"
    )
    figure.savefig(out.with_suffix(".png"), dpi=110)
    print(f"\n{out}")


if __name__ == "__main__":
    main()
