"""Every method, and every setting of it: what each does to a fit; fields on intensities whose 0 is no signal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import heart, save
from models import TINY, specified, write
from outcomes import image_of, sidecar, study
from torch import Tensor

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.methods import endocardium
from monai_deepgmm.methods.config import Config, build
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.settings import parsed
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import bias_field, fit, mixel_model, partial_volume
from monai_deepgmm.mixture.fit import Diagnostics, Fit
from monai_deepgmm.mixture.gaussian import Mixture, m_step
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results.segment import segment
from monai_deepgmm.results.segmentation import Segmentation

BRAIN = protocol.load("brain")
SIDES = (30, 28, 6)


def shaded(*, sequences: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A volume of three tissues in patches under a ±30 % shade: image, mask, where tissues are expected."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1, 1, *SIDES, dtype=torch.float64)
    rough = torch.rand(1, 3, 10, 9, 3, generator=generator, dtype=torch.float64)
    labels = torch.nn.functional.interpolate(rough, size=SIDES).argmax(1)
    hard = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    means = torch.tensor([[200.0, 150], [300, 90], [80, 260]], dtype=torch.float64)[:, :sequences]
    image = torch.einsum("bk...,km->bm...", hard, means)
    shade = torch.linspace(0.7, 1.3, SIDES[0], dtype=torch.float64).reshape(-1, 1, 1)
    image = image * shade + 5 * torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return image, mask, 0.8 * hard + 0.2 / 3


def images(image: Tensor, mask: Tensor, start: Tensor, zero: Tensor | None) -> Images:
    visible = BRAIN.visible(("T1", "T2"))
    return Images(image, mask, start, BRAIN, visible, ("T1", "T2")[: image.shape[1]], (4.0, 4.0, 4.0), zero=zero)


def solve(given: Images, method: str | None, *settings: str) -> Fit:
    return build(protocol="brain", method=method, settings=settings).method.solve(given)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory, make_patient) -> dict[str, Study]:
    """One of each protocol: a heart whose tissues overlap, a brain under a shade."""
    folder, rng = tmp_path_factory.mktemp("patients"), np.random.default_rng(3)
    for what, path in make_patient(folder / "heart", "pat1").items():
        if what != "gd":
            data = np.asanyarray(nib.load(path).dataobj) + rng.normal(0, 70, (48, 48, 2))
            save(path, np.rint(data).astype(np.int16))
    volume, mask, _ = shaded()
    files = {s: save(folder / f"{s}.nii.gz", v.numpy()) for s, v in zip(("T1", "T2"), volume[0], strict=True)}
    brain = Study("brain", files, mask=save(folder / "mask.nii.gz", mask[0, 0].byte().numpy()))
    return {"infarct": study(folder / "heart"), "brain": brain}


#: Of each method, each field with another value than the usual.
GMM = "covariance=full start=kmeans restarts=6 tol=0.1 max_iter=1 floor=0.5 degree=2 presence=true"
DEEP = (
    "covariance=full start=kmeans start_steps=9 start_weight=3 steps=1 lr=0.05 tol=10 window=32 together=true"
    " mean_weight=100 floor=0.5 label_rule=network presence=true"
)
OTHERWISE = {
    **dict.fromkeys(("gmm", "svgmm"), GMM),
    **dict.fromkeys(("deepg", "deepsvg"), DEEP),
    "anatomy": "sigma_mm=0.5 denoise_mm=1 temper=0.9 dof=null outliers=0.1 tol=0.5 max_iter=1 presence=false "
    "perturbations=2",
    "pvgmm": "degree=0 pooling=0.9 coupling=0.5 tol=0.5 max_iter=1 floor=0.5 require_bic_gain=false",
}
CHANGES = [(method, *pair) for method, text in OTHERWISE.items() for pair in parsed(text.split()).items()]
CHANGES += [("deepg", "network", TINY | {"filters": [4, 4]})]
#: What else has to be so for a field to matter.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("gmm", "restarts"): {"start": "kmeans", "max_iter": 1},
    ("deep", "tol"): {"steps": 12, "lr": 0.02},
    ("deep", "mean_weight"): {"means": True},
    ("pvgmm", "require_bic_gain"): {"degree": 6},
}


def usual(method: str, *, means: bool = False, **settings: Any) -> Config:
    config = build(protocol="brain" if method == "pvgmm" else "infarct", method=method)
    quick = {"network": TINY, "steps": 4, "start_steps": 3} if method.startswith("deep") else {"max_iter": 30}
    settings = quick | settings
    rows = {t.name: dict.fromkeys(config.protocol.sequences, t.index / 2) for t in config.protocol.tissues}
    known = Means("infarct", config.protocol.normalisation, rows, 1) if means else None
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **settings), means=known)


def same(a: Segmentation, b: Segmentation) -> bool:
    told = ("presence", "uncertainty", "fit", "mixture")
    return np.array_equal(a.probabilities, b.probabilities) and all(a.sidecar[k] == b.sidecar[k] for k in told)


@pytest.mark.parametrize(("method", "field", "value"), CHANGES)
def test_every_setting_that_is_told_changes_the_fit(patients, method, field, value):
    (beside,) = [b for (kind, name), b in BESIDE.items() if kind in method and name == field] or [{}]
    config, other = usual(method, **beside), usual(method, **beside | {field: value})
    patient = patients[config.protocol.name]
    assert config.as_json()["settings"][field] != other.as_json()["settings"][field]
    assert not same(segment(patient, config), segment(patient, other))


@pytest.mark.parametrize("method", OTHERWISE)
def test_no_setting_is_left_out_above(method):
    fields = {f.name for f in dataclasses.fields(usual(method).method)} - {"network"}
    assert {field for of, field, _ in CHANGES if of == method} - {"network"} == fields - (
        {"presence"} if method == "pvgmm" else set()  # its protocol says of no region what it has to be
    )


@pytest.mark.parametrize("network", [False, True], ids=["anatomy", "network that asks it"])
@pytest.mark.parametrize("presence", [True, False])
def test_the_inner_border_is_found_once_for_a_fit(patients, monkeypatch, tmp_path, presence, network):
    counted, rings = [], endocardium.rings

    def counting(image, mask, anatomies, *given, **named):
        counted.append(tuple(anatomies[0].contrast))
        return rings(image, mask, anatomies, *given, **named)

    monkeypatch.setattr(endocardium, "rings", counting)
    config = usual("anatomy", presence=presence)  # the refits' borders are found along with the fit's
    if network:
        folder = write(tmp_path / "model", specified(training={"teacher": "anatomy", "label_rule": "both"}))
        config = build(model=folder, settings={"presence": presence})
    segment(patients["infarct"], config)
    assert counted == [("bSSFP",), ("T2", "bSSFP")]  # whether there is scar is asked without T2


@pytest.mark.parametrize("method", ["gmm", "svgmm", "pvgmm"])
def test_a_field_multiplies_intensities_however_they_were_normalised(method):
    """Fitted as scanned, and z-scored: the same field and fractions, and means on the scale of the image."""
    image, mask, start = shaded()
    mean, deviation = image.flatten(2).mean(-1), image.flatten(2).std(-1)
    scored = (image - mean[..., None, None, None]) / deviation[..., None, None, None]
    zeros = (torch.zeros(1, 2, dtype=torch.float64), -mean / deviation, None)
    raw, found, bare = (
        solve(images(given, mask, start, zero), method, "degree=1", "max_iter=60")
        for given, zero in zip((image, scored, image), zeros, strict=True)
    )
    assert torch.equal(raw.resp, bare.resp)
    assert (found.resp - raw.resp).abs().max() < 0.02
    assert torch.allclose(found.mixture.field, raw.mixture.field, atol=2e-3)
    assert raw.mixture.field.amax() > 1.25
    back = found.mixture.means * deviation[:, None] + mean[:, None]
    assert torch.allclose(back.double(), raw.mixture.means.double(), rtol=2e-3)


@pytest.mark.parametrize("method", ["gmm", "svgmm"])
def test_without_a_field_the_zero_does_not_matter(method):
    fits = [solve(images(*shaded(), zero), method, "max_iter=20") for zero in (None, torch.full((1, 2), 7.0))]
    assert torch.equal(fits[0].resp, fits[1].resp)
    assert torch.equal(fits[0].mixture.means, fits[1].mixture.means)
    assert fits[0].mixture.field is None


def asked_of(monkeypatch: pytest.MonkeyPatch, given: Images, *settings: str) -> mixel_model.Model:
    """The model that the method asks for."""
    seen, original = [], partial_volume.fit_partial_volume
    monkeypatch.setattr(
        partial_volume, "fit_partial_volume", lambda *some, **named: seen.append(some[-1]) or original(*some, **named)
    )
    solve(given, None, "max_iter=2", *settings)
    return seen[0]


def test_borders_are_those_of_the_protocol_by_name(monkeypatch):
    given = images(*shaded(), None)
    assert [t.name for t in given.tissues] == ["GM", "WM", "CSF"]
    assert asked_of(monkeypatch, given).borders == ((2, 0), (0, 1))
    turned = given._replace(tissues=given.tissues[::-1])
    assert asked_of(monkeypatch, turned).borders == ((0, 2), (2, 1))
    two = given._replace(tissues=given.tissues[:2], expected=given.expected[:, :2] + given.expected[:, 2:] / 2)
    assert asked_of(monkeypatch, two).borders == ((0, 1),)


@pytest.mark.parametrize(
    ("settings", "degree", "gain"),
    [([], mixel_model.DEGREE, True), (["degree=2"], 2, False), (["degree=0"], 0, None), (["n4=true"], 0, None)],
)
def test_a_field_that_is_asked_for_need_not_lower_the_bic(monkeypatch, settings, degree, gain):
    model = asked_of(monkeypatch, images(*shaded(), None), *settings, "pooling=0.3", "coupling=1.5")
    assert (model.degree, model.pooling, model.coupling) == (degree, 0.3, 1.5)
    assert gain is None or model.require_bic_gain == gain


def test_joined_fits_have_one_trace_whose_shorter_columns_repeat_their_last_value():
    def one(trace: list[float], field: float | None) -> Fit:
        b = None if field is None else torch.full((1, 1, 4), field)
        mixture = Mixture(torch.ones(1, 2) / 2, torch.ones(1, 2, 1), torch.ones(1, 2, 1, 1), b)
        column = torch.tensor(trace)[:, None]
        known = Diagnostics(column[-1], column, iterations=torch.tensor([len(trace) - 1]))
        return Fit(torch.ones(1, 2, 4) / 2, mixture, known)

    found = fit.joined([one([3.0, 2.0, 1.0], 1.5), one([5.0], 0.5)])
    assert found.diagnostics.trace.tolist() == [[3.0, 5.0], [2.0, 5.0], [1.0, 5.0]]
    assert found.diagnostics.iterations.tolist() == [2, 0]
    assert found.diagnostics.converged is None  # nobody knew
    assert found.resp.shape == (2, 2, 4)
    assert found.mixture.field[:, 0, 0].tolist() == [1.5, 0.5]
    assert fit.joined([one([1.0], None), one([1.0], None)]).mixture.field is None


@pytest.mark.parametrize("shade", ["across", "none", "follows"])
def test_a_field_that_follows_the_tissues_is_told_by_its_sequence(patients, shade):
    """A field of LGE that grows from side to side, and one of T2 that is larger in the scar."""

    def inferer(given: Images) -> Fit:
        resp = given.expected * given.mask
        across = torch.linspace(0.8, 1.2, given.image.shape[-1]).expand_as(given.image)
        step = 0.9 + 0.3 * resp[:, 3:]
        field = {"none": None, "across": across, "follows": torch.cat([across[:, :1], step, across[:, 2:]], 1)}[shade]
        mixture = m_step(given.image, resp, given.mask, covariance="diag", spatial=True)
        if field is not None:
            assert bias_field.entangled(mixture._replace(field=across), resp, given.mask)[0, 0] < 0.1
        return Fit(resp, mixture._replace(field=field))

    config = usual("svgmm")  # with the scene's noise, by which a field that follows nothing is told
    config = dataclasses.replace(config, preprocessing=dataclasses.replace(config.preprocessing, smooth_noise=False))
    made = segment(patients["infarct"], config, inferer=inferer)
    told = [w for w in made.warnings if w.startswith("W_BIAS")]
    wanted = "W_BIAS: the bias field of T2 follows the tissues; compare with --set degree=0"
    assert told == [wanted] * (shade == "follows")
    assert made.sidecar["converged"] is None  # an inferer that does not say how it went
    assert [unit.keys() for unit in made.sidecar["fit"]["units"]] == [{"slice"}] * 2


@pytest.mark.usefixtures("no_picture")
def test_slices_without_a_fit_of_their_own_have_no_field(make_patient, tmp_path: Path):
    made = make_patient(tmp_path / "in", "pat1")
    truth = heart()
    truth[..., 1] = 0
    truth[20:23, 20:23, 1] = 200
    save(made["gd"], truth)
    arguments = ["--method", "gmm", "--set", "degree=1", "max_iter=10", "--fields"]
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *arguments]) == 0
    field = np.asanyarray(image_of(tmp_path / "out", "LGE_bias").dataobj)
    assert (field[..., 1] == 1).all()
    assert (field[..., 0][truth[..., 0] > 0] != 1).any()
    assert field[..., 0][truth[..., 0] > 0].mean() == pytest.approx(1, abs=1e-4)
    told = sidecar(tmp_path / "out")
    assert told["bias"]["rule"] == "Legendre polynomials of degree 1 in the fit"
    assert any(w.startswith("W_SMALL") for w in told["warnings"])
