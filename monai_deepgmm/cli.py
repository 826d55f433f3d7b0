"""The command ``deepgmm``: parse, call one function, print."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.patients import discovery as cohorts
from monai_deepgmm.patients import layout as layouts
from monai_deepgmm.patients.study import Cohort, Study

logger = logging.getLogger("monai_deepgmm")

#: The options of ``deepgmm train`` that the bundle's ``train.json`` takes as they are.
TRAIN_KEYS = (
    *("protocol", "layout", "mask", "frame", "max_voxels", "method", "loss", "network", "epochs", "resume"),
    *("labels", "seed", "device"),
)

OK, SOME_FAILED, USAGE, ALL_FAILED, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (see the table in the README)."""
    arguments = parser().parse_args(argv)
    _log_to_terminal(arguments.verbose, arguments.quiet)
    signal.signal(signal.SIGTERM, _interrupt)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except UsageError as error:
        print(f"deepgmm: {error}", file=sys.stderr)
        return USAGE
    except StudyError as error:
        print(f"deepgmm: {error.code}: {error}", file=sys.stderr)
        return DISK_FULL if error.code == "E_DISK" else SOME_FAILED
    except KeyboardInterrupt:
        again = "the same command with --resume" if command is train else "the same command again"
        print(f"deepgmm: interrupted; run {again} to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:  # a folder that cannot be made, listed or written
        where = f"{_shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes | Path) else ""
        print(f"deepgmm: {where}{error.strerror or error}; check the path and its permissions", file=sys.stderr)
        return DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else USAGE


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


# Commands ----------------------------------------------------------------------------------------------------------


def scan(arguments: argparse.Namespace) -> int:
    """Prints which files belong to which patient, and what is wrong."""
    found = _find(arguments)
    if arguments.json:
        print(json.dumps(_cohort_json(found), indent=1))
    else:
        _print_cohort(found)
    return _exit_code(sum(bool(s.problems) for s in found.studies), len(found.studies))


def segment(arguments: argparse.Namespace) -> int:
    """Segments every patient."""
    from monai_deepgmm import batch

    config, found = _config(arguments), _find(arguments)
    options = batch.BatchOptions(
        jobs=arguments.jobs,
        dask=arguments.dask,
        part=arguments.part,
        overwrite=arguments.overwrite,
        fail_fast=arguments.fail_fast,
    )
    if arguments.dry_run:
        rows = list(batch.dry_run(found, arguments.out, config, options))
        for row in rows:
            detail = f"{row['code']}: {row['message']}. {row['remedy']}" if row["code"] else "; ".join(row["warnings"])
            print(f"{_shown(row['patient'])}\t{row['status']}\t{detail}")
        return _exit_code(sum(row["status"] == "failed" for row in rows), len(rows))
    with _bar(len(batch.select(found, options))) as bar:
        code = batch.run(found, arguments.out, config, options, progress=lambda row: bar.update())
    logger.log(logging.INFO if code == OK else logging.WARNING, "%s", _closing_line(arguments.out, code))
    return code


def train(arguments: argparse.Namespace) -> int:
    """Trains a network on a cohort without labels."""
    from monai_deepgmm.training import bundle as bundled

    found = _find(arguments)  # before torch and MONAI are asked for anything: most mistakes are here
    _refuse_inside(arguments.model_dir, arguments.directory)
    prepared = bundled.train(
        {
            "dataset_dir": str(arguments.directory),
            "model_dir": str(arguments.model_dir),
            "manifest": None if arguments.manifest is None else str(arguments.manifest),
            "means": None if arguments.means is None else str(arguments.means),
            "mask_labels": list(arguments.mask_labels),
            "patients": list(arguments.patients),
            "set": arguments.set,
            **{key: getattr(arguments, key) for key in TRAIN_KEYS},
        }
    )
    for patient, error in prepared.failed.items():
        logger.warning("%s was not used: %s: %s", _shown(patient), error.code, error)
    logger.info("the network and its bundle are in %s", arguments.model_dir)
    return _exit_code(len(prepared.failed), len(found.studies))


def _refuse_inside(target: Path, source: Path) -> None:
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UsageError(f"MODEL_DIR: {target} lies inside the input folder; name a folder outside it")


def means(arguments: argparse.Namespace) -> int:
    """Writes μ_data from labelled patients."""
    from monai_deepgmm.images import atomic_files
    from monai_deepgmm.images.preprocessing import Preprocessing
    from monai_deepgmm.methods import settings
    from monai_deepgmm.training import class_means

    protocol = protocols.load(arguments.protocol)
    begun = Preprocessing(frame=arguments.frame, max_voxels=arguments.max_voxels)
    preprocessing = settings.changed(begun, settings.parsed(arguments.set), "deepgmm means")
    found = _find(arguments)
    computed, unused = class_means.compute(found.studies, protocol, preprocessing)
    for patient, error in unused.items():
        logger.warning("%s was not used: %s: %s", _shown(patient), error.code, error)
    atomic_files.write_whole(arguments.output, computed.as_json())
    for tissue, row in computed.means.items():
        print(f"{tissue:12s}" + "".join(f"  {sequence} {value:7.3f}" for sequence, value in row.items()))
    print(f"from {computed.n_slices} images of {len(found.studies) - len(unused)} patients → {arguments.output}")
    return _exit_code(len(unused), len(found.studies))


def evaluate(arguments: argparse.Namespace) -> int:
    """Compares results with truth."""
    from monai_deepgmm.results import evaluate as agreement

    if not arguments.out.is_dir():
        raise UsageError(f"OUT: there is no folder {arguments.out}; give the folder that deepgmm segment wrote to")
    protocol = protocols.load(arguments.protocol)
    found = _find(arguments)
    result = agreement.evaluate(arguments.out, found, protocol, slices=arguments.slices, unit=arguments.unit)
    agreement.write(arguments.out, result)
    print(agreement.summary(result))
    return _exit_code(len(result.problems), len(found.studies))


def report(arguments: argparse.Namespace) -> int:
    """Builds the pages and tables again."""
    from monai_deepgmm.results import outputs
    from monai_deepgmm.results import report as pages

    if not arguments.out.is_dir():
        raise UsageError(f"OUT: there is no folder {arguments.out}")
    count = pages.rebuild(arguments.out)
    outputs.rebuild_tables(arguments.out)
    print(f"{count} pages and {arguments.out / 'index.html'}")
    return OK


def phantom(arguments: argparse.Namespace) -> int:
    """Writes synthetic patients."""
    from monai_deepgmm.phantom import brain as brains
    from monai_deepgmm.phantom import heart as infarcts

    if arguments.number < 1:
        raise UsageError(f"-n: got {arguments.number}, expected at least 1")
    makers: dict[str, tuple[type[Any], Callable[..., list[str]]]] = {
        "infarct": (infarcts.PhantomConfig, infarcts.write_cohort),
        "brain": (brains.BrainConfig, brains.write_cohort),
    }
    kind, write = makers[arguments.protocol]
    config = infarcts.configured(kind, _phantom_settings(arguments.set, kind))
    patients = write(arguments.directory, arguments.number, seed=arguments.seed, config=config)
    print(f"{len(patients)} synthetic patients in {arguments.directory}")
    return OK


def _phantom_settings(given: Sequence[str], kind: type[Any]) -> dict[str, Any]:
    if not given:
        return {}
    from monai_deepgmm.methods import settings

    values = settings.parsed(given)
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := [key for key in values if key not in known]:
        raise UsageError(f"--set {unknown[0]}: no such setting of a phantom; it has {', '.join(known)}")
    return values


def demo(arguments: argparse.Namespace) -> int:
    """Phantom, segmentation, evaluation and report in one go."""
    patients, results = arguments.out / "patients", arguments.out / "results"
    common = ["-v"] * arguments.verbose + ["-q"] * arguments.quiet
    steps = (
        ["phantom", str(patients), "-n", str(arguments.number), "--seed", str(arguments.seed)],
        ["segment", str(patients), str(results), "--jobs", str(arguments.jobs), *common],
        ["evaluate", str(results), str(patients)],
        ["report", str(results)],
    )
    for step in steps:
        print(f"$ deepgmm {' '.join(step)}", flush=True)
        if code := main(step):
            return code
    print(f"\nLook at {results / 'index.html'} in a browser; the label maps lie beside it, one folder per patient.")
    return OK


# Options -----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    root = argparse.ArgumentParser(
        prog="deepgmm",
        description="Segment medical images without training labels. Research use only, not a medical device.",
        epilog="deepgmm COMMAND --help lists a command's options.",
    )
    root.add_argument("--version", action="version", version=f"deepgmm {metadata.version('monai-deepgmm')}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_scan(commands)
    _add_segment(commands)
    _add_means(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_phantom(commands)
    _add_demo(commands)
    return root


def _command(commands: Any, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        function.__name__,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    made.set_defaults(command=function)
    made.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice for everything")
    made.add_argument("-q", "--quiet", action="count", default=0, help="say less: errors only")
    return made


def _add_cohort(made: argparse.ArgumentParser) -> None:
    """The options that mean the same wherever a DIR is read."""
    made.add_argument("directory", metavar="DIR", type=Path, help="the folder with the patients")
    group = made.add_argument_group("which files")
    group.add_argument("--protocol", default="infarct", help=f"{', '.join(protocols.names())}, or a YAML file")
    group.add_argument("--layout", help=f"{', '.join(layouts.ORDER)}, or a YAML file; tried in this order if absent")
    group.add_argument("--manifest", type=Path, metavar="FILE", help="CSV or TSV that lists patients and their files")
    group.add_argument("--mask", choices=["nonzero"], help="take the voxels that are not 0, for skull-stripped images")
    group.add_argument("--mask-labels", type=float, nargs="+", default=(), metavar="VALUE", help="mask values to keep")
    group.add_argument("--patients", nargs="+", default=(), metavar="ID", help="only these patients")
    group.add_argument("--frame", type=int, metavar="N", help="which frame of a 4-D file, counted from 0")
    group.add_argument("--max-voxels", type=_positive, default=1 << 28, metavar="N", help="refuse larger images")
    group = made.add_argument_group("how to compute")
    group.add_argument("--seed", type=int, default=0, help="of every random draw")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a solver setting")


def _add_scan(commands: Any) -> None:
    made = _command(commands, scan, "print which files belong to which patient, and what is wrong")
    _add_cohort(made)
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_segment(commands: Any) -> None:
    from monai_deepgmm.methods import METHODS

    made = _command(commands, segment, "segment every patient in DIR into OUT")
    _add_cohort(made)
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for the results")
    group = made.add_argument_group("what to do")
    group.add_argument("--method", choices=METHODS, help="the solver; the protocol's best, or with --model network")
    group.add_argument(
        "--help-method", action=_HelpMethod, choices=METHODS, help="print a method's settings for --set, and leave"
    )
    group.add_argument("--means", type=Path, metavar="FILE", help="known class means, from deepgmm means")
    group.add_argument("--network", metavar="NETWORK", help="of deepg and deepsvg: a name, a class, or a file")
    group.add_argument("--model", type=Path, metavar="MODEL_DIR", help="a network from deepgmm train")
    group.add_argument("--probabilities", action="store_true", help="also write one probability map per tissue")
    group.add_argument("--fields", action="store_true", help="also write bias fields, and images without them")
    group = made.add_argument_group("how to work through the patients")
    group.add_argument("--jobs", type=_positive, default=1, metavar="N", help="patients at the same time")
    group.add_argument("--dask", metavar="ADDRESS", help="address of a Dask scheduler that does the work")
    group.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="only the I-th of N parts")
    group.add_argument("--dry-run", action="store_true", help="load and check every patient, write nothing")
    group.add_argument("--overwrite", action="store_true", help="do again what is done")
    group.add_argument("--fail-fast", action="store_true", help="stop at the first patient that fails")


def _add_means(commands: Any) -> None:
    made = _command(commands, means, "compute class means from labelled patients")
    _add_cohort(made)
    made.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSON file to write")


def _add_train(commands: Any) -> None:
    made = _command(commands, train, "train one network on a cohort with few labels or none")
    _add_cohort(made)
    made.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="the folder for the network and its bundle")
    group = made.add_argument_group("what to train")
    group.add_argument("--method", choices=["deepg", "deepsvg"], help="the mixture; deepsvg, or what --loss says")
    losses = ["nll", "nll_v", "gmm", "gmm_tv", "gmm_bias"]
    group.add_argument("--loss", choices=losses, help="the loss; that of the method, or with --labels gmm_tv")
    group.add_argument("--network", metavar="NETWORK", help="a name, a class, or a file; the paper's U-Net")
    group.add_argument("--means", metavar="FILE", help="known class means, or the word cohort to estimate them from it")
    labels = "learn from these patients' truth too: all, ids, a file of ids, or a share such as 1/4 drawn by --seed"
    group.add_argument("--labels", nargs="+", metavar="WHOSE", help=labels)
    group.add_argument("--epochs", type=_positive, metavar="N", help="how many; by the cohort's size")
    group.add_argument("--resume", action="store_true", help="go on with the training that MODEL_DIR holds")


def _add_evaluate(commands: Any) -> None:
    made = _command(commands, evaluate, "compare results with truth")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder that deepgmm segment wrote to")
    _add_cohort(made)
    made.add_argument("--slices", choices=["all", "complete"], default="all", help="complete: slices with every tissue")
    made.add_argument("--unit", choices=["slice", "volume"], default="slice", help="what one score is computed on")


def _add_report(commands: Any) -> None:
    made = _command(commands, report, "build the pages and tables again")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder that deepgmm segment wrote to")


def _add_phantom(commands: Any) -> None:
    made = _command(commands, phantom, "write synthetic patients with truth")
    made.add_argument("directory", metavar="DIR", type=Path, help="the folder to write to")
    made.add_argument("-n", "--number", type=int, default=10, metavar="N", help="how many patients")
    made.add_argument("--seed", type=int, default=0, help="of every random draw")
    made.add_argument("--protocol", choices=["infarct", "brain"], default="infarct", help="what kind of patients")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as shading=0.35")


def _add_demo(commands: Any) -> None:
    made = _command(commands, demo, "make, segment, measure and report a small synthetic cohort")
    made.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", default=Path("demo_out"), help="the folder to write to"
    )
    made.add_argument("-n", "--number", type=_positive, default=4, metavar="N", help="how many patients")
    made.add_argument("--seed", type=int, default=0, help="of every random draw")
    made.add_argument("--jobs", type=_positive, default=2, metavar="N", help="patients at the same time")


