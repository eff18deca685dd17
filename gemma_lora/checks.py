"""Look for everything that could stop a run, and say how to fix it.

Here: `check` and its seven questions, three of them asked over the network. It changes
and deletes nothing. Not here: what an error of a client means (`access.fetch`), and how
much memory a run takes (`memory`).
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import jax
import kagglehub
import keras
import keras_hub
import psutil

from gemma_lora.access.fetch import AccessError, Source, access_error
from gemma_lora.access.kaggle import THREE_WAYS, hide, in_background, share_colab_secrets, whose
from gemma_lora.memory import GIB, memory_budget
from gemma_lora.models import TINY, TINY_FOLDER, local_place
from gemma_lora.records import DOLLY
from gemma_lora.tables import ShowsAsTable, Table

_PACKAGES = ("keras", "keras-hub", "jax", "kagglehub", "datasets")

# What KerasHub may need to read text. On Windows there is no tensorflow-text.
_TENSORFLOW = "tensorflow" if sys.platform == "win32" else "tensorflow tensorflow-text"

# The network has that long in all.
_SECONDS = 12

# What a refusal of the preset is called in the column "found", by reason.
_WORDS = {
    "busy": "too many requests",
    "consent": "not accepted",
    "credentials": "credentials not accepted",
    "damaged": "the download broke off",
    "disk": "could not be stored",
    "network": "not reached",
    "server": "a fault at the other end",
    "unknown": "no such model",
}


class Answer(NamedTuple):
    """The answer to one question: `ok` is True, False, or None if nothing was asked."""

    ok: bool | None
    found: str
    fix: str = ""


class Check(ShowsAsTable):
    """What `check` found: `rows` are dicts of check, ok, found and fix.

    `ok` is True, False, or None if nothing was asked.
    """

    def __init__(self, preset: str, rows: list[dict]):
        self.preset = preset
        self.rows = rows

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return not any(row["ok"] is False for row in self.rows)

    def __getitem__(self, check: str) -> dict:
        return {row["check"]: row for row in self.rows}[check]

    def table(self) -> Table:
        """A row for each check, with a mark."""
        failed = sum(row["ok"] is False for row in self.rows)
        summary = f"{failed} of {len(self.rows)} checks failed" if failed else "ready"
        marks = {True: "✓", False: "✗", None: "–"}
        rows = []
        for row in self.rows:
            columns = {name: row[name] for name in ("check", "found", "fix")}
            rows.append({"": marks[row["ok"]], **columns})
        return Table(rows, caption=f"{self.preset}: {summary}")


def check(preset: str | Path = "gemma_2b_en") -> Check:
    """Check packages, device, memory, disk, credentials, licence and data for a preset.

    It asks for the preset's smallest file, changes and deletes nothing, and takes some
    seconds; at most 15 if nobody answers.

    >>> check("tiny_gemma_en")["licence"]["found"]
    'not needed: the model is part of this package'

    Raises:
        ValueError: The name is neither a preset nor a folder or GGUF file.
    """
    name = str(preset)
    place = local_place(preset)
    local = place is not None
    source = Source(name)
    deadline = time.monotonic() + _SECONDS
    asked = [in_background(lambda: {"packages": _packages(name)})]
    if not local:
        asked.append(in_background(lambda: _site(source)))
    if name != TINY:
        asked.append(in_background(lambda: {"data": _data()}))

    kind = "the model is part of this package"
    if local and name != TINY:
        kind = f"{preset} is a {'folder' if place.is_dir() else 'file'}"
    not_needed = Answer(None, f"not needed: {kind}")
    late = Answer(False, f"no answer within {_SECONDS} s", "Check the network, and run this again.")
    answers = {
        "packages": Answer(None, "pip took too long to look at them"),
        "device": _device(),
        "memory": _memory(preset),
        "disk": _disk(source, local),
        "credentials": not_needed if local else late,
        "licence": not_needed if local else late,
        "data": Answer(True, "the small world is part of this package"),
    }
    if name != TINY:
        answers["data"] = late
    for future in asked:
        # What has not arrived by then stays late.
        with suppress(TimeoutError):
            answers.update(future.result(max(0, deadline - time.monotonic())))
    rows = [{"check": question, **answer._asdict()} for question, answer in answers.items()]
    return Check(name, rows)


# This machine


def _packages(preset: str) -> Answer:
    """See whether the installed versions go together, by pip's own check."""
    problems = {}
    if problem := _tokenizing_problem(preset):
        problems[f"KerasHub cannot read text here: {problem:.200}"] = _TENSORFLOW
    output = _pip_check()
    names = "|".join(("gemma-lora", "keras-nlp", *_PACKAGES))
    for line in output.splitlines():
        wanted = re.match(rf"({names}) \S+ (?:has requirement|requires) (.+?)(;|, )", line)
        # KerasHub has been imported, so it has the TensorFlow that it needs.
        if wanted and not wanted[2].startswith("tensorflow"):
            problems[line.rstrip(".")] = f'"{wanted[2]}"'
    # pip does not see this one: a plugin does not say which jaxlib it is for.
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        installed = _version(plugin)
        if installed and installed != _version("jaxlib"):
            problem = f"{plugin} {installed} beside jaxlib {_version('jaxlib')}"
            problems[problem] = f'-U "jax[{plugin[4:10]}]"'
    if problems:
        packages = " ".join(dict.fromkeys(problems.values()))
        return Answer(False, "; ".join(problems), f"pip install {packages}, then restart.")
    return Answer(True, ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))


