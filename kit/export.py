"""Export an encoder to one folder that model hubs, MONAI, plain torch and this kit can read, without network access.

    python -m kit.export outputs/demo/2_pretrain/seed0 --output outputs/export --benchmark outputs/demo/5_benchmark

The folder holds

    README.md             the model card
    config.json           MONAI's class and its arguments, the input, the whole preparation, the fingerprint
    model.safetensors     weights with MONAI's parameter names
    program.pt2           the encoder as a `torch.export` program, for any batch size
    configs/, models/     a MONAI bundle: metadata.json, inference.json, model.pt
    encoder.safetensors   a copy, so that the kit accepts the folder as `encoder`
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from kit.cohort.tabular import read_table
from kit.errors import KitError
from kit.evaluate.benchmark_cells import weights_together
from kit.models.bundle import PROGRAM, config_of, write_bundle, write_program, write_weights
from kit.models.card import card, description
from kit.models.encoder_file import EncoderError, encoder_at, load_encoder, read_record, weights_digest
from kit.models.reference import FILE as REFERENCE
from kit.reading import read_yaml
from kit.runs import MADE_FROM, resolve, shown, write_json, write_whole


class ExportError(KitError, ValueError):
    """An export cannot be made; the message says why and what to do."""


def export(encoder: str | Path, output: str | Path, benchmark: str | Path | None = None, licence: str = "") -> Path:
    """Write the folder that the module's docstring describes; nothing appears in it before everything is made.

    Args:
        encoder: an encoder.safetensors, or a run of 2_pretrain, from which the card takes data and losses.
        output: the folder, new or empty (hidden files aside, such as a hub's `.git`).
        benchmark: a run of 5_benchmark, whose scores of this encoder join the card.
        licence: of the weights, by the name that hubs use (`cc-by-4.0`); if empty, the card says to fill it in.

    Returns:
        the folder.

    Raises:
        ExportError: the encoder does not exist or is third-party, the folder is not empty, or the benchmark has no
            score of the encoder.
        EncoderError: the file is not an encoder of this kit.
    """
    path, folder = _file_of(encoder), resolve(output)
    _check_empty(folder)
    record = read_record(path)
    if "format" in record:
        raise ExportError(f"{shown(path)} holds third-party weights ({record['format']}), whose data and licence are "
                          "not the kit's to declare; only an encoder.safetensors or a run of 2_pretrain can be "
                          "exported")
    network, _ = load_encoder(path, record["preparation"])
    config = config_of(network, record)
    scores = None if benchmark is None else scores_of(benchmark, config["weights"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        made = Path(aside)
        write_json(made / "config.json", config)
        write_weights(made / "model.safetensors", network)
        write_program(made / PROGRAM, network, config)
        write_bundle(made, network, config, description(record, config), licence or "to be filled in")
        own = [(path, "encoder.safetensors")]  # the name that 2_pretrain gives
        if path.name == "encoder.safetensors":  # a file of another name may lie beside another encoder's reference
            own.append((path.with_name(REFERENCE), REFERENCE))
        for each, name in own:
            if each.is_file():
                write_whole(made / name, partial(shutil.copyfile, each))
        text = card(record, config, path.parent, licence, scores)
        write_whole(made / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
        folder.mkdir(exist_ok=True)
        for each in sorted(made.iterdir()):
            os.replace(each, folder / each.name)
    return folder


def _file_of(encoder: str | Path) -> Path:
    if str(encoder).partition(":")[0] == "random":
        raise ExportError(f"{encoder}: random weights have nothing to export; give an encoder.safetensors or a run of "
                          "2_pretrain")
    path = resolve(encoder)
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"{shown(path)}: no such file; give an encoder.safetensors or a run of 2_pretrain that is "
                          "finished")
    return path


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{shown(folder)} is a file; give a folder as --output")
    there = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []
    if there:
        raise ExportError(f"{shown(folder)} holds {', '.join(there[:5])}{', ...' * (len(there) > 5)}; give another "
                          "folder as --output, or empty it")


def scores_of(benchmark: str | Path, weights: str) -> pd.DataFrame:
    """Rows of a benchmark's `scores.csv` for the encoder with these weights, or for several seeds that include it.

    Raises:
        ExportError: the benchmark is not finished, or has no row for this encoder.
    """
    run = resolve(benchmark)
    try:
        models = json.loads((run / MADE_FROM).read_text(encoding="utf-8"))["models"].values()
        table, params = read_table(run / "scores.csv", text=("encoder", "mode", "task")), read_yaml(run / "params.yaml")
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{shown(run)} is not a finished run of 5_benchmark ({type(error).__name__}: "
                          f"{error})") from None
    noted = {(model["encoder"]["name"], model["encoder"]["weights"]) for model in models}
    names = {name for name, found in noted if found == weights}
    names |= {name for name, spec in params["encoders"].items() if "{seed}" in spec
              if any(weights in each and (name, weights_together(each)) in noted
                     for each in _weights_by_fold(spec, params["seeds"]))}
    rows = table[table["encoder"].isin(names)]
    if rows.empty:
        listed = ", ".join(f"{name} ({spec})" for name, spec in params["encoders"].items())
        raise ExportError(f"{shown(run)} has no score of this encoder (weights {weights}); it has {listed}. An "
                          "encoder of several seeds is recognised only while the files of all its seeds are there. "
                          "Give the benchmark that tested it, or leave --benchmark out")
    return rows


def _weights_by_fold(spec: str, seeds: list[int]) -> list[list[str]]:
    """Weight digests of each fold's encoders, one per seed, up to the first fold of which one cannot be read."""
    found: list[list[str]] = []
    for fold in itertools.count() if "{fold}" in spec else (0,):
        try:
            found.append([_digest(encoder_at(spec, fold, seed)) for seed in seeds])
        except EncoderError:
            break
    return found


def _digest(encoder: str) -> str:
    record = read_record(encoder)
    if "format" in record:  # third-party weights are never exported
        return ""
    return weights_digest(load_encoder(encoder, record["preparation"])[0])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m kit.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("encoder", help="an encoder.safetensors, or a run of 2_pretrain")
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument("--benchmark", help="a run of 5_benchmark, whose scores of this encoder join the card")
    parser.add_argument("--licence", default="", help="of the weights, as hubs name it, such as cc-by-4.0")
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    try:
        print(shown(export(values["encoder"], values["output"], values["benchmark"], values["licence"])))
    except (KitError, OSError) as error:
        print(f"kit.export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
