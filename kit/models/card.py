"""The model card of an encoder: a README.md for model hubs, from its record and run. It names no participants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kit.cohort.identity import UNNAMED
from kit.cohort.labels import sexes
from kit.cohort.tables import PROCEDURAL
from kit.cohort.tabular import ages, spelled
from kit.errors import KitError
from kit.provenance import MadeFrom, read_made_from
from kit.runs import resolve
from kit.store.store import read_index

# training settings that the card lists; OBJECTIVE_SETTINGS has those of one objective
SETTINGS = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "warmup_fraction", "weight_decay", "ema",
            "sampling", "precision", "seed")
OBJECTIVE_SETTINGS = {"simclr": ("recipe", "temperature", "projection", "session_pairs"),
                      "mae": ("mask_ratio", "normalise_patches", "mae_recipe")}
PREPARED = {"shape": "voxels (z, y, x)", "spacing_mm": "spacing, mm", "origin_mm": "first voxel (x, y, z), MNI mm",
            "axes": "order of the axes", "intensity": "intensity", "mask": "mask", "registration": "registration",
            "bias_correction": "bias correction", "template": "template"}
SCORED = ("task", "mode", "label_fraction", "distribution", "metric", "value", "low", "high", "participants", "seeds")
NO_RESULT = ("epoch", "learning_rate", "seconds")  # log columns that are not results
TO_FILL = "TO BE FILLED IN"


def card(record: Mapping[str, Any], config: Mapping[str, Any], run: Path, licence: str = "",
         scores: pd.DataFrame | None = None) -> str:
    """Return the text of the card.

    Args:
        record: the encoder's.
        config: see `kit.models.bundle.config_of`.
        run: folder of the encoder's file; its `made_from.csv` and `log.csv` are used if they belong to this encoder.
        licence: of the weights, by the name that hubs use; if empty, the card says that it is to be filled in.
        scores: rows of a benchmark's `scores.csv` for this encoder.
    """
    tags = ["brain", "mri", "3d", "self-supervised-learning", *filter(None, [config["objective"]])]
    front = {"license": licence or "unknown", "library_name": "monai", "pipeline_tag": "image-feature-extraction",
             "tags": tags}
    title = f"# {config['architecture']} by {config['objective']}"
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", title,
             description(record, config), *_data(record, run), "## Preparation of scans", *_preparation(config),
             "## Training", *_training(record, run), "## Scores", *_scores(scores), "## How to use it", _use(config),
             "## What it must not be used for", _limits(record),
             "## Licence", f"`{licence}`" if licence else
             f"{TO_FILL}: the weights' licence, and whether the licences of the data above allow it (`license` at the "
             "top of this file, too)."]
    return "\n\n".join(parts) + "\n"


def description(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Describe the encoder in two sentences, and in a third say if it was trained on procedural data."""
    side = "×".join(map(str, config["shape"]))
    by = ", ".join(f"{word} {config[word]}" for word in ("kit", "fingerprint") if config[word]) or "an older kit"
    text = (f"An encoder of 3D brain MRI: a scan of {side} voxels of {config['spacing_mm']:g} mm becomes "
            f"{config['features']} features. Made by {by}, weights {config['weights']}.")
    return text + _procedural(record)


def _procedural(record: Mapping[str, Any]) -> str:
    datasets = record.get("seen", {}).get("dataset", {})
    made_up = sum(count for name, count in datasets.items() if name.startswith(PROCEDURAL))
    if not made_up:
        return ""
    share = "all" if made_up == sum(datasets.values()) else f"{made_up} of {sum(datasets.values())}"
    return (f" **Procedural data: {share} scans that it was trained on were drawn by a program, and no person was "
            "scanned for them; neither features nor scores say anything about people.**")


def _data(record: Mapping[str, Any], run: Path) -> list[str]:
    """Count the scans of each dataset, and its participants if the run's own table is there; ages and sexes."""
    made, known = read_made_from(run), record.get("made_from", {})
    head = ["## Data"]
    if made and made.rows is not None and made.fingerprint == known.get("fingerprint"):
        rows = made.rows.assign(dataset=made.rows["dataset"].map(_public))
        counts = rows.groupby(["dataset", "part"], sort=True).agg(participants=("participant", "nunique"),
                                                                  scans=("scan", "size")).reset_index()
        return [*head, _table(counts), f"Together {rows['participant'].nunique()} participants, {len(rows)} scans. "
                "Only \"learned from\" moved the weights.", _ages_and_sexes(made)]
    if seen := record.get("seen", {}).get("dataset"):
        people = known.get("prepared", {}).get("participants", "an unknown number of")
        return [*head, _table(pd.DataFrame({"dataset": list(map(_public, seen)), "scans": list(seen.values())})),
                f"Together {people} participants.", _ages_and_sexes(None)]
    return [*head, "The encoder's file does not say.", _ages_and_sexes(None)]


def _public(dataset: str) -> str:
    """A dataset's name for the card; one without a name is called by its file or folder, which stays private."""
    return "(no name)" if not dataset or dataset.startswith(UNNAMED) else dataset


