"""`gl.memory_budget`: its counts beside KerasHub's, its peaks beside measured ones.

And what is said when memory runs out.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import keras_hub
import pytest
from families import EACH_FAMILY
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_lora as gl
from gemma_lora import memory
from gemma_lora.lora import ALL_LINEAR
from gemma_lora.memory import DEVICES, GEOMETRIES, GIB, Need, Parts
from gemma_lora.models import recommended

HERE = Path(__file__).parent
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of a process is read from /proc"
)
PRESETS = keras_hub.models.GemmaCausalLM.presets | keras_hub.models.Gemma3CausalLM.presets
# It has no decoder.
EMBEDDERS = {"embedding_gemma3_300m"}
FULL = pytest.mark.full


def some(values, quick) -> list:
    """All values as parameters: the quick run takes some, the full run the others."""
    return [value if value in quick else pytest.param(value, marks=FULL) for value in values]


def need_of(size: str, num_layers: int | None = None, **settings) -> Need:
    geometry = GEOMETRIES[size]
    if num_layers:
        geometry = geometry | {"num_layers": num_layers}
    defaults = {
        "rank": 4,
        "targets": ("query", "value"),
        "sequence_length": 256,
        "batch_size": 1,
        "dtype": "float32",
        "prompts": 1,
    }
    return Need(size, geometry, **{**defaults, **settings})


# The table of geometries


@pytest.mark.parametrize("size", some(GEOMETRIES, ["gemma2_2b", "gemma3_270m"]))
def test_a_geometry_has_as_many_parameters_as_the_model_that_keras_hub_builds_of_it(size):
    need, counts = need_of(size), []
    jax.eval_shape(lambda: counts.append(need.build().count_params()))
    assert counts == [need.parameters]


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - EMBEDDERS))
def test_every_preset_of_keras_hub_has_the_count_that_keras_hub_says(preset):
    budget = gl.memory_budget(preset, compile=False)
    vision = PRESETS[preset]["metadata"]["params"] - budget.parameters
    assert 410e6 < vision < 430e6 if budget.vision else vision == 0
    assert ("text part alone" in str(budget)) == budget.vision


def test_a_handle_is_known_as_its_name_is():
    handle = PRESETS["gemma2_2b_en"]["kaggle_handle"]
    assert gl.memory_budget(handle, compile=False).parameters == 2_614_341_888


@pytest.mark.parametrize("preset", sorted(EMBEDDERS & PRESETS.keys()))
def test_what_is_no_decoder_is_a_value_error(preset):
    with pytest.raises(ValueError, match="not known without downloading"):
        gl.memory_budget(preset, compile=False)


@pytest.mark.parametrize(
    # The first two as Keras's guides show them.
    ("preset", "targets", "trainable"),
    [
        ("gemma_2b_en", "query_value", 1_363_968),
        ("gemma2_2b_en", "query_value", 2_928_640),
        ("gemma_2b_en", "all_linear", 5_806_080),
    ],
)
def test_adapters_are_counted_as_published(preset, targets, trainable):
    assert gl.memory_budget(preset, targets=targets, compile=False).need.trainable == trainable


@pytest.mark.parametrize(
    "targets",
    [
        "all_linear",
        pytest.param("query_value", marks=FULL),
        pytest.param(["attention_output", "ffw_linear"], marks=FULL),
    ],
)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_adapters_are_counted_as_enable_lora_makes_them(random_model, family, targets):
    model = random_model(family)
    before = gl.memory_budget(model, rank=3, targets=targets, compile=False).need
    assert before.parameters == model.count_params()
    summary = gl.enable_lora(model, rank=3, targets=targets)
    assert (
        before.trainable
        == gl.memory_budget(model, compile=False).need.trainable
        == summary.trainable
    )


# Settings


@pytest.mark.parametrize(
    "preset", ["tiny_gemma_en", "gemma_2b_en", "gemma_instruct_2b_en", "gemma3_1b"]
)
def test_what_is_left_open_is_what_load_and_fit_use(preset):
    need, settings = gl.memory_budget(preset, compile=False).need, recommended(preset)
    assert (need.dtype, need.sequence_length) == (settings.dtype, settings.sequence_length)
    assert need.batch_size == max(1, settings.batch_tokens // settings.sequence_length)


def test_a_model_a_folder_and_a_name_have_the_same_budget(tiny, tmp_path):
    tiny.save_to_preset(str(tmp_path / "tiny"))
    named = gl.memory_budget("tiny_gemma_en", batch_size=2, sequence_length=128, compile=False)
    for same in (tiny, tmp_path / "tiny"):
        budget = gl.memory_budget(same, batch_size=2, sequence_length=128, compile=False)
        assert (
            budget.parts == named.parts
            and budget.parameters == named.parameters == tiny.count_params()
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "gemma_3b_en"}, "No preset or folder"),
        ({"preset": "gpt2_base_en"}, "not known without downloading"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": -1}, "sequence_length=-1"),
        ({"prompts": True}, "prompts=True"),
        ({"dtype": "int8"}, '"float32", "bfloat16"'),
        ({"targets": "queries"}, "query"),
    ],
)
def test_what_makes_no_sense_is_a_value_error(options, words):
    with pytest.raises(ValueError, match=words):
        gl.memory_budget(**{"preset": "gemma_2b_en", "compile": False, **options})


def test_a_folder_of_another_model_is_a_value_error(tmp_path):
    (tmp_path / "config.json").write_text('{"class_name": "GPT2Backbone", "config": {}}')
    with pytest.raises(ValueError, match=r"Gemma 1, 2 and 3.*GPT2Backbone"):
        gl.memory_budget(tmp_path, compile=False)


def test_the_parts_are_attributes_and_add_up():
    budget = gl.memory_budget("gemma_2b_en", compile=False)
    assert budget.weights == 4 * budget.parameters
    assert (budget.adapters, budget.gradients, budget.optimizer) == tuple(
        n * 1_363_968 for n in (4, 4, 8)
    )
    assert budget.training == sum(getattr(budget, part) for part in Parts.__dataclass_fields__)
    with pytest.raises(AttributeError, match=r"no 'wieghts'\. Its parts: weights"):
        _ = budget.wieghts


# Compiled


def test_the_compiler_is_asked_without_a_weight():
    """Of two layers only, to save time."""
    need = need_of("gemma3_270m", num_layers=2)
    need.compiled()
    gc.collect()
    before = len(jax.live_arrays())
    parts, generation = need.compiled()
    gc.collect()
    assert len(jax.live_arrays()) == before
    assert parts.weights == 4 * need.parameters
    assert parts.total == pytest.approx(need.count_training().total, rel=0.2)
    assert generation == pytest.approx(need.count_answering(), rel=0.15)


@pytest.mark.full
def test_gemma_2b_is_compiled_in_a_fraction_of_its_weights():
    # Some things are kept from a first time.
    gl.memory_budget("tiny_gemma_en", sequence_length=64)
    gc.collect()
    before, resident = len(jax.live_arrays()), memory.psutil.Process().memory_info().rss
    budget = gl.memory_budget("gemma_2b_en")
    gc.collect()
    assert [row["from"] for row in budget.devices()] == ["compiled", *["estimate"] * len(DEVICES)]
    assert len(jax.live_arrays()) == before
    assert memory.psutil.Process().memory_info().rss - resident < 2 * GIB < budget.weights
    assert budget.weights == 4 * 2_506_172_416
    assert budget.training == pytest.approx(budget.estimate.total, rel=0.15)
    assert budget.generation == pytest.approx(budget.estimated_generation, rel=0.15)


def test_a_budget_leaves_seed_and_names_as_they_were(tiny_factory):
    gl.setup(seed=0)
    first = gl.enable_lora(tiny_factory()).seed
    gl.setup(seed=0)
    gl.memory_budget("tiny_gemma_en", sequence_length=64)
    model = tiny_factory()
    assert gl.enable_lora(model).seed == first
    assert gl.generate(
        model, "What is the capital of France?", sampler="top_k", seed=1, max_new_tokens=4
    )


# In float32 alone: a CPU computes bfloat16 in float32, and XLA reserves room for that.
@pytest.mark.full
@pytest.mark.parametrize("size", ["gemma2_2b", "gemma3_270m", "gemma3_1b", "vault_gemma_1b"])
def test_the_estimate_is_near_to_what_the_compiler_reserves(size):
    need = need_of(size)
    compiled, counted = need.compiled()[0].total, need.counted()[0].total
    assert counted == pytest.approx(compiled, rel=0.15)


@pytest.mark.full
@LINUX
@pytest.mark.parametrize(("which", "rows"), [("quick", 2), ("full", 18)])
def test_compiled_peaks_are_within_a_tenth_of_measured_ones(which, rows):
    """In a process of its own, whose memory nothing else fills."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "measure_memory.py"), which]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == rows
    print(ran.stdout)
    for row in found:
        assert row["compiled"] == pytest.approx(row["measured"], rel=0.1), row


