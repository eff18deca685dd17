"""Check the project on Colab's Python and versions: set-up cell, tests, notebooks.

python tests/colab.py pip-freeze.txt

Everything happens in a copy of the working tree. The copy has an address on GitHub, and
git is told to find that address in the copy itself, so nothing is fetched or published.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from set_repo import ROOT, files, set_repo

VENV = ROOT / ".venv-colab"
PYTHON = VENV / "bin/python"
STAMP = VENV / ".stamp"
# Packages that Colab has beside the project's dependencies, and that a kernel or the
# notebooks' tests need.
BESIDE = ["pip", "setuptools", "tensorflow", "pandas", "ipykernel", "ipywidgets", "nbconvert"]
TOOLS = ["gguf", "hypothesis", "nbval", "pytest", "pytest-xdist"]
# What another version of Keras, KerasHub or JAX can break. Faults of servers,
# credentials and texts are the same everywhere, and tested by `make test`.
TESTED = [
    "training", "lora", "merging", "sampling", "loss", "batches", "checkpoints",
    "export", "gguf", "private_surfaces",
]  # fmt: skip
# A worker that crashes is not replaced: with --dist loadfile, pytest-xdist would wait
# for its file forever. And pytest's last garbage collection is left out: on 8.4, xdist
# interrupts it, which looks like an error.
WORKERS = [
    "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0",
    "-p", "no:unraisableexception",
]  # fmt: skip
PLACEHOLDER = "YOUR_ACCOUNT/name"
LEARNER = "a-learner/gemma-lora"
SHOWN = ["keras", "keras-hub", "jax", "datasets"]

seconds: dict[str, float] = {}


@contextmanager
def stage(name: str):
    """Say what is being done, and remember how long it took."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def run(*command, expect: bool = True, **options) -> str:
    """Return a command's output; end the script if it does not end as expected."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if (done.returncode == 0) is not expect:
        line = " ".join(str(part) for part in command)
        sys.exit(f"{done.stdout}\n{line}\nended with {done.returncode}. Its output is above.")
    return done.stdout


def cannot(reason: str) -> NoReturn:
    """End the script: with an error in CI, with a remark elsewhere."""
    print(f"make test-colab: not checked. {reason}", file=sys.stderr)
    sys.exit(1 if os.environ.get("CI") else 0)


def python313() -> str:
    """Find Colab's Python: on the path, or the newest that pyenv has."""
    candidates = []
    if on_path := shutil.which("python3.13"):
        candidates.append(on_path)
    if pyenv := shutil.which("pyenv"):
        versions = Path(run(pyenv, "root").strip(), "versions")
        pythons = [str(path) for path in versions.glob("3.13.*/bin/python3.13")]
        candidates += sorted(pythons, key=patch_number, reverse=True)
    for python in candidates:
        # pyenv's own python3.13 on the path may only say how to choose a version.
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    cannot("It needs Python 3.13, which is neither on the path nor among pyenv's versions.")


def patch_number(path: str) -> int:
    return int(re.search(r"3\.13\.(\d+)", path)[1])


def pip(*arguments) -> None:
    """Install into the environment."""
    run(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments)


def installed() -> set[str]:
    """List what the environment has, as `pip freeze` does."""
    return set(run(PYTHON, "-m", "pip", "freeze", "--all").splitlines())


def normal(name: str) -> str:
    """Spell a package's name the one way that compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build(python: str, colab: dict[str, str], constraints: Path) -> None:
    """Make the environment: what the project needs, in Colab's versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    run(python, "-m", "venv", "--clear", VENV)
    pip("-c", constraints, *[name for name in [*needed, *BESIDE] if name in colab])