def _tokenizing_problem(preset: str) -> str | None:
    """Return why KerasHub cannot turn text into tokens here; None if it can.

    Some of its releases need TensorFlow or tensorflow-text for that, and on Windows it
    brings neither along.
    """
    kind = keras_hub.models.GemmaCausalLMPreprocessor
    tokenizer_kind = keras_hub.models.GemmaTokenizer
    options: tuple[dict, dict] = ({}, {})
    if re.search(r"gemma-?_?3", preset.lower()):
        kind = keras_hub.models.Gemma3CausalLMPreprocessor
        tokenizer_kind = keras_hub.models.Gemma3Tokenizer
        options = ({"has_vision_tokens": False}, {"image_converter": None})
    proto = (TINY_FOLDER / "assets/tokenizer/vocabulary.spm").read_bytes()
    try:
        kind(tokenizer=tokenizer_kind(proto=proto, **options[0]), **options[1])
    except (ImportError, TypeError) as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    return None


def _pip_check() -> str:
    """Return the lines of `pip check`; none if this environment has no pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def _device() -> Answer:
    """See whether Keras computes with JAX, and on the GPU if one is here."""
    backend = keras.config.backend()
    devices = jax.devices()
    found = f"{backend}: {len(devices)} x {devices[0].device_kind}"
    if backend != "jax":
        fix = "Restart the runtime, and call gl.setup() before anything imports keras."
        return Answer(False, found, fix)
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        found += ", although this machine has an NVIDIA driver"
        return Answer(False, found, 'pip install -U "jax[cuda12]", then restart.')
    return Answer(True, found)


def _memory(preset: str | Path) -> Answer:
    """See whether training fits into this machine's device."""
    memory = psutil.virtual_memory()
    host = f"host: {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    try:
        budget = memory_budget(preset, compile=False)
    except ValueError as error:
        return Answer(None, f"{error} {host}")
    here = budget.devices()[0]
    found = (
        f"training takes about {here['training']} GiB, answering {here['generation']}; "
        f"here are {here['GiB']}. {host}"
    )
    if here["fits"] == "no":
        fix = f"Fits with: {here['nearest that fits']}. In Colab: Runtime > Change runtime type "
        return Answer(False, found, fix + "> T4.")
    if jax.devices()[0].platform == "cpu" and budget.parameters > 10**9:
        found += "; on a CPU an epoch takes many hours"
    return Answer(True, found)


