"""What can go wrong with a patient, as short stable codes.

Every failure that a user can meet carries one of these codes, a message that names the file and what was found in it,
and a remedy. The same table stands in the documentation (``bundle/docs/codes.md``); a test holds the two together.
"""

from __future__ import annotations

import errno

#: What a command returns: nothing failed, some patients did, it could not start, all failed, a full disk, a mistake in
#: this software, Ctrl-C.
OK, SOME_FAILED, USAGE, ALL_FAILED, DISK_FULL, SOFTWARE, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130

CODES: dict[str, str] = {
    "E_NO_SEQUENCE": "no file of the protocol's sequences was found for this patient",
    "E_AMBIGUOUS": "two or more files or DICOM series match the same sequence, mask or reference labels",
    "E_DUPLICATE": "two patients share an id, or their ids differ only by case",
    "E_ID": "the patient id holds a path separator, '..' or a leading '/'",
    "E_NAME": "the patient id is too long for a file name, or no folder can bear it on Windows",
    "E_FILE": "a file cannot be opened: missing, dangling or looping link, a folder, no permission",
    "E_EMPTY": "a file has zero bytes",
    "E_GZIP": "a gzip stream is truncated or damaged, or the file's name and its compression disagree",
    "E_FORMAT": "a file is of no format that is read",
    "E_POINTER": "a pointer of git-annex, Git LFS or DVC stands where a file belongs that was never fetched",
    "E_HEADER": "a NIfTI header is invalid: dimensions, data type or offset",
    "E_DICOM": "a DICOM file or series stands where a NIfTI file belongs",
    "E_DICOM_FILE": "a DICOM file is damaged or cut short, or cannot be read",
    "E_DICOM_IMAGE": "a DICOM series named like a sequence holds no MR images: screen captures, or no place in space",
    "E_DICOM_PIXELS": "the pixels of a DICOM series are packed or stored in a way that cannot be read",
    "E_SLICES": "slices of a DICOM series are missing, unevenly spaced, or not one behind the other",
    "E_SEG": "a DICOM SEG was asked for, but the labels do not lie on DICOM images, or their headers cannot be read",
    "E_SIZE": "the images have more voxels than --max-voxels, or a file unpacks to more than it should",
    "E_DIM": "an image is not three-dimensional",
    "E_DTYPE": "the voxel type is complex or RGB",
    "E_SCALE": "the header's intensity scaling is not finite",
    "E_AFFINE": "the affine holds NaN or is singular",
    "E_SPACING": "a header gives two sizes for its voxels, and only a person can say which is right (--spacing)",
    "E_NONFINITE": "NaN or infinite intensities lie inside the mask",
    "E_CONSTANT": "a sequence has no contrast inside the mask",
    "E_GRID": "a sequence, mask or reference labels do not overlap the reference grid",
    "E_IDENTICAL": "two sequences are the same data, byte for byte",
    "E_MASK_NONE": "no mask was found",
    "E_MASK_UNSURE": "no mask was given, and the organ was not found surely in the images",
    "E_MASK_EMPTY": "the mask holds no voxel",
    "E_MASK_FRACTIONAL": "the mask holds values that are not whole numbers",
    "E_MASK_LABELS": "the mask holds several values, and nobody has said which of them count",
    "E_MASK_NAME": "the mask's name means another organ, or a part of this one",
    "E_MASK_GRID": "the mask has an image's shape but lies elsewhere, or most of it lies beyond the images",
    "E_MASK_SIZE": "the mask is larger or smaller than the organ can be",
    "E_MASK_CAVITY": "the mask is a ring where a filled one is expected",
    "E_MASK_BACKGROUND": "--mask nonzero finds no background: noise, tissue or residue of skull stripping fills it",
    "E_HEAD": "skull and scalp lie inside the mask of a brain",
    "E_MASK_SMALL": "the mask has fewer voxels than the mixture needs",
    "E_TRUTH": "the reference labels cannot be used for evaluation",
    "E_MEANS": "the means file does not fit the protocol, its tissues or the normalisation",
    "E_MODEL": "the trained network does not fit this patient's sequences, or its weights cannot be read",
    "E_N4": "the shading could not be taken off by N4",
    "E_WRITE": "a result could not be written",
    "E_DISK": "the disk is full",
    "E_CRASH": "the worker process died while it handled this patient (out of memory, killed)",
    "E_INTERNAL": "an unexpected error: please report it with the log",
}


def exit_code(failed: int, total: int) -> int:
    """What a command returns that went through so many patients, of which so many failed."""
    return OK if failed == 0 else ALL_FAILED if failed == total else SOME_FAILED


class UsageError(Exception):
    """A command cannot start: bad option, no patient, or an output folder that is refused (exit code 2)."""


class NobodyError(UsageError):
    """There is not one patient."""


class ChangedError(UsageError):
    """What was begun cannot be gone on with, since the patients, their files or the options have changed."""


class StudyError(Exception):
    """One patient cannot be segmented; the run goes on without this patient.

    Args:
        code: one of ``CODES``.
        message: what was found, and in which file (a file name, never an absolute path).
        remedy: what the user can do about it.

    Raises:
        ValueError: the code is not in ``CODES``.
    """

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        if code not in CODES:
            raise ValueError(f"unknown error code {code!r}; codes: {', '.join(CODES)}")
        super().__init__(code, message, remedy)
        self.code, self.message, self.remedy = code, message, remedy

    def __str__(self) -> str:
        """``message. remedy`` on one line."""
        return f"{self.message}. {self.remedy}".rstrip(". ") + "." if self.remedy else self.message


def users_own(error: BaseException) -> UsageError | StudyError | OSError | None:
    """What a user can mend of an error's causes; the parser of MONAI's configurations wraps them several times."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, UsageError | StudyError | OSError):
        found = found.__cause__ or found.__context__
    return found


def exit_code_of(error: UsageError | StudyError | OSError) -> int:
    """What a command returns that such an error ends: what it was to do is not done."""
    disk_full = isinstance(error, StudyError) and error.code == "E_DISK"
    disk_full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DISK_FULL if disk_full else USAGE
