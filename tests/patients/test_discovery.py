"""Which files belong to which patient: by name alone, so nearly all files here are empty."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from monai_deepgmm import protocol
from monai_deepgmm.errors import CODES, UsageError
from monai_deepgmm.patients import layout
from monai_deepgmm.patients.discovery import Cohort, Study, find

INFARCT = protocol.load("infarct")
BRAIN = protocol.load("brain")


def touch(root: Path, *names: str, content: bytes = b"") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def ids(cohort: Cohort) -> list[str]:
    return [study.patient for study in cohort.studies]


def codes(study: Study) -> list[str]:
    assert all(p.code in CODES and p.message and p.remedy for p in study.problems)
    return [p.code for p in study.problems]


def only(cohort: Cohort) -> Study:
    assert len(cohort.studies) == 1
    return cohort.studies[0]


def files(root: Path, study: Study) -> dict[str, str]:
    return {s: path.relative_to(root).as_posix() for s, path in study.images.items()}


def write_manifest(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding, "surrogateescape"))
    return path


class TestMyops:
    @pytest.mark.parametrize("home", ["", "{}/", "train/"])
    @pytest.mark.parametrize("lge", ["LGE", "DE"])
    def test_flat_or_one_folder_per_patient(self, tmp_path, home, lge):
        for case in ("Case2", "Case1"):
            at = home.format(case)
            touch(tmp_path, *(f"{at}{case}_{s}.nii.gz" for s in ("C0", lge, "T2", "gd")))
        cohort = find(tmp_path, INFARCT)
        assert (cohort.layout, ids(cohort)) == ("myops", ["Case1", "Case2"])
        study, at = cohort.studies[0], home.format("Case1")
        assert list(study.images) == ["LGE", "T2", "bSSFP"]
        assert list(files(tmp_path, study).values()) == [f"{at}Case1_{s}.nii.gz" for s in (lge, "T2", "C0")]
        assert study.mask == study.truth == tmp_path / f"{at}Case1_gd.nii.gz"
        assert study.mask_labels == (500, 200, 1220, 2221)
        assert study.truth_labels == {500: 1, 200: 2, 1220: 3, 2221: 4}
        assert study.problems == ()

    @pytest.mark.parametrize("below", [True, False])
    def test_the_original_naming_has_its_truth_in_a_sibling_folder(self, tmp_path, below):
        touch(tmp_path, *(f"train25/myops_training_101_{s}.nii.gz" for s in ("C0", "DE", "T2")))
        touch(
            tmp_path, "train25_myops_gd/myops_training_101_gd.nii.gz", "train25_myops_gd/myops_training_102_gd.nii.gz"
        )
        study = only(find(tmp_path if below else tmp_path / "train25", INFARCT))
        assert study.patient == "myops_training_101"
        assert study.truth == study.mask == tmp_path / "train25_myops_gd/myops_training_101_gd.nii.gz"
        assert study.problems == ()

    def test_truth_beside_the_images_is_preferred_to_a_folder_beside_dir(self, tmp_path):
        touch(tmp_path, "a/P1_LGE.nii.gz", "a/P1_gd.nii.gz", "b_gd/P1_gd.nii.gz")
        assert only(find(tmp_path / "a", INFARCT)).truth == tmp_path / "a/P1_gd.nii.gz"

    def test_two_folders_with_the_truth_are_ambiguous(self, tmp_path):
        touch(tmp_path, "a/P1_LGE.nii.gz", "b_gd/P1_gd.nii.gz", "c_gd/P1_gd.nii.gz")
        study = only(find(tmp_path / "a", INFARCT))
        assert codes(study) == ["E_AMBIGUOUS"]
        assert "b_gd/P1_gd" in study.problems[0].message
        assert "c_gd/P1_gd" in study.problems[0].message
        assert study.mask is study.truth is None

    def test_a_mask_file_takes_the_place_of_the_labels(self, tmp_path):
        touch(tmp_path, "P1_LGE.nii.gz", "P1_gd.nii.gz", "P1_mask.nii.gz")
        study = only(find(tmp_path, INFARCT))
        assert (study.mask, study.mask_labels) == (tmp_path / "P1_mask.nii.gz", ())
        assert study.truth == tmp_path / "P1_gd.nii.gz"

    def test_the_same_id_in_two_folders_is_two_patients(self, tmp_path):
        touch(tmp_path, "a/P1_LGE.nii.gz", "b/P1_T2.nii.gz", "a/P1_gd.nii.gz")
        study = only(find(tmp_path, INFARCT, layout="myops"))
        assert codes(study) == ["E_DUPLICATE"]

    def test_it_is_not_for_the_brain(self, tmp_path):
        touch(tmp_path, "P1_T1.nii.gz", "P1_T2.nii.gz")
        with pytest.raises(UsageError, match=r"myops.*protocol brain"):
            find(tmp_path, BRAIN, layout="myops")


class TestEmidec:
    def test_images_and_contours(self, tmp_path):
        touch(tmp_path, "Case_P001/Images/Case_P001.nii.gz", "Case_P001/Contours/Case_P001.nii.gz", "Case P001.txt")
        cohort = find(tmp_path, INFARCT)
        study = only(cohort)
        assert (cohort.layout, study.patient) == ("emidec", "Case_P001")
        assert files(tmp_path, study) == {"LGE": "Case_P001/Images/Case_P001.nii.gz"}
        assert study.mask == study.truth == tmp_path / "Case_P001/Contours/Case_P001.nii.gz"
        assert study.mask_labels == (1, 2, 3, 4)
        assert study.truth_labels == {1: 1, 2: 2, 3: 4, 4: 4}
        assert study.problems == ()

    def test_two_images_are_ambiguous(self, tmp_path):
        touch(tmp_path, "P1/Images/a.nii.gz", "P1/Images/b.nii.gz", "P1/Contours/a.nii.gz")
        study = only(find(tmp_path, INFARCT))
        assert codes(study) == ["E_AMBIGUOUS"]
        assert study.images == {}

    def test_a_patient_without_images_is_a_failed_row(self, tmp_path):
        touch(tmp_path, "P1/Images/a.nii.gz", "P1/Contours/a.nii.gz", "P2/notes.txt")
        good, bad = find(tmp_path, INFARCT).studies
        assert good.problems == ()
        assert codes(bad) == ["E_NO_SEQUENCE"]
        assert "notes.txt" in bad.problems[0].message


class TestNnunet:
    @pytest.fixture
    def dataset(self, tmp_path):
        touch(tmp_path, "imagesTr/a_b_0000.nii.gz", "imagesTr/a_b_0001.nii.gz", "imagesTr/a_b_0002.nii.gz")
        touch(tmp_path, "labelsTr/a_b.nii.gz", "masksTr/a_b.nii.gz")
        return tmp_path

    @pytest.mark.parametrize("key", ["channel_names", "modality"])
    def test_channels_are_named_by_the_data_set(self, dataset, key):
        channels = {"0": "cine", "1": "t2W", "2": "lge"}
        touch(dataset, "dataset.json", content=json.dumps({key: channels}).encode())
        cohort = find(dataset, INFARCT)
        study = only(cohort)
        assert (cohort.layout, study.patient) == ("nnunet", "a_b")
        numbers = {"LGE": "0002", "T2": "0001", "bSSFP": "0000"}
        assert files(dataset, study) == {s: f"imagesTr/a_b_{n}.nii.gz" for s, n in numbers.items()}
        assert list(study.images) == ["LGE", "T2", "bSSFP"]
        assert (study.mask, study.mask_labels) == (dataset / "masksTr/a_b.nii.gz", ())
        assert (study.truth, study.truth_labels) == (dataset / "labelsTr/a_b.nii.gz", None)
        assert study.problems == ()

    def test_labels_are_not_taken_for_a_mask(self, dataset):
        touch(dataset, "dataset.json", content=b'{"channel_names": {"0": "LGE"}}')
        (dataset / "masksTr/a_b.nii.gz").unlink()
        study = only(find(dataset, INFARCT))
        assert codes(study) == ["E_MASK_NONE"]
        assert "masksTr/a_b.nii.gz" in study.problems[0].remedy

    @pytest.mark.parametrize(
        "content", [None, b"", b"[1]", b'{"channel_names": ["LGE"]}', b'{"channel_names": {"x": "LGE"}}']
    )
    @pytest.mark.parametrize("name", [None, "nnunet"])
    def test_without_channel_names_nothing_can_be_told(self, dataset, content, name):
        if content is not None:
            touch(dataset, "dataset.json", content=content)
        with pytest.raises(UsageError, match=r"dataset\.json"):
            find(dataset, INFARCT, layout=name)

    def test_channels_of_other_sequences(self, dataset):
        touch(dataset, "dataset.json", content=b'{"channel_names": {"0": "MRI", "1": "CT"}}')
        with pytest.raises(UsageError, match=r"MRI, CT.*LGE, T2, bSSFP"):
            find(dataset, INFARCT)


class TestBids:
    def test_sessions_suffixes_and_derivatives(self, tmp_path):
        touch(tmp_path, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_acq-x_LGE.nii.gz" for s in "AB"))
        touch(tmp_path, "sub-01/ses-A/anat/sub-01_ses-A_T2w.nii", "sub-02/cardiac/sub-02_cine.nii.gz")
        touch(tmp_path, "sub-01/ses-A/anat/sub-01_ses-A_desc-lv_mask.nii.gz", "dataset_description.json")
        touch(tmp_path, "derivatives/manual/sub-01/ses-B/sub-01_ses-B_space-LGE_desc-lv_mask.nii.gz")
        touch(tmp_path, "derivatives/manual/sub-02/sub-02_dseg.nii.gz", "derivatives/prep/sub-02/sub-02_LGE.nii.gz")
        cohort = find(tmp_path, INFARCT)
        assert cohort.layout == "bids"
        first, second, third = cohort.studies
        assert (first.patient, list(first.images)) == ("sub-01_ses-A", ["LGE", "T2"])
        assert first.mask == tmp_path / "sub-01/ses-A/anat/sub-01_ses-A_desc-lv_mask.nii.gz"
        assert (second.patient, list(second.images)) == ("sub-01_ses-B", ["LGE"])
        assert second.mask.name == "sub-01_ses-B_space-LGE_desc-lv_mask.nii.gz"
        assert (third.patient, files(tmp_path, third)) == ("sub-02", {"bSSFP": "sub-02/cardiac/sub-02_cine.nii.gz"})
        assert third.truth == tmp_path / "derivatives/manual/sub-02/sub-02_dseg.nii.gz"
        assert [codes(s) for s in cohort.studies] == [[], [], ["E_MASK_NONE"]]

    def test_brain(self, tmp_path):
        touch(tmp_path, *(f"sub-1/anat/sub-1_{s}.nii.gz" for s in ("T1w", "T2w", "FLAIR", "desc-brain_mask", "PD")))
        study = only(find(tmp_path, BRAIN))
        assert list(study.images) == ["T1", "T2", "FLAIR"]
        assert study.mask.name == "sub-1_desc-brain_mask.nii.gz"
        assert study.problems == ()

    def test_two_runs_are_ambiguous(self, tmp_path):
        touch(tmp_path, *(f"sub-1/anat/sub-1_run-{n}_T1w.nii.gz" for n in "12"))
        study = only(find(tmp_path, BRAIN, mask="nonzero"))
        assert codes(study) == ["E_AMBIGUOUS"]
        assert all(f"run-{n}" in study.problems[0].message for n in "12")

    def test_a_subject_without_sequences_is_a_failed_row(self, tmp_path):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/func/sub-2_bold.nii.gz", "code/run.py")
        cohort = find(tmp_path, BRAIN, mask="nonzero")
        assert ids(cohort) == ["sub-1", "sub-2"]
        assert codes(cohort.studies[1]) == ["E_NO_SEQUENCE"]

    @pytest.mark.parametrize("marked_by", ["description", "sidecar"])
    def test_our_own_results_are_no_truth(self, tmp_path, marked_by):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "derivatives/manual/sub-1/sub-1_desc-brain_mask.nii.gz")
        out = touch(tmp_path / "derivatives/gmm", "sub-1/sub-1_dseg.nii.gz", "sub-1/sub-1_desc-brain_mask.nii.gz")
        if marked_by == "description":
            description = {"DatasetType": "derivative", "GeneratedBy": [{"Name": "monai-deepgmm"}]}
            touch(out, "dataset_description.json", content=json.dumps(description).encode())
        else:
            touch(out, "sub-1/sub-1_dseg.json", content=b'{"versions": {"monai-deepgmm": "0.1.0"}}')
        study = only(find(tmp_path, BRAIN))
        assert study.truth is None
        assert study.mask == tmp_path / "derivatives/manual/sub-1/sub-1_desc-brain_mask.nii.gz"

    def test_truth_of_other_software_counts(self, tmp_path):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "derivatives/x/sub-1/sub-1_dseg.nii.gz")
        touch(tmp_path, "derivatives/x/dataset_description.json", content=b'{"GeneratedBy": [{"Name": "fsl"}]}')
        touch(tmp_path, "derivatives/x/sub-1/sub-1_dseg.json", content=b"not json")
        assert only(find(tmp_path, BRAIN)).truth == tmp_path / "derivatives/x/sub-1/sub-1_dseg.nii.gz"


class TestFolder:
    @pytest.mark.parametrize(
        ("name", "sequence"),
        [
            ("LGE", "LGE"),
            ("lge", "LGE"),
            ("pat3_LGE", "LGE"),
            ("pat3-PSIR", "LGE"),
            ("DE", "LGE"),
            ("LGE_001", "LGE"),
            ("stir", "T2"),
            ("study1_T2W", "T2"),
            ("sub 1.space-LGE.T2", "T2"),
            ("cine", "bSSFP"),
            ("x_C0", "bSSFP"),
            ("t2_flair", None),
            ("T2_to_LGE", None),
            ("mask_T2", None),
            ("T2map", None),
            ("LGE_old", None),
            ("_", None),
        ],
    )
    def test_the_last_word_decides(self, tmp_path, name, sequence):
        touch(tmp_path, f"p 1/{name}.nii.gz", "p 1/lv_mask.nii.gz", "p2/LGE.nii.gz")
        study = find(tmp_path, INFARCT, layout="folder").studies[0]
        assert study.patient == "p 1"
        assert files(tmp_path, study) == ({sequence: f"p 1/{name}.nii.gz"} if sequence else {})
        assert codes(study) == ([] if sequence else ["E_NO_SEQUENCE"])

    @pytest.mark.parametrize("name", ["mask", "LV", "lv_mask", "T2_mask", "p1-lv"])
    def test_masks(self, tmp_path, name):
        touch(tmp_path, "p1/T2.nii", f"p1/{name}.nii.gz")
        cohort = find(tmp_path, INFARCT)
        study = only(cohort)
        assert cohort.layout == "folder"
        assert files(tmp_path, study) == {"T2": "p1/T2.nii"}
        assert (study.mask, study.mask_labels, study.mask_rule) == (tmp_path / f"p1/{name}.nii.gz", (), "file")
        assert study.problems == ()

    @pytest.mark.parametrize("name", ["seg", "truth", "p1_Seg", "LGE_truth"])
    def test_truth_is_not_a_mask(self, tmp_path, name):
        touch(tmp_path, "p1/T2.nii", f"p1/{name}.nii.gz")
        study = only(find(tmp_path, INFARCT))
        assert (study.truth, study.truth_labels) == (tmp_path / f"p1/{name}.nii.gz", None)
        assert codes(study) == ["E_MASK_NONE"]

    def test_only_sequences_of_the_protocol_in_its_order(self, tmp_path):
        touch(tmp_path, *(f"p1/{s}.nii.gz" for s in ("FLAIR", "LGE", "T2", "T1", "mask")))
        assert list(only(find(tmp_path, BRAIN)).images) == ["T1", "T2", "FLAIR"]
        assert list(only(find(tmp_path, INFARCT)).images) == ["LGE", "T2"]

    def test_the_names_of_a_protocol_of_ones_own(self, tmp_path):
        own = replace(INFARCT, name="own", sequences=("PD",), required=())
        touch(tmp_path, "p1/x_pd.nii.gz", "p1/mask.nii.gz")
        assert list(only(find(tmp_path, own)).images) == ["PD"]

    def test_other_files_and_hidden_ones_are_ignored(self, tmp_path):
        touch(tmp_path, "p1/LGE.nii.gz", "p1/mask.nii.gz", "p1/._LGE.nii.gz", "p1/lesion_gt.nii.gz", "p1/LGE.txt")
        touch(tmp_path, ".git/LGE.nii.gz", "__MACOSX/LGE.nii.gz", "README.md")
        study = only(find(tmp_path, INFARCT))
        assert files(tmp_path, study) == {"LGE": "p1/LGE.nii.gz"}
        assert study.problems == ()


class TestProblems:
    @pytest.mark.parametrize("other", ["LGE.nii", "lge.nii.gz", "DE.nii.gz", "p1_LGE.nii.gz"])
    def test_two_files_for_one_sequence_never_the_first(self, tmp_path, other):
        touch(tmp_path, "p1/LGE.nii.gz", f"p1/{other}", "p1/T2.nii.gz", "p1/mask.nii.gz", "p2/T2.nii.gz")
        study = find(tmp_path, INFARCT).studies[0]
        assert codes(study) == ["E_AMBIGUOUS"]
        assert list(study.images) == ["T2"]
        assert "p1/LGE.nii.gz" in study.problems[0].message
        assert f"p1/{other}" in study.problems[0].message

    def test_two_masks(self, tmp_path):
        touch(tmp_path, "p1/LGE.nii.gz", "p1/mask.nii.gz", "p1/lv.nii.gz")
        study = only(find(tmp_path, INFARCT))
        assert codes(study) == ["E_AMBIGUOUS"]
        assert study.mask is None
        assert codes(only(find(tmp_path, INFARCT, mask="nonzero"))) == []

    def test_a_folder_where_nothing_matches_says_what_was_found(self, tmp_path):
        touch(tmp_path, "p1/LGE.nii.gz", "p1/mask.nii.gz", "p2/PD.nii.gz", "p2/deep/x.nii.gz")
        (tmp_path / "p3").mkdir()
        cohort = find(tmp_path, INFARCT)
        assert ids(cohort) == ["p1", "p2", "p3"]
        assert [codes(s) for s in cohort.studies] == [[], ["E_NO_SEQUENCE"], ["E_NO_SEQUENCE"]]
        assert "PD.nii.gz, deep/x.nii.gz" in cohort.studies[1].problems[0].message
        assert "no file" in cohort.studies[2].problems[0].message

    def test_even_if_it_is_the_only_folder(self, tmp_path):
        touch(tmp_path, "p1/PD.nii.gz")
        assert codes(only(find(tmp_path, INFARCT))) == ["E_NO_SEQUENCE"]

    @pytest.mark.parametrize(("name", "content"), [("p1/x/1.DCM", b""), ("p1/IM0001", bytes(128) + b"DICM")])
    def test_dicom(self, tmp_path, name, content):
        touch(tmp_path, name, content=content)
        touch(tmp_path, "p2/IM0001", content=bytes(132))
        touch(tmp_path, "p3/LGE.nii.gz", "p3/mask.nii.gz")
        cohort = find(tmp_path, INFARCT)
        assert [codes(s) for s in cohort.studies] == [["E_DICOM"], ["E_NO_SEQUENCE"], []]
        assert "dcm2niix" in cohort.studies[0].problems[0].remedy

    @pytest.mark.parametrize("series", ["p1/LGE/0001.dcm", "p1/LGE.dcm"])
    def test_dicom_in_the_place_of_one_sequence(self, tmp_path, series):
        touch(tmp_path, "p1/T2.nii.gz", "p1/mask.nii.gz", series)
        study = only(find(tmp_path, INFARCT))
        assert codes(study) == ["E_DICOM"]
        assert "LGE" in study.problems[0].message
        touch(tmp_path, "p1/LGE.nii.gz")  # converted: the originals do no harm
        assert codes(only(find(tmp_path, INFARCT))) == []

    def test_a_required_sequence_is_missing(self, tmp_path):
        touch(tmp_path, "p1/T2.nii.gz", "p1/mask.nii.gz")
        study = only(find(tmp_path, BRAIN))
        assert codes(study) == ["E_NO_SEQUENCE"]
        assert "T1" in study.problems[0].message
        assert "T2" in study.problems[0].message

    def test_no_mask_names_the_ways_to_get_one(self, tmp_path):
        touch(tmp_path, "p1/LGE.nii.gz")
        study = only(find(tmp_path, INFARCT))
        assert codes(study) == ["E_MASK_NONE"]
        for way in ("p1/mask.nii.gz", "--mask-labels", "--mask nonzero", "--manifest"):
            assert way in study.problems[0].remedy
        assert (study.mask, study.mask_rule) == (None, "file")

    @pytest.mark.parametrize("other", ["PAT1", unicodedata.normalize("NFD", "Zoë")])
    def test_ids_that_a_file_system_may_confuse(self, tmp_path, other):
        names = ["pat1", "Zoë", "p3"]
        touch(tmp_path, *(f"{p}/{s}.nii.gz" for p in (*names, other) for s in ("LGE", "mask")))
        if len(os.listdir(tmp_path)) < 4:
            pytest.skip("this file system takes the two ids for one")
        cohort = find(tmp_path, INFARCT)
        assert set(ids(cohort)) == {*names, other}
        failed = {s.patient for s in cohort.studies if codes(s) == ["E_DUPLICATE"]}
        assert failed == ({"pat1", "PAT1"} if other == "PAT1" else {"Zoë", other})
        assert ids(cohort) == sorted(ids(cohort))

    def test_a_name_too_long_for_a_file(self, tmp_path):
        fits, long = "é" * 100, "é" * 101
        touch(tmp_path, *(f"{p}/{s}.nii.gz" for p in (fits, long) for s in ("LGE", "mask")))
        assert [codes(s) for s in find(tmp_path, INFARCT).studies] == [[], ["E_NAME"]]

    @pytest.mark.parametrize("name", ["a\tb", "a\\b"])
    def test_folders_that_are_no_id(self, tmp_path, name):
        touch(tmp_path, f"{name}/LGE.nii.gz", f"{name}/mask.nii.gz")
        assert codes(only(find(tmp_path, INFARCT))) == ["E_ID"]

    def test_bytes_that_are_not_text(self, tmp_path):
        name = os.fsdecode(b"p\xff 1")
        try:
            touch(tmp_path, f"{name}/LGE.nii.gz", f"{name}/DE.nii.gz", f"{name}/mask.nii.gz")
        except OSError:
            pytest.skip("this file system takes only text")
        study = only(find(tmp_path, INFARCT))
        assert study.patient == name
        assert codes(study) == ["E_AMBIGUOUS"]
        study.problems[0].message.encode("utf-8")


class TestLinks:
    def test_links_and_folders_in_the_place_of_a_file_stay_for_the_reader(self, tmp_path):
        touch(tmp_path, *(f"{p}/mask.nii.gz" for p in ("dangling", "folder", "loop")))
        (tmp_path / "dangling/LGE.nii.gz").symlink_to("nowhere.nii.gz")
        (tmp_path / "loop/LGE.nii.gz").symlink_to("LGE.nii.gz")
        touch(tmp_path, "folder/LGE.nii.gz/T2.nii.gz")
        for study in find(tmp_path, INFARCT).studies:
            assert files(tmp_path, study) == {"LGE": f"{study.patient}/LGE.nii.gz"}
            assert study.problems == ()

    def test_linked_patients_are_found_and_loops_end(self, tmp_path):
        touch(tmp_path, "store/p1/LGE.nii.gz", "store/p1/mask.nii.gz")
        root = tmp_path / "cohort"
        root.mkdir()
        (root / "p1").symlink_to("../store/p1", target_is_directory=True)
        (root / "p2").symlink_to("p2", target_is_directory=True)
        touch(root, "p3/LGE.nii.gz", "p3/mask.nii.gz", "p4/LGE.nii.gz", "p4/mask.nii.gz")
        for link, target in (("p3/up", ".."), ("p3/next", "../p4"), ("p4/next", "../p3"), ("p4/self", ".")):
            (root / link).symlink_to(target, target_is_directory=True)
        cohort = find(root, INFARCT)
        assert ids(cohort) == ["p1", "p3", "p4"]
        assert all(s.problems == () for s in cohort.studies)

    def test_a_folder_without_permission(self, tmp_path, monkeypatch):
        touch(tmp_path, "p1/LGE.nii.gz", "p2/LGE.nii.gz", "p2/mask.nii.gz")
        scandir = os.scandir

        def refuse(path):
            if Path(path).name == "p1":
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert [codes(s) for s in find(tmp_path, INFARCT).studies] == [["E_FILE"], []]


class TestMask:
    def test_labels_typed_by_the_user_replace_the_layout_s(self, tmp_path):
        touch(tmp_path, "P1_LGE.nii.gz", "P1_gd.nii.gz")
        assert only(find(tmp_path, INFARCT, mask_labels=[200, 2221])).mask_labels == (200.0, 2221.0)

    def test_nonzero_needs_no_file(self, tmp_path):
        touch(tmp_path, "P1_LGE.nii.gz", "P1_gd.nii.gz")
        study = only(find(tmp_path, INFARCT, mask="nonzero"))
        assert (study.mask, study.mask_rule, study.mask_labels) == (None, "nonzero", ())
        assert study.truth == tmp_path / "P1_gd.nii.gz"
        assert study.problems == ()

    @pytest.mark.parametrize("options", [{"mask": "otsu"}, {"mask": ""}, {"mask": "nonzero", "mask_labels": [1]}])
    def test_anything_else_is_refused(self, tmp_path, options):
        touch(tmp_path, "P1_LGE.nii.gz")
        with pytest.raises(UsageError, match="nonzero"):
            find(tmp_path, INFARCT, **options)


class TestChoice:
    def test_the_layout_that_leaves_nothing_out(self, tmp_path):
        """One patient named the MyoPS way must not hide the others."""
        touch(tmp_path, "p1/p1_LGE.nii.gz", "p1/mask.nii.gz", *(f"p{n}/{s}.nii" for n in "23" for s in ("LGE", "lv")))
        cohort = find(tmp_path, INFARCT)
        assert (cohort.layout, ids(cohort), cohort.notes) == ("folder", ["p1", "p2", "p3"], ())
        assert all(s.problems == () for s in cohort.studies)

    def test_a_shared_id_is_a_conflict(self, tmp_path):
        touch(tmp_path, *(f"p{n}/study1_{s}.nii.gz" for n in "12" for s in ("LGE", "T2")))
        cohort = find(tmp_path, INFARCT, mask="nonzero")
        assert (cohort.layout, ids(cohort)) == ("folder", ["p1", "p2"])

    def test_when_all_conflict_most_patients_win_and_a_note_says_so(self, tmp_path):
        for p in ("a", "b"):
            touch(tmp_path, f"{p}/Images/x.nii.gz", f"{p}/Contours/x.nii.gz")
        touch(tmp_path, "c/LGE.nii.gz")
        cohort = find(tmp_path, INFARCT)
        assert (cohort.layout, ids(cohort)) == ("emidec", ["a", "b", "c"])
        assert codes(cohort.studies[2]) == ["E_NO_SEQUENCE"]
        assert "c/LGE.nii.gz" in cohort.notes[0]

    def test_one_bad_patient_does_not_change_the_layout(self, tmp_path):
        touch(tmp_path, *(f"P{n}/P{n}_{s}.nii.gz" for n in "123" for s in ("LGE", "T2", "gd")), "P2/P2_LGE.nii")
        cohort = find(tmp_path, INFARCT)
        assert cohort.layout == "myops"
        assert [codes(s) for s in cohort.studies] == [[], ["E_AMBIGUOUS"], []]

    def test_a_named_layout_is_not_second_guessed(self, tmp_path):
        touch(tmp_path, "p1/p1_LGE.nii.gz", "p1/mask.nii.gz", "p1/p1_gd.nii.gz")
        assert only(find(tmp_path, INFARCT, layout="myops")).truth == tmp_path / "p1/p1_gd.nii.gz"
        assert only(find(tmp_path, INFARCT, layout="folder")).truth is None

    def test_a_layout_of_ones_own(self, tmp_path):
        own = tmp_path / "mine.yaml"
        own.write_text(
            "images: ['scans/{sequence}/{patient}']\nmask: ['roi/{patient}_roi']\ntruth: ['gold/{patient}']\n"
            "sequences: {LGE: [delayed]}\ntissues: {7: scar}\n"
        )
        touch(tmp_path / "d", "scans/delayed/p1.nii.gz", "scans/t2/p1.nii.gz", "roi/p1_roi.nii.gz", "gold/p1.nii.gz")
        cohort = find(tmp_path / "d", INFARCT, layout=own)
        study = only(cohort)
        assert (cohort.layout, study.patient, list(study.images)) == ("mine", "p1", ["LGE", "T2"])
        assert (study.mask, study.mask_labels) == (tmp_path / "d/roi/p1_roi.nii.gz", ())
        assert study.truth_labels == {7: 4}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("- a", "list"),
            ("images: ['{patient}_{sequence}']", "sequences"),
            ("images: ['{sequence}']\nsequences: {LGE: []}", r"lacks \{patient\}"),
            ("images: ['{patient}_{what}']\nsequences: {LGE: []}", r"\{what\}"),
            ("images: ['{patient}']\nsequences: {LGE: []}\nmasks: []", "'masks'"),
            ("images: ['{patient}']\nsequences: {LGE: []}\npatient: '('", "own.yaml"),
            ("images: [", "own.yaml"),
        ],
    )
    def test_a_layout_that_is_wrong(self, tmp_path, text, said):
        own = tmp_path / "own.yaml"
        own.write_text(text)
        with pytest.raises(UsageError, match=said):
            layout.load(own)

    def test_unknown_layouts(self, tmp_path):
        with pytest.raises(UsageError, match="bids, nnunet, emidec, myops, folder"):
            find(touch(tmp_path, "x"), INFARCT, layout="dicom")
        with pytest.raises(UsageError, match=r"no file.*none\.yaml"):
            find(tmp_path, INFARCT, layout="none.yaml")

    def test_the_layouts_come_with_the_package(self):
        assert [layout.load(name).name for name in layout.ORDER] == list(layout.ORDER)


class TestNobody:
    def test_nothing_there(self, tmp_path):
        touch(tmp_path, "a/b.txt")
        with pytest.raises(UsageError, match="no patient") as caught:
            find(tmp_path, INFARCT)
        for word in ("LGE, T2, bSSFP", "bids", "folder", "--manifest", tmp_path.name):
            assert word in str(caught.value)
        assert str(tmp_path) not in str(caught.value)

    def test_one_patient_s_own_folder(self, tmp_path):
        with pytest.raises(UsageError, match="folder around it"):
            find(touch(tmp_path, "LGE.nii.gz", "mask.nii.gz"), INFARCT)

    def test_dicom(self, tmp_path):
        with pytest.raises(UsageError, match="dcm2niix"):
            find(touch(tmp_path, "1.dcm"), INFARCT)

    def test_no_folder(self, tmp_path):
        with pytest.raises(UsageError, match="no folder none"):
            find(tmp_path / "none", INFARCT)
        with pytest.raises(UsageError, match="is a file"):
            find(touch(tmp_path, "x") / "x", INFARCT)


class TestOwnResults:
    DESCRIPTION = b'{"DatasetType": "derivative", "GeneratedBy": [{"Name": "monai-deepgmm", "Version": "0.1.0"}]}'

    def test_they_are_not_patients(self, tmp_path):
        touch(tmp_path, "p1/LGE.nii.gz", "p1/mask.nii.gz", "out/p1/p1_dseg.nii.gz", "runs/a/p1/LGE.nii.gz")
        touch(tmp_path, "out/dataset_description.json", "runs/a/dataset_description.json", content=self.DESCRIPTION)
        assert ids(find(tmp_path, INFARCT)) == ["p1"]

    def test_a_folder_of_results_is_refused_as_input(self, tmp_path):
        touch(tmp_path, "dataset_description.json", content=self.DESCRIPTION)
        touch(tmp_path, "p1/p1_dseg.nii.gz")
        with pytest.raises(UsageError, match="results"):
            find(tmp_path, INFARCT)

    def test_images_that_we_made_are_input(self, tmp_path):
        touch(tmp_path, "dataset_description.json", content=self.DESCRIPTION.replace(b"derivative", b"raw"))
        touch(tmp_path, "P1_LGE.nii.gz", "P1_gd.nii.gz")
        assert ids(find(tmp_path, INFARCT)) == ["P1"]


class TestPatients:
    @pytest.fixture
    def cohort(self, tmp_path):
        return touch(tmp_path, *(f"{p}/{s}.nii.gz" for p in ("Case1", "Case2", "x") for s in ("LGE", "mask")))

    def test_exact_ids(self, cohort):
        assert ids(find(cohort, INFARCT, patients=["x", "Case1"])) == ["Case1", "x"]
        assert ids(find(cohort, INFARCT, patients="Case1")) == ["Case1"]

    def test_unknown_ids_name_their_neighbours(self, cohort):
        with pytest.raises(UsageError, match=r"case1.*near: Case"):
            find(cohort, INFARCT, patients=["x", "case1"])


class TestManifest:
    @pytest.mark.parametrize(
        ("name", "separator"), [("m.csv", ","), ("m.tsv", "\t"), ("m.csv", ";"), ("m.csv", "\t"), ("m.txt", ",")]
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_tables(self, tmp_path, name, separator, encoding, end):
        touch(tmp_path, "data/a b.nii.gz", "data/c,d;e.nii.gz", "Zoë.nii")
        rows = [["Patient", "lge", "cine", "T2", "MASK", "age"]]
        rows += [["Zoë 1", "../Zoë.nii", str(tmp_path / "data/a b.nii.gz"), "", '"c,d;e.nii.gz"', "44"], [""], []]
        rows += [["A", "a b.nii.gz"]]
        text = end.join(separator.join(row) for row in rows) + end
        manifest = write_manifest(tmp_path / "data" / name, text, encoding)
        cohort = find(tmp_path, INFARCT, manifest=manifest, mask_labels=(3,))
        assert (cohort.layout, ids(cohort)) == ("manifest", ["A", "Zoë 1"])
        a, zoe = cohort.studies
        assert codes(a) == ["E_MASK_NONE"]
        assert "column mask" in a.problems[0].remedy
        assert list(zoe.images) == ["LGE", "bSSFP"]
        assert zoe.images["LGE"].resolve() == tmp_path / "Zoë.nii"
        assert zoe.images["bSSFP"] == tmp_path / "data/a b.nii.gz"
        assert (zoe.mask, zoe.mask_labels) == (tmp_path / "data/c,d;e.nii.gz", (3.0,))
        assert (zoe.truth, zoe.truth_labels, zoe.problems) == (None, None, ())

    def test_truth_and_mask_may_be_one_file(self, tmp_path):
        touch(tmp_path, "i.nii", "l.nii")
        manifest = write_manifest(tmp_path / "m.csv", "patient, T1, mask, truth\np, i.nii, l.nii, l.nii\n")
        study = only(find(tmp_path, BRAIN, manifest=manifest))
        assert study.truth == study.mask == tmp_path / "l.nii"
        assert (study.mask_labels, study.truth_labels, study.problems) == ((), None, ())

    def test_a_file_that_does_not_exist(self, tmp_path):
        touch(tmp_path, "i.nii")
        manifest = write_manifest(tmp_path / "m.csv", "patient,T1,mask\na,i.nii,gone/m.nii\nb,i.nii,\n\0c,\0,i.nii\n")
        cohort = find(tmp_path, BRAIN, manifest=manifest)
        problems = {s.patient: codes(s) for s in cohort.studies}
        assert problems == {"a": ["E_FILE"], "b": ["E_MASK_NONE"], "\0c": ["E_ID", "E_FILE"]}
        assert "m.nii" in cohort.studies[1].problems[0].message
        masked = find(tmp_path, BRAIN, manifest=manifest, mask="nonzero", patients=["a", "b"])
        assert [codes(s) for s in masked.studies] == [[], []]

    @pytest.mark.parametrize(
        "patient",
        [
            "",
            ".",
            "..",
            "/etc",
            "a/b",
            "../a",
            "a/../b",
            "a..b",
            "...",
            "Summary.tsv",
            ".locks",
            "a\\b",
            "\\\\host\\c",
            "a\x07",
            "a\x7f",
            "a\0b",
        ],
    )
    def test_ids_that_are_refused(self, tmp_path, patient):
        touch(tmp_path, "i.nii")
        manifest = write_manifest(tmp_path / "m.csv", f"patient,LGE,mask\nok,i.nii,i.nii\n{patient},i.nii,i.nii\n")
        problems = {s.patient: codes(s) for s in find(tmp_path, INFARCT, manifest=manifest).studies}
        assert problems == {"ok": [], patient: ["E_ID"]}

    @pytest.mark.parametrize("patient", ["a b", "é ", "a.b.", "-x", "<b>&", os.fsdecode(b"\xff"), "x" * 200])
    def test_ids_that_are_kept_byte_for_byte(self, tmp_path, patient):
        touch(tmp_path, "i.nii")
        manifest = write_manifest(tmp_path / "m.csv", f"patient,LGE,mask\n{patient},i.nii,i.nii\n")
        study = only(find(tmp_path, INFARCT, manifest=manifest))
        assert (study.patient, study.problems) == (patient, ())

    def test_duplicates(self, tmp_path):
        touch(tmp_path, "i.nii")
        rows = "".join(f"{p},i.nii,i.nii\n" for p in ("a", "b", "B", "a", "c", "x" * 201))
        cohort = find(tmp_path, INFARCT, manifest=write_manifest(tmp_path / "m.csv", "patient,LGE,mask\n" + rows))
        problems = {s.patient: codes(s) for s in cohort.studies}
        two = ["E_DUPLICATE"]
        assert problems == {"a": two, "b": two, "B": two, "c": [], "x" * 201: ["E_NAME"]}
        assert len(cohort.studies) == 5

    def test_two_columns_for_one_sequence(self, tmp_path):
        touch(tmp_path, "i.nii", "j.nii")
        text = "patient,LGE,DE,mask\na,i.nii,j.nii,i.nii\nb,,j.nii,i.nii\n"
        a, b = find(tmp_path, INFARCT, manifest=write_manifest(tmp_path / "m.csv", text)).studies
        assert (codes(a), codes(b)) == (["E_AMBIGUOUS"], [])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "patient"),
            ("\n\n", "patient"),
            ("id,LGE\na,i.nii\n", "holds id, LGE"),
            ("patient,patient,LGE\n", "patient"),
            ("patient,age\na,3\n", "no column is a sequence.*age"),
            ("patient,LGE\n", "names no patient"),
            ("patient,LGE\na,b,c\n", "line 2: 3 cells"),
            ('patient,LGE\na,"b\n', "line"),
        ],
    )
    def test_tables_that_are_refused(self, tmp_path, text, said):
        with pytest.raises(UsageError, match=said):
            find(tmp_path, INFARCT, manifest=write_manifest(tmp_path / "m.csv", text))

    def test_tables_that_cannot_be_read(self, tmp_path):
        (tmp_path / "odd.csv").write_bytes(b"\xff\xfea")
        for bad in (tmp_path / "none.csv", tmp_path, tmp_path / "odd.csv"):
            with pytest.raises(UsageError, match="cannot be read") as caught:
                find(tmp_path, INFARCT, manifest=bad)
            assert str(tmp_path) not in str(caught.value)

    def test_not_together_with_a_layout(self, tmp_path):
        with pytest.raises(UsageError, match="one of them"):
            find(tmp_path, INFARCT, manifest=tmp_path / "m.csv", layout="folder")


@pytest.mark.data
class TestRealScans:
    @pytest.fixture
    def data(self):
        folder = os.environ.get("DEEPGMM_TEST_DATA")
        if not folder:
            pytest.skip("DEEPGMM_TEST_DATA does not name the folder of real scans")
        return Path(folder)

    def test_emidec(self, data):
        cohort = find(data / "emidec", INFARCT)
        assert (cohort.layout, ids(cohort)) == ("emidec", ["sampleNegative", "samplePositive"])
        for study in cohort.studies:
            assert study.problems == ()
            assert study.images["LGE"].is_file()
            assert study.mask == study.truth

    def test_openms(self, data):
        cohort = find(data / "openms", BRAIN, mask="nonzero")
        assert (cohort.layout, ids(cohort)) == ("folder", ["patient01_raw", "patient19"])
        for study in cohort.studies:
            assert list(study.images) == ["T1", "T2", "FLAIR"]
            assert study.problems == ()
            assert study.truth is None
