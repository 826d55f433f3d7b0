"""A trained network as a solver: what it is read from, what it refuses, and what it gives in place of EM."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, specified, write
from outcomes import labels_of, row, sidecar
from torch import Tensor

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import resampling
from monai_deepgmm.methods import model_spec, trained_network
from monai_deepgmm.methods.config import build
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS, ModelSpec
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, e_step, m_step, nll
from monai_deepgmm.mixture.steps import variance_inside

INFARCT = protocol.load("infarct")
SPECIFIED = specified()
MM = (1.0, 1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture(scope="module")
def network():
    return trained_network.build(SPECIFIED, seed=1).eval()


@pytest.fixture(scope="module")
def scan() -> tuple[Tensor, Tensor]:
    """Two images (float64) with a disc for a mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 3, 40, 44), generator=generator, dtype=torch.float64)
    x, y = torch.meshgrid(torch.arange(40), torch.arange(44), indexing="ij")
    disc = ((x - 20) ** 2 + (y - 22) ** 2 < 12**2).double()
    return image, disc.expand(2, 1, 40, 44).clone()


def fit(network: torch.nn.Module, image: Tensor, mask: Tensor, of: ModelSpec = SPECIFIED, **options) -> Fit:
    return trained_network.apply_network(network, of, image, mask, spacing_mm=MM, **options)


def weights(network: torch.nn.Module, image: Tensor, mask: Tensor, of: ModelSpec = SPECIFIED) -> Tensor:
    return trained_network.weights(network, of, image, mask, spacing_mm=MM)


