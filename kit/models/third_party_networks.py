"""Published third-party networks, which take the kit's scans and convert them to their own input.

BrainIAC (Tak et al., Nature Neuroscience 2026) and MedicalNet (Chen et al. 2019, arXiv 1904.00625) were trained with
other axes, sizes and intensity scales. Each class applies to the kit's z-scored scans what their public code does to a
scan on their grid: axis order, size, intensities, then features. `kit.models.third_party_formats` lists what could not
be checked.
"""

from __future__ import annotations

from functools import partial

import torch
from monai.networks.nets import ResNet, ViT
from monai.networks.nets.resnet import ResNetBlock, get_inplanes, get_medicalnet_pretrained_resnet_args, resnet_params
from torch import nn
from torch.nn import functional as F

from kit.device import at_least_float32
from kit.models.encoder import Encoder
from kit.models.pooling import AveragePool, MaxPool
from kit.store.grid import Grid, Shape

DEPTHS = tuple(int(name.removeprefix("resnet")) for name in resnet_params)  # 10 to 200
THIRD_PARTY = ("brainiac", "brainiac_resnet50", *(f"medicalnet_resnet{depth}" for depth in DEPTHS))
# grid of ICBM152 2009a, the size of BrainIAC's sample scans: first voxel (x, y, z) in mm, and shape (z, y, x)
WHOLE_HEAD = ((-98.0, -134.0, -72.0), (189, 233, 197))
SLAB: Shape = (56, 448, 448)  # MedicalNet's input (depth, height, width)


class BrainIACViT(Encoder):
    """BrainIAC's ViT-B/16 at 96x96x96, without class token; features are the first patch's token after the norm.

    `network` keeps MONAI's parameter names, except for the norms of the unused cross-attention.
    """

    features = 768
    rescales = True

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.network = ViT(in_channels=1, img_size=(96, 96, 96), patch_size=(16, 16, 16))
        for block in self.network.blocks:
            block.norm_cross_attn = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, 768)."""
        resized = F.interpolate(darkest_zero(whole_head(images, self.grid)), (96, 96, 96), mode="trilinear")
        return at_least_float32(self.network(brain_zscored(resized))[0][:, 0])


class BrainIACResNet(Encoder):
    """BrainIAC's ResNet-50 of 2024 at 128x128x128, on intensities from 0 to 1; features are the mean over places.

    `network` keeps MONAI's parameter names.
    """

    features = 2048
    rescales = True

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.network = ResNet("bottleneck", [3, 4, 6, 3], get_inplanes(), n_input_channels=1, conv1_t_stride=2,
                              feed_forward=False)
        self.network.maxpool, self.network.avgpool = MaxPool(3, 2, 1), AveragePool(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, 2048)."""
        resized = F.interpolate(darkest_zero(whole_head(images, self.grid)), (128, 128, 128), mode="area")
        brightest = resized.amax((1, 2, 3, 4), keepdim=True)
        return self.network(resized / torch.where(brightest > 0, brightest, 1))


class MedicalNet(Encoder):
    """MedicalNet's ResNet without its segmentation head; features are the mean over places.

    As published, and unlike in MONAI, the last two stages keep their input's size and use dilations of 2 and 4.
    `network` keeps MONAI's parameter names.

    Args:
        depth: one of `DEPTHS`.
        shape: voxels (depth, height, width) that scans are resized to.
    """

    rescales = True

    def __init__(self, depth: int, shape: Shape = SLAB) -> None:
        super().__init__()
        block, layers, *_ = resnet_params[f"resnet{depth}"]
        bias, shortcut = get_medicalnet_pretrained_resnet_args(depth)
        self.shape = shape
        self.network = ResNet(block, layers, get_inplanes(), n_input_channels=1, conv1_t_stride=2, feed_forward=False,
                              shortcut_type=shortcut, bias_downsample=bias)
        _dilate(self.network.layer3, 2)
        _dilate(self.network.layer4, 4)
        self.network.maxpool, self.network.avgpool = MaxPool(3, 2, 1), AveragePool(1)
        self.features = get_inplanes()[-1] * (ResNetBlock.expansion if block == "basic" else 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 1, depth, height, width) -> (batch, features)."""
        # Callers choose the batch by the scans' own size; enlarged, a single one takes 0.8 GB.
        singly = not (self.training or torch.is_grad_enabled())
        return torch.cat([self.network(brain_zscored(nearest(some, self.shape)))
                          for some in images.split(1 if singly else len(images))])


def _dilate(stage: nn.Sequential, rate: int) -> None:
    """Make a ResNet's stage keep its input's size and dilate its convolutions by `rate`."""
    for block in stage:
        for layer in block.modules():
            if isinstance(layer, nn.Conv3d):
                layer.stride = (1, 1, 1)
                if layer.kernel_size == (3, 3, 3):
                    layer.dilation = layer.padding = (rate, rate, rate)
        if isinstance(block.downsample, partial):  # shortcuts of type A have no weights
            block.downsample.keywords["stride"] = 1


def whole_head(images: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Place scans on `WHOLE_HEAD` by padding or cropping whole voxels (zero outside), in a NIfTI file's axis order.

    (batch, 1, depth, height, width) on `grid` -> (batch, 1, width, height, depth): x, y, z.
    """
    origin, shape = WHOLE_HEAD
    pads = []
    for axis in (2, 1, 0):  # x, y, z: `pad` begins with the last axis
        before = round((grid.origin_mm[2 - axis] - origin[2 - axis]) / grid.spacing_mm)
        pads += [before, round(shape[axis] / grid.spacing_mm) - before - grid.shape[axis]]
    return F.pad(images, pads).permute(0, 1, 4, 3, 2)


def nearest(images: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Resize the last three axes by nearest neighbour, aligning first and last voxels as scipy's `zoom` does."""
    for axis, size in enumerate(shape, start=2):
        places = torch.linspace(0, images.shape[axis] - 1, size, dtype=torch.float64).add(0.5).floor().long()
        images = images.index_select(axis, places.to(images.device))
    return images


def brain_zscored(images: torch.Tensor) -> torch.Tensor:
    """Z-score each scan (batch, 1, depth, height, width) over its non-zero voxels; the others stay zero."""
    brain, every = images != 0, (1, 2, 3, 4)
    count = brain.sum(every, keepdim=True).clamp(min=1)
    centred = (images - images.sum(every, keepdim=True) / count) * brain
    deviation = (centred.square().sum(every, keepdim=True) / count).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)


def darkest_zero(images: torch.Tensor) -> torch.Tensor:
    """Shift each scan's non-zero voxels so that the darkest becomes zero; the others stay zero.

    Resizing then mixes the brain's edge with black, as in a raw scan whose background is zero. The result is that raw
    scan up to a factor, and up to the raw value of its darkest voxel, which a z-score has lost.

    Args:
        images: (batch, 1, depth, height, width), z-scored in the brain, 0 outside.
    """
    brain = images != 0
    return torch.where(brain, images - torch.where(brain, images, torch.inf).amin((1, 2, 3, 4), keepdim=True), 0)


def build_third_party(architecture: str, grid: Grid) -> Encoder:
    """Build one of `THIRD_PARTY` with random weights.

    Args:
        architecture: its name.
        grid: of the scans that it will read.
    """
    if architecture == "brainiac":
        return BrainIACViT(grid)
    if architecture == "brainiac_resnet50":
        return BrainIACResNet(grid)
    return MedicalNet(int(architecture.removeprefix("medicalnet_resnet")))
