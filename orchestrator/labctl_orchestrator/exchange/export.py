"""Export of views as CSV, JSON, JSON lines or Parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from labctl_orchestrator.exchange import outfile, query
from labctl_orchestrator.exchange.streams import for_programs, write_csv
from labctl_orchestrator.store.views import INTEGER, REAL, View
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError

CSV, JSONL, JSON, PARQUET = FORMATS = ("csv", "jsonl", "json", "parquet")
# Key columns of the views, in sort order.
KEYS = ("run_id", "job_id", "attempt_id", "repeat", "request", "device_id")
SUFFIXES = {".csv": CSV, ".jsonl": JSONL, ".ndjson": JSONL, ".json": JSON, ".parquet": PARQUET}

Rows = Iterator[list[tuple[Any, ...]]]


def format_of(path: str | None, wanted: str | None) -> str:
    """The wanted format, else that of the file's suffix, else CSV. Raises WrongUseError for an unknown suffix."""
    if wanted or path is None:
        return wanted or CSV
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise WrongUseError(f"unknown file format: {path}", f"end it in {', '.join(SUFFIXES)}, or give --format")
    return SUFFIXES[suffix]


def export(workspace: Workspace, view: View, run_ids: Sequence[str] | None, path: str | None, form: str) -> int:
    """Write the view's rows, all or those of the given runs, to a file or to standard output; returns the number of rows.

    The file appears when it is complete. Raises WrongUseError for Parquet without pyarrow or without a file, and OSError.
    """
    if form == PARQUET and path is None:
        raise WrongUseError("Parquet needs an output file", "give -o a file, such as -o runs.parquet")
    write, rows = WRITERS[form], _rows(workspace, view, run_ids)
    if form == PARQUET:
        _pyarrow()  # fails before the output file exists
    if path is None:
        return write(for_programs(sys.stdout), view, rows)
    with outfile.output_file(Path(path), binary=form == PARQUET) as file:
        return write(file, view, rows)


def _rows(workspace: Workspace, view: View, run_ids: Sequence[str] | None) -> Rows:
    """The rows in batches: an export may be larger than the memory."""
    names = ", ".join(column.name for column in view.columns)
    order = ", ".join(column.name for column in view.columns if column.name in KEYS)
    # The names are those of labctl's views, not user input.
    where, parameters = ("1", ()) if run_ids is None else (view.chosen, (json.dumps(run_ids),))
    sql = f"SELECT {names} FROM {view.name} WHERE {where} ORDER BY {order}"  # noqa: S608
    with query.stream_of(workspace, sql, parameters) as (_, batches):
        yield from batches


# ---------------------------------------------------------------- formats


def _write_csv(file: IO[Any], view: View, rows: Rows) -> int:
    write_csv(file, [[column.name for column in view.columns]])
    count = 0
    for batch in rows:
        write_csv(file, batch)
        count += len(batch)
    return count


def _write_jsonl(file: IO[Any], view: View, rows: Rows) -> int:
    count = 0
    for count, document in enumerate(_documents(view, rows), 1):  # noqa: B007
        file.write(f"{document}\n")
    return count


def _write_json(file: IO[Any], view: View, rows: Rows) -> int:
    count = 0
    file.write("[")
    for count, document in enumerate(_documents(view, rows), 1):
        file.write(f"{',' if count > 1 else ''}\n{document}")
    file.write("\n]\n")
    return count


def _documents(view: View, rows: Rows) -> Iterator[str]:
    names = [column.name for column in view.columns]
    for batch in rows:
        for row in batch:
            document = dict(zip(names, map(query.in_json, row), strict=True))
            yield json.dumps(document, ensure_ascii=False, allow_nan=False)


def _write_parquet(file: IO[Any], view: View, rows: Rows) -> int:
    """Fields have the types of the view's columns, and their descriptions and units as metadata."""
    pa, parquet = _pyarrow()
    kinds = {INTEGER: pa.int64(), REAL: pa.float64()}
    fields = [
        pa.field(c.name, kinds.get(c.kind, pa.string()), metadata={"description": c.text, "unit": c.unit})
        for c in view.columns
    ]
    schema = pa.schema(fields)
    # SQLite stores integers in REAL columns, and the reverse.
    types = [{INTEGER: int, REAL: float}.get(column.kind, str) for column in view.columns]
    count = 0
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in rows:
            columns = [
                pa.array([None if value is None else as_type(value) for value in values], type=field.type)
                for as_type, field, values in zip(types, fields, zip(*batch, strict=True), strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            count += len(batch)
    return count


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise WrongUseError(
            "Parquet needs pyarrow, which labctl's environment lacks",
            "pip install 'labctl-slurm[parquet]' (in a clone: '.[parquet]'), or export CSV, which pandas reads too",
        ) from None
    return pyarrow, pyarrow.parquet


WRITERS: dict[str, Callable[[IO[Any], View, Rows], int]] = {
    CSV: _write_csv,
    JSONL: _write_jsonl,
    JSON: _write_json,
    PARQUET: _write_parquet,
}
