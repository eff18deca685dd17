"""Write the public repository's address wherever it is repeated.

make set-repo REPO=owner/name, or: python tests/set_repo.py owner/name

pyproject.toml holds the address; the notebooks' badges and set-up cells repeat it.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# GitHub's rules: an owner is words of letters and digits joined by single hyphens; a
# name does not end in ".git".
ADDRESS = re.compile(
    r"(?=.{1,39}/)[a-z\d]+(-[a-z\d]+)*/(?!\.{1,2}$)(?!.*\.git$)[\w.-]{1,100}",
    re.ASCII | re.IGNORECASE,
)


def files(root: Path) -> list[Path]:
    """List the files of a working tree that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [root / name for name in sorted(set(listed.split("\0"))) if (root / name).is_file()]


def repository(root: Path) -> str:
    """Read the address from pyproject.toml, as "owner/name"."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def set_repo(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the address, and nothing else, in every text file of `root`.

    Args:
        new: The new address, "owner/name".
        root: A working tree.

    Returns:
        The files that changed.

    Raises:
        ValueError: GitHub would refuse this address.
    """
    if not ADDRESS.fullmatch(new):
        raise ValueError(
            "REPO is owner/name, as it follows github.com/ in the repository's address. "
            f"Received: {new!r}"
        )
    # Only after "github": elsewhere "owner/name" may be the path of a file.
    before = r"github(?:\.com)?[/:]"
    # Only whole names: the same letters may begin a longer one. ".git" may follow.
    after = r"(?!(?!\.git\b)\.?[\w-])"
    old = re.compile(f"({before}){re.escape(repository(root))}{after}")
    changed = {}
    for file in files(root):
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if (replaced := old.sub(rf"\g<1>{new}", text)) != text:
            changed[file] = replaced
    # pyproject.toml last: if this is interrupted, the same command still finds the
    # rest.
    for file in sorted(changed, key=lambda file: file == root / "pyproject.toml"):
        file.write_bytes(changed[file].encode())
    return [*changed]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1]:
        sys.exit("Usage: make set-repo REPO=owner/name")
    try:
        written = set_repo(sys.argv[1])
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
    for file in written:
        print(file.relative_to(ROOT))
    print(f"{len(written)} files changed: the repository is {repository(ROOT)}")
