"""Rows to CSV, JSON lines or Parquet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from elrcli.errors import ConfigError
from elrcli.files import atomic_path, readable_json, write_csv_rows

FORMATS = ("csv", "jsonl", "parquet")


def table_format(path: Path) -> str:
    """Return the format that the suffix of `path` names."""
    name = path.suffix.lower().removeprefix(".")
    if name not in FORMATS:
        raise ConfigError(
            f"{path}: unknown kind of table. End the name in .csv, .jsonl or .parquet."
        )
    if name == "parquet":
        _pyarrow()  # a missing package is better noticed before the work than after it
    return name


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write plain Python values to `path`, whole or not at all; the suffix picks the format.

    None is an empty cell in CSV and null elsewhere. The keys of each row are among `columns`;
    a missing key is None.
    """
    kind = table_format(path)
    with atomic_path(path) as temporary:
        if kind == "parquet":
            _write_parquet(temporary, columns, rows)
            return
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            if kind == "csv":
                write_csv(file, columns, rows)
            else:
                write_jsonl(file, columns, rows)


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and the rows as they come; nothing where the first one fails."""
    lines = ([row.get(name) for name in columns] for row in rows)
    first = list(itertools.islice(lines, 1))
    write_csv_rows(file, [columns, *first])
    write_csv_rows(file, lines)


def write_jsonl(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, every column in each."""
    for row in rows:
        file.write(readable_json({name: row.get(name) for name in columns}) + "\n")


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    pyarrow = _pyarrow()
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row in rows:
        for name in columns:
            value = row.get(name)
            values[name].append(_valid_utf8(value) if isinstance(value, str) else value)
    # A column without a value is text: of no type, it could not be joined with other tables.
    arrays = {
        name: pyarrow.array(column, None if set(column) - {None} else pyarrow.string())
        for name, column in values.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def _valid_utf8(text: str) -> str:
    """Replace bytes of a file name that Parquet cannot hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'elr[parquet]'.") from None
    return pyarrow
