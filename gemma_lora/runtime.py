"""Prepare Python before Keras is imported: backend, seeds, memory, quiet imports.

`setup` comes first in every notebook and `override_parameters` in every parameters
cell. `quiet` is for the library itself. The two tricks that make a second run faster,
kept programs and kept memory, stand at the end: nothing else depends on them. This
module knows nothing about models, data or training.
"""

import ast
import ctypes
import hashlib
import os
import platform
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Literal

from gemma_lora.options import with_options

# The seed of the last `setup`: what `seed=None` means everywhere else.
default_seed = 0


def checked_seed(seed: int | None) -> int:
    """Return a seed as Python's integer; None is the seed of `setup`.

    Raises:
        ValueError: It is no whole number from 0 to 4294967295.
    """
    if seed is None:
        return default_seed
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed is a whole number from 0 to 4294967295. Received: seed={seed!r:.80}"
        )
    return int(seed)


@with_options
def setup(
    *,
    seed: int = 0,
    backend: Literal["jax", "tensorflow", "torch"] = "jax",
    memory_fraction: float = 1.0,
) -> None:
    """Choose the backend, reserve GPU memory and set the seeds.

    Call it first, before anything imports Keras. You may call it again, for example
    with another seed. It also lets JAX keep compiled programs in `~/.cache/gemma_lora`,
    so that a second run need not wait for the compiler. `JAX_COMPILATION_CACHE_DIR`, if
    it is set, wins over that folder.

    Args:
        seed: Seeds Python, NumPy and Keras, and is what `seed=None` means in every
            helper. Once keras_hub is imported, only Python, NumPy and the helpers get
            the new seed: reseeding TensorFlow would break tokenizers that exist
            already.
        backend: "jax", "tensorflow" or "torch". Training and generation are tested on
            "jax" only.
        memory_fraction: Share of a GPU's memory that JAX reserves at the start, in one
            piece, so that it does not fragment. `XLA_PYTHON_CLIENT_MEM_FRACTION`, if it
            is set, wins.

    Raises:
        ValueError: `seed` is not a whole number from 0 to 4294967295.
        RuntimeError: Keras was already imported with another backend.
    """
    global default_seed
    if seed is None:
        # Elsewhere None means the seed that is set here.
        raise ValueError("seed is a whole number from 0 to 4294967295. Received: seed=None")
    seed = checked_seed(seed)
    if "keras" not in sys.modules:
        _set_environment(backend, memory_fraction)
        _keep_compiled_programs()
        _keep_freed_memory()
    with quiet():
        import keras

        running = keras.config.backend()
        if running != backend:
            raise RuntimeError(
                f"Keras is running on {running!r} already, and cannot change to {backend!r}. "
                "Restart the runtime (Colab: Runtime > Restart session) and call gl.setup() "
                "before anything imports keras."
            )
        if "keras_hub" not in sys.modules:
            keras.utils.set_random_seed(seed)
            # Imported here because this import is the noisy one, and here it is quiet.
            import keras_hub  # noqa: F401
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    default_seed = seed


