"""The package as a whole: import, public names, layout, documentation."""

import ast
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
FILES = sorted((ROOT / "gemma_lora").rglob("*.py"))


def python(code: str, **environment) -> str:
    """Run code in an interpreter of its own, and return everything that it prints."""
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
    code = """
import json, sys, time
start = time.perf_counter()
import gemma_lora
seconds = time.perf_counter() - start
heavy = {"keras", "keras_hub", "jax", "tensorflow", "datasets", "numpy"} & set(sys.modules)
print(json.dumps([seconds, sorted(heavy), dir(gemma_lora)]))
"""
    seconds, heavy, names = json.loads(python(code))
    assert seconds < 0.3
    assert heavy == []
    assert set(gl.__all__) <= set(names)


def test_every_public_name_loads_and_is_documented():
    for name in gl.__all__:
        assert inspect.getdoc(getattr(gl, name)), name


def test_an_unknown_name_is_an_attribute_error_with_the_list():
    with pytest.raises(AttributeError, match="enable_lora"):
        _ = gl.enable_lore


# Story order is reading order and import order: a module imports only from those above
# it.
STREET = [
    "options", "runtime", "tables", "access.kaggle", "access.fetch", "access.preset",
    "access.gguf", "access.files", "records", "audits", "templates", "models", "tokens", "batches",
    "lora", "loss", "memory", "checks", "progress", "checkpoints", "training", "sampling",
    "evaluation", "sweeps", "figures", "formats.card", "formats.transformers", "formats.peft",
    "formats.gguf", "formats.adapter", "formats.upload", "exercises",
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


def test_without_setup_keras_runs_on_jax(monkeypatch):
    # Keras reads this variable once, when it is imported. To import it here would take
    # ten seconds, so this process ends just before.
    code = """
import os, sys

class Finder:
    def find_spec(name, *_):
        if name == "keras":
            print("backend:", os.environ.get("KERAS_BACKEND"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder)
import gemma_lora as gl
gl.load
"""
    monkeypatch.delenv("KERAS_BACKEND")
    assert "backend: jax" in python(code)


def test_the_version_is_a_version():
    assert importlib.import_module("packaging.version").Version(gl.__version__)


def test_dependencies_stand_in_pyproject_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = (ROOT / "environment.yml").read_text()
    for requirement in project["dependencies"]:
        assert requirement.split(">")[0].split("!")[0] not in environment.replace("gemma-lora", "")


def public_definitions(tree: ast.Module):
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if "overload" not in [getattr(mark, "id", "") for mark in node.decorator_list]:
            yield node


def test_every_module_and_every_public_function_has_a_docstring():
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in [tree, *public_definitions(tree)]:
            if not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}")
    assert missing == []


def test_no_function_has_more_than_60_lines_beside_its_docstring():
    """A guard against rooms that grow until nobody can read them.

    What `help` shows may be longer, as it begins with an example.
    """
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                docstring = len((ast.get_docstring(node) or "").splitlines())
                if lines - docstring > 60 or lines > 85:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}, {lines} lines")
    assert long == []


def test_every_public_function_says_what_it_returns():
    functions = [getattr(gl, name) for name in gl.__all__ if inspect.isfunction(getattr(gl, name))]
    silent = [
        function.__name__
        for function in functions
        if inspect.signature(function).return_annotation is inspect.Signature.empty
    ]
    assert silent == []


def test_every_public_parameter_has_a_type():
    missing = []
    for name in gl.__all__:
        if inspect.isfunction(function := getattr(gl, name)):
            for parameter in inspect.signature(function).parameters.values():
                # A model is one of KerasHub's, and its class says little to a reader.
                if parameter.name != "model" and parameter.annotation is inspect.Parameter.empty:
                    missing.append(f"{name}({parameter.name})")
    assert missing == []


def test_completion_shows_the_public_names_and_nothing_else():
    assert dir(gl) == sorted([*gl.__all__, "exercises"])


@pytest.mark.parametrize(("name", "meant"), [("enable_Lora", "enable_lora"), ("table", "Table")])
def test_a_name_that_is_almost_right_is_told_the_right_one(name, meant):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'. Did you mean '{meant}'"):
        getattr(gl, name)
