"""What a mixture with mixels assumes besides the data."""

from __future__ import annotations

from typing import NamedTuple

from monai_deepgmm.mixture.gaussian import Mixture

#: The degree of the bias field's polynomials.
DEGREE = 3
#: β of one sequence, and of several: they say more in each voxel, and the label of a small lesion hangs on it.
COUPLING, COUPLING_SEVERAL = 8.0, 5.0
#: A sequence tells something where two tissues are so many standard deviations apart.
TELLING = 1.0


class Model(NamedTuple):
    """What is assumed besides the data.

    Attributes:
        borders: pairs of tissues that touch, and so share voxels.
        degree: of the bias field; 0: none.
        require_bic_gain: whether the field must explain more than its parameters cost (``bic_penalty``), or is dropped.
        pooling: ν; a tissue's covariance is drawn towards the average of all, as by ν N voxels of N.
        coupling: β, how strongly neighbours agree; 0: not at all; None: by the number of sequences.
        sweeps: mean-field iterations.
        voxels: how many voxels of the mask the lattice holds, at most.
        anchored: tissues whose levels and proportions the first sequence alone defines; empty: all sequences together.
    """

    borders: tuple[tuple[int, int], ...]
    degree: int = DEGREE
    require_bic_gain: bool = True
    pooling: float = 0.3
    coupling: float | None = None
    sweeps: int = 3
    voxels: int = 25_000
    anchored: tuple[int, ...] = ()

    def beta(self, pure: Mixture) -> float:
        """β, given the tissues; a sequence that cannot tell any two apart does not count."""
        if self.coupling is not None:
            return self.coupling
        return COUPLING_SEVERAL if telling(pure) > 1 else COUPLING


def telling(pure: Mixture) -> int:
    """How many sequences tell any two tissues apart."""
    apart = pure.means.amax(1) - pure.means.amin(1)
    spread = pure.covariances.diagonal(dim1=-2, dim2=-1).mean(1).sqrt()
    return int((apart > TELLING * spread).sum())
