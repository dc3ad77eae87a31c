"""Making views: this kit against the public pipelines of the paper and of its peers, at the paper's settings."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.data import template_scan
from benchmarks.ratio import Ratio, cpu_seconds, memory_bytes, share, times_better
from kit.augment.draws import Draw, draw
from kit.augment.recipe import read_recipe
from kit.augment.spatial import cropped_box, in_plane, view_to_scan, warp
from kit.augment.views import make_views
from kit.machine import keep_freed_memory
from kit.preprocess.nifti import write_nifti
from kit.store.grid import PAPER_GRID
from kit.store.store import Store, scan_path, write_scan

SHAPE = PAPER_GRID.shape
SAME = "one 150x192x192 scan with its mask, one thread, median of {} draws"


def monai_views() -> Callable[[np.ndarray, np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """The paper's view by MONAI's public transforms: image and mask (z, y, x) in, one view out."""
    from monai import transforms as m

    keys, modes = ["image", "mask"], ("bilinear", "nearest")
    pipeline = m.Compose([
        m.RandSpatialCropd(keys, roi_size=[30, 40, 40], random_size=True),
        m.Resized(keys, spatial_size=SHAPE, mode=("trilinear", "nearest")),
        m.RandFlipd(keys, prob=0.5, spatial_axis=2),
        m.RandRotated(keys, range_x=0.785, prob=0.5, mode=modes),
        m.RandShiftIntensityd("image", offsets=0.5, prob=0.8),
        m.RandAdjustContrastd("image", gamma=(0.5, 1.5), prob=0.8),
        m.MaskIntensityd("image", mask_key="mask"),
        m.NormalizeIntensityd("image", nonzero=True),
    ]).set_random_state(0)

    def view(image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        made = pipeline({"image": torch.as_tensor(image)[None],
                         "mask": torch.as_tensor(mask, dtype=torch.float32)[None]})
        return made["image"], made["mask"]

    return view


def torchio_views() -> Callable[[np.ndarray, np.ndarray], object]:
    """The nearest in torchio: one affine map for the crop and the turn, flip, gamma, z-score inside the mask."""
    import torchio as tio

    pipeline = tio.Compose([
        tio.RandomAffine(scales=(1, 1, 1, 3, 1, 3), degrees=(45, 45, 0, 0, 0, 0), translation=20),
        tio.RandomFlip(axes=(2,), flip_probability=0.5),
        tio.RandomGamma(log_gamma=(-0.69, 0.41), p=0.8),
        tio.ZNormalization(masking_method="mask"),
    ])

    def view(image: np.ndarray, mask: np.ndarray) -> object:
        return pipeline(tio.Subject(image=tio.ScalarImage(tensor=torch.as_tensor(image)[None]),
                                    mask=tio.LabelMap(tensor=torch.as_tensor(mask)[None].to(torch.uint8))))

    return view


def kornia_views() -> Callable[[np.ndarray, np.ndarray], object]:
    """The nearest in kornia: one affine map for the crop and the turn, flip, gamma; kornia has no masked z-score."""
    import kornia

    turn = kornia.augmentation.RandomAffine3D((0, 0, 45), translate=(0.1, 0.1, 0.1), scale=(1.0, 3.0), p=1.0)
    turn_mask = kornia.augmentation.RandomAffine3D((0, 0, 45), resample="nearest", p=1.0)
    flip = kornia.augmentation.RandomHorizontalFlip3D(p=0.5)

    def view(image: np.ndarray, mask: np.ndarray) -> object:
        image = torch.as_tensor(image)[None, None]
        mask = torch.as_tensor(mask, dtype=torch.float32)[None, None]
        turned = flip(turn(image))
        turned_mask = flip(turn_mask(mask, params=turn._params), params=flip._params)
        return kornia.enhance.adjust_gamma((turned - turned.amin()) / turned.amax(), 1.2), turned_mask

    return view


def extra_volumes() -> float:
    """Peak memory that 4 pairs of views take beyond the batch and the views themselves, in float32 volumes."""
    image, mask = template_scan()
    images = torch.from_numpy(image).expand(4, 1, *SHAPE).contiguous()
    masks = torch.from_numpy(mask).expand(4, 1, *SHAPE).contiguous()
    small = slice(None), slice(None), *[slice(20)] * 3
    recipe, key = read_recipe("paper"), {"seed": 0, "epoch": 0}
    make_views(images[small], masks[small], range(4), recipe, view=0, **key)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux forgets the peak so far
    before = memory_bytes("VmRSS")
    kept = [make_views(images, masks, range(4), recipe, view=view, **key) for view in (0, 1)]
    made = sum(views.nbytes + view_masks.nbytes for views, view_masks, _ in kept)
    return max(0.0, (memory_bytes("VmHWM") - before - made) / images[0].nbytes)


def measure() -> list[Ratio]:
    """Views, a single resampling, what a training pair costs, and memory."""
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as every training process does; the peers profit from it, too
    image, mask = template_scan()
    images, masks = torch.from_numpy(image)[None, None], torch.from_numpy(mask)[None, None]
    recipe, key = read_recipe("paper"), {"seed": 0, "epoch": 0, "view": 0}

    def ours(repeat: int) -> object:
        return make_views(images, masks, [repeat], recipe, **key)

    grid = F.affine_grid(torch.eye(3, 4)[None] * 0.9, [1, 1, *SHAPE], align_corners=False)
    back = view_to_scan(Draw(rotation_degrees=(20, 10, 5), zoom=1.1, translation_mm=(2, 3, 4)), SHAPE)
    theta = torch.from_numpy(back[::-1][:, [2, 1, 0, 3]].astype(np.float32))[None]  # torch counts (x, y, z)
    oblique, monai = F.affine_grid(theta, [1, 1, *SHAPE], align_corners=False), monai_views()
    view, paper, one, affine, same = cpu_seconds(
        ours, lambda _: monai(image, mask), lambda _: F.grid_sample(images, grid, align_corners=False),
        lambda _: warp(images[0, 0], masks[0, 0], back),
        lambda _: F.grid_sample(images, oblique, align_corners=False), repeats=40)
    ratios = [
        times_better("views_paper_vs_monai", view, paper, 4.5, "CPU-seconds",
                     "the paper's view, image and mask, z-score inside it: " + SAME.format(40)),
        share("views_vs_one_grid_sample", view, one, 0.5, "CPU-seconds",
              "the paper's whole view as a share of one 3D grid_sample of the image, grid given: " + SAME.format(40)),
        share("affine_vs_one_grid_sample", affine, same, 1.5, "CPU-seconds",
              "image and mask turned about three axes, as a share of one grid_sample of the image by the same map"),
    ]
    for name, peer in (("torchio", torchio_views()), ("kornia", kornia_views())):
        view, other = cpu_seconds(ours, lambda _, peer=peer: peer(image, mask), repeats=12)
        ratios.append(times_better(f"views_paper_vs_{name}", view, other, 2, "CPU-seconds",
                                   f"the paper's view against its nearest in {name}: " + SAME.format(12)))
    ratios += _feed(image, mask)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        volumes = pool.submit(extra_volumes).result()
    ratios.append(share("views_extra_memory", volumes, 8, 0.5, "float32 volumes",
                        "peak memory beyond the batch and the views, of 4 pairs of 150x192x192, as a share of the 8"))
    return ratios


def _feed(image: np.ndarray, mask: np.ndarray) -> list[Ratio]:
    """What a pair costs from the file on: the paper loads two gzipped NIfTI and makes two views on the host."""
    recipe, key = read_recipe("paper"), {"seed": 0, "epoch": 0}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("image.nii.gz", "mask.nii.gz")]
        for file, array in zip(files, (image, mask), strict=True):
            write_nifti(file, array, PAPER_GRID.affine)
        write_scan(scan_path(folder, "scan"), image, mask, "scan", PAPER_GRID.affine)
        store, monai = Store(Path(folder), None, {"shape": SHAPE, "spacing_mm": 1.0}), monai_views()

        def theirs(_: int) -> None:
            loaded, loaded_mask = (nib.load(file).get_fdata() for file in files)
            for _view in (0, 1):
                monai(loaded.astype(np.float32), loaded_mask)

        def host(repeat: int) -> None:
            store.read("scan")
            for number in (0, 1):
                drawn = draw(recipe, view=number, scan=repeat, **key)
                back = view_to_scan(drawn, SHAPE)
                in_plane(back[1:, 1:3], back[1:, 3], *SHAPE[1:], cropped_box(drawn, SHAPE)[:, 1:])

        def everything(repeat: int) -> None:
            read, read_mask = (torch.from_numpy(part)[None, None] for part in store.read("scan"))
            for number in (0, 1):
                make_views(read.float(), read_mask, [repeat], recipe, view=number, **key)

        device, cpu, paper = cpu_seconds(host, everything, theirs, repeats=12)
    what = ("one pair, from the file on, one thread, against nib.load().get_fdata() of two .nii.gz and two MONAI "
            "views: {}; quote feed_vs_paper_device and feed_vs_paper_cpu together")
    return [times_better("feed_vs_paper_device", device, paper, 50, "CPU-seconds of the host", what.format(
                "views made on an accelerator, only the host's part (read, draws, maps) is counted")),
            times_better("feed_vs_paper_cpu", cpu, paper, 3, "CPU-seconds", what.format("everything on the CPU"))]
