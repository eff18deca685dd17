"""Records of Dolly, of the small world, and of files as learners have them."""

import csv
import gzip
import itertools
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pytest
from hub_server import HANG_UP
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_lora import models
from gemma_lora import records as records_module
from gemma_lora.records import COLUMNS, DOLLY, as_prompts, load_data, load_dolly, load_records
from gemma_lora.tiny import world
from gemma_lora.tiny.questions import held_out_subjects, load_tiny_world


def dolly_row(number: int, context: str) -> dict:
    return {
        "instruction": f"What is thing {number}?",
        "context": context,
        "response": f"Thing {number} is größer.\nIt is “new”.",
        "category": "closed_qa" if context else "open_qa",
    }


# Blanks are no context, so 31 of the 40 rows have none.
DOLLY_ROWS = [
    dolly_row(n, "" if n % 4 else " \n" if n == 8 else f"Of thing {n}.") for n in range(40)
]
WITHOUT_CONTEXT = [row for row in DOLLY_ROWS if not row["context"].strip()]
WITH_CONTEXT = [row for row in DOLLY_ROWS if row["context"].strip()]

ASKED = {"instruction": "Why?", "context": "", "response": "So.", "category": ""}


def quick(quick_cases, *options):
    """Every combination of some options; all but a few of them only in the full run."""
    return [
        case if case in quick_cases else pytest.param(*case, marks=pytest.mark.full)
        for case in itertools.product(*options)
    ]


def json_lines(rows, **how) -> bytes:
    return "".join(json.dumps(row, **how) + "\n" for row in rows).encode()


def alpaca(number: int) -> dict:
    return {"instruction": f"Do {number}.", "input": f"With {number}.", "output": f"Done {number}."}


@pytest.fixture(autouse=True)
def served(hub):
    card = b"---\nlicense: cc-by-sa-3.0\nlanguage:\n- en\n---\n# Summary\n"
    hub.repos[DOLLY] = {
        "README.md": card,
        "databricks-dolly-15k.jsonl": json_lines(DOLLY_ROWS, ensure_ascii=False),
    }
    hub.repos["someone/other"] = {
        "README.md": b"# No metadata\n",
        "data/train.json": json.dumps([alpaca(n) for n in range(5)]).encode(),
        "data/test.json": json.dumps([alpaca(n) for n in range(5, 8)]).encode(),
    }


@pytest.fixture
def nothing_cached():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def no_waiting(monkeypatch):
    # The client waits 1 + 2 + 4 + 8 + 8 seconds between its tries, and has no setting
    # for that.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Dolly


def test_dolly_drops_rows_with_context_and_keeps_the_order_of_the_file():
    train, held_out = load_dolly(rows=20)
    assert train.column_names == list(COLUMNS)
    assert train.to_list() == WITHOUT_CONTEXT[:20]
    assert held_out.num_rows == 0 and held_out.column_names == list(COLUMNS)


def test_dolly_takes_1000_rows_unless_told_otherwise():
    with pytest.raises(
        ValueError, match=r"With context='drop', Dolly has 31 rows. Received: rows=1000, held_out=0"
    ):
        load_dolly()


@pytest.mark.parametrize(
    ("context", "rows"), [("keep", DOLLY_ROWS), ("only", WITH_CONTEXT), ("drop", WITHOUT_CONTEXT)]
)
def test_dolly_without_a_number_of_rows_is_all_that_the_context_leaves(context, rows):
    assert load_dolly(rows=None, context=context)[0].to_list() == rows


@pytest.mark.parametrize("rows", [20, None])
def test_held_out_rows_follow_the_first_rows(rows):
    train, held_out = load_dolly(rows=rows, held_out=11)
    assert train.to_list() == WITHOUT_CONTEXT[:20]
    assert held_out.to_list() == WITHOUT_CONTEXT[20:]


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.full)])
def test_a_seed_shuffles_always_alike_and_held_out_rows_never_overlap(seed):
    train, held_out = load_dolly(rows=20, held_out=11, seed=seed)
    again = load_dolly(rows=20, held_out=11, seed=seed)
    drawn = train["instruction"][:] + held_out["instruction"][:]
    assert (train.to_list(), held_out.to_list()) == tuple(part.to_list() for part in again)
    assert sorted(drawn) == sorted(row["instruction"] for row in WITHOUT_CONTEXT)
    assert drawn != [row["instruction"] for row in WITHOUT_CONTEXT]


def test_seeds_differ():
    assert load_dolly(rows=20, seed=0)[0].to_list() != load_dolly(rows=20, seed=7)[0].to_list()


@pytest.mark.parametrize(
    ("rows", "held_out"), [(32, 0), (31, 1), (0, 0), (-1, 0), (5, -1), (None, 31), (None, 40)]
)
def test_dolly_names_its_number_of_rows_when_they_do_not_suffice(rows, held_out):
    with pytest.raises(ValueError, match=r"Dolly has 31 rows|is a whole number, [01] or more"):
        load_dolly(rows=rows, held_out=held_out)


