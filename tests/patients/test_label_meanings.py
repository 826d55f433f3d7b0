"""What the values of reference labels mean, as the files beside them, a table or the user say."""

import json

import numpy as np
import pytest
from conftest import heart, save
from folders import BRAIN, INFARCT, one, touch

from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import dataset_json, label_meanings
from monai_deepgmm.patients.bids import inherited, tables

HEARTS = {
    1: "blood, LV blood pool, LV_cavity, lvbp, blood/LV blood pool, LV, Left ventricle, LVCavity, lv-blood",
    2: "MYO, myocardium, LV myocardium, Healthy Myocardium, healthyMyocardium, left ventricular myocardium, LV_wall",
    3: "edema, oedema, Myocardial Oedema, LV myocardial edema",
    4: "scar, infarct, Infarction, MI, myocardial infarction, no-reflow, NoReflow, MVO, microvascular obstruction",
    None: "background, RV, right ventricle, RV_blood, RV cavity, Right ventricular myocardium, unlabeled",
    "said": "lesion, thing, ignore, papillary",
}
BRAINS = {
    1: "GM, grey matter, Gray Matter, gray_matter, cortex, Left-Cerebral-Cortex, ctx-lh-cuneus, Right-Caudate, cGM",
    2: "WM, White matter, white-matter, WhiteMatter, Left-Cerebral-White-Matter, cerebral WM",
    3: "CSF, cerebrospinal fluid, ventricles, CSF and fluid, Liquid (CSF), Left-Lateral-Ventricle, 3rd-Ventricle",
    4: "lesion, WMH, MS lesions, white matter hyperintensities, WM-hypointensities",
    None: "Background, Skull, soft tissue, Unknown",
    "said": "blood, GM/WM border, Left-choroid-plexus, 7",
}


@pytest.mark.parametrize(("protocol", "names"), [(INFARCT, HEARTS), (BRAIN, BRAINS)], ids=["hearts", "brains"])
def test_names(protocol, names):
    anchor = {"blood": (90,), "MYO": (91,)} if protocol is INFARCT else {"GM": (90,)}
    for index, several in names.items():
        for name in several.split(", "):
            given = anchor if name not in ("LV", "Left ventricle", "left ventricle") else {"MYO": (91,)}
            found = label_meanings.understood({**given, name: (5,)}, protocol, "x")
            assert found.problem is None
            assert found.tissues.get(5) == (index if isinstance(index, int) else None), name
            assert (5 in found.elsewhere, 5 in found.others) == (index is None, index == "said"), name


