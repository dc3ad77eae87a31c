"""What is written to a store comes back; what is damaged says so."""

from __future__ import annotations

import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kit.store.grid import Grid
from kit.store.store import (
    FORMAT,
    Store,
    StoreError,
    claim,
    read_facts,
    read_transform,
    scan_path,
    unreadable,
    write_scan,
)

GRID = Grid((40, 8, 9), 2.0)  # more slices than a chunk holds
TRANSFORM = [[1.0, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]]
RECORD = {"format": FORMAT, "axes": "zyx", "shape": list(GRID.shape), "spacing_mm": 2.0, "mask": "given"}


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    mask = rng.random(GRID.shape) > 0.4
    return (rng.normal(size=GRID.shape) * mask).astype(np.float16), mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image, mask = arrays()
    claim(tmp_path, RECORD)
    write_scan(scan_path(tmp_path, "a_0001"), image, mask, "a_0001", GRID.affine, {"transform": TRANSFORM})
    index = pd.DataFrame({"scan": ["a_0001"], "participant": ["0001"], "session": ["NA"], "dataset": [""], "age": [7]})
    index.to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def test_scan_comes_back(folder: Path) -> None:
    store = Store.open(folder)
    image, mask = store.read("a_0001")
    np.testing.assert_array_equal(image, arrays()[0])
    np.testing.assert_array_equal(mask, arrays()[1])
    assert (image.dtype, mask.dtype) == (np.float16, bool)
    assert store.grid == GRID and store.checksum("a_0001") == read_facts(scan_path(folder, "a_0001"))["checksum"]
    np.testing.assert_array_equal(read_transform(folder, "a_0001"), TRANSFORM)
    assert read_facts(scan_path(folder, "a_0001"))["affine"] == GRID.affine.tolist()
    assert [path.name for path in (folder / "scans").iterdir()] == ["a_0001.b2nd"]


def test_a_scan_without_room_is_an_os_error_and_leaves_the_one_before(folder: Path) -> None:
    before, (image, mask) = scan_path(folder, "a_0001").read_bytes(), arrays()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_scan(scan_path(folder, "a_0001"), image + 1, mask, "a_0001", GRID.affine, {"transform": TRANSFORM})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_bytes() for path in (folder / "scans").iterdir()] == [before]


def test_mask_is_kept_where_the_image_is_zero(tmp_path: Path) -> None:
    mask = arrays()[1]
    image = np.where(np.arange(mask.size).reshape(mask.shape) % 3, 0, 5.0)  # also outside the mask
    image[0, 0, :] = 1e-9  # less than float16 holds
    claim(tmp_path, RECORD)
    write_scan(scan_path(tmp_path, "a"), image, mask, "a", GRID.affine)
    read_image, read_mask = Store(tmp_path, None, RECORD).read("a")
    np.testing.assert_array_equal(read_mask, mask)
    np.testing.assert_array_equal(read_image, np.where(mask, image, 0).astype(np.float16))


def test_crop_is_that_part(folder: Path) -> None:
    crop = (slice(30, 37), slice(1, 6), slice(2, 9))  # across two chunks
    image, mask = Store.open(folder).read("a_0001", crop)
    np.testing.assert_array_equal(image, arrays()[0][crop])
    np.testing.assert_array_equal(mask, arrays()[1][crop])


def test_names_stay_text(folder: Path) -> None:
    row = Store.open(folder).index.iloc[0]
    assert (row.participant, row.session, row.dataset, row.age) == ("0001", "NA", "", 7)


def test_store_can_be_sent_to_another_process(folder: Path) -> None:
    sent = pickle.loads(pickle.dumps(Store.open(folder)))
    np.testing.assert_array_equal(sent.read("a_0001")[0], arrays()[0])


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    path = scan_path(folder, "a_0001")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            image, mask = Store.open(folder).read("a_0001")
        except StoreError as error:
            assert "a_0001" in str(error) and str(path) in str(error)
            noticed += 1
        else:  # a byte that means nothing: then nothing has changed
            np.testing.assert_array_equal(image, arrays()[0])
            np.testing.assert_array_equal(mask, arrays()[1])
    assert noticed > 40


@pytest.mark.parametrize("left", [0, 50, 0.5, 0.99])
def test_truncated_scan_is_refused(folder: Path, left: float) -> None:
    path = scan_path(folder, "a_0001")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left if left >= 1 else left * len(whole))])
    with pytest.raises(StoreError, match="a_0001.*damaged"):
        Store.open(folder).read("a_0001")


def test_missing_scan_and_files_are_named(folder: Path) -> None:
    with pytest.raises(StoreError, match="scan b_0002: no file"):
        Store.open(folder).read("b_0002")
    (folder / "index.csv").unlink()
    with pytest.raises(StoreError, match="index.csv; run 1_preprocess first"):
        Store.open(folder)
    with pytest.raises(StoreError, match="no preparation.json and no index.csv"):
        Store.open(folder / "nowhere")


def test_another_preparation_takes_the_folder_over_and_its_index_away(folder: Path) -> None:
    assert not claim(folder, RECORD | {"versions": {"SimpleITK": "newer"}}) and Store.open(folder)
    assert claim(folder, RECORD | {"mask": "template"}) == ["mask: given there, template asked"]
    with pytest.raises(StoreError, match="no index.csv"):
        Store.open(folder)


def test_other_format_is_refused(folder: Path) -> None:
    (folder / "preparation.json").unlink()
    claim(folder, RECORD | {"format": FORMAT + 1})
    with pytest.raises(StoreError, match=f"format {FORMAT + 1}"):
        Store.open(folder)


def test_unreadable_scans_are_named_by_their_headers_or_wholly(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "store")
    copy, names = Store.open(tmp_path / "store"), store.index["scan"].tolist()
    assert unreadable(copy, names) == unreadable(copy, names, verify=True) == {}
    scan_path(copy.folder, names[2]).write_bytes(b"no scan")
    scan_path(copy.folder, names[5]).unlink()
    voxels = bytearray(scan_path(copy.folder, names[7]).read_bytes())
    voxels[len(voxels) // 2] ^= 0xFF
    scan_path(copy.folder, names[7]).write_bytes(voxels)
    found = unreadable(copy, names)
    assert list(found) == [names[2], names[5]] and "damaged" in found[names[2]] and "no file" in found[names[5]]
    assert list(unreadable(Store.open(copy.folder), names, verify=True)) == [names[2], names[5], names[7]]
