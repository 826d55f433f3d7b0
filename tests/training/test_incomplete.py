"""Patients who lack sequences: a network that has learnt to do without segments them, and any other refuses to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scenes import INFARCT, TINY, labels, loaded, sidecar

from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError
from monai_deepgmm.methods import config, model_spec, network, trained_network
from monai_deepgmm.methods.training_config import SignatureTeacher, TrainingConfig
from monai_deepgmm.mixture.gaussian import m_step
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results.segment import segment
from monai_deepgmm.training import dataset
from monai_deepgmm.training.plan import plan
from monai_deepgmm.training.prepare import prepare_cohort

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
    """Three patients to train on, one of them without T2."""
    folder = tmp_path_factory.mktemp("incomplete") / "patients"
    for number in (1, 2):
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


def one(folder: Path, patient: str) -> Study:
    (study,) = discovery.find(folder, INFARCT, patients=[patient]).studies
    return study


def changed(trained: Path, settings: tuple[str, ...] = (), **training: object) -> config.Config:
    """The trained network, whose specification says something else of its training."""
    spec = model_spec.read(trained, INFARCT)
    told = dataclasses.replace(spec.spec, training=dataclasses.replace(spec.spec.training, **training))
    with pytest.MonkeyPatch.context() as patched:
        reference = dataclasses.replace(spec, spec=told)
        patched.setattr("monai_deepgmm.methods.model_spec.read", lambda *_, **trust: reference)
        return config.build(model=trained, settings=settings)


def test_who_lacks_a_sequence_is_trained_on_where_sequences_are_hidden(patients, trained, tmp_path, capsys):
    provenance = json.loads((trained / "provenance.json").read_text())
    assert provenance["patients"] == {"trained_on": 3, "validation": 0}
    assert (provenance["images"]["trained_on"], provenance["not_used"]) == (6, {})
    assert model_spec.read(trained, INFARCT).spec.sequences == INFARCT.sequences
    assert train(patients, tmp_path / "strict", "drop=0", "teacher=signature") == 1
    assert "part was not used: E_MODEL" in capsys.readouterr().err
    for folder, teacher, drop, weight in ((trained, "anatomy", 0.5, 3.0), (tmp_path / "strict", "signature", 0, 0.3)):
        told = json.loads((folder / "provenance.json").read_text())["plan"]["training"]
        assert (told["teacher"]["name"], told["drop"], told["start_weight"]) == (teacher, drop, weight)
        spec = model_spec.read(folder, INFARCT).spec
        assert (spec.training.teacher.name, spec.training.incomplete) == (teacher, drop > 0)


def test_means_of_the_cohort_are_those_of_the_complete_patients(patients, tmp_path, make_patient, capsys):
    prepared = prepare_cohort(discovery.find(patients, INFARCT), plan(means="cohort", settings={"drop": 0.5}))
    assert len(prepared.train) == 6
    whole = loaded(patients, "whole1", "whole2")
    assert torch.equal(prepared.means, dataset.cohort_means(whole, INFARCT))
    make_patient(tmp_path / "in", "a", sequences=("LGE", "C0"))
    make_patient(tmp_path / "in", "b", sequences=("T2",))
    assert train(tmp_path / "in", tmp_path / "model", "drop=0.5", "--means", "cohort") == 2
    assert "--means cohort: no patient has all the sequences" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("patient", HAS)
def test_everyone_is_segmented_into_what_his_sequences_show(unseen, results, patient):
    told, shown = sidecar(results, patient), SHOWN[patient]
    assert [t["name"] for t in told["tissues"]] == [NAMES[i] for i in sorted(shown)]
    assert told["sequences"] == [{"C0": "bSSFP"}.get(s, s) for s in HAS[patient]]
    inside = np.asarray(nib.load(unseen / f"{patient}_gd.nii.gz").dataobj) > 0
    found = labels(results, patient)
    assert set(np.unique(found)) <= {0, *shown}
    assert ((found > 0) == inside).all()
    probabilities = nib.load(results / patient / f"{patient}_probseg.nii.gz").get_fdata()
    assert probabilities.shape == (*inside.shape, len(shown))
    np.testing.assert_allclose(probabilities.sum(-1), inside, atol=1e-5)
    for unit in told["mixture"]["units"]:
        text = json.dumps(unit)
        assert all((f'"{name}"' in text) == (index in shown) for index, name in NAMES.items())


def test_it_is_said_what_is_lost_and_the_agreement_is_with_what_can_be_seen(unseen, results):
    lost = {who: [w for w in sidecar(results, who)["warnings"] if w.startswith("W_MISSING")] for who in HAS}
    assert lost == {
        "whole": [],
        "no_t2": ["W_MISSING: without T2: edema is counted as myocardium"],
        "no_c0": ["W_MISSING: without bSSFP: no tissue is lost"],
        "t2": ["W_MISSING: without LGE, bSSFP: scar is counted as edema"],
        "lge": ["W_MISSING: without T2, bSSFP: edema is counted as myocardium"],
    }
    assert main(["evaluate", str(results), str(unseen)]) == 0
    head, *lines = (line.split("\t") for line in (results / "evaluation.tsv").read_text().splitlines())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    found = {who: {row["tissue"] for row in rows if row["patient"] == who} & set(NAMES.values()) for who in HAS}
    assert found == {who: {NAMES[i] for i in shown} for who, shown in SHOWN.items()}


def test_a_whole_patient_is_segmented_as_by_a_network_that_knows_no_other(unseen, trained, results):
    """Merging nothing changes nothing."""
    alone = segment(one(unseen, "whole"), changed(trained, drop=0.0))
    assert np.array_equal(alone.labels, labels(results, "whole"))


def test_what_is_lacking_is_shown_as_0_and_its_tissues_are_added_up(unseen, trained):
    reference = model_spec.read(trained, INFARCT)
    of, spec = trained_network.load(reference, "cpu"), reference.spec
    (patient,) = loaded(unseen, "t2", incomplete=True)
    image, mask = patient.crops.image, patient.crops.mask
    given = torch.cat([torch.zeros_like(image), image, torch.zeros_like(image)], 1)
    w = trained_network.weights(of, spec, given, mask, spacing_mm=(1.5, 1.5)) * mask
    merged = torch.stack([w[:, 0], w[:, 1], w[:, 2] + w[:, 3]], 1)  # without LGE, scar is edema
    merge = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    fit = trained_network.apply_network(
        of, spec, image, mask, spacing_mm=(1.5, 1.5), posterior=False, sequences=("T2",), merge=merge
    )
    torch.testing.assert_close(fit.resp, merged)
    mixture = m_step(image, merged, mask, covariance=spec.training.covariance, spatial=True)
    assert fit.mixture.means.shape == (2, 3, 1)  # of T2 alone
    torch.testing.assert_close(fit.mixture.means, mixture.means)
    torch.testing.assert_close(fit.mixture.covariances, mixture.covariances)


@pytest.mark.parametrize(
    ("known", "present", "rows"),
    [
        ("LGE T2 bSSFP", "LGE T2 bSSFP", np.eye(4).tolist()),
        ("LGE T2 bSSFP", "LGE T2", np.eye(4).tolist()),
        ("LGE T2 bSSFP", "LGE bSSFP", [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]),  # edema is myocardium
        ("LGE T2 bSSFP", "LGE", [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]),
        ("LGE T2 bSSFP", "T2 bSSFP", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]),  # scar is edema
        ("LGE T2 bSSFP", "T2", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]),
        ("LGE T2 bSSFP", "bSSFP", [[1, 0, 0, 0], [0, 1, 1, 1]]),  # both are myocardium
        ("LGE bSSFP", "bSSFP", [[1, 0, 0], [0, 1, 1]]),  # of a network without T2, which has no edema
        ("LGE bSSFP", "LGE", np.eye(3).tolist()),
    ],
)
def test_every_tissue_becomes_what_is_left_of_it(known, present, rows):
    """Rows: what the present sequences show; columns: the network's blood, myocardium, edema, scar."""
    assert network._merge(INFARCT, tuple(known.split()), tuple(present.split())).tolist() == rows