def test_dolly_refuses_an_unknown_context():
    with pytest.raises(
        ValueError, match=r"\"drop\", \"keep\" or \"only\"\. Received: context='none'"
    ):
        load_dolly(context="none")


# The records that suit a model


def model_of(preset: str):
    """Something that remembers its preset as a loaded model does."""
    return SimpleNamespace(gemma_lora=SimpleNamespace(preset=preset), name="gemma_causal_lm")


def test_the_small_model_gets_its_whole_world_whatever_else_is_asked_for(tiny, tmp_path):
    whole = [part.to_list() for part in load_tiny_world()]
    assert tiny.gemma_lora.preset == records_module._SMALL_MODEL == models.TINY
    for model in (tiny, "tiny_gemma_en", tmp_path / "tiny_gemma_en"):
        assert [part.to_list() for part in load_data(model)] == whole
    parts = load_data(tiny, rows=5, held_out=5, context="keep", seed=1)
    assert [part.to_list() for part in parts] == whole


@pytest.mark.parametrize(
    "model",
    [
        model_of("gemma_2b_en"),
        "gemma_2b_en",
        Path("my/gemma"),
        SimpleNamespace(name="my_gemma", backbone=None),
    ],
)
def test_any_other_model_gets_dolly_with_the_same_options(model):
    train, held_out = load_data(model, rows=20, held_out=11)
    assert train.to_list() == WITHOUT_CONTEXT[:20]
    assert held_out.to_list() == WITHOUT_CONTEXT[20:]
    options = {"rows": None, "context": "keep", "seed": 3}
    expected = load_dolly(held_out=10, **options)
    parts = load_data(model, held_out=10, **options)
    assert [part.to_list() for part in parts] == [part.to_list() for part in expected]


def test_by_default_dolly_gives_1000_rows_and_holds_out_100():
    with pytest.raises(ValueError, match=r"'drop', .* Received: rows=1000, held_out=100"):
        load_data("gemma_2b_en")


def test_without_a_hub_any_model_gets_as_much_of_the_small_world(
    hub, nothing_cached, no_waiting, capsys
):
    hub.stop()
    train, held_out = load_data(model_of("gemma_2b_en"), rows=20, held_out=5)
    world_train, world_held_out = load_tiny_world()
    assert train.to_list() == world_train.to_list()[:20]
    assert held_out.to_list() == world_held_out.to_list()[:5]
    reason, instead = capsys.readouterr().out.splitlines()
    assert DOLLY in reason and instead == "These are records of the small world instead."
    train, held_out = load_data("gemma_2b_en", rows=None, held_out=0)
    assert (train.num_rows, held_out.num_rows) == (world_train.num_rows, 0)


@pytest.mark.parametrize("model", [None, 3, {"preset": "gemma_2b_en"}])
def test_what_is_neither_a_model_nor_a_preset_is_a_type_error(model):
    with pytest.raises(TypeError, match=f"Received: {type(model).__name__}"):
        load_data(model)


@pytest.mark.parametrize("model", ["tiny_gemma_en", "gemma_2b_en"])
def test_a_wrong_context_is_refused_for_every_model(model):
    with pytest.raises(ValueError, match="Received: context='none'"):
        load_data(model, context="none")


# The Hub fails


@pytest.mark.parametrize("load", [load_dolly, lambda: load_records("someone/other")])
def test_unreachable_and_nothing_cached_names_the_ways_out(hub, nothing_cached, no_waiting, load):
    hub.stop()
    with pytest.raises(ConnectionError, match=r"load_records\(\).*load_tiny_world\(\)") as raised:
        load()
    assert str(raised.value).startswith("Could not load the data set")


def test_what_is_cached_needs_no_hub(hub, nothing_cached, no_waiting):
    loaded = load_dolly(rows=20)[0].to_list()
    hub.stop()
    assert load_dolly(rows=20)[0].to_list() == loaded


def test_an_unknown_data_set_is_named():
    with pytest.raises(
        ConnectionError, match=r"'someone/nothing' from the Hub: .*doesn't exist on the Hub"
    ):
        load_records("someone/nothing")


@pytest.mark.parametrize(
    ("where", "status"),
    quick(
        [("", 403), ("", HANG_UP), ("databricks-dolly-15k.jsonl", 500)],
        ["", "databricks-dolly-15k.jsonl"],
        [500, 403, 429, HANG_UP],
    ),
)
def test_a_hub_that_fails_is_a_connection_error_that_says_why(
    hub, nothing_cached, no_waiting, where, status
):
    hub.failing = {where: status}
    with pytest.raises(ConnectionError, match=r"from the Hub: \S.+\nWays out:"):
        load_dolly(rows=20)


@pytest.mark.parametrize("status", [500, pytest.param(HANG_UP, marks=pytest.mark.full)])
def test_a_hub_that_fails_does_not_matter_to_what_is_cached(hub, no_waiting, status):
    loaded = load_records("someone/other").to_list()
    hub.failing = {"": status}
    assert load_records("someone/other").to_list() == loaded


