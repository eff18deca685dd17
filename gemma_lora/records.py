"""Load instruction records: Dolly, the small world, or your own file.

A record is a dict of four texts: instruction, context, response and category. These are
Dolly's columns, and every loader here returns a `datasets.Dataset` of exactly these.
How a record becomes a prompt is in `templates`; how it becomes token ids is in
`tokens`.
"""

import csv
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import datasets

from gemma_lora.tiny.questions import load_tiny_world

COLUMNS = ("instruction", "context", "response", "category")
DOLLY = "databricks/databricks-dolly-15k"

# The small world is what this model knows. (`models.TINY` is the same name; that module
# stands below this one, so it cannot be imported here.)
_SMALL_MODEL = "tiny_gemma_en"

# These may not be empty; the other two columns may.
_REQUIRED = ("instruction", "response")

# What other data sets call the same columns: Alpaca's names, question and answer,
# prompt and completion. The first name that a row has is taken.
_OTHER_NAMES = {
    "instruction": ("instruction", "prompt", "prompts", "question", "query"),
    "context": ("context", "input"),
    "response": ("response", "responses", "output", "completion", "answer"),
    "category": ("category",),
}

# Who speaks in a chat, and what other formats call the same two.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")

_WAYS_OUT = (
    "Ways out: check the network and run this again (what was downloaded before needs no "
    "network); or download the JSON Lines file elsewhere and pass its path to "
    "gl.load_records(); or use gl.load_tiny_world(), which needs no network."
)


