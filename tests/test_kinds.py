"""Whatever people pass for an argument works, or gets one sentence of ours.

A table of arguments and a table of kinds of things. Each pair either works, or raises
an error that this library raised itself, in words. In `make test` hypothesis draws
pairs from the table; `make test-full` tries every one.
"""

import json
import re
import traceback
import warnings
from pathlib import Path

import datasets
import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gemma_lora as gl
from gemma_lora.runtime import quiet

LIBRARY = str(Path(gl.__file__).parent)
RECORD = {"instruction": "Why?", "context": "", "response": "So.", "category": "qa"}
MESSAGES = [{"role": "user", "content": "Why?"}]
CHAT = [*MESSAGES, {"role": "assistant", "content": "So."}]

# What Python or another library says when something got too far.
NOT_OURS = re.compile(
    r"object has no attribute|unhashable|not subscriptable|unexpected keyword|not iterable|"
    r"unsupported operand|not supported between|must be real number|cannot be interpreted|"
    r"positional argument|invalid literal|expected str, bytes|must be an iterable"
)


class Frame:
    """What polars shows of a frame: `columns` and `to_dicts`."""

    columns = ("question", "answer")

    def to_dicts(self):
        return [{"question": "Why?", "answer": "So."}]


KINDS = {
    "a text": lambda folder: "Why?",
    "an empty text": lambda folder: "",
    "NumPy's text": lambda folder: np.str_("Why?"),
    "bytes": lambda folder: b"Why?",
    "a path to records": lambda folder: folder / "mine.jsonl",
    "a path to records, as text": lambda folder: str(folder / "mine.jsonl"),
    "a path to nothing": lambda folder: folder / "nothing.jsonl",
    "a path to notes": lambda folder: folder / "notes.txt",
    "a path to an empty file": lambda folder: folder / "empty.jsonl",
    "a folder": lambda folder: folder,
    "a folder of an adapter": lambda folder: folder / "adapter",
    "a file of an adapter": lambda folder: folder / "adapter/adapter.safetensors",
    "a file of weights": lambda folder: folder / "all.weights.h5",
    "a name on the Hub": lambda folder: "google/gemma-2b",
    "a preset": lambda folder: "tiny_gemma_en",
    "a record": lambda folder: RECORD,
    "a record by other names": lambda folder: {"Question": "Why?", "Answer": "So."},
    "a record with strange names": lambda folder: {"frage": "Why?", "antwort": "So."},
    "a list of texts": lambda folder: ["Why?", "How?"],
    "a list of records": lambda folder: [RECORD, RECORD],
    "a tuple of records": lambda folder: (RECORD, RECORD),
    "a set of texts": lambda folder: {"Why?"},
    "an empty list": lambda folder: [],
    "an empty dict": lambda folder: {},
    "a list with None": lambda folder: [None],
    "a list of numbers": lambda folder: [1, 2],
    "a dict of lists": lambda folder: {"question": ["Why?"], "answer": ["So."]},
    "a dict of unequal lists": lambda folder: {"question": ["Why?", "How?"], "answer": ["So."]},
    "messages": lambda folder: MESSAGES,
    "a chat": lambda folder: CHAT,
    "rows of messages": lambda folder: [{"messages": CHAT}],
    "rows of messages as JSON": lambda folder: [{"messages": json.dumps(CHAT)}],
    "a frame of pandas": lambda folder: pd.DataFrame([RECORD]),
    "a series of pandas": lambda folder: pd.Series(["Why?"]),
    "a frame of polars": lambda folder: Frame(),
    "a Dataset": lambda folder: datasets.Dataset.from_list([RECORD]),
    "a DatasetDict": lambda folder: datasets.DatasetDict(
        train=datasets.Dataset.from_list([RECORD])
    ),
    "an IterableDataset": lambda folder: datasets.Dataset.from_list([RECORD]).to_iterable_dataset(),
    "a generator of records": lambda folder: (row for row in [RECORD]),
    "an array of texts": lambda folder: np.array(["Why?"]),
    "None": lambda folder: None,
    "NaN": lambda folder: float("nan"),
    "infinity": lambda folder: float("inf"),
    "a fraction": lambda folder: 0.1,
    "NumPy's float": lambda folder: np.float32(0.5),
    "NumPy's integer": lambda folder: np.int64(2),
    "an array of one number": lambda folder: np.array([2]),
    "zero": lambda folder: 0,
    "one": lambda folder: 1,
    "a negative number": lambda folder: -1,
    "a huge number": lambda folder: 10**30,
    "a number as text": lambda folder: "5e-5",
    "True": lambda folder: True,
    "a schedule": lambda folder: keras.optimizers.schedules.CosineDecay(1e-3, 10),
    "a callback": lambda folder: keras.callbacks.TerminateOnNaN(),
    "a function": lambda folder: lambda *arguments: True,
    "a class": lambda folder: dict,
    "an object": lambda folder: object(),
    "a Keras layer": lambda folder: keras.layers.Dense(1),
}