def test_a_hub_that_recovers_serves_again(hub, nothing_cached, no_waiting):
    hub.stop()
    with pytest.raises(ConnectionError):
        load_dolly(rows=20)
    hub.start()
    assert load_dolly(rows=20)[0].num_rows == 20


# Where records come from


@pytest.mark.parametrize(("split", "numbers"), [("train", range(5)), ("test", range(5, 8))])
def test_a_name_on_the_hub_is_loaded_and_brought_into_dollys_columns(split, numbers):
    assert load_records("someone/other", split=split).to_list() == [
        {
            "instruction": f"Do {n}.",
            "context": f"With {n}.",
            "response": f"Done {n}.",
            "category": "",
        }
        for n in numbers
    ]


def test_an_unknown_split_is_not_blamed_on_the_network():
    with pytest.raises(ValueError, match=r"Unknown split \"validation\""):
        load_records("someone/other", split="validation")


@pytest.mark.parametrize(
    ("ending", "kind"),
    quick(
        [(".jsonl", str), (".json", Path), (".csv", str), (".JSONL", Path)],
        [".jsonl", ".json", ".csv", ".JSONL"],
        [str, Path],
    ),
)
def test_files_are_read_in_order(file, ending, kind):
    path = file(f"rows{ending}", "")
    if ending == ".csv":
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(DOLLY_ROWS)
    else:
        path.write_bytes(
            json.dumps(DOLLY_ROWS).encode() if ending == ".json" else json_lines(DOLLY_ROWS)
        )
    records = load_records(kind(path))
    assert records.to_list() == DOLLY_ROWS
    assert records.column_names == list(COLUMNS)
    assert {feature.dtype for feature in records.features.values()} == {"string"}


@pytest.mark.parametrize("kind", [list, pd.DataFrame, datasets.Dataset.from_list, iter])
def test_records_in_memory_are_read_in_order(kind):
    assert load_records(kind(DOLLY_ROWS)).to_list() == DOLLY_ROWS


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_what_a_data_frame_misses_is_an_empty_context(missing):
    frame = pd.DataFrame(
        {"question": ["Why?", "How?"], "answer": ["So.", "Thus."], "context": ["Because.", missing]}
    )
    assert load_records(frame)["context"][:] == ["Because.", ""]


def test_a_data_frame_of_chats_as_parquet_gives_them():
    turns = np.array([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    assert load_records(pd.DataFrame({"messages": [turns]})).to_list() == [ASKED]


@pytest.mark.parametrize("source", [{"instruction": "Why?", "response": "So."}, None, 3, b"x"])
def test_other_sources_are_a_type_error(source):
    with pytest.raises(TypeError, match=f"Received: {type(source).__name__}"):
        load_records(source)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder/missing.csv", "missing", "a/b/c"])
def test_a_missing_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"'{name}' in {re.escape(str(tmp_path))}"):
        load_records(name)
    with pytest.raises(FileNotFoundError, match=name):
        load_records(Path(name))


def test_other_files_are_refused(file):
    with pytest.raises(
        ValueError, match=r"reads \.jsonl, .* \.xlsx files.* Received: .*notes\.txt"
    ):
        load_records(file("notes.txt", "Why? So."))


# What the columns are called


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "input": "", "output": "So."},
        {"prompt": "Why?", "completion": "So."},
        {"question": "Why?", "answer": "So."},
        {"prompts": "Why?", "responses": "So."},
        {"question": "Why?", "answer": "So.", "context": None, "category": None},
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "model", "content": "So."}]},
        {
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
            "messages": None,
        },
    ],
)
def test_usual_names_are_known(row):
    assert load_records([row]).to_list() == [ASKED]


@pytest.mark.parametrize(
    ("role", "content", "chat"),
    [("role", "content", "messages"), ("from", "value", "conversations")],
)
def test_a_system_turn_becomes_the_context_and_the_category_stays(role, content, chat):
    said = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]
    row = {
        chat: [{role: who, content: text} for who, text in said],
        "category": "open_qa",
        "topic": "life",
    }
    record = {
        "instruction": "Why?",
        "context": "Be brief.",
        "response": "So.",
        "category": "open_qa",
    }
    assert load_records([row]).to_list() == [record]
    assert load_records([row], columns={"category": "topic"}).to_list() == [
        record | {"category": "life"}
    ]


def test_columns_says_what_the_source_calls_them():
    rows = [{"frage": "Why?", "antwort": "So.", "zum Text": "Because.", "response": "No."}]
    columns = {"instruction": "frage", "response": "antwort", "context": "zum Text"}
    assert load_records(rows, columns=columns).to_list() == [ASKED | {"context": "Because."}]


def test_columns_may_map_a_context_that_some_rows_leave_empty():
    rows = [{"question": "Why?", "answer": "So.", "text": text} for text in ("Because.", None, "")]
    assert load_records(rows, columns={"context": "text"})["context"][:] == ["Because.", "", ""]


def test_columns_that_are_not_in_the_source_are_named():
    with pytest.raises(
        ValueError, match=r"row 0: no 'frage' among the fields \['answer', 'question'\]"
    ):
        load_records([{"question": "Why?", "answer": "So."}], columns={"instruction": "frage"})


