"""6_apply: turn scans as they are into embeddings, or into a fine-tuned model's predictions.

    python -m kit.apply --input scan.nii.gz --encoder outputs/demo/2_pretrain/seed0 --output embedding.npy
    python -m kit.apply --input bids/ --encoder outputs/demo/3_finetune --output predictions.csv

The encoder's own record says how to prepare the scans. `.npy` holds one scan's features (features,) float32, and
`NAME_scans.csv` beside it the warnings; `.csv` and `.parquet` hold one row per scan, warnings included. Scans that
could not be prepared are listed in `NAME_failed.csv`. Without `--encoder`, `$KIT_ENCODER` is used, as in a container.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from nibabel.affines import voxel_sizes

from kit.cohort.collections import is_collection
from kit.cohort.identity import UNNAMED, key, participant_ids
from kit.cohort.tables import named_by_file, read_cohort
from kit.cohort.tabular import COLUMNS, CohortError, read_table
from kit.errors import KitError
from kit.evaluate.conformal import class_columns, number_columns
from kit.evaluate.finetune import VALIDATION, load_predictor
from kit.evaluate.metrics import join_scans
from kit.evaluate.predict import in_label_units, predict
from kit.models.encoder import Encoder
from kit.models.encoder_file import EncoderError, load_encoder, noted, read_record, side_of, weights_digest
from kit.models.features import FeatureReader
from kit.models.heads import Predictor
from kit.models.reference import LEAST, OUTSIDE, Reference, read_reference
from kit.models.third_party_formats import ANY
from kit.params import Apply, is_model, is_prepared, is_there
from kit.preprocess.index import FAILED
from kit.preprocess.preprocess import prepare
from kit.preprocess.quality import QC_METRICS
from kit.preprocess.scan_file import is_dicom, read_scan
from kit.preprocess.settings import Preparation
from kit.problems import encoder_parts
from kit.provenance import MadeFrom, MisfitError, Side, Used, check_fit, compare, made_from, read_made_from
from kit.reading import ParameterError, check, read_options
from kit.runs import resolve, shown, write_table, write_whole
from kit.store.dataset import PreparedScans
from kit.store.grid import PAPER_GRID, Grid
from kit.store.leakage import TRAINING_PARTS, check_encoder
from kit.store.store import Store

SCANS = (".nii", ".nii.gz", ".img", ".img.gz",  # .img: one half of a pair stands for both
         ".mgh", ".mgz", ".mgh.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
THICK_MM = 3.0  # a scan with longer voxels is called coarse: too much of it would be interpolated
SAID = {  # QC flags in plain words
    "contrast low": "grey matter is not darker than white: not T1-weighted, or no brain",
    "template_similarity low": "unlike the template: not registered well, not T1-weighted, or no brain",
    "outside_share high": "part of the brain lies outside the scan",
    "brain_ml low": "the brain is small, for an adult below 700 ml: cut off, a child's, or badly stripped",
    "brain_ml high": "the brain is larger than nearly all adults': perhaps badly stripped",
    "grey_levels low": "hardly any grey levels: a label map, or badly scaled",
    "mask_overlap low": "the brain mask is unlike a brain",
    "bright_edge high": "the brain mask cuts brain off",
    "snr low": "noisy",
    "orientation_deg high": "its header's orientation was wrong; it was turned upright",
}

FOUND = ("warnings", "unusable", "as_far", "outside")  # columns on whether a scan's numbers can be relied on
LEARNED_FROM = "this person was in the model's training or validation set: the result says nothing about new people"


class Applied(NamedTuple):
    """Result of `apply`.

    Attributes:
        store: the prepared scans.
        table: one row per scan: scan, participant, session, dataset; warnings (in words; also that a fine-tuned model
            was trained on the person), unusable (names of the QC metrics that make it so); as_far (share of validation
            scans at least as far from the training scans, counting the scan itself; nan if unknown), outside ("yes" if
            that is at most 5 %, else "no"; "" if unknown); fingerprint; a fine-tuned model's predictions.
        features: (scans, features) float32.
        failed: scans that could not be prepared, with reasons.
        seconds: duration of each step.
        made: what the result was made from.
    """

    store: Store
    table: pd.DataFrame
    features: np.ndarray
    failed: pd.DataFrame
    seconds: dict[str, float]
    made: MadeFrom

    @property
    def embeddings(self) -> pd.DataFrame:
        """participant, session, fingerprint, scan, `FOUND` (warnings and their numbers), a column per feature, f0 …"""
        names = [f"f{number}" for number in range(self.features.shape[1])]
        rows = self.table[["participant", "session", "fingerprint", "scan", *FOUND]]
        return pd.concat([rows, pd.DataFrame(self.features, rows.index, names)], axis=1)


def apply(params: Apply, folder: Path, scans: pd.DataFrame | Store | None = None) -> Applied:
    """Prepare scans as the encoder's were, embed them, and predict if it is a fine-tuned model.

    Args:
        params: see `kit.params.Apply`.
        folder: scans are prepared into its `prepared/`, where a later call finds them.
        scans: what `scans_of` found, or another cohort, in place of `params.input`.

    Raises:
        CohortError, PreparationError: nothing could be read; single scans that fail are listed in `failed`.
        EncoderError, MisfitError, FeatureError: the encoder, this kit's preparation or prepared scans do not fit.
    """
    started, spec = perf_counter(), params.encoder
    model = resolve(spec) if is_model(spec) else None
    record = model_record(model) if model else read_record(spec)
    coarse, failed, allow = pd.Series(dtype=str), pd.DataFrame(columns=list(FAILED)), list(params.allow_differences)
    scans = scans_of(params) if scans is None else scans

    def load(preparation: dict[str, Any]) -> tuple[Predictor | None, Encoder, FeatureReader, float]:
        begun = perf_counter()
        predictor = load_predictor(model, preparation)[0] if model else None
        encoder = predictor.encoder if predictor else load_encoder(spec, preparation, allow=allow)[0]
        reader = FeatureReader(encoder, params.pool, params.stages, params.flips)
        return predictor, encoder, reader, perf_counter() - begun

    ready = None
    if isinstance(scans, Store):
        store = scans
        print("a prepared cohort does not record its files' voxel sizes: scans coarser than "
              f"{THICK_MM:g} mm get no warning")
    else:
        settings = settings_for(record["preparation"], params)
        allow += [field for field in ("registration", "mask", "bias_correction")
                  if record["preparation"][field] not in (settings.record()[field], ANY)]
        # what does not fit is refused now, not after hours of preparation
        unlike = compare({"training scans": record["preparation"], "this kit": settings.record()})
        if lines := [line for field, line in unlike.items() if field not in allow]:
            raise MisfitError(f"{spec}: this kit cannot prepare scans as its training scans were:\n  "
                              + "\n  ".join(lines) + "\nprepare and train again, or use the kit that trained it")
        ready = load(settings.record())
        index, failed = prepare(scans, folder / "prepared", settings, params.workers)
        store, coarse = Store.open(folder / "prepared"), coarse_scans(scans, index)
    sides = {"model": Side(shown(model), record["preparation"])} if model else side_of(spec)
    allowed = check_fit(sides | {"scans": Side.of(store)}, allow)
    predictor, encoder, reader, reading = ready or load(store.record)
    loaded, data = perf_counter(), PreparedScans(store, store.index)
    own = predict(encoder, data)  # the encoder's own output, which the head and the reference take
    features = own if reader.is_encoder_output else predict(reader, data)
    what: dict[str, Any] = ({"model": {"from": shown(model), "weights": weights_digest(predictor)}}
                            if model and predictor else {"encoder": noted(spec, encoder, record)})
    made = made_from([Used("prepared", "embedded", store, store.index, participant_ids(store.index))], **what,
                     allowed=allowed, settings={"pool": params.pool, "stages": params.stages, "flips": params.flips})
    reference = None if "format" in record else read_reference(resolve(encoder_parts(spec)[1]))  # published: none
    learned = _learned_from(model, made) if model else set()
    if not model:
        check_encoder(record, store, store.index, participant_ids(store.index), allow=True)  # prints whom it has seen
    table = _table(store, own, reference, coarse, learned).assign(fingerprint=made.fingerprint)
    if model and predictor:
        with torch.no_grad():
            raw = predictor.cpu().head(torch.from_numpy(own)).numpy()
        table = pd.concat([table, _predictions(in_label_units(predictor, raw), record, model)], axis=1)
    seconds = {"prepare": loaded - started - reading, "read weights": reading, "embed": perf_counter() - loaded}
    return Applied(store, table, features, failed, {name: round(value, 1) for name, value in seconds.items()}, made)


def model_record(model: Path) -> dict[str, Any]:
    """Read the record of a model from its 3_finetune run.

    Raises:
        EncoderError: the run has no predictions of validation scans, which intervals need.
    """
    if not (model / VALIDATION).exists():
        raise EncoderError(f"{shown(model)} has no {VALIDATION}: it is from an older kit; run 3_finetune again to get "
                           "intervals")
    return json.loads((model / "task.json").read_text(encoding="utf-8"))


def scans_of(params: Apply) -> pd.DataFrame | Store:
    """Open the prepared cohort that `input` names, or list the raw scans that lie there.

    Raises:
        CohortError, StoreError: nothing is there, or it cannot be read.
    """
    path = resolve(params.input)
    return Store.open(path) if is_prepared(path) else scans_at(path, params.contrast)


def scans_at(path: Path, contrast: str = "T1w") -> pd.DataFrame:
    """Make a cohort of whatever is at a path: a scan, a folder of scans, a DICOM series, BIDS, a table.

    A folder is read as DICOM only if it holds no scan of another format; DICOM files beside such scans are left out.

    Raises:
        CohortError: nothing is there; or a table, BIDS folder or public collection is not as it should be.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_cohort(path, contrast)
    if not is_there(path):
        raise CohortError(f"{shown(path)}: no such file or folder")
    if path.is_file() and is_collection(path):
        return read_cohort(path, contrast)
    files = [path]
    if path.is_dir():
        if (path / "dataset_description.json").exists() or is_collection(path):
            return read_cohort(path, contrast)
        files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SCANS) and not file.is_dir()
                       and not (file.suffix.lower() == ".img" and is_dicom(file))  # a slice of a series
                       and not any(part.startswith(".") for part in file.relative_to(path).parts)) or [path]
    paths = pd.Series([str(file) for file in files])
    cohort = pd.DataFrame({"participant": named_by_file(paths), "session": "01", "dataset": "?", "image_path": paths,
                           "mask_path": ""})
    return cohort[list(COLUMNS)]


