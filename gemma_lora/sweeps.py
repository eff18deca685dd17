"""Train one model many times with other settings, and put the results side by side.

`sweep` tries every combination of what it is given. Each run begins with new adapters
on the same base, and what it found goes into a file at once. How a run trains is in
`training`, what is measured after it in `evaluation`.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from keras_hub.models import CausalLM

from gemma_lora.evaluation import evaluate
from gemma_lora.lora import (
    adapter_weights,
    adopt,
    detach,
    enable_lora,
    fingerprints,
    redraw,
    resolve_targets,
    target_names,
)
from gemma_lora.models import one_at_a_time, recommended, state_of, template_of
from gemma_lora.options import a_path, whole_number, with_options
from gemma_lora.progress import counted
from gemma_lora.records import Records, as_records
from gemma_lora.templates import Template, get_template
from gemma_lora.training import fit

# What varies, in the order of the columns. Runs that share adapters stand side by side,
# because they share what is compiled.
_VARYING = ("rank", "targets", "rows", "epochs", "learning_rate", "seed")


@with_options
@one_at_a_time
def sweep(
    model: CausalLM,
    train: Records,
    *,
    validation: Records,
    learning_rate: float | Sequence[float | None] | None = None,
    rank: int | Sequence[int] = 4,
    targets: str | Sequence[str | Sequence[str]] = "query_value",
    rows: int | Sequence[int | None] | None = None,
    epochs: int | Sequence[int] = 1,
    seeds: int | Sequence[int] = 0,
    answers: bool | None = None,
    file: str | Path | None = None,
) -> pd.DataFrame:
    """Train with each combination of some settings, and measure on held-out records.

    >>> import gemma_lora as gl
    >>> train, held_out = gl.load_tiny_world()
    >>> train, held_out = train.select(range(20)), held_out.select(range(10))
    >>> rates = [5e-5, 5e-3]
    >>> model = gl.load("tiny_gemma_en")
    >>> found = gl.sweep(model, train, validation=held_out, learning_rate=rates)
    >>> bool(found["loss"][1] < found["loss"][0])
    True

    The model ends as it was, also after Ctrl-C or an error.

    Args:
        model: A model from `gl.load`, with or without adapters.
        train: Records to learn from, as in `fit`.
        validation: Records to measure each run on.
        learning_rate: Rates to try. Here and below: a list, or a single value. None is
            what is recommended for the model and its adapters.
        rank, targets: Adapters to try, as in `enable_lora`; alpha is the rank.
        rows: Numbers of records to try, the first so many of `train`. None is all.
        epochs: Numbers of epochs to try.
        seeds: Each draws the adapters and the order of the records.
        answers: Whether to ask questions after each run, as in `evaluate`.
        file: A file that keeps the results, a line of JSON for each run. The same call
            again does only the runs that the file has not.

    Returns:
        A row for each run: its settings; `loss` on the held-out records, in nats a
        token, missing if the run diverged; `right`, the share of right answers, missing
        if nothing was asked; trained `parameters`; `seconds` of training.

    Raises:
        ValueError: A setting is invalid.
        KeyboardInterrupt: Ctrl-C was pressed. Runs that are complete are in the file.
    """
    train = [*as_records(train)]
    held_out = [*as_records(validation)]
    given = {"rank": rank, "targets": targets, "rows": rows, "epochs": epochs}
    given |= {"learning_rate": learning_rate, "seed": seeds}
    runs = _combinations(model, given, len(train))
    if answers is None:
        answers = state_of(model).settings.exact_answers
    template = get_template(template_of(model))
    results = _Results(file, _digest(model, train, held_out, template, answers))
    one = partial(_result, model, train, held_out, template, answers)
    with _as_it_was(model), counted("Runs", len(runs)) as count:
        for run in runs:
            if results.of(run) is None:
                results.add(run, one(run))
            count(1)
    return pd.DataFrame([run | results.of(run) for run in runs])


def _combinations(model, given: dict[str, Any], most_rows: int) -> list[dict[str, Any]]:
    """Check the settings, and return those of each run.

    Raises ValueError if one is empty or out of range.
    """
    lists = {}
    for name in _VARYING:
        values = given[name]
        alone = isinstance(values, str) or not isinstance(values, Iterable)
        lists[name] = [values] if alone else [*values]
        if not lists[name]:
            raise ValueError(f"{name} has no value to try.")
    for name, least in (("rank", 1), ("epochs", 1), ("seed", 0)):
        lists[name] = [whole_number(name, value, least=least) for value in lists[name]]
    lists["rows"] = [
        most_rows if count is None else whole_number("rows", count) for count in lists["rows"]
    ]
    if max(lists["rows"]) > most_rows:
        raise ValueError(
            f"There are {most_rows:,} records to learn from. Received: rows={max(lists['rows'])}"
        )
    for value in lists["targets"]:
        resolve_targets(value, target_names(model))
    lists["targets"] = [v if isinstance(v, str) else ", ".join(v) for v in lists["targets"]]
    runs = [dict(zip(_VARYING, v, strict=True)) for v in itertools.product(*lists.values())]
    for run in runs:
        if run["learning_rate"] is not None:
            run["learning_rate"] = float(run["learning_rate"])
    return runs


def _result(
    model, train: list, held_out: list, template: Template, answers: bool, run: dict
) -> dict:
    """Train one run from new adapters, and return what was measured."""
    _give_adapters(model, run["rank"], run["targets"], run["seed"])
    rate = run["learning_rate"]
    used = recommended(model).learning_rate if rate is None else rate
    result = {
        "learning_rate": used,
        "loss": float("nan"),
        "right": None,
        "parameters": state_of(model).lora.trainable,
    }
    start = time.monotonic()
    try:
        fit(
            model,
            train[: run["rows"]],
            template=template,
            epochs=run["epochs"],
            learning_rate=used,
            seed=run["seed"],
            verbose=0,
        )
    except FloatingPointError:
        return result | {"seconds": round(time.monotonic() - start, 2)}
    result["seconds"] = round(time.monotonic() - start, 2)
    if state_of(model).run["epochs"] < run["epochs"]:
        raise KeyboardInterrupt("The sweep was stopped. Runs that are complete are in its file.")
    measured = evaluate(model, held_out, answers=answers)
    result["loss"] = measured.loss
    result["right"] = measured.share() if measured.asked else None
    return result


def _give_adapters(model, rank: int, targets: str, seed: int) -> None:
    """Put new adapters on a model. Those of the same shapes get new values only."""
    names = resolve_targets(targets.split(", ") if "," in targets else targets, target_names(model))
    lora = state_of(model).lora
    if lora is None or (lora.rank, lora.alpha, lora.targets) != (rank, rank, names):
        detach(model)
        enable_lora(model, rank=rank, targets=names)
    redraw(model, seed)


@contextmanager
def _as_it_was(model) -> Iterator[None]:
    """Give a model back the adapters, or none, and the record that it has now."""
    adopt(model)
    state = state_of(model)
    lora = state.lora
    run = state.run
    values = [np.asarray(weight.value) for weight in adapter_weights(model)]
    try:
        yield
    finally:
        if lora is None:
            detach(model)
        else:
            now = state.lora
            if (now.rank, now.alpha, now.targets) != (lora.rank, lora.alpha, lora.targets):
                detach(model)
                enable_lora(model, rank=lora.rank, targets=lora.targets, alpha=lora.alpha)
            for weight, value in zip(adapter_weights(model), values, strict=True):
                weight.assign(value)
            state.lora = lora
        state.run = run


class _Results:
    """What runs have found, by their settings; kept in a file, if there is one.

    Args:
        file: Made if it does not exist. Lines of other sweeps in it stay as they are.
        digest: What tells this sweep from others.
    """

    def __init__(self, file: str | Path | None, digest: str):
        self._file = None if file is None else a_path("file", file)
        self._digest = digest
        self._found: dict[str, dict] = {}
        if self._file is None or not self._file.exists():
            return
        for line in self._file.read_text("utf-8").splitlines():
            try:
                kept = json.loads(line)
                if kept["sweep"] == digest:
                    self._found[self._key(kept["run"])] = kept["result"]
            except (ValueError, KeyError, TypeError):
                # A line that a dying process has cut off: that run is done again.
                continue

    def of(self, run: dict) -> dict | None:
        """Return what a run has found, or None."""
        return self._found.get(self._key(run))

    def add(self, run: dict, result: dict) -> None:
        """Keep what a run has found."""
        self._found[self._key(run)] = result
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"sweep": self._digest, "run": run, "result": result})
        cut_off = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off + line + "\n")

    @staticmethod
    def _key(run: dict) -> str:
        return json.dumps(run, sort_keys=True)


def _digest(model, train: list, held_out: list, template: Template, answers: bool) -> str:
    """Return what tells a sweep from others: base, records, template, what is asked."""
    settings = vars(state_of(model).settings)
    parts = (fingerprints(model), train, held_out, vars(template), answers, settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
