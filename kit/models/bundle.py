"""Export an encoder's weights for use without this kit: plain MONAI, a MONAI bundle, an exported program.

MONAI's classes load `model.safetensors` and `models/model.pt` directly. A ViT's features are the mean of its brain
tokens, which MONAI's class does not compute, so its bundle runs the exported program instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import monai
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

import kit
from kit.models.encoder_file import EncoderError, weights_digest
from kit.models.encoders import DenseNetEncoder, ResNetEncoder, ViTEncoder
from kit.runs import write_json, write_whole

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"  # the newest for any network, Nov 2026
PROGRAM = "program.pt2"
FACTS = ("shape", "spacing_mm", "origin_mm", "intensity")  # of the preparation, repeated at the top of config.json


class MonaiNetwork(NamedTuple):
    """An encoder as one of MONAI's networks: `getattr(monai.networks.nets, name)(**arguments)` loads the weights."""

    name: str
    arguments: dict[str, Any]  # JSON values
    weights: dict[str, torch.Tensor]
    tokens: list[int] | None = None  # ViT: patches whose tokens are averaged; None: forward returns the features


def as_monai_network(encoder: nn.Module) -> MonaiNetwork:
    """Describe an encoder by MONAI's class and parameter names.

    MONAI's DenseNet cannot be built without a class layer. Here that layer is the identity, so MONAI's forward returns
    the features.

    Raises:
        EncoderError: it is not one of the kit's own networks.
    """
    if isinstance(encoder, ResNetEncoder):
        return MonaiNetwork("ResNet", encoder.arguments, _weights(encoder.network))
    if isinstance(encoder, DenseNetEncoder):
        last = {"class_layers.out.weight": torch.eye(encoder.features),
                "class_layers.out.bias": torch.zeros(encoder.features)}
        arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": encoder.features}
        return MonaiNetwork("DenseNet121", arguments, _weights(encoder.network) | last)
    if isinstance(encoder, ViTEncoder):
        return MonaiNetwork("MaskedAutoEncoderViT", json.loads(json.dumps(encoder.arguments)),
                            _weights(encoder.autoencoder), encoder.brain_patches.tolist())
    raise EncoderError(f"{type(encoder).__name__}: no export to MONAI's classes is known for this network")


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


def config_of(encoder: nn.Module, record: dict[str, Any]) -> dict[str, Any]:
    """Contents of config.json: the network, its input, and how scans must be prepared for it.

    Args:
        encoder, record: from `kit.models.encoder_file.load_encoder`, of trained weights: a record of random ones has no
            preparation.

    Raises:
        EncoderError: it is not one of the kit's own networks.
    """
    preparation, as_monai = record["preparation"], as_monai_network(encoder)
    config = {
        "architecture": record["architecture"], "objective": record.get("objective"),
        "class": f"monai.networks.nets.{as_monai.name}", "arguments": as_monai.arguments, "features": encoder.features,
        "input": ["batch", 1, *preparation["shape"]], "axes": list(preparation["axes"]),
        **{name: preparation.get(name) for name in FACTS}, "preparation": preparation,
        "kit": record.get("kit"), "weights": weights_digest(encoder),
        "fingerprint": record.get("made_from", {}).get("fingerprint")}
    return config if as_monai.tokens is None else {
        **config, "pooling": "mean over these tokens of the last block, without the class token",
        "tokens": as_monai.tokens}


def write_weights(path: Path, encoder: nn.Module) -> Path:
    """Write `model.safetensors` with MONAI's parameter names."""
    # `save_file` on a full disk raises no OSError
    values = save(as_monai_network(encoder).weights, metadata={"format": "pt"})
    return write_whole(path, lambda aside: aside.write_bytes(values))


