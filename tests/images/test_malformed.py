"""Every kind of malformed input, end to end: the bad patient alone fails, with code, file and remedy.

The many ways in which a file can be broken are ``test_nifti``'s; here is one of each code.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, heart, save

from monai_deepgmm.cli import main
from monai_deepgmm.errors import CODES
from monai_deepgmm.patients import ids

Files = dict[str, Path]
Bend = Callable[[Files], object]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    """A good patient and one that each test spoils; copied, because writing takes longer."""
    folder = tmp_path_factory.mktemp("template") / "cohort"
    make_patient(folder, "good", seed=1)
    make_patient(folder, "bad", seed=2)
    return folder


@pytest.fixture
def cohort(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "cohort"))


def files_of(cohort: Path, patient: str = "bad") -> Files:
    return {what: cohort / f"{patient}_{what}.nii.gz" for what in ("LGE", "T2", "C0", "gd")}


def summary(out: Path) -> dict[str, dict[str, str]]:
    text = (out / "summary.tsv").read_text(encoding="utf-8", errors="surrogateescape")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {row["patient"]: row for row in rows}


def fields(what: str, **values: object) -> Bend:
    """Sets header fields by force."""

    def bend(files: Files) -> None:
        whole = bytearray(gzip.decompress(files[what].read_bytes()))
        header = nib.Nifti1Header(bytes(whole[:348]), check=False)
        for field, value in values.items():
            header[field] = value
        whole[:348] = header.binaryblock
        files[what].write_bytes(gzip.compress(bytes(whole), 1))

    return bend


def voxels(what: str, change: Callable[[np.ndarray], np.ndarray]) -> Bend:
    """Changes the array and writes it again."""
    return lambda files: save(files[what], change(np.asanyarray(nib.load(files[what]).dataobj).astype(float)))


def heartless(files: Files) -> None:
    """Noise in every sequence, and no mask."""
    files["gd"].unlink()
    for seed, what in enumerate(("LGE", "T2", "C0")):
        noise = np.random.default_rng(seed).normal(100, 20, (48, 48, 2))
        save(files[what], noise.astype(np.int16))


def all_files(bend_one: Callable[[str], Bend]) -> Bend:
    return lambda files: [bend_one(what)(files) for what in files]


def at(value: float, where: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data[where] = value
        return data

    return change


def becomes(make: Callable[[Path], object]) -> Bend:
    return lambda files: [files["LGE"].unlink(), make(files["LGE"])]


def dicom_folder(path: Path) -> None:
    path.mkdir()
    (path / "IM0001.dcm").write_bytes(bytes(128) + b"DICM")


def frames(files: Files) -> None:
    data = np.asanyarray(nib.load(files["LGE"]).dataobj)
    save(files["LGE"], np.stack([data, data], axis=-1))


def without_place(what: str) -> Bend:
    """One file saved with an identity affine."""
    return lambda files: save(files[what], np.asanyarray(nib.load(files[what]).dataobj), np.eye(4))


MIDDLE, CORNER = (24, 24, 0), (0, 0, 0)
MOVED = AFFINE + np.array([[0, 0, 0, 5000], *[[0] * 4] * 3])
#: what is wrong → how to do it, the code, and the file that the message has to name
FAILS: dict[str, tuple[Bend, str, str]] = {
    "truncated gz": (lambda f: f["LGE"].write_bytes(f["LGE"].read_bytes()[:-40]), "E_GZIP", "bad_LGE.nii.gz"),
    "zero bytes": (lambda f: f["LGE"].write_bytes(b""), "E_EMPTY", "bad_LGE.nii.gz"),
    "text": (lambda f: f["LGE"].write_text("1,2,3\n" * 99), "E_FORMAT", "bad_LGE.nii.gz"),
    "nii beside nii.gz": (lambda f: f["LGE"].with_suffix("").write_bytes(b""), "E_AMBIGUOUS", "LGE.nii"),
    "cine": (frames, "E_DIM", "bad_LGE.nii.gz"),
    "NaN inside": (voxels("LGE", at(math.nan, MIDDLE)), "E_NONFINITE", "LGE"),
    "zero variance": (voxels("LGE", np.ones_like), "E_CONSTANT", "LGE"),
    "infinite intercept": (fields("LGE", scl_slope=1, scl_inter=math.inf), "E_SCALE", "bad_LGE.nii.gz"),
    "NaN affine": (fields("LGE", srow_x=[math.nan, 0, 0, 0]), "E_AFFINE", "bad_LGE.nii.gz"),
    "dim[0] = 0": (fields("LGE", dim=[0, 48, 48, 2, 1, 1, 1, 1]), "E_HEADER", "bad_LGE.nii.gz"),
    "mask empty": (voxels("gd", np.zeros_like), "E_MASK_EMPTY", "bad_gd.nii.gz"),
    "mask fractional": (voxels("gd", lambda d: d * 0.4999), "E_MASK_FRACTIONAL", "bad_gd.nii.gz"),
    "mask NaN": (voxels("gd", at(math.nan, CORNER)), "E_MASK_FRACTIONAL", "bad_gd.nii.gz"),
    "mask small": (voxels("gd", lambda d: at(500, MIDDLE)(np.zeros_like(d))), "E_MASK_SMALL", "bad_gd.nii.gz"),
    "mask elsewhere": (lambda f: save(f["gd"], heart(), MOVED), "E_MASK_GRID", "bad_gd.nii.gz"),
    "sequence elsewhere": (
        lambda f: save(f["T2"], np.asanyarray(nib.load(f["T2"]).dataobj), MOVED),
        "E_GRID",
        "bad_T2.nii.gz",
    ),
    "identical": (lambda f: f["T2"].write_bytes(f["LGE"].read_bytes()), "E_IDENTICAL", "bad_T2.nii.gz"),
    "two files": (lambda f: shutil.copy(f["LGE"], f["LGE"].with_name("bad_DE.nii.gz")), "E_AMBIGUOUS", "bad_DE.nii.gz"),
    "no mask, no heart": (heartless, "E_MASK_UNSURE", ""),
    "folder": (becomes(Path.mkdir), "E_FILE", "bad_LGE.nii.gz"),
    "dicom series": (becomes(dicom_folder), "E_DICOM", "bad_LGE.nii.gz"),
    "dangling link": (becomes(lambda p: p.symlink_to("gone.nii.gz")), "E_FILE", "bad_LGE.nii.gz"),
    "pipe": (becomes(os.mkfifo), "E_FILE", "bad_LGE.nii.gz"),
    "pixdim is not the sform's": (
        fields("T2", qform_code=0, pixdim=[1, 1.5, 1.5, 10, 1, 1, 1, 1]),
        "E_SPACING",
        "1.5 × 1.5 × 10",
    ),
    "LGE without a place": (without_place("LGE"), "E_SPACING", "bad_LGE.nii.gz"),
    "T2 without a place": (without_place("T2"), "E_SPACING", "bad_T2.nii.gz"),
    "mask without a place and cut": (lambda f: save(f["gd"], heart()[:-2], np.eye(4)), "E_GRID", "46 × 48 × 2"),
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("case", FAILS)
def test_that_patient_alone_fails(cohort, tmp_path, case):
    bend, code, name = FAILS[case]
    bend(files_of(cohort))
    out = tmp_path / "out"
    assert main(["segment", str(cohort), str(out)]) == 1
    rows = summary(out)
    assert rows["good"]["status"] == "ok"
    assert (out / "good" / "good_dseg.nii.gz").is_file()
    bad = rows["bad"]
    assert (bad["status"], bad["code"]) == ("failed", code)
    assert code in CODES
    assert name in bad["message"]
    row = json.loads((out / "bad" / "bad_row.json").read_text())
    assert row["remedy"]
    assert row["remedy"].rstrip(".") in bad["message"]
    assert ("dcm2niix" in row["remedy"]) >= (code == "E_DICOM")
    assert not list((out / "bad").glob("*.nii*"))
    assert not (out / "bad" / "bad_dseg.json").exists()
    everything = "".join(p.read_text() for p in (out / "bad").iterdir()) + (out / "summary.tsv").read_text()
    assert str(tmp_path) not in everything


def test_a_dry_run_finds_the_same_and_writes_nothing(cohort, tmp_path, capsys):
    FAILS["NaN inside"][0](files_of(cohort))
    assert main(["segment", str(cohort), str(tmp_path / "out"), "--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "bad\tfailed\tE_NONFINITE" in printed
    assert "good\tready" in printed
    assert not (tmp_path / "out").exists()


def in_metres(what: str) -> Bend:
    rows = {f"srow_{axis}": AFFINE[i] * 1e-3 for i, axis in enumerate("xyz")}
    return fields(what, xyzt_units=1, qform_code=0, **rows)


UNIT = {f"srow_{axis}": [*row, 0] for axis, row in zip("xyz", np.eye(3), strict=True)}


def unit_sform(*sizes: float) -> Bend:
    """All files with the identity for sform, as EMIDEC's have it; with these sizes in pixdim."""
    return all_files(lambda what: fields(what, qform_code=0, pixdim=[1, *sizes, 1, 1, 1, 1], **UNIT))


