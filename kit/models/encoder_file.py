"""encoder.safetensors: an encoder's weights with the record of how to use them.

The record holds the architecture, the preparation of the training scans, and hashed ids of the participants and scans
seen in training (`kit.store.leakage`). It can be read without the weights, so a mismatch is refused before work starts.
The same functions read third-party weights (`kit.models.third_party_files`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from kit.models.encoder import Encoder
from kit.models.encoders import build_encoder
from kit.models.third_party_files import EncoderError as EncoderError
from kit.models.third_party_files import fill, third_party_record
from kit.problems import encoder_at as encoder_at  # defined there because it needs no torch
from kit.problems import encoder_parts
from kit.provenance import OLDER, Side, misfit
from kit.runs import resolve, shown, write_whole
from kit.store.grid import Grid


def save_encoder(path: str | Path, encoder: nn.Module, record: dict[str, Any]) -> Path:
    """Write weights and record to one file, atomically.

    Args:
        path: of the file.
        encoder: from `build_encoder`.
        record: JSON values: architecture, objective, preparation, participants and voxels (hashed ids), made_from.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    values = save(weights, metadata={"record": json.dumps(record)})  # `save_file` on a full disk raises no OSError
    return write_whole(path, lambda aside: aside.write_bytes(values))


def read_record(spec: str | Path) -> dict[str, Any]:
    """Read an encoder's record without its weights; for third-party weights, return what is known about them.

    Args:
        spec: an encoder.safetensors, a run of 2_pretrain, or third-party weights as PATH or FORMAT:PATH.

    Raises:
        EncoderError: the file is neither an encoder of this kit nor in a known format; or it is an encoder of this
            kit, and FORMAT is another.
    """
    kind, rest = encoder_parts(spec)
    path = _file(rest)
    if path.suffix == ".safetensors" or (kind == "auto" and not path.is_file()):
        record = None
        try:
            with open(path, "rb"), safe_open(path, framework="np") as file:  # safe_open names no reason
                held = file.metadata() or {}
                if "record" in held:
                    record = json.loads(held["record"])
        except PermissionError as error:
            raise EncoderError(f"{shown(path)} cannot be read ({error.strerror})") from None
        except Exception as error:  # from the OS, from safetensors, or a record that is not ours
            raise EncoderError(f"{shown(path)} is not an encoder of this kit ({type(error).__name__}: "
                               f"{error})") from None
        if record is not None:  # whatever FORMAT says: it knows whom the encoder has seen
            if kind not in ("auto", record["architecture"]):
                raise EncoderError(f"{shown(path)} is an encoder of this kit, a {record['architecture']}, not {kind}: "
                                   "give its path alone")
            return record
    return third_party_record(kind, path)


def _file(rest: str) -> Path:
    """Path of the weights file, given a file or a run folder (the part after FORMAT: in an encoder's name)."""
    path = resolve(rest)
    return path / "encoder.safetensors" if path.is_dir() else path


def side_of(spec: str | Path) -> dict[str, Side]:
    """The encoder's side for `kit.provenance.check_fit`, under the key `encoder`.

    Empty if the weights are random, or if the preparation of their training scans is unknown.
    """
    kind, rest = encoder_parts(spec)
    if kind == "random":
        return {}
    record = read_record(spec)
    if record["preparation"] is None:
        return {}
    if "made_from" not in record and "format" not in record:
        print(f"encoder {shown(resolve(rest))} is {OLDER}: only its preparation can be compared")
    sources = record.get("made_from", {}).get("prepared", {}).get("mask_sources", ())
    return {"encoder": Side(shown(resolve(rest)), record["preparation"], sources)}


def weights_digest(network: nn.Module, drawn: str = "") -> str:
    """Hash the names, shapes, dtypes and values of weights to 16 hexadecimal digits.

    Args:
        drawn: how random weights were drawn, hashed in place of their values, whose last bits depend on torch's
            version: two shards of a benchmark under different versions would delete each other's results.
    """
    digest = hashlib.blake2b(drawn.encode(), digest_size=8)
    for name, weight in network.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not drawn:
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def noted(spec: str | Path, network: nn.Module, record: dict[str, Any]) -> dict[str, str]:
    """What a run's `made_from.json` notes about its encoder.

    `weights` is a digest of its weights, with a prefix if the network reads scans otherwise than it did in an older
    kit: features and results of that reading are stale.
    """
    if record["objective"] == "random":
        path, drawn = str(spec), f"{record['architecture']} seed {record['seed']}"
    else:
        path, drawn = shown(resolve(encoder_parts(spec)[1])), ""
    # until November 2026, BrainIAC's networks read scans resized with mean tissue around them instead of black
    reading = "black-" if record["architecture"].startswith("brainiac") else ""
    return {"from": path, "weights": reading + weights_digest(network, drawn), "objective": record["objective"]}


def load_encoder(spec: str | Path, preparation: dict[str, Any], seed: int = 0,
                 allow: Sequence[str] = ()) -> tuple[Encoder, dict[str, Any]]:
    """Load an encoder with its record, and check it against the scans that it will read.

    Args:
        spec: `random` (the paper's ResNet-18), `random:ARCHITECTURE`, an encoder.safetensors, a run of 2_pretrain,
            or third-party weights as PATH or FORMAT:PATH (`kit.models.third_party_formats.FORMATS`).
        preparation: the record of the prepared scans.
        seed: of random weights.
        allow: fields in which the preparations may differ; see `kit.provenance.check_fit`.

    Returns:
        the network, in training mode, and its record; of random weights that is only architecture, objective, seed and
        participants.

    Raises:
        EncoderError: the file is not an encoder, its weights do not fit its architecture, or the scans were prepared
            differently (every difference is listed).
        GridError: an architecture of random weights cannot read scans of this grid.
    """
    grid = Grid(preparation["shape"], preparation["spacing_mm"])
    kind, rest = encoder_parts(spec)
    if kind == "random":
        architecture = rest or "resnet18"
        return build_encoder(architecture, grid, seed), {"architecture": architecture, "objective": "random",
                                                          "seed": seed, "participants": []}
    record = read_record(spec)
    known = {} if record["preparation"] is None else {"encoder": Side(shown(resolve(rest)), record["preparation"])}
    if message := misfit({**known, "scans": Side("to be read", preparation)}, allow):
        raise EncoderError(message)
    path = _file(rest)
    try:
        network = build_encoder(record["architecture"], grid)
        if "format" not in record:
            network.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, ValueError) as error:  # torch lists the weights; an unknown architecture; an odd grid
        raise EncoderError(f"{shown(path)} does not fit {record['architecture']}: {error}") from None
    if "format" in record:
        fill(network, path, record)
    return network, record
