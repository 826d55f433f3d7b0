"""A trained network as a solver: what it is read from, what it refuses, and what it gives in place of EM."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import resampling as view
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.mixture.gaussian import e_step, m_step
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import SPEC, WEIGHTS, Spec

INFARCT = protocol.load("infarct")
TINY = {"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]}
SPECIFIED = Spec(
    protocol="infarct",
    normalisation=INFARCT.normalisation,
    sequences=("LGE", "T2", "bSSFP"),
    tissues=("blood", "myocardium", "edema", "scar"),
    network=TINY,
    spatial_dims=2,
    grid_mm=1.0,
    size=(64, 64),
    spatial=True,
    covariance="diag",
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model that never saw a patient."""
    return write(tmp_path / "model")


def write(folder: Path, of: Spec = SPECIFIED, *, seed: int = 0) -> Path:
    (folder / WEIGHTS).parent.mkdir(parents=True)
    (folder / SPEC).write_bytes(of.as_json())
    torch.save(model.build(of, seed=seed).state_dict(), folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def network():
    return model.build(SPECIFIED, seed=1).eval()


@pytest.fixture(scope="module")
def scan():
    """Two images (float64) with a disc for a mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 3, 40, 44), generator=generator, dtype=torch.float64)
    x, y = torch.meshgrid(torch.arange(40), torch.arange(44), indexing="ij")
    disc = ((x - 20) ** 2 + (y - 22) ** 2 < 12**2).double()
    return image, disc.expand(2, 1, 40, 44).clone()


# The network ---------------------------------------------------------------------------------------------------------


def test_weights_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.build(SPECIFIED, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = model.build(SPECIFIED, seed=3).state_dict(), model.build(SPECIFIED, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_network_is_described_in_full():
    wanted = {**TINY, "spatial_dims": 2, "in_channels": 4, "out_channels": 4}
    assert model.complete(SPECIFIED) == wanted
    assert SPECIFIED.channels == 4


@pytest.mark.skipif(find_spec("einops") is None, reason="needs einops")
def test_a_network_for_images_of_one_size_sees_smaller_patients_on_it_and_larger_ones_by_windows():
    unetr = {"_target_": "unetr", "hidden_size": 12, "mlp_dim": 12, "feature_size": 2}
    of = dataclasses.replace(SPECIFIED, network=unetr, size=(64, 32))
    network = model.build(of).eval()
    small, large = (torch.zeros(1, 1, 80, 40) for _ in range(2))
    small[:, :, 10:30, 10:30] = large[:, :, 8:72, 10:30] = 1
    sizes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
    for mask, passes in ((small, 1), (large, 2)):  # the large one needs 96 rows
        sizes.clear()
        found = model.weights(network, of, torch.randn(1, 3, 80, 40), mask, spacing_mm=(1.0, 1.0))
        torch.testing.assert_close(found.sum(1), torch.ones(1, 80, 40))
        assert sizes == [(64, 32)] * passes


@pytest.mark.skipif(find_spec("einops") is None, reason="needs einops")
@pytest.mark.parametrize("size", [(64, 32), (32, 32, 64)])
@pytest.mark.parametrize("name", ["unetr", "swinunetr"])
def test_networks_with_attention_can_be_trained_in_2d_and_3d(name, size):
    small = {
        "unetr": {"hidden_size": 12, "mlp_dim": 12, "feature_size": 2},
        "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    }
    network = {"_target_": name, **small[name]}
    sides = (64,) * len(size) if name == "swinunetr" else size
    of = dataclasses.replace(SPECIFIED, network=network, spatial_dims=len(size), size=sides)
    assert model.tried(of).training


def test_a_model_is_read_back_as_it_was_written(folder):
    reference = spec.read(folder, INFARCT)
    assert reference.spec == SPECIFIED
    loaded = model.load(reference, "cpu")
    assert not loaded.training
    saved = torch.load(folder / WEIGHTS, weights_only=True)
    assert all(torch.equal(v, saved[k]) for k, v in loaded.state_dict().items())


def test_a_model_from_before_there_were_teachers_was_taught_by_signature(folder):
    raw = json.loads((folder / SPEC).read_text())
    del raw["teacher"], raw["incomplete"]
    (folder / SPEC).write_text(json.dumps(raw))
    known = spec.read(folder, INFARCT).spec
    assert (known.teacher, known.incomplete) == ("signature", False)


def test_two_models_are_the_same_when_their_files_are(folder, tmp_path):
    first = spec.read(folder, INFARCT)
    assert spec.read(write(tmp_path / "copy"), INFARCT).sha256 == first.sha256
    assert spec.read(write(tmp_path / "other", seed=1), INFARCT).sha256 != first.sha256
    changed = dataclasses.replace(SPECIFIED, labels="network")
    assert spec.read(write(tmp_path / "rule", changed), INFARCT).sha256 != first.sha256
    assert "folder" not in first.as_json()
    assert str(tmp_path) not in json.dumps(first.as_json(), default=list)


# The fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (0.75, 0.75), (1.7, 1.3)])
def test_weights_on_the_images_own_grid_sum_to_1(network, scan, spacing_mm):
    image, mask = scan
    w = model.weights(network, SPECIFIED, image, mask, spacing_mm=spacing_mm)
    assert w.shape == (2, 4, 40, 44)
    assert w.dtype == image.dtype
    assert w.min() >= 0
    torch.testing.assert_close(w.sum(1), torch.ones(2, 40, 44, dtype=w.dtype))
    assert not w.requires_grad


def test_on_the_networks_own_grid_nothing_is_interpolated(network, scan):
    image, mask = scan
    w = model.weights(network, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0))
    seen = view.around(mask, (1.0, 1.0), 1.0, SPECIFIED.size)
    given = view.inputs(view.look(image.float(), seen), view.look(mask.float(), seen, nearest=True), 1.0)
    with torch.no_grad():
        direct = network(given).softmax(1)
    first = (seen.centre - (torch.tensor(seen.size) - 1) / 2)[0].round().long().tolist()
    rows, columns = (slice(max(f, 0), min(f + n, s)) for f, n, s in zip(first, seen.size, (40, 44), strict=True))
    shifted = tuple(slice(s.start - f, s.stop - f) for s, f in zip((rows, columns), first, strict=True))
    inside = mask[:, :, rows, columns]
    torch.testing.assert_close(
        w[:, :, rows, columns] * inside, direct[:, :, shifted[0], shifted[1]].double() * inside, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("spatial", [True, False])
def test_the_fit_is_one_m_step_from_the_output(network, scan, spatial):
    image, mask = scan
    of = dataclasses.replace(SPECIFIED, spatial=spatial)
    w = model.weights(network, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0)) * mask
    expected = m_step(image, w, mask, covariance="diag", spatial=spatial)
    fit = model.fit(network, of, image, mask, spacing_mm=(1.0, 1.0))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(fit.mixture, expected, strict=True))
    by_hand = (w[0, 2] * image[0, 1]).sum() / w[0, 2].sum()
    torch.testing.assert_close(fit.mixture.means[0, 2, 1], by_hand)
    assert fit.converged.all()
    assert fit.iterations.tolist() == [0, 0]
    assert torch.equal(fit.trace[0], fit.nll)


def test_the_rule_says_whether_the_label_is_of_the_posterior_or_of_the_network(network, scan):
    image, mask = scan

    def resp(rule, **of):
        chosen = dataclasses.replace(SPECIFIED, **of)
        return model.fit(network, chosen, image, mask, spacing_mm=(1.0, 1.0), labels=rule).resp

    w = model.weights(network, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0)) * mask
    posterior = e_step(image, mask, m_step(image, w, mask, covariance="diag", spatial=True))
    assert not torch.equal(w, posterior)
    assert torch.equal(resp("network"), w)
    assert torch.equal(resp("posterior"), posterior)
    assert torch.equal(resp(None), posterior)
    assert torch.equal(resp(None, labels="network"), w)
    assert torch.equal(resp("posterior", labels="network"), posterior)
    for found in (w, posterior):
        torch.testing.assert_close(found.sum(1, keepdim=True), mask)


def test_images_do_not_depend_on_each_other(network, scan):
    """However far their neighbours' masks reach: an instance norm counts the surroundings."""
    image, mask = scan
    mask = mask.clone()
    mask[1, :, :30] = 0
    image, mask = (torch.nn.functional.pad(t, (60, 0)) for t in (image, mask))
    mask[0, :, 20] = 1  # 104 pixels from end to end: more than the training's images have
    both = model.fit(network, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0)).resp
    alone = [
        model.fit(network, SPECIFIED, i[None], m[None], spacing_mm=(1.0, 1.0)).resp
        for i, m in zip(image, mask, strict=True)
    ]
    assert torch.equal(both, torch.cat(alone))


