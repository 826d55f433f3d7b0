"""What lies under OUT: tables, provenance, geometry; which folders are refused; what is left alone, what done anew."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, heart, save
from outcomes import image_of, labels_of, sidecar, study
from scenes import write_mask

from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.config import build
from monai_deepgmm.results import locks, outputs

SECRET = b"Jane Doe"


def segment(*arguments: object) -> int:
    return main(["segment", *map(str, arguments)])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def stamps(out: Path) -> dict[str, int]:
    """When each patient's files were written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob("pat*/*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_patient) -> tuple[Path, Path]:
    """A cohort (one patient without T2, one without a mask) and its results; nobody may change either."""
    base = tmp_path_factory.mktemp("run")
    make_patient(base / "in", "pat1", seed=1)
    make_patient(base / "in", "pat2", seed=2, sequences=("LGE", "C0"))
    make_patient(base / "in", "pat3", seed=3)["gd"].unlink()
    lge = base / "in" / "pat1_LGE.nii.gz"
    image = nib.load(lge)
    for field, value in (("descrip", SECRET), ("db_name", SECRET), ("intent_name", SECRET), ("aux_file", SECRET)):
        image.header[field] = value
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), lge)
    assert (
        segment(base / "in", base / "out", "--probabilities", "--mask", "file", "--seed", 7, "--set", "tol=1e-5") == 1
    )
    return base / "in", base / "out"


def test_the_summary_has_a_line_per_patient(run):
    rows = table(run[1] / "summary.tsv")
    assert list(rows[0]) == ["patient", "status", "code", "message", "seconds", "method", "warnings"]
    assert [(r["patient"], r["status"], r["code"]) for r in rows] == [
        ("pat1", "ok", ""),
        ("pat2", "ok", ""),
        ("pat3", "failed", "E_MASK_NONE"),
    ]
    assert rows[1]["warnings"].startswith("W_MISSING: without T2: edema is counted as myocardium")
    assert "--mask nonzero" in rows[2]["message"]
    assert {r["method"] for r in rows} == {"anatomy"}
    assert float(rows[0]["seconds"]) > 0


def test_measurements_are_those_of_the_label_map(run):
    rows = table(run[1] / "measurements.tsv")
    assert list(rows[0])[:6] == ["patient", "tissue", "voxels", "volume_ml", "mass_g", "percent"]
    found = {(r["patient"], r["tissue"]): r for r in rows}
    tissues = {"blood": 1, "myocardium": 2, "edema": 3, "scar": 4}
    assert set(found) == {("pat1", t) for t in tissues} | {("pat2", t) for t in tissues if t != "edema"}
    labels = labels_of(run[1])
    wall = np.isin(labels, (2, 3, 4)).sum()
    for tissue, index in tissues.items():
        row, count = found["pat1", tissue], int((labels == index).sum())
        assert int(row["voxels"]) == count
        assert float(row["volume_ml"]) == pytest.approx(count * 0.018, rel=1e-5)
        assert float(row["mass_g"]) == pytest.approx(count * 0.018 * (1.06 if index == 1 else 1.05), rel=1e-5)
        assert (
            row["percent"] == "" if index == 1 else float(row["percent"]) == pytest.approx(100 * count / wall, rel=1e-5)
        )


def test_a_tissue_that_cannot_be_seen_is_merged(run):
    assert set(np.unique(labels_of(run[1], "pat2"))) == {0, 1, 2, 4}