def _set_environment(backend: str, memory_fraction: float) -> None:
    """Set what Keras, JAX and TensorFlow read once, when they are imported."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory_fraction:.2f}")
    # Of TensorFlow's lines on stderr, only errors.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def override_parameters(namespace: dict) -> None:
    """Let environment variables replace a notebook's parameters.

    `GEMMA_LORA_PRESET` replaces `PRESET`, `GEMMA_LORA_ROWS` replaces `ROWS`, and so on.
    Only names in UPPER_CASE that hold a str, int, float or bool can be replaced.

    Args:
        namespace: The notebook's `globals()`. It is changed in place.

    Raises:
        ValueError: The variable's text is not of the parameter's type.
    """
    for name, value in list(namespace.items()):
        text = os.environ.get(f"GEMMA_LORA_{name}")
        # A bool is also an int.
        if text is None or not name.isupper() or not isinstance(value, str | int | float):
            continue
        try:
            namespace[name] = _parsed_like(value, text)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"GEMMA_LORA_{name} replaces the parameter {name}, a {type(value).__name__} "
                f"such as {value!r}. Received: {text!r}"
            ) from None
        print(f"{name} = {namespace[name]!r} (from GEMMA_LORA_{name})")


def _parsed_like(value: str | int | float, text: str) -> str | int | float:
    """Turn a text into a value of the same type. Raises ValueError or SyntaxError.

    >>> _parsed_like(0.5, "1"), _parsed_like(True, "False")
    (1.0, False)
    """
    if isinstance(value, str):
        return text
    parsed = ast.literal_eval(text)
    # Who writes 1 for a learning rate means 1.0. No other type stands for another.
    if isinstance(value, float) and type(parsed) is int:
        return float(parsed)
    if type(parsed) is not type(value):
        raise ValueError(text)
    return parsed


# Lines that TensorFlow and absl print on every import, on every machine.
_CHATTER = re.compile(
    r"WARNING: All log messages before absl"
    r"|\s*$"
    r"|To enable the following instructions"
    r"|normalizer.cc\(\d+\) LOG\(INFO\)"
    # A severity and a time, in either of two forms, and then one of these words.
    r"|([IWE]\d{4}\s|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] )"
    r".*(oneDNN|cudart|cuda_platform|cuda drivers|cpu_feature_guard|computation_placer"
    r"|register|factory|TF-TRT|plugin)"
)

# The libraries that work inside `gl.load`. A warning belongs to the module that Python
# attributes it to; a library that blames its caller says so with `stacklevel`.
_LIBRARIES = r"(keras|keras_hub|jax|jaxlib|tensorflow|kagglehub|huggingface_hub)(\.|$)"

# Words for things that belong to the user: files, disk, tokens, environment variables
# (the last in capitals: filters ignore case otherwise), and weights that do not fit.
_YOURS = (
    r"\b(files?|folders?|director(y|ies)|paths?|disks?|tokens?|secrets?"
    r"|not be loaded|(?-i:[A-Z]{2,}_[A-Z0-9_]+))\b"
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back known chatter: lines of C++ libraries on stderr, and library warnings.

    What is written to stderr is passed on at the end, without the lines that TensorFlow
    and absl write on every import. For warnings see `quiet_warnings`.
    """
    # C++ does not write to `sys.stderr` but to file descriptor 2. So for a while
    # descriptor 2 is a temporary file.
    real = os.dup(2)
    with quiet_warnings(), tempfile.TemporaryFile() as held:
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


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Hold back what libraries warn of in their own code.

    An example is the layer without `build()` that KerasHub 0.29 loads with each model.

    The rule: a warning is held back if a library raised it (Keras, KerasHub, JAX,
    TensorFlow, kagglehub, huggingface_hub) and its text names nothing of the user's: no
    file or folder, no disk, no token or secret, no environment variable, no weights
    that could not be loaded. Every other warning follows the filters that are in force.

    >>> import warnings
    >>> def warn_as(module, text):
    ...     warnings.warn_explicit(text, UserWarning, "layer.py", 1, module=module)
    >>> with warnings.catch_warnings(record=True) as caught, quiet_warnings():
    ...     warn_as("keras.src.layers", "`build()` was called on layer 'x'")
    ...     warn_as("keras.src.saving", "The file model.weights.h5 holds no bias")
    ...     warn_as("__main__", "`build()` was called on layer 'x'")
    >>> [str(warning.message) for warning in caught]
    ['The file model.weights.h5 holds no bias', "`build()` was called on layer 'x'"]
    """
    # Not thread-safe: the filters belong to the whole process, and each thread that
    # leaves puts back those that it found. If two threads overlap here, the filter of
    # one may stay after both have left (it goes on holding back library warnings, and
    # nothing else), and a filter that a third thread adds meanwhile is lost. A lock
    # would be worse: one thread would wait for the download of another.
    with warnings.catch_warnings():
        # One filter for the whole rule: "ignore", unless the text names something of
        # the user's. For all other warnings the filters behind it decide, as they did
        # before.
        warnings.filterwarnings("ignore", message=rf"(?s)(?!.*{_YOURS})", module=_LIBRARIES)
        yield


def return_memory() -> None:
    """Return free memory to the system, where the C library kept it (see below)."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


# From here on: two tricks that save time and change no result.


def _keep_compiled_programs() -> None:
    """Let JAX keep compiled programs on disk, unless its own setting says where.

    A folder that cannot be made or written, such as in a read-only home, is no error:
    then nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path.home() / f".cache/gemma_lora/compiled-{_cpu_name()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # Keep whatever took longer than a blink, up to 1 GiB in all.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))


def _cpu_name() -> str:
    """Name what this CPU can do, in 8 letters: a hash of its instruction sets.

    Machines can share a home folder. A program that was compiled for one CPU may use
    instructions that another lacks, and the process would die of them. So each kind of
    CPU gets a folder of its own.
    """
    if sys.platform != "linux":
        able = platform.processor()
    else:
        info = Path("/proc/cpuinfo").read_text()
        # x86 lists its instruction sets as "flags", Arm as "Features". The rest of the
        # file changes from second to second (the clock rate, for one).
        lines = [line for line in info.splitlines() if line.startswith(("flags", "Features"))]
        able = lines[0] if lines else info
    return hashlib.sha256(able.encode()).hexdigest()[:8]


def _keep_freed_memory() -> None:
    """Let the C library keep what a training step frees, for the next step.

    By default glibc returns large blocks to the system when they are freed. The next
    step then gets the same memory page by page, and the system zeroes each page: that
    took a third of a step. `MALLOC_ARENA_MAX`, if it is set, says that somebody has
    tuned glibc already, so we leave it alone.
    """
    libc = _libc()
    if "MALLOC_ARENA_MAX" in os.environ or not hasattr(libc, "mallopt"):
        return
    # The numbers of the options are those of glibc's malloc.h.
    # M_ARENA_MAX = 1: all threads share one pool, so each can use what another freed.
    libc.mallopt(-8, 1)
    # M_MMAP_MAX = 0: take no large block from the system by itself; such blocks are
    # returned when they are freed.
    libc.mallopt(-4, 0)
    # M_TRIM_THRESHOLD = 2 GiB: do not return the top of the pool before that much is
    # free.
    libc.mallopt(-1, 2**31 - 1)


def _libc() -> ctypes.CDLL | None:
    """Return the C library of Linux, which need not be glibc; None elsewhere."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None