def swapped(files: Files) -> None:
    other = files["LGE"].with_name("other")
    files["T2"].rename(other)
    files["C0"].rename(files["T2"])
    other.rename(files["C0"])


def aside(path: Path, mm: float) -> None:
    """The same voxels on a grid that lies so far to the right."""
    save(path, np.asanyarray(nib.load(path).dataobj), AFFINE + np.outer([mm, 0, 0, 0], [0, 0, 0, 1]))


#: what is odd → how to do it, and the warnings' codes
WORKS: dict[str, tuple[Bend, str]] = {
    "NaN outside": (voxels("LGE", at(math.nan, CORNER)), "W_NONFINITE"),
    "slope 0 with an intercept": (fields("LGE", scl_slope=0, scl_inter=9), "W_SCALE"),
    "metres": (all_files(in_metres), "W_UNITS"),
    "zero pixdim": (fields("LGE", qform_code=0, pixdim=[1, 0, 1.5, 8, 1, 1, 1, 1]), "W_PIXDIM"),
    "qform differs": (fields("LGE", qform_code=1, qoffset_x=3), "W_QFORM"),
    "both codes 0": (all_files(lambda what: fields(what, qform_code=0, sform_code=0)), "W_NOFORM"),
    "unit sform": (unit_sform(1.5, 1.5, 8), "W_SPACING"),
    "mask without a place": (without_place("gd"), "W_MASK_PLACE"),
    "swapped": (swapped, "W_SWAPPED"),
    "T2 missing": (lambda f: f["T2"].unlink(), "W_MISSING"),
    "T2 called otherwise": (lambda f: f["T2"].rename(f["T2"].with_name("bad_T2_SA.nii.gz")), "W_MISSING"),
    "T2 on another grid": (lambda f: aside(f["T2"], 1), "W_RESAMPLED"),  # less than a voxel is left as it is
    "T2 aside": (lambda f: aside(f["T2"], 4.5), "W_RESAMPLED W_ALIGNED"),
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("case", WORKS)
def test_what_is_odd_is_segmented_and_recorded(cohort, tmp_path, case):
    bend, code = WORKS[case]
    bend(files_of(cohort))
    out = tmp_path / "out"
    assert main(["segment", str(cohort), str(out)]) == 0
    row = summary(out)["bad"]
    found = {warning.split(":")[0] for warning in row["warnings"].split(" | ") if warning}
    assert (row["status"], found) == ("ok", set(code.split()))
    assert ("; if bad_T2_SA.nii.gz is T2, name it bad_T2.nii.gz, or " in row["warnings"]) == (
        case == "T2 called otherwise"
    )
    sidecar = json.loads((out / "bad" / "bad_dseg.json").read_text())
    assert " | ".join(sidecar["warnings"]) == row["warnings"]
    labels = nib.load(out / "bad" / "bad_dseg.nii.gz")
    assert labels.shape == (48, 48, 2)
    assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 3, 4}
    if case in ("metres", "unit sform", "mask without a place"):  # measured in ml
        with (out / "measurements.tsv").open() as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["patient"] == "bad"]
        total = sum(float(row["volume_ml"]) for row in rows)
        assert total == pytest.approx(np.count_nonzero(heart()) * 1.5 * 1.5 * 8 / 1000, rel=1e-4)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("spacing", "voxel_ml"), [(None, None), ("sform", 0.018), ("pixdim", 0.0225), ("1.5,1.5,4", 0.009)]
)
def test_spacing_decides_what_a_header_leaves_open(cohort, tmp_path, spacing, voxel_ml, capsys):
    all_files(lambda what: fields(what, qform_code=0, pixdim=[1, 1.5, 1.5, 10, 1, 1, 1, 1]))(files_of(cohort))
    out, chosen = tmp_path / "out", [] if spacing is None else ["--spacing", spacing]
    assert main(["segment", str(cohort), str(out), *chosen]) == (1 if spacing is None else 0)
    assert main(["evaluate", str(out), str(cohort), *chosen]) == (1 if spacing is None else 0)
    row = summary(out)["bad"]
    if spacing is None:
        assert row["code"] == "E_SPACING"
        assert "--spacing" in row["message"]
        return
    assert (
        "W_SPACING: bad_LGE.nii.gz has voxels of 1.5 × 1.5 × 8 mm by its sform, but 1.5 × 1.5 × 10" in row["warnings"]
    )
    rows = list(csv.DictReader((out / "measurements.tsv").open(), delimiter="\t"))
    found = {m["patient"]: float(m["volume_ml"]) / int(m["voxels"]) for m in rows}
    assert found == pytest.approx({"good": 0.018, "bad": voxel_ml}, rel=1e-4)
    labels, source = (nib.load(p).header for p in (out / "bad" / "bad_dseg.nii.gz", files_of(cohort)["LGE"]))
    for field in ("pixdim", "srow_x", "srow_z", "sform_code", "qform_code"):
        np.testing.assert_array_equal(labels[field], source[field])


