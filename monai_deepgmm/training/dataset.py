"""From a cohort to what a network is trained on: one example per image, on one grid and of one size.

An example is ``{"image": (M + 1, *S), "mask": (1, *S), "expected": (K, *S), "seen": (M + 1, 1, …)}``: the sequences and
the relative depth, where the mask is, where each tissue is expected, and which channels the network is shown. Nothing
in it is a label: what is expected comes from a teacher that has seen none, the protocol's signatures or the anatomical
mixture. Where it is asked for, there are two more: ``"zero": (M, 1, …)``, what no signal has become, and
``"labels": (1, *S)``, manual labels 1 … K, and 0 where none is known.

Of a volume the network is trained on windows: in each, the mixture is that of the window's own voxels, so a window
should be large enough to hold every tissue. Where one lacks a tissue, only what the teacher expects of it is left to
say so: its name is not at stake, as the network's outputs are the same in all windows.

A sequence that a patient lacks is 0 everywhere. Since it then has the same density under every component, it cancels
in every responsibility: the mixture is that of the other sequences.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Rand2DElasticd,
    Rand3DElasticd,
    RandAffined,
    RandAxisFlipd,
    RandGaussianNoised,
    Randomizable,
    RandomizableTransform,
    Transform,
)
from torch import Tensor
from torch.utils.data import Dataset

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import cropping as transforms
from monai_deepgmm.images import labels as truth
from monai_deepgmm.images import loading as scan
from monai_deepgmm.images import resampling as view
from monai_deepgmm.images.cropping import Units
from monai_deepgmm.images.loading import MIN_VOXELS_PER_TISSUE
from monai_deepgmm.methods import anatomy as anatomical
from monai_deepgmm.methods import naming as tissues
from monai_deepgmm.mixture import bounding_box as boxes
from monai_deepgmm.mixture.gaussian import m_step
from monai_deepgmm.networks.model_spec import CONTEXT, Teacher
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol

Example = dict[str, Tensor]
#: What an example holds where it is asked for.
OPTIONAL = ("zero", "labels")
#: What of an example lies on its grid, and how it is sampled.
MAPS = {"image": "bilinear", "mask": "nearest", "expected": "bilinear", "labels": "nearest"}
#: The share of a window that is cut beside it on each side, for what is turned and bent into it.
AROUND = 1 / 8


class Patient(NamedTuple):
    """One patient as far as training needs it.

    Attributes:
        name: the id.
        sequences: the names of the channels.
        units: its images.
        inputs: SHA-256 of each file, by what it holds.
        labels: manual labels (B, *S), the protocol's indices and 0, where they may be used; else None.
    """

    name: str
    sequences: tuple[str, ...]
    units: Units
    inputs: Mapping[str, str]
    labels: Tensor | None = None


def load(
    studies: Sequence[Study],
    protocol: Protocol,
    *,
    frame: int | None,
    max_voxels: int,
    incomplete: bool = False,
    labelled: Collection[str] = (),
) -> tuple[list[Patient], dict[str, StudyError]]:
    """Loads every patient that can be used, and says of the others why not.

    A network has one set of channels: that of the most patients (of equals, the larger). Who lacks one of these
    sequences is left out, or with ``incomplete`` keeps those that he has; the channels are then all that anyone has.

    Returns:
        The patients, and patient → reason.
    """
    loaded: list[Patient] = []
    failed: dict[str, StudyError] = {}
    for study in studies:
        wanted = study.patient in labelled
        try:
            found = scan.load(study, protocol, frame=frame, max_voxels=max_voxels)
            known = truth.read(study, protocol, protocol.sequences, like=found.reference) if wanted else None
        except StudyError as error:
            failed[study.patient] = error
            continue
        hashes = {name: facts["sha256"] for name, facts in found.inputs.items() if "sha256" in facts}
        units, labels = transforms.units(found, protocol), None
        if known is not None:
            labels = torch.from_numpy(units.cut(known.labels))
            hashes["labels"] = hashlib.sha256(known.labels.tobytes()).hexdigest()
        loaded.append(Patient(study.patient, found.sequences, units, hashes, labels))
    if incomplete:
        return loaded, failed
    counts = Counter(p.sequences for p in loaded)
    common = max(counts, key=lambda s: (counts[s], len(s), s), default=())
    kept = []
    for patient in loaded:
        if absent := [s for s in common if s not in patient.sequences]:
            message = f"the network is trained with {', '.join(common)}; this patient lacks {', '.join(absent)}"
            failed[patient.name] = StudyError("E_MODEL", message, "Train another network for such patients")
            continue
        channels = [patient.sequences.index(s) for s in common]
        units = patient.units._replace(image=patient.units.image[:, channels], zero=patient.units.zero[:, channels])
        kept.append(patient._replace(sequences=common, units=units))
    return kept, failed


def channels(patients: Sequence[Patient], protocol: Protocol) -> tuple[str, ...]:
    """The sequences that any of the patients has, in the protocol's order."""
    return tuple(s for s in protocol.sequences if any(s in p.sequences for p in patients))


