"""Which series of a DICOM study is which sequence: told by a layout, chosen with --filter, never guessed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import phantom_dicom
import pytest
from folders import BRAIN, INFARCT, codes, ids, touch
from phantom_dicom import Scanner, write_patient
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.dicom import header as dicom_header
from monai_deepgmm.patients.dicom import layout as dicom_layout
from monai_deepgmm.patients.dicom import stacks as dicom_stacks
from monai_deepgmm.patients.discovery import find
from monai_deepgmm.patients.stack import Stack

#: An oblique, left-handed grid.
AFFINE = np.array([[1.4, 0, 0.9, -8], [0.2, -1.3, 1.8, 4], [0, 0.5, 9.6, 21], [0, 0, 0, 1.0]])
AFFINE[:3, 2] = 10 * np.cross(AFFINE[:3, 1], AFFINE[:3, 0]) / np.linalg.norm(np.cross(AFFINE[:3, 0], AFFINE[:3, 1]))
AFFINE[:3, 1] = np.cross(AFFINE[:3, 2], AFFINE[:3, 0]) / 15
DATA = {
    s: (7 * np.arange(8 * 6 * 3).reshape(8, 6, 3) + 100 * k).astype(np.int16) for k, s in enumerate(INFARCT.sequences)
}
SMALL = DATA["LGE"]


def scanner(folder: Path, vendor: str = "ge", study: str = "x", **more) -> Scanner:
    return Scanner(folder, vendor, study, **more)


def only(root: Path, protocol=INFARCT, **options):
    (study,) = find(root, protocol, **options).studies
    return study


def used(study) -> dict[str, str]:
    return {sequence: stack.name.removeprefix("series ") for sequence, stack in study.images.items()}


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vendors")
    for vendor in phantom_dicom.VENDORS:
        write_patient(scanner(root / vendor / "st" / "se", vendor, vendor), DATA, AFFINE)
    return root


@pytest.mark.parametrize(
    ("vendor", "expected"),
    [
        ("siemens", {"LGE": "11", "T2": "20", "bSSFP": "30-32"}),
        ("ge", {"LGE": "11", "T2": "20", "bSSFP": "30"}),
        ("philips", {"LGE": "10.2", "T2": "20", "bSSFP": "30"}),
        ("canon", {"LGE": "11", "T2": "20", "bSSFP": "30"}),
    ],
)
def test_a_study_of_each_vendor(studies, vendor, expected):
    (study,) = find(studies, INFARCT, patients=[vendor]).studies
    assert (used(study), codes(study), study.mask_rule) == (expected, [], "auto")
    times = {s: len(stack.times) for s, stack in study.images.items()}
    assert times == {"LGE": 1, "T2": 1, "bSSFP": 3}
    assert {len(stack.times[0]) for stack in study.images.values()} == {3}
    assert [one.why for one in study.series if one.sequence] == ["PSIR", "STIR", "cine"]
    left_out = " ".join(one.why for one in study.series if not one.sequence)
    for why in ("a localiser", "a long-axis view", "a map", "a secondary capture", "LGE (magnitude), but series"):
        assert why in left_out


@pytest.mark.parametrize(
    ("description", "image_type", "times", "expected"),
    [
        ("LGE_SAX", "M", 1, "LGE magnitude"),
        ("psir tfl sax MOCO", "P", 1, "LGE PSIR"),
        ("SA DE PSIR_MAG", "M", 1, "LGE magnitude"),
        ("T2_FLAIR tra", "M", 1, " another plane than the short axis"),
        ("t2prep_trufi_sax", "M", 1, "T2 T2-weighted"),
        ("T2* sax", "M", 3, " a map, or the images that it is made from"),
        ("SAX retro bFFE", "M", 9, "bSSFP cine"),
        ("SAX bFFE", "M", 1, "bSSFP still"),
        ("2CH CINE", "M", 9, " a long-axis view"),
        ("TI_scout", "M", 9, " a search for the inversion time"),
        ("cine de eje corto", "M", 9, "bSSFP cine"),
        ("STIR FIESTA SAX", "M", 1, " named like T2 and bSSFP; say which it is with --filter"),
        ("flow aorta", "P", 9, " flow"),
        ("something", "M", 1, " named like no sequence"),
    ],
)
def test_words_image_types_and_times_tell_series_apart(studies, description, image_type, times, expected):
    layout = dicom_layout.load("dicom")
    (known,) = dicom_stacks.candidates([dicom_header.read(next(studies.rglob("*.IMA")))])
    one = known._replace(descriptions=(description,), protocol="", kind=(image_type,), times=times)
    found = dicom_layout.meaning(layout, one, INFARCT)
    assert f"{found.sequence or ''} {found.why}" == expected


class TestChoosing:
    @pytest.fixture(scope="class")
    def twice(self, tmp_path_factory):
        """Two T2 stacks, the second on a slightly other grid; and a cine that nothing is wrong with."""
        root = tmp_path_factory.mktemp("twice")
        one = scanner(root / "p1")
        one.stack(5, "T2 STIR first", SMALL, AFFINE)
        one.stack(6, "T2 STIR again", SMALL + 1, AFFINE)
        one.stack(7, "SAX FIESTA", SMALL + 2, AFFINE)
        one.stack(8, "SAX FIESTA 8", SMALL[:4], AFFINE)
        return root

    def test_two_of_a_kind_are_never_guessed(self, twice):
        study = only(twice)
        assert codes(study) == ["E_AMBIGUOUS", "E_AMBIGUOUS"]
        assert "series 5 (3 slices) and series 6 (3 slices)" in study.problems[0].message
        assert "--filter T2=5 or --filter T2=6" in study.problems[0].remedy
        assert study.images == {}
        assert [line.why for line in study.series if "not the only one" in line.why]

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (["T2=6", "bssfp=7"], {"T2": "6", "bSSFP": "7"}),
            (["T2=again", "bSSFP=none"], {"T2": "6"}),
            (["LGE=5", "T2=6", "bSSFP=8"], {"LGE": "5", "T2": "6", "bSSFP": "8"}),
            (["T2=uid", "bSSFP=none"], {"T2": "5"}),
            (["T2=5", "bSSFP=7,9-12"], {"T2": "5", "bSSFP": "7"}),
        ],
    )
    def test_filter_chooses(self, twice, wanted, expected):
        uid = scanner(twice).uid(5, "")  # as all of its words are
        study = only(twice, filters=[word.replace("uid", uid) for word in wanted])
        assert (used(study), codes(study)) == (expected, [])

    @pytest.mark.parametrize(
        ("wanted", "said"), [("T2=77", "no study has such a series"), ("acq=tse", "by sequence"), ("T2=", "none")]
    )
    def test_filters_that_fit_nothing(self, twice, wanted, said):
        with pytest.raises(UsageError, match=said):
            find(twice, INFARCT, filters=[wanted])

    def test_the_users_own_layout(self, twice, tmp_path):
        own = tmp_path / "own.yaml"
        own.write_text("series: {LGE: [{kind: mine, words: ['stir again']}]}\n")
        assert used(only(twice, layout=own)) == {"LGE": "6"}
        own.write_text("series: {LGE: [{kind: mine, word: [x]}]}\n")
        with pytest.raises(UsageError, match=r"word: no such key \(did you mean words"):
            find(twice, INFARCT, layout=own)


class TestStacks:
    def test_slices_that_are_series_of_their_own_and_one_of_them_twice(self, tmp_path):
        one = scanner(tmp_path / "p1")
        for z in (0, 1, 2, 1):
            moved = AFFINE.copy()
            moved[:3, 3] += z * AFFINE[:3, 2]
            one.stack(40 + one.count, f"SAX MDE sl {z}", SMALL[:, :, z : z + 1], moved)
        study = only(tmp_path)
        assert codes(study) == ["E_AMBIGUOUS"]
        assert "series 41 and 43 hold the same slice" in study.problems[0].message
        assert used(only(tmp_path, filters=["LGE=40-42"])) == {"LGE": "40-42"}

    @pytest.mark.parametrize(("share", "expected"), [(1.0, ["E_SLICES"]), (0.3, ["E_SLICES"]), (0.05, [])])
    def test_gaps(self, tmp_path, share, expected):
        one = scanner(tmp_path / "p1")
        paths = one.stack(40, "SAX MDE", np.repeat(SMALL, 2, 2), AFFINE)
        for path in sorted(paths, key=lambda p: dcmread(p).InstanceNumber)[:2]:  # GE writes the last slice first
            data = dcmread(path)
            data.ImagePositionPatient = [
                float(x) + share * s * step
                for x, s, step in zip(data.ImagePositionPatient, (-1, -1, 1), AFFINE[:3, 2], strict=True)
            ]
            data.save_as(path)
        study = only(tmp_path)
        assert codes(study) == expected
        assert any("W_SLICES" in n for s in study.images.values() for n in s.notes) == (expected == [])

    def test_coordinates_of_another_examination_are_told(self, tmp_path):
        scanner(tmp_path / "p1").stack(5, "T2 STIR", SMALL, AFFINE)
        scanner(tmp_path / "p1", "siemens").stack(6, "de_sax", SMALL + 1, AFFINE, FrameOfReferenceUID="2.25.9")
        assert "W_REFERENCE" in only(tmp_path).images["T2"].notes[0]

    def test_a_copy_of_a_study_counts_once_and_directories_not_at_all(self, studies, tmp_path):
        shutil.copytree(studies / "ge", tmp_path / "p1" / "a")
        shutil.copytree(studies / "ge", tmp_path / "p1" / "b")
        disk = Dataset()
        disk.file_meta = FileMetaDataset()
        disk.file_meta.MediaStorageSOPClassUID, disk.file_meta.MediaStorageSOPInstanceUID = (
            "1.2.840.10008.1.3.10",
            "2.25.1",
        )
        disk.file_meta.TransferSyntaxUID, disk.FileSetID = "1.2.840.10008.1.2.1", "DISK"
        disk.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
        assert len(only(tmp_path).images["LGE"].times) == 1


class TestPatients:
    def test_ids_hold_nothing_of_the_header(self, studies, tmp_path):
        assert ids(find(studies, INFARCT)) == sorted(phantom_dicom.VENDORS)
        found = find(studies / "siemens", INFARCT)  # its folders are not one study each
        assert ids(found)[0] == "st"
        for study in ("one", "two"):
            write_patient(scanner(tmp_path / "DICOM" / study, "ge", study), {"T2": SMALL}, AFFINE, extras=False)
        found = find(tmp_path, INFARCT)
        assert all(name.startswith("dcm-") and len(name) == 16 for name in ids(found))
        assert len(found.studies) == 2
        assert ids(find(tmp_path / "DICOM", INFARCT)) == ["one", "two"]

    def test_what_an_operator_wrote_bears_no_persons_name(self, tmp_path):
        scanner(tmp_path / "p1").stack(5, "STIR Lovelace pid", SMALL, AFFINE)
        (line,) = only(tmp_path).series
        assert line.text == "STIR … …"

    def test_beside_nifti_files_they_wait_for_a_run_of_their_own(self, studies, tmp_path):
        touch(tmp_path, "n1/{LGE,mask}.nii.gz")
        shutil.copytree(studies / "canon", tmp_path / "d1")
        found = find(tmp_path, INFARCT)
        assert [codes(study) for study in found.studies] == [["E_DICOM"], []]
        assert "dcm2niix" in found.studies[0].problems[0].remedy
        assert "DICOM files are not looked at" in found.notes[0]
        alone = find(tmp_path, INFARCT, layout="dicom")
        assert (ids(alone), codes(alone.studies[0])) == (["d1"], [])
        assert "n1/LGE.nii.gz" in alone.notes[0]
        with pytest.raises(UsageError, match="no DICOM file"):
            find(tmp_path / "n1", INFARCT, layout="dicom")

    def test_heads_are_not_taken_for_hearts(self, tmp_path):
        for number, name in enumerate(("t1_mprage_sag", "AX T2 FLAIR", "t2_tse_tra", "t1_mprage_sag +C KM")):
            scanner(tmp_path / "p1" / name).stack(number + 1, name, SMALL + number, AFFINE)
        with pytest.raises(UsageError, match="--protocol brain"):
            find(tmp_path, INFARCT, asked=False)
        study = only(tmp_path, BRAIN, mask="nonzero")
        assert (used(study), codes(study)) == ({"T1": "1", "T2": "3", "FLAIR": "2"}, [])
        assert (codes(only(tmp_path, BRAIN)), only(tmp_path, BRAIN).mask_rule) == ([], "auto")
        assert codes(only(tmp_path, BRAIN, mask="file")) == ["E_MASK_NONE"]

    def test_a_stack_is_found_again_from_another_folder(self, studies, tmp_path, monkeypatch):
        monkeypatch.chdir(studies)
        stack = only(Path("ge")).with_whole_paths().images["LGE"]
        assert isinstance(stack, Stack)
        assert all(one.file.is_absolute() and one.file.is_file() for one in stack.slices)
        assert replace(stack, name="x").shape == (8, 6, 3)
