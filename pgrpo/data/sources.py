"""Reads rows from files, the hub or a Python function. A row is a dict of column name to value."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from pgrpo.config import PYTHON, ConfigError, DataConfig
from pgrpo.config.functions import is_function, load_function

Row = dict[str, Any]


def read_rows(data: DataConfig, held_out: bool) -> tuple[list[Row], str]:
    """Return the rows and the name of their source for errors."""
    path, split, key = data.path, data.split, "data.path"
    if held_out:
        if data.eval_path is None and data.eval_split is None:
            raise ConfigError("evaluation needs held-out rows: set data.eval_path or data.eval_split")
        split = data.eval_split or data.split
        if data.eval_path is not None:
            path, key = data.eval_path, "data.eval_path"
    if path == PYTHON:
        raise ConfigError(f"{key}: the rows were passed from Python; pass them again, or set {key}=FILE")
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if is_function(path):
        return _call(path, split, key), f"{key}={path} (split {split})"
    if suffix in READERS:
        if held_out and data.eval_path is None:
            raise ConfigError(f"data.eval_split={split} has no effect on the file {path}: set data.eval_path")
        if not Path(path).expanduser().is_file():
            raise ConfigError(f"{key}: no file {path}")
        return check_rows(READERS[suffix](Path(path).expanduser()), f"{key}={path}"), f"{key}={path}"
    if Path(path).expanduser().is_file():
        raise ConfigError(f"{key}={path}: files are read if they end in {', '.join(READERS)} (or these and .gz)")
    name, revision = (data.name, data.revision) if path == data.path else (None, None)
    return _read_hub(path, name, split, revision, key), f"{key}={path} (split {split})"


def _read_jsonl(path: Path) -> Iterator[Any]:
    """Parse with ``json``: Arrow would convert date-like strings to dates and reject columns of mixed types."""
    for number, line in enumerate(_text(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {number}: not JSON: {error.msg} (column {error.colno}); write one JSON object a line"
            ) from error
        except RecursionError:
            raise ConfigError(f"{path}, line {number}: nested too deeply") from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}, line {number}: a row must be a JSON object, not {type(row).__name__}; write one JSON object a line"
            )
        yield row


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.load(_text(path))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}{hint}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: must be a JSON list of objects, not {type(rows).__name__}")
    return rows


def _read_csv(path: Path) -> Iterator[Row]:
    """Keep every value as a string: type inference would turn an answer ``007`` into 7."""
    is_tabbed = path.name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.DictReader(_text(path), strict=True, delimiter="\t" if is_tabbed else ",")
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise ConfigError(f"{path}, line {reader.line_num}: not {columns} fields as in the header")
            yield row
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> list[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not Parquet: {error}") from error


READERS = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet
}  # fmt: skip
"""File suffix (before .gz) -> reader."""


def _text(path: Path) -> StringIO:
    """Read a text file, plain or ``.gz``. ConfigError with the line number if it is not UTF-8."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return StringIO(file.read().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fix = f"save the file as UTF-8 (iconv -f UTF-16 or -f LATIN1 -t UTF-8 {path.name})"
        raise ConfigError(f"{path}, line {line}: not UTF-8 ({error.reason}); {fix}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _read_hub(path: str, name: str | None, split: str, revision: str | None, key: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(path, name, split=split, revision=revision)
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}={path} (name {name}, split {split}): cannot be loaded: {reason}") from error
    return check_rows(dataset.cast(_undecoded(dataset.features)), f"{key}={path}")


def _undecoded(feature: Any) -> Any:
    """The features of a data set with its images as the files they are: decoded, all of them would lie in memory at once, and a
    huge one before its size is checked."""
    from datasets import Features, Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, dict):
        found = {name: _undecoded(part) for name, part in feature.items()}
        return Features(found) if isinstance(feature, Features) else found
    return feature


def _call(name: str, split: str, key: str) -> list[Row]:
    function = load_function(name, key)
    try:
        rows = function(split)
    except Exception as error:
        raise ConfigError(f"{key}={name} raised {type(error).__name__}: {error} (called with '{split}')") from error
    return check_rows(rows, f"{key}={name}")


TEXT_OF = json.JSONEncoder(ensure_ascii=False, skipkeys=True, default=lambda _: None)
"""Made once: ``json.dumps`` would make one for each row."""


def check_rows(rows: Any, source: str) -> list[Row]:
    """Return the rows as dicts with the same columns; missing values are None."""
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise ConfigError(f"{source}: must be a sequence of rows (dicts), not {type(rows).__name__}")
    rows = list(rows)
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise ConfigError(f"{source}: row {index} must be a dict with column names as keys, not {row!r:.80}")
        columns.update(dict.fromkeys(row))
        try:
            TEXT_OF.encode(row).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise ConfigError(
                f"{source}: row {index} has a lone surrogate ({half!a}), which is not valid Unicode; repair the row"
            ) from None
    return [{name: row.get(name) for name in columns} for row in rows]


def describe_row(row: Row, index: int, column: str, source: str, file: Path | None) -> str:
    """Say where row ``index`` is, that it has no value in ``column``, and what it has.

    ``file`` is read again, as ``check_rows`` gave the row all columns; without a file a column that is null counts as absent.
    """
    place, there = f"{source}, row {index}", [name for name, value in row.items() if value is not None]
    if file is not None:
        suffix = Path(file.name.lower().removesuffix(".gz")).suffix
        there = list(next(islice(READERS[suffix](file), index, None)))
        if suffix == ".jsonl":
            numbers = (number for number, line in enumerate(_text(file), start=1) if line.strip())
            place = f"{file}, line {next(islice(numbers, index, None))}"
    is_null = column in there or column.split(".")[0] in there
    lacks = f"`{column}` is null" if is_null else f"no `{column}`"
    return f"{place}: {lacks}; it has {', '.join(f'`{name}`' for name in there) or 'no values'}"
