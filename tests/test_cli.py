"""The commands as people type them: what they print, what they return, and what they refuse."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
from folders import touch
from outcomes import row, sidecar

import monai_deepgmm
from monai_deepgmm import cli, errors
from monai_deepgmm.cli import main
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS, model_spec
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.registry import method_class
from monai_deepgmm.methods.training_config import TrainingConfig
from monai_deepgmm.training import self_training


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that cannot start says on its one line."""
    try:
        code = run(*arguments)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == cli.USAGE
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "cohort"
    for number in (1, 2):
        make_patient(folder, f"pat{number}", seed=number)
    return folder


@pytest.fixture(scope="module")
def results(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    assert run("segment", cohort, out) == 0
    return out


def test_the_command_works_outside_a_checkout(cohort, tmp_path):
    command = shutil.which("deepgmm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert command is not None
    typed = [command, "segment", os.path.relpath(cohort, tmp_path), "out", "--patients", "pat1"]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout == ""
    assert "pat1: ok" in done.stderr
    assert (tmp_path / "out" / "pat1" / "pat1_dseg.nii.gz").is_file()
    module = [sys.executable, "-m", "monai_deepgmm", "scan", "absent"]
    done = subprocess.run(module, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "deepgmm: there is no folder absent\n")


#: What is run in a fresh interpreter: torch and MONAI take seconds to load.
LIGHT = {
    "import": "import monai_deepgmm",
    **{
        words: f"from monai_deepgmm.cli import main\ntry: main({words.split()})\nexcept SystemExit: pass"
        for words in ("--help", "--version", "phantom --help", "segment --help")
    },
}


@pytest.mark.parametrize("case", LIGHT)
def test_what_needs_no_torch_loads_none(case):
    code = f"{LIGHT[case]}\nimport sys; print('loaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.rsplit("loaded ", 1)[1].split()
    assert "monai_deepgmm" in loaded
    assert {"torch", "monai", "ignite", "scipy", "sklearn", "SimpleITK"}.isdisjoint(loaded)


def test_every_exported_name_is_there_and_no_other():
    for name in monai_deepgmm.__all__:
        assert getattr(monai_deepgmm, name) is not None
    assert set(monai_deepgmm.__all__) <= set(dir(monai_deepgmm))
    with pytest.raises(AttributeError, match="no attribute 'segmnt'"):
        _ = monai_deepgmm.segmnt


@pytest.mark.parametrize("command", ["scan", "segment", "means", "train", "evaluate", "report", "phantom", "demo"])
def test_every_option_has_a_line_of_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    assert "show this help" in capsys.readouterr().out
    (commands,) = (a for a in cli.parser()._actions if hasattr(a, "choices") and a.choices)
    assert all(action.help for action in commands.choices[command]._actions)


def test_exit_codes_tell_none_some_and_all_apart(cohort, tmp_path):
    folder = Path(shutil.copytree(cohort, tmp_path / "cohort"))
    assert run("segment", folder, tmp_path / "out") == cli.OK
    (folder / "pat1_LGE.nii.gz").write_bytes(b"")
    assert run("segment", folder, tmp_path / "out") == cli.SOME_FAILED
    (folder / "pat2_gd.nii.gz").unlink()
    drawn = ("--mask", "file")
    assert run("segment", folder, tmp_path / "out", *drawn) == cli.ALL_FAILED
    assert run("segment", folder, tmp_path / "out", *drawn, "--dry-run") == cli.ALL_FAILED
    assert run("scan", folder, *drawn) == cli.SOME_FAILED


REFUSED = {
    "no such folder": (["{tmp}/gone", "{tmp}/out"], "there is no folder gone"),
    "a file": (["{in}/pat1_LGE.nii.gz", "{tmp}/out"], "is a file"),
    "nobody": (["{tmp}/empty", "{tmp}/out"], "no patient found"),
    "unknown patient": (["{in}", "{tmp}/out", "--patients", "pat7"], "near: pat"),
    "protocol": (["{in}", "{tmp}/out", "--protocol", "liver"], "brain, infarct"),
    "layout": (["{in}", "{tmp}/out", "--layout", "dicomdir"], "bids, nnunet"),
    "layout and manifest": (["{in}", "{tmp}/out", "--layout", "myops", "--manifest", "x.csv"], "give one of them"),
    "manifest": (["{in}", "{tmp}/out", "--manifest", "{tmp}/gone.csv"], "gone.csv"),
    "method": (["{in}", "{tmp}/out", "--method", "anatmy"], "did you mean anatomy?); choose one of gmm, svgmm"),
    "device": (["{in}", "{tmp}/out", "--device", "warp"], "--device warp"),
    "setting": (["{in}", "{tmp}/out", "--set", "max_itr=1"], "did you mean max_iter?); it has sigma_mm, "),
    "setting without =": (["{in}", "{tmp}/out", "--set", "tol"], "key=value"),
    "value": (["{in}", "{tmp}/out", "--method", "gmm", "--set", "covariance=round"], "diag, full, tied, spherical"),
    "number": (["{in}", "{tmp}/out", "--set", "max_iter=0"], "at least 1"),
    "not a number": (["{in}", "{tmp}/out", "--set", "tol=nan"], "tol"),
    "not YAML": (["{in}", "{tmp}/out", "--set", "tol=[1"], "tol"),
    "start": (["{in}", "{tmp}/out", "--method", "gmm", "--set", "start=guess"], "signature, kmeans"),
    "seed": (["{in}", "{tmp}/out", "--seed", "99999999999999999999"], "--seed"),
    "means": (["{in}", "{tmp}/out", "--means", "{tmp}/gone.json"], "gone.json"),
    "part 0": (["{in}", "{tmp}/out", "--part", "0/3"], "I/N"),
    "part 4": (["{in}", "{tmp}/out", "--part", "4/3"], "I/N"),
    "jobs": (["{in}", "{tmp}/out", "--jobs", "0"], "at least 1"),
    "max voxels": (["{in}", "{tmp}/out", "--max-voxels", "many"], "at least 1"),
    "option": (["{in}", "{tmp}/out", "--fast"], "--fast"),
    "no OUT": (["{in}"], "OUT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_touches_nothing_and_names_the_choices(cohort, tmp_path, capsys, case):
    arguments, words = REFUSED[case]
    (tmp_path / "empty").mkdir()
    filled = [a.replace("{in}", str(cohort)).replace("{tmp}", str(tmp_path)) for a in arguments]
    assert words in refused(capsys, "segment", *filled)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("gmm", "temper=.9"),
        ("gmm", "n44=true"),
        ("svgmm", "lr=5"),
        ("deepsvg", "degree=0"),
        ("anatomy", "lr=5"),
        ("anatomy", "covariance=diag"),
        ("anatomy", "degree=2"),
        ("pvgmm", "temper=.9"),
        ("pvgmm", "covariance=full"),
        ("cohort", "restarts=2"),
    ],
)
def test_a_setting_that_a_method_lacks_is_refused_with_those_that_it_has(cohort, tmp_path, capsys, method, setting):
    options = ["--method", method, "--set", setting, "--protocol", "brain" if method == "pvgmm" else "infarct"]
    said = refused(capsys, "segment", cohort, tmp_path / "out", *options)
    kind = TrainingConfig if method == "cohort" else method_class(method)
    own = [f.name for f in dataclasses.fields(kind) if f.metadata.get("set", True)]
    own = [*(name for name in own if name != "preprocessing"), "n4", "smooth_noise"]
    assert f"--set {setting.partition('=')[0]}: no such setting of " in said
    assert set(own) <= set(re.findall(r"\w+", said.partition("it has ")[2]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_explained_with_its_default_and_unit(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("segment", "--help-method", method)
    assert stopped.value.code == 0
    told = dict(re.findall(r"^  (\S+) = (.+\n .+)$", capsys.readouterr().out, re.MULTILINE))
    own, nested = method_class(method), {}
    if method == "cohort":
        own, nested = TrainingConfig, {"teacher": AnatomicalConfig, "preprocessing": Preprocessing}
    fields = [f.name for f in dataclasses.fields(own) if f.metadata.get("set", True) and f.name != "preprocessing"]
    fields += [f"{outer}.{f.name}" for outer, kind in nested.items() for f in dataclasses.fields(kind)]
    fields = [name for name in fields if name.rpartition(".")[2] not in ("frame", "max_voxels", "align")]
    assert sorted(told) == sorted([*fields, *(["n4", "smooth_noise"] if method != "cohort" else [])])
    for name, lines in told.items():
        default, words = lines.split("\n")
        assert len(words.split()) > 1, name
        assert not re.search(r"[(\[{<]|None|True|False", default), name
    if method == "anatomy":
        assert told["sigma_mm"].startswith("2.2\n      the neighbourhood")
        assert told["sigma_mm"].endswith("in mm.")
    elif method == "gmm":
        assert told["restarts"].startswith("1\n")
        assert told["degree"].startswith("0\n")


@pytest.mark.parametrize("name", ["gmn", "covariance"])
def test_help_on_an_unknown_method_lists_all(capsys, name):
    said = refused(capsys, "segment", "--help-method", name)
    assert ("did you mean gmm?" in said) == (name == "gmn")
    assert ", ".join(METHODS) in said


def test_shading_is_taken_off_for_a_model_or_means_only_as_it_was_for_them(cohort, tmp_path, capsys):
    model, shaded = models.write(tmp_path / "m"), models.specified(training={"n4": True})
    asked = ["segment", cohort, tmp_path / "out"]
    said = refused(capsys, *asked, "--model", model, "--set", "n4=true")
    assert "n4: the network was trained with n4=false; leave n4 out, or train another" in said
    assert "n4=true" in refused(capsys, *asked, "--model", models.write(tmp_path / "n4", shaded), "--set", "n4=false")
    rows = {t.name: dict.fromkeys(models.INFARCT.sequences, 0.5) for t in models.INFARCT.tissues}
    content = {"protocol": "infarct", "normalisation": models.INFARCT.normalisation, "means": rows, "n_slices": 1}
    (tmp_path / "means.json").write_text(json.dumps(content))
    said = refused(capsys, *asked, "--means", tmp_path / "means.json", "--set", "n4=true")
    assert f"normalisation {models.INFARCT.normalisation}, but this run uses {models.INFARCT.normalisation}-n4" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("distributed") is not None, reason="Dask is installed")
def test_dask_says_how_to_install_it(cohort, tmp_path, capsys):
    said = refused(capsys, "segment", cohort, tmp_path / "out", "--dask", "tcp://localhost:1")
    assert "pip install distributed" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["report"], ["evaluate", "{in}"], ["demo"], ["phantom"]])
def test_a_file_where_a_folder_is_expected_is_one_line(cohort, tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    name, *more = command
    said = refused(capsys, name, tmp_path / "file", *(a.replace("{in}", str(cohort)) for a in more))
    assert "file" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_scan_shows_files_mask_and_layout(cohort, capsys):
    assert run("scan", cohort) == 0
    shown = capsys.readouterr().out
    assert "pat1_LGE.nii.gz" in shown
    assert "pat1_gd.nii.gz (500 200 1220 2221)" in shown
    assert "layout myops: 2 patients, 0 with problems" in shown
    assert run("scan", cohort, "--json", "--patients", "pat2") == 0
    (patient,) = json.loads(capsys.readouterr().out)["patients"]
    assert patient["patient"] == "pat2"
    assert Path(patient["images"]["bSSFP"]) == cohort / "pat2_C0.nii.gz"
    assert patient["problems"] == []


def test_a_dry_run_tells_what_is_done_and_writes_nothing(cohort, results, tmp_path, capsys):
    assert run("segment", cohort, tmp_path / "out", "--dry-run") == 0
    assert capsys.readouterr().out == "pat1\tready\t\npat2\tready\t\n"
    assert not (tmp_path / "out").exists()
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*")}
    assert run("segment", cohort, results, "--dry-run", "--patients", "pat1") == 0
    assert capsys.readouterr().out == "pat1\tdone\t\n"
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*")} == before


def test_means_of_labelled_patients_start_a_segmentation(cohort, tmp_path, capsys):
    file, out = tmp_path / "means.json", tmp_path / "out"
    assert run("means", cohort, "-o", file) == 0
    means = json.loads(file.read_text())
    assert list(means) == ["protocol", "normalisation", "means", "n_slices"]
    assert (means["protocol"], means["normalisation"], means["n_slices"]) == ("infarct", "zscore-slice-crop-120mm", 4)
    assert list(means["means"]) == ["blood", "myocardium", "edema", "scar"]
    assert {tuple(row) for row in means["means"].values()} == {("LGE", "T2", "bSSFP")}
    assert means["means"]["scar"]["LGE"] > means["means"]["blood"]["LGE"] > means["means"]["myocardium"]["LGE"]
    assert "from 4 images of 2 patients" in capsys.readouterr().out
    assert run("segment", cohort, out, "--means", file) == 0
    assert sidecar(out)["configuration"]["means"]["means"] == means["means"]
    for key, other in (("normalisation", "zscore-volume-mask"), ("protocol", "brain")):
        file.write_text(json.dumps({**means, key: other}))
        assert other in refused(capsys, "segment", cohort, tmp_path / "other", "--means", file)
    file.write_text("[]")
    assert "deepgmm means" in refused(capsys, "segment", cohort, tmp_path / "other", "--means", file)
    assert not (tmp_path / "other").exists()
    for values in means["means"].values():
        del values["T2"]
    file.write_text(json.dumps(means))
    assert run("segment", cohort, out, "--means", file, "--patients", "pat1") == cli.ALL_FAILED
    assert row(out)["code"] == "E_MEANS"  # which this patient's sequences would need


@pytest.mark.usefixtures("no_picture")
def test_what_a_cohorts_sidecar_tells_is_what_its_training_was_given(cohort, tmp_path, monkeypatch):
    """The training itself is left out: its settings are recorded, and its network is as drawn."""
    asked = []

    def train(found, out, config):
        training = config.method.training
        asked.append(training)
        folder = models.write(out / "model", dataclasses.replace(models.specified(), training=training))
        model = model_spec.read(folder, config.protocol)
        return dataclasses.replace(config, method=dataclasses.replace(config.method, model=model))

    monkeypatch.setattr(self_training, "train_on_pseudo_labels", train)
    command = ["segment", cohort, tmp_path / "out", "--method", "cohort", "--patients", "pat1"]
    for more, tol, lr in (((), 5e-3, 1e-3), (("--set", "teacher.tol=0.02", "lr=0.004"), 0.02, 4e-3)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert run(*command, *more) == 0
        settings = sidecar(tmp_path / "out")["configuration"]["settings"]
        assert settings.keys() == {"network", "training"}
        assert settings["training"] == json.loads(json.dumps(asked[-1].as_json()))
        assert settings["training"]["teacher"]["tol"] == tol
        assert settings["training"]["lr"] == lr


def test_a_run_is_evaluated(cohort, results, capsys):
    assert run("evaluate", results, cohort) == 0
    assert "mean" in capsys.readouterr().out
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert set(evaluation["dice"]) >= {"blood", "myocardium", "edema", "scar", "mean"}
    assert evaluation["dice"]["scar"]["n"] == 4
    assert evaluation["dice"]["scar"]["mean"] > 0.99
    assert evaluation["slices"] == "all"
    assert (results / "evaluation.tsv").is_file()


def test_the_report_is_the_same_each_time_and_needs_no_hidden_folder(cohort, results, tmp_path):
    out = Path(shutil.copytree(results, tmp_path / "copy", ignore=shutil.ignore_patterns(".*")))
    for page in out.rglob("*.html"):
        page.unlink()
    contents = []
    for _ in range(2):
        assert run("report", out) == 0
        pages = (*out.rglob("*.html"), *out.glob("*.tsv"))
        contents.append({str(p.relative_to(out)): p.read_bytes() for p in pages})
    assert contents[0] == contents[1]
    assert {"index.html", "pat1/pat1_report.html", "pat2/pat2_report.html"} < set(contents[0])
    assert contents[0]["pat1/pat1_report.html"] == (results / "pat1" / "pat1_report.html").read_bytes()


def test_phantoms_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("phantom", tmp_path / name, "-n", 1, "--seed", seed) == 0
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.nii.gz")} for n in "abc")
    assert len(a) == 4
    assert a == b
    assert a != c


def test_the_demo_ends_with_a_report(tmp_path, capsys):
    assert run("demo", tmp_path, "-n", 1, "--jobs", 1) == 0
    shown = capsys.readouterr().out
    assert "$ deepgmm segment" in shown
    assert "index.html" in shown
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"summary.tsv", "measurements.tsv", "evaluation.json", "index.html"} <= names
    assert (tmp_path / "results" / "summary.tsv").read_text().count("\tok\t") == 1


@pytest.mark.parametrize("name", ["loop", "nowhere"])
@pytest.mark.parametrize(
    "typed",
    ["segment {} {link}", "segment {} {link}/out", "mask {} {link}", "phantom {link}", "init-manifest {} -o {link}"],
)
def test_a_link_that_leads_nowhere_is_no_place_for_results(cohort, tmp_path, capsys, typed, name):
    link = tmp_path / name
    link.symlink_to("loop" if name == "loop" else "gone")
    assert main(typed.format(cohort, link=link).split()) == cli.USAGE
    assert "unexpected" not in capsys.readouterr().err


def test_scan_tells_which_unused_file_may_be_what_is_missing(tmp_path, capsys):
    touch(tmp_path, "p1/{LGE,T2_SA,notes}.nii.gz")
    assert main(["scan", str(tmp_path)]) == 0
    told = "if T2_SA.nii.gz is T2, name it T2.nii.gz, or name it in a table (--manifest)"
    assert f"p1: not used: T2_SA.nii.gz, notes.nii.gz; {told}\n" in capsys.readouterr().out
    assert main(["scan", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patients"][0]["overlooked"] == {"T2": told}


def test_a_draft_of_a_manifest_names_links_as_they_are_called(tmp_path, capsys):
    touch(tmp_path / "in", "p1/LGE.nii.gz", "store/abc")
    (tmp_path / "in" / "p1" / "T2.nii.gz").symlink_to("../store/abc")
    (tmp_path / "in" / "p1" / "bSSFP.nii.gz").symlink_to("bSSFP.nii.gz")
    assert main(["init-manifest", str(tmp_path / "in")]) == 0
    assert "p1,p1/LGE.nii.gz,p1/T2.nii.gz,p1/bSSFP.nii.gz," in capsys.readouterr().out


def test_silence_and_errors_are_as_asked_for(cohort, tmp_path, capsys):
    assert run("segment", cohort, tmp_path / "out", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "out" / "deepgmm.log").read_text().count(": ok (") == 2
    assert run("segment", touch(tmp_path / "bad", "p1/LGE.nii.gz"), tmp_path / "failed", "-q") == cli.ALL_FAILED
    assert capsys.readouterr().err.startswith("p1: failed (E_EMPTY")
    touch(tmp_path / "bad", "series/{1,2}.dcm")
    assert run("segment", tmp_path / "bad", tmp_path / "failed", "-q") == cli.ALL_FAILED
    assert "note: 2 DICOM files are not looked at" in capsys.readouterr().err
    assert "note: 2 DICOM" in (tmp_path / "failed" / "deepgmm.log").read_text()
    assert run("mask", tmp_path / "bad", tmp_path / "masks", "-q") == cli.ALL_FAILED
    assert "note: 2 DICOM files are not looked at" in capsys.readouterr().err
    assert run("means", cohort, "-o", tmp_path / "gone" / "means.json") == cli.USAGE
    said = capsys.readouterr().err
    assert said.startswith("deepgmm: E_WRITE: means.json")
    assert said.split(":")[1].strip() in errors.CODES


def test_an_error_of_this_software_is_one_line_with_a_code_and_a_traceback_in_the_log(
    cohort, tmp_path, capsys, monkeypatch
):
    def broken(*rest, **more):
        raise ZeroDivisionError("one\nby none")

    out = tmp_path / "out"
    monkeypatch.setattr("monai_deepgmm.patients.discovery.find", broken)
    assert run("segment", cohort, out) == cli.SOFTWARE == 70
    said = capsys.readouterr().err
    assert said == (
        "deepgmm: an unexpected ZeroDivisionError (one); please report it with what the same command says with -v\n"
    )
    out.mkdir()
    (out / "deepgmm.log").write_text("begun\n")
    assert run("segment", cohort, out, "-v") == cli.SOFTWARE
    said = capsys.readouterr().err
    assert f"report it with {out / 'deepgmm.log'}" in said
    for text in (said, (out / "deepgmm.log").read_text()):
        assert "Traceback" in text
        assert "by none" in text


def test_the_package_stays_to_be_found_where_the_user_stands_in_its_folder(tmp_path):
    """As with an installed command from a checkout: worker processes look where this one looks."""
    root = Path(cli.__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from monai_deepgmm.__main__ import run\n"
        f"sys.argv = ['deepgmm', 'protocols-that-are-none']\ntry: run()\nexcept SystemExit: pass\n"
        f"assert {str(root)!r} in sys.path, sys.path"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
