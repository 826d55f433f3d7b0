from __future__ import annotations

import dataclasses

import pytest
import torch

from monai_deepgmm import protocol
from monai_deepgmm.methods.name_check import contradictions
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import m_step

BRAIN = protocol.load("brain")
ORDER = ("GM", "WM", "CSF")


def onion(*, contrast: dict[str, tuple[float, float, float]]) -> tuple[Fit, Images]:
    """CSF around grey around white matter, and the perfect fit to it; intensities of GM, WM, CSF in each sequence."""
    side = torch.arange(24) - 11.5
    radius = torch.stack(torch.meshgrid(side, side, side, indexing="ij")).square().sum(0).sqrt()
    layers = torch.stack([(radius >= 6) & (radius < 9), radius < 6, (radius >= 9) & (radius < 11)])[None].double()
    mask = layers.sum(1, keepdim=True)
    noise = torch.Generator().manual_seed(0)
    image = torch.stack([torch.einsum("k,kxyz->xyz", torch.tensor(v).double(), layers[0]) for v in contrast.values()])
    image = (image + 0.1 * torch.randn(image.shape, generator=noise))[None] * mask
    images = Images(image, mask, layers, BRAIN, tuple(map(BRAIN.tissue, ORDER)), tuple(contrast), (1.0, 1.0, 1.0))
    return Fit(layers, m_step(image, layers, mask)), images


def test_an_adults_brain_agrees():
    assert contradictions(*onion(contrast={"T1": (0.0, 1.0, -2.0), "T2": (0.0, -1.0, 2.0)})) == []


@pytest.mark.parametrize(
    ("contrast", "words"),
    [
        ({"T1": (0.0, -1.0, 2.0)}, "WM is darker than GM in T1"),
        ({"T1": (0.0, 1.0, -2.0), "T2": (0.0, 1.0, -2.0)}, "CSF is darker than GM in T2"),
    ],
    ids=["inverted T1", "inverted T2"],
)
def test_an_inverted_sequence_is_told_by_the_order_of_the_means(contrast, words):
    assert words in contradictions(*onion(contrast=contrast))


def test_an_infants_brain_whose_bright_tissue_lies_outside_is_told_by_depth():
    fit, images = onion(contrast={"T1": (1.0, 0.0, -2.0)})
    exchanged = fit.resp[:, [1, 0, 2]]  # the mixture calls the bright cortex white matter
    found = contradictions(Fit(exchanged, m_step(images.image, exchanged, images.mask)), images)
    assert found == ["WM lies nearer to the border than GM"]


def test_a_protocol_that_says_nothing_of_depth_is_not_asked():
    fit, images = onion(contrast={"T1": (1.0, 0.0, -2.0)})
    silent = images._replace(protocol=dataclasses.replace(BRAIN, deeper=()))
    exchanged = fit.resp[:, [1, 0, 2]]
    assert contradictions(Fit(exchanged, m_step(images.image, exchanged, images.mask)), silent) == []


def test_a_tissue_that_is_not_there_contradicts_nothing():
    fit, images = onion(contrast={"T1": (0.0, 1.0, -2.0)})
    resp = fit.resp.clone()
    resp[:, 0] += resp[:, 2]
    resp[:, 2] = 0
    assert contradictions(Fit(resp, m_step(images.image, resp, images.mask)), images) == []