def write_program(path: Path, encoder: nn.Module, config: dict[str, Any]) -> Path:
    """Write an encoder as a `torch.export` program: (any batch, 1, z, y, x) float32 -> (batch, features) float32.

    `torch.export.load(path).module()` runs it without this kit or MONAI, and refuses a scan of another shape. Its
    `extra_files` hold config.json.
    """
    scans = torch.zeros(2, 1, *config["preparation"]["shape"])
    with torch.no_grad():
        program = torch.export.export(encoder.eval(), (scans,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return _written(path, lambda file: torch.export.save(program, file, extra_files={
        "config.json": json.dumps(config)}))


def _written(path: Path, save_to: Callable[[BytesIO], None]) -> Path:
    """Serialise in memory first: torch names the archive after its file, and a temporary name holds the host's name."""
    memory = BytesIO()
    save_to(memory)
    return write_whole(path, lambda aside: aside.write_bytes(memory.getbuffer()))


def write_bundle(folder: Path, encoder: nn.Module, config: dict[str, Any], description: str, licence: str) -> None:
    """Write a MONAI bundle into a folder: `configs/metadata.json`, `configs/inference.json`, `models/model.pt`.

    It uses only classes and functions of MONAI and torch. A ViT's bundle has no `model.pt`; it runs `program.pt2` from
    the same folder, on the CPU.
    """
    write_json(folder / "configs/metadata.json", metadata_of(config, description, licence))
    write_json(folder / "configs/inference.json", inference_of(config))
    if "tokens" not in config:
        _written(folder / "models/model.pt", lambda file: torch.save(as_monai_network(encoder).weights, file))


def metadata_of(config: dict[str, Any], description: str, licence: str) -> dict[str, Any]:
    """Contents of a bundle's `metadata.json`, by MONAI's schema; the preparation is part of the input's entry."""
    tensor = {"dtype": "float32", "value_range": [], "is_patch_data": False}
    image = {"type": "image", "format": "magnitude", "modality": "MR", "num_channels": 1,
             "spatial_shape": config["shape"], **tensor, "channel_def": {"0": "prepared scan"},
             "preparation": config["preparation"]}
    features = {"type": "feature", "format": "feature", "num_channels": config["features"], "spatial_shape": [],
                **tensor, "channel_def": {}}
    return {
        "schema": SCHEMA, "version": kit.__version__, "changelog": {kit.__version__: "as exported"},
        "monai_version": monai.__version__, "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__, "required_packages_version": {"nibabel": version("nibabel")},
        "name": f"{config['architecture']} by {config['objective']}", "task": "features of 3D brain MRI",
        "description": description, "authors": "to be filled in", "copyright": licence,
        "intended_use": "Research. Not for clinical use; see README.md.",
        "data_type": "nibabel", "image_classes": "one channel: a scan prepared as `preparation` says",
        "pred_classes": f"{config['features']} features", "network_data_format": {
            "inputs": {"image": image}, "outputs": {"pred": features}}}


def inference_of(config: dict[str, Any]) -> dict[str, Any]:
    """Contents of a bundle's `inference.json`: prepared NIfTI scans in, `features.csv` out, one row per scan."""
    network = {"network_def": {"_target_": config["class"].rpartition(".")[2], **config["arguments"]},
               "network": "$[@network_def.load_state_dict(torch.load(@bundle_root + '/models/model.pt', "
                          "weights_only=True)), @network_def.eval().requires_grad_(False).to(@device)][1]",
               "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"}
    if "tokens" in config:
        network = {"network_def": f"$torch.export.load(@bundle_root + '/{PROGRAM}').module()",
                   "network": "$@network_def.requires_grad_(False)", "device": "$torch.device('cpu')"}
    keys = {"keys": "image"}
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".", "dataset_dir": "$@bundle_root + '/scans'", "output_dir": "$@bundle_root + '/features'",
        "images": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))", **network,
        "preprocessing": {"_target_": "Compose", "transforms": [
            {"_target_": "LoadImaged", **keys, "ensure_channel_first": True, "image_only": True},
            {"_target_": "Orientationd", **keys, "axcodes": "RAS", "labels": None},
            {"_target_": "Transposed", **keys, "indices": [0, 3, 2, 1]},  # x, y, z of the file -> z, y, x
            {"_target_": "Lambdad", **keys,  # a scan of another shape raises an error that names both
             "func": f"$lambda image: image.expand(1, {', '.join(map(str, config['shape']))})"}]},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': name} for name in @images]",
                    "transform": "@preprocessing"},
        "inferer": {"_target_": "SimpleInferer"},
        "saver": {"_target_": "CSVSaver", "output_dir": "@output_dir", "filename": "features.csv"},
        "run": ["$[@saver.save(@inferer(scan['image'].as_tensor()[None].to(@device), @network)[0], "
                "{'filename_or_obj': name}) for name, scan in zip(@images, @dataset)]", "$@saver.finalize()"]}
