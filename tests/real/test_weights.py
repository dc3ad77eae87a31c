"""The paper's conventions on two real scans: what the kit embeds is what a plain reading of the same files gives."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import resnet18

from kit.evaluate.predict import predict
from kit.models.encoder_file import load_encoder
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.store.dataset import PreparedScans
from kit.store.grid import PAPER_GRID
from kit.store.store import Store

pytestmark = [pytest.mark.real, pytest.mark.slow]

MIDDLE = (0, -18, 6)  # of the paper's box, whole millimetres


@pytest.fixture(scope="module")
def placed(real_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The child's and the patient's brains with headers that put their middle into the box's, in place of a search.

    Both have voxels of 1 mm, one of them is stored LPS: by whole millimetres, so that nothing is interpolated.
    """
    folder, rows = tmp_path_factory.mktemp("placed"), []
    for name in ("child", "tumour"):
        image = nib.load(real_files[name])
        values, affine = np.asarray(image.dataobj, np.float32), image.affine.copy()
        middle = nib.affines.apply_affine(affine, np.argwhere(values > 0)).mean(0)
        affine[:3, 3] += np.round(MIDDLE - middle)
        nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image((values > 0).astype(np.uint8), affine), folder / f"{name}_mask.nii.gz")
        rows.append({"participant": name, "session": "01", "dataset": "real",
                     "image_path": str(folder / f"{name}.nii.gz"), "mask_path": str(folder / f"{name}_mask.nii.gz")})
    return pd.DataFrame(rows)


def plainly(path: str) -> np.ndarray:
    """Axes (z, y, x), box z -68..81, y -113..78, x -95..96 mm, z-score inside the brain, zero outside, float32."""
    image = nib.as_closest_canonical(nib.load(path))
    values = image.get_fdata().transpose(2, 1, 0)
    box = np.zeros((150, 192, 192))
    theirs, ours = [], []
    for first, start, side, length in zip((-68, -113, -95), image.affine[2::-1, 3], box.shape, values.shape,
                                          strict=True):
        shift = int(start - first)  # of the file's first voxel in the box
        ours.append(slice(max(shift, 0), min(shift + length, side)))
        theirs.append(slice(max(-shift, 0), min(length, side - shift)))
    box[tuple(ours)] = values[tuple(theirs)]
    brain = box > 0
    return np.where(brain, (box - box[brain].mean()) / box[brain].std(), 0).astype(np.float32)


def test_embeddings_are_those_of_a_plain_reading(placed: pd.DataFrame, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet18(spatial_dims=3, n_input_channels=1, feed_forward=False).eval()
    path = tmp_path / "simclr_3d_brain_foundation.tar"
    torch.save({"epoch": 1, "optimizer_state_dict": {}, "model_state_dict": {
        **{f"module.encoder.{name}": value for name, value in network.state_dict().items()},
        "module.projector.0.weight": torch.zeros(64, 512)}}, path)

    index, failed = prepare(placed, tmp_path / "prepared", Preparation(PAPER_GRID, "none", "given"), workers=2)
    assert failed.empty and index["participant"].tolist() == ["child", "tumour"]
    store = Store.open(tmp_path / "prepared")
    encoder, _ = load_encoder(f"neuro_simclr:{path}", store.record, allow=("registration", "bias_correction"))
    through, = predict(encoder, PreparedScans(store, store.index[store.index["participant"] == "tumour"]), batch_size=1)

    for row, scan in zip(placed.itertuples(), store.index["scan"], strict=True):
        array = plainly(row.image_path)
        np.testing.assert_allclose(store.read(scan)[0].astype(np.float32), array, atol=4e-3, rtol=1e-3)  # float16
        if row.participant == "child":
            continue  # the same array is embedded alike, in ten seconds a pass
        with torch.no_grad():
            wanted = network(torch.from_numpy(array)[None, None])[0].numpy()
            part = torch.from_numpy(array)[None, None, 40:104, 60:124, 60:124]  # the weights are the same at any size
            theirs, ours = network(part).numpy(), encoder.cpu()(part).numpy()
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
        cosine = float(wanted @ through / np.linalg.norm(wanted) / np.linalg.norm(through))
        centred = float(np.corrcoef(wanted, through)[0, 1])
        print(f"{row.participant}: cosine {cosine:.7f}, correlation {centred:.7f}, through the store of float16")
        assert cosine >= 0.9999 and centred >= 0.9999