def publish(place: Path, address: str) -> dict[str, str]:
    """Copy the working tree to `place`, as a tagged repository.

    Returns:
        The environment in which git finds the repository at `address` on GitHub.
    """
    for file in files(ROOT):
        copy = place / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    config = place.with_suffix(".gitconfig")
    redirect = f'[url "{place.as_uri()}"]\ninsteadOf = https://github.com/{address}\n'
    config.write_text(f"{redirect}[user]\nname = test\nemail = test\n")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_ALLOW_PROTOCOL": "file"}
    run("git", "init", "-q", cwd=place, env=environment)
    set_repo(address, place)
    source = (place / "gemma_lora/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1]
    run("git", "add", ".", cwd=place, env=environment)
    run("git", "commit", "-qm", "The working tree", cwd=place, env=environment)
    run("git", "tag", f"v{version}", cwd=place, env=environment)
    return environment


def run_cell(source: str, place: Path, environment: dict[str, str], expect: bool = True) -> str:
    """Run one cell in a kernel that believes it is Colab's, and return the output."""
    cell = {
        "cell_type": "code",
        "id": "set-up",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": source,
    }
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    file = place / "cell.ipynb"
    file.write_text(json.dumps(notebook))
    command = [PYTHON, "-m", "nbconvert", "--execute", "--to", "notebook", "--stdout", file]
    in_colab = {**environment, "COLAB_RELEASE_TAG": "release-colab"}
    return run(*command, expect=expect, cwd=place, env=in_colab)


def check_unchanged(before: set[str], after: set[str], action: str) -> None:
    """End the script if an action replaced or removed an installed package."""
    if gone := before - after:
        now = ", ".join(sorted(after - before))
        sys.exit(f"{action} changed what Colab has: {', '.join(sorted(gone))}. Now: {now}")


def check_set_up_cell(clone: Path, environment: dict[str, str], before: set[str]) -> set[str]:
    """Run the notebooks' set-up cell without an address and with one.

    Returns what is installed afterwards. Without an address pip fails, and says so: the
    cell then cannot import the package, and has installed nothing.
    """
    notebook = json.loads(min((clone / "notebooks").glob("*.ipynb")).read_text(encoding="utf-8"))
    cell = "".join(
        next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["source"]
    )
    said = run_cell(cell.replace(LEARNER, PLACEHOLDER), clone.parent, environment, expect=False)
    if "No module named 'gemma_lora'" not in said or installed() != before:
        sys.exit(f"{said}\nWithout an address, the set-up cell has to fail, and install nothing.")
    run_cell(cell, clone.parent, environment)
    after = installed()
    check_unchanged(before, after, "The set-up cell")
    added = sorted(after - before)
    if len(added) != 1 or not added[0].startswith(
        f"gemma-lora @ git+https://github.com/{LEARNER}@"
    ):
        sys.exit(
            f"The set-up cell must install the project alone. It installed: {', '.join(added)}"
        )
    return after


def run_tests(clone: Path) -> None:
    """Run tests and notebooks in `clone`, with the project as the cell installed it."""
    # The programs that JAX compiles are kept for the next run.
    compiled = ROOT / ".pytest_cache/jax"
    compiled.mkdir(parents=True, exist_ok=True)
    (clone / ".pytest_cache").mkdir()
    (clone / ".pytest_cache/jax").symlink_to(compiled)
    quiet = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    unit_tests = ["-m", "not full and not peers", *[f"tests/test_{name}.py" for name in TESTED]]
    for name, arguments in {"Unit tests": unit_tests, "Notebooks": ["notebooks"]}.items():
        with stage(name):
            command = [PYTHON, "-m", "pytest", *WORKERS, *arguments]
            if code := subprocess.run(command, cwd=clone, env=quiet).returncode:
                sys.exit(f"{name} on Colab's versions ended with {code}.")


def report(before: set[str], colab: dict[str, str], tools: set[str], duration: float) -> None:
    """Print versions, what was added, and how long each stage took."""
    lines = {normal(line.split("==")[0]): line for line in before}
    others = [
        line for name, line in lines.items() if line != f"{line.split('==')[0]}=={colab.get(name)}"
    ]
    print(f"\n{run(PYTHON, '--version').strip()}, {', '.join(lines[name] for name in SHOWN)}")
    print(f"{len(before)} packages, all at Colab's versions except: {', '.join(others) or 'none'}")
    print("the set-up cell added gemma-lora and changed nothing; ", end="")
    print("without an address it installed nothing")
    print(f"the test tools added {', '.join(sorted(tools))} and changed nothing")
    took = ", ".join(f"{name.lower()} {spent:.0f} s" for name, spent in seconds.items())
    print(f"{took}; {duration / 60:.1f} minutes in all")


def main(freeze: Path) -> None:
    start = time.monotonic()
    python = python313()
    if not freeze.is_file():
        cannot(
            f"It needs a `pip freeze` of Colab, and {freeze} does not exist. "
            "COLAB_FREEZE=... says where one is."
        )
    # Lines with a version only: no addresses, no files of Colab's own.
    pins = re.findall(r"^([\w.-]+)==(\S+)$", freeze.read_text(), re.MULTILINE)
    colab = {normal(name): version for name, version in pins}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in colab.items()))
        sources = [constraints, ROOT / "pyproject.toml", Path(__file__)]
        stamp = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()

        with stage("Environment"):
            made_of, *added = STAMP.read_text().splitlines() if STAMP.exists() else [""]
            if made_of == stamp:
                run(PYTHON, "-m", "pip", "uninstall", "-qq", "--yes", "gemma-lora", *added)
            else:
                build(python, colab, constraints)
            # No stamp until we know that nothing below changed the environment.
            STAMP.unlink(missing_ok=True)
            before = installed()

        with stage("Set-up cell"):
            clone = folder / "clone"
            after = check_set_up_cell(clone, publish(clone, LEARNER), before)

        with stage("Test tools"):
            pip("-c", constraints, *TOOLS)
            with_tools = installed()
            check_unchanged(after, with_tools, "Installing the test tools")
            STAMP.write_text("\n".join([stamp, *sorted(with_tools - after)]))

        run_tests(clone)
    report(before, colab, with_tools - after, time.monotonic() - start)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
