"""Our Parquet files: one frame, one JSON header and some larger JSON values, in bytes that depend on nothing else.

The header and the values live in the file's key-value metadata, so that any Parquet reader still reads the table.
Larger values (a tokenizer, a list of categories) are zlib-compressed. Pages carry checksums, which are verified when a
file is read: a damaged file is an error, never a wrong number.
"""

import base64
import binascii
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from interp.errors import ResultError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
_HEADER = b"interp"
_CATEGORIES = "categories"
_LARGEST = 2**30  # bytes of one decompressed value: more is a damaged or hostile file
_KEY_LIMIT = 2**30  # bytes of Parquet's own header, which holds our metadata; its default is too small for that


def write_parquet(file: BinaryIO, frame: "pd.DataFrame", header: dict[str, Any], **values: Any) -> None:
    """Writes a frame as Parquet.

    Args:
        file: writable, binary.
        frame: as `columns.conform` returns it.
        header: small JSON values; `format` is added.
        **values: larger JSON values, by name.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parquet keeps neither the categories of integer columns nor, beyond one dictionary page, those nobody uses.
    values[_CATEGORIES] = {
        str(name): {"values": frame[name].cat.categories.tolist(), "ordered": bool(frame[name].cat.ordered)}
        for name in frame.columns
        if isinstance(frame[name].dtype, pd.CategoricalDtype)
    }
    table = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {_HEADER: json.dumps({"format": FORMAT, **header}, sort_keys=True).encode()}
    metadata |= {_HEADER + b"." + name.encode(): _compress(values[name]) for name in sorted(values)}
    with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)  # as schema metadata it would be in the file twice


def read_parquet(path: Path) -> tuple["pd.DataFrame", dict[str, Any], dict[str, Any]]:
    """Reads a file of `write_parquet`.

    Returns:
        frame, header, values.

    Raises:
        ResultError: the file is missing, not Parquet, not ours, from a newer version, truncated or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_start(path)
    limits = {"thrift_string_size_limit": _KEY_LIMIT, "thrift_container_size_limit": _KEY_LIMIT}
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, **limits) as file:
            header, values = _decode(file.metadata.metadata or {}, path)
            frame = file.read().to_pandas()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise ResultError(f"{path} is truncated or damaged ({_first_line(error)}); make it again") from error
    try:
        return _restore_categories(frame, values.pop(_CATEGORIES)), header, values
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(path, error) from error


def check_format(header: Any, path: Path) -> None:
    """Refuses what a newer interp wrote.

    Raises:
        ResultError: it names both versions.
    """
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ResultError(f"{path} has corrupt metadata: its format version is {version!r}")
    if version > FORMAT:
        raise ResultError(
            f"{path} has format version {version}, and this interp reads versions up to {FORMAT}: "
            "upgrade it with `pip install --upgrade interp`"
        )


def _check_start(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        raise ResultError(f"there is no result at {path}") from error
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise ResultError(f"{path} is truncated: it is empty; make it again")
    if start != b"PAR1"[: len(start)]:
        raise ResultError(f"{path} is not a Parquet file; a result is a file that Result.save wrote")


def _decode(metadata: dict[bytes, bytes], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if _HEADER not in metadata:
        raise ResultError(f"{path} is a Parquet file, but not a result of interp; pandas.read_parquet reads it")
    try:
        header = json.loads(metadata[_HEADER])
    except ValueError as error:
        raise _corrupt(path, error) from error
    check_format(header, path)
    prefix = _HEADER + b"."
    try:
        values = {
            key.removeprefix(prefix).decode(): _decompress(value)
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
    except (ValueError, zlib.error, binascii.Error) as error:
        raise _corrupt(path, error) from error
    return header, values


def _restore_categories(frame: "pd.DataFrame", categories: dict[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    for name, entry in categories.items():
        dtype = pd.CategoricalDtype(entry["values"], entry["ordered"])
        known = int(frame[name].notna().sum())
        frame[name] = frame[name].astype(object).astype(dtype)
        if int(frame[name].notna().sum()) != known:
            raise ValueError(f"column {name!r} holds values outside its categories")
    return frame


def _compress(value: Any) -> bytes:
    return base64.b64encode(zlib.compress(json.dumps(value, sort_keys=True).encode(), level=6))


def _decompress(value: bytes) -> Any:
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(base64.b64decode(value, validate=True), _LARGEST)
    if not decompressor.eof:
        raise ValueError("compressed value is cut or too large")
    return json.loads(text)


def _corrupt(path: Path, error: Exception) -> ResultError:
    return ResultError(f"{path} has corrupt metadata ({_first_line(error)}); make it again")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
