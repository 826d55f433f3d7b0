"""The command ``deepgmm``: its options, and what its exit codes mean; ``commands`` do the work."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from monai_deepgmm import commands, option_file, protocol, terminal
from monai_deepgmm.argument_parser import Parser
from monai_deepgmm.errors import (
    ALL_FAILED,
    DISK_FULL,
    INTERRUPTED,
    OK,
    SOFTWARE,
    SOME_FAILED,
    USAGE,
    StudyError,
    UsageError,
    exit_code_of,
)
from monai_deepgmm.images import COPIES
from monai_deepgmm.methods import METHODS
from monai_deepgmm.patients import discovery, layout
from monai_deepgmm.registration import ALIGN

__all__ = ["ALL_FAILED", "DISK_FULL", "INTERRUPTED", "OK", "SOFTWARE", "SOME_FAILED", "USAGE", "main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (``bundle/docs/codes.md`` says what each means)."""
    terminal.encode_anything()
    try:
        arguments = _parsed(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"deepgmm: {error}", file=sys.stderr)
        return USAGE
    terminal.show_log(arguments.verbose, arguments.quiet)
    if threading.current_thread() is threading.main_thread():  # only there does Python allow it
        signal.signal(signal.SIGTERM, _interrupt)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except UsageError as error:
        print(f"deepgmm: {error}", file=sys.stderr)
        return USAGE
    except StudyError as error:
        print(f"deepgmm: {error.code}: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        again = "the same command with --resume" if command is commands.train else "the same command again"
        print(f"deepgmm: interrupted; run {again} to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:  # a folder that cannot be made, listed or written
        named = isinstance(error.filename, str | bytes | Path)
        where = f"{terminal.shown(os.fsdecode(error.filename))}: " if named else ""
        print(f"deepgmm: {where}{error.strerror or error}; check the path and its permissions", file=sys.stderr)
        return exit_code_of(error)
    except Exception as error:  # a mistake in this software: nobody should have to read a traceback, or lose it
        kept = terminal.keep_traceback(error, getattr(arguments, "out", None))
        reason = terminal.shown(str(error).partition("\n")[0])[:200]
        print(
            f"deepgmm: an unexpected {type(error).__name__} ({reason}); please report it with {kept}", file=sys.stderr
        )
        return SOFTWARE


def _parsed(typed: list[str]) -> argparse.Namespace:
    """The options that were typed, with those of ``--config`` before them; ``--save-config`` is done.

    Raises:
        UsageError: one of these files cannot be read or written, or the configuration is wrong.
    """
    root = parser()
    arguments = root.read(typed)
    if not hasattr(arguments, "config"):
        return arguments
    made = root.made_of(arguments)
    if arguments.config is not None:
        more = [*option_file.words(made, arguments.config), f"--config={arguments.config}"]
        arguments = root.read([typed[0], *more, *typed[1:]])
    if arguments.save_config is not None:
        try:
            arguments.save_config.write_text(option_file.save(made, arguments), encoding="utf-8")
        except OSError as error:
            reason = f"{error.strerror}; name a file in a folder that is there"
            raise UsageError(f"--save-config {arguments.save_config}: {reason}") from error
    return arguments


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def demo(arguments: argparse.Namespace) -> int:
    """Phantom, segmentation, evaluation and report in one go."""
    if arguments.out.is_file():
        raise UsageError(f"OUT: {arguments.out} is a file; name a folder")
    patients, results = arguments.out / "patients", arguments.out / "results"
    common = ["-v"] * arguments.verbose + ["-q"] * arguments.quiet
    steps = (
        ["phantom", str(patients), "-n", str(arguments.number), "--seed", str(arguments.seed)],
        ["segment", str(patients), str(results), "--jobs", str(arguments.jobs), *common],
        ["evaluate", str(results), str(patients)],
        ["report", str(results)],
    )
    done = patients.is_dir() and any(patients.iterdir())  # which a demo that was stopped has left whole
    for step in steps[done:]:
        print(f"$ deepgmm {' '.join(step)}", flush=True)
        if code := main(step):
            return code
    print(f"\nLook at {results / 'index.html'} in a browser; the label maps lie beside it, one folder per patient.")
    return OK


# Options -----------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The commands and their options."""
    root = Parser(
        prog="deepgmm",
        description="Segment medical images without training labels. Research use only, not a medical device.",
        epilog="deepgmm COMMAND --help lists a command's options.",
    )
    root.add_argument("--version", action="version", version=f"deepgmm {metadata.version('monai-deepgmm')}")
    root.commands = made = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_scan(made)
    _add_segment(made)
    _add_mask(made)
    _add_means(made)
    _add_train(made)
    _add_evaluate(made)
    _add_report(made)
    _add_init_manifest(made)
    _add_phantom(made)
    _add_demo(made)
    return root


def _command(parsers: Any, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = parsers.add_parser(
        function.__name__.replace("_", "-"),
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    made.set_defaults(command=function)
    made.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice for everything")
    made.add_argument("-q", "--quiet", action="count", default=0, help="say less: only what fails; twice: errors only")
    return made


def _add_cohort(made: argparse.ArgumentParser) -> None:
    """The options that mean the same wherever a DIR is read."""
    made.add_argument("directory", metavar="DIR", type=Path, help="the folder with the patients")
    group = made.add_argument_group("which files")
    which = f"{', '.join(protocol.names())}, or a YAML file"
    group.add_argument("--protocol", default="infarct", action=_Protocol, help=which)
    made.set_defaults(asked=False)
    known = f"{', '.join((*layout.ORDER, layout.DICOM))}, or a YAML file; tried in this order if absent"
    group.add_argument("--layout", help=known)
    group.add_argument("--manifest", type=Path, metavar="FILE", help="CSV or TSV that lists patients and their files")
    rule = "a file; auto: find it in the images; nonzero: voxels that are not 0; else a file, or found if none is there"
    group.add_argument("--mask", choices=list(discovery.MASK_RULES), help=rule)
    group.add_argument("--masks", type=Path, metavar="DIR", help="masks of deepgmm mask, corrected or as they are")
    bundle = "a MONAI bundle that finds the masks; --mask-labels says which of its labels"
    group.add_argument("--mask-from", type=Path, metavar="BUNDLE_DIR", help=bundle)
    group.add_argument("--mask-sequence", metavar="SEQUENCE", help="which sequence that bundle looks at")
    group.add_argument("--mask-labels", type=float, nargs="+", default=(), metavar="VALUE", help="mask values to keep")
    group.add_argument(
        "--truth-labels", nargs="+", default=(), metavar="TISSUE=VALUE", help="what reference labels mean: blood=500 …"
    )
    choose = "which of several BIDS files is meant, such as acq=tse run=1; or DICOM series, such as LGE=7"
    group.add_argument("--filter", nargs="+", default=(), metavar="KEY=VALUE", help=choose)
    group.add_argument("--patients", nargs="+", default=(), metavar="ID", help="only these patients")
    group.add_argument("--frame", type=int, metavar="N", help="which frame of a 4-D file or cine, counted from 0")
    spacing = "sform, pixdim, or X,Y,Z in mm: which voxel sizes count in a header that contradicts itself"
    group.add_argument("--spacing", metavar="WHICH", help=spacing)
    align = (
        "move slices of hearts to the reference where that gains (auto), also whole brains (rigid), or nothing (off)"
    )
    group.add_argument("--align", choices=list(ALIGN), default="auto", help=align)
    voxels = "the most voxels of a patient's sequences and mask together, on the reference's grid"
    group.add_argument("--max-voxels", type=_positive, default=1 << 29, metavar="N", help=voxels)
    group = made.add_argument_group("how to compute")
    group.add_argument("--seed", type=int, default=0, help="of every random draw")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … or auto: cuda if there is one")
    group.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    group = made.add_argument_group("options in a file")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML with the options' names; what is typed counts")
    group.add_argument("--save-config", type=Path, metavar="FILE", help="write the options to a file for --config")


def _add_scan(parsers: Any) -> None:
    made = _command(parsers, commands.scan, "print which files belong to which patient, and what is wrong")
    _add_cohort(made)
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_segment(parsers: Any) -> None:
    made = _command(parsers, commands.segment, "segment every patient in DIR into OUT")
    _add_cohort(made)
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for the results")
    group = made.add_argument_group("what to do")
    which = f"{', '.join(METHODS)}; the protocol's best if absent, or network with --model"
    group.add_argument("--method", metavar="METHOD", help=which)
    settings = "print a method's settings for --set, with default and unit, and leave"
    group.add_argument("--help-method", metavar="METHOD", action=_HelpMethod, help=settings)
    group.add_argument("--means", type=Path, metavar="FILE", help="known class means, from deepgmm means")
    group.add_argument("--network", metavar="NETWORK", help="of deepg and deepsvg: a name, a class, or a file")
    group.add_argument("--model", type=Path, metavar="MODEL_DIR", help="a network from deepgmm train")
    _add_trust(group)
    group.add_argument("--probabilities", action="store_true", help="also write one probability map per tissue")
    copies = f"also write the label map as {' or '.join(COPIES)}, or both"
    group.add_argument("--copies", nargs="+", choices=COPIES, default=[], metavar="FORMAT", help=copies)
    group.add_argument("--fields", action="store_true", help="also write bias fields, and images without them")
    seg = "also write the labels as a DICOM SEG; for DICOM patients, with the extra dicom"
    group.add_argument("--dicom-seg", action="store_true", help=seg)
    group = made.add_argument_group("how to work through the patients")
    group.add_argument("--jobs", type=_positive, default=1, metavar="N", help="patients at the same time")
    group.add_argument("--dask", metavar="ADDRESS", help="address of a Dask scheduler that does the work")
    group.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="only the I-th of N parts")
    group.add_argument("--dry-run", action="store_true", help="load and check every patient, write nothing")
    group.add_argument("--overwrite", action="store_true", help="do again what is done")
    group.add_argument("--redo", type=Path, nargs="+", metavar="FILE", help="do again what review.tsv marks with redo")
    group.add_argument("--fail-fast", action="store_true", help="stop at the first patient that fails")


def _add_trust(group: Any) -> None:
    text = "run the code of a network that this software does not know, if you trust whoever wrote it"
    group.add_argument("--trust-code", action="store_true", help=text)


def _add_mask(parsers: Any) -> None:
    made = _command(parsers, commands.mask, "find the organ in every patient of DIR and write its mask into OUT")
    _add_cohort(made)
    _add_trust(made)
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for the masks")


def _add_means(parsers: Any) -> None:
    made = _command(parsers, commands.means, "compute class means from labelled patients")
    _add_cohort(made)
    made.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSON file to write")


def _add_train(parsers: Any) -> None:
    made = _command(parsers, commands.train, "train one network on a cohort with few labels or none")
    _add_cohort(made)
    made.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="the folder for the network and its bundle")
    group = made.add_argument_group("what to train")
    group.add_argument("--method", choices=["deepg", "deepsvg"], help="the mixture; deepsvg, or what --loss says")
    losses = ["nll", "nll_v", "gmm", "gmm_tv", "gmm_bias"]
    group.add_argument("--loss", choices=losses, help="the loss; that of the method, or with --labels gmm_tv")
    group.add_argument("--network", metavar="NETWORK", help="a name, a class, or a file; quickunet for slices")
    _add_trust(group)
    group.add_argument("--means", metavar="FILE", help="known class means, or the word cohort to estimate them from it")
    labels = "learn from these patients' labels too: all, ids, a file of ids, or a share such as 1/4 drawn by --seed"
    group.add_argument("--labels", nargs="+", metavar="WHOSE", help=labels)
    group.add_argument("--epochs", type=_positive, metavar="N", help="how many; by the cohort's size")
    group.add_argument("--resume", action="store_true", help="go on with the training that MODEL_DIR holds")


def _add_evaluate(parsers: Any) -> None:
    made = _command(parsers, commands.evaluate, "compare results with reference labels")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder that deepgmm segment wrote to")
    _add_cohort(made)
    made.add_argument("--slices", choices=["all", "complete"], default="all", help="complete: slices with every tissue")
    made.add_argument("--unit", choices=["slice", "volume"], default="slice", help="what one score is computed on")


def _add_report(parsers: Any) -> None:
    made = _command(parsers, commands.report, "build the pages and tables again")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder that deepgmm segment wrote to")
    reviews = "review.tsv as the pages export it; its decisions are kept and shown"
    made.add_argument("--review", type=Path, nargs="+", default=(), metavar="FILE", help=reviews)


def _add_init_manifest(parsers: Any) -> None:
    made = _command(parsers, commands.init_manifest, "write a manifest of the files in DIR, to be corrected")
    made.add_argument("directory", metavar="DIR", type=Path, help="the folder with the patients")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="the CSV file to write; the terminal if absent")
    made.add_argument("--protocol", default="infarct", help=f"{', '.join(protocol.names())}, or a YAML file")
    made.add_argument("--layout", help=f"{', '.join(layout.ORDER)}, or a YAML file; tried in this order if absent")


def _add_phantom(parsers: Any) -> None:
    made = _command(parsers, commands.phantom, "write synthetic patients with reference labels")
    made.add_argument("directory", metavar="DIR", type=Path, help="the folder to write to; new, or empty")
    made.add_argument("-n", "--number", type=int, default=10, metavar="N", help="how many patients")
    made.add_argument("--seed", type=int, default=0, help="of every random draw")
    made.add_argument("--protocol", choices=["infarct", "brain"], default="infarct", help="what kind of patients")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as shading=0.35")


def _add_demo(parsers: Any) -> None:
    made = _command(parsers, demo, "make, segment, measure and report a small synthetic cohort")
    made.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", default=Path("demo_out"), help="the folder to write to"
    )
    made.add_argument("-n", "--number", type=_positive, default=4, metavar="N", help="how many patients")
    made.add_argument("--seed", type=int, default=0, help="of every random draw")
    made.add_argument("--jobs", type=_positive, default=2, metavar="N", help="patients at the same time")


class _Protocol(argparse.Action):
    """Keeps the protocol, and that it was asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        namespace.protocol, namespace.asked = rest[0], True


class _HelpMethod(argparse.Action):
    """Prints what ``--set`` can change of a method, with defaults and units."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        from monai_deepgmm.methods import registry

        try:
            lines = [*registry.help_method(rest[0], protocol.load(namespace.protocol))]
        except UsageError as error:
            parser.error(str(error))
        print(*lines, sep="\n")
        parser.exit()


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _part(text: str) -> tuple[int, int]:
    index, _, parts = text.partition("/")
    if not (index.isdigit() and parts.isdigit() and 1 <= int(index) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N, such as 2/5")
    return int(index), int(parts)
