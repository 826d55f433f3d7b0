"""What holds an image and cannot be read is named, and the patient is not without it."""

import gzip
import json

import pytest
from folders import BRAIN, all_codes, codes, cohort, one, touch

from monai_deepgmm.cli import main


@pytest.mark.parametrize(
    ("name", "code", "said", "remedy"),
    [
        ("T2.NHDR", "E_FORMAT", "lie in another file", "3D Slicer"),
        ("T2.mhd", "E_FORMAT", "lie in another file", "SimpleITK"),
        ("T2.{hdr,img}", "E_FORMAT", "pair", "fslchfiletype"),
        ("T2.{hdr,img.gz}", "E_FORMAT", "pair", "nibabel"),
        ("T2.mgz", "E_FORMAT", "FreeSurfer", "mri_convert"),
        ("T2.mnc", "E_FORMAT", "MINC", "mnc2nii"),
        ("T2.mif.gz", "E_FORMAT", "MRtrix", "mrconvert"),
        ("T2.{PAR,REC}", "E_FORMAT", "PAR/REC", "dcm2niix"),
        ("T2.dcm", "E_DICOM", "DICOM", "dcm2niix"),
        ("T2.IMA", "E_DICOM", "DICOM", "dcm2niix"),
        ("T2.nii.bz2", "E_FORMAT", "packed otherwise", "gzip"),
        ("T2.nii.zip", "E_FORMAT", "packed otherwise", "gzip"),
        ("T2.nii.gz.part", "E_FORMAT", "half a download", "again"),
        ("T2.nii.gz.dvc", "E_POINTER", "DVC", "dvc pull"),
        ("STIR.npy", "E_FORMAT", "no medical image", "NIfTI"),
    ],
)
def test_a_sequence_in_another_format(tmp_path, name, code, said, remedy):
    touch(tmp_path, "p2/{LGE,T2,mask}.nii.gz", f"p1/{name}")
    first, second = cohort(tmp_path, "p1/{LGE,mask}.nii.gz").studies
    assert (codes(first), codes(second), list(first.images)) == ([code], [], ["LGE"])
    assert first.problems[0].message.startswith("T2: ")
    assert said in first.problems[0].message
    assert remedy in first.problems[0].remedy
    assert codes(cohort(tmp_path, "p1/T2.nii.gz").studies[0]) == []  # converted: the original does no harm


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["P1_{LGE,T2}.nhdr", "P1_mask.nhdr"], {}),
        (["sub-1/anat/sub-1_T1w.mgz", "sub-1/anat/sub-1_desc-brain_mask.nii.gz"], {"protocol": BRAIN}),
        (["P1/Images/a.mhd", "P1/Contours/a.nii.gz"], {"layout": "emidec"}),
        (["imagesTr/P1_0000.mgz", "masksTr/P1.nii.gz"], {}),
    ],
    ids=["myops", "bids", "emidec", "nnunet"],
)
def test_a_patient_without_any_image_that_is_read_is_a_failed_row_in_every_layout(tmp_path, names, options):
    touch(tmp_path, "dataset.json", content=b'{"channel_names": {"0": "LGE"}, "file_ending": ".mgz"}')
    assert set(codes(one(tmp_path, *names, **options))) == {"E_FORMAT"}


@pytest.mark.parametrize("name", ["mask.mgz", "lv.mhd"])
def test_masks_and_labels(tmp_path, name):
    study = one(tmp_path, "p1/LGE.nii.gz", f"p1/{name}", "p1/seg.nhdr")
    assert codes(study) == ["E_FORMAT"]
    assert [p.code for p in study.label_problems] == ["E_FORMAT"]
    assert codes(one(tmp_path, mask="nonzero")) == []


@pytest.mark.parametrize(
    "names",
    [
        ("p1/{LGE,T2,lv.seg,seg}.nrrd", "p1/T2.seg.nrrd"),  # 3D Slicer's segmentations: a mask, and no sequence
        ("p1/{DE,STIR,mask,truth}.MHA",),
        ("P1_{LGE,T2,gd}.nrrd",),
        ("sub-1/anat/sub-1_{LGE,T2w,desc-lv_mask,dseg}.nrrd",),
        ("imagesTr/P1_{0000,0001}.mha", "{masksTr,labelsTr}/P1.mha"),
    ],
    ids=["slicer", "folder", "myops", "bids", "nnunet"],
)
def test_nrrd_and_metaimage_are_found_in_every_layout(tmp_path, names):
    touch(tmp_path, "dataset.json", content=b'{"channel_names": {"0": "LGE", "1": "T2"}, "file_ending": ".mha"}')
    study = one(tmp_path, *names)
    assert (codes(study), [*study.images]) == ([], ["LGE", "T2"])
    assert study.truth is not None
    assert study.mask is not None


