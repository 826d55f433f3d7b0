"""Whether it could be decided that a tissue is there, or that it is not: a mixture paints all its parts in any wall.

Late enhancement decides, by the wall's brightness against the blood pool's. Without it, a healthy wall that is uneven
on T2 looks like one with a little edema: of hearts without any a quarter of the wall is painted. And where it only
just speaks against scar, a little more noise would have had it the other way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from monai_deepgmm.methods.task import Images

#: Evidence above this share of what is needed is close to it. Of 12 patients in whom nothing was found, 11 are healthy,
#: and have .68 of it at most; the other has an infarct, and .88.
CLOSE = 0.8


def undecided(images: Images, found: Collection[str]) -> Iterator[str]:
    """What could not be decided, in words.

    Args:
        images: the slices of a patient.
        found: the tissues of which there is any.
    """
    late = None if images.protocol.anatomy is None else images.protocol.anatomy.enhancement
    if late is None or not images.slices:
        return
    doubtful = [t.name for t in images.tissues if t.criteria is not None and t.name in found]
    shown = images.enhanced()
    if shown is None and doubtful:
        names = " and ".join(doubtful)
        why = "shows no bright blood" if late.sequence in images.sequences else "is absent"
        yield f"{late.sequence} {why}, so that nothing decides whether there is {names} at all"
    elif shown is not None and not shown.present and shown.found > CLOSE * late.evidence:
        evidence = f"evidence {shown.found:.2f}; {late.evidence:g} is needed"
        yield f"{late.sequence} shows {late.tissue} almost, though none was taken for it ({evidence})"