@pytest.mark.parametrize("given", ["qform", "1,2", "1,1,0", "a,b,c", "1,1,inf"])
def test_a_spacing_that_is_none_is_refused(cohort, capsys, given):
    assert main(["scan", str(cohort), "--spacing", given]) == 2
    assert "--spacing" in capsys.readouterr().err


@pytest.mark.usefixtures("no_picture")
def test_one_slice_is_enough_and_a_trailing_axis_of_size_1_is_restored(tmp_path, make_patient):
    made = make_patient(tmp_path / "in", "one", shape=(48, 48, 1))
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    labels = nib.load(tmp_path / "out" / "one" / "one_dseg.nii.gz")
    assert labels.shape == (48, 48, 1)
    assert labels.header.get_zooms() == pytest.approx((1.5, 1.5, 8))
    for path in made.values():
        save(path, np.asanyarray(nib.load(path).dataobj)[..., None])
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert nib.load(tmp_path / "out" / "one" / "one_dseg.nii.gz").shape == (48, 48, 1, 1)


@pytest.mark.usefixtures("no_picture")
def test_a_frame_of_a_cine_is_chosen_on_demand_and_max_voxels_is_checked_before_reading(cohort, tmp_path):
    args = ["segment", str(cohort), str(tmp_path / "out")]
    assert main([*args, "--max-voxels", str(4 * 48 * 48 * 2 - 1)]) == 3
    assert {row["code"] for row in summary(tmp_path / "out").values()} == {"E_SIZE"}
    assert main([*args, "--max-voxels", str(4 * 48 * 48 * 2)]) == 0
    for what in ("LGE", "gd"):
        path = files_of(cohort)[what]
        data = np.asanyarray(nib.load(path).dataobj)
        save(path, np.stack([np.zeros_like(data), data], axis=-1))
    assert main([*args, "--frame", "1"]) == 0
    assert nib.load(tmp_path / "out" / "bad" / "bad_dseg.nii.gz").shape == (48, 48, 2)
    assert main([*args, "--frame", "2"]) == 1
    assert summary(tmp_path / "out")["bad"]["code"] == "E_DIM"


