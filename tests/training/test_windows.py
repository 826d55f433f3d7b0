"""Volumes seen window by window: what is cut, that a network is given nothing larger, and that it all still fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import create_workflow
from monai.inferers import SimpleInferer
from torch import nn

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks import registry as networks
from monai_deepgmm.networks.model_spec import SPEC, WEIGHTS, Spec
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.phantom import brain as phantom_brain
from monai_deepgmm.phantom.brain import BrainConfig
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training import prepare as training
from monai_deepgmm.training.dataset import Examples, RandWindowd, augmentation, cropping
from monai_deepgmm.training.handlers import Clip, read_history
from monai_deepgmm.training.prepare import Settings, plan, prepare

BRAIN = protocol.load("brain")
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
SEEN, UNSEEN = ["Brain001", "Brain002"], "Brain003"
#: On a grid of 2 mm a brain of 90 mm takes 64 voxels, and a window half of them along two axes.
SETTINGS = ["grid_mm=2", "window=[32,64,32]", "windows=2", "batch_size=2", "lr=0.02"]
ASKED = ["--network", TINY, "--epochs", "2", "-q", "--protocol", "brain", "--patients", *SEEN]
VOLUME = Spec(
    protocol="brain",
    normalisation=BRAIN.normalisation,
    sequences=("T1", "T2"),
    tissues=("GM", "WM", "CSF"),
    network={"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]},
    spatial_dims=3,
    grid_mm=1.0,
    size=(64, 64, 64),
    spatial=True,
    covariance="diag",
    window=(32, 32, 32),
)
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


@pytest.fixture(scope="module")
def brains(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "brains"
    phantom_brain.write_cohort(folder, 3, seed=1, config=BrainConfig(shape=(32, 36, 32), spacing_mm=2.8))
    return folder


@pytest.fixture(scope="module")
def trained(brains, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("windows") / "model"
    assert train(brains, out) == 0
    return out


def train(brains: Path, out: Path, *more: str) -> int:
    return main(["train", str(brains), str(out), *ASKED, *more, "--set", *SETTINGS])


def asked(brains: Path, **settings: object):
    return prepare(
        cohort.find(brains, BRAIN, patients=SEEN), plan(protocol="brain", settings={"grid_mm": 2} | settings)
    )


# What is cut ---------------------------------------------------------------------------------------------------------


def example(shape: tuple[int, ...] = (20, 24, 28)) -> examples.Example:
    """Every voxel knows its own number; the mask is a block near a corner."""
    numbers = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    mask = torch.zeros(1, *shape)
    mask[:, 1:9, 2:12, 3:13] = 1
    ones = [1] * len(shape)
    return {
        "image": torch.cat([numbers, mask]),
        "mask": mask,
        "expected": torch.cat([numbers, -numbers]),
        "labels": mask * 2,
        "seen": torch.ones(2, *ones),
        "zero": torch.zeros(1, *ones),
    }


def test_a_window_is_a_block_of_every_map_around_a_voxel_of_the_mask():
    whole, cut = example(), RandWindowd((8, 8, 16))
    corners = set()
    for seed in range(30):
        cut.set_random_state(seed=seed)
        part = cut(whole)
        first = (torch.nonzero(whole["image"][0] == part["image"][0, 0, 0, 0])[0]).tolist()
        block = tuple(slice(f, f + n) for f, n in zip(first, (8, 8, 16), strict=True))
        for key in examples.MAPS:
            assert torch.equal(part[key], whole[key][:, *block])
        assert part["seen"] is whole["seen"]
        assert part["zero"] is whole["zero"]
        middle = [f + n // 2 for f, n in zip(first, (8, 8, 16), strict=True)]
        assert all(m < 9 + 4 for m in middle[:1])  # as near to the mask as the border lets it be
        assert part["mask"].sum() > 0
        corners.add(tuple(first))
    assert len(corners) > 10


def test_beside_a_window_lies_what_lies_there_and_0_beyond_the_image():
    whole = example()
    bare, wide = RandWindowd((8, 24, 8)), RandWindowd((8, 24, 8), (2, 3, 4))
    bare.set_random_state(seed=3)
    wide.set_random_state(seed=3)
    inner, outer = bare(whole), wide(whole)
    assert outer["image"].shape == (2, 12, 30, 16)
    for key in examples.MAPS:
        assert torch.equal(outer[key][:, 2:-2, 3:-3, 4:-4], inner[key])
    assert (outer["image"][:, :, :3] == 0).all()  # the window is as wide as the image there
    known = outer["image"][0] > 0
    assert known.sum() > inner["image"][0].numel()


def test_an_empty_mask_still_has_windows():
    whole = example()
    whole["mask"] = torch.zeros_like(whole["mask"])
    assert RandWindowd((8, 8, 8))(whole)["mask"].shape == (1, 8, 8, 8)


@pytest.mark.parametrize("augmented", [True, False])
def test_each_draw_depends_on_seed_epoch_and_index_alone(augmented):
    window = (16, 16, 16)
    data = [example(), example()]

    def drawn(order, epoch=1):
        dataset = Examples(data, augmentation(3, 0.0, window) if augmented else cropping(window), seed=2, windows=3)
        dataset.epoch = epoch
        assert len(dataset) == 6
        return {i: dataset[i]["image"] for i in order}

    forwards, backwards, later = drawn(range(6)), drawn([5, 4, 3, 2, 1, 0]), drawn(range(6), epoch=2)
    assert all(torch.equal(forwards[i], backwards[i]) for i in range(6))
    assert {tuple(image.shape) for image in forwards.values()} == {(2, *window)}
    assert {type(image) for image in forwards.values()} == {torch.Tensor}
    assert len({image.numpy().tobytes() for image in forwards.values()}) > 3
    assert any(not torch.equal(forwards[i], later[i]) for i in range(6))


def test_several_windows_are_drawn_from_each_example():
    data = [{"image": torch.full((1,), float(i))} for i in range(3)]
    assert [int(Examples(data, windows=2)[i]["image"]) for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_augmented_windows_are_windows():
    whole = example((40, 40, 40))
    whole["mask"] = torch.zeros_like(whole["mask"])
    whole["mask"][:, 8:32, 8:32, 8:32] = 1
    whole["expected"] = torch.full((3, 40, 40, 40), 1 / 3) * whole["mask"]
    dataset = Examples([whole], augmentation(3, 0.0, (16, 16, 16)), windows=6)
    for index in range(6):
        part = dataset[index]
        assert {k: tuple(part[k].shape[1:]) for k in examples.MAPS} == dict.fromkeys(examples.MAPS, (16, 16, 16))
        torch.testing.assert_close(part["expected"].sum(0, keepdim=True), part["mask"])
        assert set(part["labels"].unique().tolist()) <= {0, 1, 2}
        assert part["mask"].sum() > 0


# What is asked for ---------------------------------------------------------------------------------------------------


def test_volumes_have_windows_and_slices_have_none_unless_they_are_asked_for():
    def of(name, **settings):
        return plan(protocol=name, settings=settings).settings.window

    assert of("infarct") is None
    assert of("brain") == (96, 96, 96)
    assert of("brain", window=64) == of("brain", window=[64, 64, 64]) == (64, 64, 64)
    assert of("infarct", window=[32, 64]) == (32, 64)
    assert of("brain", window=0) == 0
    again = json.loads(json.dumps(plan(protocol="brain").as_json()["settings"]))
    assert of("brain", **again) == (96, 96, 96)
    assert plan(protocol="brain", settings=["window=[32,64,32]"]).settings.window == (32, 64, 32)


@pytest.mark.parametrize("window", [48, -32, [32, 0, 32], True, "large", 32.0, [], [[32]], False])
def test_windows_that_a_network_cannot_halve_are_refused(window):
    with pytest.raises(UsageError, match=r"window: got .* multiple of 32, or one for each axis; 0 for whole images"):
        Settings(window=window)


def test_windows_of_other_axes_are_refused():
    with pytest.raises(UsageError, match="window: got 2 sides, expected 3"):
        plan(protocol="brain", settings={"window": [32, 32]})
    with pytest.raises(UsageError, match="windows: got 0"):
        plan(protocol="brain", settings={"windows": 0})


def test_a_window_is_no_larger_than_the_volume_and_as_many_are_drawn_as_hold_it(brains):
    whole = asked(brains, window=0)
    assert (whole.spec.size, whole.spec.window, whole.windows) == ((64, 64, 64), None, 1)
    large = asked(brains)
    assert (large.spec.size, large.spec.window, large.windows) == ((64, 64, 64), (64, 64, 64), 1)
    small = asked(brains, window=32)
    assert (small.spec.window, small.windows) == ((32, 32, 32), 8)
    assert small.epochs == 80  # of two volumes with eight windows: four steps
    part = asked(brains, window=[32, 96, 64])
    assert (part.spec.window, part.windows) == ((32, 64, 64), 2)
    assert asked(brains, window=32, windows=5).windows == 5
    assert len({p.fingerprint for p in (whole, large, small, part)}) == 4


# What the network is given -------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A network that sees one voxel at a time, and remembers the sizes of its images."""

    def __init__(self, channels: int, tissues: int, dims: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn((tissues, channels), generator=generator)
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, image):
        self.seen.add(tuple(image.shape[2:]))
        return torch.einsum("kc,bc...->bk...", self.matrix, image)


