"""What the endurance test throws at the software: tiny patients, and headers, texts and tables that are wrong."""

from __future__ import annotations

import copy
import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

SEQUENCES = ("LGE", "T2", "C0")
LEVELS = {"LGE": (180, 60, 100, 220), "T2": (40, 100, 220, 180), "C0": (220, 60, 110, 65)}
VALUES = (500, 200, 1220, 2221)
AFFINE = np.diag([-1.5, -1.5, 8.0, 1.0])
#: Bytes of a NIfTI-1 header that mean something: their place and how they are packed.
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
    "vox_offset": (108, "f"), "scl": (112, "2f"), "units": (123, "B"), "codes": (252, "2h"), "quatern": (256, "6f"),
    "srow": (280, "12f"), "magic": (344, "4s"),
}  # fmt: skip
NUMBERS = (0, -1, 1, 2, 7, 255, 256, -32768, 32767, 0.5, -0.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"))
#: Values of wrong kinds, for any key of any text.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 255, 256, 10**20, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", " ", "LGE"),
    *("T2", "blood", "scar", "none", "\x1b[31m", "a\nb", "é", "../..", "/", "$import os", "@x", "(a+)+b", "x" * 5000),
    *([], {}, [[]], [None], ["LGE"], [1, 2], [0.5, 0.1], {"a": 1}, {"": None}, {1: 2}, [["blood", "scar"]]),
)
MILD = ("0", "0.1", "0.5", "1", "2", "3", "20", "1e-3", "true", "false", "null", "diag", "full")


def patient(folder: Path, name: str, seed: int = 0, *, slices: int = 2, compressed: bool = True) -> dict[str, Path]:
    """A heart of 40 by 40 pixels, its files by what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, shape = np.random.default_rng(seed), (40, 40, slices)
    x, y, _ = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    tissue = np.where((x > 0) & (y > 0), 2, np.where(x > 0, 3, 1))
    tissue[np.hypot(x, y) < 8] = 0
    inside, files, ending = np.hypot(x, y) < 15, {}, ".nii.gz" if compressed else ".nii"
    for sequence in (*SEQUENCES, "gd"):
        levels = np.array(LEVELS.get(sequence, VALUES))[tissue]
        noise = rng.normal(20, 6, shape) if sequence in LEVELS else 0
        image = nib.Nifti1Image((inside * levels + noise).astype(np.int16), AFFINE)
        image.set_sform(AFFINE, 1)
        image.set_qform(AFFINE, 1)
        files[sequence] = folder / f"{name}_{sequence}{ending}"
        nib.save(image, files[sequence])
    return files


# Headers -------------------------------------------------------------------------------------------------------------


def header(raw: bytes, rng: random.Random) -> bytes:
    """A file's bytes with some fields of its header, some of its bits, or its end changed."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        kind = rng.random()
        if kind < 0.6 and len(data) >= 352:
            place, form = FIELDS[rng.choice(list(FIELDS))]
            values = list(struct.unpack_from(f"<{form}", data, place))
            values[rng.randrange(len(values))] = rng.choice(NUMBERS)
            try:
                struct.pack_into(f"<{form}", data, place, *values)
            except (struct.error, OverflowError):
                data[place] = rng.randrange(256)
        elif kind < 0.9:
            data[rng.randrange(min(352, len(data)))] = rng.randrange(256)
        elif kind < 0.95:
            data = data[: rng.randrange(len(data))] or data
        else:
            data += bytes(rng.randrange(500))
    return gzip.compress(bytes(data), 1) if rng.random() < 0.3 else bytes(data)


# Texts ---------------------------------------------------------------------------------------------------------------


def places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield (*way, key)
        yield from places(value, (*way, key))