# Devices


def test_the_recipe_fits_a_t4_also_at_twice_the_length():
    fits = {}
    for length in (256, 512, 1024):
        row = next(
            row
            for row in gl.memory_budget(
                "gemma_2b_en", sequence_length=length, compile=False
            ).devices()
            if row["device"] == "T4"
        )
        fits[length] = row["fits"]
        assert bool(row["nearest that fits"]) == (row["fits"] == "no")
    assert fits == {256: "yes", 512: "yes", 1024: "no"}


def test_where_it_does_not_fit_a_larger_device_or_less_is_named():
    rows = {row["device"]: row for row in gl.memory_budget("gemma_7b_en", compile=False).devices()}
    assert [rows[device]["fits"] for device in ("T4", "L4", "A100 40 GB", "A100 80 GB")] == [
        "no",
        "no",
        "yes",
        "yes",
    ]
    assert rows["L4"]["nearest that fits"] == "dtype='bfloat16'"
    assert rows["T4"]["nearest that fits"] == (
        "no setting of this preset; a smaller preset is gemma3_270m"
    )
    smallest = budget_of(need_of("gemma3_270m"))
    assert smallest.in_words(smallest.nearest(GIB / 4)).endswith("free memory first")


@pytest.mark.parametrize(
    ("settings", "gib", "changes"),
    [
        ({}, 16, {}),
        ({"batch_size": 8}, 16, {"batch_size": 2}),
        ({"batch_size": 2, "sequence_length": 2048}, 14, {"batch_size": 1, "sequence_length": 256}),
        ({"batch_size": 8}, 10, {"batch_size": 4, "dtype": "bfloat16"}),
        ({"prompts": 512, "batch_size": 2}, 16, {"prompts": 64}),
        ({"sequence_length": 80, "dtype": "bfloat16"}, 5.4, {"sequence_length": 64}),
        ({}, 2, None),
    ],
)
def test_first_the_batch_is_halved_then_the_length_then_bfloat16(settings, gib, changes):
    assert budget_of(need_of("gemma_2b", **settings)).nearest(gib * GIB) == changes


