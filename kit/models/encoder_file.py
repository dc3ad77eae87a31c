"""encoder.safetensors: an encoder's weights with the record of how to use them again.

The record says the architecture, the preparation of the scans that it was trained on, and hashed ids of the
participants and scans that it saw (`kit.store.leakage`). It is read without the weights, so that a misfit is refused
before work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kit.models.encoders import build_encoder
from kit.problems import encoder_at as encoder_at  # which needs no torch
from kit.provenance import OLDER, Side, misfit
from kit.runs import resolve, shown, write_whole
from kit.store.grid import Grid


class EncoderError(ValueError):
    """An encoder does not fit; the message says what it has and what was asked for."""


def save_encoder(path: str | Path, encoder: nn.Module, record: dict[str, Any]) -> Path:
    """Write weights and record, whole or not at all.

    Args:
        path: of the file.
        encoder: from `build_encoder`.
        record: JSON values: architecture, objective, preparation, participants and voxels (hashed ids), made_from.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    return write_whole(path, lambda aside: save_file(weights, aside, metadata={"record": json.dumps(record)}))


def read_record(encoder: str | Path) -> dict[str, Any]:
    """The record in an encoder's file, without its weights.

    Raises:
        EncoderError: the file is no encoder of this kit.
    """
    path = resolve(encoder)
    path = path / "encoder.safetensors" if path.is_dir() else path
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["record"])
    except Exception as error:  # of the system, of safetensors, or of a record that is not ours
        raise EncoderError(f"{shown(path)} is no encoder of this kit ({type(error).__name__}: {error})") from None


def side_of(encoder: str | Path) -> dict[str, Side]:
    """What an encoder brings to `kit.provenance.check_fit`, as `encoder`: nothing if its weights are random."""
    if str(encoder).partition(":")[0] == "random":
        return {}
    record = read_record(encoder)
    if "made_from" not in record:
        print(f"encoder {shown(resolve(encoder))} is {OLDER}: only its preparation can be compared")
    sources = record.get("made_from", {}).get("prepared", {}).get("mask_sources", ())
    return {"encoder": Side(shown(resolve(encoder)), record["preparation"], sources)}


def weights_digest(network: nn.Module) -> str:
    """Hexadecimal digits that other weights do not have."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in network.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def noted(encoder: str | Path, network: nn.Module, record: dict[str, Any]) -> dict[str, str]:
    """What stands of an encoder in what a run was made from."""
    path = str(encoder) if record["objective"] == "random" else shown(resolve(encoder))
    return {"from": path, "weights": weights_digest(network), "objective": record["objective"]}


def load_encoder(encoder: str | Path, preparation: dict[str, Any], seed: int = 0,
                 allow: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder with its record, checked against the scans that it is to read.

    Args:
        encoder: `random` (the paper's ResNet-18), `random:ARCHITECTURE`, an encoder.safetensors, or a run of 2.
        preparation: the record of the prepared scans.
        seed: of random weights.
        allow: in what the preparation may differ; see `kit.provenance.check_fit`.

    Raises:
        EncoderError: the file is none, or the scans were prepared otherwise (every difference is listed).
    """
    grid = Grid(preparation["shape"], preparation["spacing_mm"])
    kind, _, architecture = str(encoder).partition(":")
    if kind == "random":
        architecture = architecture or "resnet18"
        return build_encoder(architecture, grid, seed), {"architecture": architecture, "objective": "random",
                                                          "participants": []}
    record = read_record(encoder)
    sides = {"encoder": Side(shown(resolve(encoder)), record["preparation"]), "these": Side("scans", preparation)}
    if message := misfit(sides, allow):
        raise EncoderError(message)
    network = build_encoder(record["architecture"], grid)
    path = resolve(encoder)
    network.load_state_dict(load_file(path / "encoder.safetensors" if path.is_dir() else path), strict=True)
    return network, record