def structure(content: Any, rng: random.Random) -> Any:
    """The same with one to three values, keys or whole parts exchanged, taken away or put elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (ways := list(places(content))):
            break
        *path, last = rng.choice(ways)
        parent = content
        for step in path:
            parent = parent[step]
        kind = rng.random()
        if kind < 0.3 and isinstance(parent[last], int | float):
            parent[last] = type(parent[last])(parent[last] * rng.choice((0.5, 1.1, 2, -1)))
        elif kind < 0.6:
            parent[last] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del parent[last]
        elif kind < 0.9 and isinstance(parent, dict):
            parent[rng.choice(("nmae", "extra", 7, "", str(last) + "x", str(last).upper()))] = parent.pop(last)
        else:
            other = rng.choice(ways)
            value = content
            for step in other:
                value = value[step] if isinstance(value, dict | list) and _has(value, step) else None
            parent[last] = copy.deepcopy(value)
    return content


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


def characters(raw: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, indented or from another code page."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 2, 8))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.choice((b"\xe9", b"\0", b"\t", b"  ", b": ", b"- ", b"&a ", b"*a", b"!!set ", b"{", b"["))
        elif kind == 2:
            del data[at : at + rng.randrange(40)]
        elif kind == 3:
            data[at:at] = data[at : at + 200]
        elif kind == 4:
            data = data[:at]
        else:
            data[at:at] = rng.choice((b"[" * 500, b"9" * 5000, b"a: &a [*a]\n", b"\xff\xfe", b"1e999", b"(a+)+b"))
    return bytes(data)


def text(raw: str, rng: random.Random) -> bytes:
    """A YAML file that is wrong in what it says or in how it is written."""
    if rng.random() < 0.6:
        try:
            return yaml.safe_dump(structure(yaml.safe_load(raw), rng), allow_unicode=rng.random() < 0.5).encode(
                "latin-1" if rng.random() < 0.05 else "utf-8", "replace"
            )
        except (yaml.YAMLError, ValueError):
            pass
    return characters(raw.encode(), rng)


def manifest(rows: list[list[str]], rng: random.Random) -> bytes:
    """A table with cells, columns or characters that are wrong."""
    rows = copy.deepcopy(rows)
    odd = (
        "",
        " ",
        "..",
        "/",
        "/dev/zero",
        "/etc",
        "\x1b[0m",
        "a\0b",
        "x" * 300,
        "C:\\a.nii",
        '"',
        "pat1",
        "T2",
        "é",
    )
    for _ in range(rng.choice((1, 2, 4))):
        row = rng.choice(rows)
        if row and (kind := rng.random()) < 0.7:
            row[rng.randrange(len(row))] = rng.choice(odd)
        elif row and kind < 0.8:
            row.pop()
        else:
            row.append(rng.choice(odd))
    separator = rng.choice((",", ",", ";", "\t", "|"))
    written = "\n".join(separator.join(row) for row in rows).encode()
    return characters(written, rng) if rng.random() < 0.4 else written


def setting(keys: list[str], rng: random.Random) -> str:
    """A setting that is there or not, with a value that it may have or not."""
    key = rng.choice((*keys, "nokey", "", "teacher", "preprocessing.n4", "a.b"))
    if rng.random() < 0.5:
        return f"{key}={rng.choice(MILD)}"
    value = rng.choice((*ODD, "1e-4", ".inf", "[1,2]", "{a: b}", "2020-01-01", "!!set {a}", "&a [*a]", "0x" + "f" * 99))
    word = value if isinstance(value, str) else "9" * 400 if value == 10**400 else json.dumps(value)
    return f"{key}={word}".replace("\0", "")


# Small files that stand for much -------------------------------------------------------------------------------------


def bombs(folder: Path) -> dict[str, Callable[[], list[str]]]:
    """Name → what makes a cohort with files of less than a megabyte, and gives the words after ``segment DIR OUT``."""

    def zeros(path: Path, shape: tuple[int, ...], dtype: str = "int16") -> None:
        made = nib.Nifti1Header()
        made.set_data_dtype(dtype)
        made.set_data_shape(shape)
        made["magic"], made["vox_offset"] = b"n+1", 352
        made.set_sform(np.diag([-1.5, -1.5, 1, 1]), 1)
        made.set_qform(np.diag([-1.5, -1.5, 1, 1]), 1)
        with gzip.open(path, "wb", 9) as stream:
            stream.write(made.binaryblock + bytes(4))
            left, chunk = int(np.prod(shape)) * np.dtype(dtype).itemsize, bytes(1 << 24)
            while left:
                left -= stream.write(chunk[:left])

    def beside(name: str, shape: tuple[int, ...], dtype: str = "int16") -> Callable[[], list[str]]:
        def make() -> list[str]:
            zeros(patient(folder / "in", "pat1")[name], shape, dtype)
            return []

        return make

    def many_slices() -> list[str]:
        for sequence in (*SEQUENCES, "gd"):
            zeros(patient(folder / "in", "pat1")[sequence], (512, 512, 1024), "uint8")
        return []

    return {
        "512×512×1024 zeros beside three": beside("T2", (512, 512, 1024), "uint8"),
        "the same as the reference": beside("LGE", (512, 512, 1024), "uint8"),
        "the same as the mask": beside("gd", (512, 512, 1024), "uint8"),
        "long and thin": beside("T2", (30000, 8000, 1), "uint8"),
        "all of them": many_slices,
    }
