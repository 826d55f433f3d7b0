"""Reading NIfTI as hospitals write it, writing labels on the source's grid, and grids that are compared."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files, nifti
from monai_deepgmm.images.volume import Volume

SECRET = b"Jane Doe"
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.25, 0, -30], [0, 0, 8, 5], [0, 0, 0, 1.0]])
VOXELS = np.arange(5 * 4 * 3, dtype=np.int16).reshape(5, 4, 3)


def nifti_bytes(data=VOXELS, affine=AFFINE, *, kind=nib.Nifti1Image, endianness="<", **fields) -> bytes:
    """A single-file NIfTI made by nibabel, then header fields set by force."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(data.dtype)
    image = kind(data, affine, header)
    image.header.set_xyzt_units("mm", "sec")
    content = bytearray(image.to_bytes())
    size = image.header.sizeof_hdr
    forced = kind.header_class(bytes(content[:size]), endianness=endianness, check=False)
    for field, value in fields.items():
        forced[field] = value
    content[:size] = forced.binaryblock
    return bytes(content)


def dims(*sizes: int) -> list[int]:
    return [*sizes, *[1] * (8 - len(sizes))]


def put(folder: Path, content: bytes, name: str = "scan.nii.gz") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.lower().endswith(".gz") else content)
    return path


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def gz(content: bytes = b"", **fields) -> bytes:
    """Packed content, or that of a file with fields set by force."""
    return gzip.compress(content or nifti_bytes(**fields), mtime=0)