def argument(call, **options):
    """Return a function that calls with a value for the option given as `...`."""
    [name] = [name for name, value in options.items() if value is ...]

    def with_value(model, value):
        given = {key: model if held is MODEL else held for key, held in options.items()}
        result = call(**(given | {name: value}))
        # A generator does nothing before it is asked.
        return [*result] if call is gl.stream else result

    return with_value


MODEL = object()
ROWS = [RECORD]
# One epoch of one row, which is what makes thousands of calls possible.
FIT = {"model": MODEL, "verbose": 0}
ASK = {"model": MODEL, "max_new_tokens": 2}

ARGUMENTS = {
    "load_records source": argument(gl.load_records, source=...),
    "load_records columns": argument(gl.load_records, source=ROWS, columns=...),
    "load_records held_out": argument(gl.load_records, source=ROWS * 4, held_out=...),
    "load_records on_error": argument(gl.load_records, source=ROWS, on_error=...),
    "load_records seed": argument(gl.load_records, source=ROWS, held_out=None, seed=...),
    "load_data model": argument(gl.load_data, model=...),
    "load_dolly context": argument(gl.load_dolly, context=..., or_tiny_world=True),
    "fit model": argument(gl.fit, **FIT | {"model": ..., "train": ROWS}),
    "fit train": argument(gl.fit, **FIT, train=...),
    "fit validation": argument(gl.fit, **FIT, train=ROWS, validation=...),
    "fit template": argument(gl.fit, **FIT, train=ROWS, template=...),
    "fit epochs": argument(gl.fit, **FIT, train=ROWS, epochs=...),
    "fit learning_rate": argument(gl.fit, **FIT, train=ROWS, learning_rate=...),
    "fit weight_decay": argument(gl.fit, **FIT, train=ROWS, weight_decay=...),
    "fit batch_size": argument(gl.fit, **FIT, train=ROWS, batch_size=...),
    "fit batch_tokens": argument(gl.fit, **FIT, train=ROWS, batch_tokens=...),
    "fit sequence_length": argument(gl.fit, **FIT, train=ROWS, sequence_length=...),
    "fit loss_on": argument(gl.fit, **FIT, train=ROWS, loss_on=...),
    "fit seed": argument(gl.fit, **FIT, train=ROWS, seed=...),
    "fit callbacks": argument(gl.fit, **FIT, train=ROWS, callbacks=...),
    "fit verbose": argument(gl.fit, model=MODEL, train=ROWS, verbose=...),
    "encode records": argument(gl.encode, model=MODEL, records=...),
    "show_tokens records": argument(gl.show_tokens, model=MODEL, records=...),
    "evaluate records": argument(gl.evaluate, model=MODEL, records=..., answers=False),
    "evaluate judge": argument(gl.evaluate, **ASK, records=ROWS, judge=...),
    "perplexity texts": argument(gl.perplexity, model=MODEL, texts=...),
    "distinct texts": argument(gl.distinct, texts=...),
    "distinct n": argument(gl.distinct, texts=["a b c"], n=...),
    "generate model": argument(gl.generate, model=..., prompts="Why?"),
    "generate prompts": argument(gl.generate, **ASK, prompts=...),
    "generate template": argument(gl.generate, **ASK, prompts="Why?", template=...),
    "generate sampler": argument(gl.generate, **ASK, prompts="Why?", sampler=...),
    "generate temperature": argument(gl.generate, **ASK, prompts="Why?", temperature=...),
    "generate top_k": argument(gl.generate, **ASK, prompts="Why?", top_k=...),
    "generate top_p": argument(gl.generate, **ASK, prompts="Why?", top_p=...),
    "generate seed": argument(gl.generate, **ASK, prompts="Why?", seed=...),
    "generate max_new_tokens": argument(
        gl.generate, model=MODEL, prompts="Why?", max_new_tokens=...
    ),
    "stream prompt": argument(gl.stream, **ASK, prompt=...),
    "compare prompts": argument(gl.compare, **ASK, prompts=...),
    "enable_lora rank": argument(gl.enable_lora, model=MODEL, rank=...),
    "enable_lora alpha": argument(gl.enable_lora, model=MODEL, alpha=...),
    "enable_lora targets": argument(gl.enable_lora, model=MODEL, targets=...),
    "enable_lora seed": argument(gl.enable_lora, model=MODEL, seed=...),
    "load preset": argument(gl.load, preset=...),
    "load_tokenizer preset": argument(gl.load_tokenizer, preset=...),
    "load dtype": argument(gl.load, preset="tiny_gemma_en", dtype=...),
    "recommended model": argument(gl.recommended, model=...),
    "load_adapter source": argument(gl.load_adapter, model=MODEL, source=...),
    "memory_budget preset": argument(gl.memory_budget, preset=..., compile=False),
    "memory_budget rank": argument(
        gl.memory_budget, preset="tiny_gemma_en", compile=False, rank=...
    ),
    "memory_budget targets": argument(
        gl.memory_budget, preset="tiny_gemma_en", compile=False, targets=...
    ),
    "memory_budget dtype": argument(
        gl.memory_budget, preset="tiny_gemma_en", compile=False, dtype=...
    ),
    "check preset": argument(gl.check, preset=...),
    "model_card kind": argument(gl.model_card, model=MODEL, kind=...),
    "upload folder": argument(gl.upload, folder=..., uri="hf://me/mine", dry_run=True),
    "upload uri": argument(gl.upload, folder="nothing", uri=..., dry_run=True),
    "setup seed": argument(gl.setup, seed=...),
}