def test_weights_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained_network.build(SPECIFIED, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (trained_network.build(SPECIFIED, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    wanted = {**TINY, "spatial_dims": 2, "in_channels": 4, "out_channels": 4}
    assert trained_network.complete(SPECIFIED) == wanted  # the network is described in full
    assert SPECIFIED.channels == 4


@pytest.mark.skipif(find_spec("einops") is None, reason="needs einops")
def test_a_network_for_images_of_one_size_sees_smaller_patients_on_it_and_larger_ones_by_windows():
    unetr = {"_target_": "unetr", "hidden_size": 12, "mlp_dim": 12, "feature_size": 2}
    of = dataclasses.replace(SPECIFIED, network=unetr, size=(64, 32))
    network = trained_network.build(of).eval()
    small, large = (torch.zeros(1, 1, 80, 40) for _ in range(2))
    small[:, :, 10:30, 10:30] = large[:, :, 8:72, 10:30] = 1
    sizes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
    for mask, passes in ((small, 1), (large, 2)):  # the large one needs 96 rows
        sizes.clear()
        found = weights(network, torch.randn(1, 3, 80, 40), mask, of)
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
    assert trained_network.tried(of).training


def test_a_model_is_read_back_as_it_was_written_and_told_by_its_files(folder, tmp_path):
    reference = model_spec.read(folder, INFARCT)
    assert reference.spec == SPECIFIED
    loaded = trained_network.load(reference, "cpu")
    assert not loaded.training
    saved = torch.load(folder / WEIGHTS, weights_only=True)
    assert all(torch.equal(v, saved[k]) for k, v in loaded.state_dict().items())
    rule = specified(training={"label_rule": "network"})
    written = write(tmp_path / "same"), write(tmp_path / "seed", seed=1), write(tmp_path / "rule", rule)
    hashes = [model_spec.read(other, INFARCT).sha256 for other in written]
    assert [h == reference.sha256 for h in hashes] == [True, False, False]
    assert "folder" not in reference.as_json()
    assert str(tmp_path) not in json.dumps(reference.as_json(), default=list)


@pytest.mark.parametrize("spacing_mm", [MM, (0.75, 0.75), (1.7, 1.3)])
def test_weights_on_the_images_own_grid_sum_to_1(network, scan, spacing_mm):
    image, mask = scan
    w = trained_network.weights(network, SPECIFIED, image, mask, spacing_mm=spacing_mm)
    assert w.shape == (2, 4, 40, 44)
    assert w.dtype == image.dtype
    assert w.min() >= 0
    torch.testing.assert_close(w.sum(1), torch.ones(2, 40, 44, dtype=w.dtype))
    assert not w.requires_grad


def test_on_the_networks_own_grid_nothing_is_interpolated(network, scan):
    image, mask = scan
    w = weights(network, image, mask)
    seen = resampling.around(mask, MM, 1.0, SPECIFIED.size)
    inside = resampling.look(mask.float(), seen, nearest=True)
    given = resampling.inputs(resampling.look(image.float(), seen), inside, 1.0)
    with torch.no_grad():
        direct = network(given).softmax(1)
    first = (seen.centre - (torch.tensor(seen.size) - 1) / 2)[0].round().long().tolist()
    rows, columns = (slice(max(f, 0), min(f + n, s)) for f, n, s in zip(first, seen.size, (40, 44), strict=True))
    shifted = tuple(slice(s.start - f, s.stop - f) for s, f in zip((rows, columns), first, strict=True))
    inside = mask[:, :, rows, columns]
    expected = direct[:, :, shifted[0], shifted[1]].double() * inside
    torch.testing.assert_close(w[:, :, rows, columns] * inside, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["deepg", "deepsvg"])
def test_the_fit_is_one_m_step_from_the_output(network, scan, method):
    image, mask = scan
    w = weights(network, image, mask) * mask
    floor = VARIANCE_FLOOR * variance_inside(image.flatten(2), mask.flatten(2))
    expected = m_step(image, w, mask, covariance="diag", spatial=method == "deepsvg", floor=floor)
    found = fit(network, image, mask, specified(method=method))
    for mine, wanted in zip(found.mixture[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.diagnostics.nll, nll(image, mask, expected), rtol=1e-9, atol=0)
    by_hand = (w[0, 2] * image[0, 1]).sum() / w[0, 2].sum()
    torch.testing.assert_close(found.mixture.means[0, 2, 1], by_hand)
    known = found.diagnostics
    assert known.nll.shape == (2,)
    assert (known.trace, known.iterations, known.converged, known.reseeded) == (None,) * 4  # nothing was iterated


def test_the_rule_says_whether_the_label_is_of_the_posterior_or_of_the_network(network, scan):
    image, mask = scan
    w = weights(network, image, mask) * mask
    posterior = e_step(image, mask, m_step(image, w, mask, covariance="diag", spatial=True))
    assert not torch.equal(w, posterior)
    for rule, expected in ((False, w), (True, posterior)):
        found = fit(network, image, mask, posterior=rule).resp
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # of a floor of 1e-6
        torch.testing.assert_close(found.sum(1, keepdim=True), mask)


@pytest.mark.parametrize("trained_for", ["posterior", "network", "both"])
def test_the_method_takes_the_rule_and_the_criteria_of_the_training_unless_asked(tmp_path, trained_for):
    of = specified(training={"label_rule": trained_for, "teacher": "anatomy"})
    folder = write(tmp_path / "model", of)
    for settings, told in (
        ([], {"label_rule": trained_for, "presence": True}),
        (["label_rule=network", "presence=false"], {"label_rule": "network", "presence": False}),
    ):
        built = build(model=folder, settings=settings)
        assert built.as_json()["settings"] == told
        assert built.presence == told["presence"]
    plain = write(tmp_path / "plain", specified(training={"label_rule": trained_for}))
    assert not build(model=plain).presence


def test_images_do_not_depend_on_each_other(network, scan):
    """However far their neighbours' masks reach: an instance norm counts the surroundings."""
    image, mask = scan
    mask = mask.clone()
    mask[1, :, :30] = 0
    image, mask = (torch.nn.functional.pad(t, (60, 0)) for t in (image, mask))
    mask[0, :, 20] = 1  # 104 pixels from end to end: more than the training's images have
    order = [1, 1, 0, 1]  # the first two go through the network together
    alone = [fit(network, image[[i]], mask[[i]]).resp for i in order]
    torch.testing.assert_close(fit(network, image[order], mask[order]).resp, torch.cat(alone), rtol=0, atol=1e-6)


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
    weights(network := Sizes(), image, mask)
    assert network.seen == [(64, 64), (64, 128)]  # 104 pixels and twice the margin of 4
    volume = dataclasses.replace(SPECIFIED, spatial_dims=3, size=(32, 64, 64))
    cube = torch.zeros(2, 1, 20, 20, 40)
    cube[:, :, 5:15, 5:15, 5:15] = 1
    cube[1, :, 10, 10] = 1
    both = torch.zeros(2, 3, 20, 20, 40)
    trained_network.weights(network := Sizes(), volume, both, cube, spacing_mm=(1.0, 1.0, 2.0))
    assert network.seen == [(32, 64, 64), (32, 64, 96)]  # 40 slices of 2 mm


class Odd(Sizes):
    def forward(self, image):
        raise KeyError


class Nowhere(Sizes):
    def forward(self, image):
        return super().forward(image) + torch.nan


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Sizes(3), r"shape \(2, 3, 64, 64\), expected \(2, 4, 64, 64\)"),  # both slices at once
        (Odd(), "64×64 voxels \\(KeyError\\)"),
        (Nowhere(), "not finite"),
    ],
)
def test_a_network_that_cannot_be_run_says_so(scan, made, said):
    with pytest.raises(StudyError, match=said) as refused:
        fit(made, *scan)
    assert refused.value.code == "E_MODEL"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[" * 100000, '{"sequences": [], "tissues": [], "new": 1}'])
def test_a_specification_that_cannot_be_read_is_refused(folder, text):
    (folder / SPEC).write_text(text) if text is not None else (folder / WEIGHTS).unlink()
    said = r"model\.json was not written by this version" if text is not None else r"model\.pt.*deepgmm train"
    with pytest.raises(UsageError, match=said):
        model_spec.read(folder, INFARCT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": "brain"}, "trained with protocol brain, but this run uses infarct"),
        ({"normalisation": "zscore-slice-mask"}, "trained with normalisation zscore-slice-mask"),
        ({"sequences": ["LGE", "T1", "bSSFP"]}, "sequences: got .* expected some of LGE, T2, bSSFP, in this order"),
        *(({"sequences": bad}, "sequences") for bad in (["T2", "LGE", "bSSFP"], ["LGE", "LGE", "T2", "bSSFP"], [])),
        ({"sequences": ["LGE", "bSSFP"]}, "tissues: got .* expected blood, myocardium, scar, which"),
        ({"tissues": ["myocardium", "blood", "edema", "scar"]}, "tissues"),
        *(({"tissues": bad}, "tissues") for bad in (["a", "b", "c", "d"], [{}, 1, None, "scar"])),
        ({"network": "unet"}, "network: got 'unet', expected a mapping with _target_"),
        ({"network": {"_target_": 3}}, "network"),
        ({"spatial_dims": 3, "size": [64, 64, 64]}, "spatial_dims: got 3, expected 2"),
        ({"spatial_dims": True}, "spatial_dims"),
        *(({"size": bad}, "size: got .* expected 2 multiples of 32") for bad in ([64], [64, 48], [64, 0], [64, "64"])),
        ({"window": [64, 48]}, "window: got .* expected 2 multiples of 32, or nothing"),
        ({"training.label_rule": "guess"}, "label_rule: 'guess' is unknown; choose one of posterior, network, both"),
        ({"training.label_rule": ["posterior"]}, "label_rule"),
        ({"training.label_rule": None}, "training: got .* expected settings as a training of this protocol leaves"),
        ({"training.grid_mm": "1"}, "grid_mm: got '1', expected a number"),
        ({"training.grid_mm": float("nan")}, "NaN is no number"),
        ({"training.grid_mm": 10**400}, "grid_mm"),
        ({"size": [1 << 20, 1 << 20]}, "size: got"),
        ({"training.grid_mm": 0}, "grid_mm from 0.01 to 100"),
        ({"training.covariance": "round"}, "covariance: 'round' is unknown; choose one of diag"),
        ({"training.covariance": ["diag"]}, "covariance"),
        *(({"training.teacher": bad}, "was not written by this version") for bad in ({"name": "me"}, None)),
        ({"training.preprocessing": {"n4": True}}, "trained with normalisation .*, but this run uses .*-n4"),
    ],
)
def test_a_model_for_something_else_is_refused(folder, change, said):
    raw = json.loads((folder / SPEC).read_text())
    for key, value in change.items():
        outer, _, inner = key.rpartition(".")
        (raw[outer] if outer else raw)[inner] = value
    (folder / SPEC).write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=said):
        model_spec.read(folder, INFARCT)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    weight = next(iter(torch.load(folder / WEIGHTS, weights_only=True).values()))
    data[data.index(weight.numpy().tobytes())] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    torch.load(folder / WEIGHTS, weights_only=True)  # torch itself does not notice


