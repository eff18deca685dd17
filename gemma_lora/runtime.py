"""What must be settled before Keras is imported: backend, memory, seeds, and quiet."""

import ast
import ctypes
import hashlib
import os
import platform
import random
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# The seed of the last `setup`: what `seed=None` means elsewhere.
default_seed = 0

# What TensorFlow and absl say on every import, whatever the machine; other lines on stderr are passed on.
_CHATTER = re.compile(
    r"WARNING: All log messages before absl|\s*$|To enable the following instructions|normalizer.cc\(\d+\) LOG\(INFO\)|"
    r"([IWE]\d{4}\s|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] )"
    r".*(oneDNN|cudart|cuda_platform|cuda drivers|cpu_feature_guard|computation_placer|register|factory|TF-TRT|plugin)"
)


def setup(*, seed: int = 0, backend: str = "jax", memory_fraction: float = 1.0) -> None:
    """Settle backend, GPU memory and seeds. Call it first; calling it again is harmless, too late is a RuntimeError.

    It also has JAX keep what it compiles, in ~/.cache/gemma_lora, so that a second run need not wait for it;
    `JAX_COMPILATION_CACHE_DIR` and the settings beside it win.

    Args:
        seed: Seeds Python, NumPy and Keras, and is what every helper's `seed=None` means. Once keras_hub is imported
            only the former and the helpers are seeded anew: reseeding TensorFlow would break tokenizers that exist.
        backend: "jax", "tensorflow" or "torch". Training and generation are tested on "jax".
        memory_fraction: Share of a GPU's memory that JAX reserves at the start, in one piece, which leaves no
            fragments. `XLA_PYTHON_CLIENT_MEM_FRACTION`, if it is set already, wins.
    """
    global default_seed
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is a whole number from 0 to 4294967295. Received: seed={seed!r}")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory_fraction:.2f}")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        _keep_what_is_compiled()
        _keep_memory()
    with quiet():
        import keras

        if keras.config.backend() != backend:
            raise RuntimeError(
                f"Keras is running on {keras.config.backend()!r} already, and cannot change to {backend!r}. Restart "
                f"the runtime (Colab: Runtime > Restart session) and call gl.setup() before anything imports keras."
            )
        if "keras_hub" not in sys.modules:
            keras.utils.set_random_seed(seed)
            import keras_hub  # noqa: F401  (here, while it is quiet: its import is what chatters)
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    default_seed = seed


def _keep_what_is_compiled() -> None:
    """Have JAX keep compiled programs on disk, so that a second run need not wait for them. Its own settings win."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cpu = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else platform.processor()
    able = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), cpu)
    # A program compiled for one CPU may end another's process, and a home can be shared.
    folder = (
        Path.home()
        / ".cache/gemma_lora"
        / f"compiled-{hashlib.sha256(able.encode()).hexdigest()[:8]}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read-only
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))


def _keep_memory() -> None:
    """Have the C library keep the memory that a step frees, for the next step: `MALLOC_ARENA_MAX`, if set, wins.

    Otherwise each step's scratch memory is fetched from the system anew, page by page, which takes a third of a step.
    """
    libc = (
        ctypes.CDLL(None)
        if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ
        else None
    )
    if hasattr(libc, "mallopt"):
        for option, value in (
            (-8, 1),
            (-4, 0),
            (-1, 2**31 - 1),
        ):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def return_memory() -> None:
    """Give memory that is free back to the system, where the C library kept it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def quiet():
    """Hold back what C++ libraries write to stderr; pass on whatever is not known chatter."""
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines():
                if not _CHATTER.match(line):
                    print(line, file=sys.stderr)


def override_parameters(namespace: dict) -> None:
    """Let environment variables replace a notebook's parameters: `GEMMA_LORA_PRESET` replaces `PRESET`, and so on.

    Only names in UPPER_CASE that hold a str, int, float or bool count. `namespace` is the notebook's `globals()`; a
    text that is not of the parameter's type is a ValueError.
    """
    for name, value in list(namespace.items()):
        text = os.environ.get(f"GEMMA_LORA_{name}")
        if text is None or not name.isupper() or not isinstance(value, str | int | float):
            continue
        try:
            new = text if isinstance(value, str) else ast.literal_eval(text)
            if type(new) is not type(value) and not (isinstance(value, float) and type(new) is int):
                raise ValueError
        except (ValueError, SyntaxError):
            kind = type(value).__name__
            raise ValueError(
                f"GEMMA_LORA_{name} replaces the parameter {name}, a {kind} such as {value!r}. Received: {text!r}"
            ) from None
        namespace[name] = type(value)(new)
        print(f"{name} = {namespace[name]!r} (from GEMMA_LORA_{name})")
