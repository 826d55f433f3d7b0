"""Which of several BIDS files is meant: a row for each kind of folder that people have."""

import pytest
from folders import BRAIN, INFARCT, all_codes, codes, cohort, files, ids, one, touch

from monai_deepgmm.errors import UsageError

#: Names (braces as in ``touch``; "@" is sub-1/anat/sub-1, "d:" derivatives/prep/sub-1/anat/sub-1), filters, the images
#: and the mask that are taken, or the code instead of either.
T1, MASK = "@_T1w.nii.gz", "d:_desc-brain_mask.nii.gz"
CASES = {
    "two runs": (["@_run-{1,2}_T1w.nii.gz", MASK], "", "E_AMBIGUOUS", None),
    "the second run": (["@_run-{1,2}_T1w.nii.gz", MASK], "run=2", "@_run-2_T1w.nii.gz", MASK),
    "runs are numbers": (["@_run-{01,02}_T1w.nii.gz", MASK], "run=2", "@_run-02_T1w.nii.gz", MASK),
    "a mask for each run": (
        ["@_run-{1,2}_T1w.nii.gz", "d:_run-{1,2}_desc-brain_mask.nii.gz"],
        "run=1",
        "@_run-1_T1w.nii.gz",
        "d:_run-1_desc-brain_mask.nii.gz",
    ),
    "the mask of another run": (
        ["@_run-2_T1w.nii.gz", "@_run-1_T2w.nii.gz", "d:_run-1_desc-brain_mask.nii.gz"],
        "",
        "@_run-2_T1w.nii.gz @_run-1_T2w.nii.gz",
        "E_MASK_NONE",
    ),
    "acquisitions": (["@_acq-{mprage,tse}_T1w.nii.gz", MASK], "acq=tse", "@_acq-tse_T1w.nii.gz", MASK),
    "of the other sequence": (
        ["@_acq-mprage_T1w.nii.gz", "@_acq-{tse,haste}_T2w.nii.gz", MASK],
        "acq=tse",
        "@_acq-mprage_T1w.nii.gz @_acq-tse_T2w.nii.gz",
        MASK,
    ),
    "none of these runs": (["@_run-1_T1w.nii.gz", "sub-2/anat/sub-2_run-2_T1w.nii.gz"], "run=2", "E_NO_SEQUENCE", None),
    "the one without": (["@_T1w.nii.gz", "@_acq-x_T1w.nii.gz", MASK], "acq=", T1, MASK),
    "long names": (["@_acq-{a,b}_T1w.nii.gz", MASK], "acquisition=B", "@_acq-b_T1w.nii.gz", MASK),
    "echoes": (["@_echo-{1,2}_T1w.nii.gz", MASK], "", "E_AMBIGUOUS", None),
    "two entities": (
        ["@_acq-a_run-{1,2}_T1w.nii.gz", "@_acq-b_run-{1,2}_T1w.nii.gz", MASK],
        "acq=a run=2",
        "@_acq-a_run-2_T1w.nii.gz",
        MASK,
    ),
    "contrast": (["@_ce-gd_T1w.nii.gz", T1, MASK], "ce=", T1, MASK),
    "reconstructions": (["@_rec-{norm,dis}_T1w.nii.gz", MASK], "rec=dis", "@_rec-dis_T1w.nii.gz", MASK),
    "magnitude": (["@_part-{mag,phase}_T1w.nii.gz", MASK], "", "@_part-mag_T1w.nii.gz", MASK),
    "phase beside a plain name": (["@_part-phase_T1w.nii.gz", T1, MASK], "", T1, MASK),
    "phase only": (["@_part-phase_T1w.nii.gz", MASK], "", "E_NO_SEQUENCE", None),
    "native before a template": (["@_space-MNI152_T1w.nii.gz", T1, MASK], "", T1, MASK),
    "both in a template": (
        ["@_space-MNI152_T1w.nii.gz", "d:_space-MNI152_desc-brain_mask.nii.gz", MASK],
        "",
        "@_space-MNI152_T1w.nii.gz",
        "d:_space-MNI152_desc-brain_mask.nii.gz",
    ),
    "a template's mask": ([T1, "d:_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz"], "", T1, "E_MASK_NONE"),
    "even if asked for": ([T1, "d:_space-fsavg_desc-brain_mask.nii.gz", MASK], "space=fsavg", T1, MASK),
    "the mask in the sequence's space": (
        [T1, "d:_space-{T1w,MNI152}_desc-brain_mask.nii.gz"],
        "",
        T1,
        "d:_space-T1w_desc-brain_mask.nii.gz",
    ),
    "a plain mask before one in a space": ([T1, MASK, "d:_space-T1w_desc-brain_mask.nii.gz"], "", T1, MASK),
    "another resolution": ([T1, MASK, "d:_res-2_desc-brain_mask.nii.gz"], "", T1, MASK),
    "of a functional run": (
        [T1, "derivatives/prep/sub-1/func/sub-1_task-rest_desc-brain_mask.nii.gz"],
        "",
        T1,
        "E_MASK_NONE",
    ),
    "of a functional run in T1w's space": ([T1, "d:_task-a_space-T1w_desc-brain_mask.nii.gz"], "", T1, "E_MASK_NONE"),
    "boldref": ([T1, "d:_space-boldref_desc-brain_mask.nii.gz", MASK], "", T1, MASK),
    "diffusion": ([T1, "derivatives/q/sub-1/dwi/sub-1_desc-brain_mask.nii.gz", MASK], "", T1, MASK),
    "two pipelines": ([T1, "derivatives/{a,b}/sub-1/sub-1_desc-brain_mask.nii.gz"], "", T1, "E_AMBIGUOUS"),
    "one of them": (
        [T1, "derivatives/{a,b}/sub-1/sub-1_desc-brain_mask.nii.gz"],
        "pipeline=b",
        T1,
        "derivatives/b/sub-1/sub-1_desc-brain_mask.nii.gz",
    ),
    "no pipeline": (
        [T1, "derivatives/sub-1/sub-1_desc-brain_mask.nii"],
        "",
        T1,
        "derivatives/sub-1/sub-1_desc-brain_mask.nii",
    ),
    "the organ's": ([T1, "@_desc-{lv,lesion,brain}_mask.nii", "@_label-WM_mask.nii"], "", T1, "@_desc-brain_mask.nii"),
    "by label": ([T1, "@_label-{brain,lesion}_mask.nii.gz"], "", T1, "@_label-brain_mask.nii.gz"),
    "another organ's": ([T1, "@_desc-{lv,lesion}_mask.nii.gz"], "", T1, "E_MASK_NONE"),
    "upper case": (
        ["SUB-1/anat/SUB-1_T1W.NII.GZ", "SUB-1/anat/SUB-1_DESC-BRAIN_MASK.nii"],
        "",
        "SUB-1/anat/SUB-1_T1W.NII.GZ",
        "SUB-1/anat/SUB-1_DESC-BRAIN_MASK.nii",
    ),
    "both packed and not": ([T1, "@_T1w.nii", MASK], "", "E_AMBIGUOUS", None),
    "raw data beside derivatives": (
        ["rawdata/sub-1/anat/sub-1_T1w.nii.gz", MASK],
        "",
        "rawdata/sub-1/anat/sub-1_T1w.nii.gz",
        MASK,
    ),
}


