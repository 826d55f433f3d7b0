"""The bundle that comes with the package: what the command does, and whatever a user changes in it counts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from folders import touch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.transforms import Compose, Transform
from scenes import CONFIGS, INFARCT, QUIET, inference, labels, sidecar

from monai_deepgmm import bundle_options
from monai_deepgmm.cli import main, parser
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import config
from monai_deepgmm.methods.gaussian_mixture import GaussianMixtureConfig

PATIENTS = ("pat1", "pat2")
pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("no_picture")]


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("patients") / "in"
    for number, name in enumerate(PATIENTS):
        make_patient(folder, name, seed=number)
    return folder


def run(folder: Path, out: Path, *, code: int = 0, **options: object):
    """The bundle's inference by EM, quickly unless another method is asked for."""
    given = {"method": "gmm", "set": {"max_iter": 40}} | options
    workflow = inference(bundle_root=CONFIGS.parent, dataset_dir=folder, output_dir=out, **given)
    assert workflow.check_properties() == []
    assert workflow.run() == [code]
    if code == 0:
        workflow.finalize()
    return workflow


def slope(image, mask, spacing_mm):
    """Stands for N4."""
    return np.where(mask, np.linspace(0.9, 1.1, image.shape[0])[:, None, None], 1).astype(np.float32)


@pytest.mark.parametrize("method", ["gmm", None])
@pytest.mark.parametrize("n4", [False, True])
def test_the_bundle_segments_as_the_command_does(patients, tmp_path, monkeypatch, method, n4):
    monkeypatch.setattr("monai_deepgmm.images.preparation.n4_field", slope)
    asked = [*(["--method", method] if method else []), *(["--fields"] if n4 else [])]
    ours, theirs = tmp_path / "bundle", tmp_path / "command"
    settings = ["max_iter=40", f"n4={n4}".lower()]
    assert main(["segment", str(patients), str(theirs), *asked, "--set", *settings]) == 0
    workflow = run(patients, ours, method=method, set={"max_iter": 40, "n4": n4}, fields=n4)
    found = sorted(theirs.glob("*/*.nii.gz"))
    assert len(found) == len(PATIENTS) * (1 + 2 * 3 * n4)
    for path in found:
        assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes()
    for name in PATIENTS:
        assert sidecar(ours, name)["fingerprint"] == sidecar(theirs, name)["fingerprint"]
    # The images of its data set are those that the fit sees.
    item = workflow.parser.get_parsed_content("dataset")[0]
    assert item["crops"].image.shape[:2] == (2, 3)
    assert set(item["crops"].mask.unique().tolist()) == {0.0, 1.0}
    assert ("fields" in item) == n4


def test_the_configuration_has_the_commands_options_and_defaults():
    raw = json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8"))
    assert ConfigParser(raw).get_parsed_content("config", instantiate=True) == config.build()
    options = vars(parser().parse_args(["segment", "in", "out"]))
    for name in set(options) - {
        "command",
        "verbose",
        "quiet",
        "directory",
        "out",
        "dry_run",
        "help_method",
        "config",
        "save_config",
        "redo",
    }:
        given = [] if raw[name] == {} else raw[name]  # --set is a list of strings there and a mapping here
        assert (list(options[name]) if isinstance(options[name], tuple) else options[name]) == given, name


@pytest.mark.parametrize("names", ["inference", "evaluate", "inference evaluate", "train", "train multi_gpu_train"])
def test_whatever_a_configuration_defines_is_used(names):
    """By what it runs, or by MONAI's own tools, which want the network's definition and where the bundle lies."""
    parsed = ConfigParser()
    parsed.read_config([str(CONFIGS / f"{name}.json") for name in names.split()])
    raw, used = parsed.get(), {"_meta_", "imports", "initialize", "run", "finalize", "network_def", "bundle_root"}
    used |= {"output_dir"}  # where MONAI's tracking writes
    for _ in raw:
        text = json.dumps([raw[key] for key in used & set(raw)])
        used |= {key for key in raw if re.search(rf"@{key}\b", text)}
    assert set(raw) <= used
    for line in raw["imports"]:
        name = line.split()[-1]
        assert re.search(rf"\b{name}\b", json.dumps({**raw, "imports": []})), line