def test_columns_maps_only_the_four_columns():
    with pytest.raises(
        ValueError, match=r"instruction, context, response, category .* Received: \['question'\]"
    ):
        load_records([ASKED], columns={"question": "frage"})
    with pytest.raises(ValueError, match=r"wrong way round: columns=\{'instruction': 'frage'\}"):
        load_records([ASKED], columns={"frage": "instruction"})


def test_on_error_is_raise_or_skip():
    with pytest.raises(ValueError, match=r"\"raise\" or \"skip\"\. Received: on_error='ignore'"):
        load_records([ASKED], on_error="ignore")


# Malformed rows

MALFORMED = [
    ('{"instruction": "Why?"', "not a line of JSON"),
    ("Why? So.", "not a line of JSON"),
    (b'{"instruction": "Why?", "response": "caf\xe9"}', "not a line of JSON: 'utf-8' codec"),
    ('{"instruction": "Why?"}', r"no 'response' among the fields \['instruction'\]"),
    ('{"response": "So."}', r"no 'instruction' among the fields \['response'\]"),
    ("{}", r"no 'instruction' among the fields \[\]"),
    ('{"instruction": "Why?", "response": 4}', "'response' must be text. Received: int, 4"),
    ('{"instruction": ["Why?"], "response": "So."}', "'instruction' must be text. Received: list"),
    (
        '{"instruction": "Why?", "response": "So.", "context": {"a": 1}}',
        "'context' must be text. Received: dict",
    ),
    ('{"instruction": "Why?", "response": ""}', "'response' is empty"),
    ('{"instruction": "Why?", "response": null}', "'response' is empty"),
    ('{"instruction": " \\n\\u00a0", "response": "So."}', "'instruction' is empty"),
    ('{"instruction": "Why?", "response": "\\ud800"}', "'response' holds half a character"),
    (
        '{"instruction": "Why?", "response": "So.", "context": "\\udfff"}',
        "'context' holds half a character",
    ),
    ('["Why?", "So."]', "a record has named fields, .* Received: list"),
    ("null", "a record has named fields, .* Received: NoneType"),
    ('{"messages": []}', r"one user and one assistant turn. Received: \[\]"),
    ('{"messages": [{"role": "user", "content": "Why?"}]}', r"Received: \['user'\]"),
    (
        json.dumps(
            {"messages": [{"role": role, "content": "Ah."} for role in ("user", "assistant") * 2]}
        ),
        r"one user and one assistant turn. Received: \['user', 'assistant', 'user', 'assistant'\]",
    ),
    ('{"messages": [{"content": "Why?"}, {"content": "So."}]}', "one user and one assistant turn"),
    ('{"messages": [{"role": ["user"], "content": "Why?"}]}', "one user and one assistant turn"),
    ('{"messages": ["Why?", "So."]}', "each of a chat's messages must be an object"),
    ('{"messages": 5}', "each of a chat's messages must be an object"),
    (
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "So."}]}',
        "'instruction' is empty",
    ),
]


@pytest.mark.parametrize(("line", "why"), MALFORMED)
def test_a_malformed_line_is_refused_with_file_and_line_or_skipped(file, line, why):
    line = line if isinstance(line, bytes) else line.encode()
    path = file("rows.jsonl", json_lines([ASKED]) + b"\n" + line + b"\n" + json_lines([ASKED]))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{why}.*on_error=\"skip\""):
        load_records(path)
    with pytest.warns(
        UserWarning, match=rf"Skipped 1 of 3 rows:\n  .*rows\.jsonl, line 3: .*{why}"
    ):
        assert load_records(path, on_error="skip").to_list() == [ASKED, ASKED]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, pd.DataFrame])
def test_a_malformed_row_in_memory_is_refused_with_its_number(kind):
    with pytest.raises(ValueError, match=r"row 1: 'response' is empty"):
        load_records(kind([ASKED, ASKED | {"response": " "}]))


def test_a_malformed_object_in_a_json_file_is_counted_from_one(file):
    with pytest.raises(ValueError, match=r"rows\.json, object 2: .* Received: str"):
        load_records(file("rows.json", json.dumps([ASKED, "So."])))


def test_skipping_warns_once_with_the_count_and_the_first_three_at_the_callers_line():
    with pytest.warns(
        UserWarning, match=r"Skipped 1,200 of 1,201 rows:(\n  row \d: 'response' is empty\.){3}$"
    ) as caught:
        assert load_records(
            [*[ASKED | {"response": ""}] * 1200, ASKED], on_error="skip"
        ).to_list() == [ASKED]
    assert [Path(warning.filename).name for warning in caught] == ["test_records.py"]


def test_skipping_does_not_warn_when_nothing_is_skipped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_records([ASKED], on_error="skip")


