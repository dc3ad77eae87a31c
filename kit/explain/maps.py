"""4_saliency: the model, the scans to explain, and their maps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.special import expit, softmax
from torch import nn

from kit.cohort.identity import joined, participant_ids, read_aliases
from kit.cohort.labels import read_labels
from kit.cohort.tables import read_cohort
from kit.cohort.tabular import read_table
from kit.device import on_device
from kit.evaluate.finetune import load_predictor
from kit.evaluate.metrics import LEAST_PARTICIPANTS, bootstrap
from kit.explain.atlas import Atlas
from kit.explain.explainer import Explainer
from kit.explain.native import changed_since, write_native
from kit.explain.regions import region_intervals
from kit.explain.saliency import Maps, Options, check_methods, passes_of
from kit.explain.targets import encoder_of, target_of
from kit.models.encoder_file import load_encoder, side_of, weights_digest
from kit.params import Saliency
from kit.preprocess.index import scan_names
from kit.preprocess.nifti import ScanError, file_bytes, write_nifti
from kit.preprocess.quality import usable
from kit.provenance import (
    OLDER,
    MisfitError,
    Side,
    Used,
    check_fit,
    made_from,
    read_made_from,
    remove_stale,
    write_stamped,
)
from kit.reading import read_yaml
from kit.runs import Run, progress, resolve, shown
from kit.seeding import rng_for
from kit.store.store import Store

RESULTS = ("maps/*.nii.gz", "native/*.nii.gz", "figures/*.png", "viewer.html", "regions.csv", "truth.csv", "checks.csv",
           "randomisation.csv", "agreement.csv", "verdicts.csv")  # removed if model or scans change
EFFECTS = {"stroke": "lesion", "alzheimers": "hippocampus", "age": "ventricles"}  # task: its known place
BLUR_MM = 12.0  # standard deviation of the blurred baseline: gyri and ventricles vanish, left and right remain


class Opened(NamedTuple):
    """A model to explain, and the scans to explain it on.

    Attributes:
        model: on the device, in evaluation mode.
        record: its `task.json`; for an encoder its record, with `task` None and `kind` "encoder".
        chosen: index rows of the scans; see `scans_to_explain`.
    """

    model: nn.Module
    record: dict[str, Any]
    chosen: pd.DataFrame


def open_model(params: Saliency, store: Store, run: Run) -> Opened:
    """Load the model and choose the scans to explain; records what the run is made from.

    Results made from another model or other scans are removed first, and the changes printed.

    Args:
        params: its `model` is a run of 3_finetune, or of 2_pretrain.
        store: the scans that the model was tested on.

    Raises:
        MisfitError: the scans were prepared differently, or are not those that the model was tested on.
        MethodError: a method cannot work with this network.
        EncoderError: see `kit.models.encoder_file.load_encoder`.
        ValueError: no test participant belongs to the requested groups.
    """
    model: nn.Module
    if (params.model / "task.json").exists():
        allowed = check_model(params.model, store, params.allow_differences)
        model, record = load_predictor(params.model, store.record)
        chosen = scans_to_explain(params.model, store, params.participants, params.whom, params.seed)
    else:
        allowed = check_fit(side_of(params.model) | {"prepared": Side.of(store)}, params.allow_differences)
        model, record = load_encoder(params.model, store.record, params.seed, params.allow_differences)
        record = {**record, "task": None, "kind": "encoder"}
        index = index_by_person(store, params.model)
        chosen = _drawn(index[usable(index)], params.participants, params.seed).assign(whom="random", said="")
    check_methods(model, params.methods, params.layer, params.baseline)
    for folder in params.compare.values():  # refused here, not after the maps
        check_model(folder, store, params.allow_differences)
        check_methods(load_predictor(folder, store.record)[0], params.methods, params.layer, params.baseline)
    noted = {"from": shown(params.model), "weights": weights_digest(model)}
    drawn = Used("prepared", "drawn", store, chosen, participant_ids(chosen))
    remove_stale(run.folder, made_from([drawn], model=noted, allowed=allowed), RESULTS)
    return Opened(on_device(model).eval(), record, chosen)


def index_by_person(store: Store, model: Path) -> pd.DataFrame:
    """The store's index, with the aliases that the model's run was given, so that `participant_ids` counts people.

    Raises:
        IdentityError: that table is gone, or cannot be used.
    """
    aliases = read_yaml(model / "params.yaml").get("aliases") if (model / "params.yaml").is_file() else None
    return joined(store.index, read_aliases(None if aliases is None else resolve(aliases)))


def explainer_of(params: Saliency, opened: Opened, store: Store) -> Explainer:
    """Set up the output to explain and the methods' options from the parameters.

    Raises:
        TargetError: the model has no such output.
    """
    output = target_of(params.target, opened.model, opened.record, store, opened.chosen, params.like, params.seed)
    return Explainer(opened.model, output.of, output.words, store, options_of(params, store))


def options_of(params: Saliency, store: Store) -> Options:
    """Convert the parameters to the methods' options, in the store's voxels; the mean brain averages up to 32 scans."""
    voxels = max(1, round(params.patch_mm / store.grid.spacing_mm))
    mean = None
    if params.baseline == "mean_brain":
        index = index_by_person(store, params.model)
        scans = _drawn(index[usable(index)], 32, params.seed)["scan"]
        mean = np.mean([store.read(scan)[0].astype(np.float32) for scan in scans], axis=0)
    return Options(params.steps, params.samples, params.noise, params.baseline, params.layer, voxels,
                   BLUR_MM / store.grid.spacing_mm, mean, params.seed)


def check_model(folder: Path, store: Store, allow: Sequence[str] = ()) -> list[str]:
    """Check that a run of 3_finetune fits the scans it is to be explained on.

    Args:
        folder: of that run.
        store: the scans.
        allow: differences in preparation to accept.

    Returns:
        the differences accepted, one per line.

    Raises:
        MisfitError: the scans were prepared differently, or tested scans are missing, or their voxels or labels have
            changed.
    """
    record, made = json.loads((folder / "task.json").read_text(encoding="utf-8")), read_made_from(folder)
    if made is None or made.rows is None:
        raise MisfitError(f"model {shown(folder)} is {OLDER}; run 3_finetune again")
    sources = made.record["prepared"]["mask_sources"]
    allowed = check_fit({"model": Side(shown(folder), record["preparation"], sources), "prepared": Side.of(store)},
                        allow)
    tested = read_table(folder / "predictions.csv", text=("scan", "distribution"))
    tested = tested.loc[tested["distribution"] == "in_distribution", "scan"]
    gone = sorted(set(tested) - set(store.index["scan"]))
    lines = [f"{len(gone)} of {len(tested)} tested scans are gone: {', '.join(gone[:3])}"] * bool(gone)
    then, there = made.rows[made.rows["part"] == "test"].set_index("scan"), sorted(set(tested) - set(gone))
    codes = read_yaml(folder / "params.yaml").get("missing_codes", ())
    changed = {}
    if there:
        rows = store.index[store.index["scan"].isin(there)]
        labels = read_labels(rows, record["task"], record["kind"], codes, record["classes"]).values
        now = dict(zip(rows["scan"], map(repr, labels.tolist()), strict=True))
        changed["labels"] = [scan for scan in there if then["label"].get(scan) != now[scan]]
    if not allowed:  # scans deliberately prepared differently have other voxels
        changed["voxels"] = [scan for scan in there if then["checksum"].get(scan) != str(store.checksum(scan))]
    lines += [f"{what} of {len(scans)} of {len(tested)} tested scans have changed: {', '.join(scans[:3])}"
              for what, scans in changed.items() if scans]
    if lines:
        raise MisfitError(f"model {shown(folder)} was tested on other scans than those in {shown(store.folder)}:\n  "
                          + "\n  ".join(lines) + "\nrun 3_finetune again, or give the folder that it was run on")
    return allowed


def scans_to_explain(model: Path, store: Store, count: int, whom: Sequence[str] = ("surest",),
                     seed: int = 0) -> pd.DataFrame:
    """Choose in-distribution test participants to explain, one scan each, as rows of the index.

    - `surest`: two classes: positives with the highest score, even if that is below 0.5 (`said` tells); more classes:
      correct predictions with the highest probability; regression: the highest predictions.
    - `worst`: most confident errors; regression: the largest errors.
    - `random`: drawn at random.
    - `controls`: drawn at random from the first class; regression has none, and a message is printed.

    Args:
        model: a run of 3_finetune.
        store: the scans that it was tested on.
        count: participants per group.
        whom: the groups.
        seed: of the random draws.

    Returns:
        Rows with two more columns: `whom`, the groups, such as "surest, random" (each scan has one row), and `said`,
        truth and prediction in words.

    Raises:
        ValueError: no test participant is in these groups.
    """
    task = json.loads((model / "task.json").read_text(encoding="utf-8"))
    known = _predicted(model, task)
    rows = index_by_person(store, model).set_index("scan", drop=False).loc[known["scan"]]
    groups = {}
    for name in whom:
        if name == "controls" and known["p_true"].isna().all():
            print(f"whom: {task.get('task', 'this')} is a number, which has no controls")
            continue
        groups[name] = _group(known, name, rows, count, seed)
    listed = list(dict.fromkeys(scan for scans in groups.values() for scan in scans))
    if not listed:
        raise ValueError(f"whom: no test participant is among {', '.join(whom)}; choose others")
    said = known.set_index("scan")["said"]
    chosen = rows.loc[listed].reset_index(drop=True)
    return chosen.assign(whom=[", ".join(name for name, scans in groups.items() if scan in scans) for scan in listed],
                         said=said.loc[listed].to_numpy())


def _predicted(model: Path, task: dict[str, Any]) -> pd.DataFrame:
    """A run's predictions in distribution: scan, participant, true, predicted, p_true, right, said.

    `p_true` is the probability of the true class. For regression it is nan and `right` is true. For more than two
    classes, `predicted` is the highest class probability.
    """
    known = read_table(model / "predictions.csv", text=("scan", "participant"))
    known = known[known["distribution"] == "in_distribution"].reset_index(drop=True)
    true = known["true"].to_numpy()
    if "predicted_0" in known:
        probabilities = softmax(known.filter(regex=r"^predicted_\d+$").to_numpy(), axis=1)  # (scans, classes)
    elif task["kind"] == "classification":
        probabilities = expit(np.stack([-known["predicted"], known["predicted"]], axis=1))
    else:
        said = [f"true {one:.1f}, predicted {other:.1f}" for one, other in zip(true, known["predicted"], strict=True)]
        return known.assign(p_true=np.nan, right=True, said=said)
    place = true.astype(int)  # of the true class
    classes = task.get("classes") or [str(each) for each in range(probabilities.shape[1])]
    p_true = probabilities[np.arange(len(known)), place]
    if "predicted_0" in known:
        known = known.assign(predicted=probabilities.max(1))
    said = [f"true {classes[one]}, predicted {classes[row.argmax()]} ({row.max():.2f})"
            for one, row in zip(place, probabilities, strict=True)]
    return known.assign(p_true=p_true, right=probabilities.argmax(1) == place, said=said)


def _group(known: pd.DataFrame, name: str, rows: pd.DataFrame, count: int, seed: int) -> list[str]:
    """Names of one group's scans, at most `count` participants."""
    regression = known["p_true"].isna().all()
    if name in ("random", "controls"):
        able = rows if name == "random" else rows[(known["true"] == 0).to_numpy()]
        return _drawn(able, count, seed)["scan"].tolist()
    if name == "worst":
        error = (known["predicted"] - known["true"]).abs() if regression else 1 - known["p_true"]
        ranked = known.assign(rank=error)[~known["right"] | regression]
    else:
        two = not regression and "predicted_0" not in known
        ranked = known.assign(rank=known["predicted"])[(known["true"] == 1) if two else known["right"]]
    best = rows.loc[ranked.sort_values("rank", ascending=False, kind="stable")["scan"]]
    return best[~participant_ids(best).duplicated()].head(count)["scan"].tolist()


