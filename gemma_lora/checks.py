"""Everything that could stop a run, each with its fix, before anything large is downloaded."""

import shutil
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import datasets
import huggingface_hub
import jax
import kagglehub
import keras
import psutil
from packaging.requirements import Requirement

from gemma_lora.access.fetch import AccessError, Source, explain
from gemma_lora.access.kaggle import (
    THREE_WAYS,
    check_hub_token,
    hide,
    share_colab_secrets,
    timeouts,
    used_place,
    whose,
)
from gemma_lora.memory import GIB, memory_budget
from gemma_lora.models import TINY, local_folder
from gemma_lora.records import DOLLY
from gemma_lora.tables import ShowsAsTable, Table

_PACKAGES = ("keras", "keras-hub", "jax", "kagglehub", "datasets")
_SECONDS = 12  # the network has that long in all
_WORDS = {
    "consent": "not accepted",
    "network": "not reached",
    "unknown": "no such model",
    "busy": "too many requests",
}
_WORDS |= {
    "server": "a fault at the other end",
    "damaged": "the download broke off",
    "disk": "could not be stored",
}
_WORDS |= {"credentials": "credentials not accepted"}
_COLORS = {"✓": "#188038", "✗": "#d93025", "–": "#5f6368"}


class Check(ShowsAsTable):
    """What `check` found: `rows` are dicts of check, ok (True, False, or None where nothing was asked), found, fix."""

    def __init__(self, preset: str, rows: list[dict]):
        self.preset, self.rows = preset, rows

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return not any(row["ok"] is False for row in self.rows)

    def __getitem__(self, check: str) -> dict:
        return {row["check"]: row for row in self.rows}[check]

    def table(self) -> Table:
        """A row for each check, with a mark."""
        wrong = sum(row["ok"] is False for row in self.rows)
        caption = f"{self.preset}: " + (
            f"{wrong} of {len(self.rows)} checks failed" if wrong else "ready"
        )
        mark = {True: "✓", False: "✗", None: "–"}
        rows = [
            {"": mark[row["ok"]], **{key: row[key] for key in ("check", "found", "fix")}}
            for row in self.rows
        ]
        return Table(rows, caption=caption)

    def _repr_html_(self) -> str:
        page = super()._repr_html_()
        for mark, color in _COLORS.items():
            page = page.replace(f">{mark}<", f'><b style="color:{color}">{mark}</b><')
        return page


def check(preset: str | Path = "gemma_2b_en") -> Check:
    """Check all that could stop a run on a preset: packages, devices, memory, disk, credentials, licence, data.

    Of the preset it fetches the smallest file. It takes some seconds; at most 15 where nobody answers. A name that is
    neither a preset nor a folder is a ValueError.

    >>> check("tiny_gemma_en")["licence"]["found"]
    'not needed: the model is part of this package'
    """
    local, source = local_folder(preset) is not None, Source(str(preset))
    answers: dict[str, tuple] = {}
    asking = (
        [] if local else [threading.Thread(target=_ask_site, args=(source, answers), daemon=True)]
    )
    asking += (
        []
        if str(preset) == TINY
        else [threading.Thread(target=_ask_data, args=(answers,), daemon=True)]
    )
    for thread in asking:
        thread.start()

    found = {
        "packages": _packages(),
        "device": _device(),
        "memory": _memory(preset),
        "disk": _disk(source, local),
    }
    deadline = time.monotonic() + _SECONDS
    for thread in asking:
        thread.join(max(0, deadline - time.monotonic()))
    late = (False, f"no answer within {_SECONDS} s", "Check the network, and run this again.")
    here = "the model is part of this package" if str(preset) == TINY else f"{preset} is a folder"
    for name in ("credentials", "licence"):
        found[name] = (None, f"not needed: {here}", "") if local else answers.get(name, late)
    found["data"] = (True, "the small world is part of this package", "")
    if str(preset) != TINY:
        found["data"] = answers.get("data", late)
    return Check(
        str(preset),
        [
            dict(zip(("check", "ok", "found", "fix"), (k, *v), strict=True))
            for k, v in found.items()
        ],
    )


def _packages() -> tuple:
    """What the packages that matter ask for, and what is installed."""
    have = {name: _version(name) for name in _PACKAGES}
    bad = []
    for package in ("gemma-lora", *_PACKAGES, "keras-nlp"):
        try:
            wanted = [Requirement(text) for text in requires(package) or []]
        except PackageNotFoundError:
            continue
        for one in wanted:
            if (one.marker and not one.marker.evaluate({"extra": ""})) or one.name.startswith(
                "tensorflow"
            ):
                continue  # KerasHub has been imported: it has the TensorFlow that it needs
            if (got := _version(one.name)) is None or not one.specifier.contains(
                got, prereleases=True
            ):
                bad.append(
                    (
                        f"{package} wants {one.name} {one.specifier}; there is {got}",
                        f'"{one.name}{one.specifier}"',
                    )
                )
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        if (got := _version(plugin)) and got != _version("jaxlib"):
            bad.append(
                (f"{plugin} {got} beside jaxlib {_version('jaxlib')}", f'-U "jax[{plugin[4:10]}]"')
            )
    if (got := _version("keras-nlp")) and got != have["keras-hub"]:
        bad.append(
            (
                f"keras-nlp {got} beside keras-hub {have['keras-hub']}",
                f'"keras-nlp=={have["keras-hub"]}"',
            )
        )
    if bad:
        fix = f"pip install {' '.join(dict.fromkeys(fix for _, fix in bad))}, then restart."
        return False, "; ".join(what for what, _ in bad), fix
    return True, ", ".join(f"{name} {number}" for name, number in have.items()), ""