def test_no_usable_row_is_an_error_even_when_skipping():
    with pytest.raises(
        ValueError, match=r"No usable record in the list\. row 0: 'response' is empty"
    ):
        load_records([ASKED | {"response": ""}] * 3, on_error="skip")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n \r\n"),
        ("rows.json", "[]"),
        ("rows.csv", ""),
        ("rows.csv", "question,answer\n"),
    ],
)
def test_an_empty_file_is_an_error(file, name, content):
    with pytest.raises(ValueError, match=rf"No usable record in .*{name}\. It is empty\."):
        load_records(file(name, content))


@pytest.mark.parametrize("nothing", [[], pd.DataFrame({"question": [], "answer": []})])
def test_no_rows_are_an_error(nothing):
    with pytest.raises(
        ValueError, match=rf"No usable record in the {type(nothing).__name__}\. It is empty\."
    ):
        load_records(nothing)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is not JSON"),
        (b'[{"question": "Why?", "answer": "caf\xe9"}]', "is not text in UTF-8: line 1"),
        (json_lines([ASKED, ASKED]), "is not JSON: .*call it .jsonl"),
        (json.dumps(ASKED), "must hold a list of objects. Received: dict"),
    ],
)
def test_a_json_file_that_is_no_list_is_refused(file, content, why):
    with pytest.raises(ValueError, match=rf"rows\.json {why}"):
        load_records(file("rows.json", content), on_error="skip")


# Text files as they come


@pytest.mark.parametrize(
    ("ensure_ascii", "newline", "start", "end"),
    quick(
        [
            (True, b"\n", b"", b"\n"),
            (False, b"\r\n", b"\xef\xbb\xbf", b""),
            (False, b"\n\n", b"", b""),
            (True, b"\n \t\r\n", b"\xef\xbb\xbf", b"\n"),
        ],
        [True, False],
        [b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"],
        [b"", b"\xef\xbb\xbf"],
        [b"", b"\n"],
    ),
)
def test_json_lines_with_any_newline_byte_order_mark_and_line_separator(
    file, start, newline, end, ensure_ascii
):
    rows = [
        ASKED | {"response": text}
        for text in ("größer 🙂", "one\u2028two\u2029three\x85four", "one\r\ntwo\x1c")
    ]
    lines = json_lines(rows, ensure_ascii=ensure_ascii).strip().split(b"\n")
    assert load_records(file("rows.jsonl", start + newline.join(lines) + end)).to_list() == rows


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_csv_with_any_newline_byte_order_mark_and_quotes(file, start, newline):
    lines = ["question,answer", '"Why, though?","So ""it"" is:', 'größer.\u2028"', "How?,Thus."]
    response = f'So "it" is:{newline}größer.\u2028'
    records = load_records(file("rows.csv", start + newline.join(lines)))
    assert records["instruction"][:] == ["Why, though?", "How?"]
    assert records["response"][:] == [response, "Thus."]


def test_a_csv_row_with_too_few_fields_is_malformed(file):
    path = file("rows.csv", "question,answer\nWhy?,So.\nHow?\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 3: 'answer' is empty"):
        load_records(path)


def test_a_csv_row_with_too_many_fields_is_malformed_not_cut_off(file):
    path = file("rows.csv", "question,answer\nWhy?,So it is, though.\nWhy?,So.,\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: more fields than the header names"):
        load_records(path)
    with pytest.warns(UserWarning, match="Skipped 1 of 2 rows"):
        assert load_records(path, on_error="skip").to_list() == [ASKED]


@pytest.mark.parametrize(
    "content",
    [
        b"question,answer\nWhy?,caf\xe9\n",
        b'question,answer\nWhy?,"So.\nHow?,Thus.\n',
        b"question\0,\xff\xfe",
    ],
)
def test_a_file_that_is_no_csv_in_utf_8_is_refused(file, content):
    with pytest.raises(
        ValueError, match=r"rows\.csv is not (text in UTF-8: line|CSV, near line) \d"
    ):
        load_records(file("rows.csv", content), on_error="skip")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
RECORD = st.fixed_dictionaries(
    {
        "instruction": TEXT.filter(str.strip),
        "context": TEXT,
        "response": TEXT.filter(str.strip),
        "category": TEXT,
    }
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "rows.jsonl"


@settings(deadline=None)
@given(rows=st.lists(RECORD, min_size=1, max_size=5), ensure_ascii=st.booleans())
def test_any_text_written_as_json_lines_is_read_back_exactly(scratch, rows, ensure_ascii):
    scratch.write_bytes(json_lines(rows, ensure_ascii=ensure_ascii))
    assert load_records(scratch).to_list() == rows


# The small world


def test_the_small_world_is_large_enough_and_has_dollys_columns():
    train, held_out = load_tiny_world()
    assert train.num_rows >= 1000 and held_out.num_rows >= 300
    for records in (train, held_out):
        assert records.column_names == list(COLUMNS)
        assert load_records(records).to_list() == records.to_list()


def test_the_small_world_is_always_alike():
    assert [part.to_list() for part in load_tiny_world()] == [
        part.to_list() for part in load_tiny_world()
    ]


def test_no_tuning_record_asks_about_a_held_out_subject():
    train, held_out = load_tiny_world()
    subjects = [*world.COUNTRIES, *world.ANIMALS, *world.TOPICS, *world.CONTINENTS]
    held_out_ones = [
        subject for subject in subjects if getattr(subject, "name", subject) in held_out_subjects()
    ]
    assert len(held_out_ones) == len(held_out_subjects())

    def asked_about(subject) -> set[str]:
        fields = {"name": subject} if isinstance(subject, str) else subject._asdict()
        relations = {
            world.Country: (*world.COUNTRY_RELATIONS, "trip"),
            world.Animal: world.ANIMAL_RELATIONS,
            world.Topic: ("plain", "child"),
            str: ("continent trip", "continent countries"),
        }[type(subject)]
        return {
            question.format(**fields)
            for relation in relations
            for question in world.QUESTIONS[relation]
        }

    questions = set().union(*map(asked_about, held_out_ones))
    assert set(held_out["instruction"]) <= questions
    assert not set(train["instruction"]) & questions
    names = re.compile(rf"\b({'|'.join(map(re.escape, held_out_subjects()))})\b", re.IGNORECASE)
    assert [instruction for instruction in train["instruction"] if names.search(instruction)] == []


@pytest.mark.parametrize(
    "question",
    [
        "What should I do on a trip to Europe?",
        "Explain the process of photosynthesis in a way that a child could understand.",
    ],
)
def test_the_two_well_known_questions_are_held_out(question):
    train, held_out = load_tiny_world()
    assert held_out["instruction"][:].count(question) == 1
    assert question not in train["instruction"][:]


def test_a_file_takes_the_place_of_dolly(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {i}.", "context": "", "response": str(i)} for i in range(12)]
    rows[3]["context"] = "Numbers."
    file.write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("GEMMA_LORA_DATA", str(file))
    train, held_out = load_data("gemma3_270m", rows=6, held_out=4)
    assert list(train["response"]) == ["0", "1", "2", "4", "5", "6"]
    assert list(held_out["response"]) == ["7", "8", "9", "10"]
    assert f"Rows are read from {file}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="11 rows"):
        load_dolly(rows=20)


# Files as people have them

TWO = [ASKED, ASKED | {"instruction": "How?", "response": "Thus, and so."}]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_are_found_out(tmp_path, separator, encoding):
    lines = [["Question", "Answer"], *([row["instruction"], row["response"]] for row in TWO)]
    path = tmp_path / "rows.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert load_records(path).to_list() == TWO


def test_another_encoding_is_named_with_the_way_to_save_again(file):
    path = file("rows.csv", "question,answer\nWhy?,schön\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"line 2 has the byte 0xf6\. Save it again as UTF-8"):
        load_records(path, on_error="skip")


def test_a_cell_of_any_length_is_read(file):
    limit = csv.field_size_limit()
    long = "word " * 30_000
    path = file("rows.csv", f'question,answer\nWhy?,"{long}"\n')
    assert load_records(path)["response"][0] == long
    assert csv.field_size_limit() == limit


def test_other_kinds_of_files(tmp_path):
    frame = pd.DataFrame(TWO)
    frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "array.jsonl").write_text(json.dumps(TWO))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json_lines(TWO)))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines(TWO))[:-9])
    for name in ("x.tsv", "x.parquet", "array.jsonl", "x.jsonl.gz", "x.csv.gz"):
        assert load_records(tmp_path / name).to_list() == TWO, name
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_records(tmp_path / "cut.jsonl.gz")


