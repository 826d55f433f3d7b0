import json
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigParser, create_workflow, verify_net_in_out

from monai_deepgmm.cli import main, parser
from monai_deepgmm.images import n4
from monai_deepgmm.methods import config
from monai_deepgmm.phantom import heart as phantom

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    phantom.write_cohort(folder, 2, seed=3)
    return folder


@pytest.mark.parametrize("method", ["gmm", None])
def test_the_bundle_segments_as_the_command_does(patients, tmp_path, method):
    chosen = ["--method", method] if method else []
    assert main(["segment", str(patients), str(tmp_path / "cli"), "--set", "max_iter=40", *chosen]) == 0
    workflow = create_workflow(
        config_file=str(CONFIGS / "inference.json"),
        workflow_type="infer",
        bundle_root=str(CONFIGS.parent),
        dataset_dir=str(patients),
        output_dir=str(tmp_path / "bundle"),
        method=method,
        set={"max_iter": 40},
    )
    assert workflow.check_properties() == []
    assert workflow.run() == [0]
    workflow.finalize()
    for path in sorted((tmp_path / "cli").glob("*/*_dseg.nii.gz")):
        assert (tmp_path / "bundle" / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_the_configuration_has_the_commands_options_and_defaults():
    raw = json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8"))
    parsed = ConfigParser(raw).get_parsed_content("config", instantiate=True)
    assert parsed == config.build()


def test_the_configuration_names_every_option_of_the_command():
    raw = json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8"))
    options = vars(parser().parse_args(["segment", "in", "out"]))
    other = {"command", "verbose", "quiet", "directory", "out", "dry_run"}
    for name, default in options.items():
        if name not in other:
            given = [] if raw[name] == {} else raw[name]  # --set is a list of strings there and a mapping here
            assert (list(default) if isinstance(default, tuple) else default) == given, name


def test_the_bundle_writes_bias_fields_as_the_command_does(tmp_path, make_patient, monkeypatch, no_picture):
    def slope(image, mask, spacing_mm):
        return np.where(mask, np.linspace(0.9, 1.1, image.shape[0])[:, None, None], 1).astype(np.float32)

    monkeypatch.setattr(n4, "field", slope)
    make_patient(tmp_path / "in", "pat1", shape=(48, 48, 1))
    settings = ["--method", "gmm", "--set", "n4=true", "max_iter=5", "--fields"]
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "cli"), *settings]) == 0
    workflow = create_workflow(
        config_file=str(CONFIGS / "inference.json"),
        workflow_type="infer",
        bundle_root=str(CONFIGS.parent),
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "bundle"),
        method="gmm",
        set={"n4": True, "max_iter": 5},
        fields=True,
    )
    assert workflow.run() == [0]
    found = sorted((tmp_path / "cli" / "pat1").glob("*.nii.gz"))
    assert len(found) == 1 + 2 * 3
    for path in found:
        assert (tmp_path / "bundle" / "pat1" / path.name).read_bytes() == path.read_bytes()
    # The images of its data set are those that the fit sees.
    item = workflow.parser.get_parsed_content("dataset")[0]
    assert set(np.unique(item["fields"][0, 24])) == {1.0, np.float32(np.linspace(0.9, 1.1, 48)[24])}


def test_the_dataset_gives_images_and_masks(patients):
    parsed = ConfigParser(json.loads((CONFIGS / "inference.json").read_text(encoding="utf-8")))
    parsed["dataset_dir"] = str(patients)
    item = parsed.get_parsed_content("dataset")[0]
    assert item["image"].shape[:2] == (len(item["units"].slices), 3)
    assert item["mask"].shape[1] == 1
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}


def test_a_failed_patient_is_the_exit_code_of_the_bundle(patients, tmp_path):
    broken = tmp_path / "in" / "Broken"
    broken.mkdir(parents=True)
    (broken / "Broken_LGE.nii.gz").write_bytes(b"")
    (broken / "Broken_gd.nii.gz").write_bytes(b"")
    workflow = create_workflow(
        config_file=str(CONFIGS / "inference.json"),
        workflow_type="infer",
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
    )
    assert workflow.run() == [3]
    with pytest.raises(SystemExit) as stopped:
        workflow.finalize()
    assert stopped.value.code == 3


def test_the_network_fits_the_metadata():
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        device="cpu",
    )


def test_the_versions_agree():
    import tomllib

    project = tomllib.loads((CONFIGS.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["version"] == project["version"]
    assert metadata["version"] in metadata["changelog"]