def test_lv_is_no_cavity_beside_one():
    found = label_meanings.understood({"LV blood pool": (1,), "LV": (2,), "MYO": (3,)}, INFARCT, "x")
    assert (found.tissues, found.others) == ({1: 1, 3: 2}, {2: "LV"})


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"background": (0,), "tumour": (1,)}, "names background, tumour; none is a tissue"),
        ({"blood": (1,), "MYO": (1,)}, "the value 1"),
        ({"blood": (0,), "MYO": (1,)}, "0 is the background"),
    ],
)
def test_names_that_cannot_be_right(named, said):
    problem = label_meanings.understood(named, INFARCT, "dataset.json").problem
    assert problem.code == "E_TRUTH"
    assert said in problem.message
    assert "--truth-labels blood=1" in problem.remedy


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "MYO": 1, "LV": 2, "scar": 3, "edema": 4},
        {"0": "background", "1": "MYO", "2": "LV", "3": "scar", "4": "edema"},
        {"background": "0", "MYO": "1", "LV": "2", "scar": "3", "edema": "4"},
        {"background": 0, "heart": [1, 2, 3, 4], "wall": [1, 3, 4], "LV": [2], "infarct": 3, "edema": [4]},
        {"myocardium": 1, "blood": 2, "scar": 3, "edema": 4, "ignore": 5},
    ],
    ids=["version 2", "version 1", "text", "regions", "ignore"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_dataset_json(tmp_path, labels, mark):
    touch(tmp_path, "imagesTr/a_0000.nii", "labelsTr/a.nii", "masksTr/a.nii")
    content = json.dumps({"channel_names": {"0": "LGE"}, "labels": labels}, indent=1).replace("\n", "\r\n")
    touch(tmp_path, "dataset.json", content=mark + content.encode())
    study = one(tmp_path)
    assert (study.truth_labels, study.label_problems) == ({1: 2, 2: 1, 3: 4, 4: 3}, ())
    assert study.truth_names.others == ({5: "ignore"} if "ignore" in labels else {})
    assert dataset_json.read(tmp_path / "dataset.json").channels == {"0": "LGE"}


def test_labels_that_mean_nothing_here_stop_no_segmentation(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii", "labelsTr/a.nii", "masksTr/a.nii")
    touch(tmp_path, "dataset.json", content=b'{"channel_names": {"0": "LGE"}, "labels": {"background": 0, "RV": 1}}')
    study = one(tmp_path)
    assert (study.problems, [p.code for p in study.label_problems]) == ((), ["E_TRUTH"])
    assert one(tmp_path, truth_labels=["blood=1"]).label_problems == ()


@pytest.mark.parametrize(
    "text",
    [
        "index\tname\tabbreviation\n1\tCerebrospinal fluid\tCSF\n2\tGray matter\tGM\n3\tWhite matter\tWM\n",
        "index\tlabel\n1\tCSF\n2\tGM\n3\tWM\n",
        "label\tname\tcolor\n1\tCSF\t#000\n2\tgrey matter\t#fff\n3\twhite matter\t#aaa\n",
        "Index\tName\n1.0\tcsf\n2.0\tgm\n3.0\twm\n0\tBackground\n",
        "index\tname\tabbreviation\n1\tLiquor cerebrospinalis\tCSF\n2\tSubstance grise\tGM\n3\tn/a\tWM\n",
        "index,name\n1,CSF\n2,GM\n3,WM\n",
        "name\tindex\nventricles\t1\nCSF\t1\ncortex\t2\nwhite\t3\n",
    ],
    ids=["BIDS", "label", "label is index", "case", "abbreviation", "commas", "two names"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables(tmp_path, text, encoding):
    (tmp_path / "dseg.tsv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    named = label_meanings.table(tmp_path / "dseg.tsv")
    assert label_meanings.understood(named, BRAIN, "x").tissues == {1: 3, 2: 1, 3: 2}


def test_a_table_without_values_or_names_says_nothing(tmp_path):
    for text in ("", "index\n1\n", "name\nGM\n", "index\tname\nx\tGM\n", "index\tname\n"):
        (tmp_path / "dseg.tsv").write_text(text)
        assert label_meanings.table(tmp_path / "dseg.tsv") is None


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ("{a/s/x_dseg,a/dseg,dseg}.tsv", "a/dseg.tsv"),
        ("a/s/sub-1{_dseg,_desc-b_dseg}.tsv", "a/s/sub-1_desc-b_dseg.tsv"),
        ("{a/desc-b_dseg,a/desc-c_dseg,dseg}.tsv", "a/desc-b_dseg.tsv"),
        ("{dseg,b/dseg}.tsv", "dseg.tsv"),
        ("a/s/{sub-2_dseg,sub-1_desc-c_dseg}.tsv", None),
    ],
)
def test_the_nearest_and_most_specific_table_applies(there, found):
    before, _, rest = there.partition("{")
    words, _, after = rest.partition("}")
    files = [f"{before}{word}{after}" for word in words.split(",")]
    assert inherited("a/s/sub-1_desc-b_dseg.nii.gz", tables(files)) == found


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("blood=500 myocardium=200", {500: 1, 200: 2}),
        ("LV blood=1, MYO=2; scar=3,4", {1: 1, 2: 2, 3: 4, 4: 4}),
        ("scar=3+4 blood:1", {3: 4, 4: 4, 1: 1}),
        ("blood = 1|RV = 2", {1: 1}),
    ],
)
def test_pairs(text, meant):
    assert label_meanings.pairs(text, INFARCT, "x", strict=True).tissues == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blood", "expected names with their values"),
        ("500=blood", "expected names"),
        ("blod=1", "do you mean blood"),
        ("RV=2", "none is a tissue"),
        ("blood=1 MYO=1", "the value 1"),
    ],
)
def test_pairs_that_are_refused(text, said):
    with pytest.raises(UsageError, match=said):
        label_meanings.pairs(text, INFARCT, "--truth-labels", strict=True)