def test_a_failed_patient_is_the_exit_code_of_the_bundle(tmp_path, make_patient):
    make_patient(tmp_path / "in", "broken")["LGE"].write_bytes(b"")
    workflow = run(tmp_path / "in", tmp_path / "out", code=3)
    with pytest.raises(SystemExit) as stopped:
        workflow.finalize()
    assert stopped.value.code == 3


def test_a_patient_without_reference_labels_is_the_exit_code_of_an_evaluation(patients, tmp_path):
    shutil.copytree(patients, tmp_path / "in")
    (tmp_path / "in" / "pat2_gd.nii.gz").rename(tmp_path / "in" / "pat2_mask.nii.gz")
    given = {"method": "gmm", "set": {"max_iter": 5}, "mask": "file", "mask_labels": [200, 500, 1220, 2221]}
    places = {"bundle_root": CONFIGS.parent, "dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out"}
    workflow = inference(CONFIGS / "evaluate.json", **places, **given)
    workflow.run()
    with pytest.raises(SystemExit) as stopped:
        workflow.finalize()
    assert stopped.value.code == 1
    assert main(["evaluate", str(tmp_path / "out"), str(tmp_path / "in")]) == 1


def test_brains_are_not_segmented_as_hearts_unless_that_is_asked(tmp_path):
    touch(tmp_path / "in", "p1/{T1,T2,mask}.nii.gz")
    with pytest.raises(RuntimeError) as refused:
        run(tmp_path / "in", tmp_path / "out")
    causes = [refused.value, refused.value.__cause__, refused.value.__context__]
    assert any("--protocol brain" in str(cause) for cause in causes)
    run(tmp_path / "in", tmp_path / "out", code=3, asked=True)