@pytest.mark.parametrize("dims", [2, 3])
def test_windows_give_what_the_whole_gives_where_a_network_looks_at_voxels(dims):
    generator = torch.Generator().manual_seed(1)
    sides = (70, 40, 52)[:dims]
    image = torch.randn((2, 2, *sides), generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 1, *sides)
    windowed = dataclasses.replace(VOLUME, spatial_dims=dims, size=(64,) * dims, window=(32,) * dims)
    whole = dataclasses.replace(windowed, window=None)
    network = Recorded(3, 3)
    parts = model.fit(network, windowed, image, mask, spacing_mm=(1.0,) * dims)
    assert network.seen == {(32,) * dims}
    network.seen.clear()
    at_once = model.fit(network, whole, image, mask, spacing_mm=(1.0,) * dims)
    assert network.seen == {(96, 64, 64)[:dims]}
    torch.testing.assert_close(parts.resp, at_once.resp, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.mixture.means, at_once.mixture.means)


def test_a_volume_that_fits_goes_through_at_once(brains):
    image, mask = torch.randn(1, 2, 24, 24, 24), torch.ones(1, 1, 24, 24, 24)
    network = Recorded(3, 3)
    model.weights(network, VOLUME, image, mask, spacing_mm=(1.0, 1.0, 1.0))
    assert network.seen == {(32, 32, 32)}
    assert isinstance(networks.inferer(None), SimpleInferer)


