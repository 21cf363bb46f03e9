"""Files of text: read if they are small, written whole or not at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from elrcli.errors import ConfigError, NotWritten, cannot_be_written

LARGEST_FILE = 64 * 1024**2  # bytes of a TOML or JSON file: a million class names fit
NUMBERS = re.compile(r"\[\n([^][{}\"]*)\]")  # a list of nothing else over several lines


def small_text(path: Path) -> str:
    """Return the text of a file whose size is looked at first."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # opening a pipe might wait for ever
        raise ConfigError(f"{path}: not a regular file.")
    if info.st_size > LARGEST_FILE:
        raise ConfigError(f"{path}: {info.st_size:,} bytes, too large for a file of settings.")
    return path.read_text(encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold one object."""
    try:
        content = json.loads(small_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected one JSON object.")
    return content


def readable_json(content: Any, indent: int | None = None) -> str:
    """Return JSON whose letters are not escaped, but bytes of a file name that are not UTF-8.

    With `indent`, numbers of one list stay on one line: a matrix has as many lines as rows.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    return text.encode("utf-8", "backslashreplace").decode()  # as \udcff, which JSON has too


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV; None becomes an empty cell, floats keep 6 significant digits."""
    buffer = io.StringIO(newline="")
    lines = ([_cell(row.get(name)) for name in columns] for row in rows)
    write_csv_rows(buffer, [columns, *lines])
    return buffer.getvalue()


def json_text(content: Mapping[str, Any]) -> str:
    """Return indented JSON that ends in a newline."""
    return readable_json(content, indent=2) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_csv_rows(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as lines of CSV; None becomes an empty cell."""
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for cells in rows:
        # The csv module leaves a lone carriage return unquoted, and then splits the row there.
        (quoted if any("\r" in str(cell) for cell in cells) else plain).writerow(cells)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, as UTF-8 with undecodable bytes kept."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on leaving it is flushed to disk and renamed.

    So is the folder: after a power failure there is the old file or the new one.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # the umask decides who may read
    except OSError as error:
        raise NotWritten(cannot_be_written(path, error)) from None
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise NotWritten(cannot_be_written(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        os.close(handle)