@pytest.mark.parametrize(("patient", "lacks"), [("no_t2", "T2"), ("no_c0", "bSSFP"), ("t2", "LGE, bSSFP")])
def test_a_network_that_has_seen_complete_patients_alone_refuses_others(unseen, trained, patient, lacks):
    with pytest.raises(StudyError, match=f"trained with {lacks}, which this patient lacks") as refused:
        segment(one(unseen, patient), changed(trained, drop=0.0))
    assert refused.value.code == "E_MODEL"
    assert refused.value.remedy


def test_a_network_looks_at_its_own_sequences_and_refuses_who_has_none_of_them(tmp_path, make_patient):
    for number, sequences in ((1, ("LGE", "C0")), (2, ("LGE",))):
        make_patient(tmp_path / "seen", f"p{number}", seed=number, sequences=sequences)
    assert train(tmp_path / "seen", tmp_path / "model", "drop=0.5") == 0
    make_patient(tmp_path / "in", "t2", seed=3, sequences=("T2",))
    make_patient(tmp_path / "in", "c0", seed=4, sequences=("C0", "T2"))
    asked = config.build(model=tmp_path / "model")
    assert asked.model.spec.tissues == ("blood", "myocardium", "scar")
    told = segment(one(tmp_path / "in", "c0"), asked).sidecar
    assert (told["sequences"], [t["name"] for t in told["tissues"]]) == (["bSSFP"], ["blood", "myocardium"])
    with pytest.raises(StudyError, match="trained with LGE, bSSFP, which this patient lacks"):
        segment(one(tmp_path / "in", "t2"), asked)


def test_regions_must_meet_criteria_where_the_anatomy_taught_the_network(unseen, trained, results):
    assert changed(trained).presence is True
    assert changed(trained, ("presence=false",)).presence is False
    assert changed(trained, teacher=SignatureTeacher()).presence is False
    assert changed(trained, ("presence=true",), teacher=SignatureTeacher()).presence is True
    wanted = {"whole": {"edema", "scar"}, "no_t2": {"scar"}, "t2": {"edema"}}
    assert {who: set(sidecar(results, who)["presence"]) for who in wanted} == wanted
    made = segment(one(unseen, "whole"), changed(trained, ("presence=false",)))
    assert made.sidecar["presence"] is None
    assert config.build(protocol="brain").presence is False  # which has no anatomy
    assert TrainingConfig(drop=0.5, augment=False).incomplete is False
