"""Reads text files in bounded memory: plain, gzip-compressed and JSON lines, with errors that name the place.

Everything is read as bytes and decoded here, so line endings survive and byte counts are exact. For a file that is not
text, the error names the offset of the first bad byte (in the uncompressed data if the file is compressed).
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from darkformer_jax.errors import UserError, printable

OnRead = Callable[[int], None]  # called with the number of bytes just read from disk, for progress bars

_BLOCK_BYTES = 1 << 20
_PIECE_BYTES = 4 << 20
_MAX_LINE_BYTES = 64 << 20
_SHOWN_FIELDS = 20  # in an error
_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}

TEXT_FIELD = "text"  # where the documents of most published data sets have their text
TEXT_FIELD_OPTION = "data.text_field or --text_field"  # for errors


def ignore_read(num_bytes: int) -> None:
    """The `OnRead` of a caller that shows no progress."""


def _blocks(path: str, on_read: OnRead) -> Iterator[bytes]:
    """The file's uncompressed bytes, one block at a time. Raises UserError if it is unreadable or empty."""
    seen = 0
    is_empty = True
    try:
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            while block := file.read(_BLOCK_BYTES):
                is_empty = False
                position = raw.tell()
                on_read(position - seen)
                seen = position
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if is_empty:
        raise _no_text(path)


def _no_text(path: str) -> UserError:
    return UserError(f"{path} is empty; a data file needs text")


def _decode(data: bytes, path: str, offset: int) -> str:
    """UTF-8 to str, without the byte order mark that some programs write at the beginning of a file.

    offset: where `data` begins in the file. Raises UserError with the file's byte offset.
    """
    # NUL is valid UTF-8, yet in practice it means UTF-16 or a binary file.
    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(f"{path} is not UTF-8 text: NUL byte at offset {offset + nul}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        ) from error
    return text if offset else text.removeprefix("\ufeff")


def read_lines(path: str, on_read: OnRead = ignore_read) -> Iterator[tuple[int, str]]:
    """Lines without their line feed, as (number from 1, line). Raises UserError if the file is not text."""
    number, offset, rest = 1, 0, b""
    for block in _blocks(path, on_read):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield number, _decode(line, path, offset)
            number += 1
            offset += len(line) + 1
        if len(rest) > _MAX_LINE_BYTES:
            raise UserError(f"{path}:{number}: the line is longer than {_MAX_LINE_BYTES} bytes")
    if rest:
        yield number, _decode(rest, path, offset)


def read_pieces(path: str, on_read: OnRead = ignore_read) -> Iterator[tuple[int, str]]:
    """The pieces of a text file, as (byte offset, text). A file over 4 MiB is cut, after a line, every 4 MiB or so.

    The cuts bound the memory that a huge file takes, and let a part of it be held out.
    """
    offset, data = 0, b""
    for block in _blocks(path, on_read):
        data += block
        if len(data) > _PIECE_BYTES:
            cut = data.rfind(b"\n") + 1 or _character_boundary(data)
            yield offset, _decode(data[:cut], path, offset)
            offset += cut
            data = data[cut:]
    if data:
        text = _decode(data, path, offset)
        if not text:  # only a byte order mark
            raise _no_text(path)
        yield offset, text


def _character_boundary(data: bytes) -> int:
    """Where the last UTF-8 character of `data`, which may be incomplete, begins."""
    cut = len(data) - 1
    while cut > len(data) - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def read_json_lines(path: str, field: str, on_read: OnRead = ignore_read) -> Iterator[tuple[int, str]]:
    """The string in `field` of every JSON object of a .jsonl file, as (line number, text); blank lines are skipped."""
    for number, record in read_json_records(path, on_read):
        yield number, string_field(record, field, f"{path}:{number}", TEXT_FIELD_OPTION)


def read_json_records(path: str, on_read: OnRead = ignore_read) -> Iterator[tuple[int, Any]]:
    """The JSON value of every line of a .jsonl file, as (line number, value); blank lines are skipped."""
    for number, line in read_lines(path, on_read):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON object: {error}") from error
        yield number, record


def string_field(record: Any, name: str, place: str, option: str) -> str:
    """The string that a JSON object has under `name`.

    Raises UserError, which names `place`, if there is none or it is not UTF-8.

    option: what names the field, for the error.
    """
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: no "{name}" field that is a string; {_what_is_there(record, name, option)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; UTF-8 cannot
        raise UserError(f'{place}: "{name}" holds a lone surrogate at character {error.start}') from error
    return text


def _what_is_there(record: Any, name: str, option: str) -> str:
    if not isinstance(record, dict):
        return f"the line is {kind_of(record)}, not an object"
    if name in record:
        return f"it is {kind_of(record[name])}"
    return f"it has: {shown_names(record)} ({option} names the one to read)"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _JSON_KINDS.get(type(value), "a number")


def shown_names(names: Collection[str]) -> str:
    """The names of fields or columns for an error: without control characters, and not all if there are many."""
    shown = ", ".join(printable(name) for name in itertools.islice(names, _SHOWN_FIELDS))
    return (shown or "nothing") + (", ..." if len(names) > _SHOWN_FIELDS else "")
