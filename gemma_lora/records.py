"""Instruction records: Dolly, the small world, or a learner's own file, as a `datasets.Dataset` of text columns."""

import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import datasets

from gemma_lora.tiny.questions import load_tiny_world

COLUMNS = ("instruction", "context", "response", "category")
DOLLY = "databricks/databricks-dolly-15k"

# What other data sets call the same columns: Alpaca's names, question and answer, prompt and completion.
_OTHER_NAMES = {
    "instruction": ("instruction", "prompt", "prompts", "question", "query"),
    "context": ("context", "input"),
    "response": ("response", "responses", "output", "completion", "answer"),
    "category": ("category",),
}
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
_WAYS_OUT = (
    "Ways out: check the network and run this again (what was downloaded before is cached and needs no network); "
    "download the JSON Lines file elsewhere and pass its path to gl.load_records(); "
    "or go on with gl.load_tiny_world(), which needs no network."
)


def load_dolly(
    *,
    rows: int | None = 1000,
    context: str = "drop",
    held_out: int = 0,
    seed: int | None = None,
    or_tiny_world: bool = False,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load Databricks Dolly 15k from the Hugging Face Hub: (train, held_out).

    The defaults are the published recipe's: rows with a context are dropped, then the first 1,000 are taken.

    Args:
        rows: Rows to train on; None for all but the held-out ones.
        context: "drop" the rows that have a context, "keep" all, or take "only" those that have one.
        held_out: Rows to hold out. They follow the first `rows`, so they are never among them.
        seed: Shuffle first, by this seed. None keeps the file's order, as the recipe does.
        or_tiny_world: Whether to take records of the small world, and say so, where the Hub cannot be reached and
            nothing is cached: then at most `rows` and `held_out` of what `load_tiny_world` gives.

    Raises:
        ConnectionError: The Hub cannot be reached and nothing is cached.
        ValueError: There are fewer rows than were asked for.
    """
    if context not in ("drop", "keep", "only"):
        raise ValueError(f'context is "drop", "keep" or "only". Received: {context!r}')
    try:
        dolly = _from_hub(DOLLY, split="train")
    except ConnectionError as error:
        if not or_tiny_world:
            raise
        print(f"{str(error).splitlines()[0]}\nThese are records of the small world instead.")
        train, other = load_tiny_world()
        size = train.num_rows if rows is None else min(rows, train.num_rows)
        return train.select(range(size)), other.select([*range(min(held_out, other.num_rows))])
    if context != "keep":
        dolly = dolly.filter(
            lambda text: bool(text.strip()) == (context == "only"), input_columns="context"
        )
    if seed is not None:
        dolly = dolly.shuffle(seed=seed)
    rows = dolly.num_rows - held_out if rows is None else rows
    if rows < 1 or held_out < 0 or rows + held_out > dolly.num_rows:
        raise ValueError(
            f"{context=}: Dolly has {dolly.num_rows:,} rows. Received: rows={rows}, held_out={held_out}"
        )
    # A list, because select() refuses an empty range that stands at the end.
    return dolly.select(range(rows)), dolly.select([*range(rows, rows + held_out)])


def load_records(
    source,
    *,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    split: str = "train",
) -> datasets.Dataset:
    """Load records of your own, each checked, into Dolly's four text columns; a missing context or category is empty.

    >>> load_records([{"question": "What is 2 + 2?", "answer": "4"}])[0]
    {'instruction': 'What is 2 + 2?', 'context': '', 'response': '4', 'category': ''}

    Args:
        source: A path to a `.jsonl`, `.json` or `.csv` file; a pandas DataFrame; a list of dicts; a
            `datasets.Dataset`; or the name of a data set on the Hugging Face Hub, "owner/name".
        columns: What the source calls each column, as {"instruction": "frage", ...}. Columns left out are found by
            their usual names: Dolly's, Alpaca's, prompt and completion, question and answer, or `messages` of one
            user and one assistant turn (a system turn becomes the context).
        on_error: "raise" at the first malformed row, or "skip" malformed rows, with a warning that counts them.
        split: Which split of a data set on the Hub.

    Raises:
        ValueError: A row is malformed (not JSON, a missing field, not text, nothing to answer); the message says
            which file and line. Or no row is left.
        FileNotFoundError: There is no such file.
        ConnectionError: The Hub cannot be reached and nothing is cached.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error is "raise" or "skip". Received: {on_error!r}')
    if unknown := set(columns or ()) - set(COLUMNS):
        raise ValueError(
            f"columns maps {', '.join(COLUMNS)} to the source's names. Received: {sorted(unknown)}"
        )
    good, bad = [], []
    for place, row in _rows(source, split):
        try:
            good.append(checked_record(row, columns or {}))
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(
                    f'{place}: {error} To leave such rows out, pass on_error="skip".'
                ) from None
            bad.append(f"{place}: {error}")
    if not good:
        name = source if isinstance(source, str | Path) else f"the {type(source).__name__}"
        raise ValueError(f"No usable record in {name}. {bad[0] if bad else 'It is empty.'}")
    if bad:
        shown = "\n  ".join(bad[:3])
        warnings.warn(
            f"Skipped {len(bad):,} of {len(bad) + len(good):,} rows:\n  {shown}", stacklevel=2
        )
    return datasets.Dataset.from_list(good)


def _from_hub(name: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except (
        ValueError,
        RuntimeError,
    ):  # no such split, or a data set that is a script: the network is not to blame
        raise
    except (
        Exception
    ) as error:  # a connection that breaks off is an error of httpx, which is no OSError
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConnectionError(
            f"Could not load the data set {name!r} from the Hub: {reason}\n{_WAYS_OUT}"
        ) from error


def _rows(source, split: str) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, row); a row that cannot even be read is the ValueError that says why."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file():
            yield from _rows_of_file(path)
            return
        if (
            isinstance(source, Path)
            or path.suffix.lower() in _SUFFIXES
            or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)
        ):
            raise FileNotFoundError(f"There is no file {str(source)!r} in {Path.cwd()}.")
        source = _from_hub(source, split)
    if hasattr(source, "to_dict") and hasattr(
        source, "columns"
    ):  # a DataFrame, without importing pandas
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        kinds = "a path, a DataFrame, a list of dicts, a datasets.Dataset or the name of a data set on the Hub"
        raise TypeError(f"load_records reads {kinds}. Received: {type(source).__name__}")
    yield from ((f"row {number}", row) for number, row in enumerate(source))