def test_the_network_fits_the_metadata_and_the_versions_agree():
    meta, file = (str(CONFIGS / name) for name in ("metadata.json", "inference.json"))
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=file, device="cpu")
    project = tomllib.loads((CONFIGS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = json.loads(Path(meta).read_text(encoding="utf-8"))
    assert metadata["version"] == project["version"]
    assert metadata["version"] in metadata["changelog"]


class Invertd(Transform):
    """Dark is bright."""

    def __call__(self, data):
        return {**data, "crops": data["crops"]._replace(image=-data["crops"].image)}


def inverting(*steps: object) -> Compose:
    """The package's own steps and another; its own may be a Compose too."""
    own = config.build().preprocessing.transforms(INFARCT)
    return Compose([own, Invertd(), *steps])


def shifted(images):
    fit = GaussianMixtureConfig().solve(images)
    return fit._replace(resp=fit.resp.roll(3, 2))


SPHERICAL = config.build(method="gmm", settings=["covariance=spherical"])
#: As a configuration file or the command line says it.
TEXT = {
    "_target_": "monai.transforms.Compose",
    "transforms": [
        "$@config.preprocessing.transforms(@config.protocol)",
        {
            "_target_": "monai.transforms.Lambda",
            "func": "$lambda data: {**data, 'crops': data['crops']._replace(image=-data['crops'].image)}",
        },
    ],
}


#: What a user may put in place of the bundle's own, made anew for each run.
CUSTOM = {
    "preprocessing": lambda: {"preprocessing": inverting()},
    "preprocessing as text": lambda: {"preprocessing": TEXT},
    "inferer": lambda: {"inferer": shifted},
    "inferer without a name": lambda: {"inferer": lambda images: shifted(images)},
    "inferer's configuration": lambda: {"inferer#config": SPHERICAL},
}


@pytest.mark.parametrize("case", CUSTOM)
def test_what_is_changed_changes_the_result_and_is_not_taken_for_the_default(patients, tmp_path, case):
    default, custom, both = tmp_path / "default", tmp_path / "custom", tmp_path / "both"
    run(patients, default)
    run(patients, custom, **CUSTOM[case]())
    told = [sidecar(out, "pat1") for out in (custom, default)]
    if "configuration" in case:
        assert told[0]["mixture"] != told[1]["mixture"]
    else:
        assert not np.array_equal(labels(custom, "pat1"), labels(default, "pat1"))
    assert told[0]["fingerprint"] != told[1]["fingerprint"]
    assert "steps" not in told[1]
    assert (told[0]["steps"]["inferer"] is None) == ("inferer" not in case)
    assert (told[0]["steps"]["preprocessing"] is None) == ("inferer" in case)

    def stamps() -> list[int]:
        return [(both / name / f"{name}_dseg.nii.gz").stat().st_mtime_ns for name in PATIENTS]

    for wanted, options in ((default, {}), (custom, CUSTOM[case]()), (default, {})):
        run(patients, both, **options)
        assert all(np.array_equal(labels(both, name), labels(wanted, name)) for name in PATIENTS)
        first = stamps()
        run(patients, both, **(options and CUSTOM[case]()))
        assert stamps() == first  # the same again is done


def test_parts_of_the_configuration_can_be_changed(patients, tmp_path):
    """As ``--config#settings`` on the command line."""
    run(patients, tmp_path / "bundle", **{"config#settings": {"covariance": "spherical", "max_iter": 7}})
    asked = ["--method", "gmm", "--set", "covariance=spherical", "max_iter=7"]
    assert main(["segment", str(patients), str(tmp_path / "command"), *asked]) == 0
    told = [sidecar(tmp_path / out, "pat1") for out in ("bundle", "command")]
    assert told[0]["fingerprint"] == told[1]["fingerprint"]
    assert told[0]["configuration"]["settings"]["covariance"] == "spherical"


def test_intervals_are_those_of_the_inferer_that_ran(patients, tmp_path):
    """With the anatomical mixture, fits with moved priors say how sure a volume is: by the same inferer."""
    calls = []

    def counted(images):
        calls.append(images.protocol)
        return config.build().method.solve(images)

    run(patients, tmp_path, method=None, set={"perturbations": 2}, inferer=counted, patients=["pat1"])
    assert len(calls) == 3
    assert calls[1] != INFARCT


def test_a_changed_preprocessing_still_tells_why_a_patient_failed(tmp_path, make_patient):
    path = make_patient(tmp_path / "in", "torn")["LGE"]
    path.write_bytes(path.read_bytes()[:-40])
    run(tmp_path / "in", tmp_path / "out", code=3, preprocessing=inverting())
    assert json.loads((tmp_path / "out" / "torn" / "torn_row.json").read_text())["code"] == "E_GZIP"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": 2, "inferer": lambda images: None}, "jobs: the bundle's own functions cannot be sent"),
        ({"method": "cohort", "set": {}, "preprocessing": inverting()}, "preprocessing: --method cohort trains on"),
    ],
)
def test_changes_that_cannot_count_everywhere_are_refused(patients, tmp_path, options, said):
    with pytest.raises(RuntimeError) as refused:
        run(patients, tmp_path / "out", **options)
    assert said in str(refused.value.__cause__)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--methd gmm", r"--methd: .* \(did you mean method\?\)"),
        ("--methd=gmm", "--methd: no configuration has such a key"),
        ("--epochs 3", "--epochs: no configuration has such a key"),
        ("--method gmm --network_def#in_channels 2 --config::settings {}", None),
        ("--set {'max_iter':'@steps'} --steps 3 --tracking mlflow --tracking_uri here", None),
    ],
)
def test_an_option_that_no_configuration_has_is_refused(words, said):
    program = os.path.join("lib", "monai", "bundle", "__main__.py")
    files = "['{0}/inference.json','{0}/evaluate.json']".format(CONFIGS.as_posix())
    typed = [program, "run", "--config_file", files, *words.split()]
    with pytest.raises(UsageError, match=said) if said else contextlib.nullcontext():
        bundle_options.refuse_unknown(typed)
    bundle_options.refuse_unknown(["pytest", *typed[1:]])  # nobody typed it


@pytest.mark.parametrize("name", ["inference", "evaluate", "train", "multi_gpu_train"])
def test_every_configuration_asks_for_that_at_once(name):
    initialize = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["initialize"]
    assert initialize[:2] == ["$terminal.end_with_one_line()", "$bundle_options.refuse_unknown()"]