def settings_for(record: Mapping[str, Any] | None, params: Apply) -> Preparation:
    """Settings that prepare scans like those of an encoder with this record.

    If the encoder's scans were not registered, because they were in MNI space already, new scans are registered
    rigidly. If their masks were given, or may come from any tool, the mask is `auto`.

    Raises:
        EncoderError: the encoder's preparation is unknown.
    """
    if record is None:
        raise EncoderError(f"{params.encoder}: how its scans were prepared is not known; prepare yours likewise with "
                           "1_preprocess, and give that folder as input")
    known = {field: value for field, value in record.items() if value != ANY}
    registration, mask = known.get("registration", "none"), known.get("mask", "given")
    return Preparation(
        Grid(known.get("shape", PAPER_GRID.shape), known.get("spacing_mm", PAPER_GRID.spacing_mm)),
        params.registration or (registration if registration != "none" else "rigid"),
        params.mask or (mask if mask != "given" else "auto"), known.get("bias_correction", "none"),
        known.get("intensity", "zscore"), params.orientation_unknown)


def coarse_scans(cohort: pd.DataFrame, index: pd.DataFrame) -> pd.Series:
    """Warnings about scans with voxels longer than `THICK_MM`, by the scan's name."""
    found, keys = {}, ["participant", "session", "dataset"]
    paths = cohort.set_index(keys)["image_path"].to_dict()
    for row in index.itertuples():
        sides = voxel_sizes(read_scan(paths[row.participant, row.session, row.dataset], no_codes_ok=True)[1])
        if sides.max() > THICK_MM:
            found[row.scan] = f"voxels of {' x '.join(f'{side:.3g}' for side in sides)} mm: too coarse to trust"
    return pd.Series(found, dtype=str)


