"""Colab, as near as can be had: its Python and its versions, the set-up cell as a learner runs it, tests, notebooks.

python tests/colab.py pip-freeze.txt

All is done on a copy of the working tree, with an address that git is told to find in that very copy.
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

from set_repo import ROOT, files, set_repo

VENV = ROOT / ".venv-colab"
PYTHON = VENV / "bin/python"
STAMP = VENV / ".stamp"
# What Colab has besides the project's dependencies, and a kernel or the notebooks' tests need.
BESIDE = ["pip", "setuptools", "tensorflow", "pandas", "ipykernel", "ipywidgets", "nbconvert"]
TOOLS = ["hypothesis", "nbval", "pytest", "pytest-xdist"]
PLACEHOLDER = "YOUR_ACCOUNT/name"
LEARNER = "a-learner/gemma-lora"
SHOWN = ["keras", "keras-hub", "jax", "datasets"]

seconds = {}


@contextmanager
def stage(name: str):
    """Say what is being done, and remember how long it took."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def run(*command, expect: bool = True, **options) -> str:
    """The output of a command; the end of the script, with that output, if it does not end as expected."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(list(map(str, command)), **output, **options)
    if (done.returncode == 0) is not expect:
        sys.exit(
            f"{done.stdout}\n{' '.join(map(str, command))}\nended with {done.returncode}: see its output above."
        )
    return done.stdout


def cannot(reason: str):
    """End the script: a failure where CI promised a check, a remark on a machine that cannot do it."""
    print(f"make test-colab: not checked. {reason}", file=sys.stderr)
    sys.exit(1 if os.environ.get("CI") else 0)


def python313() -> str:
    """Colab's Python: on the path, or the newest that pyenv has."""
    found = [shutil.which("python3.13")]
    if pyenv := shutil.which("pyenv"):
        versions = Path(run(pyenv, "root").strip(), "versions").glob("3.13.*/bin/python3.13")
        found += sorted(
            map(str, versions),
            key=lambda path: int(re.search(r"3\.13\.(\d+)", path)[1]),
            reverse=True,
        )
    for python in filter(
        None, found
    ):  # pyenv's own python3.13 on the path may be one that only says how to choose
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    cannot("It takes Python 3.13, which is neither on the path nor among pyenv's versions.")


def pip(*arguments) -> None:
    run(PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments)


def installed() -> set[str]:
    return set(run(PYTHON, "-m", "pip", "freeze", "--all").splitlines())


def build(python: str, colab: dict[str, str], constraints: Path) -> None:
    """Make the environment: what Colab has of what the project needs, at Colab's versions, without the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    run(python, "-m", "venv", "--clear", VENV)
    pip("-c", constraints, *[name for name in [*needed, *BESIDE] if name in colab])


def publish(place: Path, address: str) -> dict[str, str]:
    """Copy the working tree to `place` as a tagged repository; the environment in which git finds it at `address`."""
    for file in files(ROOT):
        copy = place / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    config = place.with_suffix(".gitconfig")
    config.write_text(
        f'[url "{place.as_uri()}"]\ninsteadOf = https://github.com/{address}\n[user]\nname = test\nemail = test\n'
    )
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_ALLOW_PROTOCOL": "file"}
    run("git", "init", "-q", cwd=place, env=environment)
    set_repo(address, place)
    version = re.search(
        r'^__version__ = "(.+)"', (place / "gemma_lora/__init__.py").read_text(), re.MULTILINE
    )[1]
    for command in (["add", "."], ["commit", "-qm", "The working tree"], ["tag", f"v{version}"]):
        run("git", *command, cwd=place, env=environment)
    return environment


def run_cell(source: str, place: Path, environment: dict[str, str], expect: bool = True) -> str:
    """Run one cell in a kernel that takes itself for Colab's."""
    cell = {
        "cell_type": "code",
        "id": "set-up",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
    }
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [{**cell, "source": source}],
    }
    file = place / "cell.ipynb"
    file.write_text(json.dumps(notebook))
    command = [PYTHON, "-m", "nbconvert", "--execute", "--to", "notebook", "--stdout", file]
    return run(
        *command,
        expect=expect,
        cwd=place,
        env={**environment, "COLAB_RELEASE_TAG": "release-colab"},
    )


def same(before: set[str], after: set[str], done: str) -> None:
    """End the script if an installed package is another one, or gone."""
    if gone := before - after:
        now = sorted(after - before)
        sys.exit(
            f"{done} changed what Colab has: {', '.join(sorted(gone))}. Now there are: {', '.join(now)}"
        )


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
    same(before, after, "The set-up cell")
    if [line.split("@")[:2] for line in after - before] != [
        ["gemma-lora ", f" git+https://github.com/{LEARNER}"]
    ]:
        sys.exit(
            f"The set-up cell is to install the project alone. It installed: {', '.join(sorted(after - before))}"
        )
    return after


def main(freeze: Path) -> None:
    start = time.monotonic()
    python = python313()
    if not freeze.is_file():
        cannot(
            f"It takes a `pip freeze` of Colab, and there is none at {freeze}. COLAB_FREEZE=... says where one is."
        )
    pins = re.findall(
        r"^([\w.-]+)==(\S+)$", freeze.read_text(), re.MULTILINE
    )  # no addresses, no files of Colab's own
    colab = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
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
            STAMP.unlink(
                missing_ok=True
            )  # until we know that nothing below changed the environment
            before = installed()

        with stage("Set-up cell"):
            clone = folder / "clone"
            after = check_set_up_cell(clone, publish(clone, LEARNER), before)

        with stage("Test tools"):
            pip("-c", constraints, *TOOLS)
            tools = installed()
            same(after, tools, "Installing the test tools")
            STAMP.write_text("\n".join([stamp, *sorted(tools - after)]))

        # A worker that crashes is not started anew: with --dist loadfile, pytest-xdist would wait for it forever. And
        # pytest's last garbage collection is left out: on 8.4, xdist interrupts it, which looks like an error.
        workers = [
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--max-worker-restart",
            "0",
            "-p",
            "no:unraisableexception",
        ]
        for name, command in {
            # The notebooks on another preset run in `make test`; here they run below, on Colab's versions.
            "Unit tests": [
                "-m",
                "pytest",
                *workers,
                "-m",
                "not full and not peers",
                "--ignore=tests/test_another_model.py",
            ],
            "Notebooks": [
                "tests/notebooks.py",
                "test",
            ],  # in kernels that have the project as the cell installed it
        }.items():
            with stage(name):
                quiet = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
                if code := subprocess.run([PYTHON, *command], cwd=clone, env=quiet).returncode:
                    sys.exit(f"{name} on Colab's versions ended with {code}.")

    names = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in before}
    others = [
        line for name, line in names.items() if line != f"{line.split('==')[0]}=={colab.get(name)}"
    ]
    print(f"\n{run(PYTHON, '--version').strip()}, {', '.join(names[name] for name in SHOWN)}")
    print(f"{len(before)} packages, all at Colab's versions except: {', '.join(others) or 'none'}")
    print(
        "the set-up cell added gemma-lora and changed nothing; without an address it installed nothing"
    )
    print(f"the test tools added {', '.join(sorted(tools - after))} and changed nothing")
    took = ", ".join(f"{name.lower()} {duration:.0f} s" for name, duration in seconds.items())
    print(f"{took}; {(time.monotonic() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