def test_the_network_is_tried_with_a_window():
    whole = dataclasses.replace(VOLUME, size=(512, 512, 512))  # gigabytes, if it were tried whole
    assert model.tried(whole).training
    assert model.sides(whole) == ["32*n"] * 3
    assert whole.given == (32, 32, 32)
    assert dataclasses.replace(whole, window=None).given == (512, 512, 512)


def test_agreement_goes_by_windows(brains):
    prepared = asked(brains, window=32)
    network = Recorded(4, 3)
    assert len(training.agreement(network, prepared, device="cpu", window=prepared.spec.window)) == 3
    assert network.seen == {(32, 32, 32)}


# A specification -----------------------------------------------------------------------------------------------------


def write(folder: Path, of: Spec, **change: object) -> Path:
    (folder / WEIGHTS).parent.mkdir(parents=True)
    (folder / WEIGHTS).touch()
    (folder / SPEC).write_text(json.dumps({**json.loads(of.as_json()), **change}))
    return folder


def test_a_window_is_read_back_and_older_models_have_none(tmp_path):
    assert spec.read(write(tmp_path / "new", VOLUME), BRAIN).spec == VOLUME
    old = write(tmp_path / "old", VOLUME)
    content = json.loads((old / SPEC).read_text())
    del content["window"]
    (old / SPEC).write_text(json.dumps(content))
    assert spec.read(old, BRAIN).spec == dataclasses.replace(VOLUME, window=None)


@pytest.mark.parametrize("window", [[32, 32], [32, 32, 48], [32, 32, 0], ["32"] * 3, [], 32, True])
def test_a_window_that_no_training_writes_is_refused(tmp_path, window):
    with pytest.raises(UsageError, match=r"model\.json"):
        spec.read(write(tmp_path / "model", VOLUME, window=window), BRAIN)


# All of it -----------------------------------------------------------------------------------------------------------


def test_a_training_by_windows_segments_alike_by_the_command_and_the_bundle(brains, trained, tmp_path):
    known = spec.read(trained, BRAIN).spec
    assert (known.size, known.window) == ((64, 64, 64), (32, 64, 32))
    rows = read_history(trained / "training.tsv")
    assert len(rows) == 2
    assert rows[1]["validation_loss"] < rows[0]["validation_loss"]
    ours, theirs = tmp_path / "command", tmp_path / "bundle"
    asked = ["--model", str(trained), "--protocol", "brain", "--patients", UNSEEN]
    assert main(["segment", str(brains), str(ours), *asked]) == 0
    workflow = create_workflow(
        config_file=str(trained / "configs" / "inference.json"),
        workflow_type="infer",
        bundle_root=str(trained),
        dataset_dir=str(brains),
        output_dir=str(theirs),
        patients=[UNSEEN],
    )
    assert workflow.run() == [0]
    name = Path(UNSEEN) / f"{UNSEEN}_dseg.nii.gz"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    labels, mask = (np.asarray(nib.load(p).dataobj) for p in (ours / name, brains / UNSEEN / "mask.nii.gz"))
    assert ((labels > 0) == (mask > 0)).all()
    assert len(np.unique(labels)) > 2
    sidecar = json.loads((ours / UNSEEN / f"{UNSEEN}_dseg.json").read_text())
    assert sidecar["configuration"]["model"]["window"] == [32, 64, 32]


def test_a_training_by_windows_that_was_interrupted_is_as_if_it_had_not_been(brains, trained, tmp_path, monkeypatch):
    """Two volumes with two windows each, two in a step: the third is in the second epoch."""
    steps, clip = iter(range(100)), Clip.__call__

    def call(self, engine):
        if next(steps) == 2:
            raise KeyboardInterrupt
        clip(self, engine)

    with monkeypatch.context() as patched:
        patched.setattr(Clip, "__call__", call)
        assert train(brains, tmp_path / "model") == 130
    assert len(read_history(tmp_path / "model" / "training.tsv")) == 1
    assert train(brains, tmp_path / "model", "--resume") == 0
    for name in (str(WEIGHTS), "training.tsv", "provenance.json", SPEC):
        assert (tmp_path / "model" / name).read_bytes() == (trained / name).read_bytes(), name


def test_without_augmentation_windows_are_drawn_all_the_same(brains, tmp_path):
    assert train(brains, tmp_path / "model", "--epochs", "1", "--set", "augment=false") == 0
    assert spec.read(tmp_path / "model", BRAIN).spec.window == (32, 64, 32)
