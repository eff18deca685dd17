"""Does `make set-repo` change every copy of the address, and nothing else?"""

import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from set_repo import ROOT, files, repository, set_repo

OLD = repository(ROOT)
NEW = "some-one/gemma.lora_2"


@pytest.fixture
def tree(tmp_path):
    """A copy of the working tree, and beside it files with similar addresses."""
    for file in files(ROOT):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    others = f"{OLD} x{OLD} https://github.com/{OLD}-2 https://github.com/{OLD}.old/ '{OLD}'\n"
    (tmp_path / "others.md").write_text(others)
    lines = f"git@github.com:{OLD}.git\r\nhttps://github.com/{OLD}.\r\n"
    (tmp_path / "lines.txt").write_bytes(lines.encode())
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe" + f"github.com/{OLD}".encode())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def contents(tree) -> dict:
    return {file: file.read_bytes() for file in files(tree)}


def test_all_copies_follow_and_nothing_else_changes(tree):
    before = contents(tree)
    changed = set_repo(NEW, tree)
    notebooks = sorted((tree / "notebooks").glob("*.ipynb"))
    assert {*notebooks, tree / "pyproject.toml", tree / "lines.txt"} <= {*changed}
    assert repository(tree) == NEW
    for file, content in contents(tree).items():
        assert content == (
            before[file].replace(OLD.encode(), NEW.encode()) if file in changed else before[file]
        )
    for file in [*notebooks, tree / "pyproject.toml", tree / "README.md"]:
        assert not re.search(
            rf"(?<![\w.-]){re.escape(OLD)}(?![\w-])", file.read_text(encoding="utf-8")
        )
    assert not {tree / "others.md", tree / "binary.bin"} & {*changed}


def test_notebooks_stay_valid_and_as_nbformat_writes_them(tree):
    set_repo(NEW, tree)
    for path in (tree / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert nbformat.writes(notebook) == path.read_text(encoding="utf-8").rstrip("\n")
        set_up = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        assert f"git+https://github.com/{NEW}@v" in set_up
        assert f"/github/{NEW}/blob/main/notebooks/{path.name}" in notebook.cells[0].source


def test_twice_changes_nothing_and_another_name_leads_back(tree):
    set_repo("first/name", tree)
    first = contents(tree)
    assert set_repo("first/name", tree) == []
    assert contents(tree) == first
    set_repo(NEW, tree)
    set_repo("first/name", tree)
    assert contents(tree) == first


REFUSED = [
    "YOUR_ACCOUNT/gemma-lora", "name", "owner/", "/name", "owner/name/more", "-owner/name",
    "owner-/name", "own--er/name", "own.er/name", "owner/na me", "owner/..", "owner/name.git",
    "owner/name\n", "öwner/name", "owner/näme", f"https://github.com/{NEW}",
    f"{'o' * 40}/name", f"owner/{'n' * 101}", r"owner/\1",
]  # fmt: skip


def test_a_name_that_github_would_refuse_changes_nothing(tree):
    before = contents(tree)
    for name in REFUSED:
        with pytest.raises(ValueError, match=r"REPO is owner/name.*Received"):
            set_repo(name, tree)
    assert contents(tree) == before


def test_on_the_command_line(tree):
    def run(*arguments):
        command = [sys.executable, "tests/set_repo.py", *arguments]
        return subprocess.run(command, cwd=tree, capture_output=True, text=True)

    for arguments in [], [""], ["not a name"]:
        before = contents(tree)
        result = run(*arguments)
        assert result.returncode == 1
        assert "owner/name" in result.stderr
        assert "Traceback" not in result.stderr
        assert contents(tree) == before
    assert "notebooks/00_quickstart.ipynb\n" in run(NEW).stdout
    assert repository(tree) == NEW
    assert run(NEW).stdout == f"0 files changed: the repository is {NEW}\n"