def test_the_labels_are_explained_as_bids_wants(run):
    assert (run[1] / "dseg.tsv").read_text() == (
        "index\tname\tcolor\n1\tblood\t#8c1c3a\n2\tmyocardium\t#2f7fc4\n3\tedema\t#58c98b\n4\tscar\t#ffe94a\n"
    )
    description = json.loads((run[1] / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "monai-deepgmm"
    assert {"Name", "BIDSVersion"} <= set(description)


def test_the_log_has_a_line_per_patient_and_research_use_is_said_everywhere(run):
    log = (run[1] / "deepgmm.log").read_text()
    for words in ("pat1: ok", "pat2: ok", "pat3: failed (E_MASK_NONE", "pat2: W_MISSING"):
        assert words in log
    for name in ("index.html", "pat1/pat1_report.html", "pat1/pat1_dseg.json", "dataset_description.json"):
        assert "research use only" in (run[1] / name).read_text(encoding="utf-8").lower()


def test_the_sidecar_says_how_the_labels_came_about(run):
    told = sidecar(run[1])
    assert {"python", "monai-deepgmm", "torch", "monai", "numpy"} <= set(told["versions"])
    assert told["seed"] == told["configuration"]["seed"] == 7
    settings = told["configuration"]["settings"]  # those that were used, and none that the method lacks
    assert settings == dataclasses.asdict(AnatomicalConfig(tol=1e-5))
    for what, name in (("LGE", "LGE"), ("T2", "T2"), ("bSSFP", "C0"), ("mask", "gd")):
        facts, path = told["inputs"][what], run[0] / f"pat1_{name}.nii.gz"
        assert facts["file"] == path.name
        assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (facts["shape"], facts["spacing_mm"], facts["resampled"]) == ([48, 48, 2], [1.5, 1.5, 8.0], False)
    assert told["grid"]["shape"] == [48, 48, 2]
    assert told["grid"]["affine"] == AFFINE.tolist()
    assert told["converged"] is True
    assert told["naming"]["rule"]
    assert told["warnings"] == []
    for unit in told["mixture"]["units"]:
        assert sum(unit["weights"].values()) == pytest.approx(1, abs=1e-4)
        assert {tuple(row) for row in unit["means"].values()} == {("LGE", "T2", "bSSFP")}
        assert np.shape(unit["covariances"]["scar"]) == (3, 3)
    for unit in told["fit"]["units"]:
        assert len(unit["trace"]) == unit["iterations"] + 1
        assert unit["trace"][-1] <= unit["trace"][0]


def test_no_path_and_no_name_from_a_header_leaves_the_machine(run):
    for path in run[1].rglob("*"):
        if path.is_file() and path.name != "deepgmm.log":
            content = path.read_bytes()
            if path.name.endswith(".nii.gz"):
                content = bytes(nib.load(path).header.binaryblock)
            assert SECRET not in content, path.name
            assert str(run[0].parent).encode() not in content, path.name


def test_probabilities_are_one_map_per_tissue_and_sum_to_one_inside(run):
    image = image_of(run[1], "probseg")
    maps, inside = image.get_fdata(), heart() > 0
    assert (maps.shape, image.get_data_dtype()) == ((48, 48, 2, 4), np.float32)
    np.testing.assert_allclose(maps.sum(-1)[inside], 1, atol=1e-5)
    assert not maps[~inside].any()
    np.testing.assert_array_equal(labels_of(run[1])[inside], maps.argmax(-1)[inside] + 1)


C, S = np.cos(np.deg2rad(25)), np.sin(np.deg2rad(25))
GEOMETRIES = {
    "sform and qform": (AFFINE, 1, 1),
    "qform only, PSR": (np.array([[0, 0, 8.0, 3], [-1.5, 0, 0, 4], [0, 1.5, 0, 5], [0, 0, 0, 1]]), 0, 1),
    "sform only, oblique": (np.array([[C, -S, 0, 0], [S, C, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ AFFINE, 2, 0),
    "Talairach, flipped": (AFFINE @ np.diag([-1, 1, 1, 1.0]), 3, 1),
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("case", GEOMETRIES)
def test_the_maps_lie_where_their_source_does(tmp_path, make_patient, case):
    affine, sform, qform = GEOMETRIES[case]
    for path in make_patient(tmp_path / "in", "pat1").values():
        image = nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj), None)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(affine if sform else None, sform)
        image.set_qform(affine if qform else None, qform)
        image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
        image.header["descrip"] = SECRET
        nib.save(image, path)
    assert segment(tmp_path / "in", tmp_path / "out", "--probabilities") == 0
    source = nib.load(tmp_path / "in" / "pat1_LGE.nii.gz")
    for what, dtype in (("dseg", np.uint8), ("entropy", np.float32)):
        made = image_of(tmp_path / "out", what)
        assert (made.shape, made.get_data_dtype()) == (source.shape, dtype)
        np.testing.assert_array_equal(made.affine, source.affine)
        for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "quatern_b"):
            np.testing.assert_array_equal(made.header[field], source.header[field])
        assert not made.header["descrip"].item().strip(b"\0")
        assert not np.asanyarray(made.dataobj)[heart() == 0].any()
    assert (labels_of(tmp_path / "out") > 0)[heart() > 0].all()


@pytest.mark.parametrize("place", [".", "inside", "inside/deep", "../cohort", "../link/x"])
def test_results_never_fall_into_the_input(cohort_dir, capsys, place):
    (cohort_dir.parent / "link").symlink_to(cohort_dir)
    before = sorted(p.name for p in cohort_dir.rglob("*"))
    assert segment(cohort_dir, cohort_dir / place) == 2
    assert "OUT" in capsys.readouterr().err
    assert sorted(p.name for p in cohort_dir.rglob("*")) == before


def test_results_that_would_fall_on_a_file_or_the_input_are_refused(cohort_dir, tmp_path, make_patient, capsys):
    (tmp_path / "out").write_text("mine")
    make_patient(tmp_path / "pat1", "pat1")
    for source, out in ((cohort_dir, "out"), (cohort_dir, "out/below"), (tmp_path / "pat1", ".")):
        assert segment(source, tmp_path / out) == 2
        assert "OUT" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cohort", "out", "pat1"]


def test_a_folder_that_may_not_be_written_is_refused(cohort_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    if os.geteuid():
        (tmp_path / "out").chmod(0o500)
    else:  # root may write everywhere but to a file system that is read-only

        class ReadOnly:
            f_flag = os.ST_RDONLY

        monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly())
    assert segment(cohort_dir, tmp_path / "out" / "results") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_bids_derivatives_are_the_one_place_inside_that_is_allowed(tmp_path, make_patient):
    made = make_patient(tmp_path / "made", "p")
    root = tmp_path / "bids"
    for folder, name, what in (("", "LGE", "LGE"), ("", "T2w", "T2"), ("derivatives/masks", "desc-lv_mask", "gd")):
        (root / folder / "sub-01" / "anat").mkdir(parents=True, exist_ok=True)
        shutil.copy(made[what], root / folder / "sub-01" / "anat" / f"sub-01_{name}.nii.gz")
    write_mask(made["gd"], root / "derivatives" / "masks" / "sub-01" / "anat" / "sub-01_desc-lv_mask.nii.gz")
    assert segment(root, root / "results") == 2
    assert segment(root, root / "derivatives") == 2
    for _ in range(2):  # the second time, its own results lie in the input
        assert segment(root, root / "derivatives" / "deepgmm") == 0
    rows = table(root / "derivatives" / "deepgmm" / "summary.tsv")
    assert [(r["patient"], r["status"]) for r in rows] == [("sub-01", "ok")]


@pytest.mark.usefixtures("no_picture")
def test_a_second_run_leaves_every_file_untouched(cohort_dir, tmp_path):
    out = tmp_path / "out"
    assert segment(cohort_dir, out) == 0
    first = stamps(out)
    assert len(first) == 21
    assert segment(cohort_dir, out, "--jobs", 1, "--device", "cpu") == 0
    assert stamps(out) == first
    assert segment(cohort_dir, out, "--overwrite") == 0
    assert all(new > first[name] for name, new in stamps(out).items())


def changed_input(folder: Path, out: Path) -> None:
    save(folder / "pat2_T2.nii.gz", np.asanyarray(nib.load(folder / "pat2_T2.nii.gz").dataobj) + np.int16(1))


def changed_mask(folder: Path, out: Path) -> None:
    mask = heart()
    mask[24, 24, 0] = 200
    save(folder / "pat2_gd.nii.gz", mask)


def other_versions(folder: Path, out: Path) -> None:
    (out / "pat2" / "pat2_dseg.json").write_text(json.dumps({**sidecar(out, "pat2"), "fingerprint": "0"}))


#: What happens between two runs to pat2's input or results, or to the second command.
CHANGED = {
    "input": changed_input,
    "mask": changed_mask,
    "sidecar": other_versions,
    "broken row": lambda folder, out: (out / "pat2" / "pat2_row.json").write_text("{"),
    **{
        f"no {suffix}": lambda folder, out, suffix=suffix: (out / "pat2" / f"pat2_{suffix}").unlink()
        for suffix in ("dseg.nii.gz", "dseg.json", "row.json", "report.html", "preview.png")
    },
    "seed": ["--seed", "1"],
    "method": ["--method", "gmm"],
    "setting": ["--set", "tol=1e-4"],
    "mask labels": ["--mask-labels", "200", "1220", "2221", "500", "7"],
    "probabilities": ["--probabilities"],
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("case", CHANGED)
def test_whose_files_or_configuration_changed_is_done_again(cohort_dir, tmp_path, case):
    out, change = tmp_path / "out", CHANGED[case]
    assert segment(cohort_dir, out) == 0
    first = stamps(out)
    options = change if isinstance(change, list) else []
    if not options:
        change(cohort_dir, out)
    assert segment(cohort_dir, out, *options) == 0
    again = stamps(out)
    assert set(first) <= set(again)
    assert {n for n in first if again[n] > first[n]} == {n for n in first if options or "pat2/" in n}
    assert segment(cohort_dir, out, *options) == 0
    assert stamps(out) == again


def test_an_input_replaced_while_it_was_segmented_is_done_again(cohort_dir, tmp_path, monkeypatch):
    out, preview = tmp_path / "out", outputs.report.preview

    def replace_meanwhile(segmentation):
        if segmentation.patient == "pat2":
            changed_input(cohort_dir, out)
        return preview(segmentation)

    monkeypatch.setattr(outputs.report, "preview", replace_meanwhile)
    assert segment(cohort_dir, out) == 0
    monkeypatch.undo()
    first = stamps(out)
    assert segment(cohort_dir, out) == 0
    assert {name.split("/")[0] for name, new in stamps(out).items() if new != first[name]} == {"pat2"}
    facts = sidecar(out, "pat2")["inputs"]["T2"]
    assert facts["sha256"] == hashlib.sha256((cohort_dir / "pat2_T2.nii.gz").read_bytes()).hexdigest()


@pytest.mark.usefixtures("no_picture")
def test_a_failure_leaves_no_older_labels_and_a_repaired_patient_is_ok(cohort_dir, tmp_path):
    out, path = tmp_path / "out", cohort_dir / "pat2_LGE.nii.gz"
    assert segment(cohort_dir, out, "--probabilities") == 0
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert segment(cohort_dir, out, "--probabilities") == 1
    assert sorted(p.name for p in (out / "pat2").iterdir()) == ["pat2_report.html", "pat2_row.json"]
    assert "E_GZIP" in (out / "pat2" / "pat2_report.html").read_text()
    assert "pat2" not in {r["patient"] for r in table(out / "measurements.tsv")}
    path.write_bytes(whole)
    assert segment(cohort_dir, out, "--probabilities") == 0
    assert (out / "pat2" / "pat2_dseg.nii.gz").is_file()
    assert {r["status"] for r in table(out / "summary.tsv")} == {"ok"}


@pytest.mark.usefixtures("no_picture")
def test_a_file_that_is_no_row_hides_nobody(cohort_dir, tmp_path):
    out = tmp_path / "out"
    assert segment(cohort_dir, out) == 0
    (out / "odd").mkdir()
    (out / "odd" / "odd_row.json").write_text('{"status": "ok"}')
    assert main(["report", str(out)]) == 0
    assert [r["patient"] for r in table(out / "summary.tsv")] == ["pat1", "pat2", "pat3"]


def test_the_fingerprint_depends_on_all_that_can_change_a_label(cohort_dir):
    patient = study(cohort_dir)
    base = outputs.fingerprint(patient, build(), {"LGE": "a"})
    assert base == outputs.fingerprint(patient, build(device="cpu", probabilities=True), {"LGE": "a"})
    others = [{"seed": 1}, {"method": "gmm"}, {"settings": ["max_iter=9"]}, {"settings": ["n4=true"]}, {"frame": 0}]
    hashes = {outputs.fingerprint(patient, build(**other), {"LGE": "a"}) for other in others}
    assert len({base, *hashes, outputs.fingerprint(patient, build(), {"LGE": "b"})}) == 7


def test_a_lock_that_cannot_be_made_is_a_failure_with_a_code(tmp_path):
    (tmp_path / locks.FOLDER).write_text("in the way")
    with pytest.raises(StudyError) as caught, locks.lock(tmp_path, "x"):
        pass
    assert caught.value.code == "E_WRITE"


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    (tmp_path / "pat1").mkdir()
    dead, alive = tmp_path / "pat1" / ".deepgmm-1-a.part", tmp_path / ".deepgmm-2-b.part"
    dead.write_bytes(b"half")
    holds = "import fcntl,sys;f=open(sys.argv[1],'w');fcntl.flock(f,2);print('x',flush=True);sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.read(1)
        outputs.sweep(tmp_path)
        assert (dead.exists(), alive.exists()) == (False, True)
        writer.stdin.close()
    outputs.sweep(tmp_path)
    assert not alive.exists()
    assert atomic_files.stale_temporaries(tmp_path) == ()