def written(name: str) -> str:
    return name.replace("@", "sub-1/anat/sub-1").replace("d:", "derivatives/prep/sub-1/anat/sub-1")


@pytest.mark.parametrize("case", CASES)
def test_what_is_meant(tmp_path, case):
    names, wanted, images, mask = CASES[case]
    found = cohort(tmp_path, *map(written, names), protocol=BRAIN, filters=wanted.split())
    study = found.studies[0]
    assert found.layout == "bids"
    if mask is None or mask.startswith("E_"):
        assert codes(study)[0] == (mask or images)
        assert study.mask is None or mask is None
    if not images.startswith("E_"):
        assert list(files(tmp_path, study).values()) == [written(name) for name in images.split()]
    if mask and not mask.startswith("E_"):
        assert study.mask == tmp_path / written(mask)
        assert codes(study) == []


def test_ambiguous_files_are_named_with_the_option_that_chooses(tmp_path):
    study = one(tmp_path, written("@_acq-{a,b}_T1w.nii.gz"), written(MASK), protocol=BRAIN)
    problem = study.problems[0]
    assert all(f"acq-{v}_T1w" in problem.message for v in "ab")
    assert "--filter acq=a or acq=b" in problem.remedy
    touch(tmp_path, "derivatives/other/sub-1/sub-1_desc-brain_mask.nii.gz")
    assert "pipeline=other or pipeline=prep" in one(tmp_path, protocol=BRAIN, filters=["acq=a"]).problems[0].remedy


def test_what_speaks_against_a_mask_is_told(tmp_path):
    names = ["d:_space-MNI152_desc-brain_mask.nii.gz", "derivatives/p/sub-1/func/sub-1_task-x_desc-brain_mask.nii.gz"]
    problem = one(tmp_path, *map(written, [T1, *names]), protocol=BRAIN).problems[0]
    assert "in space MNI152" in problem.message
    assert "another modality (func)" in problem.message
    assert "sub-1_desc-brain_mask.nii.gz" in problem.remedy
    assert "desc-lv" not in problem.remedy


