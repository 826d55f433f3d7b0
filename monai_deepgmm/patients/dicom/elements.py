"""The data elements of a DICOM file up to its pixels (PS3.5 and PS3.10): those that are asked for, nothing trusted."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from monai_deepgmm.patients.study import Problem

#: Tag → value as stored, or the items of a sequence.
Elements = Mapping[int, "bytes | tuple[Elements, ...]"]

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
#: Whose pixels are stored as they are.
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
_KIND, _SYNTAX, _PIXELS, _ITEM, _ITEM_END, _SEQUENCE_END = (
    0x00020002,
    0x00020010,
    0x7FE00010,
    0xFFFEE000,
    0xFFFEE00D,
    0xFFFEE0DD,
)
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, _PIXELS)
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED, _MARK_AT = 0xFFFFFFFF, 128
_MAX_VALUE, _MAX_DEPTH = 1 << 16, 16
_COPY = "Copy or export the file again; delete it if it is not needed"


class DamagedError(Exception):
    """A DICOM file that cannot be understood.

    Args:
        problem: what to tell of it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Pixels(NamedTuple):
    """Where a file's pixels lie.

    Attributes:
        tag: of their element.
        offset: the byte where they begin.
        length: how many bytes there should be; None: they are packed, in pieces.
    """

    tag: int
    offset: int
    length: int | None


class DataSet(NamedTuple):
    """What was read of a file.

    Attributes:
        elements: the wanted ones, on all levels.
        order: of the bytes in numbers, "<" or ">".
        syntax: the transfer syntax's UID.
        pixels: None where the file holds none.
        size: of the file, in bytes.
        kind: the UID of what the file is, as its first lines say; "" where they do not.
    """

    elements: Elements
    order: str
    syntax: str
    pixels: Pixels | None
    size: int
    kind: str = ""


