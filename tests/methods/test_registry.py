"""Which solver fits what: intensities whose 0 is no signal for a field, borders by name, what is said of fields."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import heart, save
from torch import Tensor

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.methods import registry as solvers
from monai_deepgmm.methods.config import DEFAULT_DEGREE, build
from monai_deepgmm.methods.registry import Images
from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture import em
from monai_deepgmm.mixture import partial_volume as pvgmm
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.gaussian import Mixture
from monai_deepgmm.results.segment import _about_field

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
    return Images(image, mask, start, visible, ("T1", "T2")[: image.shape[1]], (4.0, 4.0, 4.0), zero=zero)


# Where 0 is no signal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gmm", "svgmm", "pvgmm"])
def test_a_field_multiplies_intensities_however_they_were_normalised(method):
    """Fitted as scanned, and z-scored: the same field and fractions, and means on the scale of the image."""
    image, mask, start = shaded()
    mean, deviation = image.flatten(2).mean(-1), image.flatten(2).std(-1)
    scored = (image - mean[..., None, None, None]) / deviation[..., None, None, None]
    config = build(protocol="brain", method=method, settings=["degree=1", "max_iter=60"])
    raw = solvers.solve(images(image, mask, start, torch.zeros(1, 2, dtype=torch.float64)), config)
    found = solvers.solve(images(scored, mask, start, -mean / deviation), config)
    bare = solvers.solve(images(image, mask, start, None), config)
    assert torch.equal(raw.resp, bare.resp)
    assert (found.resp - raw.resp).abs().max() < 0.02
    assert torch.allclose(found.mixture.field, raw.mixture.field, atol=2e-3)
    assert raw.mixture.field.amax() > 1.25
    back = found.mixture.means * deviation[:, None] + mean[:, None]
    assert torch.allclose(back.double(), raw.mixture.means.double(), rtol=2e-3)


@pytest.mark.parametrize("method", ["gmm", "svgmm"])
def test_without_a_field_the_zero_does_not_matter(method):
    image, mask, start = shaded()
    config = build(protocol="brain", method=method, settings=["max_iter=20"])
    fits = [solvers.solve(images(image, mask, start, zero), config) for zero in (None, torch.full((1, 2), 7.0))]
    assert torch.equal(fits[0].resp, fits[1].resp)
    assert torch.equal(fits[0].mixture.means, fits[1].mixture.means)
    assert fits[0].mixture.field is None


# Partial volume ------------------------------------------------------------------------------------------------------


def asked_of(monkeypatch: pytest.MonkeyPatch, given: Images, settings: list[str]) -> pvgmm.Model:
    """The model that the solver asks pvgmm to fit."""
    seen = []
    original = pvgmm.fit

    def fit(*arguments: object, **keywords: object) -> Fit:
        seen.append(arguments[-1])
        return original(*arguments, **keywords)

    monkeypatch.setattr(pvgmm, "fit", fit)
    solvers.solve(given, build(protocol="brain", settings=["max_iter=2", *settings]))
    return seen[0]


def test_borders_are_those_of_the_protocol_by_name(monkeypatch):
    given = images(*shaded(), None)
    assert [t.name for t in given.tissues] == ["GM", "WM", "CSF"]
    assert asked_of(monkeypatch, given, []).borders == ((2, 0), (0, 1))
    turned = given._replace(tissues=given.tissues[::-1])
    assert asked_of(monkeypatch, turned, []).borders == ((0, 2), (2, 1))
    two = given._replace(tissues=given.tissues[:2], expected=given.expected[:, :2] + given.expected[:, 2:] / 2)
    assert asked_of(monkeypatch, two, []).borders == ((0, 1),)


@pytest.mark.parametrize(
    ("settings", "degree", "proven"),
    [([], DEFAULT_DEGREE["pvgmm"], True), (["degree=2"], 2, False), (["degree=0"], 0, False), (["n4=true"], 0, True)],
)
def test_a_field_that_is_asked_for_need_not_prove_itself(monkeypatch, settings, degree, proven):
    model = asked_of(monkeypatch, images(*shaded(), None), [*settings, "pooling=0.3", "coupling=1.5"])
    assert (model.degree, model.pooling, model.coupling) == (degree, 0.3, 1.5)
    assert model.proven == proven or degree == 0


# Fits of single images, joined ----------------------------------------------------------------------------------------


def test_joined_fits_have_one_trace_whose_shorter_columns_repeat_their_last_value():
    def one(trace: list[float], field: float | None) -> Fit:
        b = None if field is None else torch.full((1, 1, 4), field)
        mixture = Mixture(torch.ones(1, 2) / 2, torch.ones(1, 2, 1), torch.ones(1, 2, 1, 1), b)
        nothing = torch.zeros(1, dtype=torch.long)
        column = torch.tensor(trace)[:, None]
        return Fit(
            torch.ones(1, 2, 4) / 2, mixture, column[-1], column, nothing + len(trace) - 1, nothing == 0, nothing,
            torch.zeros(1, 2, dtype=torch.bool),
        )  # fmt: skip

    found = em.joined([one([3.0, 2.0, 1.0], 1.5), one([5.0], 0.5)])
    assert found.trace.tolist() == [[3.0, 5.0], [2.0, 5.0], [1.0, 5.0]]
    assert found.iterations.tolist() == [2, 0]
    assert found.resp.shape == (2, 2, 4)
    assert found.mixture.field[:, 0, 0].tolist() == [1.5, 0.5]
    assert em.joined([one([1.0], None), one([1.0], None)]).mixture.field is None


# What is said of fields ----------------------------------------------------------------------------------------------


def test_a_field_that_follows_the_tissues_is_told_by_its_sequence():
    resp = torch.zeros(1, 3, 8, 8, 8)
    resp[:, 0, :4], resp[:, 1, 4:6], resp[:, 2, 6:] = 1, 1, 1
    step = torch.full((8, 8, 8), 0.8)
    step[4:] = 1.2
    across = torch.linspace(0.8, 1.2, 8).expand(8, 8, 8)
    mixture = Mixture(torch.ones(1, 3) / 3, torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.stack([across, step])[None])
    mask = torch.ones(1, 1, 8, 8, 8)
    nothing = torch.zeros(1)
    fit = Fit(resp, mixture, nothing, nothing[None], nothing, nothing == 0, nothing, torch.zeros(1, 3) > 0)
    told = _about_field(fit, images(torch.ones(1, 2, 8, 8, 8), mask, resp, None))
    assert told == ["W_BIAS: the bias field of T2 follows the tissues; compare with --set degree=0"]
    flat = fit._replace(mixture=mixture._replace(field=torch.ones(1, 2, 8, 8, 8)))
    assert _about_field(flat, images(torch.ones(1, 2, 8, 8, 8), mask, resp, None)) == []
    none = fit._replace(mixture=mixture._replace(field=None))
    assert _about_field(none, images(torch.ones(1, 2, 8, 8, 8), mask, resp, None)) == []
    assert bias.entangled(mixture, resp, mask)[0, 0] < 0.01


@pytest.mark.usefixtures("no_picture")
def test_slices_without_a_fit_of_their_own_have_no_field(make_patient, tmp_path: Path):
    made = make_patient(tmp_path / "in", "pat1")
    truth = heart()
    truth[..., 1] = 0
    truth[20:23, 20:23, 1] = 200
    save(made["gd"], truth)
    arguments = ["--method", "gmm", "--set", "degree=1", "max_iter=10", "--fields"]
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *arguments]) == 0
    place = tmp_path / "out" / "pat1"
    field = np.asanyarray(nib.load(place / "pat1_LGE_bias.nii.gz").dataobj)
    assert (field[..., 1] == 1).all()
    assert (field[..., 0][truth[..., 0] > 0] != 1).any()
    assert field[..., 0][truth[..., 0] > 0].mean() == pytest.approx(1, abs=1e-4)
    told = json.loads((place / "pat1_dseg.json").read_text())
    assert told["bias"]["rule"] == "Legendre polynomials of degree 1 in the fit"
    assert any(w.startswith("W_SMALL") for w in told["warnings"])
