"""Settle what the libraries under test read once, at import, and provide models.

How notebooks become tests stands in notebooks/conftest.py.
"""

import contextlib
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hub_server import HubServer

# One Hub and one cache for every process of the test run. Values that are there already
# are overwritten: a worker of xdist inherits the environment of the process that
# started it.
HUB = HubServer()
HUB.start()
HF_HOME = tempfile.mkdtemp(prefix="gemma_lora_tests_")
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=HF_HOME,
    HF_HUB_CACHE=f"{HF_HOME}/hub",
    HF_DATASETS_CACHE=f"{HF_HOME}/datasets",
    HF_HUB_OFFLINE="0",
    HF_DATASETS_OFFLINE="0",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    NO_PROXY="127.0.0.1",
    no_proxy="127.0.0.1",
    KERAS_BACKEND="jax",
    # Tests compile much the same programs in many processes, and again in the next run:
    # one cache serves them all. With a size limit JAX locks its files, so no worker
    # reads half a program.
    JAX_COMPILATION_CACHE_DIR=str(Path(__file__).parents[1] / ".pytest_cache/jax"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
    JAX_COMPILATION_CACHE_MAX_SIZE=str(2**31),
)


def share_of_the_cores() -> None:
    """Give each of xdist's workers cores of its own.

    JAX starts a thread for each core that it sees. Where two workers both take all of
    them, they disturb each other.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[worker::workers] or cores)


share_of_the_cores()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C interrupts, also where the tests were started in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def optimizations(wanted: bool):
    """Compile programs with or without the optimizations that take XLA long."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session", autouse=True)
def compiled_in_a_hurry():
    """Most tests run a program once: compiling it well takes longer than it saves.

    Notebooks, which are processes of their own, and `make test-full` run programs as
    users do. A test that runs one for long asks for `compiled_well`.
    """
    with optimizations(os.environ.get("HYPOTHESIS_PROFILE") == "full"):
        yield


@pytest.fixture
def compiled_well():
    with optimizations(True):
        yield


def pytest_collection_finish():
    """Leave all that was imported out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub():
    """The Hub on loopback. After a test it is reachable again, and no request fails."""
    yield HUB
    HUB.failing.clear()
    HUB.start()


def pytest_unconfigure():
    HUB.stop()
    shutil.rmtree(HF_HOME, ignore_errors=True)


hypothesis.settings.register_profile("quick", deadline=None)
hypothesis.settings.register_profile("full", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def tiny_factory():
    """A function that loads a fresh `tiny_gemma_en`."""
    import gemma_lora as gl

    gl.setup(seed=0)
    return lambda: gl.load("tiny_gemma_en")


@pytest.fixture(scope="module")
def tiny(tiny_factory):
    """The small model without adapters. Tests share it, and leave it as it was."""
    return tiny_factory()


@pytest.fixture
def tiny_lora(tiny_factory):
    """A fresh small model with adapters whose B is still zero."""
    import gemma_lora as gl

    model = tiny_factory()
    gl.enable_lora(model)
    return model


@pytest.fixture(scope="session")
def tiny_tuned(tiny_factory):
    """The small model after one epoch over its tuning set. Tests only ask it."""
    import gemma_lora as gl

    model = tiny_factory()
    gl.enable_lora(model)
    with optimizations(True):
        gl.fit(model, gl.load_tiny_world()[0], verbose=0)
    return model


@pytest.fixture(scope="session")
def random_model(tiny_factory):
    """A function that makes a small random model of a Gemma family."""
    from families import random_gemma

    return random_gemma