def load_data(
    model,
    *,
    rows: int | None = 1000,
    held_out: int = 100,
    context: str = "drop",
    seed: int | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load the records that suit a model: (train, held_out).

    For `tiny_gemma_en` these are the records of the small world, all of them, because
    the model knows nothing else: the other arguments then change nothing. For any other
    model they are Dolly's. If the Hub cannot be reached and no copy of Dolly is cached,
    this function says so and takes records of the small world instead, at most as many
    as you asked for.

    >>> train, held_out = load_data("tiny_gemma_en", rows=1000, held_out=100)
    >>> train.num_rows, held_out.num_rows
    (1286, 420)

    Args:
        model: A model from `gl.load`, or a preset's name or folder.
        rows, held_out, context, seed: As in `load_dolly`.

    Raises:
        TypeError: `model` is neither a model nor a preset.
        ValueError: `context` is unknown, or Dolly has fewer rows than you asked for.
    """
    _check_context(context)
    if Path(_preset_of(model)).name == _SMALL_MODEL:
        return load_tiny_world()
    return load_dolly(rows=rows, held_out=held_out, context=context, seed=seed, or_tiny_world=True)


def _dolly() -> datasets.Dataset:
    """Return all rows of Dolly, from the Hub or from the file named in its place."""
    file = os.environ.get("GEMMA_LORA_DATA")
    if not file:
        return _from_hub(DOLLY, split="train")
    print(f"Rows are read from {file} (GEMMA_LORA_DATA), not from the Hub.")
    return load_records(file)


def load_dolly(
    *,
    rows: int | None = 1000,
    context: str = "drop",
    held_out: int = 0,
    seed: int | None = None,
    or_tiny_world: bool = False,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load Databricks Dolly 15k from the Hugging Face Hub: (train, held_out).

    The defaults are the published recipe's: drop the rows that have a context, then
    take the first 1,000. Without network, name a file of such rows in the environment
    variable GEMMA_LORA_DATA: whatever `load_records` reads.

    Args:
        rows: Rows to train on. None takes all but the held-out ones.
        context: "drop" the rows that have a context, "keep" all rows, or take "only"
            those that have one.
        held_out: Rows to hold out. They follow the first `rows`, so no row is in both.
        seed: Shuffle first, by this seed. None keeps the file's order, as the recipe
            does.
        or_tiny_world: If the Hub cannot be reached and nothing is cached, say so and
            take records of the small world instead: at most `rows` and `held_out`
            of them.

    Raises:
        ConnectionError: The Hub cannot be reached and nothing is cached.
        ValueError: `context` is unknown, or Dolly has fewer rows than you asked for.
    """
    _check_context(context)
    try:
        dolly = _dolly()
    except ConnectionError as error:
        if not or_tiny_world:
            raise
        first_line = str(error).splitlines()[0]
        print(f"{first_line}\nThese are records of the small world instead.")
        return _part_of_small_world(rows, held_out)
    if context != "keep":
        dolly = dolly.filter(
            lambda text: bool(text.strip()) == (context == "only"), input_columns="context"
        )
    if seed is not None:
        dolly = dolly.shuffle(seed=seed)
    count = dolly.num_rows - held_out if rows is None else rows
    if count < 1 or held_out < 0 or count + held_out > dolly.num_rows:
        raise ValueError(
            f"With context={context!r}, Dolly has {dolly.num_rows:,} rows. "
            f"Received: rows={rows}, held_out={held_out}"
        )
    # `select` refuses an empty range that begins at the end of the data, but takes an
    # empty list.
    return dolly.select(range(count)), dolly.select(list(range(count, count + held_out)))


def load_records(
    source: str | Path | Iterable,
    *,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    split: str = "train",
) -> datasets.Dataset:
    """Load and check records of your own, in Dolly's four columns.

    A missing context or category becomes an empty text.

    >>> load_records([{"question": "What is 2 + 2?", "answer": "4"}])[0]
    {'instruction': 'What is 2 + 2?', 'context': '', 'response': '4', 'category': ''}

    Args:
        source: A path to a `.jsonl`, `.json` or `.csv` file; a pandas DataFrame; a list
            of dicts; a `datasets.Dataset`; or the name of a data set on the Hugging
            Face Hub, "owner/name".
        columns: What the source calls each column, as {"instruction": "frage", ...}.
            Columns left out are found by their usual names: Dolly's, Alpaca's, prompt
            and completion, question and answer, or `messages` of one user turn and one
            assistant turn (a system turn becomes the context).
        on_error: "raise" at the first malformed row, or "skip" malformed rows, with a
            warning that counts them.
        split: Which split of a data set on the Hub.

    Raises:
        ValueError: A row is malformed (not JSON, a missing field, not text, nothing to
            answer), and the message says which file and line. Or no row is left.
        FileNotFoundError: The file does not exist.
        ConnectionError: The Hub cannot be reached and nothing is cached.
        TypeError: `source` is something else.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error is "raise" or "skip". Received: {on_error!r}')
    columns = columns or {}
    if unknown := set(columns) - set(COLUMNS):
        raise ValueError(
            f"columns maps {', '.join(COLUMNS)} to the source's names. Received: {sorted(unknown)}"
        )
    good, bad = _checked_rows(source, split, columns, raise_at_once=on_error == "raise")
    if not good:
        name = source if isinstance(source, str | Path) else f"the {type(source).__name__}"
        raise ValueError(f"No usable record in {name}. {bad[0] if bad else 'It is empty.'}")
    if bad:
        first_three = "\n  ".join(bad[:3])
        warnings.warn(
            f"Skipped {len(bad):,} of {len(bad) + len(good):,} rows:\n  {first_three}", stacklevel=2
        )
    return datasets.Dataset.from_list(good)


def _preset_of(model) -> str:
    """The name or folder of a model's preset. A preset is its own."""
    if isinstance(model, str | Path):
        return str(model)
    # The attribute is `models.State`, which `gl.load` attaches. A Keras model that was
    # made otherwise has only its name.
    state = getattr(model, "gemma_lora", None)
    preset = getattr(model, "name", None) if state is None else state.preset
    if not isinstance(preset, str):
        raise TypeError(
            "load_data takes a model, or the name or folder of a preset. "
            f"Received: {type(model).__name__}"
        )
    return preset


def _check_context(context: str) -> None:
    if context not in ("drop", "keep", "only"):
        raise ValueError(f'context is "drop", "keep" or "only". Received: {context!r}')


def _part_of_small_world(
    rows: int | None, held_out: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    train, others = load_tiny_world()
    train_size = train.num_rows if rows is None else min(rows, train.num_rows)
    held_out_size = min(held_out, others.num_rows)
    return train.select(range(train_size)), others.select(list(range(held_out_size)))


def _from_hub(name: str, split: str) -> datasets.Dataset:
    """Load a data set of the Hub, or of its cache. Raises ConnectionError."""
    try:
        return datasets.load_dataset(name, split=split)
    except (ValueError, RuntimeError):
        # There is no such split, or the data set is a script: not the network's fault.
        raise
    except Exception as error:
        # So broad because each HTTP client has errors of its own for a connection that
        # breaks off, and they are no OSError.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConnectionError(
            f"Could not load the data set {name!r} from the Hub: {reason}\n{_WAYS_OUT}"
        ) from error


# Reading a source, row by row. Each reader yields (place, row): "rows.csv, line 3" and
# whatever stands there. A row that cannot even be read is yielded as the ValueError
# that says why, so that `load_records` can skip it and read on.


def _checked_rows(
    source, split: str, columns: Mapping[str, str], *, raise_at_once: bool
) -> tuple[list[dict[str, str]], list[str]]:
    """Read a whole source: (its records, a sentence for each malformed row)."""
    good = []
    bad = []
    for place, row in _rows(source, split):
        try:
            good.append(checked_record(row, columns))
        except ValueError as error:
            if raise_at_once:
                raise ValueError(
                    f'{place}: {error} To leave such rows out, pass on_error="skip".'
                ) from None
            bad.append(f"{place}: {error}")
    return good, bad


def _rows(source, split: str) -> Iterator[tuple[str, object]]:
    if isinstance(source, str | Path):
        if Path(source).is_file():
            yield from _rows_of_file(Path(source))
            return
        if not _names_a_data_set(source):
            raise FileNotFoundError(f"There is no file {str(source)!r} in {Path.cwd()}.")
        source = _from_hub(source, split)
    # Like this a DataFrame is known without importing pandas.
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise TypeError(
            "load_records reads a path, a DataFrame, a list of dicts, a datasets.Dataset or "
            f"the name of a data set on the Hub. Received: {type(source).__name__}"
        )
    for number, row in enumerate(source):
        yield f"row {number}", row


def _names_a_data_set(source: str | Path) -> bool:
    """Say whether a text is like "owner/name", and not the path of a missing file."""
    if isinstance(source, Path) or Path(source).suffix.lower() in _SUFFIXES:
        return False
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None


def _rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    kind = path.suffix.lower()
    if kind == ".csv":
        yield from _rows_of_csv(path)
    elif kind == ".json":
        yield from _rows_of_json(path)
    elif kind in _SUFFIXES:
        yield from _rows_of_json_lines(path)
    else:
        raise ValueError(
            f"load_records reads .jsonl, .json and .csv files. Received: {str(path)!r}"
        )


# In all three, "utf-8-sig" is UTF-8 with or without a byte order mark, as Excel writes
# it.


def _rows_of_csv(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # `strict`, because otherwise a quote that is never closed swallows the rest.
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                # `DictReader` puts the fields that have no name under None.
                if any(row.get(None, ())):
                    row = ValueError(
                        "more fields than the header names. Put a text with a comma in quotes."
                    )
                yield f"{path}, line {reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path} is not CSV in UTF-8, near line {reader.line_num}: {error}."
            ) from None


def _rows_of_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}. If it has one object a line, call it .jsonl."
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects. Received: {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, object {number}", row


def _rows_of_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    # Read as bytes: only a line feed ends a line. As text, Python would also break
    # lines at characters that JSON allows within a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                row = ValueError(f"not a line of JSON: {error}.")
            yield f"{path}, line {number}", row


# Checking one row.


def checked_record(row, columns: Mapping[str, str]) -> dict[str, str]:
    """Check one row and bring it into Dolly's four columns.

    >>> checked_record({"question": "Why?", "answer": "So."}, {"category": "topic"})
    Traceback (most recent call last):
    ...
    ValueError: no 'topic' among the fields ['answer', 'question'].

    Args:
        row: A dict, or the ValueError that says why the row could not be read.
        columns: As in `load_records`.

    Raises:
        ValueError: The row is not a valid record. The message does not say which row.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(
            f"a record is an object with named fields. Received: {type(row).__name__}."
        )
    if "instruction" not in columns:
        row = _without_turns(row)
    return {column: _checked_text(row, column, columns.get(column)) for column in COLUMNS}


def _checked_text(row: Mapping, column: str, given_name: str | None) -> str:
    """Find a column's text under the name that was given, or one of its usual names."""
    names = _OTHER_NAMES[column] if given_name is None else (given_name,)
    present = [name for name in names if name in row]
    if not present:
        if column in _REQUIRED or given_name is not None:
            raise ValueError(f"no {names[0]!r} among the fields {sorted(map(str, row))}.")
        return ""
    name = present[0]
    text = "" if row[name] is None else row[name]
    if not isinstance(text, str):
        raise ValueError(f"{name!r} must be text. Received: {type(text).__name__}, {text!r:.60}.")
    if not text.strip() and column in _REQUIRED:
        raise ValueError(f"{name!r} is empty.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can write half of a pair of code units, as "\ud83d". No tokenizer takes
        # it.
        raise ValueError(
            f"{name!r} holds half a character (a lone surrogate), which is not text."
        ) from None
    return text


def _without_turns(row: Mapping) -> Mapping:
    """Replace a chat under "messages" or "conversations" by the columns that it
    fills."""
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return {**row, **_from_turns(row[name])}
    return row


def _from_turns(turns) -> dict[str, str | None]:
    """Turn a chat of one question and one answer into a record.

    Longer chats do not fit Dolly's columns: they raise ValueError.
    """
    try:
        said = [
            (str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value")))
            for turn in turns
        ]
    except (AttributeError, TypeError):
        raise ValueError(
            "each of a chat's messages must be an object with role and content."
        ) from None
    roles = [_ROLES.get(role, role) for role, _ in said]
    if [role for role in roles if role != "system"] != ["user", "assistant"]:
        raise ValueError(
            "a chat must have one user and one assistant turn. "
            f"Received: {[role for role, _ in said]}."
        )
    text_of = dict(zip(roles, [text for _, text in said], strict=True))
    return {
        "instruction": text_of["user"],
        "context": text_of.get("system"),
        "response": text_of["assistant"],
    }