def _learned_from(model: Path, made: MadeFrom) -> set[str]:
    """Names of the scans whose person a fine-tuned model was trained or stopped on, by name or by voxels."""
    known = read_made_from(model)
    if made.rows is None:
        return set()
    if known is None or known.rows is None:
        print(f"{shown(model)} has no readable made_from.json and made_from.csv: whether the model learned from these "
              "people is unknown")
        return set()
    seen = known.rows[known.rows["part"].isin(TRAINING_PARTS)]
    people, voxels = set(map(_person, seen["participant"])), set(seen["checksum"]) - {"unreadable"}
    return {row.scan for row in made.rows.itertuples() if _person(row.participant) in people or row.checksum in voxels}


def _person(participant_id: str) -> str:
    """Normalise an id with `kit.cohort.identity.key`.

    Left as it is in a dataset without a name, where `key` would make participant 1 of two cohorts one person.
    """
    return participant_id if participant_id.startswith(UNNAMED) else key(participant_id)


def _table(store: Store, features: np.ndarray, reference: Reference | None, coarse: pd.Series,
           learned: set[str]) -> pd.DataFrame:
    table = store.index[["scan", "participant", "session", "dataset"]].reset_index(drop=True)
    words = [[LEARNED_FROM] * (scan in learned) + ([coarse[scan]] if scan in coarse else []) for scan in table["scan"]]
    for column in ("flags", "unusable"):
        table[column] = store.index[column].fillna("").to_numpy() if column in store.index else ""
    for row, flags in enumerate(table.pop("flags")):
        words[row] += [SAID.get(flag, said_of(flag)) for flag in flags.split("; ") if flag]
    if reference is not None and (len(reference.mean) != features.shape[1]  # another encoder's file lies there
                                  or not len(reference.validation)):  # nothing to compare with
        reference = None
    table["as_far"] = np.nan if reference is None else reference.at_least_as_far(features).round(4)
    enough = reference is not None and len(reference.validation) >= LEAST
    outside = table["as_far"] <= OUTSIDE
    table["outside"] = outside.map({True: "yes", False: "no"}) if enough else ""
    for far in np.flatnonzero(outside & enough):
        words[far].append(f"unlike the scans that the model has seen (as_far {table['as_far'][far]:.3f})")
    return table.assign(warnings=["; ".join(each) for each in words])