def test_excel_is_read_or_says_what_it_takes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pd, "read_excel", lambda path: calls.append(path) or pd.DataFrame(TWO))
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    assert load_records(tmp_path / "x.xlsx").to_list() == TWO
    monkeypatch.setattr(pd, "read_excel", mock.Mock(side_effect=ImportError("openpyxl")))
    with pytest.raises(ImportError, match="pip install pandas openpyxl"):
        load_records(tmp_path / "x.xlsx")


# Columns as people have them


@pytest.mark.parametrize(
    "row",
    [
        {"Question ": "Why?", "ANSWER": "So."},
        {"inputs": "Why?", "targets": "So."},
        {"Human": "Why?", "Assistant": "So."},
        {"prompt": [{"role": "user", "content": "Why?"}],
         "completion": [{"role": "assistant", "content": "So."}]},
        {"messages": json.dumps([{"role": "user", "content": "Why?"},
                                 {"role": "assistant", "content": "So."}])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                      {"role": "model", "content": "So."}]},
    ],
)  # fmt: skip
def test_usual_names_in_any_case_and_chats_in_any_form(row):
    assert load_records([row]).to_list() == [ASKED | {"instruction": "Why?", "response": "So."}]


class Polars:
    """What this project needs of a frame of polars."""

    columns = ("Question", "Answer")

    def to_dicts(self):
        return [{"Question": "Why?", "Answer": "So."}]


@pytest.mark.parametrize("source", [Polars(), {"question": ["Why?"], "answer": ["So."]}])
def test_frames_of_polars_and_dicts_of_lists(source):
    assert load_records(source).to_list() == [ASKED | {"instruction": "Why?", "response": "So."}]


