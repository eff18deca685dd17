"""What `setup` settles, what is held back while libraries work, and parameters."""

import ast
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import runtime


def run(code: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, which costs about 10 s of CPU."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ if environment is None else environment,
        timeout=300,
    )


# What only a fresh process can show


def test_a_script_that_loads_a_model_is_silent_but_for_its_own_warnings():
    unset = ("KERAS", "TF_", "XLA_PYTHON")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(unset)}
    result = run(
        "import gemma_lora as gl\n"
        "gl.setup(seed=3)\n"
        "gl.load()\n"
        "import keras, os, warnings\n"
        "print(keras.config.backend(), os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])\n"
        "warnings.warn('a real warning')",
        environment,
    )
    assert result.stdout == "jax 1.00\n", result.stderr
    assert result.stderr.splitlines()[0].endswith("UserWarning: a real warning")


@pytest.mark.full
def test_what_was_compiled_once_is_not_compiled_again(tmp_path):
    code = (
        "import gemma_lora as gl\n"
        "gl.setup(seed=0)\n"
        "model = gl.load()\n"
        "gl.enable_lora(model)\n"
        "gl.fit(model, gl.load_tiny_world()[0].select(range(8)), verbose=0)\n"
        "gl.generate(model, 'Why?')"
    )
    set_by_tests = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: text for name, text in os.environ.items() if name not in set_by_tests}
    environment["HOME"] = str(tmp_path)
    kept = []
    for _ in range(2):
        result = run(code, environment)
        assert result.returncode == 0, result.stderr
        files = [path.name for path in (tmp_path / ".cache/gemma_lora").rglob("*-cache")]
        # Smaller programs may take just as long as is worth keeping, or not.
        kept.append({name for name in files if "step" in name or "generate" in name})
    assert kept[0] == kept[1]
    for name in ("step", "generate"):
        assert any(name in file for file in kept[0])


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    """Pages fetched from the system in each step: tens of megabytes, or nearly none."""
    code = (
        "import gemma_lora as gl, resource\n"
        "gl.setup(seed=0)\n"
        "import keras\n"
        "model = gl.load()\n"
        "gl.enable_lora(model)\n"
        "faults = []\n"
        "def count(step, logs):\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "count = keras.callbacks.LambdaCallback(on_train_batch_end=count)\n"
        "records = gl.load_tiny_world()[0].select(range(400))\n"
        "gl.fit(model, records, batch_tokens=2048, callbacks=[count], verbose=0)\n"
        "print((faults[-1] - faults[4]) // (len(faults) - 5))"
    )
    environment = {name: text for name, text in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    kept = run(code, environment)
    fetched = run(code, environment | {"MALLOC_ARENA_MAX": "8"})
    assert kept.returncode == fetched.returncode == 0, kept.stderr + fetched.stderr
    assert int(kept.stdout) * 2 < int(fetched.stdout)


# `setup`


def test_a_memory_fraction_that_is_set_already_wins(monkeypatch):
    for name in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    runtime._set_environment("torch", 0.75)
    assert os.environ["KERAS_BACKEND"] == "torch"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.75"
    runtime._set_environment("jax", 1.0)
    assert os.environ["KERAS_BACKEND"] == "jax"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.75"


def test_too_late_for_another_backend_says_what_to_do(tiny):
    with pytest.raises(RuntimeError, match=r"running on 'jax' already.*Restart"):
        gl.setup(backend="tensorflow")


def test_setup_again_breaks_no_tokenizer_and_seeds_again(tiny):
    drawn = []
    for seed in (5, 5, 6):
        gl.setup(seed=seed)
        drawn.append((random.random(), np.random.rand()))
        assert runtime.default_seed == seed
    assert drawn[0] == drawn[1] != drawn[2]
    gl.setup(seed=0)
    assert len(tiny.preprocessor.tokenizer("The capital of France")) > 0
    assert gl.generate(tiny, "The capital of France is", template=None, max_new_tokens=1)
    tiny.generate("The capital of France is", max_length=16)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", True, None])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match="Received"):
        gl.setup(seed=seed)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home of its own, and JAX's settings as a learner's machine has them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    # What the test sets is taken back at the end: monkeypatch knows these names now.
    for name in ("COMPILATION_CACHE_DIR", "COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(f"JAX_{name}", "")
        monkeypatch.delenv(f"JAX_{name}")
    return tmp_path / "home"


def test_compiled_programs_are_kept_at_home_by_kind_of_cpu(home, monkeypatch):
    runtime._keep_compiled_programs()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.parent == home / ".cache/gemma_lora"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(runtime, "_cpu_name", lambda: "another")
    runtime._keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder.parent / "compiled-another")


def test_another_place_for_compiled_programs_wins(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    runtime._keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert not home.exists()


def test_a_home_that_cannot_be_written_is_no_obstacle(home, monkeypatch):
    home.write_text("a file")
    runtime._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    home.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    runtime._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo")
@pytest.mark.parametrize("word", ["flags", "Features"])
def test_a_cpu_is_named_by_its_instruction_sets_alone(monkeypatch, word):
    def name(clock: str, able: str) -> str:
        text = f"processor: 0\ncpu MHz: {clock}\n{word}: {able}\n"
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        return runtime._cpu_name()

    assert name("2000.1", "sse avx") == name("1999.7", "sse avx")
    assert name("2000.1", "sse avx") != name("2000.1", "sse avx avx512")


@pytest.mark.parametrize("system", ["glibc", "set by hand", "musl", "macOS"])
def test_the_c_library_is_tuned_only_where_nobody_else_has(monkeypatch, system):
    options = {}
    glibc = SimpleNamespace(mallopt=options.__setitem__)
    libc = {"musl": SimpleNamespace(), "macOS": None}.get(system, glibc)
    monkeypatch.setattr(runtime, "_libc", lambda: libc)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if system == "set by hand":
        monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    runtime._keep_freed_memory()
    assert options == ({-8: 1, -4: 0, -1: 2**31 - 1} if system == "glibc" else {})
    runtime.return_memory()


# What is held back


def test_only_known_chatter_on_stderr_is_held_back_errors_or_not(capfd):
    chatter = b"I0000 00:00:1.2 3 cudart_stub.cc:31] Could not find cuda drivers\n"
    with runtime.quiet():
        os.write(2, chatter + b"out of memory\n")
    assert capfd.readouterr().err == "out of memory\n"
    with pytest.raises(ImportError, match="no such library"), runtime.quiet():
        os.write(2, chatter + b"and then\n")
        raise ImportError("no such library")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "and then\nafterwards\n"


BUILD = (
    "`build()` was called on layer 'gemma_causal_lm', however the layer does not have a "
    "`build()` method implemented and it looks like it has unbuilt state."
)


def warn_from(module: str, text: str, *, caller: str | None = None) -> None:
    """Warn as a library's module does, or by `stacklevel` in the name of its caller."""
    code = "def warn(text, level):\n    warnings.warn(text, stacklevel=level)\n"
    library = {"__name__": module, "warnings": warnings}
    exec(compile(code, f"{module}.py", "exec"), library)
    if caller is None:
        library["warn"](text, 1)
        return
    outer = {"__name__": caller, "warn": library["warn"]}
    exec(compile("def call(text):\n    warn(text, 2)\n", f"{caller}.py", "exec"), outer)
    outer["call"](text)


@pytest.mark.parametrize(
    ("module", "caller", "text"),
    [
        ("keras.src.layers.layer", None, BUILD),
        ("keras_hub.src.models.gemma.gemma_backbone", None, "`layer_norm` is going to change"),
        ("keras.src.layers.layer", "keras_hub.src.models.causal_lm", BUILD),
        ("jax._src.xla_bridge", None, "a platform is experimental"),
        ("tensorflow.python.ops", None, "`name` is deprecated"),
        ("kagglehub", None, "`load_dataset` will be removed"),
        ("huggingface_hub.utils._deprecation", None, "Deprecated argument `proxies`"),
    ],
)
def test_what_a_library_warns_of_its_own_code_is_held_back(module, caller, text, recwarn):
    with runtime.quiet():
        warn_from(module, text, caller=caller)
    assert not recwarn.list
    warn_from(module, text, caller=caller)
    assert len(recwarn.list) == 1


@pytest.mark.parametrize(
    ("module", "caller", "text"),
    [
        ("__main__", None, BUILD),
        ("my_keras_layers", None, BUILD),
        ("gemma_lora.records", None, "Skipped 2 of 3 rows"),
        ("keras.src.layers.layer", "__main__", BUILD),
        ("keras.src.saving.saving_lib", None, "A total of 3 objects could not be loaded."),
        ("keras.src.saving.saving_lib", None, "no matching group found in the saved file"),
        ("huggingface_hub.file_download", None, "Not enough free disk space"),
        ("huggingface_hub.file_download", None, "no symlinks in\nthe folder of the cache"),
        ("huggingface_hub.constants", None, "HF_HUB_ENABLE_HF_TRANSFER is deprecated"),
        ("huggingface_hub.utils._auth", None, "Access to the secret was not granted"),
        ("jax._src.dtypes", None, "float64 is not available; set JAX_ENABLE_X64"),
    ],
)
def test_what_is_about_files_settings_or_code_of_the_user_is_passed_on(
    module, caller, text, recwarn
):
    with runtime.quiet():
        warn_from(module, text, caller=caller)
    assert [str(warning.message) for warning in recwarn.list] == [text]


def test_the_filters_in_force_decide_on_all_else_and_stay_as_they_were():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with runtime.quiet():
            warn_from("keras.src.layers.layer", BUILD)
            with pytest.raises(UserWarning, match="saved file"):
                warn_from("keras.src.saving", "the saved file is older")
        assert warnings.filters == before


# Parameters and names


def test_parameters_are_overridden_by_environment(monkeypatch, capsys):
    texts = {"PRESET": "gemma_2b_en", "ROWS": "50", "RATE": "1", "DEEP": "False", "lower": "x"}
    for name, text in texts.items():
        monkeypatch.setenv(f"GEMMA_LORA_{name}", text)
    namespace = {"PRESET": "tiny_gemma_en", "ROWS": 1000, "RATE": 1e-3, "DEEP": True}
    namespace |= {"lower": "y", "OTHER": 1}
    gl.override_parameters(namespace)
    assert namespace == {
        "PRESET": "gemma_2b_en",
        "ROWS": 50,
        "RATE": 1.0,
        "DEEP": False,
        "lower": "y",
        "OTHER": 1,
    }
    assert type(namespace["RATE"]) is float
    assert "ROWS = 50 (from GEMMA_LORA_ROWS)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["many", "1.5", "'1'", "True", ""])
def test_an_override_of_another_type_is_refused(monkeypatch, text):
    monkeypatch.setenv("GEMMA_LORA_ROWS", text)
    with pytest.raises(ValueError, match="GEMMA_LORA_ROWS"):
        gl.override_parameters({"ROWS": 1000})


def test_editors_see_the_names_that_load_lazily():
    """The imports under TYPE_CHECKING, which never run, against the table that does."""
    tree = ast.parse(Path(gl.__file__).read_text(encoding="utf-8"))
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.pop("exercises") == "gemma_lora"
    assert gl.exercises.__name__ == "gemma_lora.exercises"
    assert seen == {name: f"gemma_lora.{module}" for name, module in gl._MODULE_OF.items()}