class Sizes(torch.nn.Module):
    """Looks at the size of its images, and gives one of several outputs its own way."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.outputs = outputs
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[2:]))
        return torch.zeros(len(image), self.outputs, *image.shape[2:])


def test_an_image_is_seen_as_large_as_in_training_unless_its_mask_is_larger(scan):
    image, mask = (torch.nn.functional.pad(t, (60, 0)) for t in scan)
    mask[1, :, 20] = 1
    model.weights(network := Sizes(), SPECIFIED, image, mask, spacing_mm=(1.0, 1.0))
    assert network.seen == [(64, 64), (64, 128)]  # 104 pixels and twice the margin of 4
    volume = dataclasses.replace(SPECIFIED, spatial_dims=3, size=(32, 64, 64))
    cube = torch.zeros(2, 1, 20, 20, 40)
    cube[:, :, 5:15, 5:15, 5:15] = 1
    cube[1, :, 10, 10] = 1
    both = torch.zeros(2, 3, 20, 20, 40)
    model.weights(network := Sizes(), volume, both, cube, spacing_mm=(1.0, 1.0, 2.0))
    assert network.seen == [(32, 64, 64), (32, 64, 96)]  # 40 slices of 2 mm


def test_a_view_is_as_even_as_a_specification_wants_it():
    assert view.MULTIPLE == spec.MULTIPLE


class Odd(Sizes):
    def forward(self, image):
        raise KeyError


@pytest.mark.parametrize(
    ("made", "said"),
    [(Sizes(3), r"shape \(1, 3, 64, 64\), expected \(1, 4, 64, 64\)"), (Odd(), "64×64 voxels \\(KeyError\\)")],
)
def test_a_network_that_cannot_be_run_says_so(scan, made, said):
    image, mask = scan
    with pytest.raises(StudyError, match=said) as refused:
        model.fit(made, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0))
    assert refused.value.code == "E_MODEL"


def test_an_output_that_is_no_number_is_an_error_of_the_model(network, scan):
    image, mask = scan
    broken = model.build(SPECIFIED)
    with torch.no_grad():
        next(iter(broken.parameters()))[:] = float("nan")
    with pytest.raises(StudyError, match="not finite"):
        model.fit(broken, SPECIFIED, image, mask, spacing_mm=(1.0, 1.0))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [SPEC, WEIGHTS])
def test_a_model_without_one_of_its_files_is_refused(folder, part):
    (folder / part).unlink()
    with pytest.raises(UsageError, match=rf"{Path(part).name}.*deepgmm train"):
        spec.read(folder, INFARCT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "model.json was not written by this version"),
        ("[]", "model.json was not written by this version"),
        ("{}", "model.json was not written by this version"),
        pytest.param("[" * 100000, "model.json was not written by this version", id="nested too deeply"),
        ('{"sequences": ["LGE"], "tissues": [], "new": 1}', "model.json was not written by this version"),
    ],
)
def test_a_specification_that_cannot_be_read_is_refused(folder, text, said):
    (folder / SPEC).write_text(text)
    with pytest.raises(UsageError, match=said):
        spec.read(folder, INFARCT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": "brain"}, "trained with protocol brain, but this run uses infarct"),
        ({"normalisation": "zscore-slice-mask"}, "trained with normalisation zscore-slice-mask"),
        ({"labels": "guess"}, "labels: got guess, expected one of posterior, network"),
        ({"labels": ["posterior"]}, "labels"),
        ({"sequences": ("LGE", "T1", "bSSFP")}, "sequences: got .* expected some of LGE, T2, bSSFP, in this order"),
        ({"sequences": ("T2", "LGE", "bSSFP")}, "sequences"),
        ({"sequences": ("LGE", "LGE", "T2", "bSSFP")}, "sequences"),
        ({"sequences": ()}, "sequences"),
        ({"sequences": ("LGE", "bSSFP")}, "tissues: got .* expected blood, myocardium, scar, which"),
        ({"tissues": ("myocardium", "blood", "edema", "scar")}, "tissues"),
        ({"tissues": ("a", "b", "c", "d")}, "tissues"),
        ({"tissues": ({}, 1, None, "scar")}, "tissues"),
        ({"network": "unet"}, "network: got unet, expected a mapping with _target_"),
        ({"network": {"_target_": 3}}, "network"),
        ({"spatial_dims": 3, "size": (64, 64, 64)}, "spatial_dims: got 3, expected 2"),
        ({"spatial_dims": True}, "spatial_dims"),
        ({"grid_mm": "1"}, "grid_mm: got 1, expected a number from 0.01 to 100"),
        ({"grid_mm": float("nan")}, "grid_mm"),
        ({"grid_mm": 10**400}, "grid_mm"),
        ({"grid_mm": 0}, "grid_mm"),
        ({"size": (64,)}, "size: got .* expected 2 multiples of 32"),
        ({"size": (64, 48)}, "size"),
        ({"size": (64, 0)}, "size"),
        ({"size": (64, "64")}, "size"),
        ({"spatial": 1}, "spatial: got 1, expected true or false"),
        ({"covariance": "round"}, "covariance: got round, expected one of diag"),
        ({"covariance": ["diag"]}, "covariance"),
        ({"teacher": "me"}, "teacher: got me, expected one of signature, anatomy"),
        ({"teacher": None}, "teacher"),
        ({"incomplete": 1}, "incomplete: got 1, expected true or false"),
        ({"window": (64, 48)}, "window: got .* expected 2 multiples of 32, or nothing"),
    ],
)
def test_a_model_for_something_else_is_refused(tmp_path, change, said):
    folder = write(tmp_path / "model")
    (folder / SPEC).write_bytes(dataclasses.replace(SPECIFIED, **change).as_json())
    with pytest.raises(UsageError, match=said):
        spec.read(folder, INFARCT)


DAMAGE = {
    "torn": lambda data: data[: len(data) // 2],
    "scrambled": lambda data: data[:100] + data[:100:-1],
    "text": lambda data: b"<html>404</html>",
    "empty": lambda data: b"",
}


def test_a_flipped_bit_in_the_weights_is_noticed(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    weight = next(iter(torch.load(folder / WEIGHTS, weights_only=True).values()))
    data[data.index(weight.numpy().tobytes())] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    torch.load(folder / WEIGHTS, weights_only=True)  # torch itself does not notice
    with pytest.raises(StudyError, match=r"model\.pt cannot be used \(the checksum") as refused:
        model.load(spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"


@pytest.mark.parametrize("target", ["nonsense", "os.system", "monai.networks.nets.DynUNet"])
def test_a_network_that_cannot_be_made_is_an_error_of_the_model(folder, target):
    changed = dataclasses.replace(SPECIFIED, network={"_target_": target})
    (folder / SPEC).write_bytes(changed.as_json())
    with pytest.raises(StudyError, match=r"model\.json cannot be used") as refused:
        model.load(spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_fail_every_patient_with_a_code(tmp_path, make_patient, no_picture, kind):
    folder = write(tmp_path / "model")
    (folder / WEIGHTS).write_bytes(DAMAGE[kind]((folder / WEIGHTS).read_bytes()))
    make_patient(tmp_path / "in", "pat")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(folder)]) == 3
    row = json.loads((tmp_path / "out" / "pat" / "pat_row.json").read_text())
    assert row["code"] == "E_MODEL"
    assert "model.pt" in row["message"]
    assert str(tmp_path) not in row["message"]
    assert not list((tmp_path / "out").rglob("*_dseg.nii.gz"))


def test_weights_of_another_network_are_refused(folder):
    other = dataclasses.replace(SPECIFIED, sequences=("LGE",), tissues=("blood", "scar"))
    torch.save(model.build(other).state_dict(), folder / WEIGHTS)
    with pytest.raises(StudyError, match=r"model\.pt cannot be used") as refused:
        model.load(spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"


class Bomb:
    """An object whose unpickling runs a command."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self):
        return os.system, (f"touch '{self.fuse}'",)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_weights_that_hold_code_are_not_executed(folder, tmp_path, form):
    fuse = tmp_path / "went off"
    content = {**torch.load(folder / WEIGHTS, weights_only=True), "bomb": Bomb(fuse)}
    if form == "pickle":
        (folder / WEIGHTS).write_bytes(pickle.dumps({"bomb": Bomb(fuse)}, protocol=2))
    else:
        torch.save(content, folder / WEIGHTS, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(StudyError) as refused:
        model.load(spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"
    assert not fuse.exists()
    if form != "pickle":
        torch.load(folder / WEIGHTS, weights_only=False)
        assert fuse.exists()  # it was a bomb


def test_a_patient_without_a_sequence_of_the_network_fails_alone(folder, tmp_path, make_patient, no_picture):
    make_patient(tmp_path / "in", "part", sequences=("LGE", "C0"))
    make_patient(tmp_path / "in", "whole")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(folder)]) == 1
    rows = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*/*_row.json")}
    assert rows["part"]["code"] == "E_MODEL"
    assert "T2" in rows["part"]["message"]
    assert rows["whole"]["status"] == "ok"


def test_a_network_looks_at_its_own_sequences_only(tmp_path, make_patient, no_picture):
    of = dataclasses.replace(SPECIFIED, sequences=("LGE", "bSSFP"), tissues=("blood", "myocardium", "scar"))
    folder = write(tmp_path / "model", of)
    make_patient(tmp_path / "in", "whole")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(folder)]) == 0
    sidecar = json.loads((tmp_path / "out" / "whole" / "whole_dseg.json").read_text())
    assert sidecar["method"] == "network"
    assert sidecar["sequences"] == ["LGE", "bSSFP"]
    assert [t["name"] for t in sidecar["tissues"]] == ["blood", "myocardium", "scar"]
    labels = np.asarray(nib.load(tmp_path / "out" / "whole" / "whole_dseg.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2, 4}


def test_a_model_goes_with_the_method_network_and_no_other(folder, tmp_path, make_patient, capsys):
    make_patient(tmp_path / "in", "pat")
    for options, said in (
        (["--method", "network"], "--model MODEL_DIR"),
        (["--method", "gmm", "--model", str(folder)], "--method network"),
        (["--model", str(tmp_path / "gone")], "model.json"),
        (["--model", str(folder), "--protocol", "brain"], "trained with protocol infarct"),
        (["--model", str(folder), "--network", "unet"], "--network"),
    ):
        assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
