import os
import random
import subprocess
import sys

import numpy as np
import pytest

import gemma_lora as gl
from gemma_lora import runtime

QUIET = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("KERAS", "TF_", "XLA_PYTHON"))
}


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**QUIET, **environment},
        timeout=120,
    )


def test_setup_settles_the_backend_and_memory_and_isquiet():
    result = run(
        "import gemma_lora as gl; gl.setup(seed=3); import keras, os, warnings\n"
        "print(keras.config.backend(), os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])\n"
        "warnings.warn('a real warning')"
    )
    assert result.stdout == "jax 1.00\n"
    assert result.stderr.splitlines()[0].endswith("UserWarning: a real warning")


def test_what_is_no_chatter_is_passed_on_and_errors_too():
    code = (
        "import os, sys; from gemma_lora.runtime import quiet\n"
        "with quiet():\n"
        "    os.write(2, b'I0000 00:00:1.2 3 cudart_stub.cc:31] Could not find cuda drivers\\nout of memory\\n')\n"
        "with quiet():\n"
        "    raise ImportError('no such library')"
    )
    error = run(code).stderr
    assert "cudart" not in error
    assert "out of memory" in error
    assert "no such library" in error


def test_too_late_for_another_backend_says_what_to_do():
    result = run(
        "import keras, gemma_lora as gl\ntry:\n    gl.setup()\nexcept RuntimeError as error:\n    print(error)",
        KERAS_BACKEND="tensorflow",
    )
    assert "running on 'tensorflow' already" in result.stdout
    assert "Restart" in result.stdout


def test_a_memory_fraction_that_is_set_already_wins():
    code = "import gemma_lora as gl, os; gl.setup(); print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"
    assert run(code, XLA_PYTHON_CLIENT_MEM_FRACTION="0.50").stdout == "0.50\n"


def test_setup_again_breaks_no_tokenizer_and_seeds_anew(tiny):
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


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match="Received"):
        gl.setup(seed=seed)


def test_parameters_are_overridden_by_environment(monkeypatch, capsys):
    for name, text in {
        "PRESET": "gemma_2b_en",
        "ROWS": "50",
        "RATE": "1",
        "DEEP": "False",
        "lower": "x",
    }.items():
        monkeypatch.setenv(f"GEMMA_LORA_{name}", text)
    namespace = {
        "PRESET": "tiny_gemma_en",
        "ROWS": 1000,
        "RATE": 1e-3,
        "DEEP": True,
        "lower": "y",
        "OTHER": 1,
    }
    gl.override_parameters(namespace)
    assert namespace == {
        "PRESET": "gemma_2b_en",
        "ROWS": 50,
        "RATE": 1.0,
        "DEEP": False,
        "lower": "y",
        "OTHER": 1,
    }
    assert "ROWS = 50 (from GEMMA_LORA_ROWS)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["many", "1.5", "'1'", ""])
def test_an_override_of_another_type_is_refused(monkeypatch, text):
    monkeypatch.setenv("GEMMA_LORA_ROWS", text)
    with pytest.raises(ValueError, match="GEMMA_LORA_ROWS"):
        gl.override_parameters({"ROWS": 1000})


def test_what_was_compiled_once_is_not_compiled_again(tmp_path):
    code = (
        "import gemma_lora as gl; gl.setup(seed=0); model = gl.load(); gl.enable_lora(model); "
        "gl.fit(model, gl.load_tiny_world()[0].select(range(8)), verbose=0); gl.generate(model, 'Why?')"
    )
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in own} | {
        "HOME": str(tmp_path)
    }
    kept = []
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env=environment
        )
        files = [path.name for path in (tmp_path / ".cache/gemma_lora").rglob("*-cache")]
        kept.append({name for name in files if "pure_step" in name or "generate" in name})
    assert kept[0] == kept[1]
    for name in ("pure_step", "generate_function"):
        assert any(name in file for file in kept[0])


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX")
def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "home").write_text("a file")
    code = "import gemma_lora as gl; gl.setup(seed=0); import os; print(os.environ.get('JAX_COMPILATION_CACHE_DIR'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["HOME"] = str(tmp_path / "home")
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert ran.stdout.strip() == "None", ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    """Pages fetched from the system anew in each step, with and without: tens of megabytes, or next to nothing."""
    code = (
        "import gemma_lora as gl, resource; gl.setup(seed=0); import keras; model = gl.load(); gl.enable_lora(model); "
        "faults = []; count = lambda step, logs: faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt); "
        "count = keras.callbacks.LambdaCallback(on_train_batch_end=count); "
        "gl.fit(model, gl.load_tiny_world()[0].select(range(400)), batch_tokens=2048, callbacks=[count], verbose=0); "
        "print((faults[-1] - faults[4]) // (len(faults) - 5))"
    )
    pages = {}
    for kept in (True, False):
        environment = {
            name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"
        }
        environment |= {} if kept else {"MALLOC_ARENA_MAX": "8"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        pages[kept] = int(done.stdout)
    assert pages[True] * 2 < pages[False]
