"""Reads a column of texts from Parquet files in bounded memory, with errors that name the row.

Rows are counted from 1. pyarrow, which reads the files, is an extra: it is imported when a file is read.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from darkformer_jax.data.text_files import TEXT_FIELD_OPTION, OnRead, ignore_read, shown_names
from darkformer_jax.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

SUFFIX = ".parquet"

_ROWS_AT_ONCE = 1024


def require_pyarrow(path: str) -> None:
    """Raises UserError, which says how to install it, if pyarrow is missing. path: a file that needs it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{path}: Parquet files need the package pyarrow: bash launch/install.sh parquet, or pip install pyarrow"
        )


def read_parquet(path: str, field: str, on_read: OnRead) -> Iterator[tuple[int, str]]:
    """The texts in the column `field`, as (row number from 1, text).

    One row group is read at a time, and of that only the column. `on_read` adds up to the file's size.

    Raises UserError if the file cannot be read, has no rows or no such column of strings, or if a row is null.
    """
    for row, record in read_parquet_records(path, field, (), on_read):
        yield row, record[field]


def read_parquet_records(
    path: str,
    field: str,
    others: Sequence[str] = (),
    on_read: OnRead = ignore_read,
    option: str = TEXT_FIELD_OPTION,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_parquet` with the values of other columns, of any type, as (row number, value by column).

    option: what names the columns, for errors.
    """
    yield from _rows(path, (field,), others, on_read, option)


def column_names(path: str) -> list[str]:
    """The names of a file's columns. Raises UserError if the file cannot be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def read_parquet_values(
    path: str, columns: Sequence[str], on_read: OnRead = ignore_read
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The values of columns of any type, as (row number, value by column). Raises UserError as `read_parquet` does."""
    yield from _rows(path, (), columns, on_read, "")


def _rows(
    path: str, texts: Sequence[str], others: Sequence[str], on_read: OnRead, option: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_parquet_records`, of columns that must be `texts` and of `others`."""
    import pyarrow
    from pyarrow import parquet

    columns = [*texts, *others]
    try:
        size = os.path.getsize(path)
        with parquet.ParquetFile(path) as file:
            for column in columns:
                _check_column(path, file.schema_arrow, column, option, is_text=column in texts)
            num_rows = file.metadata.num_rows
            if not num_rows:
                raise UserError(f"{path} is empty; a data file needs text")
            row, reported = 0, 0
            for group in range(file.num_row_groups):
                options: dict[str, Any] = {"row_groups": [group], "columns": columns, "use_threads": False}
                # Columns are asked for by name: of "a.b", pyarrow also reads the field b of another column a.
                for batch in file.iter_batches(_ROWS_AT_ONCE, **options):
                    for values in zip(*(batch.column(column) for column in columns), strict=True):
                        row += 1
                        place = f"{path}: row {row} of {num_rows}"
                        yield (
                            row,
                            {
                                name: _text(value, name, place) if name in texts else _value(value, name, place)
                                for name, value in zip(columns, values, strict=True)
                            },
                        )
                    read = size * row // num_rows
                    on_read(read - reported)
                    reported = read
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _check_column(path: str, schema: "pyarrow.Schema", field: str, option: str, is_text: bool) -> None:
    count = schema.names.count(field)
    if not count:
        names = shown_names(schema.names)
        raise UserError(f'{path}: no column "{field}"; it has: {names} ({option} names the one to read)')
    if count > 1:
        raise UserError(f'{path} has {count} columns "{field}"; allowed: one')
    kind = schema.field(field).type
    if is_text and not _is_text(kind):
        raise UserError(f'{path}: the column "{field}" has the type {kind}; allowed: string or large_string')


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # categories: the file is the same, only how it is read differs
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _text(value: "pyarrow.Scalar", field: str, place: str) -> str:
    text: str | None = _value(value, field, place)
    if text is None:
        raise UserError(f'{place}: "{field}" is null; a row needs text')
    return text


def _value(value: "pyarrow.Scalar", field: str, place: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f'{place}: "{field}" is not UTF-8 text at offset {error.start}') from error