ANNEX = "annex/objects/SHA256E-s8211--0123abcd.nii.gz"
POINTERS = {
    "annex": f"/{ANNEX}\n",
    "link as text": f"../../.git/{ANNEX}",
    "Windows": f"..\\..\\.git\\{ANNEX}".replace("/", "\\"),
    "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
}


@pytest.mark.usefixtures("no_picture")
def test_pointers_and_twice_packed_files_through_the_command(cohort_dir, tmp_path):
    (cohort_dir / "pat1_T2.nii.gz").unlink()
    (cohort_dir / "pat1_T2.nii.gz").symlink_to(f"../.git/{ANNEX}")
    packed = (cohort_dir / "pat2_T2.nii.gz").read_bytes()
    (cohort_dir / "pat2_T2.nii.gz").write_bytes(gzip.compress(packed))
    (cohort_dir / "pat3_T2.nii.gz").rename(cohort_dir / "pat3_T2.mgz")
    assert main(["segment", str(cohort_dir), str(tmp_path / "out")]) == 3
    rows = [json.loads((tmp_path / f"out/pat{n}/pat{n}_row.json").read_text()) for n in (1, 2, 3)]
    assert [row["code"] for row in rows] == ["E_POINTER", "E_GZIP", "E_FORMAT"]
    assert "git annex get" in rows[0]["remedy"]
    assert "twice" in rows[1]["message"]
    assert "T2.mgz" in rows[2]["message"]


@pytest.mark.parametrize("case", POINTERS)
def test_pointers(tmp_path, case):
    touch(tmp_path, "p1/{LGE,mask,T2,seg}.nii.gz")
    for name, of_labels in (("T2", False), ("mask", False), ("seg", True)):
        touch(tmp_path, f"p1/{name}.nii.gz", content=POINTERS[case].encode())
        study = one(tmp_path)
        assert codes(study) == ([] if of_labels else ["E_POINTER"])
        assert [p.code for p in study.label_problems] == (["E_POINTER"] if of_labels else [])
        touch(tmp_path, f"p1/{name}.nii.gz", content=b"")


class TestManifest:
    def test_paths_of_windows(self, tmp_path, capsys):
        touch(tmp_path, "P 1/{LGE,T2,mask}.nii.gz")
        table = tmp_path / "m.csv"
        table.write_text("patient,LGE,T2,mask\r\na,P 1\\LGE.nii.gz,.\\P 1\\T2.nii.gz,P 1\\mask.nii.gz\r\n")
        study = one(tmp_path, manifest=table)
        assert (codes(study), study.images["T2"].resolve()) == ([], tmp_path / "P 1/T2.nii.gz")
        table.write_text(
            "patient,LGE,mask\na,P 1\\LGE.nii.gz,P 1\\mask.nii.gz\nb,C:\\x\\LGE.nii.gz,\\\\host\\m.nii.gz\n"
        )
        assert main(["scan", str(tmp_path), "--manifest", str(table)]) == 1
        assert "C:\\x\\LGE.nii.gz, a path of Windows that begins with a drive" in capsys.readouterr().out

    def test_a_name_that_holds_a_backslash(self, tmp_path):
        touch(tmp_path, "a\\b.nii.gz")
        (tmp_path / "m.csv").write_text("patient,LGE,mask\na,a\\b.nii.gz,a\\b.nii.gz\n")
        assert codes(one(tmp_path, manifest=tmp_path / "m.csv")) == []

    def test_formats_and_pointers(self, tmp_path):
        touch(tmp_path, "{a,m}.nii.gz", "t.mgz")
        touch(tmp_path, "b.nii.gz", content=POINTERS["lfs"].encode())
        (tmp_path / "m.csv").write_text(
            "patient,LGE,T2,mask\np,a.nii.gz,t.mgz,m.nii.gz\nq,a.nii.gz,b.nii.gz,m.nii.gz\n"
        )
        assert all_codes(find_manifest(tmp_path)) == [["E_FORMAT"], ["E_POINTER"]]

    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ("patient,LEG,mask", "'LEG' (did you mean LGE?)"),
            ("patient,LGE,maks", "'maks' (did you mean mask?)"),
            ("patient,LGE,T2_file,mask", "'T2_file' (did you mean T2?)"),
            ("patient,LGE,mask,thruth", "'thruth' (did you mean truth?)"),
            ("patients,LGE,mask,x", "'patients' (did you mean patient?)"),
            ("patient,LGE,FLIAR,mask", "'FLIAR' (did you mean FLAIR?)"),
            ("patient,LGE,bSFP,mask", "'bSFP' (did you mean bSSFP?)"),
        ],
    )
    def test_misspelt_columns_are_refused(self, tmp_path, capsys, header, said):
        touch(tmp_path, "i.nii")
        (tmp_path / "m.csv").write_text(f"{header}\n{','.join(['i.nii'] * (header.count(',') + 1))}\n")
        assert main(["scan", str(tmp_path), "--manifest", str(tmp_path / "m.csv")]) == 2
        assert said in capsys.readouterr().err

    def test_other_columns_are_not_and_images_in_them_are_noted(self, tmp_path):
        touch(tmp_path, "i.nii")
        (tmp_path / "m.csv").write_text("patient,LGE,mask,age,mass,site,PD\na,i.nii,i.nii,3,70,x,i.nii\n")
        found = find_manifest(tmp_path)
        assert all_codes(found) == [[]]
        assert found.notes == ("the columns PD hold images of no known sequence and are not read",)


