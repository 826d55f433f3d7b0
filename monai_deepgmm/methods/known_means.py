"""Known class means, μ_data (S §4.2): where a fit begins, and what a regulariser pulls towards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_deepgmm import schema
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.protocol import Protocol, Tissue


@dataclass(frozen=True)
class Means:
    """Class means of labelled patients.

    Attributes:
        protocol: the protocol's name.
        normalisation: the one they were computed with; with any other they mean nothing.
        means: tissue → sequence → value.
        n_slices: how many images they were averaged over.
    """

    protocol: str
    normalisation: str
    means: Mapping[str, Mapping[str, float]]
    n_slices: int

    def tensor(self, tissues: tuple[Tissue, ...], sequences: tuple[str, ...]) -> Tensor:
        """μ_data ``(K, M)`` of these tissues in these sequences.

        Raises:
            StudyError: ``E_MEANS``, the means lack a tissue or a sequence.
        """
        try:
            rows = [[self.means[t.name][s] for s in sequences] for t in tissues]
        except KeyError as error:
            message = f"the means have no value for {error}, which this patient's sequences show"
            raise StudyError("E_MEANS", message, "Compute the means from patients with these sequences") from error
        return torch.tensor(rows, dtype=torch.float64)

    def as_json(self) -> bytes:
        """What ``read`` reads."""
        content: dict[str, Any] = {
            "protocol": self.protocol,
            "normalisation": self.normalisation,
            "means": self.means,
            "n_slices": self.n_slices,
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read(path: Path, protocol: Protocol, preprocessing: Preprocessing) -> Means:
    """Reads μ_data.

    Raises:
        UsageError: no such file, no means in it, another protocol's or another normalisation's.
    """
    name = f"--means {path}"
    try:
        raw = schema.check(schema.parse_json(schema.read_text(path, name), name), "means")
    except UsageError as error:
        raise UsageError(f"{error}; give a file that 'deepgmm means' wrote") from error
    means = {tissue: {s: float(v) for s, v in row.items()} for tissue, row in raw["means"].items()}
    found = Means(raw["protocol"], raw["normalisation"], means, raw["n_slices"])
    for what, theirs, ours in (
        ("protocol", found.protocol, protocol.name),
        ("normalisation", found.normalisation, preprocessing.normalisation(protocol)),
    ):
        if theirs != ours:
            raise UsageError(f"--means {path}: computed with {what} {theirs}, but this run uses {ours}; compute anew")
    return found