def _disk(source: Source, local: bool) -> Answer:
    """See whether the download fits into the folder where the client keeps it."""
    # private: kagglehub.config
    cache = kagglehub.config.get_cache_folder()
    if source.site == "hf":
        cache = huggingface_hub.constants.HF_HUB_CACHE
    folder = Path(cache)
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    need = 0
    if not local:
        try:
            # Presets are stored in bfloat16, 2 bytes a parameter.
            need = 2 * memory_budget(source.preset, compile=False).parameters / GIB
        except ValueError:
            need = 0
    found = f"{free:.1f} GiB free in {str(folder).replace(str(Path.home()), '~', 1)}"
    if need:
        found += f"; the download takes about {need:.1f}"
    if free < need + 1:
        fix = "Delete what you can spare, or set KAGGLEHUB_CACHE (hf://: HF_HOME) to a larger disk."
        return Answer(False, found, fix)
    return Answer(True, found)


# Over the network, in the background


def _site(source: Source) -> dict[str, Answer]:
    """Ask for the preset's smallest file: what that says of credentials and licence."""

    def both(credentials: Answer, licence: Answer) -> dict[str, Answer]:
        return {"credentials": credentials, "licence": licence}

    try:
        share_colab_secrets()
        place = source.credentials()
    except ValueError as error:
        return both(Answer(False, str(error), "See there."), Answer(None, "not asked"))
    found = f"found in: {place}" if place else "none found"
    try:
        # Some seconds are left, to ask for the user or to look into the cache.
        in_background(lambda: _ask_for_config(source)).result(_SECONDS * 2 / 3)
        user = whose() if source.site == "kaggle" and place else None
        if user:
            found += f", of {user}"
        licence = Answer(True, f"{source.host} hands out {source.handle}")
        return both(Answer(True, found), licence)
    except Exception as error:
        problem = access_error(error, source, place)
        problem = problem or AccessError("unknown", f"{type(error).__name__}: {error}")
    if source.site and source.is_complete():
        words = f"everything is on this machine; {source.host}: {_WORDS[problem.reason]}"
        return both(Answer(None, found), Answer(True, words))
    if problem.reason == "credentials":
        fix = str(problem) if place else THREE_WAYS
        return both(Answer(False, found, fix), Answer(None, "not asked: no credentials"))
    licence = Answer(False, _WORDS[problem.reason], str(problem))
    if place is None:
        return both(Answer(False, found, THREE_WAYS), licence)
    return both(Answer(True if problem.reason == "consent" else None, found), licence)


def _ask_for_config(source: Source) -> None:
    """Ask for config.json itself: an old one in the cache would say nothing."""
    if source.site == "hf":
        source.ask_hub("config.json")
        return
    with tempfile.TemporaryDirectory() as folder:
        kagglehub.model_download(source.handle, "config.json", output_dir=folder)


def _data() -> Answer:
    """See whether Dolly is cached, or can be fetched."""
    # private: how `datasets` names the folders of its cache
    cache = Path(datasets.config.HF_DATASETS_CACHE, DOLLY.replace("/", "___"))
    if cache.is_dir() and any(cache.rglob("*.arrow")):
        return Answer(True, f"{DOLLY} is cached")
    try:
        huggingface_hub.HfApi().dataset_info(DOLLY, timeout=_SECONDS / 2)
        return Answer(True, f"{DOLLY} can be fetched from the Hub")
    except Exception as error:
        lines = [line for line in hide(str(error)).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
    found = f"{DOLLY} is not cached, and the Hub does not answer: {reason:.120}"
    fix = "Check the network; or use gl.load_records() on a file of yours, or gl.load_tiny_world()."
    return Answer(False, found, fix)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