def _ages_and_sexes(made: MadeFrom | None) -> str:
    """Range of age and counts of sex of those learned from, if the store that the run names still has them."""
    table = pd.DataFrame()
    if made is not None and made.rows is not None:
        try:
            index = read_index(resolve(made.record["prepared"]["from"]) / "index.csv")
        except (OSError, KitError, KeyError):  # moved, or gone
            index = pd.DataFrame(columns=["scan"])
        learned = made.rows.loc[made.rows["part"] == "learned from", ["scan", "participant"]]
        table = learned.merge(index.drop(columns="participant", errors="ignore"), on="scan", how="left")
    said = []
    age, sex = spelled(table, "age"), spelled(table, "sex") or spelled(table, "gender")
    if age and pd.api.types.is_numeric_dtype(years := ages(table[age])) and years.notna().any():
        known = table["participant"][years.notna()].nunique()
        said.append(f"Age {years.min():.0f} to {years.max():.0f} in {known} of {table['participant'].nunique()} "
                    "participants learned from.")
    if sex and (known_sex := sexes(table.drop_duplicates("participant")[sex])).notna().any():
        counts = known_sex.fillna("not known").astype(str).value_counts()
        said.append(f"Sex: {', '.join(f'{name} {count}' for name, count in counts.items())}.")
    if missing := [name for name in ("age", "sex") if not any(each.lower().startswith(name) for each in said)]:
        said.append(f"To be added before publication: {' and '.join(missing)} of the participants, not known here.")
    return " ".join(said)


def _preparation(config: Mapping[str, Any]) -> list[str]:
    rows = [(words, config["preparation"][name]) for name, words in PREPARED.items() if name in config["preparation"]]
    return ["Scans prepared otherwise give other features. The whole record is `preparation` in `config.json`.",
            _table(pd.DataFrame(rows, columns=["what", "value"]))]


def _training(record: Mapping[str, Any], run: Path) -> list[str]:
    params = record.get("params", {})
    names = [name for name in (*OBJECTIVE_SETTINGS.get(record.get("objective", ""), ()), *SETTINGS) if name in params]
    settings = _table(pd.DataFrame([(name, params[name]) for name in names], columns=["setting", "value"]))
    made = read_made_from(run)
    same = made is not None and made.fingerprint == record.get("made_from", {}).get("fingerprint")
    if not same or not (run / "log.csv").exists():
        return [settings, "Its log does not lie beside the file that was exported."]
    log = pd.read_csv(run / "log.csv")
    last = [(name, float(log[name].dropna().iloc[-1])) for name in log.columns if name not in NO_RESULT
            if pd.api.types.is_numeric_dtype(log[name]) and log[name].notna().any()]
    return [settings, f"Last values of its log, after {len(log)} epochs (some are measured every few epochs):",
            _table(pd.DataFrame([(name, f"{value:.4g}") for name, value in last], columns=["measure", "last value"]))]


def _scores(scores: pd.DataFrame | None) -> list[str]:
    if scores is None:
        return ["None were given. Without scores nobody knows what its features are worth."]
    table = scores[[name for name in SCORED if name in scores]].copy()
    interval = [f"{low:.3f} to {high:.3f}" if pd.notna(low) and pd.notna(high) else "none"
                for low, high in zip(table["low"], table["high"], strict=True)]
    table["value"] = [f"{value:.3f}" for value in table["value"]]
    table.insert(table.columns.get_loc("value") + 1, "95 % interval", interval)
    return ["From a benchmark that included this encoder: means over `seeds` (over encoders, if each seed or "
            "fold has its own), with intervals over participants and seeds. A score means little without its rivals "
            "and baselines; they are in the benchmark's report.",
            _table(table.drop(columns=["low", "high"]))]


def _use(config: Mapping[str, Any]) -> str:
    build = f"network = {config['class'].rpartition('.')[2]}(**config[\"arguments\"])"
    features = "network.eval()(scans)"
    if "tokens" in config:
        features = ("network.patch_embedding(scans)[:, config[\"tokens\"]]\n"
                    "first = network.cls_token.expand(len(scans), -1, -1)\n"
                    "features = network.eval().blocks(torch.cat([first, features], 1))[:, 1:].mean(1)")
    return f"""Scans are float32 (batch, 1, z, y, x), prepared as above. With MONAI:

```python
import json
import torch
from monai.networks.nets import {config['class'].rpartition('.')[2]}
from safetensors.torch import load_file

config = json.load(open("config.json"))
{build}
network.load_state_dict(load_file("model.safetensors"), strict=True)
features = {features}
```

With torch alone: `torch.export.load("program.pt2").module()(scans)`. As a MONAI bundle, on prepared scans as NIfTI in
`scans/`: `python -m monai.bundle run --config_file configs/inference.json` (which needs `pip install fire`) writes
`features/features.csv`. The bundle checks a scan's shape, not how it was prepared.
To use it in the kit, give this folder as `encoder`."""


def _limits(record: Mapping[str, Any]) -> str:
    lines = ["Clinical use: diagnosis, treatment or any decision about a person. It is not a medical device.",
             "Scans that were not prepared as above, or of another contrast, body part or species.",
             "People unlike those it was trained on, in age, disease, scanner or origin, without testing it on them "
             "first.",
             "Finding out who somebody is, or whether somebody took part in a study."]
    if _procedural(record):
        lines.insert(0, "Any claim about people: it has learned from procedural data.")
    return "\n".join(f"- {line}" for line in lines)


def _table(table: pd.DataFrame) -> str:
    rows: list[Sequence[Any]] = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy(object).tolist()]
    return "\n".join("| " + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in row) + " |"
                     for row in rows)
