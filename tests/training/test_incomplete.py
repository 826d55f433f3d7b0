"""Patients who lack sequences: a network that has learnt to do without segments them, and any other refuses to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError
from monai_deepgmm.methods import config
from monai_deepgmm.methods import registry as solvers
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.mixture.gaussian import m_step
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import SPEC
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.results import segment
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training.prepare import plan, prepare

INFARCT = protocol.load("infarct")
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
#: Patient → the files of sequences that he has, in MyoPS's names.
HAS = {"whole": ("LGE", "T2", "C0"), "no_t2": ("LGE", "C0"), "no_c0": ("LGE", "T2"), "t2": ("T2",), "lge": ("LGE",)}
#: What they show: the indices of blood, myocardium, edema and scar.
SHOWN = {"whole": {1, 2, 3, 4}, "no_t2": {1, 2, 4}, "no_c0": {1, 2, 3, 4}, "t2": {1, 2, 3}, "lge": {1, 2, 4}}
NAMES = {t.index: t.name for t in INFARCT.tissues}


def train(folder: Path, out: Path, *settings: str) -> int:
    options = ["--network", TINY, "--epochs", "2", "-q", "--set", "batch_size=2", *settings]
    return main(["train", str(folder), str(out), *options])


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    """Four patients to train on, one of them without T2."""
    folder = tmp_path_factory.mktemp("incomplete") / "patients"
    for number in (1, 2, 3):
        make_patient(folder, f"whole{number}", seed=number)
    make_patient(folder, "part", seed=4, sequences=("LGE", "C0"))
    return folder


@pytest.fixture(scope="module")
def unseen(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("incomplete") / "unseen"
    for number, (patient, sequences) in enumerate(HAS.items(), 11):
        make_patient(folder, patient, seed=number, sequences=sequences)
    return folder


@pytest.fixture(scope="module")
def trained(patients, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("incomplete") / "model"
    assert train(patients, out, "drop=0.5") == 0
    return out


@pytest.fixture(scope="module")
def results(unseen, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("incomplete") / "results"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")
        assert main(["segment", str(unseen), str(out), "--model", str(trained), "--probabilities"]) == 0
    return out


def sidecar(out: Path, patient: str) -> dict:
    return json.loads((out / patient / f"{patient}_dseg.json").read_text())


# Training ------------------------------------------------------------------------------------------------------------


def test_who_lacks_a_sequence_is_trained_on(trained):
    provenance = json.loads((trained / "provenance.json").read_text())
    assert provenance["patients"] == {"trained_on": 4, "validation": 0}
    assert provenance["images"]["trained_on"] == 8
    assert provenance["not_used"] == {}
    known = spec.read(trained, INFARCT).spec
    assert (known.incomplete, known.sequences) == (True, INFARCT.sequences)


def test_without_hidden_sequences_he_is_left_out_as_before(patients, tmp_path, capsys):
    assert train(patients, tmp_path / "model", "drop=0") == 1
    assert "part was not used: E_MODEL" in capsys.readouterr().err
    assert spec.read(tmp_path / "model", INFARCT).spec.incomplete is False


def test_the_provenance_and_the_specification_tell_the_teacher(patients, trained, tmp_path):
    assert train(patients, tmp_path / "model", "teacher=signature", "drop=0.5") == 0
    for folder, wanted, weight in ((trained, "anatomy", 3.0), (tmp_path / "model", "signature", 0.3)):
        settings = json.loads((folder / "provenance.json").read_text())["plan"]["settings"]
        assert (settings["teacher"], settings["drop"], settings["start_weight"]) == (wanted, 0.5, weight)
        assert json.loads((folder / SPEC).read_text())["teacher"] == wanted
        assert spec.read(folder, INFARCT).spec.teacher == wanted


def test_means_of_the_cohort_are_those_of_the_complete_patients(patients):
    found = cohort.find(patients, INFARCT)
    prepared = prepare(found, plan(means="cohort", settings={"drop": 0.5}))
    assert len(prepared.train) == 8
    whole = [s for s in found.studies if s.patient != "part"]
    loaded, _ = examples.load(whole, INFARCT, frame=None, max_voxels=1 << 28)
    assert len(loaded) == 3
    assert torch.equal(prepared.means, examples.cohort_means(loaded, INFARCT))


def test_a_cohort_without_a_complete_patient_has_no_means(tmp_path, make_patient, capsys):
    make_patient(tmp_path / "in", "a", sequences=("LGE", "C0"))
    make_patient(tmp_path / "in", "b", sequences=("T2",))
    assert train(tmp_path / "in", tmp_path / "model", "drop=0.5", "--means", "cohort") == 2
    assert "--means cohort: no patient has all the sequences" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# Segmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patient", HAS)
def test_everyone_is_segmented_into_what_his_sequences_show(unseen, results, patient):
    told = sidecar(results, patient)
    shown = SHOWN[patient]
    assert [t["name"] for t in told["tissues"]] == [NAMES[i] for i in sorted(shown)]
    assert told["sequences"] == [{"C0": "bSSFP"}.get(s, s) for s in HAS[patient]]
    inside = np.asarray(nib.load(unseen / f"{patient}_gd.nii.gz").dataobj) > 0
    labels = np.asarray(nib.load(results / patient / f"{patient}_dseg.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, *shown}
    assert ((labels > 0) == inside).all()
    probabilities = nib.load(results / patient / f"{patient}_probseg.nii.gz").get_fdata()
    assert probabilities.shape == (*inside.shape, len(shown))
    np.testing.assert_allclose(probabilities.sum(-1), inside, atol=1e-5)
    for unit in told["mixture"]["units"]:
        text = json.dumps(unit)
        assert all((f'"{name}"' in text) == (index in shown) for index, name in NAMES.items())


def test_it_is_said_what_is_lost(results):
    def lost(patient: str) -> list[str]:
        return [w for w in sidecar(results, patient)["warnings"] if w.startswith("W_MISSING")]

    assert lost("whole") == []
    assert lost("no_t2") == ["W_MISSING: without T2: edema is counted as myocardium"]
    assert lost("no_c0") == ["W_MISSING: without bSSFP: no tissue is lost"]
    assert lost("t2") == ["W_MISSING: without LGE, bSSFP: scar is counted as edema"]


def test_the_agreement_is_with_what_can_be_seen(unseen, results):
    assert main(["evaluate", str(results), str(unseen)]) == 0
    head, *lines = (line.split("\t") for line in (results / "evaluation.tsv").read_text().splitlines())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    found = {who: {row["tissue"] for row in rows if row["patient"] == who} & set(NAMES.values()) for who in HAS}
    assert found == {who: {NAMES[i] for i in shown} for who, shown in SHOWN.items()}


def test_a_whole_patient_is_segmented_as_by_a_network_that_knows_no_other(unseen, trained, results):
    """Merging nothing changes nothing."""
    (study,) = cohort.find(unseen, INFARCT, patients=["whole"]).studies
    asked = config.build(model=trained)
    strict = dataclasses.replace(asked.model.spec, incomplete=False)
    alone = segment.segment(study, dataclasses.replace(asked, model=dataclasses.replace(asked.model, spec=strict)))
    labels = np.asarray(nib.load(results / "whole" / "whole_dseg.nii.gz").dataobj)
    assert np.array_equal(alone.labels, labels)


def test_what_is_lacking_is_shown_as_0_and_its_tissues_are_added_up(unseen, trained):
    (study,) = cohort.find(unseen, INFARCT, patients=["t2"]).studies
    reference = spec.read(trained, INFARCT)
    network = model.load(reference, "cpu")
    loaded, _ = examples.load([study], INFARCT, frame=None, max_voxels=1 << 28, incomplete=True)
    image, mask = loaded[0].units.image, loaded[0].units.mask
    zeros = torch.zeros_like(image)
    given = torch.cat([zeros, image, zeros], 1)
    w = model.weights(network, reference.spec, given, mask, spacing_mm=(1.5, 1.5)) * mask
    merged = torch.stack([w[:, 0], w[:, 1], w[:, 2] + w[:, 3]], 1)  # without LGE, scar is edema
    merge = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    fit = model.fit(
        network, reference.spec, image, mask, spacing_mm=(1.5, 1.5), labels="network", sequences=("T2",), merge=merge
    )
    torch.testing.assert_close(fit.resp, merged)
    mixture = m_step(image, merged, mask, covariance=reference.spec.covariance, spatial=True)
    assert fit.mixture.means.shape == (2, 3, 1)  # of T2 alone
    torch.testing.assert_close(fit.mixture.means, mixture.means)
    torch.testing.assert_close(fit.mixture.covariances, mixture.covariances)


def test_every_tissue_becomes_what_is_left_of_it():
    """Rows: what the present sequences show; columns: the network's blood, myocardium, edema, scar."""

    def merge(*present: str, known: tuple[str, ...] = INFARCT.sequences) -> list[list[float]]:
        return solvers._merge(INFARCT, known, present).tolist()

    assert merge("LGE", "T2", "bSSFP") == torch.eye(4).tolist()
    assert merge("LGE", "T2") == torch.eye(4).tolist()
    without_t2 = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]  # edema is myocardium
    assert merge("LGE", "bSSFP") == merge("LGE") == without_t2
    without_lge = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]  # scar is edema
    assert merge("T2", "bSSFP") == merge("T2") == without_lge
    assert merge("bSSFP") == [[1, 0, 0, 0], [0, 1, 1, 1]]  # both are myocardium
    # Of a network without T2, which has no edema: blood, myocardium, scar.
    assert merge("bSSFP", known=("LGE", "bSSFP")) == [[1, 0, 0], [0, 1, 1]]
    assert merge("LGE", known=("LGE", "bSSFP")) == torch.eye(3).tolist()