def said_of(flag: str) -> str:
    """A flag of `kit.preprocess.quality.flagged`, with a description of its metric."""
    metric, _, side = flag.rpartition(" ")
    return f"{flag} ({QC_METRICS[metric].what})" if metric in QC_METRICS and side in ("low", "high") else flag


def _predictions(values: np.ndarray, record: Mapping[str, Any], model: Path) -> pd.DataFrame:
    validation = join_scans(read_table(model / VALIDATION, text=("scan", "participant", "dataset")), ["dataset"])
    if record["kind"] == "regression":
        return number_columns(values, validation)
    return class_columns(values, record["classes"], validation)


def write_output(applied: Applied, path: Path) -> None:
    """Write a table of predictions or else features (`.csv`, `.parquet`), or one scan's features (`.npy`).

    Beside a `.npy`, `NAME_scans.csv` holds the scan's row with its warnings.
    """
    if path.suffix == ".npy":
        def save(aside: Path) -> None:
            with aside.open("wb") as file:
                np.save(file, applied.features[0].astype(np.float32))

        write_whole(path, save)
        write_table(beside(path, "scans"), applied.table)
        return
    table = applied.table if "predicted" in applied.table else applied.embeddings
    if path.suffix == ".parquet":
        write_whole(path, lambda aside: table.to_parquet(aside, index=False))
    else:
        write_table(path, table)


def beside(path: Path, what: str) -> Path:
    """Path of a table beside an output: `NAME_<what>.csv`."""
    return path.with_name(f"{path.stem}_{what}.csv")


