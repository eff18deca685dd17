"""Read the rows of a file: JSON Lines, JSON, CSV, TSV, Parquet or Excel, also gzipped.

Each reader yields (place, row): "rows.csv, line 3" and whatever stands there. A row
that cannot even be read is yielded as the ValueError that says why, so that
`load_records` can skip it and read on. What a row means is in `records`.
"""

import csv
import gzip
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xlsx")

# A quoted field in TSV: from its beginning to its end.
_QUOTED_IN_TSV = re.compile(r'(?:^|\t)"(?:[^"]|"")*"(?:\t|\r?$)', re.MULTILINE)

# What may stand between the fields of a CSV file.
_SEPARATORS = (",", ";", "\t", "|")


def has_rows(name: str | Path) -> bool:
    """Return whether a name is that of a file that can be read, which need not exist.

    >>> has_rows("rows.jsonl.gz"), has_rows("notes.txt")
    (True, False)
    """
    return _kind(Path(name)) in READABLE


def rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    """Read a file's rows, as its suffix says.

    Raises:
        ValueError: The file is of another kind, or as a whole not what it is called.
        ImportError: An Excel file needs packages that are not installed.
    """
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        yield from _rows_of_csv(path, "\t" if kind == ".tsv" else None)
    elif kind == ".json":
        yield from _rows_of_json(path)
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from None
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist()))
    elif kind == ".xlsx":
        yield from _rows_of_excel(path)
    elif kind in READABLE:
        yield from _rows_of_json_lines(path)
    else:
        raise ValueError(
            f"load_records reads {', '.join(READABLE)} files, also with .gz behind. "
            f"Received: {str(path)!r}"
        )


def _kind(path: Path) -> str:
    path = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def _bytes(path: Path) -> bytes:
    """Read a whole file, unpacked if it is gzipped."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}.") from None


def _text(path: Path) -> str:
    """Decode a whole file. UTF-8 and UTF-16 are known by their beginning or contents.

    Raises ValueError for any other encoding, because a guess could be wrong.
    """
    content = _bytes(path)
    is_utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        # "utf-8-sig" is UTF-8 with or without a byte order mark, as Excel writes it.
        return content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not text in UTF-8: line {line} has the byte "
            f"0x{content[error.start]:02x}. Save it again as UTF-8 (in Excel: Save As, CSV UTF-8)."
        ) from None


def _rows_of_csv(path: Path, separator: str | None) -> Iterator[tuple[str, object]]:
    text = _text(path).lstrip("\r\n")
    if said := re.match(r"sep=(.)\r?\n", text):
        # Excel's own way to say what separates the fields.
        separator = said[1]
        text = text[said.end() :]
    is_tsv = separator == "\t"
    separator = separator or _separator(text)
    # `strict`, because otherwise a quote that is never closed swallows the rest. In
    # TSV, quotes are letters, unless they enclose a field.
    plain = is_tsv and not _QUOTED_IN_TSV.search(text)
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, quoting=quoting,
        skipinitialspace=separator in ",;",
    )  # fmt: skip
    names = reader.fieldnames or []
    if twins := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"{path} has two columns called {min(twins)!r}. Rename one.")
    try:
        while True:
            with _any_length():
                row = next(reader, None)
            if row is None:
                return
            # `DictReader` puts the fields that have no name under None.
            if any(row.get(None, ())):
                row = ValueError(
                    "more fields than the header names. Put a text that contains "
                    f"{separator!r} in quotes."
                )
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV, near line {reader.line_num}: {error}.") from None


@contextmanager
def _any_length() -> Iterator[None]:
    """Let a field of a CSV file be longer than Python's limit, 131,072 characters.

    The limit holds for the whole process, so it comes back.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _separator(text: str) -> str:
    """Find what separates the names in a header, outside quotes.

    >>> _separator('"Question, please";Answer')
    ';'
    """
    header = re.split(r"\r|\n", text.lstrip(), maxsplit=1)[0]
    outside = "".join(header.split('"')[::2])
    return max(_SEPARATORS, key=outside.count)


def _rows_of_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error}. If it has one object a line, call it .jsonl."
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects. Received: {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, object {number}", row


def _rows_of_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    # Read as bytes: only a line feed ends a line. As text, Python would also break
    # lines at characters that JSON allows within a string.
    content = _bytes(path)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content = _text(path).encode()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        # One array, whatever the file is called.
        yield from _rows_of_json(path)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            row = ValueError(f"not a line of JSON: {error}. Save the file again as UTF-8.")
        except json.JSONDecodeError as error:
            row = ValueError(f"not a line of JSON: {error}.")
        yield f"{path}, line {number}", row


def _rows_of_excel(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pandas

        frame = pandas.read_excel(path)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an Excel file: {error}.") from None
    except ImportError:
        raise ImportError(
            "Excel files take two packages: pip install pandas openpyxl. Or save the sheet as "
            "CSV UTF-8, and load that."
        ) from None
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    # The header is line 1 of the sheet.
    yield from ((f"{path}, line {i}", row) for i, row in enumerate(rows, start=2))