class _HelpMethod(argparse.Action):
    """Prints what ``--set`` can change of a method, with defaults and units."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        from monai_deepgmm.methods import registry

        name = rest[0]
        protocol = protocols.load("brain" if name == "pvgmm" else "infarct")
        parser.exit(message="\n".join(registry.help_method(name, protocol)) + "\n")


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


def _find(arguments: argparse.Namespace) -> Cohort:
    return cohorts.find(
        arguments.directory,
        protocols.load(arguments.protocol),
        layout=arguments.layout,
        manifest=arguments.manifest,
        mask=arguments.mask,
        mask_labels=arguments.mask_labels,
        patients=arguments.patients,
    )


def _config(arguments: argparse.Namespace) -> Any:
    from monai_deepgmm.methods import config

    return config.build(
        protocol=arguments.protocol,
        method=arguments.method,
        means=arguments.means,
        network=arguments.network,
        model=arguments.model,
        settings=arguments.set,
        seed=arguments.seed,
        frame=arguments.frame,
        max_voxels=arguments.max_voxels,
        probabilities=arguments.probabilities,
        fields=arguments.fields,
        device=arguments.device,
    )


# Printing ----------------------------------------------------------------------------------------------------------


def _exit_code(failed: int, total: int) -> int:
    return OK if failed == 0 else ALL_FAILED if failed == total else SOME_FAILED


def _print_cohort(found: Cohort) -> None:
    sequences = sorted({s for study in found.studies for s in study.images})
    header = ["patient", *sequences, "mask", "truth", "problems"]
    lines = [header]
    for study in found.studies:
        problems = "; ".join(f"{p.code}: {p.message}. {p.remedy}".rstrip(". ") for p in study.problems) or "-"
        files = [study.images[s].name if s in study.images else "-" for s in sequences]
        truth = study.truth.name if study.truth else "-"
        lines.append([_shown(study.patient), *map(_shown, files), _shown(_mask(study)), _shown(truth), problems])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]))
    failing = sum(bool(s.problems) for s in found.studies)
    print(f"\nlayout {found.layout}: {len(found.studies)} patients, {failing} with problems")
    for note in found.notes:
        print(f"note: {note}")


def _mask(study: Study) -> str:
    if study.mask_rule == "nonzero":
        return "(nonzero)"
    if study.mask is None:
        return "-"
    values = " ".join(f"{value:g}" for value in study.mask_labels)
    return f"{study.mask.name} ({values})" if values else study.mask.name


def _cohort_json(found: Cohort) -> dict[str, Any]:
    return {
        "layout": found.layout,
        "notes": list(found.notes),
        "patients": [
            {
                "patient": study.patient,
                "images": {sequence: str(path) for sequence, path in study.images.items()},
                "mask": str(study.mask) if study.mask else None,
                "mask_rule": study.mask_rule,
                "mask_labels": list(study.mask_labels),
                "truth": str(study.truth) if study.truth else None,
                "problems": [{"code": p.code, "message": p.message, "remedy": p.remedy} for p in study.problems],
            }
            for study in found.studies
        ],
    }


def _shown(text: str) -> str:
    """Names from the disk, fit for a terminal: no control characters, no bytes that are no text."""
    return "".join(
        c if c.isprintable() else "�" for c in text.encode(errors="surrogateescape").decode(errors="replace")
    )


def _closing_line(out: Path, code: int) -> str:
    meaning = {
        OK: "every patient is done",
        SOME_FAILED: "some patients failed, the rest are complete",
        ALL_FAILED: "every patient failed",
        DISK_FULL: "stopped because the disk is full; free some space and run the same command again",
    }
    return f"{meaning[code]}: see {out / 'index.html'} and {out / 'summary.tsv'}"


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal; nothing in a log, where the lines per patient say as much."""
    from tqdm import tqdm

    with tqdm(total=total, unit="patient", disable=None) as bar:
        yield bar


class _Terminal(logging.StreamHandler[Any]):
    """Prints above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_terminal(verbose: int, quiet: int) -> None:
    level = logging.WARNING if quiet else logging.INFO
    level = logging.ERROR if quiet > 1 else logging.DEBUG if verbose > 0 else level
    handler = _Terminal()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(level)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    # What MONAI's and ignite's own loggers would tell, our log tells.
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    logging.getLogger("ignite.engine.engine").setLevel(logging.CRITICAL)
