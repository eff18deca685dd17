"""Find what looks like a token in notebooks and texts: python tests/find_tokens.py notebooks README.md

Of a notebook, sources, outputs and metadata are searched; pictures, ids and the format's own fields are not. It names
the file, the cell and the line, and the first four characters of what it found; it exits with 1 if it found something.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_VALUE = r"[A-Za-z0-9_+/.~-]{12,}={0,2}"
_NAMES = r"(?:KAGGLE_KEY|KAGGLE_API_TOKEN|HF_TOKEN|HUGGING_FACE_HUB_TOKEN)"
_QUOTE = r"""(?:\\?["']|&quot;|&\#x27;|&\#39;)"""
_PATTERNS = [
    r"(?<![A-Za-z0-9])(KGAT_[0-9A-Za-z_-]{8,})",  # Kaggle's
    r"(?<![0-9A-Za-z])([0-9a-f]{32})(?![0-9A-Za-z])",  # Kaggle's older keys
    rf"{_QUOTE}key{_QUOTE}\s*:\s*{_QUOTE}({_VALUE}){_QUOTE}",  # a kaggle.json
    rf"{_NAMES}{_QUOTE}?\]?\s*(?:=|:|,)\s*{_QUOTE}({_VALUE}){_QUOTE}",  # in Python, JSON or YAML
    rf"{_NAMES}=({_VALUE})",  # in a shell
    r"(?<![A-Za-z0-9_])(hf_[A-Za-z0-9]{16,})",
    r"(?<![A-Za-z0-9_])(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    r"(?<![A-Za-z0-9_])(AIza[0-9A-Za-z_-]{30,})",
    r"(?<![A-Za-z0-9_-])(sk-(?=[A-Za-z0-9_-]*[0-9])[A-Za-z0-9_-]{20,})",
    rf"(?i:authorization){_QUOTE}?\s*[:=,]\s*{_QUOTE}?(?i:bearer|basic)\s+({_VALUE})",
]
_TOKEN = re.compile("|".join(_PATTERNS))
_PLACEHOLDER = re.compile(
    r"(?i)your|token|example|placeholder|\.\.\.|xxx|^KAGGLE_|^(os|userdata|getpass)\."
)
_NO_TEXT = re.compile(r"\x1b\[[\d;]*m|data:image/[^;]+;base64,[\w+/=]+")  # colours, pictures


def tokens(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the beginning of whatever looks like a token."""
    for number, line in enumerate(_NO_TEXT.sub("", text).splitlines(), start=1):
        for match in _TOKEN.finditer(line):
            value = match[match.lastindex]
            if not _PLACEHOLDER.search(value) and len(set(value)) > 5:
                yield number, value[:4]


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each part of a file: what it is, and its text."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        yield "", content
        return
    notebook = json.loads(content)
    yield from ((", metadata", text) for text in strings(notebook.get("metadata")))
    for index, cell in enumerate(notebook["cells"]):
        name = f", cell {cell.get('id', index)}"
        yield f"{name}, source", "".join(cell["source"])
        yield from (
            (f"{name}, metadata", text)
            for text in strings([cell["metadata"], cell.get("attachments")])
        )
        for output in cell.get("outputs", []):
            kind = output["output_type"]
            yield from ((f"{name}, {kind}", text) for text in strings(output))


def strings(value) -> Iterator[str]:
    """Yield each text in a part of a notebook, whose lines may be a list; of a dict, each key with its value."""
    if isinstance(value, str) or (
        value and isinstance(value, list) and all(isinstance(one, str) for one in value)
    ):
        yield (
            value
            if isinstance(value, str)
            else ("" if value[0].endswith("\n") else "\n").join(value)
        )
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if not key.startswith("image/p"):  # pictures are base64
                yield f'"{key}": "{one}"' if isinstance(one, str) and "\n" not in one else key
                yield from strings(one)


def main(paths: list[str]) -> int:
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.rglob("*.ipynb")) if path.is_dir() else [path])
    ]
    found = [
        f"{file}{part}, line {number}: {start}..." for file in files for part, text in texts(file)
        for number, start in tokens(text)
    ]  # fmt: skip
    print("\n".join(found) or f"No tokens in {len(files)} files.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else __doc__)