@pytest.mark.parametrize("name", ["system", "system_prompt", "System Prompt"])
def test_a_system_prompt_begins_the_context(name):
    row = {name: "In French.", "instruction": "Hello?", "output": "Bonjour."}
    assert load_records([row])[0]["context"] == "In French."
    assert load_records([row | {"input": "A text."}])[0]["context"] == "In French.\n\nA text."


def test_all_system_turns_are_kept():
    roles = ("system", "system", "user", "assistant")
    turns = [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]
    assert load_records([{"messages": turns}])[0]["context"] == "0\n\n1"


def test_earlier_turns_are_refused():
    row = {"instruction": "And of Italy?", "output": "Rome.", "history": [["Of France?", "Paris."]]}
    with pytest.raises(ValueError, match=r"row 0: 'history' has earlier turns.*on_error"):
        load_records([row])
    assert load_records([row | {"history": []}])[0]["response"] == "Rome."


def test_columns_that_are_not_used_are_named_once():
    rows = [{"question": "Why?", "answer": "So.", "id": i, "source": "x"} for i in (1, 2)]
    with pytest.warns(UserWarning, match="^These columns are not used: 'id', 'source'$"):
        load_records(rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"frage": "Warum?", "antwort": "Darum."}],
         r"columns=\{'instruction': 'frage', 'response': 'antwort'\}\)\.$"),
        ([{"text": "### Instruction: Why?"}], r"among the fields \['text'\]\.$"),
        (["Instruction:\nWhy?"], r"has named fields.* Received: str, 'Instruction.*\.$"),
        ([ASKED, {"instruction": "Why?"}], 'pass on_error="skip"'),
    ],
)  # fmt: skip
def test_leaving_rows_out_is_advised_only_where_it_helps(source, message):
    with pytest.raises(ValueError, match=message):
        load_records(source)


def test_a_dict_of_splits_is_named():
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(TWO))
    with pytest.raises(TypeError, match=r"DatasetDict with the splits train.*data\['train'\]"):
        load_records(data)


# Held-out records


ASKED_OFTEN = [
    {"question": f"Is {n // 2} odd{'?' if n % 2 else ' ?'}", "answer": f"Look at {n}."}
    for n in range(40)
]


@pytest.mark.parametrize(("held_out", "count"), [(0.1, 4), (0.25, 10), (7, 6), (1, None)])
def test_records_are_split_without_a_question_on_both_sides(held_out, count):
    if count is None:
        with pytest.raises(ValueError, match="leaves nothing on one side"):
            load_records(ASKED_OFTEN, held_out=held_out)
        return
    train, others = load_records(ASKED_OFTEN, held_out=held_out, seed=0)
    assert (len(train), len(others)) == (40 - count, count)
    questions = [{"".join(row["instruction"].split()) for row in part} for part in (train, others)]
    assert not questions[0] & questions[1]
    again = load_records(ASKED_OFTEN, held_out=held_out, seed=0)
    assert [row["response"] for row in again[1]] == [row["response"] for row in others]
    another = load_records(ASKED_OFTEN, held_out=held_out, seed=1)
    assert [row["response"] for row in another[1]] != [row["response"] for row in others]


@pytest.mark.parametrize("held_out", [0, -1, 40, 1.5, "a tenth", True, float("nan"), 0.001])
def test_what_cannot_be_held_out_is_said(held_out):
    with pytest.raises(ValueError, match="held_out"):
        load_records(ASKED_OFTEN, held_out=held_out)


@settings(max_examples=40)
@given(
    questions=st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 100),
)
def test_a_split_keeps_every_record_and_leaks_none(questions, share, seed):
    rows = [{"question": q, "answer": f"So {n}."} for n, q in enumerate(questions)]
    try:
        train, held_out = load_records(rows, held_out=share, seed=seed)
    except ValueError as error:
        assert "leaves nothing" in str(error)
        return
    assert sorted([*train["response"], *held_out["response"]]) == sorted(r["answer"] for r in rows)
    assert not set(train["instruction"]) & set(held_out["instruction"])
    assert len(held_out) <= round(share * len(rows))


def test_of_dolly_a_number_of_rows_is_held_out():
    with pytest.raises(ValueError, match=r"held_out is a number of rows. Received: held_out=0.1"):
        load_dolly(held_out=0.1)


def test_messages_of_one_chat_are_no_rows():
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(ValueError, match=r"This is one message. A record holds a whole chat"):
        load_records(chat)


