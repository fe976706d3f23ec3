"""The door of the files that people bring with data=: is it there, is it text, is it JSON? Whatever is wrong is one line
that names the file, the line and the fix. What .gz and .xz hold is read as the file itself, whatever it is called.
"""
import gzip
import json
import lzma
import os
import re
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from config import UserError

PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}
WIDE = (b"\xff\xfe", b"\xfe\xff")                      # how UTF-16 begins


def given(data: str) -> list[Path]:
    """What data= names: files and folders, comma-separated. A comma may also be part of a name."""
    names = [data] if os.path.exists(data) else [name.strip() for name in data.split(",") if name.strip()] or [data]
    for name in names:
        if not os.path.exists(name):
            raise UserError(f"data: there is no file or folder {name}")
    return [Path(name) for name in names]


def walked(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files' names) for it and each folder below, linked ones too, but for hidden ones, like .git. A folder
    that cannot be read is no empty one."""
    def fail(error: OSError) -> None:
        raise UserError(f"data: {error.filename} cannot be read: {error.strerror}")

    seen = {os.path.realpath(folder)}
    for place, below, names in os.walk(folder, onerror=fail, followlinks=True):
        found = sorted(below, key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        below.clear()
        for name in found:
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:          # a link may lead round in a circle
                seen.add(real)
                below.append(name)
        yield Path(place), sorted(name for name in names if not name.startswith("."))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. What goes wrong while it is read is told in one line."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "is not there"
        raise UserError(f"data: {path} {what}; give a file")
    try:
        with open(path, "rb") as file:
            begin = file.read(6)
        opener: Any = next((opener for magic, opener in PACKED.items() if begin.startswith(magic)), open)
        with opener(path, "rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise not_utf8(f"data: {path}", error) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"data: {path} cannot be unpacked: {told(error)}; is it whole? get it anew") from None
    except OSError as error:
        raise UserError(f"data: {path} cannot be read: {told(error)}") from None


def told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    kind = "UTF-16" if error.object.startswith(WIDE) else f"it holds the byte 0x{error.object[error.start]:02x}"
    return UserError(f"{where}: not text in UTF-8 ({kind}); give text, saved as UTF-8")


def decoded(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    if "\0" in text:
        raise UserError(f"{where}: not text in UTF-8 (it holds zero bytes); give text, saved as UTF-8")
    return text


def parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {told(error)}; is the file whole?") from None


def read_bytes(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


def read_json(path: Path) -> dict:
    where = f"data: {path}"
    return record_of(parsed(decoded(read_bytes(path), where), where), where)


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) for each line of a file of JSON lines."""
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            where = f"data: {path}, line {number}"
            text = decoded(raw, where)
            if text.strip():
                yield where, record_of(parsed(text, where), where)


def record_of(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, like {{...}}, not {named(value)}")
    return value


def named(value: Any) -> str:
    """A value in a message: JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def is_text(value: Any) -> bool:
    """Text that can be written and sent on: half a surrogate pair, which JSON lets through, cannot."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))
