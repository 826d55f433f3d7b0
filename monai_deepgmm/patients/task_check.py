"""Whether a folder holds what a protocol looks for, or the sequences of another kind of examination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import dataset_json
from monai_deepgmm.patients import layout as layouts
from monai_deepgmm.patients.claims import Found
from monai_deepgmm.patients.directory import READABLE, Tree
from monai_deepgmm.patients.formats import foreign
from monai_deepgmm.protocol import Protocol


def sequences_by_name(tree: Tree) -> Counter[str]:
    """The sequences, of any protocol, that the names of images tell → how many files of each."""
    folder = layouts.load("folder")
    found: Counter[str] = Counter()
    everyone = {s for name in protocols.names() for s in protocols.load(name).sequences}
    reader = layouts.Reader(folder, folder.aliases(protocols.load("infarct")), {}, (), (), ())
    for name in tree.files:
        other = None if READABLE.search(name) else foreign(name)
        if layouts.in_results(name) or not (READABLE.search(name) or other):
            continue
        stem = other.stem if other else READABLE.sub("", name)
        meant = reader.meaning(stem.rpartition("/")[2])
        found[meant or ""] += meant in everyone
    for name in _channels(tree):
        meant = reader.meaning(name)
        found[meant or ""] += meant in everyone
    return +found


def sequences_of(found: Iterable[Found]) -> Counter[str]:
    """The sequences of patients → how many have each."""
    return Counter(s for one in found for s in {*one.images, *one.foreign})


def check(root: str, there: Mapping[str, int], protocol: Protocol, *, asked: bool) -> None:
    """Refuses a folder that holds another protocol's sequences, and none that only this protocol has.

    Args:
        root: the folder, for the message.
        there: sequence → how often it was found.
        protocol: the one at hand.
        asked: the user named it. That counts where all it needs is there: hearts may be T1 and T2.

    Raises:
        UsageError: it names the protocol to type.
    """
    if protocol.name not in protocols.names():
        return
    for name in protocols.names():
        other = protocols.load(name)
        theirs = [s for s in other.sequences if s not in protocol.sequences and there.get(s)]
        ours = [s for s in protocol.sequences if s not in other.sequences]
        possible = all(there.get(s) for s in protocol.required)
        if theirs and not any(there.get(s) for s in ours) and not (asked and possible):
            counted = ", ".join(f"{s} ({there[s]})" for s in theirs)
            also = f", or with --protocol {protocol.name} if it is that all the same" if possible else ""
            raise UsageError(
                f"{root} holds {counted} and no {' or '.join(ours)}: that is not what protocol {protocol.name} looks "
                f"for, but protocol {name}. Type the same command with --protocol {name}{also}"
            )


def _channels(tree: Tree) -> Iterable[str]:
    """The names of nnU-Net's channels, where there are such images."""
    if not any(folder.casefold() in layouts.NOT_PATIENTS for folder in tree.folders):
        return ()
    try:
        return dataset_json.read(tree.root / "dataset.json").channels.values()
    except UsageError:
        return ()