def damaged(path: Path, found: str, remedy: str = _COPY, code: str = "E_DICOM_FILE") -> DamagedError:
    """The error that says what is wrong with a file."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path.name)
    return DamagedError(Problem(code, f"{name}: {found}", remedy))


def read(path: Path, wanted: Collection[int], nested: Collection[int]) -> DataSet | None:
    """Reads a file's header.

    Args:
        path: any file.
        wanted: the tags whose values are kept.
        nested: the tags of the sequences that are looked into.

    Returns:
        None where the file is no DICOM, as far as its name and first bytes tell.

    Raises:
        DamagedError: it is DICOM, and cannot be read to its pixels.
    """
    named = path.suffix.lower() in (".dcm", ".dicom", ".ima")
    try:
        if not path.is_file():  # a pipe would block at open
            return None
        with path.open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(_MARK_AT + 4)
            marked = start[_MARK_AT:] == b"DICM"
            if not marked and not _bare(start):
                if named:
                    raise damaged(path, "the file has zero bytes" if size == 0 else "the file is no DICOM")
                return None
            file.seek(len(start) if marked else 0)
            return _Reader(file, path, size, wanted, nested).read(marked, start)
    except (OSError, ValueError) as error:
        if named:
            raise damaged(path, f"it cannot be read ({getattr(error, 'strerror', error)})") from error
        return None


def _uid(elements: Elements, tag: int) -> str:
    value = elements.get(tag, b"")
    return value.decode("ascii", "replace").strip(" \0") if isinstance(value, bytes) else ""


def _bare(start: bytes) -> bool:
    """Whether a file without preamble begins as a data set does, with group 8."""
    return len(start) >= 8 and start[:2] == b"\x08\x00" and start[3] == 0 and start[2] < 0x20


class _Reader:
    """Walks through one file.

    Args:
        file: open.
        path: for messages.
        size: in bytes.
        wanted: see ``read``.
        nested: see ``read``.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int, wanted: Collection[int], nested: Collection[int]) -> None:
        self.file, self.path, self.size, self.wanted, self.nested = file, path, size, wanted, nested
        self.explicit, self.order = True, "<"
        self.pixels: Pixels | None = None

    def read(self, marked: bool, start: bytes) -> DataSet:
        kind = ""
        syntax = EXPLICIT if start[4:6].isalpha() else IMPLICIT
        if marked:
            meta = self.elements(None, 0, group=2)
            syntax, kind = _uid(meta, _SYNTAX), _uid(meta, _KIND)
            if syntax == DEFLATED:
                raise damaged(self.path, "the whole file is deflated", "Unpack it, with gdcmconv --raw or dcmconv +te")
        self.explicit = syntax != IMPLICIT
        self.order = ">" if syntax == BIG_ENDIAN else "<"
        found = self.elements(None, 0)
        return DataSet(found, self.order, syntax, self.pixels, self.size, kind)

    def elements(
        self, end: int | None, depth: int, group: int | None = None
    ) -> dict[int, bytes | tuple[Elements, ...]]:
        """The wanted elements up to a byte, an end of item, the pixels, or the first of another group."""
        if depth > _MAX_DEPTH:
            raise damaged(self.path, f"the header is nested more than {_MAX_DEPTH} deep")
        found: dict[int, bytes | tuple[Elements, ...]] = {}
        while (at := self.file.tell()) < (self.size if end is None else end):
            if group is not None and struct.unpack("<H", self.take(2))[0] != group:
                self.file.seek(at)
                break
            self.file.seek(at)
            tag, kind, length = self.head()
            if tag == _ITEM_END:
                break
            if depth == 0 and tag in _PIXEL_TAGS:
                self.pixels = Pixels(tag, self.file.tell(), None if length == _UNDEFINED else length)
                break
            if tag in self.nested and kind in (b"SQ", b"UN", b""):
                found[tag] = self.items(kind, length, depth, keep=True)
            elif length == _UNDEFINED:
                self.items(kind, length, depth, keep=False)
            elif tag in self.wanted and length <= _MAX_VALUE:
                found[tag] = self.take(length)
            else:
                self.skip(length)
        return found

    def items(self, kind: bytes, length: int, depth: int, *, keep: bool) -> tuple[Elements, ...]:
        """The items of a sequence; one of unknown kind is written implicitly, whatever the file is (PS3.5 6.2.2)."""
        explicit, self.explicit = self.explicit, self.explicit and kind != b"UN"
        end = None if length == _UNDEFINED else self.file.tell() + length
        if end is not None and end > self.size:
            raise self.short()
        found: list[Elements] = []
        while end is None or self.file.tell() < end:
            tag, _, size = self.head()
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise damaged(self.path, "a sequence in the header holds something else than items")
            if not keep and size != _UNDEFINED:
                self.skip(size)
                continue
            stop = None if size == _UNDEFINED else self.file.tell() + size
            item = self.elements(stop, depth + 1)
            if keep:
                found.append(item)
        self.explicit = explicit
        return tuple(found)

    def head(self) -> tuple[int, bytes, int]:
        """Tag, kind (b"" where it is not written) and length of the next element."""
        block = self.take(8)
        group, element = struct.unpack(f"{self.order}HH", block[:4])
        tag = group << 16 | element
        if not self.explicit or group == 0xFFFE:
            return tag, b"", struct.unpack(f"{self.order}I", block[4:])[0]
        kind = block[4:6]
        if not kind.isalpha():
            raise damaged(self.path, "the header is garbled")
        if kind in _LONG:
            return tag, kind, struct.unpack(f"{self.order}I", self.take(4))[0]
        return tag, kind, struct.unpack(f"{self.order}H", block[6:])[0]

    def take(self, count: int) -> bytes:
        """The next bytes, all of them."""
        found = self.file.read(count)
        if len(found) < count:
            raise self.short()
        return found

    def skip(self, count: int) -> None:
        """Passes over bytes that must be there."""
        target = self.file.tell() + count
        if target > self.size:
            raise self.short()
        self.file.seek(target)

    def short(self) -> DamagedError:
        """The error for a file that ends within its header."""
        return damaged(self.path, f"the file ends within its header, after {self.size} bytes")


def pieces(path: Path, data: DataSet) -> tuple[tuple[int, int], ...]:
    """Where the pieces of packed pixels lie, (offset, length) each; the first is a table of offsets, or empty.

    Raises:
        DamagedError: they end too early.
    """
    if data.pixels is None:
        return ()
    found: list[tuple[int, int]] = []
    with path.open("rb") as file:
        at = data.pixels.offset
        while True:
            file.seek(at)
            head = file.read(8)
            tag = int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
            if len(head) == 8 and tag == _SEQUENCE_END:
                return tuple(found)
            length = int.from_bytes(head[4:], "little")
            if len(head) < 8 or tag != _ITEM or at + 8 + length > data.size:
                raise damaged(path, f"the packed pixels end too early, after {data.size} bytes")
            found.append((at + 8, length))
            at += 8 + length
