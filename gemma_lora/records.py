"""Load instruction records: Dolly, the small world, or your own file.

A record is a dict of four texts: instruction, context, response and category. These are
Dolly's columns, and every loader here returns a `datasets.Dataset` of exactly these.
How a file is read is in `access.files`; how a record becomes a prompt is in
`templates`; how it becomes token ids is in `tokens`.
"""

import json
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import datasets

from gemma_lora.access.files import has_rows, rows_of_file
from gemma_lora.options import is_number, one_of, whole_number, with_options
from gemma_lora.runtime import checked_seed
from gemma_lora.tiny.questions import load_tiny_world

if TYPE_CHECKING:
    # Keras is not needed to read records.
    from keras_hub.models import CausalLM

# What holds records, or names a file or a data set that does.
Records: TypeAlias = str | Path | Iterable[Any]

# A text, a record or a chat to answer; or many of these.
Prompts: TypeAlias = str | Mapping[str, Any] | Iterable[Any]

COLUMNS = ("instruction", "context", "response", "category")
DOLLY = "databricks/databricks-dolly-15k"

# The small world is what this model knows. (`models.TINY` is the same name; that module
# stands below this one, so it cannot be imported here.)
_SMALL_MODEL = "tiny_gemma_en"

# These may not be empty; the other two columns may.
_REQUIRED = ("instruction", "response")

# What other data sets call the same columns: Alpaca's names, question and answer,
# prompt and completion. The first name that a row has is taken. Case, blanks and
# underscores do not matter.
_OTHER_NAMES = {
    "instruction": (
        "instruction", "instructions", "prompt", "prompts", "question", "questions", "query",
        "inputs", "user", "human",
    ),
    "context": ("context", "input"),
    "response": (
        "response", "responses", "output", "outputs", "completion", "answer", "answers",
        "target", "targets", "assistant",
    ),
    "category": ("category",),
}  # fmt: skip
# How to behave: it becomes a part of the context, as the system turn of a chat does.
_SYSTEM = (
    "system", "systemprompt", "systemmessage", "systeminstruction", "systeminstructions", "sys",
)  # fmt: skip
# Earlier turns of the same talk, for which a record has no place.
_EARLIER_TURNS = ("history", "chathistory", "conversationhistory", "previousmessages")
_CHATS = ("messages", "conversations", "conversation")
# What the other side of a prompt is called, where each may be a part of a chat.
_ANSWERS = ("completion", "response", "answer")

# Who speaks in a chat, and what other formats call the same two.
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "ai": "assistant", "developer": "system",
}  # fmt: skip

_WAYS_OUT = (
    "Ways out: check the network and run this again (what was downloaded before needs no "
    "network); or download the JSON Lines file elsewhere and pass its path to "
    "gl.load_records(); or use gl.load_tiny_world(), which needs no network."
)