@pytest.mark.parametrize("what", ["LGE", "T2", "gd"])
def test_a_small_file_that_unpacks_to_gigabytes_takes_no_memory(cohort, tmp_path, what):
    path, shape = files_of(cohort)[what], (512, 512, 256)
    header = nib.load(path).header.copy()
    header["dim"][1:4], header["vox_offset"] = shape, 352
    header.set_data_dtype(np.uint8)
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + math.prod(shape)), 1))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    assert main(["segment", str(cohort), str(tmp_path / "out"), "--patients", "bad"]) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    row = summary(tmp_path / "out")["bad"]
    assert row["code"] == "E_SIZE"
    assert path.name in row["message"]
    assert "--max-voxels" in row["message"]
    assert peak < 64 << 20


#: Which values of the labels make up the mask, where no layout says so.
LABELS = ("--mask-labels", "200", "500", "1220", "2221")


def one_folder(cohort: Path, patient: str, make_patient) -> None:
    """The patient in a folder of its own, in the layout that takes any name."""
    made = make_patient(cohort.parent / "made", "p")
    (cohort / patient).mkdir(parents=True)
    for what, name in (("LGE", "LGE"), ("T2", "T2"), ("C0", "cine"), ("gd", "mask")):
        shutil.copy(made[what], cohort / patient / f"{name}.nii.gz")


