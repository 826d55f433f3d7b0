"""Which files belong to which patient: by name alone, so nearly all files here are empty."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from folders import BRAIN, INFARCT, all_codes, codes, cohort, files, ids, one, touch

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import layout
from monai_deepgmm.patients.discovery import Cohort, find

#: Of a folder of our own results.
DESCRIPTION = b'{"DatasetType": "derivative", "GeneratedBy": [{"Name": "monai-deepgmm", "Version": "0.1.0"}]}'


class TestMyops:
    @pytest.mark.parametrize("home", ["", "{}/", "train/"])
    @pytest.mark.parametrize("lge", ["LGE", "DE"])
    def test_flat_or_one_folder_per_patient(self, tmp_path, home, lge):
        for case in ("Case2", "Case1"):
            touch(tmp_path, f"{home.format(case)}{case}_{{C0,{lge},T2,gd}}.nii.gz")
        found = cohort(tmp_path)
        assert (found.layout, ids(found)) == ("myops", ["Case1", "Case2"])
        study, at = found.studies[0], home.format("Case1")
        assert list(study.images) == ["LGE", "T2", "bSSFP"]
        assert list(files(tmp_path, study).values()) == [f"{at}Case1_{s}.nii.gz" for s in (lge, "T2", "C0")]
        assert study.mask == study.truth == tmp_path / f"{at}Case1_gd.nii.gz"
        assert study.mask_labels == (500, 200, 1220, 2221)
        assert study.truth_labels == {500: 1, 200: 2, 1220: 3, 2221: 4}
        assert study.problems == ()

    @pytest.mark.parametrize("below", [True, False])
    def test_the_original_naming_has_its_labels_in_a_sibling_folder(self, tmp_path, below):
        touch(tmp_path, "train25/myops_training_101_{C0,DE,T2}.nii.gz")
        touch(tmp_path, "train25_myops_gd/myops_training_{101,102}_gd.nii.gz")
        study = one(tmp_path if below else tmp_path / "train25")
        assert (study.patient, study.problems) == ("myops_training_101", ())
        assert study.truth == study.mask == tmp_path / "train25_myops_gd/myops_training_101_gd.nii.gz"

    def test_labels_beside_the_images_are_preferred_to_a_folder_beside_dir_and_two_such_are_ambiguous(self, tmp_path):
        touch(tmp_path, "a/P1_LGE.nii.gz", "b_gd/P1_gd.nii.gz", "c_gd/P1_gd.nii.gz")
        study = one(tmp_path / "a")
        assert codes(study) == ["E_AMBIGUOUS"]
        assert all(f"{folder}/P1_gd" in study.problems[0].message for folder in ("b_gd", "c_gd"))
        assert study.mask is study.truth is None
        assert one(tmp_path / "a", "P1_gd.nii.gz").truth == tmp_path / "a/P1_gd.nii.gz"

    def test_a_mask_file_takes_the_place_of_the_labels(self, tmp_path):
        study = one(tmp_path, "P1_{LGE,gd,mask}.nii.gz")
        assert (study.mask, study.mask_labels) == (tmp_path / "P1_mask.nii.gz", ())
        assert study.truth == tmp_path / "P1_gd.nii.gz"

    def test_the_same_id_in_two_folders_is_two_patients_and_the_brain_is_another_layouts(self, tmp_path):
        assert codes(one(tmp_path, "a/P1_{LGE,gd}.nii.gz", "b/P1_T2.nii.gz", layout="myops")) == ["E_DUPLICATE"]
        with pytest.raises(UsageError, match=r"myops.*protocol brain"):
            cohort(tmp_path / "brain", "P1_{T1,T2}.nii.gz", protocol=BRAIN, layout="myops")


class TestEmidec:
    def test_images_and_contours(self, tmp_path):
        found = cohort(tmp_path, "Case_P001/{Images,Contours}/Case_P001.nii.gz", "Case P001.txt")
        assert (found.layout, ids(found)) == ("emidec", ["Case_P001"])
        study = found.studies[0]
        assert files(tmp_path, study) == {"LGE": "Case_P001/Images/Case_P001.nii.gz"}
        assert study.mask == study.truth == tmp_path / "Case_P001/Contours/Case_P001.nii.gz"
        assert study.mask_labels == (1, 2, 3, 4)
        assert study.truth_labels == {1: 1, 2: 2, 3: 4, 4: 4}
        assert study.problems == ()

    def test_two_images_are_ambiguous_and_a_patient_without_images_is_a_failed_row(self, tmp_path):
        found = cohort(
            tmp_path, "P1/{Images,Contours}/a.nii.gz", "P2/notes.txt", "P3/{Images/a,Images/b,Contours/a}.nii.gz"
        )
        assert all_codes(found) == [[], ["E_NO_SEQUENCE"], ["E_AMBIGUOUS"]]
        assert "notes.txt" in found.studies[1].problems[0].message
        assert found.studies[2].images == {}


class TestNnunet:
    @pytest.fixture
    def dataset(self, tmp_path):
        return touch(tmp_path, "imagesTr/a_b_{0000,0001,0002}.nii.gz", "{labelsTr,masksTr}/a_b.nii.gz")

    @pytest.mark.parametrize("key", ["channel_names", "modality"])
    def test_channels_are_named_by_the_data_set(self, dataset, key):
        channels = {"0": "cine", "1": "t2W", "2": "lge"}
        touch(dataset, "dataset.json", content=json.dumps({key: channels}).encode())
        found = cohort(dataset)
        study = found.studies[0]
        assert (found.layout, ids(found)) == ("nnunet", ["a_b"])
        numbers = {"LGE": "0002", "T2": "0001", "bSSFP": "0000"}
        assert files(dataset, study) == {s: f"imagesTr/a_b_{n}.nii.gz" for s, n in numbers.items()}
        assert list(study.images) == ["LGE", "T2", "bSSFP"]
        assert (study.mask, study.mask_labels) == (dataset / "masksTr/a_b.nii.gz", ())
        assert (study.truth, study.truth_labels) == (dataset / "labelsTr/a_b.nii.gz", None)
        assert study.problems == ()

    @pytest.mark.parametrize("parts", ["Tr,Ts", "Ts"])
    def test_test_images_are_patients_and_folders_are_not(self, tmp_path, parts):
        touch(tmp_path, "dataset.json", content=b'{"channel_names": {"0": "LGE", "1": "T2"}}')
        for number, part in enumerate(parts.split(",")):
            touch(tmp_path, f"images{part}/p{number}_{{0000,0001}}.nii.gz", f"masks{part}/p{number}.nii.gz")
            touch(tmp_path, f"labels{part}/p{number}.nii.gz")
        found = cohort(tmp_path, "imagesVal/x.nii.gz")
        assert (found.layout, all_codes(found)) == ("nnunet", [[]] * len(found.studies))
        assert ids(found) == [f"p{n}" for n in range(len(parts.split(",")))]
        assert all(s.truth.parent.name == f"labels{s.mask.parent.name[-2:]}" for s in found.studies)

    def test_one_id_in_both_is_two_patients(self, tmp_path):
        touch(tmp_path, "dataset.json", content=b'{"channel_names": {"0": "LGE"}}')
        assert codes(one(tmp_path, "{imagesTr,imagesTs}/a_0000.nii.gz"))[:1] == ["E_DUPLICATE"]

    def test_folders_of_a_data_set_that_says_nothing_are_no_patients(self, tmp_path):
        with pytest.raises(UsageError, match="no patient"):
            cohort(tmp_path / "a", "imagesTs/{T1,mask}.nii.gz", "labelsTs/x.nii.gz", protocol=BRAIN)
        assert ids(cohort(tmp_path / "b", "imagesTs/{a_LGE,a_mask}.nii.gz")) == ["a"]
        with pytest.raises(UsageError, match="data set's own folder: Dataset1_X"):
            cohort(tmp_path / "c", "Dataset1_X/{dataset.json,imagesTr/a_0000.nii.gz,labelsTr/a.nii.gz}")

    def test_the_ending_that_the_data_set_states(self, dataset):
        touch(dataset, "dataset.json", content=b'{"channel_names": {"0": "LGE"}, "file_ending": ".nii"}')
        study = one(dataset, "imagesTr/a_b_0000.nii")
        assert (study.images["LGE"].name, codes(study)) == ("a_b_0000.nii", [])
        touch(dataset, "dataset.json", content=b'{"channel_names": {"0": "LGE"}}')
        assert codes(one(dataset)) == ["E_AMBIGUOUS"]

    def test_labels_are_not_taken_for_a_mask(self, dataset):
        touch(dataset, "dataset.json", content=b'{"channel_names": {"0": "LGE"}}')
        (dataset / "masksTr/a_b.nii.gz").unlink()
        assert one(dataset).mask_rule == "auto"
        study = one(dataset, mask="file")
        assert codes(study) == ["E_MASK_NONE"]
        assert "masksTr/a_b.nii.gz" in study.problems[0].remedy

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            *((c, r"dataset\.json") for c in (None, b"", b"[1]", b'{"channel_names": ["LGE"]}')),
            (b'{"channel_names": {"x": "LGE"}}', r"dataset\.json"),
            (b'{"channel_names": {"0": "MRI", "1": "CT"}}', r"MRI, CT.*LGE, T2, bSSFP"),
        ],
    )
    @pytest.mark.parametrize("name", [None, "nnunet"])
    def test_without_names_of_its_sequences_nothing_can_be_told(self, dataset, content, said, name):
        if content is not None:
            touch(dataset, "dataset.json", content=content)
        with pytest.raises(UsageError, match=said):
            cohort(dataset, layout=name)


class TestBids:
    def test_sessions_suffixes_and_derivatives(self, tmp_path):
        touch(tmp_path, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_acq-x_LGE.nii.gz" for s in "AB"))
        touch(tmp_path, "sub-01/ses-A/anat/sub-01_ses-A_T2w.nii", "sub-02/cardiac/sub-02_cine.nii.gz")
        touch(tmp_path, "sub-01/ses-A/anat/sub-01_ses-A_desc-lv_mask.nii.gz", "dataset_description.json")
        touch(tmp_path, "derivatives/manual/sub-01/ses-B/sub-01_ses-B_space-LGE_desc-lv_mask.nii.gz")
        touch(tmp_path, "derivatives/manual/sub-02/sub-02_dseg.nii.gz", "derivatives/prep/sub-02/sub-02_LGE.nii.gz")
        found = cohort(tmp_path)
        first, second, third = found.studies
        assert (found.layout, ids(found)) == ("bids", ["sub-01_ses-A", "sub-01_ses-B", "sub-02"])
        assert [list(s.images) for s in (first, second)] == [["LGE", "T2"], ["LGE"]]
        assert first.mask == tmp_path / "sub-01/ses-A/anat/sub-01_ses-A_desc-lv_mask.nii.gz"
        assert second.mask.name == "sub-01_ses-B_space-LGE_desc-lv_mask.nii.gz"
        assert files(tmp_path, third) == {"bSSFP": "sub-02/cardiac/sub-02_cine.nii.gz"}
        assert third.truth == tmp_path / "derivatives/manual/sub-02/sub-02_dseg.nii.gz"
        assert (all_codes(found), [s.mask_rule for s in found.studies]) == ([[], [], []], ["file", "file", "auto"])

    def test_brain(self, tmp_path):
        study = one(tmp_path, "sub-1/anat/sub-1_{T1w,T2w,FLAIR,desc-brain_mask,PD}.nii.gz", protocol=BRAIN)
        assert list(study.images) == ["T1", "T2", "FLAIR"]
        assert (study.mask.name, study.problems) == ("sub-1_desc-brain_mask.nii.gz", ())

    def test_two_runs_are_ambiguous_and_a_subject_without_sequences_is_a_failed_row(self, tmp_path):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/func/sub-2_bold.nii.gz", "code/run.py")
        found = cohort(tmp_path, "sub-3/anat/sub-3_run-{1,2}_T1w.nii.gz", protocol=BRAIN, mask="nonzero")
        assert ids(found) == ["sub-1", "sub-2", "sub-3"]
        assert all_codes(found) == [[], ["E_NO_SEQUENCE"], ["E_AMBIGUOUS"]]
        assert all(f"run-{n}" in found.studies[2].problems[0].message for n in "12")

    @pytest.mark.parametrize("marked_by", ["description", "sidecar"])
    def test_our_own_results_are_no_reference_labels(self, tmp_path, marked_by):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "derivatives/manual/sub-1/sub-1_desc-brain_mask.nii.gz")
        out = touch(tmp_path / "derivatives/gmm", "sub-1/sub-1_{dseg,desc-brain_mask}.nii.gz")
        if marked_by == "description":
            touch(out, "dataset_description.json", content=DESCRIPTION)
        else:
            touch(out, "sub-1/sub-1_dseg.json", content=b'{"versions": {"monai-deepgmm": "0.1.0"}}')
        study = one(tmp_path, protocol=BRAIN)
        assert study.truth is None
        assert study.mask == tmp_path / "derivatives/manual/sub-1/sub-1_desc-brain_mask.nii.gz"

    def test_labels_of_other_software_count(self, tmp_path):
        touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "derivatives/x/sub-1/sub-1_dseg.nii.gz")
        touch(tmp_path, "derivatives/x/dataset_description.json", content=b'{"GeneratedBy": [{"Name": "fsl"}]}')
        touch(tmp_path, "derivatives/x/sub-1/sub-1_dseg.json", content=b"not json")
        assert one(tmp_path, protocol=BRAIN).truth == tmp_path / "derivatives/x/sub-1/sub-1_dseg.nii.gz"


class TestFolder:
    @pytest.mark.parametrize(
        ("names", "sequence"),
        [
            ("LGE,lge,pat3_LGE,pat3-PSIR,DE,LGE_001", "LGE"),
            ("stir,study1_T2W,sub 1.space-LGE.T2", "T2"),
            ("cine,x_C0", "bSSFP"),
            ("t2_flair,T2_to_LGE,mask_T2,T2map,LGE_old,_", None),
        ],
    )
    def test_the_last_word_decides(self, tmp_path, names, sequence):
        for n, name in enumerate(names.split(",")):
            root = tmp_path / str(n)
            study = cohort(root, f"p 1/{{{name},lv_mask}}.nii.gz", "p2/LGE.nii.gz", layout="folder").studies[0]
            assert study.patient == "p 1"
            assert files(root, study) == ({sequence: f"p 1/{name}.nii.gz"} if sequence else {})
            assert codes(study) == ([] if sequence else ["E_NO_SEQUENCE"])

    @pytest.mark.parametrize("mask", ["mask", "LV", "lv_mask", "T2_mask", "p1-lv"])
    @pytest.mark.parametrize("seg", ["seg", "truth", "p1_Seg", "LGE_truth"])
    def test_masks_and_reference_labels_which_are_no_mask(self, tmp_path, mask, seg):
        study = one(tmp_path, "p1/T2.nii", f"p1/{seg}.nii.gz")
        assert (study.truth, study.truth_labels) == (tmp_path / f"p1/{seg}.nii.gz", None)
        assert (codes(study), study.mask, study.mask_rule) == ([], None, "auto")
        study = one(tmp_path, f"p1/{mask}.nii.gz")
        assert files(tmp_path, study) == {"T2": "p1/T2.nii"}
        assert (study.mask, study.mask_labels, study.mask_rule) == (tmp_path / f"p1/{mask}.nii.gz", (), "file")
        assert study.problems == ()

    def test_only_sequences_of_the_protocol_in_its_order(self, tmp_path):
        touch(tmp_path, "p1/{FLAIR,LGE,T2,T1,mask,x_pd}.nii.gz")
        own = replace(INFARCT, name="own", sequences=("PD",), required=())
        for sought, expected in ((BRAIN, ["T1", "T2", "FLAIR"]), (INFARCT, ["LGE", "T2"]), (own, ["PD"])):
            assert list(one(tmp_path, protocol=sought).images) == expected

    def test_other_files_and_hidden_ones_are_ignored(self, tmp_path):
        touch(tmp_path, "p1/{LGE,mask,._LGE,lesion_gt}.nii.gz", "p1/LGE.txt")
        study = one(tmp_path, "{.git,__MACOSX}/LGE.nii.gz", "README.md")
        assert files(tmp_path, study) == {"LGE": "p1/LGE.nii.gz"}
        assert study.problems == ()


class TestProblems:
    @pytest.mark.parametrize("other", ["LGE.nii", "lge.nii.gz", "DE.nii.gz", "p1_LGE.nii.gz"])
    def test_two_files_for_one_sequence_never_the_first(self, tmp_path, other):
        study = cohort(tmp_path, "p1/{LGE,T2,mask}.nii.gz", f"p1/{other}", "p2/T2.nii.gz").studies[0]
        assert (codes(study), list(study.images)) == (["E_AMBIGUOUS"], ["T2"])
        assert all(f"p1/{name}" in study.problems[0].message for name in ("LGE.nii.gz", other))

    def test_two_masks(self, tmp_path):
        study = one(tmp_path, "p1/{LGE,mask,lv}.nii.gz")
        assert (codes(study), study.mask) == (["E_AMBIGUOUS"], None)
        assert codes(one(tmp_path, mask="nonzero")) == []

    def test_a_folder_where_nothing_matches_says_what_was_found(self, tmp_path):
        (tmp_path / "p3").mkdir()
        found = cohort(tmp_path, "p1/{LGE,mask}.nii.gz", "p2/{PD,deep/x}.nii.gz")
        assert ids(found) == ["p1", "p2", "p3"]
        assert all_codes(found) == [[], ["E_NO_SEQUENCE"], ["E_NO_SEQUENCE"]]
        assert "PD.nii.gz, deep/x.nii.gz" in found.studies[1].problems[0].message
        assert "no file" in found.studies[2].problems[0].message
        assert codes(one(tmp_path / "alone", "p1/PD.nii.gz")) == ["E_NO_SEQUENCE"]  # even if it is the only folder

    @pytest.mark.parametrize(("name", "content"), [("p1/x/1.DCM", b""), ("p1/IM0001", bytes(128) + b"DICM")])
    def test_dicom(self, tmp_path, name, content):
        touch(tmp_path, name, content=content)
        touch(tmp_path, "p2/IM0001", content=bytes(132))
        found = cohort(tmp_path, "p3/{LGE,mask}.nii.gz")
        assert all_codes(found) == [["E_DICOM"], ["E_NO_SEQUENCE"], []]
        assert "dcm2niix" in found.studies[0].problems[0].remedy

    @pytest.mark.parametrize("series", ["p1/LGE/0001.dcm", "p1/LGE.dcm"])
    def test_dicom_in_the_place_of_one_sequence(self, tmp_path, series):
        study = one(tmp_path, "p1/{T2,mask}.nii.gz", series)
        assert codes(study) == ["E_DICOM"]
        assert "LGE" in study.problems[0].message
        assert codes(one(tmp_path, "p1/LGE.nii.gz")) == []  # converted: the originals do no harm

    def test_a_required_sequence_is_missing_and_no_mask_names_the_ways_to_get_one(self, tmp_path):
        study = one(tmp_path / "brain", "p1/{T2,mask}.nii.gz", protocol=BRAIN)
        assert codes(study) == ["E_NO_SEQUENCE"]
        assert all(sequence in study.problems[0].message for sequence in ("T1", "T2"))
        study = one(tmp_path / "heart", "p1/LGE.nii.gz", mask="file")
        assert (codes(study), study.mask, study.mask_rule) == (["E_MASK_NONE"], None, "file")
        ways = ("p1/mask.nii.gz", "--mask-labels", "--mask nonzero", "--mask auto", "--manifest")
        assert all(way in study.problems[0].remedy for way in ways)

    @pytest.mark.parametrize("other", ["PAT1", unicodedata.normalize("NFD", "Zoë")])
    def test_ids_that_a_file_system_may_confuse(self, tmp_path, other):
        names = ["pat1", "Zoë", "p3"]
        touch(tmp_path, *(f"{p}/{{LGE,mask}}.nii.gz" for p in (*names, other)))
        if len(os.listdir(tmp_path)) < 4:
            pytest.skip("this file system takes the two ids for one")
        found = cohort(tmp_path)
        assert ids(found) == sorted([*names, other])
        failed = {s.patient for s in found.studies if codes(s) == ["E_DUPLICATE"]}
        assert failed == ({"pat1", "PAT1"} if other == "PAT1" else {"Zoë", other})

    @pytest.mark.parametrize(
        ("name", "problems"), [("é" * 100, []), ("é" * 101, ["E_NAME"]), ("a\tb", ["E_ID"]), ("a\\b", ["E_ID"])]
    )
    def test_folders_that_are_no_id_or_too_long_for_a_file(self, tmp_path, name, problems):
        assert codes(one(tmp_path, f"{name}/{{LGE,mask}}.nii.gz")) == problems

    def test_bytes_that_are_not_text(self, tmp_path):
        name = os.fsdecode(b"p\xff 1")
        try:
            touch(tmp_path, f"{name}/{{LGE,DE,mask}}.nii.gz")
        except OSError:
            pytest.skip("this file system takes only text")
        study = one(tmp_path)
        assert (study.patient, codes(study)) == (name, ["E_AMBIGUOUS"])
        study.problems[0].message.encode("utf-8")


class TestLinks:
    def test_links_and_folders_in_the_place_of_a_file_stay_for_the_reader(self, tmp_path):
        touch(tmp_path, "{dangling,folder,loop}/mask.nii.gz", "folder/LGE.nii.gz/T2.nii.gz")
        (tmp_path / "dangling/LGE.nii.gz").symlink_to("nowhere.nii.gz")
        (tmp_path / "loop/LGE.nii.gz").symlink_to("LGE.nii.gz")
        found = cohort(tmp_path)
        assert all_codes(found) == [[], [], []]
        assert all(files(tmp_path, s) == {"LGE": f"{s.patient}/LGE.nii.gz"} for s in found.studies)

    def test_linked_patients_are_found_and_loops_end(self, tmp_path):
        touch(tmp_path, "store/p1/{LGE,mask}.nii.gz")
        root = touch(tmp_path / "cohort", "p3/{LGE,mask}.nii.gz", "p4/{LGE,mask}.nii.gz")
        links = {"p1": "../store/p1", "p2": "p2", "p3/up": "..", "p3/next": "../p4", "p4/next": "../p3", "p4/self": "."}
        for link, target in links.items():
            (root / link).symlink_to(target, target_is_directory=True)
        found = cohort(root)
        assert ids(found) == ["p1", "p3", "p4"]
        assert all_codes(found) == [[], [], []]

    def test_a_folder_without_permission(self, tmp_path, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if Path(path).name == "p1":
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert all_codes(cohort(tmp_path, "p1/LGE.nii.gz", "p2/{LGE,mask}.nii.gz")) == [["E_FILE"], []]


class TestMask:
    def test_labels_typed_by_the_user_replace_the_layouts_and_nonzero_needs_no_file(self, tmp_path):
        touch(tmp_path, "P1_{LGE,gd}.nii.gz")
        assert one(tmp_path, mask_labels=[200, 2221]).mask_labels == (200.0, 2221.0)
        study = one(tmp_path, mask="nonzero")
        assert (study.mask, study.mask_rule, study.mask_labels) == (None, "nonzero", ())
        assert (study.truth, study.problems) == (tmp_path / "P1_gd.nii.gz", ())

    @pytest.mark.parametrize("options", [{"mask": "otsu"}, {"mask": ""}, {"mask": "nonzero", "mask_labels": [1]}])
    def test_anything_else_is_refused(self, tmp_path, options):
        with pytest.raises(UsageError, match="nonzero"):
            cohort(tmp_path, "P1_LGE.nii.gz", **options)


class TestChoice:
    @pytest.mark.parametrize(
        ("names", "layout", "problems"),
        [
            # One patient named the MyoPS way must not hide the others.
            (["p1/{p1_LGE,mask}.nii.gz", "p2/{LGE,lv}.nii", "p3/{LGE,lv}.nii"], "folder", [[], [], []]),
            # A shared id is a conflict.
            (["p1/study1_{LGE,T2,mask}.nii.gz", "p2/study1_{LGE,T2,mask}.nii.gz"], "folder", [[], []]),
            # One bad patient does not change the layout.
            (["a/a_{LGE,T2,gd}.nii.gz", "b/b_{LGE,gd}.nii.gz", "b/b_LGE.nii"], "myops", [[], ["E_AMBIGUOUS"]]),
        ],
        ids=["mixed", "shared id", "one bad"],
    )
    def test_the_layout_that_leaves_nothing_out(self, tmp_path, names, layout, problems):
        found = cohort(tmp_path, *names)
        assert (found.layout, all_codes(found), found.notes) == (layout, problems, ())
        assert ids(found) == sorted({name.partition("/")[0] for name in names})

    def test_when_all_conflict_most_patients_win_and_a_note_says_so(self, tmp_path):
        found = cohort(tmp_path, *(f"{p}/{{Images,Contours}}/x.nii.gz" for p in "ab"), "c/LGE.nii.gz")
        assert (found.layout, ids(found)) == ("emidec", ["a", "b", "c"])
        assert codes(found.studies[2]) == ["E_NO_SEQUENCE"]
        assert "c/LGE.nii.gz" in found.notes[0]

    def test_a_named_layout_is_not_second_guessed(self, tmp_path):
        touch(tmp_path, "p1/{p1_LGE,mask,p1_gd}.nii.gz")
        assert one(tmp_path, layout="myops").truth == tmp_path / "p1/p1_gd.nii.gz"
        assert one(tmp_path, layout="folder").truth is None

    def test_a_layout_of_ones_own(self, tmp_path):
        own, root = tmp_path / "mine.yaml", tmp_path / "d"
        own.write_text(
            "images: ['scans/{sequence}/{patient}']\nmask: ['roi/{patient}_roi']\ntruth: ['gold/{patient}']\n"
            "sequences: {LGE: [delayed]}\ntissues: {7: scar}\n"
        )
        found = cohort(root, "{scans/delayed/p1,scans/t2/p1,roi/p1_roi,gold/p1}.nii.gz", layout=own)
        study = found.studies[0]
        assert (found.layout, ids(found), list(study.images)) == ("mine", ["p1"], ["LGE", "T2"])
        assert (study.mask, study.mask_labels) == (root / "roi/p1_roi.nii.gz", ())
        assert study.truth_labels == {7: 4}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("- a", "line 1: got \\['a'\\], expected keys with values"),
            ("images: ['{patient}_{sequence}']", "sequences"),
            ("images: ['{sequence}']\nsequences: {LGE: []}", r"lacks \{patient\}"),
            ("images: ['{patient}_{what}']\nsequences: {LGE: []}", r"\{what\}"),
            (
                "images: ['{patient}']\nsequences: {LGE: []}\nmasks: []",
                r"masks: no such key \(did you mean mask\?\)",
            ),
            ("images: ['{patient}']\nsequences: {LGE: []}\npatient: '('", "own.yaml"),
            ("images: [", "own.yaml"),
        ],
    )
    def test_a_layout_that_is_wrong(self, tmp_path, text, said):
        own = tmp_path / "own.yaml"
        own.write_text(text)
        with pytest.raises(UsageError, match=said):
            layout.load(own)

    def test_the_layouts_that_come_with_the_package_and_unknown_ones(self, tmp_path):
        assert [layout.load(name).name for name in layout.ORDER] == list(layout.ORDER)
        for name, said in (
            ("dicoms", "myops, folder, dicom"),
            ("none.yaml", r"no file.*none\.yaml"),
        ):
            with pytest.raises(UsageError, match=said):
                cohort(tmp_path, "x", layout=name)


class TestNobody:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(UsageError, match="no patient") as caught:
            cohort(tmp_path, "a/b.txt")
        for word in ("LGE, T2, bSSFP", "bids", "folder", "--manifest", tmp_path.name):
            assert word in str(caught.value)
        assert str(tmp_path) not in str(caught.value)

    @pytest.mark.parametrize(
        ("names", "root", "said"),
        [
            ("{LGE,mask}.nii.gz", "", "folder around it"),  # one patient's own folder
            ("1.txt", "", "no patient found"),
            ("x", "none", "no folder none"),
            ("x", "x", "is a file"),
        ],
    )
    def test_what_is_no_cohort(self, tmp_path, names, root, said):
        touch(tmp_path, names)
        with pytest.raises(UsageError, match=said):
            cohort(tmp_path / root)

    def test_our_own_results_are_no_patients_but_images_that_we_made_are(self, tmp_path):
        touch(tmp_path / "in", "p1/{LGE,mask}.nii.gz", "out/p1/p1_dseg.nii.gz", "runs/a/p1/LGE.nii.gz")
        touch(tmp_path / "in", "{out,runs/a}/dataset_description.json", content=DESCRIPTION)
        assert ids(cohort(tmp_path / "in")) == ["p1"]
        with pytest.raises(UsageError, match="results"):
            cohort(tmp_path / "in/out")
        made = touch(tmp_path / "made", "dataset_description.json", content=DESCRIPTION.replace(b"derivative", b"raw"))
        assert ids(cohort(made, "P1_{LGE,gd}.nii.gz")) == ["P1"]

    def test_exact_ids_and_unknown_ones_name_their_neighbours(self, tmp_path):
        touch(tmp_path, *(f"{p}/{{LGE,mask}}.nii.gz" for p in ("Case1", "Case2", "x")))
        assert ids(cohort(tmp_path, patients=["x", "Case1"])) == ["Case1", "x"]
        assert ids(cohort(tmp_path, patients="Case1")) == ["Case1"]
        with pytest.raises(UsageError, match=r"case1.*near: Case"):
            cohort(tmp_path, patients=["x", "case1"])


class TestManifest:
    @pytest.fixture
    def table(self, tmp_path):
        """The cohort of a table, beside the files i.nii and j.nii."""
        touch(tmp_path, "{i,j}.nii")

        def read(text: str, *, name="m.csv", encoding="utf-8", protocol=INFARCT, **options) -> Cohort:
            (tmp_path / name).write_bytes(text.encode(encoding, "surrogateescape"))
            return find(tmp_path, protocol, manifest=tmp_path / name, **options)

        return read

    def test_a_table_that_is_no_utf_8(self, table, tmp_path):
        touch(tmp_path, "Jörg.nii.gz")
        (study,) = table("patient,LGE\np1,Jörg.nii.gz\n", encoding="cp1252").studies
        assert [p.code for p in study.problems][:1] == ["E_FILE"]
        assert study.problems[0].remedy == "m.csv is not in UTF-8: save it as CSV UTF-8, or as UTF-8 text"

    @pytest.mark.parametrize(
        ("name", "separator"), [("m.csv", ","), ("m.tsv", "\t"), ("m.csv", ";"), ("m.csv", "\t"), ("m.txt", ",")]
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_tables(self, table, tmp_path, name, separator, encoding, end):
        touch(tmp_path, "data/a b.nii.gz", "data/c,d;e.nii.gz", "Zoë.nii")
        rows = [["Patient", "lge", "cine", "T2", "MASK", "age"]]
        rows += [["Zoë 1", "../Zoë.nii", str(tmp_path / "data/a b.nii.gz"), "", '"c,d;e.nii.gz"', "44"], [""], []]
        rows += [["A", "a b.nii.gz"]]
        text = end.join(separator.join(row) for row in rows) + end
        found = table(text, name=f"data/{name}", encoding=encoding, mask_labels=(3,))
        assert (found.layout, ids(found)) == ("manifest", ["A", "Zoë 1"])
        a, zoe = found.studies
        assert (codes(a), a.mask_rule) == ([], "auto")
        (without,) = table(text, name=f"data/{name}", encoding=encoding, mask="file", patients=["A"]).studies
        assert codes(without) == ["E_MASK_NONE"]
        assert "column mask" in without.problems[0].remedy
        assert list(zoe.images) == ["LGE", "bSSFP"]
        assert zoe.images["LGE"].resolve() == tmp_path / "Zoë.nii"
        assert zoe.images["bSSFP"] == tmp_path / "data/a b.nii.gz"
        assert (zoe.mask, zoe.mask_labels) == (tmp_path / "data/c,d;e.nii.gz", (3.0,))
        assert (zoe.truth, zoe.truth_labels, zoe.problems) == (None, None, ())

    def test_reference_labels_and_mask_may_be_one_file(self, table, tmp_path):
        study = table("patient, T1, mask, truth\np, i.nii, j.nii, j.nii\n", protocol=BRAIN).studies[0]
        assert study.truth == study.mask == tmp_path / "j.nii"
        assert (study.mask_labels, study.truth_labels, study.problems) == ((), None, ())

    def test_a_file_that_does_not_exist(self, table):
        text = "patient,T1,mask\na,i.nii,gone/m.nii\nb,i.nii,\n/c,gone,i.nii\n"
        found = table(text, protocol=BRAIN, mask="file")
        problems = {s.patient: codes(s) for s in found.studies}
        assert problems == {"a": ["E_FILE"], "b": ["E_MASK_NONE"], "/c": ["E_ID", "E_FILE"]}
        assert "m.nii" in found.studies[1].problems[0].message
        assert all_codes(table(text, protocol=BRAIN, mask="nonzero", patients=["a", "b"])) == [[], []]

    @pytest.mark.parametrize(
        "patient",
        [
            *("", ".", "..", "...", "/etc", "a/b", "../a", "a/../b", "a..b", "a\\b", "\\\\host\\c"),
            *("Summary.tsv", ".locks"),
        ],
    )
    def test_ids_that_are_refused(self, table, patient):
        found = table(f"patient,LGE,mask\nok,i.nii,i.nii\n{patient},i.nii,i.nii\n")
        assert {s.patient: codes(s) for s in found.studies} == {"ok": [], patient: ["E_ID"]}

    @pytest.mark.parametrize("patient", ["a b", "é ", "a.b.", "-x", "<b>&", os.fsdecode(b"\xff"), "x" * 200])
    def test_ids_that_are_kept_byte_for_byte(self, table, patient):
        found = table(f"patient,LGE,mask\n{patient},i.nii,i.nii\n")
        assert (ids(found), all_codes(found)) == ([patient], [[]])

    def test_duplicates(self, table):
        rows = "".join(f"{p},i.nii,i.nii\n" for p in ("a", "b", "B", "a", "c", "x" * 201))
        found, two = table("patient,LGE,mask\n" + rows), ["E_DUPLICATE"]
        assert {s.patient: codes(s) for s in found.studies} == {
            "a": two,
            "b": two,
            "B": two,
            "c": [],
            "x" * 201: ["E_NAME"],
        }
        assert len(found.studies) == 5

    def test_two_columns_for_one_sequence(self, table):
        found = table("patient,LGE,DE,mask\na,i.nii,j.nii,i.nii\nb,,j.nii,i.nii\n")
        assert all_codes(found) == [["E_AMBIGUOUS"], []]

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
    def test_tables_that_are_refused(self, table, text, said):
        with pytest.raises(UsageError, match=said):
            table(text)

    def test_tables_that_cannot_be_read(self, tmp_path):
        (tmp_path / "odd.csv").write_bytes(b"\xff\xfea")
        for bad in (tmp_path / "none.csv", tmp_path, tmp_path / "odd.csv"):
            with pytest.raises(UsageError, match="cannot be read") as caught:
                find(tmp_path, INFARCT, manifest=bad)
            assert str(tmp_path) not in str(caught.value)

    def test_not_together_with_a_layout(self, table):
        with pytest.raises(UsageError, match="one of them"):
            table("", layout="folder")


class TestWhatIsNotUsed:
    def test_files_beside_a_patients_images_that_no_name_fits(self, tmp_path):
        found = cohort(tmp_path, "p1/{LGE,T2,mask,LVmask,mask_old,notes}.nii.gz", "p1/read.txt", "p2/LGE.nii.gz")
        assert [s.unused for s in found.studies] == [("LVmask.nii.gz", "mask_old.nii.gz", "notes.nii.gz"), ()]
        (problem,) = one(tmp_path / "alone", "p1/{LGE,LVmask}.nii.gz", mask="file").problems
        assert problem.message == "no mask of the left ventricle was found; not used: LVmask.nii.gz"

    def test_in_one_folder_for_all_only_what_begins_with_the_id(self, tmp_path):
        found = cohort(tmp_path, "{a_LGE,a_Maske,a1_LGE,a1-roi,other}.nii.gz")
        assert {s.patient: s.unused for s in found.studies} == {"a": ("a_Maske.nii.gz",), "a1": ("a1-roi.nii.gz",)}

    @pytest.mark.parametrize(
        ("files", "layout", "said"),
        [
            ("p1/{LGE,T2_SA}.nii.gz", "folder", {"T2": "if T2_SA.nii.gz is T2, name it T2.nii.gz, or "}),
            ("p1/{LGE,T2-STIR_sa,Cine2ch}.nii", None, {"T2": "if T2-STIR_sa.nii ", "bSSFP": "if Cine2ch.nii is bSSFP"}),
            ("{p1_LGE,p1_t2w,p10_t2w}.nii.gz", "myops", {"T2": "if p1_t2w.nii.gz is T2, name it p1_T2.nii.gz, or "}),
            (
                "p1/{LGE,T2_mask_old,stir2}.mha",
                "folder",
                {"T2": "if stir2.mha is", "mask": "if T2_mask_old.mha is the"},
            ),
            ("p1/{LGE,T2,T2_SA,model,a_de_b}.nii.gz", "folder", {}),
            ("p1/Images/a.nii.gz", "emidec", {}),
        ],
    )
    def test_those_that_may_be_a_missing_sequence(self, tmp_path, files, layout, said):
        found = one(tmp_path, files, layout=layout).overlooked
        assert found.keys() == said.keys()
        for what, text in said.items():
            assert found[what].startswith(text)
            assert found[what].endswith("name it in a table (--manifest)")

    def test_one_that_may_be_a_sequence_without_which_nothing_goes(self, tmp_path):
        (problem,) = one(tmp_path, "p1/{T1_brain,T2,mask}.nii.gz", protocol=BRAIN).problems
        assert "found: T2; if T1_brain.nii.gz is T1, name it T1.nii.gz, or " in problem.message

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            ("LGE/{1,2}.nii.gz", "layout of your own with images: ['{sequence}/{patient}']"),
            ("p1/{LGE,T2,mask}/image.nii.gz", "images: ['{patient}/{sequence}/*']"),
            ("batch1/{A,B}/LGE.nii.gz", "If A, B are patients, give this folder as DIR"),
            ("p1/{LGE_SA,T2_4ch,scan}.nii.gz", "The last word of a name decides what LGE_SA.nii.gz, T2_4ch.nii.gz is"),
            ("p1/{scan,other/scan}.nii.gz", "Put each sequence (LGE, T2, bSSFP) into this folder"),
        ],
    )
    def test_a_folder_without_sequences_says_how_to_go_on(self, tmp_path, files, said):
        assert said in cohort(tmp_path, files).studies[0].problems[0].remedy

    def test_names_that_begin_with_the_sequence(self, tmp_path):
        with pytest.raises(UsageError, match=r"images: \['{sequence}_{patient}'\]"):
            cohort(tmp_path, "{LGE,T2}_1.nii.gz")