def folder_with(*names: str):
    def build(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return build


WHOLE = nifti_bytes()
ZIPPED = gz(WHOLE)
CINE = nifti_bytes(np.zeros((4, 4, 3, 5), np.float32))
DICOM = bytes(128) + b"DICM" + bytes(400)
NAN_AFFINE = {"srow_x": [np.nan, 0, 0, 0]}
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
HUGE = dims(3, 30000, 30000, 30000)

#: What is wrong → what lies at the path (bytes are named .nii.gz where they are packed or pretend to be), and the code.
REFUSED = {
    "truncated gz": (ZIPPED[:-30], "E_GZIP"),
    "gz without its trailer": (ZIPPED[:-8], "E_GZIP"),
    "flipped bit in the voxels": (flipped(ZIPPED, len(ZIPPED) // 2), "E_GZIP"),
    "flipped bit in the checksum": (flipped(ZIPPED, -6), "E_GZIP"),
    "flipped bit in the length": (flipped(ZIPPED, -2), "E_GZIP"),
    "garbage after gz": (ZIPPED + b"garbage", "E_GZIP"),
    "zero bytes": (b"", "E_EMPTY"),
    "zero bytes, plain": (b"", "E_EMPTY"),
    "gz of nothing": (gzip.compress(b""), "E_EMPTY"),
    "plain content named .gz": (WHOLE, "E_GZIP"),
    "gz named plain": (ZIPPED, "E_GZIP"),
    "text, plain": (b"patient,age\n1,42\n" * 40, "E_FORMAT"),
    "short text, plain": (b"hello", "E_FORMAT"),
    "html": (b"<!DOCTYPE html><title>404 \xc3\xa9</title>\n" * 20, "E_FORMAT"),
    "html in gz": (gz(b"<html>" * 100), "E_FORMAT"),
    "hdr/img pair": (gz(magic=b"ni1"), "E_FORMAT"),
    "hdr/img pair of NIfTI-2": (gz(kind=nib.Nifti2Image, magic=b"ni2"), "E_FORMAT"),
    "bad magic": (gz(magic=b"abc"), "E_FORMAT"),
    "dicom, plain": (DICOM, "E_DICOM"),
    "dicom": (DICOM, "E_DICOM"),
    "dicom series": (folder_with("IM1.dcm", "IM2.dcm"), "E_DICOM"),
    "folder": (folder_with("readme"), "E_FILE"),
    "missing": (lambda path: None, "E_FILE"),
    "dangling link": (lambda path: path.symlink_to("nowhere.nii.gz"), "E_FILE"),
    "looping link": (lambda path: path.symlink_to(path.name), "E_FILE"),
    "below a file": (lambda path: path.parent.write_bytes(WHOLE), "E_FILE"),
    "name with a zero byte": (lambda path: None, "E_FILE"),
    "cine, plain": (CINE, "E_DIM"),
    "vector image": (gz(data=np.zeros((4, 4, 3, 1, 3), np.float32)), "E_DIM"),
    "line": (gz(data=np.zeros(7, np.float32)), "E_DIM"),
    "complex": (gz(data=VOXELS.astype(np.complex64)), "E_DTYPE"),
    "double complex": (gz(data=VOXELS.astype(np.complex128)), "E_DTYPE"),
    "rgb": (gz(data=np.zeros((5, 4, 3), RGB)), "E_DTYPE"),
    "unknown data type": (gz(datatype=77), "E_HEADER"),
    "infinite intercept": (gz(scl_slope=1, scl_inter=np.inf), "E_SCALE"),
    "infinite intercept, slope 0": (gz(scl_slope=0, scl_inter=-np.inf), "E_SCALE"),
    "NaN intercept": (gz(scl_slope=2, scl_inter=np.nan), "E_SCALE"),
    "infinite slope": (gz(scl_slope=np.inf, scl_inter=0), "E_SCALE"),
    "NaN in the sform": (gz(**NAN_AFFINE), "E_AFFINE"),
    "singular sform": (gz(srow_z=[0, 0, 0, 5]), "E_AFFINE"),
    "parallel axes": (gz(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), "E_AFFINE"),
    "NaN in the qform": (gz(sform_code=0, qform_code=1, qoffset_x=np.nan), "E_AFFINE"),
    "no quaternion": (gz(sform_code=0, qform_code=1, quatern_b=2, quatern_c=2), "E_AFFINE"),
    "terabytes": (gz(dim=HUGE), "E_SIZE"),
    "exabytes": (gz(kind=nib.Nifti2Image, dim=dims(3, 2**40, 2**40, 2**40)), "E_SIZE"),
    "one byte too many, plain": (WHOLE + b"\1", "E_SIZE"),
    "one byte too many in gz": (gz(WHOLE + b"\1"), "E_SIZE"),
    "one byte too few, plain": (WHOLE[:-1], "E_HEADER"),
    "one byte too few in gz": (gz(WHOLE[:-1]), "E_HEADER"),
    "header cut short, plain": (WHOLE[:200], "E_HEADER"),
    "nothing but a header, plain": (WHOLE[:348], "E_HEADER"),
    **{f"dim[0] = {n}": (gz(dim=dims(n, 5, 4, 3)), "E_HEADER") for n in (0, 8, -3)},
    **{f"dim = {n}": (gz(dim=dims(3, 5, n, 3)), "E_HEADER") for n in (-4, 0)},
    **{f"offset {at}": (gz(vox_offset=at), "E_HEADER") for at in (100, 0, 4000, 1e30, np.nan, 352.5)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_files_are_refused_with_code_name_and_remedy(tmp_path, case):
    held, code = REFUSED[case]
    name = "scan.nii" if "plain" in case.split(", ")[-1].split()[-1] else "scan.nii.gz"
    path = tmp_path / {"below a file": "file/scan.nii.gz", "name with a zero byte": "a\0.nii.gz"}.get(case, name)
    if callable(held):
        held(path)
    else:
        path.write_bytes(held)
    with pytest.raises(StudyError) as caught:
        nifti.read(path)
    assert caught.value.code == code
    assert caught.value.message.startswith(path.name.replace("\0", "\\x00"))
    assert caught.value.remedy
    assert str(tmp_path) not in str(caught.value)
    if code == "E_DICOM":
        assert "dcm2niix" in caught.value.remedy


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def deny(path: Path, _: str) -> None:  # root, as in a container, may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(atomic_files, "open", deny, raising=False)
    with pytest.raises(StudyError) as caught:
        nifti.read(put(tmp_path, WHOLE))
    assert (caught.value.code, caught.value.message) == ("E_FILE", "scan.nii.gz: no permission to read it")


WARNED = {
    "slope 0 with an intercept": ({"scl_slope": 0, "scl_inter": 7}, "W_SCALE"),
    "slope NaN with an intercept": ({"scl_slope": np.nan, "scl_inter": 7}, "W_SCALE"),
    "metres": ({"xyzt_units": 1}, "W_UNITS"),
    "micron": ({"xyzt_units": 3}, "W_UNITS"),
    "no such unit": ({"xyzt_units": 6}, "W_UNITS"),
    "zero pixdim": ({"pixdim": [1, 0, 1.25, 8, 1, 1, 1, 1]}, "W_PIXDIM"),
    "negative pixdim": ({"pixdim": [1, 1.5, -1.25, 8, 1, 1, 1, 1]}, "W_PIXDIM"),
    "NaN pixdim": ({"pixdim": [1, 1.5, 1.25, np.nan, 1, 1, 1, 1]}, "W_PIXDIM"),
    "shear": ({"srow_x": [-1.5, 0.3, 0, 20]}, "W_SHEAR"),
    "moved qform": ({"qform_code": 1, "qoffset_x": 23}, "W_QFORM"),
    "turned qform": ({"qform_code": 1, "quatern_b": 0.01}, "W_QFORM"),
    "broken qform": ({"qform_code": 1, "quatern_b": 3}, "W_QFORM"),
    "no form": ({"sform_code": 0, "qform_code": 0}, "W_NOFORM"),
}


@pytest.mark.parametrize("case", WARNED)
def test_odd_headers_are_read_with_one_warning(tmp_path, case):
    fields, code = WARNED[case]
    volume = nifti.read(put(tmp_path, nifti_bytes(**fields)))
    assert [warning.split(":")[0] for warning in volume.warnings] == [code]
    np.testing.assert_array_equal(volume.data, VOXELS)
    assert volume.data.dtype == np.float32


ACCEPTED = {
    "int64": nifti_bytes(VOXELS.astype(np.int64)),
    "uint64": nifti_bytes(VOXELS.astype(np.uint64)),
    "float64": nifti_bytes(VOXELS.astype(np.float64)),
    "uint8": nifti_bytes(VOXELS.astype(np.uint8)),
    "int8": nifti_bytes(VOXELS.astype(np.int8)),
    "big-endian": nifti_bytes(endianness=">"),
    "big-endian NIfTI-2": nifti_bytes(kind=nib.Nifti2Image, endianness=">"),
    "big-endian float32": nifti_bytes(VOXELS.astype(np.float32), endianness=">"),
    "NIfTI-2": nifti_bytes(kind=nib.Nifti2Image),
    "slope NaN": nifti_bytes(scl_slope=np.nan, scl_inter=np.nan),
    "slope 0": nifti_bytes(scl_slope=0, scl_inter=0),
    "unit not given": nifti_bytes(xyzt_units=0),
    "qform code 0 and a stray qform": nifti_bytes(qform_code=0, quatern_b=9, qoffset_x=np.nan),
    "sform code 0 and a stray sform": nifti_bytes(sform_code=0, qform_code=1, **NAN_AFFINE),
}


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ", "scän mit Leerzeichen.nii.gz"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_every_real_type_byte_order_and_version_is_read_without_a_warning(tmp_path, case, name):
    volume = nifti.read(put(tmp_path, ACCEPTED[case], name))
    np.testing.assert_array_equal(volume.data, VOXELS)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.warnings == ()
    assert volume.name == name
    assert volume.spacing_mm == pytest.approx((1.5, 1.25, 8))
    assert volume.voxel_ml == pytest.approx(0.015)


def test_the_slope_and_intercept_are_applied_once_and_no_number_is_kept(tmp_path):
    data = VOXELS.astype(np.float64)
    data[0, 0, 0], data[1, 0, 0], data[2, 0, 0] = np.nan, -np.inf, 1e300
    found = nifti.read(put(tmp_path, nifti_bytes(data))).data
    np.testing.assert_array_equal(found[:3, 0, 0], [np.nan, -np.inf, np.inf])
    np.testing.assert_array_equal(found[3:], VOXELS[3:])
    volume = nifti.read(put(tmp_path, nifti_bytes(scl_slope=0.5, scl_inter=-3)), dtype=np.float64)
    assert volume.data.dtype == np.float64
    np.testing.assert_array_equal(volume.data, VOXELS * 0.5 - 3)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000.0), (3, 0.001)])
def test_metres_and_micron_become_mm(tmp_path, unit, factor):
    volume = nifti.read(put(tmp_path, nifti_bytes(affine=AFFINE, xyzt_units=unit)))
    np.testing.assert_allclose(volume.affine[:3], AFFINE[:3] * factor, rtol=1e-6)
    assert volume.affine[3].tolist() == [0, 0, 0, 1]
    assert volume.spacing_mm == pytest.approx(tuple(factor * size for size in (1.5, 1.25, 8)))


@pytest.mark.parametrize("sizes", [(1.5, 1.25, 8.0), (-1.5, 0.0, 8.0)])
def test_the_sform_wins_and_without_forms_the_voxel_sizes_place_the_image_as_nibabel_does(tmp_path, sizes):
    path = put(tmp_path, nifti_bytes(sform_code=0, qform_code=0, pixdim=[1, *sizes, 1, 1, 1, 1]))
    np.testing.assert_allclose(nifti.read(path).affine, nib.load(path).affine)
    differs = nifti.read(put(tmp_path, nifti_bytes(qform_code=1, qoffset_x=23, sform_code=2)))
    np.testing.assert_allclose(differs.affine, AFFINE)  # the sform wins


def test_frames_are_counted_from_0(tmp_path):
    data = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    path = put(tmp_path, nifti_bytes(data))
    for frame in range(5):
        volume = nifti.read(path, frame=frame)
        np.testing.assert_array_equal(volume.data, data[..., frame])
    for frame in (-1, 5):
        with pytest.raises(StudyError) as caught:
            nifti.read(path, frame=frame)
        assert caught.value.code == "E_DIM"
        assert "from 0 to 4" in caught.value.remedy
    assert volume.source_shape == (2, 3, 4, 5)
    nifti.write_labels(tmp_path / "labels.nii.gz", np.ones((2, 3, 4), np.uint8), like=volume)
    assert nib.load(tmp_path / "labels.nii.gz").shape == (2, 3, 4)
    # A single frame does not look at the frame.
    np.testing.assert_array_equal(nifti.read(put(tmp_path, WHOLE), frame=7).data, VOXELS)


def test_max_voxels_is_a_limit_that_may_be_reached_and_a_small_file_of_a_gigabyte_needs_little_memory(tmp_path):
    path = put(tmp_path, WHOLE)
    assert nifti.read(path, max_voxels=60).data.size == 60
    with pytest.raises(StudyError, match="--max-voxels") as caught:
        nifti.read(path, max_voxels=59)
    assert caught.value.code == "E_SIZE"
    path.write_bytes(gzip.compress(WHOLE) + gzip.compress(bytes(1 << 26)) * 16)
    tracemalloc.start()
    with pytest.raises(StudyError) as caught:
        nifti.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "E_SIZE"
    assert peak < 16 << 20
    # Several members and zero padding are one file.
    path.write_bytes(gzip.compress(WHOLE[:100]) + gzip.compress(WHOLE[100:]) + bytes(70_000))
    np.testing.assert_array_equal(nifti.read(path).data, VOXELS)


def test_messages_never_hold_control_characters(tmp_path):
    path = put(tmp_path, nifti_bytes(descrip=b"\x1b[2J", magic=b"\x1b[m"), "a\x1b[31m\n.nii.gz")
    with pytest.raises(StudyError) as caught:
        nifti.read(path)
    assert str(caught.value).isprintable()


# --- writing -------------------------------------------------------------------------------------------------------

NAMES = "oblique flipped anisotropic one_slice two_axes qform_only sform_only disagree no_form slope trailing nifti2"
KINDS = [*NAMES.split(), "big_endian", "metres", "shear", "extension"]


def random_geometry(seed: int) -> bytes:
    """A file whose geometry is that of ``KINDS[seed % 16]``, the rest drawn at random."""
    rng, kind = np.random.default_rng(seed), KINDS[seed % len(KINDS)]
    turned = kind not in ("flipped", "anisotropic")
    axes = Rotation.random(random_state=seed).as_matrix() if turned else np.eye(3)
    if kind == "flipped":
        axes = axes[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3] = axes * rng.uniform(0.5, 12, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    shape = tuple(int(size) for size in rng.integers(2, 12, 3))
    shape = {"one_slice": (*shape[:2], 1), "two_axes": shape[:2], "trailing": (*shape, *[1] * (1 + seed % 3))}.get(
        kind, shape
    )
    image_kind = nib.Nifti2Image if kind == "nifti2" else nib.Nifti1Image
    image = image_kind(rng.integers(-500, 500, shape).astype(np.int16), affine)
    if kind == "extension":
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET))
    image.header.set_qform(affine, code=int(rng.integers(1, 5)), strip_shears=True)
    image.header.set_sform(affine, code=int(rng.integers(1, 5)))
    sheared = affine + np.outer([1, 0, 0, 0], [0.2] * 4)
    image.header.set_xyzt_units(*((None, None) if kind == "slope" else ("mm", "sec")))
    fields = {
        "qform_only": {"sform_code": 0},
        "sform_only": {"qform_code": 0},
        "disagree": {"qoffset_x": 250.0},
        "no_form": {"sform_code": 0, "qform_code": 0},
        "slope": {"scl_slope": 0.25, "scl_inter": -7},
        "metres": {"xyzt_units": 1 | 16},
        "shear": {
            "srow_x": sheared[0],
            "pixdim": [image.header["pixdim"][0], *np.linalg.norm(sheared[:3, :3], axis=0), 1, 1, 1, 1],
        },
    }.get(kind, {})
    content = bytearray(image.to_bytes())
    header = image_kind.header_class(bytes(content[: image.header.sizeof_hdr]), check=False)
    for field, value in {**fields, "descrip": SECRET, "aux_file": SECRET, "intent_name": SECRET}.items():
        header[field] = value
    if kind != "nifti2":
        header["db_name"] = SECRET
    content[: image.header.sizeof_hdr] = header.binaryblock
    if kind != "big_endian":
        return bytes(content)
    voxels = np.frombuffer(content[352:], "<i2").astype(">i2").tobytes()
    return header.as_byteswapped(">").binaryblock + bytes(4) + voxels


QUATERNION = "quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z"
FORMS = "qform_code sform_code srow_x srow_y srow_z pixdim xyzt_units"
GEOMETRY_FIELDS = [*QUATERNION.split(), *FORMS.split()]


@pytest.mark.parametrize("seed", range(64))
def test_labels_and_probabilities_survive_on_their_sources_grid(tmp_path, seed):
    source, written = put(tmp_path, random_geometry(seed)), tmp_path / "labels.nii.gz"
    volume = nifti.read(source)
    labels = np.random.default_rng(seed).integers(0, 256, volume.data.shape).astype(np.uint8)
    nifti.write_labels(written, labels, like=volume)

    again = nifti.read(written, dtype=np.float64)
    np.testing.assert_array_equal(again.data, labels)
    np.testing.assert_array_equal(again.affine, volume.affine)
    assert again.source_shape == volume.source_shape
    assert nifti.grids_equal(volume, again)

    before, after = nib.load(source), nib.load(written)
    assert type(after) is type(before)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(after.affine, before.affine)
    np.testing.assert_array_equal(np.asarray(after.dataobj).reshape(labels.shape), labels)
    for field in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)
    assert not after.header.extensions
    assert SECRET not in gzip.decompress(written.read_bytes())
    if KINDS[seed % len(KINDS)] != "metres":  # nibabel does not convert units
        np.testing.assert_allclose(volume.affine, before.affine, atol=1e-6)
    np.testing.assert_allclose(volume.data.reshape(before.shape), before.get_fdata(), rtol=1e-6)

    maps = np.random.default_rng(seed).random((4, *volume.data.shape)).astype(np.float32)
    nifti.write_probabilities(written, maps, like=volume)
    after = nib.load(written)
    assert after.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.moveaxis(maps, 0, -1))  # components on the fourth axis
    for field in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)