@pytest.mark.parametrize(
    "patient",
    ["<script>alert(1)<", "two words", "Müller-日本", "-rf", "dot.", " lead", "a%2Fb", "x" * 200, "p\udcff"],
    ids=ascii,
)
def test_hostile_names_work_and_are_kept_byte_for_byte(tmp_path, make_patient, patient):
    try:
        one_folder(tmp_path / "in", patient, make_patient)
    except OSError:
        pytest.skip("this file system takes only text")
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "in"), str(out), "--mask-labels", "200", "500", "1220", "2221"]) == 0
    assert (out / patient / f"{patient}_dseg.nii.gz").is_file()
    assert summary(out)[patient]["status"] == "ok"
    for page in (out / "index.html", out / patient / f"{patient}_report.html"):
        assert "<script>alert" not in page.read_text(encoding="utf-8")
    assert main(["segment", str(tmp_path / "in"), str(out), "--mask-labels", "200", "500", "1220", "2221"]) == 0
    assert main(["report", str(out)]) == 0


def test_ids_of_a_manifest_that_cannot_be_folders_fail_alone(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "WINDOWS", True)
    bad = {
        "../x": "E_ID", "a/b": "E_ID", "/abs": "E_ID", "a..b": "E_ID", ".locks": "E_ID", "index.html": "E_ID",
        "Nul.1": "E_NAME", "COM3": "E_NAME", "a:b": "E_NAME", "dot.": "E_NAME", "end ": "E_NAME", "y" * 201: "E_NAME",
        "Case": "E_DUPLICATE", "case": "E_DUPLICATE", "twice": "E_DUPLICATE",
    }  # fmt: skip
    line = "cohort/good_LGE.nii.gz,cohort/good_T2.nii.gz,cohort/good_gd.nii.gz\n"
    manifest = tmp_path / "m.csv"
    manifest.write_text("patient,LGE,T2,mask\n" + "".join(f"{p},{line}" for p in ("fine", *bad, "twice")))
    out = tmp_path / "deep" / "out"
    assert main(["segment", str(cohort), str(out), "--manifest", str(manifest), *LABELS]) == 1
    rows = summary(out)
    assert {p: row["code"] for p, row in rows.items()} == {"fine": "", **bad}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cohort", "deep", "m.csv"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"fine", "Case", "case", "twice", ".locks", ".refused"}
    before = (out / "summary.tsv").read_bytes()
    assert main(["report", str(out)]) == 0
    assert (out / "summary.tsv").read_bytes() == before