def cohort_means(patients: Sequence[Patient], protocol: Protocol) -> Tensor:
    """μ_data ``(K, M)`` estimated without labels: each tissue's mean where its signature expects it, over all images.

    Args:
        patients: at least one, all with the same sequences.
        protocol: the tissues.
    """
    rows = []
    for patient in patients:
        expected = _expected(patient, protocol, "signature")
        rows.append(m_step(patient.units.image, expected, patient.units.mask).means)
    return torch.cat(rows).mean(0)


def make(
    patients: Sequence[Patient],
    protocol: Protocol,
    *,
    grid_mm: float,
    teacher: Teacher = "signature",
    shaded: bool = False,
    labelled: bool = False,
) -> dict[str, list[Example]]:
    """The examples of each patient, all of one size; images too small for a mixture are left out.

    Args:
        patients: at least one; their channels are those of ``channels``.
        protocol: the tissues.
        grid_mm: the voxel size of the network's grid.
        teacher: what says where tissues are expected.
        shaded: whether examples say what no signal has become, as a loss with a bias field needs.
        labelled: whether examples hold labels, as far as patients have them.
    """
    size, sequences = _size(patients, grid_mm), channels(patients, protocol)
    visible = protocol.visible(sequences)
    out: dict[str, list[Example]] = {}
    for patient in patients:
        units = patient.units
        own = [sequences.index(s) for s in patient.sequences]
        shown = torch.ones(len(sequences) + CONTEXT, *[1] * len(size))
        shown[[i for i in range(len(sequences)) if i not in own]] = 0
        given = torch.zeros(len(units.image), len(sequences), *units.image.shape[2:])
        given[:, own] = units.image.float()
        where = torch.zeros(len(given), len(visible), *given.shape[2:])
        mine = protocol.visible(patient.sequences)
        where[:, [visible.index(t) for t in mine]] = _expected(patient, protocol, teacher).float()
        seen = view.around(units.mask, units.spacing_mm, grid_mm, size)
        mask = view.look(units.mask.float(), seen, nearest=True)
        image = view.inputs(view.look(given, seen), mask, grid_mm)
        expected = normalised(view.look(where, seen), mask)
        large = mask.flatten(1).sum(1) >= MIN_VOXELS_PER_TISSUE * len(mine)
        parts = {"image": image, "mask": mask, "expected": expected, "seen": shown.expand(len(image), *shown.shape)}
        if shaded:
            zero = torch.zeros(len(image), len(sequences), *[1] * len(size))
            zero[:, own] = units.zero.reshape(len(image), len(own), *[1] * len(size)).float()
            parts["zero"] = zero
        if labelled:
            parts["labels"] = view.look(_marked(patient, protocol, sequences), seen, nearest=True) * mask
        rows = range(len(image))
        out[patient.name] = [{key: part[row] for key, part in parts.items()} for row in rows if large[row]]
    return out


def _marked(patient: Patient, protocol: Protocol, sequences: tuple[str, ...]) -> Tensor:
    """A patient's labels as 1 … K of the tissues that the sequences show ``(B, 1, *S)``; 0 where none is known."""
    marked = torch.zeros_like(patient.units.mask, dtype=torch.float32)
    if patient.labels is not None:
        shown = [t.index for t in protocol.visible(sequences)]
        for index, merged in protocol.merged(sequences).items():
            marked[:, 0][patient.labels == index] = shown.index(merged) + 1 if merged in shown else 0
    return marked