#: What the source says of its intensities, which labels have none of.
INTENSITY = {"scl_slope": 3, "scl_inter": 2, "cal_max": 900, "cal_min": 5, "glmax": 77, "intent_code": 3}


def test_equal_labels_make_equal_files_without_time_name_or_intensities(tmp_path):
    volume = nifti.read(put(tmp_path, nifti_bytes(**INTENSITY)))
    kept = volume.header.binaryblock
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        nifti.write_labels(tmp_path / name, VOXELS.astype(np.uint8), like=volume)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[3] == 0  # no name, no comment
    assert content[4:8] == bytes(4)  # no time
    assert gzip.decompress(content) == (tmp_path / "c.nii").read_bytes()
    assert volume.header.binaryblock == kept
    header = nib.Nifti1Header((tmp_path / "c.nii").read_bytes()[:348], check=False)
    assert [float(header[field]) for field in INTENSITY] == [1, 0, 0, 0, 0, 0]


def test_what_does_not_fit_the_grid_is_refused(tmp_path):
    volume = nifti.read(put(tmp_path, WHOLE))
    with pytest.raises(ValueError, match="expected uint8"):
        nifti.write_labels(tmp_path / "a.nii.gz", np.zeros((5, 4, 2), np.uint8), like=volume)
    with pytest.raises(ValueError, match="expected uint8"):
        nifti.write_labels(tmp_path / "a.nii.gz", np.zeros((5, 4, 3), np.int64), like=volume)
    with pytest.raises(ValueError, match="expected \\(K"):
        nifti.write_probabilities(tmp_path / "a.nii.gz", np.zeros((5, 4, 3), np.float32), like=volume)
    assert not (tmp_path / "a.nii.gz").exists()


