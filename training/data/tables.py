"""The rows of Parquet files as records."""

import itertools
from collections.abc import Iterator
from typing import IO, Any

from training.data.dataset import DataError
from training.data.records import Bad, TextOrBad, checked, in_a_line


def parquet_records(stream: IO[bytes], field: str, path: str) -> Iterator[TextOrBad]:
    """The cells of the column, or of the field inside it, in order."""
    import pyarrow  # here, because it takes half a second
    from pyarrow import compute, parquet

    try:
        with parquet.ParquetFile(stream) as table:
            inner = _column(table.schema_arrow, field, path)
            rows = itertools.count(1)
            for group in range(table.num_row_groups):  # pyarrow cannot join dictionaries of several
                for batch in table.iter_batches(batch_size=128, columns=[field], row_groups=[group]):
                    column = compute.struct_field(batch.column(0), inner) if inner else batch.column(0)
                    if pyarrow.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    for value in column.to_pylist():
                        yield _cell(value, field, where=f"{path}: row {next(rows)}")
    except pyarrow.ArrowException as error:
        problem = in_a_line(error)
        raise DataError(f"{path}: not a readable Parquet file ({problem}); write it again") from error


def _column(schema: Any, field: str, path: str) -> list[str]:
    """Names inside the column of `field` that lead to its text; empty for a plain column."""
    import pyarrow

    names = [field] if field in schema.names else field.split(".")
    if schema.names.count(names[0]) > 1:
        raise DataError(f"{path}: several columns {names[0]!r}; rename all but one, or set data.text_field")
    kind: Any = pyarrow.struct(list(schema))
    for name in names:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            columns = ", ".join(schema.names)
            raise DataError(f"{path}: no column {field!r} among {columns}; set data.text_field")
        kind = kind.field(name).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(value) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise DataError(f"{path}: column {field!r} holds {kind}, not strings; set data.text_field")
    return names[1:]


def _cell(value: str | bytes | None, field: str, *, where: str) -> TextOrBad:
    if value is None:
        return Bad(where, f"no text in {field!r}; remove the row")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Bad(where, f"not valid UTF-8 ({error.reason}); remove the row")
    return checked(value, where=where)
