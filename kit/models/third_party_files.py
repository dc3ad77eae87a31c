"""Third-party weights: load a file as an encoder with a record, like the kit's own encoder.safetensors.

Reads files of `torch.save` and safetensors, tensors only, and accounts for every name in them.
`kit.models.third_party_formats` holds what is known of each format.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import resnet_params
from safetensors.torch import load_file
from torch import nn

from kit.errors import KitError
from kit.models.encoders import VIT_SIZES
from kit.models.third_party_formats import FORMATS, Format
from kit.runs import shown

Shapes = dict[str, tuple[int, ...]]

NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
MOST_NAMES = 20  # that an error lists of each kind


class EncoderError(KitError, ValueError):
    """An encoder cannot be used: missing, unreadable, of an unknown format, or unfit for the scans."""


def third_party_record(kind: str, path: Path) -> dict[str, Any]:
    """Describe a third-party file, with the fields of an encoder's record.

    Prints, once for each file, what it is, whether its hash is known, its licence, and which of its parts are ignored.

    Args:
        kind: one of `kit.models.third_party_formats.FORMATS`, or `auto` to recognise it by the names in the file.
        path: of the file.

    Returns:
        format, architecture, objective, preparation (None: unknown), participants (always empty), datasets, licence,
        source, differences, unverified, sha256.

    Raises:
        EncoderError: it cannot be read, or its format is unknown.
    """
    try:
        status = path.stat()
        with open(path, "rb"):
            pass
    except FileNotFoundError as error:
        raise EncoderError(f"no file {shown(path)} ({error.strerror})") from None
    except OSError as error:
        raise EncoderError(f"{shown(path)} cannot be read ({error.strerror})") from None
    return copy.deepcopy(_described(kind, path, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=32)
def _described(kind: str, path: Path, _time: int, _size: int) -> dict[str, Any]:
    state, outside = _read(path)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    kind = _format_of(shapes, path) if kind == "auto" else kind
    if kind not in FORMATS:
        raise EncoderError(f"{shown(path)}: no format {kind!r}; FORMAT is {', '.join(FORMATS)}")
    known = FORMATS[kind]
    weights, ignored = _sorted_out(shapes, known)
    architecture = known.architecture or _medicalnet(weights, path)
    digest = sha256_of(path)
    _say(kind, known, architecture, path, digest, [*outside, *ignored])
    return {"format": kind, "architecture": architecture, "objective": known.objective,
            "preparation": known.preparation, "participants": [], "datasets": list(known.datasets),
            "licence": known.licence, "source": known.source, "differences": known.differences,
            "unverified": known.unverified, "sha256": digest}


def sha256_of(path: Path) -> str:
    """Digest of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(kind: str, known: Format, architecture: str, path: Path, digest: str, ignored: list[str]) -> None:
    lines = [f"{shown(path)}: {architecture}, read as {kind}" + (f" of {known.source}" if known.source else "")]
    if path.suffix == ".tar":
        lines.append("a file of torch.save and no tar archive, whatever its name says: there is nothing to unpack")
    if digest in known.hashes:
        lines.append(f"sha256 {digest[:12]}... is the released file's")
    else:
        note = "; preparation and licence below are those of the released weights" if known.source else ""
        lines.append(f"sha256 {digest} is not known here{note}")
        if not known.source:
            lines.append("a state dict does not hold strides, pooling and attention heads: the features are right only "
                         f"if the network was built with those of the kit's {kind} (kit.models.encoders)")
        if kind == "medicalnet":
            lines.append("if it is a ResNet of your own, its features here are wrong: MedicalNet's last stages are "
                         "dilated")
    if known.preparation is None:
        lines.append("how its scans were prepared is not known: nothing is compared; give it scans like those that it "
                     "was trained on")
    else:
        lines.append(f"licence: {known.licence}")
    if not known.datasets:
        lines.append("the kit does not know which datasets and participants it was trained on: check yourself that the "
                     "people tested are not among them")
    lines += [f"ignored: {', '.join(ignored)}"] if ignored else []
    print("\n  ".join(lines))


