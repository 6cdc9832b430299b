"""The rows of Parquet files, within the limits of text that expands.

A column may store a text once and refer to it from millions of rows, so that a few hundred bytes stand for
gigabytes. So texts are read as references to a dictionary, and decoded when their size is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trmt.errors import DataError
from trmt.storage.files import open_file
from trmt.text.limits import MAX_LINE, expanded_too_far, most_expanded, too_long

MAX_ROWS = 1 << 24  # of a row group
MAX_GROUP = 4 << 30  # bytes of a row group before it was compressed
BATCH = 10_000  # rows that are read at once
NESTED = "translation"  # the hub's column that has a column for each language


def parquet_rows(path: str, wanted: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of a file or URL: all names of columns, and the values of those that are wanted."""
    from pyarrow.parquet import ParquetFile

    with open_file(path) as stream:
        plain = ParquetFile(stream)
        _check_row_groups(path, plain.metadata)
        empty, read = _columns(plain, wanted)
        if not empty:
            raise DataError(f"{path} has no columns; check the file")
        most = most_expanded(stream.seek(0, 2))
        file, total, number = ParquetFile(stream, read_dictionary=list(read.values())), 0, 0
        for batch in file.iter_batches(batch_size=BATCH, columns=list(read.values())):
            arrays = {name: _array(batch, leaf) for name, leaf in read.items()}
            sizes = [size for size in map(_sizes, arrays.values()) if size is not None]
            for size in sizes:
                if (size > MAX_LINE).any():
                    raise too_long(f"{path}, row {number + int((size > MAX_LINE).argmax()) + 1}")
            decoded = sum(int(size.sum()) for size in sizes)
            number, total = number + len(batch), total + decoded + len(batch)
            if total > most:
                raise expanded_too_far(path, f"row {number:,}")
            step = len(batch) if decoded <= MAX_LINE else 1
            for start in range(0, len(batch), max(step, 1)):
                values = [_decoded(array.slice(start, step)) for array in arrays.values()]
                for cells in zip(*values, strict=True) if values else [()] * step:
                    yield {**empty, **dict(zip(read, cells, strict=True))}


def _check_row_groups(path: str, metadata: Any) -> None:
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if not 0 <= group.num_rows <= MAX_ROWS or not 0 <= group.total_byte_size <= MAX_GROUP:
            raise DataError(
                f"{path} has a row group of {group.num_rows:,} rows and {group.total_byte_size:,} bytes, but "
                f"{MAX_ROWS:,} rows and {MAX_GROUP:,} bytes are the limit; write it with smaller row groups"
            )


def _columns(file: Any, wanted: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """An empty value for each name of a column, and the paths of those to read: texts and short values.

    Of other types, such as lists, an empty value is enough for the error that follows.
    """
    from pyarrow.types import is_struct

    schema, fields = file.metadata.schema, list(file.schema_arrow)
    leaves = {leaf.path: leaf for leaf in map(schema.column, range(len(schema)))}
    nested = [list(field.type) for field in fields if field.name == NESTED and is_struct(field.type)]
    empty: dict[str, Any] = {}
    read: dict[str, str] = {}
    for prefix, level in (*((f"{NESTED}.", each) for each in nested), ("", fields)):
        for field in level:
            leaf = leaves.get(prefix + field.name)
            empty[field.name] = None
            read.pop(field.name, None)
            if field.name not in wanted:
                continue
            if leaf is None or leaf.max_repetition_level:
                empty[field.name] = {} if is_struct(field.type) else []
            elif leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
                empty[field.name] = b""
            else:
                read[field.name] = leaf.path
    return empty, read


def _array(batch: Any, path: str) -> Any:
    prefix = f"{NESTED}."
    if path.startswith(prefix) and NESTED in batch.schema.names:
        return batch.column(NESTED).field(path.removeprefix(prefix))
    return batch.column(path)


def _sizes(array: Any) -> Any:
    """The bytes of each text, as a NumPy array; None for other values."""
    from pyarrow import compute, types

    if not types.is_dictionary(array.type):
        return None
    sizes = compute.binary_length(array.dictionary)
    return sizes.take(array.indices).fill_null(0).to_numpy(zero_copy_only=False)


def _decoded(array: Any) -> list[Any]:
    from pyarrow.types import is_dictionary

    return (array.dictionary_decode() if is_dictionary(array.type) else array).to_pylist()