# --- grids ---------------------------------------------------------------------------------------------------------


def volume_of(data: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(data, np.asarray(affine, float), nib.Nifti1Header(), data.shape, "scan.nii.gz", "")


def moved(affine: np.ndarray, *, by: tuple[float, float, float]) -> np.ndarray:
    shifted = affine.copy()
    shifted[:3, 3] += by
    return shifted


def test_grids_are_equal_within_a_micron(tmp_path):
    one = volume_of(np.zeros((5, 4, 3), np.float32), AFFINE)
    near = volume_of(one.data, moved(AFFINE, by=(0.0005, 0, 0)))
    far = volume_of(one.data, moved(AFFINE, by=(0.002, 0, 0)))
    stretched = volume_of(one.data, AFFINE @ np.diag([1.001, 1, 1, 1]))
    assert nifti.grids_equal(one, near)
    assert not nifti.grids_equal(one, far)
    assert nifti.grids_equal(one, far, tolerance_mm=0.01)
    assert not nifti.grids_equal(one, stretched)
    assert not nifti.grids_equal(one, volume_of(np.zeros((5, 4, 2), np.float32), AFFINE))


@pytest.mark.parametrize("shift_mm", [(0, 0, 0), (0, 0, 19.9), (0, 0, 20.1), (-6.7, 0, 0), (-6.8, 0, 0), (1e6, 0, 0)])
def test_boxes_end_half_a_voxel_beyond_the_last_centre(shift_mm):
    # Three slices of 8 mm: the last centre is 16 mm from the first, the box ends at 20 mm; likewise -6.75 mm in x.
    one = volume_of(np.zeros((5, 4, 3), np.float32), AFFINE)
    other = volume_of(np.zeros((1, 1, 1), np.float32), moved(AFFINE, by=shift_mm))
    expected = -6.75 < shift_mm[0] <= 0 and shift_mm[2] < 20
    assert nifti.overlaps(one, other) is nifti.overlaps(other, one) is expected
    large = volume_of(np.zeros((3, 3, 3)), np.diag([50.0, 50, 50, 1]))
    small = volume_of(np.zeros((2, 2, 2)), moved(np.eye(4), by=(20, 20, 20)))
    assert nifti.overlaps(large, small)  # a box inside a box
    assert nifti.overlaps(small, large)


@pytest.mark.parametrize("nearest", [False, True])
def test_resampling_onto_the_same_or_the_flipped_grid_interpolates_nothing(nearest):
    volume = volume_of(np.random.default_rng(0).random((7, 6, 5)).astype(np.float32), AFFINE)
    same = nifti.resample(volume, volume, nearest=nearest)
    assert same.dtype == np.float32
    np.testing.assert_allclose(same, volume.data, atol=1e-6)
    flip = np.diag([-1.0, 1, -1, 1])
    flip[[0, 2], 3] = 6, 4
    flipped = nifti.resample(volume, volume_of(volume.data, AFFINE @ flip), nearest=nearest)
    np.testing.assert_allclose(flipped, volume.data[::-1, :, ::-1], atol=1e-6)


def test_outside_the_box_is_zero_and_a_linear_ramp_stays_linear():
    ramp = np.broadcast_to(np.arange(10.0)[:, None, None] + 5, (10, 3, 3)).copy()
    finer = volume_of(np.zeros((60, 1, 1)), np.array([[0.25, 0, 0, -2], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1.0]]))
    x = np.arange(60) * 0.25 - 2
    expected = np.where((x >= -0.5) & (x < 9.5), 5 + np.clip(x, 0, 9), 0)
    np.testing.assert_allclose(nifti.resample(volume_of(ramp, np.eye(4)), finer)[:, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_resampling_oblique_and_sheared_grids_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)

    def grid(shape, shear):
        affine = np.eye(4)
        axes = Rotation.random(random_state=rng).as_matrix() * rng.choice([-1, 1], 3)
        skew = np.eye(3) + shear * np.triu(rng.uniform(-0.3, 0.3, (3, 3)), 1)
        affine[:3, :3] = axes @ skew * rng.uniform(0.8, 4, 3)
        affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2 + rng.uniform(-1, 1, 3)
        return volume_of(rng.random(shape), affine)

    volume, like = grid((12, 10, 9), seed % 2), grid((8, 9, 11), seed % 3)
    index = np.indices(like.data.shape).reshape(3, -1)
    to_index = np.linalg.inv(volume.affine) @ like.affine
    at = to_index[:3, :3] @ index + to_index[:3, 3:]
    size = np.array(volume.data.shape)[:, None]
    inside = ((at >= -0.5) & (at < size - 0.5)).all(axis=0)
    expected = np.where(inside, map_coordinates(volume.data, at, order=1, mode="nearest"), 0)
    assert inside.mean() > 0.1
    np.testing.assert_allclose(nifti.resample(volume, like).ravel(), expected, atol=1e-5)


def test_nearest_makes_no_new_values():
    labels = np.random.default_rng(1).choice([0.0, 200, 500, 1220, 2221], (9, 8, 7))
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() * 0.7
    resampled = nifti.resample(volume_of(labels, np.eye(4)), volume_of(np.zeros((9, 9, 9)), turned), nearest=True)
    assert set(np.unique(resampled)) <= {0, 200, 500, 1220, 2221}
    assert resampled.any()


# --- fuzz ----------------------------------------------------------------------------------------------------------


def attempt(path: Path) -> Volume | StudyError:
    """What reading gives; an error of any other kind fails the test."""
    try:
        outcome = nifti.read(path)
    except StudyError as error:
        outcome = error
    if isinstance(outcome, Volume):
        assert outcome.data.ndim == 3
        assert np.isfinite([*outcome.affine.flat, outcome.voxel_ml]).all()
    else:
        assert str(outcome).isprintable()
    return outcome


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_random_bytes_in_the_header_never_surprise(tmp_path, kind):
    whole, refused = nifti_bytes(kind=kind, qform_code=1), 0
    for seed in range(400):
        rng, content = np.random.default_rng(seed), bytearray(whole)
        for _ in range(rng.integers(1, 12)):
            content[rng.integers(0, kind.header_class.sizeof_hdr)] = rng.integers(0, 256)
        outcome = attempt(put(tmp_path, bytes(content), "scan.nii"))
        refused += isinstance(outcome, StudyError)
        if isinstance(outcome, Volume) and seed % 4 == 0:
            nifti.write_labels(tmp_path / "labels.nii", np.zeros(outcome.data.shape, np.uint8), like=outcome)
            np.testing.assert_array_equal(nifti.read(tmp_path / "labels.nii").affine, outcome.affine)
    assert 0 < refused < 400
    for seed in range(100):  # and whole headers of random bytes
        rng = np.random.default_rng(seed)
        attempt(put(tmp_path, WHOLE[:40] + rng.bytes(304) + b"n+1\0" + rng.bytes(60), "scan.nii"))


def test_a_flipped_bit_in_a_packed_file_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "scan.nii.gz"
    for seed in range(400):
        rng = np.random.default_rng(seed)
        path.write_bytes(flipped(ZIPPED, int(rng.integers(0, len(ZIPPED))), int(rng.integers(0, 8))))
        outcome = attempt(path)
        if isinstance(outcome, StudyError):
            assert outcome.code == "E_GZIP", (seed, str(outcome))
        else:  # only the time and system bytes of the gzip frame carry no checksum
            np.testing.assert_array_equal(outcome.data, VOXELS)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "scan.nii.gz"
    for length in range(1, len(ZIPPED)):
        path.write_bytes(ZIPPED[:length])
        with pytest.raises(StudyError) as caught:
            nifti.read(path)
        assert caught.value.code == "E_GZIP"