class TestSessions:
    def test_a_subjects_mask_and_image_serve_its_sessions(self, tmp_path):
        touch(tmp_path, *(f"sub-1/ses-{s}/anat/sub-1_ses-{s}_T1w.nii.gz" for s in "AB"))
        touch(tmp_path, "sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/ses-B/anat/sub-1_ses-B_desc-brain_mask.nii.gz")
        found = cohort(tmp_path, "derivatives/x/sub-1/anat/sub-1_desc-brain_mask.nii.gz", protocol=BRAIN)
        assert (ids(found), all_codes(found)) == (["sub-1_ses-A", "sub-1_ses-B"], [[], []])
        assert all(study.images["FLAIR"].name == "sub-1_FLAIR.nii.gz" for study in found.studies)
        assert [s.mask.name for s in found.studies] == [
            "sub-1_desc-brain_mask.nii.gz",
            "sub-1_ses-B_desc-brain_mask.nii.gz",
        ]

    def test_one_sessions_mask_does_not_serve_another(self, tmp_path):
        touch(tmp_path, *(f"sub-1/ses-{s}/anat/sub-1_ses-{s}_T1w.nii.gz" for s in "AB"))
        found = cohort(tmp_path, "sub-1/ses-A/anat/sub-1_ses-A_desc-brain_mask.nii.gz", protocol=BRAIN)
        assert (all_codes(found), [s.mask_rule for s in found.studies]) == ([[], []], ["file", "auto"])
        assert all_codes(cohort(tmp_path, protocol=BRAIN, mask="file")) == [[], ["E_MASK_NONE"]]

    def test_a_subject_of_its_own_and_a_session_that_only_the_folder_names(self, tmp_path):
        found = cohort(tmp_path, "sub-1/{ses-A/anat,anat}/sub-1_T1w.nii.gz", protocol=BRAIN, mask="nonzero")
        assert (ids(found), all_codes(found)) == (["sub-1", "sub-1_ses-A"], [[], []])

    def test_filters_choose_sessions(self, tmp_path):
        touch(tmp_path, *(f"sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii.gz" for n in "12" for s in "AB"))
        found = cohort(tmp_path, protocol=BRAIN, filters=["ses=B"], mask="nonzero")
        assert (ids(found), all_codes(found)) == (["sub-1_ses-B", "sub-2_ses-B"], [[], []])


class TestReferenceLabels:
    NAMES = (T1, MASK, "d:_dseg.nii.gz", "d:_desc-aseg_dseg.nii.gz", "d:_space-MNI152_dseg.nii.gz")

    def test_several_do_not_stop_a_segmentation_and_a_filter_chooses(self, tmp_path):
        study = one(tmp_path, *map(written, self.NAMES), protocol=BRAIN)
        assert (study.problems, [p.code for p in study.label_problems]) == ((), ["E_AMBIGUOUS"])
        assert "desc=aseg" in study.label_problems[0].remedy
        for wanted, name in (("desc=aseg", "sub-1_desc-aseg_dseg.nii.gz"), ("desc=", "sub-1_dseg.nii.gz")):
            study = one(tmp_path, protocol=BRAIN, filters=[wanted])
            assert (study.truth.name, study.problems, study.label_problems) == (name, (), ())

    def test_those_of_other_spaces_and_modalities_are_not_the_patients(self, tmp_path):
        touch(tmp_path, *map(written, [T1, MASK, "d:_space-MNI152_dseg.nii.gz"]))
        study = one(tmp_path, "derivatives/p/sub-1/func/sub-1_task-rest_dseg.nii.gz", protocol=BRAIN)
        assert (study.truth, study.label_problems, study.problems) == (None, (), ())


class TestFilters:
    @pytest.mark.parametrize(
        ("wanted", "said"),
        [
            ("acq", "expected entities"),
            ("=1", "expected entities"),
            ("aqc=x", "no file has this entity; there are acq"),
            ("acq=z", "no file has this value; there are a, b"),
        ],
    )
    def test_what_no_file_has_is_refused(self, tmp_path, wanted, said):
        with pytest.raises(UsageError, match=said):
            cohort(tmp_path, written("@_acq-{a,b}_T1w.nii.gz"), protocol=BRAIN, filters=[wanted])

    def test_only_for_bids(self, tmp_path):
        (tmp_path / "m.csv").write_text("patient,LGE\np,p1/LGE.nii\n")
        for options in ({"layout": "folder"}, {"manifest": tmp_path / "m.csv"}):
            with pytest.raises(UsageError, match="BIDS"):
                cohort(tmp_path, "p1/LGE.nii", protocol=INFARCT, filters=["run=1"], **options)