def fill(network: nn.Module, path: Path, record: Mapping[str, Any]) -> None:
    """Load a third-party file into its network; nothing may be missing, left over or of another shape.

    Args:
        network: from `build_encoder`, with the record's architecture.
        path: of the file.
        record: from `third_party_record`.

    Raises:
        EncoderError: lists all names that do not fit, by kind.
    """
    weights, _ = _sorted_out(_read(path)[0], FORMATS[record["format"]])
    inner = "autoencoder." if record["architecture"] in VIT_SIZES else "network."
    weights = {name if name.startswith(inner) else inner + name: value for name, value in weights.items()}
    wanted = network.state_dict()
    # old files lack BatchNorm's counters, which are never read
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    left = [name for name in weights if name not in wanted]
    misshapen = [f"{name.removeprefix(inner)} {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
                 for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    problems = {"missing": missing, "left over": left, "misshapen": misshapen}
    if any(problems.values()):
        lines = [f"{kind}: {len(names)}: {_some([name.removeprefix(inner) for name in names])}"
                 for kind, names in problems.items() if names]
        raise EncoderError(f"{shown(path)} does not fit {record['architecture']}, read as {record['format']}:\n  "
                           + "\n  ".join(lines) + f"\nif it has another format, give FORMAT:PATH, where FORMAT is "
                           f"{', '.join(FORMATS)}")
    network.load_state_dict({**wanted, **weights}, strict=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + f", and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of a file by name, without DataParallel's `module.`, and the names of its other entries."""
    held: Any = _unpickled(path) if path.suffix != ".safetensors" else _safe(path)
    if not isinstance(held, Mapping):
        raise EncoderError(f"{shown(path)} holds a {type(held).__name__}, not weights by name: save the network's "
                           "state_dict()")
    nested = next((name for name in NESTED if isinstance(held.get(name), Mapping)), None)
    state = {str(name): value for name, value in (held[nested] if nested else held).items()}
    outside = [str(name) for name in held if name != nested] if nested else [
        name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    state = {name: value for name, value in state.items() if nested or name not in outside}
    if strange := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise EncoderError(f"{shown(path)}: {_some(strange)} in its {nested} are not tensors")
    if not state:
        raise EncoderError(f"{shown(path)} holds no weights by name, but {_some(outside) or 'nothing'}; weights "
                           f"are expected at its top level, or in {', '.join(NESTED)}")
    parallel = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(parallel): value for name, value in state.items()}, outside


def _safe(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # from the OS or safetensors
        raise EncoderError(f"{shown(path)} is not an encoder of this kit, nor weights of others "
                           f"({type(error).__name__}: {error})") from None


def _unpickled(path: Path) -> Any:
    """Load a file of `torch.save` that holds only tensors, numbers, text, lists and dicts."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            inside = [archive.next() for _ in range(3)]
        raise EncoderError(f"{shown(path)} is a tar archive (in it: {_some([each.name for each in inside if each])}); "
                           "unpack it, and give the file of weights that is in it")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL:? (\S+)", str(error)):
            raise EncoderError(f"{shown(path)} is not a plain file of tensors: unpickling it would run "
                               f"{found[1].rstrip('.')}, and such code can do anything, so it is not read. If you "
                               "trust its source, save only its state_dict on an isolated machine, and give that "
                               "file") from None
        raise EncoderError(_no_weights(path)) from None
    except Exception as error:  # from the OS, a truncated zip, an empty file
        raise EncoderError(f"{_no_weights(path)} ({type(error).__name__}: {str(error).partition('. ')[0]})") from None


def _no_weights(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(12)
    return (f"{shown(path)} is not an encoder of this kit, nor a file of torch.save or safetensors: it begins with "
            f"{start!r}; is the download complete, and not a web page that was saved instead?")


def _sorted_out(state: Mapping[str, Any], known: Format) -> tuple[dict[str, Any], list[str]]:
    """Strip the encoder's prefix, and take out the parts of a file that are known not to be needed.

    Returns:
        the other values by name: the encoder's, and any that nothing expects, which `fill` reports; and the parts that
        were taken out, with counts.
    """
    prefix = known.prefix if any(name.startswith(known.prefix) for name in state) else ""
    bare = bool(known.prefix) and not prefix  # the file holds the encoder alone
    weights: dict[str, Any] = {}
    ignored: Counter[str] = Counter()
    for name, value in state.items():
        own = name.removeprefix(prefix)
        if bare or own != name:  # certainly the encoder's
            found = re.match(known.unused, own)
            part = found[0].strip(".").rpartition(".")[2] if found else None
        else:
            part = name.partition(".")[0] if re.match(known.heads, name) else None
        if part is None:
            weights[own] = value
        else:
            ignored[part] += 1
    return weights, [f"{part} ({count})" for part, count in ignored.items()]


def _format_of(shapes: Shapes, path: Path) -> str:
    """Recognise a file's format by its parameter names.

    Raises:
        EncoderError: no known format has these names.
    """
    if "encoder.conv1.weight" in shapes and any(name.startswith("projector.") for name in shapes):
        return "neuro_simclr"
    for name, kind in (("backbone.patch_embedding.position_embeddings", "brainiac"),
                       ("backbone.conv1.weight", "brainiac_resnet50")):
        if name in shapes:
            return kind
    plain = {re.sub(r"^(network|autoencoder)\.", "", name): shape for name, shape in shapes.items()}
    if "features.conv0.weight" in plain:
        return "densenet121"
    if "cls_token" in plain:
        width = plain["cls_token"][-1]
        return next((name for name, sizes in VIT_SIZES.items() if sizes[0] == width), "vit")
    if "patch_embedding.position_embeddings" in plain:
        return "brainiac"
    if {"conv1.weight", "layer4.0.conv1.weight"} <= set(plain):
        if plain["conv1.weight"][0] == 16:
            return "resnet18_narrow"
        return "resnet18" if "layer2.0.downsample.0.bias" in plain else "medicalnet"
    raise EncoderError(f"{shown(path)} is not an encoder of this kit, and its weights' names match no format that the "
                       f"kit knows: {_some(list(shapes))}; if you know its format, give FORMAT:PATH, where FORMAT is "
                       f"{', '.join(FORMATS)}")


def _medicalnet(weights: Mapping[str, Any], path: Path) -> str:
    """Find the MedicalNet architecture with these blocks.

    Raises:
        EncoderError: there is none.
    """
    names = [name.removeprefix("network.") for name in weights]
    blocks = [len({name.split(".")[1] for name in names if name.startswith(f"layer{stage}.")})
              for stage in (1, 2, 3, 4)]
    kind = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
    for name, (block, layers, *_) in resnet_params.items():
        if (block, layers) == (kind, blocks):
            return f"medicalnet_{name}"
    raise EncoderError(f"{shown(path)}, read as medicalnet: {blocks} {kind} blocks in four stages, which no ResNet "
                       f"has; its names: {_some(list(weights))}")
