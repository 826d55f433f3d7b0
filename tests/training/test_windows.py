"""Volumes seen window by window: what is cut, that a network is given nothing larger, and that it all still fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from scenes import BRAIN, QUIET, TINY, inference, labels, sidecar, stop_at
from torch import nn

from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import model_spec, trained_network
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS, ModelSpec
from monai_deepgmm.methods.training_config import TrainingConfig, configure
from monai_deepgmm.networks import registry
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom import brain
from monai_deepgmm.training.augmentation import MAPS, Example, RandWindowd, augmentation, cropping
from monai_deepgmm.training.dataset import Examples
from monai_deepgmm.training.handlers import read_history
from monai_deepgmm.training.plan import plan
from monai_deepgmm.training.prepare import agreement, prepare_cohort

SEEN, UNSEEN = ["Brain001", "Brain002"], "Brain003"
#: On a grid of 2 mm a brain of 90 mm takes 64 voxels, and a window half of them along two axes.
SETTINGS = ["grid_mm=2", "window=[32,64,32]", "windows=2", "batch_size=2", "lr=0.02"]
ASKED = ["--network", TINY, "--epochs", "2", "-q", "--protocol", "brain", "--patients", *SEEN]
VOLUME = ModelSpec(
    protocol="brain",
    normalisation=BRAIN.normalisation,
    sequences=("T1", "T2"),
    tissues=("GM", "WM", "CSF"),
    network={"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]},
    spatial_dims=3,
    size=(64, 64, 64),
    training=configure({}, BRAIN),
    window=(32, 32, 32),
)
pytestmark = pytest.mark.filterwarnings(QUIET)


@pytest.fixture(scope="module")
def brains(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "brains"
    brain.write_cohort(folder, 3, seed=1, config=brain.BrainConfig(shape=(32, 36, 32), spacing_mm=2.8))
    return folder


@pytest.fixture(scope="module")
def trained(brains, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("windows") / "model"
    assert train(brains, out) == 0
    return out


def train(brains: Path, out: Path, *more: str) -> int:
    return main(["train", str(brains), str(out), *ASKED, *more, "--set", *SETTINGS])


def asked(brains: Path, **settings: object):
    found = discovery.find(brains, BRAIN, patients=SEEN)
    return prepare_cohort(found, plan(protocol="brain", settings={"grid_mm": 2} | settings))


def example(shape: tuple[int, ...] = (20, 24, 28)) -> Example:
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
        assert all(torch.equal(part[key], whole[key][:, *block]) for key in MAPS)
        assert part["seen"] is whole["seen"]
        assert part["zero"] is whole["zero"]
        assert first[0] + 4 < 9 + 4  # as near to the mask as the border lets it be
        assert part["mask"].sum() > 0
        corners.add(tuple(first))
    assert len(corners) > 10
    whole["mask"] = torch.zeros_like(whole["mask"])
    assert cut(whole)["mask"].shape == (1, 8, 8, 16)  # an empty mask still has windows


def test_beside_a_window_lies_what_lies_there_and_0_beyond_the_image():
    whole = example()
    bare, wide = RandWindowd((8, 24, 8)), RandWindowd((8, 24, 8), (2, 3, 4))
    inner, outer = (cut.set_random_state(seed=3)(whole) for cut in (bare, wide))
    assert outer["image"].shape == (2, 12, 30, 16)
    assert all(torch.equal(outer[key][:, 2:-2, 3:-3, 4:-4], inner[key]) for key in MAPS)
    assert (outer["image"][:, :, :3] == 0).all()  # the window is as wide as the image there
    assert (outer["image"][0] > 0).sum() > inner["image"][0].numel()


@pytest.mark.parametrize("augmented", [True, False])
def test_each_draw_depends_on_seed_epoch_and_index_alone(augmented):
    window, data = (16, 16, 16), [example(), example()]

    def drawn(order, epoch=1):
        dataset = Examples(data, augmentation(3, 0.0, window) if augmented else cropping(window), seed=2, windows=3)
        dataset.epoch = epoch
        assert len(dataset) == 6
        return {i: dataset[i]["image"] for i in order}

    forwards, backwards, later = drawn(range(6)), drawn([5, 4, 3, 2, 1, 0]), drawn(range(6), epoch=2)
    assert all(torch.equal(forwards[i], backwards[i]) for i in range(6))
    assert {(type(image), tuple(image.shape)) for image in forwards.values()} == {(torch.Tensor, (2, *window))}
    assert len({image.numpy().tobytes() for image in forwards.values()}) > 3
    part = Examples([example((40, 40, 40))], augmentation(3, 0.0, window) if augmented else cropping(window))[0]
    assert {k: tuple(part[k].shape[1:]) for k in MAPS} == dict.fromkeys(MAPS, window)
    assert set(part["labels"].unique().tolist()) <= {0, 1, 2}
    assert part["mask"].sum() > 0
    if augmented:
        torch.testing.assert_close(part["expected"].sum(0, keepdim=True), part["mask"])
    assert any(not torch.equal(forwards[i], later[i]) for i in range(6))
    several = [{"image": torch.full((1,), float(i))} for i in range(3)]
    assert [int(Examples(several, windows=2)[i]["image"]) for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_volumes_have_windows_and_slices_have_none_unless_they_are_asked_for():
    def of(name, given=()):
        return plan(protocol=name, settings=given).training.window

    assert of("infarct") is None
    assert of("brain") == (96, 96, 96)
    assert of("brain", {"window": 64}) == of("brain", {"window": [64, 64, 64]}) == (64, 64, 64)
    assert of("infarct", {"window": [32, 64]}) == (32, 64)
    assert of("brain", {"window": 0}) == 0
    assert of("brain", ["window=[32,64,32]"]) == (32, 64, 32)
    again = json.loads(json.dumps(plan(protocol="brain").as_json()["training"]))
    assert of("brain", {k: v for k, v in again.items() if k not in ("method", "loss")}) == (96, 96, 96)


@pytest.mark.parametrize("window", [48, -32, [32, 0, 32], True, "large", 32.0, [], [[32]], False])
def test_windows_that_a_network_cannot_halve_are_refused(window):
    with pytest.raises(UsageError, match=r"window: got .* multiple of 32, or one for each axis; 0 for whole images"):
        TrainingConfig(window=window)
    for settings, said in (({"window": [32, 32]}, "got 2 sides, expected 3"), ({"windows": 0}, "windows: got 0")):
        with pytest.raises(UsageError, match=said):
            plan(protocol="brain", settings=settings)


def test_a_window_is_no_larger_than_the_volume_and_as_many_are_drawn_as_hold_it(brains):
    wanted = {0: (None, 1), None: ((64, 64, 64), 1), 32: ((32, 32, 32), 8), (32, 96, 64): ((32, 64, 64), 2)}
    made = {window: asked(brains, window=window) for window in wanted}
    assert {window: (m.spec.window, m.windows) for window, m in made.items()} == wanted
    assert {m.spec.size for m in made.values()} == {(64, 64, 64)}
    assert made[32].epochs == 80  # of two volumes with eight windows: four steps
    assert asked(brains, window=32, windows=5).windows == 5
    assert len({m.fingerprint for m in made.values()}) == 4


class Recorded(nn.Module):
    """A network that sees one voxel at a time, and remembers the sizes of its images."""

    def __init__(self, channels: int, tissues: int) -> None:
        super().__init__()
        self.matrix = torch.randn((tissues, channels), generator=torch.Generator().manual_seed(0))
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, image):
        self.seen.add(tuple(image.shape[2:]))
        return torch.einsum("kc,bc...->bk...", self.matrix, image)


@pytest.mark.parametrize("dims", [2, 3])
def test_windows_give_what_the_whole_gives_where_a_network_looks_at_voxels(dims):
    generator, sides = torch.Generator().manual_seed(1), (70, 40, 52)[:dims]
    image, mask = torch.randn((2, 2, *sides), generator=generator, dtype=torch.float64), torch.ones(2, 1, *sides)
    windowed = dataclasses.replace(VOLUME, spatial_dims=dims, size=(64,) * dims, window=(32,) * dims)
    networks, fits = [Recorded(3, 3), Recorded(3, 3)], []
    for network, spec in zip(networks, (windowed, dataclasses.replace(windowed, window=None)), strict=True):
        fits.append(trained_network.apply_network(network, spec, image, mask, spacing_mm=(1.0,) * dims))
    assert [network.seen for network in networks] == [{(32,) * dims}, {(96, 64, 64)[:dims]}]
    torch.testing.assert_close(fits[0].resp, fits[1].resp, rtol=0, atol=1e-5)
    torch.testing.assert_close(fits[0].mixture.means, fits[1].mixture.means)


def test_a_network_is_given_no_more_than_a_window(brains):
    network = Recorded(3, 3)
    image, mask = torch.randn(1, 2, 24, 24, 24), torch.ones(1, 1, 24, 24, 24)
    trained_network.weights(network, VOLUME, image, mask, spacing_mm=(1.0, 1.0, 1.0))
    assert network.seen == {(32, 32, 32)}
    assert isinstance(registry.inferer(None), SimpleInferer)
    whole = dataclasses.replace(VOLUME, size=(512, 512, 512))  # gigabytes, if it were tried whole
    assert trained_network.tried(whole).training
    assert trained_network.sides(whole) == ["32*n"] * 3
    prepared, network = asked(brains, window=32), Recorded(4, 3)
    assert len(agreement(network, prepared, device="cpu", window=prepared.spec.window)) == 3
    assert network.seen == {(32, 32, 32)}


def write(folder: Path, **change: object) -> Path:
    (folder / WEIGHTS).parent.mkdir(parents=True)
    (folder / WEIGHTS).touch()
    content = {**json.loads(VOLUME.as_json()), **change}
    (folder / SPEC).write_text(json.dumps({k: v for k, v in content.items() if v != "left out"}))
    return folder


def test_a_window_is_read_back_others_have_none_and_what_no_training_writes_is_refused(tmp_path):
    assert model_spec.read(write(tmp_path / "new"), BRAIN).spec == VOLUME
    without = model_spec.read(write(tmp_path / "old", window="left out"), BRAIN).spec
    assert without == dataclasses.replace(VOLUME, window=None)
    for number, window in enumerate(([32, 32], [32, 32, 48], [32, 32, 0], ["32"] * 3, [], 32, True)):
        with pytest.raises(UsageError, match=r"model\.json"):
            model_spec.read(write(tmp_path / str(number), window=window), BRAIN)


def test_a_training_by_windows_segments_alike_by_the_command_and_the_bundle(brains, trained, tmp_path):
    known = model_spec.read(trained, BRAIN).spec
    assert (known.size, known.window) == ((64, 64, 64), (32, 64, 32))
    first, last = (row["validation_loss"] for row in read_history(trained / "training.tsv"))
    assert last < first
    parser = ConfigParser(json.loads((trained / "configs" / "train.json").read_text()))
    parser.update({"bundle_root": str(trained), "dataset_dir": str(brains), "patients": SEEN, "set#augment": False})
    drawn = parser.get_parsed_content("train#dataset")  # without augmentation windows are drawn all the same
    assert drawn[0]["image"].shape[1:] == (32, 64, 32)
    ours, theirs = tmp_path / "command", tmp_path / "bundle"
    chosen = ["--model", str(trained), "--protocol", "brain", "--patients", UNSEEN]
    assert main(["segment", str(brains), str(ours), *chosen]) == 0
    config = trained / "configs" / "inference.json"
    workflow = inference(config, bundle_root=trained, dataset_dir=brains, output_dir=theirs, patients=[UNSEEN])
    assert workflow.run() == [0]
    name = Path(UNSEEN) / f"{UNSEEN}_dseg.nii.gz"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    found, mask = labels(ours, UNSEEN), np.asarray(nib.load(brains / UNSEEN / "mask.nii.gz").dataobj)
    assert ((found > 0) == (mask > 0)).all()
    assert len(np.unique(found)) > 2
    assert sidecar(ours, UNSEEN)["configuration"]["model"]["window"] == [32, 64, 32]


def test_a_training_by_windows_that_was_interrupted_is_as_if_it_had_not_been(brains, trained, tmp_path, monkeypatch):
    """Two volumes with two windows each, two in a step: the third is in the second epoch."""
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert train(brains, tmp_path / "model") == 130
    assert len(read_history(tmp_path / "model" / "training.tsv")) == 1
    assert train(brains, tmp_path / "model", "--resume") == 0
    for name in (str(WEIGHTS), "training.tsv", "provenance.json", SPEC):
        assert (tmp_path / "model" / name).read_bytes() == (trained / name).read_bytes(), name