def take_anothers(folder: Path) -> None:
    other = trained_network.build(specified(sequences=("LGE", "bSSFP")))
    torch.save(other.state_dict(), folder / WEIGHTS)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def made_from(target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SPEC).write_bytes(specified(network={"_target_": target}).as_json())


def grow(folder: Path) -> None:
    """A network of a gigabyte, in a folder of kilobytes."""
    raw = json.loads((folder / SPEC).read_text())
    raw["network"]["filters"] = [4096, 4096]
    (folder / SPEC).write_text(json.dumps(raw))


def compress(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part + bytes(1 << 20) * name.endswith("/0"))


def stretch(folder: Path) -> None:
    state = torch.load(folder / WEIGHTS, weights_only=True)
    torch.save(state | {"more": torch.zeros(1).expand(1 << 40)}, folder / WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (rewritten(lambda data: data[: len(data) // 2]), r"model\.pt cannot be used"),
    "scrambled": (rewritten(lambda data: data[:100] + data[:100:-1]), r"model\.pt cannot be used"),
    "text": (rewritten(lambda data: b"<html>404</html>"), r"model\.pt cannot be used"),
    "empty": (rewritten(lambda data: b""), r"model\.pt cannot be used"),
    "a flipped bit": (flip_a_bit, r"model\.pt cannot be used \(the checksum"),
    "another network's": (take_anothers, r"model\.pt cannot be used"),
    "compressed": (compress, r"model\.pt cannot be used \(it is compressed"),
    "of no stride": (stretch, r"model\.pt cannot be used \(its tensors would have \d+ bytes"),
    "too small a file": (grow, r"model\.pt cannot be used \(the network has \d+ weights, but the file holds"),
    "an unfinished network": (made_from("monai.networks.nets.DynUNet"), r"model\.json cannot be used"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_an_error_with_a_code(folder, kind):
    damage, said = DAMAGE[kind]
    damage(folder)
    with pytest.raises(StudyError, match=said) as refused:
        trained_network.load(model_spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"


def test_a_damaged_model_fails_every_patient_and_tells_no_path(folder, tmp_path, make_patient, no_picture):
    DAMAGE["torn"][0](folder)
    make_patient(tmp_path / "in", "pat1")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(folder)]) == 3
    failed = row(tmp_path / "out")
    assert (failed["code"], "model.pt" in failed["message"]) == ("E_MODEL", True)
    assert str(tmp_path) not in failed["message"]
    assert not list((tmp_path / "out").rglob("*_dseg.nii.gz"))


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
        trained_network.load(model_spec.read(folder, INFARCT), "cpu")
    assert refused.value.code == "E_MODEL"
    assert not fuse.exists()
    if form != "pickle":
        torch.load(folder / WEIGHTS, weights_only=False)
        assert fuse.exists()  # it was a bomb


@pytest.mark.parametrize("sequences", [INFARCT.sequences, ("LGE", "bSSFP")], ids="+".join)
def test_a_network_looks_at_its_own_sequences_only(tmp_path, make_patient, no_picture, sequences):
    """A patient who lacks one of them fails alone."""
    folder, out = write(tmp_path / "model", specified(sequences=sequences)), tmp_path / "out"
    make_patient(tmp_path / "in", "part", sequences=("LGE", "C0"))
    make_patient(tmp_path / "in", "whole")
    part = "T2" not in sequences
    assert main(["segment", str(tmp_path / "in"), str(out), "--model", str(folder)]) == 1 - part
    assert (row(out, "part")["code"], row(out, "whole")["status"]) == ("" if part else "E_MODEL", "ok")
    assert part or "T2" in row(out, "part")["message"]
    told = sidecar(out, "whole")
    assert (told["method"], told["sequences"], told["converged"]) == ("network", list(sequences), None)
    assert [t["name"] for t in told["tissues"]] == [t.name for t in INFARCT.visible(sequences)]
    assert told["configuration"]["model"]["training"]["teacher"] == {"name": "signature"}
    assert [unit.keys() for unit in told["fit"]["units"]] == [{"slice", "nll"}] * 2
    assert set(np.unique(labels_of(out, "whole"))) <= {0, *(t["index"] for t in told["tissues"])}


def test_a_model_goes_with_the_method_network_and_no_other(folder, tmp_path, make_patient, capsys):
    make_patient(tmp_path / "in", "pat")
    for options, said in (
        (["--method", "network"], "--model MODEL_DIR"),
        (["--method", "gmm", "--model", str(folder)], "--method gmm takes no trained network"),
        (["--model", str(tmp_path / "gone")], "model.json"),
        (["--model", str(folder), "--protocol", "brain"], "trained with protocol infarct"),
        (["--model", str(folder), "--network", "unet"], "--network"),
    ):
        assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