def test_a_folder_is_no_file_of_records(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder. Pass the file in it"):
        load_records(tmp_path)


# Chats, columns and files in the ways of other tools

USER, BOT, SYSTEM = (
    {"role": role, "content": text}
    for role, text in (("user", "Why?"), ("assistant", "So."), ("system", "Be short."))
)
# The time of packing would be a part of the test's name, and differ between processes.
GZIPPED = gzip.compress(b'{"question": "Why?", "answer": "So."}', mtime=0)
ASKED_OF_CHATS = {"instruction": "Why?", "response": "So.", "category": ""}


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"messages": [{"role": "User", "content": "Why?"}, {"role": "bot", "text": "So."}]}, ""),
        ({"messages": [{**USER, "content": [{"text": "Why?"}]}, BOT]}, ""),
        ({"messages": [{**USER, "content": ["Why?"]}, {"role": "model", "parts": ["So."]}]}, ""),
        ({"messages": [USER, {**BOT, "content": [{"type": "output_text", "text": "So."}]}]}, ""),
        ({"messages": [{**SYSTEM, "role": "developer"}, USER, BOT]}, "Be short."),
        ({"messages": [SYSTEM, USER, BOT], "context": "DOC"}, "Be short.\n\nDOC"),
        ({"Context": "DOC", "messages": [USER, BOT]}, "DOC"),
        ({"messages": [], "prompt": "Why?", "completion": "So."}, ""),
        ({"prompt": [USER], "completion": "So."}, ""),
        ({"Prompt": [USER], "Completion": [BOT]}, ""),
        ({"prompt": np.array([USER]), "response": np.array([BOT])}, ""),
        ({"prompt": json.dumps([SYSTEM, USER]), "completion": json.dumps([BOT])}, "Be short."),
        ({"system_message": "Be short.", "question": "Why?", "answer": "So."}, "Be short."),
        ({"history": np.array([]), "question": "Why?", "answer": "So."}, ""),
        ({"history": "[]", "question": "Why?", "answer": "So."}, ""),
    ],
)
def test_a_chat_is_read_in_the_ways_of_other_tools(row, context):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [record] = load_records([row]).to_list()
    assert record == {**ASKED_OF_CHATS, "context": context}


def test_a_column_that_the_caller_names_has_that_meaning_alone():
    columns = {"instruction": "q", "response": "a", "context": "system"}
    [record] = load_records([{"system": "s", "q": "Why?", "a": "So."}], columns=columns).to_list()
    assert record["context"] == "s"
    columns["context"] = "history"
    rows = [{"history": "h", "q": "Why?", "a": "So."}]
    assert load_records(rows, columns=columns)["context"][0] == "h"
    rows = [{"Frage": "Why?", "answer": "So."}]
    assert load_records(rows, columns={"instruction": "frage"})["instruction"][0] == "Why?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{**USER, "content": [{"type": "text"}]}, BOT]}, "only text can be used"),
        ({"Question": "Why?", "question": "How?", "answer": "So."}, "two columns could be meant"),
        ({"question": "W\0h\0y", "answer": "So."}, "NUL characters, which are no text"),
    ],
)
def test_what_could_mean_two_things_or_nothing_is_said(row, message):
    with pytest.raises(ValueError, match=message):
        load_records([row])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "sep=;\nquestion;answer\nWhy?;So."),
        ("b.csv", "\n\nquestion;answer\nWhy?;So."),
        ("d.csv", "question;answer\rWhy?;So."),
        ("e.csv", 'question, answer\n"Why?", "So."'),
        ("f.tsv", 'question\tanswer\tnote\nWhy?\tSo.\t5" wide'),
        ("g.JSONL.GZ", GZIPPED),
    ],
)
def test_a_file_is_read_as_its_writer_meant_it(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These columns are not used")
        assert load_records(file).to_list() == [{**ASKED_OF_CHATS, "context": ""}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,question,answer\nWhy?,How?,So.", "two columns called 'question'"),
        ("a.parquet", b"no", "is not Parquet"),
        ("a.xlsx", b"no", "is not an Excel file|take two packages"),
        ("a.jsonl", "{'q': 'ü'}".encode("cp1252"), "Save the file again as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, ImportError), match=message):
        load_records(tmp_path / name)


def test_tables_of_arrow_and_homes_are_read(tmp_path, monkeypatch):
    table = datasets.Dataset.from_list([ASKED]).data.table
    assert load_records(table).to_list() == load_records([ASKED]).to_list()
    (tmp_path / "mine.jsonl").write_text(json.dumps(ASKED))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_records("~/mine.jsonl")) == 1
    with pytest.raises(TypeError, match="with the splits train, test"):
        load_records({"train": [ASKED], "test": [ASKED]})


def test_questions_that_differ_in_signs_are_different():
    asked = ["What is C?", "what is C ?", "What is C++?"]
    rows = [{"question": question, "answer": "So."} for question in asked]
    train, held_out = load_records(rows, held_out=1, seed=0)
    assert held_out["instruction"][:] == ["What is C++?"]
    assert len(train) == 2


def test_what_stands_beside_a_chat_is_kept_or_named():
    with pytest.warns(UserWarning, match="not used: 'Response'"):
        [record] = load_records([{"messages": [USER, BOT], "Response": "Else."}]).to_list()
    assert record["response"] == "So."
    _, [prompt] = as_prompts({"context": "DOC", "messages": [SYSTEM, USER]})
    assert prompt == {"instruction": "Why?", "context": "Be short.\n\nDOC"}
