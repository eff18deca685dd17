import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gemma_lora as gl

ROOT = Path(__file__).parents[1]


def python(code: str, **environment) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_import_is_quick_and_imports_no_keras():
    out = python(
        "import sys, time; start = time.perf_counter(); import gemma_lora; seconds = time.perf_counter() - start\n"
        "heavy = {'keras', 'keras_hub', 'jax', 'tensorflow', 'datasets', 'numpy'} & set(sys.modules)\n"
        "import json; print(json.dumps([seconds, sorted(heavy), dir(gemma_lora)]))"
    )
    seconds, heavy, names = json.loads(out)
    assert seconds < 0.3
    assert heavy == []
    assert set(gl.__all__) <= set(names)


def test_every_public_name_loads_and_is_documented():
    for name in gl.__all__:
        assert inspect.getdoc(getattr(gl, name)), name


def test_an_unknown_name_is_an_attribute_error_with_the_list():
    with pytest.raises(AttributeError, match="enable_lora"):
        _ = gl.enable_lore


# Story order, which is reading order and import order. A module imports from those above it alone.
STREET = [
    "runtime", "tables", "access.kaggle", "access.fetch", "records", "templates", "models",
    "tokens", "batches", "lora", "loss", "memory", "checks", "progress", "checkpoints",
    "training", "sampling", "evaluation", "figures", "formats.card", "formats.transformers",
    "formats.peft", "formats.adapter", "formats.upload", "exercises",
]  # fmt: skip


def test_imports_point_down_the_street():
    files = [path for path in (ROOT / "gemma_lora").rglob("*.py") if "tiny" not in path.parts]
    names = {
        ".".join(path.relative_to(ROOT / "gemma_lora").with_suffix("").parts) for path in files
    }
    assert set(STREET) == {name for name in names if not name.endswith("__init__")}
    for i, name in enumerate(STREET):
        source = (ROOT / f"gemma_lora/{name.replace('.', '/')}.py").read_text()
        imported = re.findall(r"from gemma_lora\.([\w.]+) import", source)
        for package, members in re.findall(r"from gemma_lora(\.\w+)? import ([\w, ]+)", source):
            imported += [f"{package}.{member.strip()}".strip(".") for member in members.split(",")]
        assert not set(imported) & set(STREET[i + 1 :]), name


def test_without_setup_keras_runs_on_jax():
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    code = "import gemma_lora as gl; gl.load; import keras; print(keras.config.backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "jax"


def test_the_version_is_a_version():
    assert importlib.import_module("packaging.version").Version(gl.__version__)


def test_dependencies_stand_in_pyproject_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = (ROOT / "environment.yml").read_text()
    for requirement in project["dependencies"]:
        assert requirement.split(">")[0].split("!")[0] not in environment.replace("gemma-lora", "")


def test_the_library_stays_thin():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "gemma_lora").glob("*.py"))
    assert lines <= 5450
