"""Real scans go in at one end, by papermill through `1_preprocess`; embeddings and a saliency map come out."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kit.cohort.tables import read_cohort
from kit.evaluate.predict import predict
from kit.execute import run
from kit.explain.saliency import saliency
from kit.models.encoder_file import EncoderError, load_encoder
from kit.models.heads import Predictor
from kit.params import Pretrain
from kit.preprocess.nifti import write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.runs import Run
from kit.sample import sample_cohort
from kit.show.planes import focus
from kit.show.slices import three_planes
from kit.store.dataset import PreparedScans
from kit.store.grid import PAPER_GRID, Grid
from kit.store.store import Store
from kit.train.pretrain import pretrain

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def cohort(real_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table as a user writes it, of a skull-stripped scan and a whole head."""
    path, files = tmp_path_factory.mktemp("cohort") / "cohort.csv", [real_files["tumour"], real_files["head"]]
    pd.DataFrame({"participant": ["tumour", "head"], "image_path": map(str, files)}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def prepared(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The two scans at the paper's size, through the notebook."""
    report = run("1_preprocess", {
        "cohort": str(cohort), "registration": "rigid", "spacing_mm": 1.0,
        "shape": [150, 192, 192], "output_dir": str(tmp_path_factory.mktemp("real") / "1_preprocess")})
    assert report.stat().st_size > 100_000
    store = Store.open(report.parent)
    assert store.grid == PAPER_GRID and len(store.index) == 2
    return store


def test_resnet18_embeds_full_size_scans(prepared: Store) -> None:
    encoder, _ = load_encoder("random:resnet18", prepared.record)
    features = predict(encoder, PreparedScans(prepared, prepared.index), batch_size=1)
    assert features.shape == (2, 512) and np.isfinite(features).all()
    assert np.abs(np.diff(features, axis=0)).max(1).min() > 1e-3, "two scans look the same to the network"


def test_a_pretrained_encoder_embeds_one(cohort: Path, tmp_path: Path) -> None:
    """Trained on procedural scans on the demo's grid, it takes a real one that was prepared on that grid."""
    grid = Grid((36, 48, 40), 4.0)
    procedural = tmp_path / "procedural"
    prepare(read_cohort(sample_cohort(40)), procedural, Preparation(grid, "none", "given"), workers=2)
    params = Pretrain(prepared=procedural, epochs=1, batch_size=8, output_dir=tmp_path / "2_pretrain")
    pretrain(params, Run.of(params))

    prepare(read_cohort(cohort).tail(1), tmp_path / "real", Preparation(grid, "rigid"), workers=2)
    store = Store.open(tmp_path / "real")
    with pytest.raises(EncoderError, match=r"allow_differences: \[registration, mask\]"):
        load_encoder(tmp_path / "2_pretrain", store.record)
    encoder, record = load_encoder(tmp_path / "2_pretrain", store.record, allow=("registration", "mask"))
    features = predict(encoder, PreparedScans(store, store.index))
    assert record["objective"] == "simclr" and features.shape == (1, 128) and np.isfinite(features).all()


def test_a_saliency_map_of_a_real_scan(prepared: Store, tmp_path: Path) -> None:
    """ResNet-18 at full size, forward and backward; the map opens in any viewer, upright."""
    scan = prepared.index["scan"].iloc[-1]
    image, mask = prepared.read(scan)
    values = saliency(Predictor(load_encoder("random:resnet18", prepared.record)[0]), image.astype(np.float32), mask,
                      "gradient")
    assert values[mask].any() and not values[~mask].any()

    write_nifti(tmp_path / "map.nii.gz", values, prepared.grid.affine)
    written = nib.load(tmp_path / "map.nii.gz")
    assert nib.aff2axcodes(written.affine) == ("R", "A", "S") and written.shape == (192, 192, 150)
    figure = three_planes(image.astype(np.float32), prepared.grid, overlay=values, title=scan,
                          crosshair=focus(values, prepared.grid))
    figure.savefig(tmp_path / "map.png")
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 10