# Refusals ------------------------------------------------------------------------------------------------------------


def changed(trained: Path, **fields: object) -> config.Config:
    """The trained network, whose specification says something else."""
    asked = config.build(model=trained)
    return dataclasses.replace(
        asked, model=dataclasses.replace(asked.model, spec=dataclasses.replace(asked.model.spec, **fields))
    )


@pytest.mark.parametrize(("patient", "lacks"), [("no_t2", "T2"), ("no_c0", "bSSFP"), ("t2", "LGE, bSSFP")])
def test_a_network_that_has_seen_complete_patients_alone_refuses_others(unseen, trained, patient, lacks):
    (study,) = cohort.find(unseen, INFARCT, patients=[patient]).studies
    with pytest.raises(StudyError, match=f"trained with {lacks}, which this patient lacks") as refused:
        segment.segment(study, changed(trained, incomplete=False))
    assert refused.value.code == "E_MODEL"
    assert refused.value.remedy


def test_a_patient_with_none_of_the_networks_sequences_fails(patients, tmp_path, make_patient, no_picture):
    """Others go on."""
    for number, sequences in ((1, ("LGE", "C0")), (2, ("LGE",))):
        make_patient(tmp_path / "seen", f"p{number}", seed=number, sequences=sequences)
    assert train(tmp_path / "seen", tmp_path / "model", "drop=0.5") == 0
    known = spec.read(tmp_path / "model", INFARCT).spec
    assert (known.sequences, known.tissues) == (("LGE", "bSSFP"), ("blood", "myocardium", "scar"))
    make_patient(tmp_path / "in", "t2", seed=3, sequences=("T2",))
    make_patient(tmp_path / "in", "c0", seed=4, sequences=("C0", "T2"))
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "in"), str(out), "--model", str(tmp_path / "model")]) == 1
    row = json.loads((out / "t2" / "t2_row.json").read_text())
    assert (row["status"], row["code"]) == ("failed", "E_MODEL")
    assert "trained with LGE, bSSFP, which this patient lacks" in row["message"]
    assert not (out / "t2" / "t2_dseg.nii.gz").exists()
    told = sidecar(out, "c0")
    assert told["sequences"] == ["bSSFP"]  # T2 is nothing that the network knows
    assert [t["name"] for t in told["tissues"]] == ["blood", "myocardium"]


# Evidence ------------------------------------------------------------------------------------------------------------


def test_tissues_need_evidence_from_a_network_taught_by_anatomy(unseen, trained, results):
    assert config.build(model=trained).presence is True
    assert changed(trained, teacher="signature").presence is False
    assert config.build(model=trained, settings=["presence=false"]).presence is False
    asked = config.build(model=trained, settings=["presence=true"])
    by_signature = dataclasses.replace(asked.model.spec, teacher="signature")
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, spec=by_signature))
    assert asked.presence is True
    assert set(sidecar(results, "whole")["presence"]) == {"edema", "scar"}
    assert set(sidecar(results, "no_t2")["presence"]) == {"scar"}
    assert set(sidecar(results, "t2")["presence"]) == {"edema"}
    (study,) = cohort.find(unseen, INFARCT, patients=["whole"]).studies
    made = segment.segment(study, config.build(model=trained, settings=["presence=false"]))
    assert made.sidecar["presence"] is None


def test_a_protocol_without_anatomy_asks_for_no_evidence():
    assert config.build(protocol="brain").presence is False
    assert config.build(protocol="brain", settings=["presence=true"]).presence is False
