"""Turn the lines that gpu.py wrote into one file with the card's name and the date.

    python tests/benchmarks/gpu_results.py gpu.jsonl [MORE.jsonl] [--out FOLDER]

What the card's file has already stays, unless it was measured again. Later lines replace
earlier ones about the same measurement, except that an error never replaces a result.
Ratios compare measurements of one day. It also prints a table, and says what was skipped
or failed.
"""

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# What tells one measurement from another.
KEYS = ("what", "library", "model", "dtype", "base", "targets", "shape", "prompts", "remat")
# Lines that say how the run went, not what it found.
ABOUT_THE_RUN = ("start", "end", "part", "device", "memory fraction")
RATES = {"train": "real_tokens_per_second", "answer": "new_tokens_per_second"}
PEERS = ("transformers + peft", "stock")
# Where these are equal, two libraries did the same work.
WORK = ("what", "model", "shape", "prompts", "date")


def main() -> None:
    """Read the files named on the command line, and write the results beside others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    texts = [file.read_text() for file in options.files]
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line]
    card = next(line["gpu"] for line in lines if line["what"] == "start")
    path = options.out / f"gpu_{file_name(card.split(',')[0])}.json"
    found = collect(earlier(path) + lines)
    path.write_text(json.dumps(found, indent=1) + "\n")
    report(found)
    print(f"\n{path}")


def file_name(device: str) -> str:
    """Return a device's name without its memory.

    >>> file_name("NVIDIA H100 80GB HBM3")
    'NVIDIA_H100'
    """
    return "_".join(re.sub(r" \d+ ?GB.*", "", device).split())


def earlier(path: Path) -> list[dict]:
    """Return what a file of results holds, as lines like those of a run."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    start = {"what": "start", "date": found["date"], "gpu": found["card"]}
    return [start, found | {"what": "device"}, *found["results"], *found["parts"]]


def collect(lines: list[dict]) -> dict:
    """Return what the lines found: the run, measurements, ratios and failures."""
    about, latest, parts = {}, {}, {}
    for line in lines:
        if line["what"] == "start":
            about |= {"date": line["date"], "card": line["gpu"]}
        elif line["what"] == "device":
            names = ("device", "versions", "memory_fraction", "limit_gib")
            about |= {name: line[name] for name in (*names, "flops_formula", "peak_flops")}
        elif line["what"] == "part":
            parts[line["name"]] = line
        if line["what"] in ABOUT_THE_RUN:
            continue
        line = {"date": about.get("date"), **line}
        key = json.dumps([line.get(name) for name in KEYS])
        if not failed(line) or failed(latest.get(key, line)):
            latest[key] = line
    results = [line for line in latest.values() if not failed(line)]
    return {
        "device": about.pop("device", "unknown device"),
        **about,
        "results": results,
        "ratios": ratios(results),
        "without_result": [line for line in latest.values() if failed(line)],
        "parts": list(parts.values()),
    }


def failed(line: dict) -> bool:
    """Return whether a line says why there is no result."""
    return "error" in line or "skipped" in line


def ratios(results: list[dict]) -> list[dict]:
    """Return our rate over each peer's, for the same model and shape or prompts."""
    found = []
    for ours in results:
        if ours.get("library") != "gl" or ours["what"] not in RATES:
            continue
        # Peers have no quantized base and adapters on queries and values alone.
        if ours["base"] != ours["dtype"] or ours["targets"] != "query_value":
            continue
        if ours.get("remat"):
            continue
        for peer in results:
            if comparable(ours, peer):
                rate = RATES[ours["what"]]
                found.append(
                    {key: ours[key] for key in WORK if key in ours}
                    | {"ours": ours["dtype"], peer["library"]: peer["dtype"]}
                    | {"ratio": round(ours[rate] / peer[rate], 3)}
                )
    return found


def comparable(ours: dict, peer: dict) -> bool:
    """Return whether a peer did the same work.

    The published recipe is float32, so stock KerasHub is compared in either dtype.
    """
    if peer.get("library") not in PEERS or any(peer.get(key) != ours.get(key) for key in WORK):
        return False
    return peer["library"] == "stock" or peer["dtype"] == ours["dtype"]


def report(found: dict) -> None:
    """Print the results as a table in Markdown, the ratios, and what is missing."""
    print(f"{found['device']}, {found.get('date')}, {found.get('versions')}\n")
    columns = ("tokens/s", "ms/step", "of peak FLOP/s", "peak GiB", "estimated GiB")
    print("| " + " | ".join(("measurement", *columns)) + " |")
    print("|---|" + "---|" * len(columns))
    for line in found["results"]:
        if line["what"] not in RATES:
            continue
        names = [str(line[key]) for key in KEYS if key in line]
        numbers = [line[RATES[line["what"]]], line.get("step_ms")]
        numbers += [line.get(key) for key in ("utilisation", "peak_gib", "estimated_gib")]
        shown = ["" if number is None else f"{number:,}" for number in numbers]
        print("| " + " | ".join((", ".join(names), *shown)) + " |")
    for line in found["results"]:
        if line["what"] not in RATES and line["what"] != "built":
            print("\n" + json.dumps(line))
    print()
    for ratio in found["ratios"]:
        print(json.dumps(ratio))
    for line in found["without_result"]:
        print("NO RESULT:", json.dumps(line))
    for part in found["parts"]:
        if part.get("exit_status") or failed(part):
            print("PART:", json.dumps(part))


if __name__ == "__main__":
    main()