def needs():
    return st.builds(
        need_of,
        st.sampled_from(sorted(GEOMETRIES)),
        rank=st.integers(1, 64),
        targets=st.sampled_from([("query", "value"), ("key",), ALL_LINEAR]),
        sequence_length=st.integers(1, 4096),
        batch_size=st.integers(1, 64),
        dtype=st.sampled_from(
            ["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]
        ),
        prompts=st.integers(1, 64),
    )


def budget_of(need: Need) -> memory.MemoryBudget:
    return memory.MemoryBudget(need, *need.counted(), compiled=False, vision=False)


@settings(max_examples=60)
@given(needs(), st.floats(0.5, 80), st.booleans(), st.booleans())
def test_what_is_said_to_fit_fits_by_the_same_estimate(need, size, bfloat16, answering):
    budget = budget_of(need)
    changes = budget.nearest(size * GIB, bfloat16=bfloat16, answering=answering)
    if changes is None:
        least = {"batch_size": 1, "prompts": 1, "sequence_length": min(need.sequence_length, 64)}
        changed = replace(need, **least)
        assert not fits(changed, 0.95 * size, answering)
        return
    changed = replace(need, **changes)
    assert fits(changed, 0.95 * size, answering)
    assert all(getattr(changed, name) != getattr(need, name) for name in changes)
    assert bfloat16 or "dtype" not in changes
    assert not (answering and "batch_size" in changes)


def fits(need: Need, gib: float, answering: bool) -> bool:
    parts, generation = need.counted()
    return generation <= gib * GIB and (answering or parts.total <= gib * GIB)


@settings(max_examples=60)
@given(needs(), st.sampled_from(["rank", "sequence_length", "batch_size", "prompts"]))
def test_more_of_anything_never_needs_less(need, what):
    more = replace(need, **{what: 2 * getattr(need, what)})
    assert more.counted()[0].total >= need.counted()[0].total
    assert more.counted()[1] >= need.counted()[1]


# Shown


def test_it_shows_as_a_table_and_as_a_picture():
    budget = gl.memory_budget("gemma_2b_en", compile=False)
    assert "T4" in str(budget) and "<table" in budget._repr_html_()
    figure = gl.plot_memory(budget)
    axes = figure.axes[0]
    assert axes.get_legend().get_texts()[0].get_text() == "weights"
    widths = [sum(bar.get_width() for bar in bars) for bars in zip(*axes.containers, strict=True)]
    assert widths == pytest.approx([budget.training / GIB, budget.generation / GIB])
    assert "T4" in [text.get_text() for text in axes.texts]


# Memory that runs out

RUN_OUT = """
import resource, sys
from pathlib import Path
import gemma_lora as gl

gl.setup(seed=0)
model = gl.load()
gl.enable_lora(model)
rows = list(gl.load_tiny_world()[0].select(range(64)))
gl.fit(model, rows[:16], verbose=0)
question, before = rows[0]["instruction"], model.get_weights()
answer = gl.generate(model, question)
status = Path("/proc/self/status").read_text().splitlines()
size = next(line.split()[1] for line in status if "VmSize" in line)
_, hard = resource.getrlimit(resource.RLIMIT_AS)


def refused(what, *given, **options):
    resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + 300 * 2**20, hard))
    try:
        what(*given, **options)
    except MemoryError as error:
        print(error)
    else:
        print("enough")
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(all((one == other).all() for one, other in zip(model.get_weights(), before, strict=True)))
    print(gl.generate(model, question) == answer)


long = [{"instruction": "a b c " * 20, "context": "", "response": "d e f " * 60}] * 64
refused(gl.fit, model, long, batch_size=64, verbose=0)
gl.fit(model, rows[:16], learning_rate=1e-9, weight_decay=0.0, verbose=0)
before = model.get_weights()
refused(gl.generate, model, [question] * 64, max_new_tokens=3000)
"""


@pytest.mark.full
@LINUX
def test_out_of_memory_names_what_fits_and_the_model_is_as_before():
    ran = subprocess.run(
        [sys.executable, "-c", RUN_OUT], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    print(ran.stdout)
    training, *same, answering, same_too, answers = ran.stdout.splitlines()
    assert same == ["True", "True"] and [same_too, answers] == ["True", "True"]
    assert training.startswith("Out of memory while training with batch_size=64, sequence_length=")
    assert (
        answering.startswith("Out of memory while answering with ")
        and "prompts asked at once: " in answering
    )
    for sentence in (training, answering):
        assert "GiB" in sentence and "Nearest that should fit: " in sentence
        assert sentence.endswith(
            "The model is as it was before this call, and need not be loaded again."
        )


def test_another_error_stays_what_it_is(tiny):
    with pytest.raises(KeyError), memory.explained_out_of_memory(tiny, answering=True, prompts=1):
        raise KeyError("a")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")]
)
def test_the_advice_is_less_than_what_did_not_fit(tiny_lora, error):
    asked = {"batch_size": 8, "sequence_length": 256}
    refused = pytest.raises(MemoryError, match="batch_size=8, sequence_length=256")
    with refused as raised, memory.explained_out_of_memory(tiny_lora, answering=False, **asked):
        raise error
    advice = str(raised.value).partition("Nearest that should fit: ")[2].partition(". ")[0]
    assert advice == "batch_size=4"
    assert raised.value.__cause__.__traceback__ is None
