"""Make each code cell of a notebook a test: it runs, and its output is as committed.

nbval runs and compares the cells; this file adds what our notebooks need. pytest reads
it when it is asked for notebooks: `pytest` runs them beside the other tests, and
`pytest notebooks/04*` runs one of them. Notebooks do not import it.
"""

import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile


class Notebook(IPyNbFile):
    """A notebook, run in a kernel and an empty folder of its own.

    The folder makes notebooks independent: two can run at once, and none finds an
    adapter that another one left under artifacts/.
    """

    # The cell that raised. After it, the kernel's state is not what later cells expect.
    broken = None

    def collect(self):
        for cell in super().collect():
            cell.add_marker("notebook")
            yield cell

    def setup(self):
        self.folder = tempfile.TemporaryDirectory(prefix="gemma_lora_notebook_")
        # A notebook meets the environment of a learner: none of the settings that
        # tests/conftest.py makes for the Hub, and none of our own parameters.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "GEMMA_LORA_"))
        }
        with mock.patch.dict(os.environ, environment, clear=True):
            self.kernel = RunningKernel(CURRENT_ENV_KERNEL_NAME, cwd=self.folder.name)

    def teardown(self):
        super().teardown()
        self.folder.cleanup()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Notebook | None:
    if file_path.suffix == ".ipynb" and not parent.config.option.nbval:
        return Notebook.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file, largest first: notebooks, then the long test files.

    Two workers take file after file from this list. When they reach its end, only short
    files are left, so neither waits long for the other.
    """
    sizes = {path: path.stat().st_size for path in {item.path for item in items}}
    items.sort(key=lambda item: (-sizes[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if isinstance(item, IPyNbCell) and item.parent.broken:
        pytest.skip(f"{item.parent.broken} of this notebook failed")


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo) -> None:
    """Remember a cell that raised. One whose output only differs stops nothing."""
    if isinstance(node, IPyNbCell) and "outputs differ" not in str(call.excinfo.value):
        node.parent.broken = node.name