def _device() -> tuple:
    backend, devices = keras.config.backend(), jax.devices()
    found = f"{backend}: {len(devices)} x {devices[0].device_kind}"
    if backend != "jax":
        return (
            False,
            found,
            "Restart the runtime, and call gl.setup() before anything imports keras.",
        )
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        return (
            False,
            f"{found}, though there is an NVIDIA driver",
            'pip install -U "jax[cuda12]", then restart.',
        )
    return True, found, ""


def _memory(preset) -> tuple:
    host = f"host: {psutil.virtual_memory().available / GIB:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB free"
    try:
        budget = memory_budget(preset, compile=False)
    except ValueError as error:
        return None, f"{error} {host}", ""
    here = budget.devices()[0]
    found = f"training takes about {here['training']} GiB, answering {here['generation']}; here are {here['GiB']}. {host}"
    if here["fits"] == "no":
        return (
            False,
            found,
            f"Fits with: {here['nearest that fits']}. In Colab: Runtime > Change runtime type > T4.",
        )
    slow = jax.devices()[0].platform == "cpu" and budget.parameters > 10**9
    return True, found + ("; on a CPU an epoch takes many hours" if slow else ""), ""


def _disk(source: Source, local: bool) -> tuple:
    folder = Path(
        kagglehub.config.get_cache_folder()
        if source.site != "hf"
        else huggingface_hub.constants.HF_HUB_CACHE
    )
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    try:
        need = (
            0 if local else 2 * memory_budget(source.preset, compile=False).parameters / GIB
        )  # stored as bfloat16
    except ValueError:
        need = 0
    shown = str(folder).replace(str(Path.home()), "~", 1)
    found = f"{free:.1f} GiB free in {shown}" + (
        f"; the download takes about {need:.1f}" if need else ""
    )
    if free < need + 1:
        return (
            False,
            found,
            "Delete what you can spare, or set KAGGLEHUB_CACHE (hf://: HF_HOME) to a larger disk.",
        )
    return True, found, ""


def _ask_site(source: Source, answers: dict) -> None:
    """Fetch the smallest file of the preset, and see what that tells about credentials and licence."""
    try:
        share_colab_secrets()
        if source.site == "hf":
            check_hub_token()
        place = (
            used_place()
            if source.site == "kaggle"
            else "the Hub's own: huggingface_hub.login() or HF_TOKEN"
        )
    except ValueError as error:
        answers["credentials"], answers["licence"] = (
            (False, str(error), "See there."),
            (None, "not asked", ""),
        )
        return
    here = f"found in: {place}" if place else "none found"
    try:
        with timeouts(4, 8), tempfile.TemporaryDirectory() as folder:
            if (
                source.site == "kaggle"
            ):  # what is in the cache says nothing of the credentials of today
                kagglehub.model_download(source.handle, "config.json", output_dir=folder)
            else:
                source.file("config.json")
            user = whose() if source.site == "kaggle" and place else None
        answers["credentials"] = (True, here + (f", of {user}" if user else ""), "")
        answers["licence"] = (True, f"{source.host} hands out {source.handle}", "")
    except Exception as error:
        try:
            problem = explain(error, source)
        except Exception as other:
            problem = AccessError("unknown", f"{type(other).__name__}: {other}")
        if source.site and source.is_complete():
            answers["credentials"] = (None, here, "")
            answers["licence"] = (
                True,
                f"all is on this machine; {source.host}: {_WORDS[problem.reason]}",
                "",
            )
            return
        if problem.reason == "credentials":
            fix = THREE_WAYS if place is None else str(problem)
            answers["credentials"], answers["licence"] = (
                (False, here, fix),
                (None, "not asked: no credentials", ""),
            )
        else:
            known = problem.reason == "consent"
            answers["credentials"] = (
                True if known else None if place else False,
                here,
                "" if place else THREE_WAYS,
            )
            answers["licence"] = (False, _WORDS[problem.reason], str(problem))


def _ask_data(answers: dict) -> None:
    """See whether Dolly is cached, or can be fetched."""
    cache = Path(datasets.config.HF_DATASETS_CACHE, DOLLY.replace("/", "___"))
    if cache.is_dir() and any(cache.rglob("*.arrow")):
        answers["data"] = (True, f"{DOLLY} is cached", "")
        return
    try:
        huggingface_hub.HfApi().dataset_info(DOLLY, timeout=6)
        answers["data"] = (True, f"{DOLLY} can be fetched from the Hub", "")
    except Exception as error:
        reason = next(
            (line for line in hide(str(error)).splitlines() if line.strip()), type(error).__name__
        )
        fix = "Check the network; or use gl.load_records() on a file of yours, or gl.load_tiny_world()."
        answers["data"] = (
            False,
            f"{DOLLY} is not cached, and the Hub does not answer: {reason:.120}",
            fix,
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