def _drawn(rows: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Draw participants at random, each with the first of their rows, in drawing order."""
    rows = rows[~participant_ids(rows).duplicated().to_numpy()]
    return rows.iloc[rng_for(seed).permutation(len(rows))[:count]]


def no_better_than_chance(model: Path) -> str:
    """Reason not to trust a model's maps, from its predictions for tested participants; "" if it beats chance.

    The 95 % interval over participants must lie above chance. Classes: the AUC's interval, above 0.5. Numbers: the
    interval of the mean gain in absolute error over giving everybody the median of the tested labels, above 0. With
    fewer than `LEAST_PARTICIPANTS`, of each class or in all for numbers, it is unknown.

    A map can be faithful to a model that has learned nothing, and still mean nothing.
    """
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    record = json.loads((model / "task.json").read_text(encoding="utf-8"))
    if record["kind"] == "classification":
        auc, low = metrics["in_distribution_auc"], metrics.get("in_distribution_auc_low")
        if auc is None:
            return "a class has no tested scan, so it is unknown whether the model predicts better than chance"
        if low is None or np.isnan(low):
            known = _predicted(model, record)
            least = _people(known).groupby(known["true"]).nunique().min()
            if least < LEAST_PARTICIPANTS:
                return (f"too few were tested to know whether the model predicts better than chance (AUC {auc:.2f}; "
                        f"{least} of a class, of {LEAST_PARTICIPANTS} that are needed)")
            low = auc  # the same in every draw: 1, or 0.5 if all predictions are equal
        return "" if low > 0.5 else ("the model itself predicts no better than chance "
                                     f"(AUC {auc:.2f}, interval from {low:.2f})")
    known = _predicted(model, record)
    errors = pd.DataFrame({"model": (known["predicted"] - known["true"]).abs(),
                           "median": (known["true"] - known["true"].median()).abs()})
    errors = errors.groupby(_people(known).to_numpy()).mean()  # each participant counts once
    gain = (errors["median"] - errors["model"]).to_numpy()
    if len(gain) < LEAST_PARTICIPANTS:
        return (f"too few were tested to know whether the model predicts better than chance ({len(gain)} participants, "
                f"of {LEAST_PARTICIPANTS} that are needed)")
    low, high = np.quantile(np.concatenate([counts @ gain / len(gain) for counts in bootstrap(len(gain))]),
                            [0.025, 0.975])
    return "" if low > 0 else (
        f"the model itself is not shown to predict better than the median does (mean absolute error "
        f"{errors['model'].mean():.1f}, median's {errors['median'].mean():.1f}; gain {gain.mean():.1f} "
        f"[{low:.1f}, {high:.1f}])")


def _people(known: pd.DataFrame) -> pd.Series:
    return participant_ids(known) if "dataset" in known else known["participant"]


def saliency_maps(explainer: Explainer, rows: pd.DataFrame, methods: Sequence[str], run: Run) -> Maps:
    """Make maps of each scan by each method, written as `maps/<scan>_<method>.nii.gz` in MNI152 space."""
    maps: Maps = {}
    masks = {scan: explainer.store.read(scan)[1] for scan in rows["scan"]}
    passes = {(scan, method): passes_of(method, mask, explainer.options) for scan, mask in masks.items()
              for method in methods}
    due = 0  # passes of all maps up to the present one
    with progress(total=sum(passes.values()), desc="maps", unit="pass") as bar:
        def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            bar.update(min(len(inputs[0]), due - bar.n))  # not returned: a hook's value replaces the model's output

        # on the encoder, not the whole model: similarities and attention rollout never call the head
        hook = (encoder_of(explainer.model) or explainer.model).register_forward_hook(count)
        try:
            for scan, mask in masks.items():
                for method in methods:
                    bar.set_postfix_str(f"{scan} {method}", refresh=False)
                    due += passes[scan, method]
                    values = np.where(mask, explainer.map(scan, method), np.float32(0))
                    maps[scan, method] = values
                    write_nifti(run / "maps" / f"{scan}_{method}.nii.gz", values, explainer.store.grid.affine)
                    bar.update(due - bar.n)
        finally:
            hook.remove()
    return maps


def class_means(maps: Maps, rows: pd.DataFrame, record: dict[str, Any], store: Store, run: Run) -> Maps:
    """Average each method's maps by class and, for two classes, take the difference; also written to `maps/`.

    Each map is first divided by its mean absolute value in the brain, so that no scan dominates; the unit is thus
    multiples of a uniform map. A participant with several scans counts once, by their mean. Regression labels are split
    at their median.

    Args:
        maps: from `saliency_maps`.
        rows: their scans, with the label's column.
        record: of the model; an encoder has no classes, and gets only the mean of `all`.

    Returns:
        (what, method): (depth, height, width) float32; what is `mean <class> (n=<participants>)` or `<class> less
        <class>`.
    """
    of_class, person = _classes(rows, record), dict(zip(rows["scan"], participant_ids(rows), strict=True))
    means: Maps = {}
    for method in dict.fromkeys(method for _, method in maps):
        found: dict[str, np.ndarray] = {}
        for name, scans in of_class.items():
            of_person: dict[str, list[np.ndarray]] = {}
            for scan in scans:
                if (scale := np.abs(maps[scan, method][store.read(scan)[1]]).mean()) > 0:
                    of_person.setdefault(person[scan], []).append(maps[scan, method] / scale)
            if of_person:
                persons = np.asarray([np.mean(each, axis=0) for each in of_person.values()])
                found[name] = persons.mean(axis=0, dtype=np.float32)
                means[f"mean {name} (n={len(of_person)})", method] = found[name]
        if len(found) == len(of_class) == 2:
            low, high = of_class
            means[f"{high} less {low}", method] = found[high] - found[low]
    files = _file_names(what for what, _ in means)
    for (what, method), values in means.items():
        write_nifti(run / "maps" / f"{files[what]}_{method}.nii.gz", values, store.grid.affine)
    return means


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """Names without characters that a file system may refuse; those that become the same are numbered."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = re.sub(r"[^0-9A-Za-z=.-]+", "_", name).strip("_")
        file, number = plain, 1
        while file.casefold() in map(str.casefold, found.values()):  # some systems ignore case
            number += 1
            file = f"{plain}_{number}"
        found[name] = file
    return found


def _classes(rows: pd.DataFrame, record: dict[str, Any]) -> dict[str, list[str]]:
    """Scans by class, in the classes' order, without empty ones."""
    if record.get("task") is None:
        return {"all": rows["scan"].tolist()}
    label = rows[record["task"]]
    if record["kind"] == "regression":
        values = pd.to_numeric(label)
        middle = float(values.median())
        name = np.where(values > middle, f"{record['task']} above {middle:g}", f"{record['task']} up to {middle:g}")
        classes = [f"{record['task']} up to {middle:g}", f"{record['task']} above {middle:g}"]
    else:
        numbers = read_labels(rows, record["task"], record["kind"], (), record["classes"]).values
        classes = [f"{record['task']}={each}" for each in record["classes"]]
        name = np.array(classes)[numbers.astype(int)]
    return {each: rows["scan"][name == each].tolist() for each in classes if (name == each).any()}


def region_shares(maps: Maps, rows: pd.DataFrame, store: Store, atlas: Atlas | Mapping[str, Atlas],
                  run: Run) -> pd.DataFrame:
    """Compute regions' shares of each method's maps, see `region_intervals`; also written to `regions.csv`.

    Maps that are zero, such as Grad-CAM's where nothing raises the output, are left out.
    """
    nonzero = {key: values for key, values in maps.items() if values[store.read(key[0])[1]].any()}
    table = region_intervals(nonzero, store, atlas, dict(zip(rows["scan"], participant_ids(rows), strict=True)))
    write_stamped(run / "regions.csv", table)
    return table


def native_maps(maps: Maps, store: Store, cohort: str | None, contrast: str, run: Run) -> list[Path]:
    """Write maps on the voxels of the scans' original files to `native/`, to overlay them in any viewer.

    Args:
        cohort: the table or folder that the scans were prepared from; None: nothing is written.
        contrast: which scans of a folder.
    """
    if cohort is None:
        return []
    table = read_cohort(cohort, contrast)
    paths = dict(zip(scan_names(table), table["image_path"], strict=True))
    if lacking := sorted({scan for scan, _ in maps} - set(paths)):
        print(f"{cohort} lacks {len(lacking)} of the scans shown: {', '.join(lacking[:3])}; they get no native map")
    if changed := [scan for scan in sorted({scan for scan, _ in maps} & set(paths))
                   if changed_since(store, scan, paths[scan])]:
        print(f"{cohort}: the files of {len(changed)} of the scans shown were written after they were prepared: "
              f"{', '.join(changed[:3])}; unless they were only copied, their native maps may be misplaced: run "
              "1_preprocess again")
    return [write_native(run / "native" / f"{scan}_{method}.nii.gz", store, scan, values, paths[scan])
            for (scan, method), values in maps.items() if scan in paths]


def known_place(store: Store, scan: str, task: str) -> np.ndarray | None:
    """Read the known location of a task's effect in a scan, which `1_preprocess` writes to the store's `effects/`.

    Args:
        store: prepared scans; locations are known for the sample cohort, whose generator placed the effects.
        scan: its name in the store.
        task: a label column.

    Returns:
        (depth, height, width) bool, or None if it is unknown, or too small for the grid.

    Raises:
        ScanError: its file is damaged.
    """
    path = effect_file(store, scan, task)
    if not path.exists():
        return None
    try:
        data = file_bytes(path)
    except ScanError as error:
        raise ScanError(f"{shown(path)}: {error}") from error
    # `read_nifti` refuses a volume of zeros, which is what a coarse grid makes of a small place.
    place = nib.Nifti1Image.from_bytes(data).get_fdata(dtype=np.float32).T > 0
    return place if place.any() else None


def effect_file(store: Store, scan: str, task: str) -> Path:
    """Return the path of a task's known place in a scan; if the task is not in `EFFECTS`, no such file ever exists."""
    return store.folder / "effects" / f"{scan}_{EFFECTS.get(task)}.nii.gz"
