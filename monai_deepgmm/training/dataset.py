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
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import Dataset

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels, resampling
from monai_deepgmm.images.cropping import Crops
from monai_deepgmm.images.mask import MIN_VOXELS_PER_TISSUE
from monai_deepgmm.images.preparation import prepare
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import naming, region_filter
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.task import Images
from monai_deepgmm.methods.training_config import Teacher
from monai_deepgmm.mixture.gaussian import m_step
from monai_deepgmm.networks.sizes import CONTEXT
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.training.augmentation import Example, normalised


class Patient(NamedTuple):
    """One patient as far as training needs it.

    Attributes:
        name: the id.
        sequences: the names of the channels.
        crops: its images.
        inputs: SHA-256 of each file, by what it holds.
        labels: manual labels (B, *S), the protocol's indices and 0, where they may be used; else None.
    """

    name: str
    sequences: tuple[str, ...]
    crops: Crops
    inputs: Mapping[str, str]
    labels: Tensor | None = None


def load(
    studies: Sequence[Study],
    protocol: Protocol,
    preprocessing: Preprocessing,
    *,
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
    steps = preprocessing.transforms(protocol)
    for study in studies:
        try:
            scan, crops, _ = prepare(study, steps)
            wanted = study.patient in labelled
            known = labels.read(study, protocol, protocol.sequences, like=scan.reference) if wanted else None
        except StudyError as error:
            failed[study.patient] = error
            continue
        hashes = {name: facts["sha256"] for name, facts in scan.inputs.items() if "sha256" in facts}
        marked = None
        if known is not None:
            marked = torch.from_numpy(crops.cut(known.labels))
            hashes["labels"] = hashlib.sha256(known.labels.tobytes()).hexdigest()
        loaded.append(Patient(study.patient, scan.sequences, crops, hashes, marked))
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
        crops = patient.crops._replace(image=patient.crops.image[:, channels], zero=patient.crops.zero[:, channels])
        kept.append(patient._replace(sequences=common, crops=crops))
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
        expected = _expected(patient, protocol, None)
        given = (part.double() for part in (patient.crops.image, expected, patient.crops.mask))
        rows.append(m_step(*given).means)
    return torch.cat(rows).mean(0)


def make(
    patients: Sequence[Patient],
    protocol: Protocol,
    *,
    grid_mm: float,
    teacher: Teacher | None = None,
    shaded: bool = False,
    labelled: bool = False,
) -> dict[str, list[Example]]:
    """The examples of each patient, all of one size; images too small for a mixture are left out.

    Args:
        patients: at least one; their channels are those of ``channels``.
        protocol: the tissues.
        grid_mm: the voxel size of the network's grid.
        teacher: what says where tissues are expected; None: the protocol's signatures.
        shaded: whether examples say what no signal has become, as a loss with a bias field needs.
        labelled: whether examples hold labels, as far as patients have them.
    """
    size, sequences = _size(patients, grid_mm), channels(patients, protocol)
    visible = protocol.components(sequences)
    out: dict[str, list[Example]] = {}
    for patient in patients:
        crops = patient.crops
        own = [sequences.index(s) for s in patient.sequences]
        shown = torch.ones(len(sequences) + CONTEXT, *[1] * len(size))
        shown[[i for i in range(len(sequences)) if i not in own]] = 0
        given = torch.zeros(len(crops.image), len(sequences), *crops.image.shape[2:])
        given[:, own] = crops.image.float()
        where = torch.zeros(len(given), len(visible), *given.shape[2:])
        mine = protocol.components(patient.sequences)
        where[:, [visible.index(t) for t in mine]] = _expected(patient, protocol, teacher).float()
        seen = resampling.around(crops.mask, crops.spacing_mm, grid_mm, size)
        mask = resampling.look(crops.mask.float(), seen, nearest=True)
        image = resampling.inputs(resampling.look(given, seen), mask, grid_mm)
        expected = normalised(resampling.look(where, seen), mask)
        large = mask.flatten(1).sum(1) >= MIN_VOXELS_PER_TISSUE * len(mine)
        parts = {"image": image, "mask": mask, "expected": expected, "seen": shown.expand(len(image), *shown.shape)}
        if shaded:
            zero = torch.zeros(len(image), len(sequences), *[1] * len(size))
            zero[:, own] = crops.zero.reshape(len(image), len(own), *[1] * len(size)).float()
            parts["zero"] = zero
        if labelled:
            parts["labels"] = resampling.look(_marked(patient, protocol, sequences), seen, nearest=True) * mask
        rows = range(len(image))
        out[patient.name] = [{key: part[row] for key, part in parts.items()} for row in rows if large[row]]
    return out


def _marked(patient: Patient, protocol: Protocol, sequences: tuple[str, ...]) -> Tensor:
    """A patient's labels as 1 … K of the tissues that the sequences show ``(B, 1, *S)``; 0 where none is known."""
    marked = torch.zeros_like(patient.crops.mask, dtype=torch.float32)
    if patient.labels is not None:
        shown = [t.index for t in protocol.components(sequences)]
        for index, merged in protocol.merged(sequences, components=True).items():
            marked[:, 0][patient.labels == index] = shown.index(merged) + 1 if merged in shown else 0
    return marked


def _expected(patient: Patient, protocol: Protocol, teacher: Teacher | None) -> Tensor:
    """Where each tissue that this patient's sequences show is expected ``(B, K, *S)``."""
    crops, visible = patient.crops, protocol.components(patient.sequences)
    expected = naming.signature_map(crops.image, crops.mask, visible, patient.sequences, crops.spacing_mm)
    if not isinstance(teacher, AnatomicalConfig):
        return expected
    images = Images(
        crops.image, crops.mask, expected, protocol, visible, patient.sequences, crops.spacing_mm, crops.slices
    )
    images = images.with_wall()
    resp = teacher.solve(images).resp
    return region_filter.decide(resp, images)[0] if teacher.presence else resp


def _size(patients: Sequence[Patient], grid_mm: float) -> tuple[int, ...]:
    """The largest view that any patient asks for."""
    sizes = [resampling.around(p.crops.mask, p.crops.spacing_mm, grid_mm).size for p in patients]
    return tuple(max(sides) for sides in zip(*sizes, strict=True))


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