@with_options
def load_data(
    model: "CausalLM | str | Path",
    *,
    rows: int | None = 1000,
    held_out: int = 100,
    context: Literal["drop", "keep", "only"] = "drop",
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
    one_of("context", context, ("drop", "keep", "only"))
    rows, held_out = _check_numbers(rows, held_out)
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


@with_options
def load_dolly(
    *,
    rows: int | None = 1000,
    context: Literal["drop", "keep", "only"] = "drop",
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
    one_of("context", context, ("drop", "keep", "only"))
    rows, held_out = _check_numbers(rows, held_out)
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
        dolly = dolly.shuffle(seed=checked_seed(seed))
    count = dolly.num_rows - held_out if rows is None else rows
    if count < 1 or held_out < 0 or count + held_out > dolly.num_rows:
        raise ValueError(
            f"With context={context!r}, Dolly has {dolly.num_rows:,} rows. "
            f"Received: rows={rows}, held_out={held_out}"
        )
    # `select` refuses an empty range that begins at the end of the data, but takes an
    # empty list.
    return dolly.select(range(count)), dolly.select(list(range(count, count + held_out)))


@overload
def load_records(
    source: Records,
    *,
    columns: Mapping[str, str] | None = None,
    held_out: None = None,
    seed: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    split: str = "train",
) -> datasets.Dataset: ...


@overload
def load_records(
    source: Records,
    *,
    held_out: float,
    columns: Mapping[str, str] | None = None,
    seed: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    split: str = "train",
) -> tuple[datasets.Dataset, datasets.Dataset]: ...


@with_options
def load_records(
    source: Records,
    *,
    columns: Mapping[str, str] | None = None,
    held_out: float | None = None,
    seed: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    split: str = "train",
) -> datasets.Dataset | tuple[datasets.Dataset, datasets.Dataset]:
    """Load and check records of your own, in Dolly's four columns.

    A missing context or category becomes an empty text.

    >>> rows = [{"question": f"Is {n} odd?", "answer": "Look."} for n in range(10)]
    >>> load_records(rows)[2]
    {'instruction': 'Is 2 odd?', 'context': '', 'response': 'Look.', 'category': ''}
    >>> train, held_out = load_records(rows, held_out=0.2, seed=0)
    >>> len(train), len(held_out)
    (8, 2)

    Args:
        source: A path to a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.xlsx`
            file, also gzipped; a frame of pandas or polars; a list of dicts; a dict of
            lists; a `datasets.Dataset`; or the name of a data set on the Hugging Face
            Hub, "owner/name".
        columns: What the source calls each column, as {"instruction": "frage", ...}.
            Columns left out are found by their usual names, in any case: Dolly's,
            Alpaca's, prompt and completion, question and answer, or `messages` of one
            user turn and one assistant turn. A system prompt becomes the beginning of
            the context. Columns that are not used are named once, in a warning.
        held_out: Hold some records out, drawn by the seed: how many, or below 1 which
            share of them. Records with the same question, in any case, stay together,
            so that no held-out question is tuned on. None holds out none.
        seed: Draws the held-out records. None means the seed of `gl.setup`.
        on_error: "raise" at the first malformed row, or "skip" malformed rows, with a
            warning that counts them.
        split: Which split of a data set on the Hub.

    Returns:
        The records; with `held_out`, a pair: those to train on, and those held out.

    Raises:
        ValueError: A row is malformed (not JSON, a missing field, not text, nothing to
            answer), and the message says which file and line. Or no row is left. Or
            so many cannot be held out.
        FileNotFoundError: The file does not exist.
        ConnectionError: The Hub cannot be reached and nothing is cached.
        TypeError: `source` is something else.
    """
    one_of("on_error", on_error, ("raise", "skip"))
    columns = _checked_columns(columns)
    unused: dict[str, None] = {}
    good, bad = _checked_rows(source, split, columns, unused, raise_at_once=on_error == "raise")
    if not good:
        name = source if isinstance(source, str | Path) else f"the {type(source).__name__}"
        raise ValueError(f"No usable record in {name}. {bad[0] if bad else 'It is empty.'}")
    warn_of_unused(unused)
    if bad:
        first_three = "\n  ".join(bad[:3])
        warnings.warn(
            f"Skipped {len(bad):,} of {len(bad) + len(good):,} rows:\n  {first_three}", stacklevel=3
        )
    seed = checked_seed(seed)
    if held_out is None:
        return datasets.Dataset.from_list(good)
    parts = _split(good, held_out, seed)
    return tuple(datasets.Dataset.from_list(part) for part in parts)


def _checked_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return `columns` of `load_records`. Raises ValueError if it maps other names."""
    if columns is None:
        return {}
    is_map = isinstance(columns, Mapping) and all(isinstance(v, str) for v in columns.values())
    if is_map and set(columns) - set(COLUMNS) and set(columns.values()) <= set(COLUMNS):
        right = {ours: theirs for theirs, ours in columns.items()}
        raise ValueError(f"columns is the wrong way round: columns={right} maps ours to theirs.")
    if not is_map or set(columns) - set(COLUMNS):
        received = sorted(columns, key=str) if isinstance(columns, Mapping) else columns
        raise ValueError(
            f"columns maps {', '.join(COLUMNS)} to the source's names, as "
            f"{{'instruction': 'frage'}}. Received: {received!r:.80}"
        )
    return columns


def question_of(record: Mapping[str, str]) -> str:
    """Return a record's question and context without case, blanks and the last sign.

    >>> question_of({"instruction": "Why ?", "context": ""})
    'why'
    """
    words = f"{record['instruction']} {record['context']}".lower().split()
    return " ".join(words).rstrip(" ?.!")


def _split(records: list[dict[str, str]], held_out: float, seed: int) -> tuple[list, list]:
    """Split records into (train, held out), with equal questions on the same side.

    Raises ValueError if nothing would be left on a side.
    """
    if not is_number(held_out) or not held_out > 0:
        raise ValueError(
            "held_out is how many records to hold out, or which share of them, such as 0.1. "
            f"Received: held_out={held_out!r:.80}"
        )
    wanted = round(len(records) * held_out) if held_out < 1 else whole_number("held_out", held_out)
    # By question, the places of its records.
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(question_of(record), []).append(place)
    questions = [*groups.values()]
    random.Random(seed).shuffle(questions)
    chosen: set[int] = set()
    for places in questions:
        if len(chosen) + len(places) <= wanted:
            chosen.update(places)
    if not chosen or len(chosen) == len(records):
        raise ValueError(
            f"held_out={held_out} of {len(records):,} records with {len(groups):,} different "
            "questions leaves nothing on one side. Choose another number."
        )
    train = [record for place, record in enumerate(records) if place not in chosen]
    return train, [records[place] for place in sorted(chosen)]


def _preset_of(model) -> str:
    """The name or folder of a model's preset. A preset is its own."""
    if isinstance(model, str | Path):
        return str(model)
    # The attribute is `models.State`, which `gl.load` attaches. A Keras model that was
    # made otherwise has only its name.
    state = getattr(model, "gemma_lora", None)
    is_model = hasattr(model, "backbone")
    preset = getattr(model, "name", None) if state is None and is_model else state and state.preset
    if not isinstance(preset, str):
        raise TypeError(
            "load_data takes a model, or the name or folder of a preset. "
            f"Received: {type(model).__name__}"
        )
    return preset


def _check_numbers(rows: int | None, held_out: int) -> tuple[int | None, int]:
    """Return `rows` and `held_out` of Dolly as Python's numbers. Raises ValueError."""
    if isinstance(held_out, float) and 0 < held_out < 1:
        raise ValueError(
            f"Of Dolly, held_out is a number of rows. Received: held_out={held_out}. A share is "
            "for gl.load_records(..., held_out=0.1)."
        )
    held_out = whole_number("held_out", held_out, least=0)
    return None if rows is None else whole_number("rows", rows), held_out


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


# Reading a source, row by row. A reader yields (place, row): "rows.csv, line 3" and
# whatever stands there. A row that cannot even be read is yielded as the ValueError
# that says why, so that `load_records` can skip it and read on.


def as_records(source) -> Iterable:
    """Return rows to train on or to measure, whatever they are in.

    >>> as_records({"question": ["Why?"], "answer": ["So."]})
    [{'question': 'Why?', 'answer': 'So.'}]

    Args:
        source: Anything with rows; or what only `load_records` reads: a path, or the
            name of a data set on the Hub.

    Raises:
        TypeError: It is nothing with rows.
    """
    return load_records(source) if isinstance(source, str | Path) else _listed(source)


def as_prompts(prompts) -> tuple[bool, list]:
    """Return whether this is a single prompt, and a list of prompts.

    >>> as_prompts("Why?")
    (True, ['Why?'])
    >>> as_prompts([{"role": "user", "content": "Why?"}])
    (True, [{'instruction': 'Why?', 'context': ''}])

    Args:
        prompts: A text; a record, under any of its usual names; a chat of one question,
            as a list of messages; or many of these, also as a frame or a data set.

    Raises:
        ValueError: A prompt is empty or not text, or is a chat of several questions.
        TypeError: It is nothing of the kind.
    """
    if isinstance(prompts, str | Path) and has_rows(prompts) and Path(prompts).is_file():
        return False, [_as_prompt(row) for _, row in rows_of_file(Path(prompts))]
    if _is_row(prompts):
        prompts = prompts.to_dict()
    is_columns = isinstance(prompts, Mapping) and all(
        isinstance(value, list) and _plain(name) not in _CHATS for name, value in prompts.items()
    )
    if isinstance(prompts, str) or (isinstance(prompts, Mapping) and not is_columns):
        return True, [_as_prompt(prompts)]
    if not isinstance(prompts, Iterable) and not _is_frame(prompts):
        raise TypeError(
            "A prompt is a text, a record with an instruction, a chat, or a list of these. "
            f"Received: {type(prompts).__name__}"
        )
    rows = [*_listed(prompts)]
    if rows and all(isinstance(row, Mapping) and "role" in row for row in rows):
        return True, [_as_prompt({"messages": rows})]
    return False, [_as_prompt(row) for row in rows]


def _as_prompt(prompt) -> str | dict[str, str]:
    """Return a text as it is, else instruction and context, and a response if any."""
    if isinstance(prompt, list):
        prompt = {"messages": prompt}
    if not isinstance(prompt, Mapping):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"A prompt is text, or a record with an instruction. Received: {prompt!r:.80}"
            )
        return prompt
    responses = []
    row = {}
    for name, value in prompt.items():
        if _plain(name) in _OTHER_NAMES["response"]:
            responses += [value] if isinstance(value, str) and value.strip() else []
        else:
            row[name] = value
    for chat in [name for name in row if _plain(name) in _CHATS and _is_filled(row[name])]:
        row = _filled_in(row, _question_of(row.pop(chat)))
    names = [name for name in row if _plain(name) in _OTHER_NAMES["instruction"]]
    if not names:
        raise ValueError(
            "A prompt is a text, or a record with an instruction or a question. "
            f"Received the fields {sorted(map(str, prompt))}"
        )
    # A prompt needs no response, and a record does.
    record = checked_record({**row, "response": "."}, {})
    warn_of_unused(unused_columns({**row, "response": "."}))
    question = {name: record[name] for name in ("instruction", "context")}
    # `compare` shows a response beside the answers.
    return question | ({"response": responses[0]} if responses else {})


def _question_of(turns) -> dict[str, str | None]:
    """Turn a chat that ends in its one question into a prompt."""
    roles, texts = turns_of(turns)
    if [role for role in roles if role != "system"] != ["user"]:
        raise ValueError(
            f"A chat to answer has one user turn, and perhaps a system turn. Received: {roles}."
        )
    return {"instruction": texts[roles.index("user")], "context": _system_of(roles, texts)}


class WrongColumnsError(ValueError):
    """The source has no such columns: leaving rows out would leave none."""


def _checked_rows(
    source, split: str, columns: Mapping[str, str], unused: dict[str, None], *, raise_at_once: bool
) -> tuple[list[dict[str, str]], list[str]]:
    """Read a whole source: (its records, a sentence for each malformed row).

    The names of columns that no record uses are put into `unused`.
    """
    good = []
    bad = []
    for place, row in _rows(source, split):
        try:
            good.append(checked_record(row, columns))
        except ValueError as error:
            if raise_at_once:
                helps = good or not isinstance(error, WrongColumnsError)
                way_out = ' To leave such rows out, pass on_error="skip".' if helps else ""
                raise ValueError(f"{place}: {error}{way_out}") from None
            bad.append(f"{place}: {error}")
        else:
            unused |= dict.fromkeys(unused_columns(row, columns))
    return good, bad


def _rows(source, split: str) -> Iterator[tuple[str, object]]:
    if isinstance(source, str | Path):
        place = Path(source).expanduser()
        if place.is_file():
            yield from rows_of_file(place)
            return
        if place.is_dir():
            raise ValueError(f"{source} is a folder. Pass the file in it that has the records.")
        if not _names_a_data_set(source):
            raise FileNotFoundError(f"There is no file {str(source)!r} in {Path.cwd()}.")
        source = _from_hub(source, split)
    for number, row in enumerate(_listed(source)):
        yield f"row {number}", row


def _is_row(data) -> bool:
    """Return whether this is one row of a pandas frame: a series with named values."""
    if not (hasattr(data, "to_dict") and hasattr(data, "index")) or _is_frame(data):
        return False
    return len(data) > 0 and all(isinstance(name, str) for name in data.index)


def _is_frame(data) -> bool:
    """Return whether this is a frame of pandas or polars, without importing either."""
    return hasattr(data, "columns") and (hasattr(data, "to_dicts") or hasattr(data, "notna"))


def _listed(source) -> Iterable:
    """Return the rows of a frame, of columns, or of anything that has rows.

    Raises TypeError if it has none.
    """
    if _is_frame(source):
        if hasattr(source, "to_dicts"):
            return source.to_dicts()
        return source.astype(object).where(source.notna(), None).to_dict("records")
    if hasattr(source, "to_pylist"):
        # A table of Arrow's.
        return source.to_pylist()
    if hasattr(source, "collect") and hasattr(source, "lazy"):
        return source.collect().to_dicts()
    is_split = isinstance(source, Mapping) and "train" in source
    if is_split or isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = ", ".join(source)
        raise TypeError(
            f"This is a {type(source).__name__} with the splits {splits}. Pass one of them, "
            f"such as data[{next(iter(source), 'train')!r}]."
        )
    if isinstance(source, Mapping):
        columns = [*source.values()]
        if columns and all(isinstance(column, list | tuple) for column in columns):
            if len({len(column) for column in columns}) > 1:
                lengths = {name: len(column) for name, column in source.items()}
                raise TypeError(f"The columns differ in length: {lengths}.")
            return [dict(zip(source, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(source, Mapping):
        raise TypeError(
            "Records stand in a list, also if there is only one: [record]. "
            f"Received: {type(source).__name__}"
        )
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise TypeError(
            "load_records reads a path, a frame, a list of dicts, a datasets.Dataset or the name "
            f"of a data set on the Hub. Received: {type(source).__name__}"
        )
    return source


def _names_a_data_set(source: str | Path) -> bool:
    """Say whether a text is like "owner/name", and not the path of a missing file."""
    if isinstance(source, Path) or has_rows(source):
        return False
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None


# Checking one row.


def checked_record(row, columns: Mapping[str, str]) -> dict[str, str]:
    """Check one row and bring it into Dolly's four columns.

    >>> checked_record({"Question": "Why?", "answer": ""}, {})
    Traceback (most recent call last):
    ...
    ValueError: 'answer' is empty.

    Args:
        row: A dict, or the ValueError that says why the row could not be read.
        columns: As in `load_records`.

    Raises:
        ValueError: The row is not a valid record. The message does not say which row.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise WrongColumnsError(
            "a record has named fields, such as {'instruction': 'Why?', 'response': 'So.'}. "
            f"Received: {type(row).__name__}, {row!r:.60}."
        )
    if "instruction" not in columns:
        row = _without_turns(row)
    names = _names(row, columns)
    earlier = names.pop("history")
    system = names.pop("system")
    # A column that the caller has given another meaning has that one.
    given = {*columns.values()}
    system = None if system in given else system
    if earlier not in given and earlier is not None and _is_filled(row[earlier]):
        raise ValueError(f"{earlier!r} has earlier turns, and a record is one question.")
    record = {
        column: "" if name is None else _checked_text(row, name, needed=column in _REQUIRED)
        for column, name in names.items()
    }
    if system is not None:
        parts = [_checked_text(row, system, needed=False), record["context"]]
        record["context"] = "\n\n".join(part for part in parts if part.strip())
    return record


def _plain(name) -> str:
    """Return a column's name without case, blanks and underscores."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _names(row: Mapping, columns: Mapping[str, str]) -> dict[str, str | None]:
    """Find what a row calls each column, and "system" and "history"; or None."""
    by_plain_name: dict[str, str] = {}
    for name in row:
        twin = by_plain_name.setdefault(_plain(name), name)
        is_usual = _plain(name) in _OTHER_NAMES["instruction"] + _OTHER_NAMES["response"]
        if twin != name and is_usual and not {twin, name} & {*columns.values()}:
            raise WrongColumnsError(f"two columns could be meant, {twin!r} and {name!r}.")
    found: dict[str, str | None] = {}
    for column in COLUMNS:
        given = columns.get(column)
        if given is not None and given not in row:
            given = by_plain_name.get(_plain(given), given)
        usual = [by_plain_name[name] for name in _OTHER_NAMES[column] if name in by_plain_name]
        found[column] = given if given is not None else next(iter(usual), None)
        is_missing = column in _REQUIRED and found[column] is None
        if is_missing or (given is not None and given not in row):
            raise WrongColumnsError(
                f"no {given or column!r} among the fields {sorted(map(str, row))}."
                f"{_which_columns(row, given)}"
            )
    for column, usual_names in (("system", _SYSTEM), ("history", _EARLIER_TURNS)):
        usual = [by_plain_name[name] for name in usual_names if name in by_plain_name]
        found[column] = next(iter(usual), None)
    return found


def _which_columns(row: Mapping, given: str | None) -> str:
    """Say how to name the columns, if the row has two that could be meant."""
    if {"role", "content"} <= {*row} or {"from", "value"} <= {*row}:
        return " This is one message. A record holds a whole chat: {'messages': [...]}."
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if given is not None or len(texts) < 2:
        return ""
    names = dict(zip(_REQUIRED, texts, strict=False))
    return f" Say which they are, for example gl.load_records(..., columns={names})."


def warn_of_unused(names: Iterable[str]) -> None:
    """Warn, once for a call, of columns that records or prompts do not use."""
    if names := [*names]:
        said = ", ".join(map(repr, names))
        warnings.warn(f"These columns are not used: {said}", stacklevel=4)


# What pandas calls the column with the numbers of the rows.
_NUMBERS = ("", "unnamed0")


def unused_columns(row: Mapping, columns: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of a good row's fields that its record does not use."""
    if {*row} <= {*COLUMNS}:
        # As `load_records` returns them.
        return []
    columns = columns or {}
    whole = _without_turns(row) if "instruction" not in columns else row
    used = {_plain(name) for name in _names(whole, columns).values() if name is not None}
    if whole is not row:
        # A question or an answer beside the chat is not used.
        used = {*_CHATS, "prompt", *_ANSWERS, *_OTHER_NAMES["context"], "category", *_SYSTEM}
        used -= {"response", "answer"} if any(_plain(n) in _CHATS for n in row) else set()
    filled = [name for name, value in row.items() if _is_filled(value)]
    used |= {*_NUMBERS}
    return [str(name) for name in filled if name is not None and _plain(name) not in used]


def _checked_text(row: Mapping, name: str, *, needed: bool) -> str:
    """Return the text of a field. None is an empty one."""
    text = "" if row[name] is None else row[name]
    if not isinstance(text, str):
        raise ValueError(f"{name!r} must be text. Received: {type(text).__name__}, {text!r:.60}.")
    if "\0" in text:
        raise ValueError(
            f"{name!r} holds NUL characters, which are no text. Is the file in UTF-16? Save it as "
            "UTF-8."
        )
    if not text.strip() and needed:
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
    """Replace a chat by the columns that it fills, wherever a row has one.

    A context beside the chat stays, below what its system turns say.
    """
    for name in row:
        if _plain(name) in _CHATS and _is_filled(row[name]):
            return _filled_in(row, _from_turns(row[name]))
    by_plain_name = {_plain(name): name for name in row}
    if not {*by_plain_name} & {*_OTHER_NAMES["instruction"]}:
        # Then an empty chat is what is wrong.
        for name in row:
            if _plain(name) in _CHATS and row[name] is not None:
                _from_turns(row[name])
    prompt = by_plain_name.get("prompt")
    answer = next((by_plain_name[n] for n in _ANSWERS if n in by_plain_name), None)
    if prompt is None or answer is None:
        return row
    turns = [_as_turns(row[name], role) for name, role in ((prompt, "user"), (answer, "assistant"))]
    if all(
        isinstance(row[name], str) and said[0]["content"] == row[name]
        for name, said in zip((prompt, answer), turns, strict=True)
        if said
    ):
        # Two texts are no chat.
        return row
    rest = {name: value for name, value in row.items() if name not in (prompt, answer)}
    return _filled_in(rest, _from_turns([turn for said in turns for turn in said]))


def _as_turns(said, role: str) -> list:
    """Return one side of a chat as messages: a list, the same as JSON, or a text."""
    if isinstance(said, str):
        if re.match(r"\s*\[\s*\{", said):
            try:
                return json.loads(said)
            except json.JSONDecodeError:
                pass
        return [{"role": role, "content": said}]
    is_many = isinstance(said, Iterable) and not isinstance(said, Mapping)
    return [*said] if is_many else []


def _filled_in(row: Mapping, filled: dict[str, str | None]) -> dict:
    """Return a row with what a chat fills. Its own context stays, below the chat's."""
    own = [row[n] for n in row if _plain(n) in _OTHER_NAMES["context"] and _is_filled(row[n])]
    parts = [part for part in (filled["context"], *own) if isinstance(part, str) and part]
    # Under any name, what the chat says goes before what stands beside it.
    replaced = {name for column in filled for name in _OTHER_NAMES[column]}
    rest = {name: value for name, value in row.items() if _plain(name) not in replaced}
    return rest | filled | {"context": "\n\n".join(parts) or None}


def _is_filled(value) -> bool:
    """Return whether a field holds anything. An array's own truth is not defined."""
    return value is not None and str(value).strip() not in ("", "[]", "nan")


def _from_turns(turns) -> dict[str, str | None]:
    """Turn a chat of one question and one answer into a record.

    Longer chats do not fit Dolly's columns: they raise ValueError.
    """
    roles, texts = turns_of(turns)
    if [role for role in roles if role != "system"] != ["user", "assistant"]:
        raise ValueError(f"a chat must have one user and one assistant turn. Received: {roles}.")
    text_of = dict(zip(roles, texts, strict=True))
    return {
        "instruction": text_of["user"],
        "context": _system_of(roles, texts),
        "response": text_of["assistant"],
    }


def turns_of(turns) -> tuple[list[str], list[str | None]]:
    """Take a chat apart: who speaks, and what is said.

    >>> turns_of([{"from": "human", "value": "Why?"}])
    (['user'], ['Why?'])

    Args:
        turns: Messages with role and content, or from and value; or the same as JSON.
            Content is text, or a list of parts of type "text".

    Raises:
        ValueError: It is something else.
    """
    try:
        turns = json.loads(turns) if isinstance(turns, str) else turns
        said = [(str(turn.get("role", turn.get("from"))), _content(turn)) for turn in turns]
    except (AttributeError, TypeError, json.JSONDecodeError):
        raise ValueError(
            "each of a chat's messages must be an object with role and content."
        ) from None
    roles = [_ROLES.get(role.lower(), role.lower()) for role, _ in said]
    return roles, [_said(content) for _, content in said]


def _content(turn: Mapping):
    """Return what a message says, under any of its usual names."""
    names = ("content", "value", "text", "parts")
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _said(content) -> str | None:
    """Return the text of a message, whose content may be a list of parts."""
    if content is None or isinstance(content, str) or not isinstance(content, Iterable):
        return content
    texts = []
    for part in [content] if isinstance(content, Mapping) else content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text", "str"):
            raise ValueError(f"of a message's parts only text can be used. Received: {kind}.")
        texts.append(text)
    return "\n\n".join(texts)


def _system_of(roles: list[str], texts: list) -> str | None:
    """Return what the system turns of a chat say, one below the other."""
    said = [text for role, text in zip(roles, texts, strict=True) if role == "system"]
    return "\n\n".join(text for text in said if text) or None