def prepare(folder: Path, model) -> None:
    """Put into a folder what the kinds of paths name."""
    (folder / "mine.jsonl").write_text(json.dumps(RECORD) + "\n")
    (folder / "notes.txt").write_text("Water the basil.\n")
    (folder / "empty.jsonl").write_text("")
    gl.save_adapter(model, folder / "adapter")
    model.save_weights(folder / "all.weights.h5")


# Functions of the caller's own, whose errors are theirs.
THEIR_OWN = {("evaluate judge", "a schedule"), ("evaluate judge", "a Keras layer")}


def outcome(model, folder: Path, argument: str, kind: str) -> str:
    """Try a pair: "works", "a sentence", or what was said instead."""
    value = KINDS[kind](folder)
    before = [variable.numpy() for variable in model.trainable_variables]
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            ARGUMENTS[argument](model, value)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        said = str(error)
        ours = place.startswith(LIBRARY) and len(said) > 15 and not NOT_OURS.search(said)
        return (
            "a sentence" if ours else f"{type(error).__name__} in {Path(place).name}: {said:.200}"
        )
    finally:
        # Some rates are as wild as they are allowed to be.
        for variable, array in zip(model.trainable_variables, before, strict=True):
            variable.assign(array)
    return "works"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A folder with what the kinds of paths name. The model gets adapters."""
    folder = tmp_path_factory.mktemp("kinds")
    gl.enable_lora(tiny)
    prepare(folder, tiny)
    return folder


PAIRS = [(name, kind) for name in ARGUMENTS for kind in KINDS if (name, kind) not in THEIR_OWN]


@settings(max_examples=80)
@given(pair=st.sampled_from(PAIRS))
@example(pair=("generate prompts", "messages"))
@example(pair=("fit train", "a path to records"))
@example(pair=("load preset", "a file of weights"))
def test_any_kind_for_any_argument_works_or_gets_a_sentence(tiny, folder, pair):
    assert outcome(tiny, folder, *pair) in ("works", "a sentence")


@pytest.mark.full
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_kind_for_an_argument_works_or_gets_a_sentence(tiny, folder, argument):
    kinds = [kind for name, kind in PAIRS if name == argument]
    found = {kind: outcome(tiny, folder, argument, kind) for kind in kinds}
    assert set(found.values()) <= {"works", "a sentence"}, found
