"""What a new user mistypes: each of these ends at once, touches nothing, and says what was got and what to do."""

from __future__ import annotations

import shlex
from pathlib import Path

import models
import pytest
import torch

from monai_deepgmm import cli
from monai_deepgmm.cli import main
from monai_deepgmm.training import bundle, handlers

#: What is typed → what is said, in parts divided by " … ".
MISTAKES = {
    # The command
    "segmnt in out": "COMMAND: … 'segmnt' … did you mean segment?",
    "Segment in out": "did you mean segment?",
    "": "required: COMMAND",
    "--method gmm segment in out": "options stand behind the command: deepgmm segment DIR OUT --method gmm",
    "segment": "required: DIR, OUT",
    "segment in": "required: OUT",
    "segment my patients out": "unrecognized arguments: out; a name with blanks needs quotes",
    "segment --patients pat1 in out": "--patients takes every word after it: put DIR OUT first",
    "evaluate results": "required: DIR",
    "train in": "required: MODEL_DIR",
    "means in": "required: -o/--output",
    # Options
    "segment in out --methd gmm": "--methd … did you mean --method?",
    "segment in out --overwite": "did you mean --overwrite?",
    "scan in --jsn": "--jsn (did you mean --json?)",
    "scan in --jobs 2": "--jobs 2; that is an option of deepgmm segment",
    "evaluate results in --method gmm": "--method gmm; that is an option of deepgmm segment, train",
    "segment in out --method": "--method: expected one argument",
    "segment in out --jobs 0": "--jobs: '0' is not a whole number of at least 1",
    "segment in out --jobs all": "--jobs: 'all' is not a whole number",
    "segment in out --seed one": "--seed: no whole number: 'one'",
    "segment in out --frame first": "--frame: no whole number: 'first'",
    "segment in out --mask-labels blood": "--mask-labels: no number: 'blood'",
    "segment in out --max-voxels 1e6": "--max-voxels: '1e6' is not a whole number",
    "segment in out --part 3": "--part: '3' is not I/N … such as 2/5",
    "segment in out --part 4/3": "--part: '4/3' is not I/N with 1 ≤ I ≤ N",
    "segment in out --device gpu": "--device gpu: … there is no such kind … name cpu, cuda, cuda:1 … or auto",
    "evaluate results in --slices some": "--slices: … 'some' … 'all', 'complete'",
    "phantom new -n 0": "-n: got 0, expected at least 1",
    "phantom new -n two": "no whole number: 'two'",
    "demo new -n 0": "'0' is not a whole number of at least 1",
    # Folders
    "segment inn out": "there is no folder inn (did you mean in?)",
    "scan gone": "there is no folder gone",
    "segment in/pat1_LGE.nii.gz out": "pat1_LGE.nii.gz is a file; expected the folder that holds the patients",
    "segment empty out": "no patient found in empty … LGE, T2, bSSFP … --manifest",
    "segment in/odd out": "no patient found in odd … It holds scan1.nii.gz … give the folder around it",
    "segment in in": "OUT: in is the input folder itself; name another one",
    "segment in in/out": "OUT: in/out lies inside the input folder; name a folder outside it",
    "segment in table.csv": "OUT: table.csv is a file; name a folder",
    "segment results out": "results holds results of deepgmm; expected the folder that holds the patients' images",
    "evaluate in results": "results holds results of deepgmm",
    "evaluate gone in": "OUT: there is no folder gone; give the folder that deepgmm segment wrote to",
    "report empty": "empty: no results here; give the folder that deepgmm segment wrote to",
    "report gone": "OUT: there is no folder gone; give the folder",
    "train in full": "MODEL_DIR: full is not empty; name a new folder",
    "train in in/model": "MODEL_DIR: in/model lies inside the input folder",
    "train in begun": "MODEL_DIR: begun holds a training; go on with --resume, or name another folder",
    "train in begun --resume --set lr=0.1": "the training in begun began with other patients, files or options",
    "phantom full": "DIR: full is not empty, and nothing is written over; name a new folder",
    "demo table.csv": "OUT: table.csv is a file; name a folder",
    "init-manifest gone": "there is no folder gone",
    "init-manifest in -o table.csv": "table.csv: is there already … name another file",
    # What is looked for, and where
    "segment in out --protocol infract": "no protocol 'infract' (did you mean infarct?); choose one of brain, infarct",
    "segment in out --protocol infarct.yml": "there is no file infarct.yml",
    "segment in out --protocol own.yaml": "own.yaml, line 3: sequenzes: no such key (did you mean sequences?)",
    "segment in out --protocol brain": "LGE (3) … not what protocol brain looks for … with --protocol infarct",
    "segment in out --layout nnunt": "no layout 'nnunt' (did you mean nnunet?); choose one of bids",
    "segment in out --layout nnunet": "no patient found … in layout nnunet … --layout",
    "segment in out --patients pat3": "--patients: there is no patient pat3 among 3; near: pat",
    "segment in out --patients PAT1": "no patient PAT1 … near: pat1",
    "segment in out --mask non-zero": "--mask: … 'non-zero' … did you mean nonzero?",
    "segment in out --mask in/pat1_gd.nii.gz": "--mask: … the column mask of a table (--manifest)",
    "segment in out --masks gone": "--masks: there is no folder gone; give the folder that deepgmm mask wrote to",
    "segment in out --mask auto --mask-labels 1": "--mask auto uses none: give one of them",
    "segment in out --truth-labels blod=500": "'blod' is no tissue of protocol infarct; do you mean blood?",
    "segment in out --truth-labels blood": "--truth-labels: got 'blood', expected … blood=1 myocardium=2",
    "segment in out --filter run": "--filter: got 'run', expected … such as acq=tse run=1",
    "segment in out --spacing 1.5": "--spacing 1.5: expected sform, pixdim, or three voxel sizes in mm",
    "mask in out --protocol brain": "that is not what protocol brain looks for … --protocol infarct",
    # Tables and files of options
    "segment in out --manifest gone.csv": "--manifest gone.csv: cannot be read (No such file",
    "segment in out --manifest wrong.csv": "wrong.csv, line 1: column 3 is called 'maks' (did you mean mask?); rename",
    "segment in out --manifest ids.csv": "ids.csv: one column must be called patient; the first line holds id, LGE",
    "segment in out --manifest in/pat1_LGE.nii.gz": "is no text; save the table as CSV or TSV",
    "segment in out --manifest table.csv --layout myops": "give one of them",
    "segment in out --config gone.yaml": "--config gone.yaml: there is no file",
    "segment in out --config options.yaml": "options.yaml, line 1: methd: no such key (did you mean method?)",
    "segment in out --save-config gone/own.yaml": "gone/own.yaml: … name a file in a folder that is there",
    "segment in out --redo table.csv": "table.csv lacks the columns patient and decision; give a review.tsv",
    "report results --review gone.tsv": "review: gone.tsv cannot be read (No such file … give a review.tsv from a page",
    # Methods and settings
    "segment in out --method anatmy": "--method: 'anatmy' is unknown (did you mean anatomy?); choose one of gmm",
    "segment in out --method GMM": "did you mean gmm?",
    "segment in out --method nnunet": "'nnunet' is unknown; choose one of gmm, svgmm",
    "segment in out --method pvgmm": "--method pvgmm: protocol infarct does not say which tissues touch",
    "segment in out --help-method gmn": "did you mean gmm?",
    "segment in out --set max_itr=5": "--set max_itr: … did you mean max_iter?); it has sigma_mm",
    "segment in out --set max_iter 5": "--set max_iter: expected key=value",
    "segment in out --set max_iter=many": "max_iter: got 'many', expected a whole number of at least 1",
    "segment in out --set max_iter=-1": "max_iter: got -1, expected a whole number",
    "segment in out --set covariance=diag": "--set covariance: no such setting of --method anatomy",
    "segment in out --method gmm --set covariance=diagonal": "did you mean diag?); choose one of diag, full, tied",
    "segment in out --method gmm --set degree=9": "degree: got 9, expected at most 6",
    "segment in out --method gmm --set n4=true degree=2": "n4 and degree: … choose one of them",
    "phantom new --set shadin=1": "--set shadin: … did you mean shading?",
    # Networks and means
    "segment in out --method network": "name one with --model MODEL_DIR",
    "segment in out --model gone": "--model gone: model.json: No such file … give the folder that deepgmm train wrote",
    "segment in out --model model --method gmm": "--model: --method gmm takes no trained network; leave one",
    "segment in out --network unet": "--network: --method anatomy fits no network; use deepg, deepsvg, cohort",
    "segment in out --method deepsvg --network unett": "'unett' is no network … did you mean UNet?",
    "segment in out --means gone.json": "--means gone.json: there is no file … give a file that 'deepgmm means' wrote",
    "segment in out --means table.csv": "--means table.csv, line 1: … 'deepgmm means'",
    "segment in out --means means.json --method svgmm": "zscore-volume-mask, but this run uses zscore-slice",
    "segment in out --method cohort --part 1/2": "--method cohort learns from every patient; run it without --part",
    "train in new --method svgmm": "--method: … 'svgmm' … 'deepg', 'deepsvg'",
    "train in new --loss nl": "'nl' … did you mean nll?",
    "train in new --loss gmm --method deepsvg": "--loss gmm is not a loss of --method deepsvg, which has nll_v",
    "train in new --epochs 0": "--epochs: '0' is not a whole number of at least 1",
    "train in new --labels pat9": "--labels pat9: there is no such patient; give all",
    "train in new --set lr=fast": "lr: got 'fast', expected a number",
    "train in new --set gamma=1": "gamma: goes with --loss gmm_tv or gmm_bias",
    "train in new --set window=100": "window: got 100, expected a multiple of 32",
}
#: Those that a run has begun with before it can tell: every patient fails with this code.
LATE = {
    "segment in out --masks empty": "E_MASK_NONE: --masks holds no pat1_desc-lv_mask.nii.gz. Write it with",
    "segment in out --mask-labels 7": "E_MASK_EMPTY: … pat1_gd.nii.gz has no voxel with any of the values 7 … --mask",
    "evaluate empty in": "E_FILE: there is no pat1_dseg.nii.gz: … run deepgmm segment",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    """Where the user stands: patients, results, a training that was begun, and files of all sorts."""
    here = tmp_path_factory.mktemp("mistakes")
    make_patient(here / "in", "pat1")
    for name in ("pat2", "pat4"):  # never read: what is wrong is found before
        for sequence in ("LGE", "T2", "C0", "gd"):
            (here / "in" / f"{name}_{sequence}.nii.gz").write_bytes(b"")
    for name in ("empty", "full", "in/odd"):
        (here / name).mkdir()
    (here / "in" / "odd" / "scan1.nii.gz").write_bytes(b"")
    (here / "full" / "mine.txt").write_text("mine")
    (here / "table.csv").write_text("patient,LGE,mask\npat1,in/pat1_LGE.nii.gz,in/pat1_gd.nii.gz\n")
    (here / "wrong.csv").write_text("patient,LGE,maks\npat1,in/pat1_LGE.nii.gz,in/pat1_gd.nii.gz\n")
    (here / "ids.csv").write_text("id,LGE,mask\npat1,in/pat1_LGE.nii.gz,in/pat1_gd.nii.gz\n")
    (here / "own.yaml").write_text("name: own\ntitle: mine\nsequenzes: [LGE]\n")
    (here / "options.yaml").write_text("methd: gmm\n")
    (here / "means.json").write_text(
        '{"protocol": "infarct", "normalisation": "zscore-volume-mask", "n_slices": 1, "means": {}}'
    )
    models.write(here / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")
        assert main(["segment", str(here / "in"), str(here / "results"), "--patients", "pat1", "-q"]) == cli.OK
    state = {key: kind() for key, kind in handlers.STATE.items()} | {"scaler": {}}
    checkpoint = here / "begun" / bundle.CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    torch.save(state | {"fingerprint": "another"}, checkpoint)
    return here


def said(typed: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        code = main(shlex.split(typed))
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, " ".join((told.err + told.out).split())


def listed(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_before_anything_is_touched_and_says_what_to_do(place, typed, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = listed(place)
    code, told = said(typed, capsys)
    assert code == cli.USAGE
    for words in MISTAKES[typed].split(" … "):
        assert words in told
    assert listed(place) == before


@pytest.mark.parametrize("typed", LATE)
def test_what_only_the_files_can_tell_is_said_of_each_patient(place, typed, capsys, monkeypatch):
    monkeypatch.chdir(place)
    code, told = said(f"{typed} --patients pat1", capsys)
    assert code == cli.ALL_FAILED
    for words in LATE[typed].split(" … "):
        assert words in told


def test_there_are_as_many_as_were_tried():
    assert len(MISTAKES) + len(LATE) >= 64