def _expected(patient: Patient, protocol: Protocol, teacher: Teacher) -> Tensor:
    """Where each tissue that this patient's sequences show is expected ``(B, K, *S)``."""
    image, mask, spacing_mm = patient.units.image, patient.units.mask, patient.units.spacing_mm
    visible, sequences = protocol.visible(patient.sequences), patient.sequences
    known = protocol.anatomy
    if teacher == "signature" or known is None:
        return tissues.signature_map(image, mask, visible, sequences, spacing_mm)
    slices = patient.units.slices
    resp = anatomical.fit(image, mask, visible, sequences, spacing_mm, known, slices=slices).resp
    taught, _ = anatomical.believed(resp, image, mask, visible, sequences, spacing_mm, known, slices=slices)
    return taught


def _size(patients: Sequence[Patient], grid_mm: float) -> tuple[int, ...]:
    """The largest view that any patient asks for."""
    sizes = [view.around(p.units.mask, p.units.spacing_mm, grid_mm).size for p in patients]
    return tuple(max(sides) for sides in zip(*sizes, strict=True))


def normalised(expected: Tensor, mask: Tensor) -> Tensor:
    """Maps that sum to 1 over K inside the mask again, and are 0 outside; where nothing is left, all are equal.

    Args:
        expected: ``(…, K, *S)``.
        mask: ``(…, 1, *S)``, with as many axes.
    """
    axis = next(i for i, (a, b) in enumerate(zip(expected.shape, mask.shape, strict=True)) if a != b)
    total = expected.sum(axis, keepdim=True)
    equal = torch.full_like(expected, 1 / expected.shape[axis])
    return torch.where(total > 1e-3, expected / total.clamp_min(1e-3), equal) * mask


# Augmentation ----------------------------------------------------------------------------------------------------


def augmentation(spatial_dims: int, drop: float = 0.0, window: Sequence[int] | None = None) -> Compose:
    """The paper's augmentations, of MONAI's transforms: flips, rotation, scaling, elastic deformation, noise (S §4.2).

    Args:
        spatial_dims: 2 or 3; a volume is turned by less than a slice, which has no upright.
        drop: the probability that one of an example's sequences is not shown to the network.
        window: what of an example is used at a time, along each axis; None: all of it.
    """
    keys, modes = tuple(MAPS), tuple(MAPS.values())
    common: dict[str, Any] = {"mode": modes, "padding_mode": "zeros", "allow_missing_keys": True}
    turn = torch.pi if spatial_dims == 2 else torch.pi / 12
    elastic = (
        Rand2DElasticd(keys, spacing=(24, 24), magnitude_range=(0.5, 1.5), prob=0.25, **common)
        if spatial_dims == 2
        else Rand3DElasticd(keys, sigma_range=(4, 6), magnitude_range=(20, 60), prob=0.25, **common)
    )
    rotate = (turn,) if spatial_dims == 2 else (turn,) * 3
    return Compose(
        [
            *([RandWindowd(window, [int(n * AROUND) for n in window])] if window else []),
            RandAxisFlipd(keys, prob=0.5, allow_missing_keys=True),
            RandAffined(keys, prob=0.8, rotate_range=rotate, scale_range=(0.15,) * spatial_dims, **common),
            elastic,
            *([CenterSpatialCropd(keys, window, allow_missing_keys=True)] if window else []),
            Tidyd(),
            RandGaussianNoised(("sequences",), prob=0.5, std=0.1),
            Joind(),
            *([RandDropd(drop)] if drop else []),
        ]
    )


def cropping(window: Sequence[int] | None) -> Compose | None:
    """What is left of the augmentation without any: the draw of a window; None where there is none."""
    return None if window is None else Compose([RandWindowd(window)])


class RandWindowd(Randomizable, Transform):
    """Cuts a window out of an example, around a voxel of the mask unless the border is in the way.

    Every voxel of the mask is as likely as another, so a window always holds some of it.

    Args:
        window: its size along each axis; at most the example's.
        around: voxels that are cut beside it on both sides of each axis; 0 where there are none. None: none.
    """

    def __init__(self, window: Sequence[int], around: Sequence[int] | None = None) -> None:
        self.window, self.around = tuple(window), tuple(around or [0] * len(window))

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """Whatever lies on the example's grid is cut alike."""
        mask = data["mask"][0]
        inside = torch.nonzero(mask.flatten()).flatten()
        drawn = int(inside[self.R.randint(len(inside))]) if len(inside) else mask.numel() // 2
        middle = [int(at) for at in torch.unravel_index(torch.tensor(drawn), mask.shape)]
        window = boxes.around(middle, self.window, mask.shape)
        wide = tuple(slice(s.start - more, s.stop + more) for s, more in zip(window, self.around, strict=True))
        cut = {key: boxes.cut(data[key][None], wide)[0] for key in MAPS if key in data}
        return {**data, **cut}