def test_a_manifests_column_and_the_table_beside_its_file(tmp_path):
    touch(tmp_path, "{i,t,d/s_dseg}.nii")
    touch(tmp_path, "d/dseg.tsv", content=b"index\tname\n7\tMYO\n")
    (tmp_path / "m.csv").write_text(
        "patient,LGE,mask,truth,labels\na,i.nii,i.nii,t.nii,LV=5 MYO=6\nb,i.nii,i.nii,d/s_dseg.nii,\n"
    )
    a, b = (one(tmp_path, manifest=tmp_path / "m.csv", patients=[p]) for p in "ab")
    assert (a.truth_labels, b.truth_labels) == ({5: 1, 6: 2}, {7: 2})
    for cell, said in (("LV", "expected names"), ("t.nii", "column truth"), ("LVV=1", "no tissue")):
        (tmp_path / "m.csv").write_text(f"patient,LGE,mask,labels\na,i.nii,i.nii,{cell}\n")
        with pytest.raises(UsageError, match=rf"line 2, labels.*{said}"):
            one(tmp_path, manifest=tmp_path / "m.csv")


class TestThroughTheCommand:
    @pytest.fixture
    def folders(self, tmp_path):
        """A data set with the labels 1 myocardium, 2 blood, 3 scar, 4 edema, 9 something; and a perfect result."""
        gd = heart()
        orders = ((500, 200, 1220, 2221), (200, 500, 2221, 1220))
        ours, theirs = (np.select([gd == v for v in order], [1, 2, 3, 4], 0).astype(np.uint8) for order in orders)
        theirs[0, 0, 0] = 9
        for part in ("imagesTr", "labelsTr", "masksTr", "out/a"):
            (tmp_path / part).mkdir(parents=True)
        for number in range(3):
            save(tmp_path / f"imagesTr/a_000{number}.nii.gz", (gd + number).astype(np.int16))
        save(tmp_path / "labelsTr/a.nii.gz", theirs)
        save(tmp_path / "masksTr/a.nii.gz", (ours > 0).astype(np.uint8))
        names = {"background": 0, "MYO": 1, "blood": 2, "infarct": 3, "oedema": 4}
        channels = {"0": "LGE", "1": "T2", "2": "bSSFP"}
        (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": channels, "labels": names}))
        out = tmp_path / "out"
        save(out / "a/a_dseg.nii.gz", ours)
        tissues = [{"name": t.name, "index": t.index} for t in INFARCT.tissues]
        sidecar = {"sequences": list(INFARCT.sequences), "tissues": tissues, "slice_axis": 2}
        (out / "a/a_dseg.json").write_text(json.dumps(sidecar))
        return out, tmp_path

    def test_evaluate_reads_names_and_tells_values_without_one(self, folders, capsys):
        out, root = folders
        assert main(["evaluate", str(out), str(root)]) == 0
        found = json.loads((out / "evaluation.json").read_text())
        assert (found["dice"]["mean"], found["warnings"]) == (1, [])
        assert "W_TRUTH" in found["patients"]["a"]["warnings"][0]
        assert "9 (not named)" in capsys.readouterr().out

    def test_evaluate_tells_when_another_order_fits_far_better(self, folders, capsys):
        out, root = folders
        typed = ["blood=1", "myocardium=2", "edema=3", "scar=4"]
        assert main(["evaluate", str(out), str(root), "--truth-labels", *typed]) == 0
        (warning,) = json.loads((out / "evaluation.json").read_text())["warnings"]
        assert warning.startswith("W_ORDER: ")
        assert warning in capsys.readouterr().out
        assert "blood as myocardium" in warning

    def test_means_and_training_learn_the_same_tissues(self, folders, tmp_path):
        _, root = folders
        for name, more in (("a", []), ("b", ["--truth-labels", "blood=1", "MYO=2", "edema=3", "scar=4"])):
            assert main(["means", str(root), "-o", str(tmp_path / name), *more]) == 0
        named, wrong = (json.loads((tmp_path / name).read_text())["means"] for name in "ab")
        assert named["blood"] == wrong["myocardium"] != named["myocardium"]

    def test_ambiguous_labels_stop_only_what_needs_them(self, folders, capsys):
        out, root = folders
        (root / "labelsTs").mkdir()
        (root / "labelsTs/a.nii.gz").write_bytes((root / "labelsTr/a.nii.gz").read_bytes())
        assert main(["segment", str(root), str(root.parent / "dry"), "--dry-run"]) == 0
        assert main(["scan", str(root)]) == 0
        assert "labels: E_AMBIGUOUS" in capsys.readouterr().out
        assert main(["evaluate", str(out), str(root)]) == 3
        assert "E_AMBIGUOUS" in capsys.readouterr().out
        assert main(["means", str(root), "-o", str(root / "m")]) == 2
        assert main(["train", str(root), str(root.parent / "model"), "--labels", "all", "--epochs", "1"]) == 2
        assert "--labels" in capsys.readouterr().err