def _rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    kind = path.suffix.lower()
    if kind not in _SUFFIXES:
        raise ValueError(
            f"load_records reads .jsonl, .json and .csv files. Received: {str(path)!r}"
        )
    if kind == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(
                file, strict=True
            )  # or a quote that is never closed swallows the rest
            try:
                for row in reader:
                    if any(row.get(None, ())):
                        row = ValueError(
                            "more fields than the header names. A text with a comma stands in quotes."
                        )
                    yield f"{path}, line {reader.line_num}", row
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(
                    f"{path} is not CSV in UTF-8, near line {reader.line_num}: {error}."
                ) from None
    elif kind == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not JSON: {error}. One object a line? Then call it .jsonl."
            ) from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a list of objects. Received: {type(rows).__name__}")
        yield from ((f"{path}, object {number}", row) for number, row in enumerate(rows, start=1))
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
                except (UnicodeDecodeError, json.JSONDecodeError) as error:
                    row = ValueError(f"not a line of JSON: {error}.")
                if line.strip():
                    yield f"{path}, line {number}", row


def checked_record(row, columns: Mapping[str, str]) -> dict[str, str]:
    """Check one row and bring it into Dolly's four columns."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a record is an object with named fields. Received: {type(row).__name__}."
        )
    turns = next(
        (row[name] for name in ("messages", "conversations") if row.get(name) is not None), None
    )
    if turns is not None and "instruction" not in columns:
        row = {**row, **_from_turns(turns)}
    record = {}
    for column in COLUMNS:
        names = (columns[column],) if column in columns else _OTHER_NAMES[column]
        name = next((name for name in names if name in row), None)
        if name is None and (column in ("instruction", "response") or column in columns):
            raise ValueError(f"no {names[0]!r} among the fields {sorted(map(str, row))}.")
        value = row[name] if name is not None and row[name] is not None else ""
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is text. Received: {type(value).__name__}, {value!r:.60}.")
        if not value.strip() and column in ("instruction", "response"):
            raise ValueError(f"{name!r} is empty.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"{name!r} holds half a character (a lone surrogate), which is not text."
            ) from None
        record[column] = value
    return record


def _from_turns(turns) -> dict[str, str]:
    """Turn a chat of one question and one answer into a record; longer chats do not fit Dolly's columns."""
    role_of = {"human": "user", "gpt": "assistant", "model": "assistant"}
    try:
        pairs = [
            (str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value")))
            for turn in turns
        ]
    except (AttributeError, TypeError):
        raise ValueError("each of a chat's messages is an object with role and content.") from None
    said = {role_of.get(role, role): text for role, text in pairs}
    if [role_of.get(role, role) for role, _ in pairs if role != "system"] != ["user", "assistant"]:
        raise ValueError(
            f"a chat has one user and one assistant turn. Received: {[role for role, _ in pairs]}."
        )
    return {
        "instruction": said["user"],
        "context": said.get("system"),
        "response": said["assistant"],
    }