def write_failed(failed: pd.DataFrame, output: Path) -> None:
    """Write `NAME_failed.csv` beside the output; without failed scans remove the one of an earlier call."""
    path = beside(output, "failed")
    if len(failed):
        write_table(path, failed)
    elif path.is_file() and list(pd.read_csv(path, nrows=0)) == list(FAILED):
        path.unlink()


def _from_here(path: str) -> str:
    """Make a path absolute: it starts at the current folder, or if nothing is there, at the project's root."""
    here = Path(path).expanduser().absolute()
    return str(here if is_there(here) else resolve(path))


def _encoder_from_here(spec: str) -> str:
    """Make the path in an encoder's name absolute, as `_from_here` does."""
    if Path(spec).expanduser().exists():
        return _from_here(spec)
    kind, rest = encoder_parts(spec)
    if kind == "random" or not rest:
        return spec
    return _from_here(rest) if kind == "auto" else f"{kind}:{_from_here(rest)}"


def main() -> int:
    """Run the command line; see the module's docstring.

    Returns:
        the exit status: 0; 1 if some scans could not be prepared (the others are written); 2 if there is no result, of
        which `NAME_failed.csv` may give the reasons.
    """
    parser = argparse.ArgumentParser(prog="python -m kit.apply", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", required=True, help="a scan, a folder of scans or of a DICOM series, BIDS, a table, "
                                                       "or a prepared cohort")
    parser.add_argument("--encoder", default=os.environ.get("KIT_ENCODER"),
                        help="encoder.safetensors, a run of 2_pretrain or 3_finetune, or FORMAT:FILE")
    parser.add_argument("--output", required=True, type=Path, help="embedding.npy (one scan), or a .csv or .parquet")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="of 6_apply, such as -p flips true")
    arguments = parser.parse_args()
    if not arguments.encoder:
        parser.error("name an encoder: --encoder FILE, or the environment's KIT_ENCODER")
    if not arguments.input:  # as a path it would be the current folder
        parser.error("--input: got an empty path; name a scan, a folder, a table or a prepared cohort")
    if arguments.output.suffix not in (".npy", ".csv", ".parquet"):
        parser.error(f"--output: got {arguments.output}; its ending must be .npy, .csv or .parquet")
    try:  # now, not after hours of preparation
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.output.parent):
            pass
    except OSError as error:
        parser.error(f"--output: {arguments.output.parent} cannot be written to ({error.strerror})")
    with tempfile.TemporaryDirectory() as folder:
        try:
            values = {"input": _from_here(arguments.input), "encoder": _encoder_from_here(arguments.encoder),
                      "output_dir": folder, **read_options(arguments.parameter)}
            params = check(Apply, values)
            if is_model(params.encoder) and arguments.output.suffix != ".npy" and (
                    params.pool != "default" or params.stages or params.flips):
                raise ParameterError("pool, stages and flips change embeddings only, and a fine-tuned model's table "
                                     "holds predictions; leave them out, or name a .npy")
            scans = scans_of(params)
            count = len(scans.index if isinstance(scans, Store) else scans)
            if arguments.output.suffix == ".npy" and count != 1:
                raise ParameterError(f"--output: {arguments.output} is for one scan, and {shown(params.input)} has "
                                     f"{count}; name a .csv or .parquet")
            applied = apply(params, Path(folder), scans)
            write_output(applied, arguments.output)
            write_failed(applied.failed, arguments.output)
        except KitError as error:
            if (failed := Path(folder) / "prepared" / "failed.csv").is_file():  # preparation has begun
                write_failed(read_table(failed, text=FAILED), arguments.output)
            print(f"kit.apply: {error}", file=sys.stderr)
            return 2
    for row in applied.table.itertuples():
        print(f"{row.scan}: {row.warnings or 'nothing to remark'}", file=sys.stderr)
    for row in applied.failed.itertuples():
        print(f"{row.scan}: FAILED: {row.reason}", file=sys.stderr)
    print(", ".join(f"{name} {value:.1f} s" for name, value in applied.seconds.items()), file=sys.stderr)
    return 1 if len(applied.failed) else 0


if __name__ == "__main__":
    sys.exit(main())
