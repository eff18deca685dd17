"""Find whatever looks like a token in notebooks and texts.

python tests/find_tokens.py notebooks README.md

It searches a notebook's sources, outputs and metadata, but not pictures, ids or the
format's own fields. It prints the file, the cell, the line and the first four
characters of each find, and exits with 1 if there is any.
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
    # Kaggle's tokens, its older keys, a kaggle.json.
    r"(?<![A-Za-z0-9])(KGAT_[0-9A-Za-z_-]{8,})",
    r"(?<![0-9A-Za-z])([0-9a-f]{32})(?![0-9A-Za-z])",
    rf"{_QUOTE}key{_QUOTE}\s*:\s*{_QUOTE}({_VALUE}){_QUOTE}",
    # A name that holds a secret and its value: in Python, JSON or YAML, and in a shell.
    rf"{_NAMES}{_QUOTE}?\]?\s*(?:=|:|,)\s*{_QUOTE}({_VALUE}){_QUOTE}",
    rf"{_NAMES}=({_VALUE})",
    # The tokens of the Hub, of GitHub, of Google, of others.
    r"(?<![A-Za-z0-9_])(hf_[A-Za-z0-9]{16,})",
    r"(?<![A-Za-z0-9_])(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    r"(?<![A-Za-z0-9_])(AIza[0-9A-Za-z_-]{30,})",
    r"(?<![A-Za-z0-9_-])(sk-(?=[A-Za-z0-9_-]*[0-9])[A-Za-z0-9_-]{20,})",
    # A header of HTTP.
    rf"(?i:authorization){_QUOTE}?\s*[:=,]\s*{_QUOTE}?(?i:bearer|basic)\s+({_VALUE})",
]
_TOKEN = re.compile("|".join(_PATTERNS))
_PLACEHOLDER = re.compile(
    r"(?i)your|token|example|placeholder|\.\.\.|xxx|^KAGGLE_|^(os|userdata|getpass)\."
)
# Colours of a terminal, and pictures in a page.
_NO_TEXT = re.compile(r"\x1b\[[\d;]*m|data:image/[^;]+;base64,[\w+/=]+")


def tokens(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the first characters of whatever looks like a token."""
    for number, line in enumerate(_NO_TEXT.sub("", text).splitlines(), start=1):
        for match in _TOKEN.finditer(line):
            value = match[match.lastindex]
            if not _PLACEHOLDER.search(value) and len(set(value)) > 5:
                yield number, value[:4]


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each part of a file: its name within the file, and its text."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        yield "", content
        return
    notebook = json.loads(content)
    for text in strings(notebook.get("metadata")):
        yield ", metadata", text
    for index, cell in enumerate(notebook["cells"]):
        name = f", cell {cell.get('id', index)}"
        yield f"{name}, source", "".join(cell["source"])
        for text in strings([cell["metadata"], cell.get("attachments")]):
            yield f"{name}, metadata", text
        for output in cell.get("outputs", []):
            for text in strings(output):
                yield f"{name}, {output['output_type']}", text


def strings(value) -> Iterator[str]:
    """Yield each text in a part of a notebook.

    A list of texts is one text, given in lines. A short text in a dict comes with its
    key, because only the two together look like a kaggle.json.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            # The lines of a source end in line breaks, those of a traceback do not.
            yield ("" if value[0].endswith("\n") else "\n").join(value)
        else:
            for item in value:
                yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            # Pictures are base64.
            if key.startswith("image/p"):
                continue
            if isinstance(item, str) and "\n" not in item:
                yield f'"{key}": "{item}"'
            else:
                yield key
            yield from strings(item)


def main(paths: list[str]) -> int:
    """Search files and the notebooks in folders; return 1 if there is a token."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
    finds = [
        f"{file}{part}, line {number}: {start}..."
        for file in files
        for part, text in texts(file)
        for number, start in tokens(text)
    ]
    print("\n".join(finds) or f"No tokens in {len(files)} files.")
    return int(bool(finds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else __doc__)