def find_manifest(tmp_path):
    return cohort(tmp_path, manifest=tmp_path / "m.csv")


class TestTask:
    HEARTS = (
        "p1/{Images,Contours}/a.nii.gz",
        "p1/{LGE,bSSFP,mask}.nii.gz",
        "p1/{T1,LGE,mask}.nii.gz",
        "P1_{LGE,T2,gd}.nii.gz",
        "p1/{DE,T2,mask}.nii",
    )
    BRAINS = (
        *("p1/{T1,T2,mask}.nii.gz", "p1/{T1w,FLAIR,T2,mask}.nii", "sub-1/anat/sub-1_{T1w,T2w,desc-brain_mask}.nii.gz"),
        *("P1_{T1,T2,mask}.nii.gz", "sub-1/ses-a/anat/sub-1_ses-a_{T1w,FLAIR}.nii.gz", "p1/T1.nrrd"),
    )

    @pytest.mark.parametrize("names", BRAINS)
    def test_brains_are_not_run_as_hearts_without_being_asked(self, tmp_path, capsys, names):
        touch(tmp_path, names)
        for command in (["scan"], ["segment", str(tmp_path.parent / "out")]):
            assert main([command[0], str(tmp_path), *command[1:]]) == 2
            assert "--protocol brain" in capsys.readouterr().err
        assert not (tmp_path.parent / "out").exists()

    def test_but_when_they_are_asked_for(self, tmp_path):
        touch(tmp_path, "p1/{T1,T2,mask}.nii.gz")
        assert main(["scan", str(tmp_path), "--protocol", "infarct"]) == 0
        assert main(["scan", str(tmp_path), "--protocol", "brain"]) == 0

    @pytest.mark.parametrize("names", HEARTS)
    def test_hearts(self, tmp_path, capsys, names):
        touch(tmp_path, names)
        assert main(["scan", str(tmp_path)]) == 0
        capsys.readouterr()
        mixed = "T1" in names
        assert main(["scan", str(tmp_path), "--protocol", "brain"]) == (0 if mixed else 2)
        assert mixed or "--protocol infarct" in capsys.readouterr().err

    def test_nnunet_and_tables(self, tmp_path, capsys):
        touch(tmp_path, "imagesTr/a_{0000,0001}.nii.gz", "masksTr/a.nii.gz", "i.nii")
        for channels in ({"0": "T1", "1": "T2"}, {"0": "T1", "1": "FLAIR"}):
            (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": channels}))
            assert main(["scan", str(tmp_path)]) == 2
            assert "--protocol brain" in capsys.readouterr().err
        (tmp_path / "m.csv").write_text("patient,T1,T2,mask\na,i.nii,i.nii,i.nii\n")
        assert main(["scan", str(tmp_path), "--manifest", str(tmp_path / "m.csv")]) == 2
        assert "--protocol brain" in capsys.readouterr().err
