"""Load, crop, restore, write: masks come back bit by bit, whatever the geometry."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from scenes import INFARCT as CARDIAC
from scipy.spatial.transform import Rotation

from monai_deepgmm.images import nifti
from monai_deepgmm.images.cropping import crops
from monai_deepgmm.images.loading import load
from monai_deepgmm.methods.naming import name, signature_map
from monai_deepgmm.patients.study import Study

#: Masks of any shape.
INFARCT = dataclasses.replace(CARDIAC, mask_shape=None)


def random_patient(folder, rng):
    shape = (*rng.integers(14, 40, 2).tolist(), int(rng.integers(1, 5)))
    spacing = np.array([*rng.uniform(0.5, 2, 2), rng.uniform(4, 20)])
    order = rng.permutation(3)
    shape, spacing = tuple(int(shape[i]) for i in order), spacing[order]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix() * spacing
    affine[:3, :3] *= rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    mask = rng.random(shape) < 0.4
    mask.flat[rng.choice(mask.size, 45, replace=False)] = True
    sform, qform = [(1, 0), (0, 1), (2, 1), (1, 1)][int(rng.integers(4))]
    paths = {}
    for key, data in (("LGE", rng.normal(size=shape).astype(np.float32)), ("mask", mask.astype(np.uint8))):
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, sform)
        image.set_qform(affine, qform)
        image.header.set_xyzt_units("mm")
        paths[key] = folder / f"{key}.nii.gz"
        nib.save(image, paths[key])
    return Study("P", {"LGE": paths["LGE"]}, mask=paths["mask"]), mask


@pytest.mark.parametrize("seed", range(64))
def test_masks_survive_load_crop_restore_write(tmp_path, seed):
    study, mask = random_patient(tmp_path, np.random.default_rng(seed))
    loaded = load(study, INFARCT)
    cut = crops(loaded, INFARCT)
    restored = cut.restore(cut.mask)[0].astype(np.uint8)
    nifti.write_labels(tmp_path / "out.nii.gz", restored, like=loaded.reference)
    source, written = nib.load(study.images["LGE"]), nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj) > 0, mask)
    assert np.array_equal(written.affine, source.affine)
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[code] == source.header[code]
    assert np.array_equal(cut.cut(mask).astype(bool), cut.mask[:, 0].numpy() > 0)
    covered = torch.from_numpy(cut.cut(np.ones_like(loaded.mask)))
    for image, where in zip(cut.image[:, 0], covered, strict=True):  # each slice is z-scored over its crop
        assert image[where].mean().item() == pytest.approx(0, abs=1e-9)
        assert image[where].std(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("crop_mm", [60.0, None])
@pytest.mark.parametrize("unit", ["slice", "volume"])
def test_zero_is_where_the_scans_0_lies_after_the_z_score(tmp_path, unit, crop_mm):
    study, _ = random_patient(tmp_path, np.random.default_rng(6))
    loaded = load(study, INFARCT)
    images = np.concatenate([loaded.image, 3 * loaded.image + 100])  # two sequences with other gains and offsets
    loaded = dataclasses.replace(loaded, image=images)
    made = crops(loaded, dataclasses.replace(INFARCT, unit=unit, crop_mm=crop_mm))
    assert made.zero.shape == made.image.shape[:2]
    covered = made.cut(np.ones_like(loaded.mask))
    for channel, raw in enumerate(images):
        rows = zip(made.image[:, channel], made.zero[:, channel], made.cut(raw), covered, strict=True)
        for image, zero, cut, where in rows:
            signal, cut = (image - zero).numpy()[where], cut[where].astype(float)
            gain = np.linalg.norm(signal) / np.linalg.norm(cut)
            assert signal == pytest.approx(gain * cut, abs=1e-9)  # one positive factor, and no offset


@pytest.mark.parametrize("sequences", [("LGE", "T2", "bSSFP"), ("LGE",), ("LGE", "T2"), ("bSSFP",)])
def test_planted_tissues_are_named_in_any_order(sequences):
    rng = np.random.default_rng(0)
    visible = INFARCT.visible(sequences)
    y, x = np.mgrid[-24:25, -24:25]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    place = np.where(radius < 12, 0, 1)
    for i in range(2, len(visible)):
        place[(radius >= 12) & (angle > i - 3) & (angle < i - 2.2)] = i
    mask = torch.tensor(radius < 23)[None, None].double()
    levels = np.array([[t.signature[s] for s in sequences] for t in visible])
    image = torch.tensor(levels[place] + rng.normal(scale=0.2, size=(*place.shape, len(sequences)))).permute(2, 0, 1)
    expected = signature_map(image[None], mask, visible, sequences, (1.0, 1.0))
    one_hot = torch.nn.functional.one_hot(torch.tensor(place), len(visible)).permute(2, 0, 1)[None] * mask
    for _ in range(6):
        order = rng.permutation(len(visible))
        naming = name(one_hot[:, order], expected)
        assert [int(order[k]) for k in naming.order[0]] == list(range(len(visible)))
        assert 0.5 < naming.certainty[0] <= 1