class RandDropd(RandomizableTransform):
    """Hides one of the sequences that an example shows, so that a network learns to do without; one is always left.

    Args:
        prob: how often.
    """

    def __init__(self, prob: float) -> None:
        super().__init__(prob)

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """Changes ``seen`` alone."""
        seen = data["seen"]
        there = torch.nonzero(seen.flatten()[:-CONTEXT]).flatten().tolist()
        self.randomize(None)
        if not self._do_transform or len(there) < 2:
            return dict(data)
        hidden = seen.clone()
        hidden[there[self.R.randint(len(there))]] = 0
        return {**data, "seen": hidden}


class Tidyd(Transform):
    """Repairs what interpolation did to an example, and splits its sequences from the depth, which bears no noise."""

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image``, ``mask``, ``expected`` → ``sequences``, ``depth``, ``mask``, ``expected``; the rest stays."""
        image, mask, expected = (
            torch.as_tensor(data[key]).as_subclass(Tensor) for key in ("image", "mask", "expected")
        )
        return {
            "sequences": image[:-CONTEXT],
            "depth": image[-CONTEXT:] * mask,
            "mask": mask,
            "expected": normalised(expected, mask),
            "seen": data["seen"],
            **{key: torch.as_tensor(data[key]).as_subclass(Tensor) for key in OPTIONAL if key in data},
        }


class Joind(Transform):
    """The reverse: ``sequences``, ``depth`` → ``image``."""

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """One dictionary in, one out."""
        image = torch.cat([torch.as_tensor(data["sequences"]).as_subclass(Tensor), data["depth"]])
        # What a patient lacks stays 0, whatever noise there is.
        rest = {key: value for key, value in data.items() if key not in ("sequences", "depth")}
        return {"image": image * data["seen"], **rest}


class Examples(Dataset[Example]):
    """Examples whose augmentation depends on the seed, the epoch and the index alone.

    So a training that was interrupted goes on as if it had not been, and workers and ranks draw the same.

    Args:
        data: the examples.
        transform: random, with MONAI's ``set_random_state``; None: no augmentation.
        seed: of the draws.
        windows: how many times each example is drawn from in an epoch, each time anew.
    """

    def __init__(
        self, data: Sequence[Example], transform: Compose | None = None, *, seed: int = 0, windows: int = 1
    ) -> None:
        self.data, self.transform, self.seed, self.windows = data, transform, seed, windows
        self.epoch = 1

    def __len__(self) -> int:
        """How many draws there are."""
        return len(self.data) * self.windows

    def __getitem__(self, index: int) -> Example:
        """One example, augmented; the draws from one follow each other."""
        if self.transform is None:
            return self.data[index // self.windows]
        self.transform.set_random_state(seed=_mixed(self.seed, self.epoch, index))
        out: Example = self.transform(dict(self.data[index // self.windows]))
        return out


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    generator = torch.Generator()
    state = 0
    for number in numbers:
        generator.manual_seed((state ^ number) % (1 << 63))
        state = int(torch.randint(1 << 62, (), generator=generator))
    return state % (1 << 32)


def prepare_batch(
    batch: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """What MONAI's trainers need of a batch: the network's input, and the target of ``losses.Staged``.

    Returns:
        ``(B, M + 1, *S)`` with 0 for the sequences that are not shown, and ``cat([sequences, mask, expected], 1)`` with
        all that the patient has, on a scale where 0 is no signal if the examples say what that is. If they hold labels,
        these follow as one channel, 0 … K−1 or −1: the target of ``gmm_loss.TotalLoss``.
    """
    there = {key: value.to(device, non_blocking=non_blocking) for key, value in batch.items()}
    image, sequences = there["image"], there["image"][:, :-CONTEXT]
    signal = sequences - there["zero"] if "zero" in there else sequences
    labels = [there["labels"] - 1] if "labels" in there else []
    return image * there["seen"], torch.cat([signal, there["mask"], there["expected"], *labels], 1)
