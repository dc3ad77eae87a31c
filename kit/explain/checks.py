"""Sanity checks of saliency maps, as numbers and as a verdict in words.

- randomisation: does the map change when weights are randomised, from the head down (cascading) and one layer at a
  time (independent)? Adebayo et al., Sanity Checks for Saliency Maps, arXiv 1810.03292.
- label randomisation: does it change if the same network is trained on shuffled labels? (the same paper)
- deletion, insertion: does the output fall or rise faster when following the map than in random order? Petsiuk et al.,
  RISE, arXiv 1806.07421; here with cubes of brain, as replacing single voxels creates artificial texture.
- noise, shift: does the map stay the same after slight noise, and after a shift by one voxel?
- outside: how much of it lies outside the brain?
- completeness: do integrated gradients sum to the scan's output minus the baseline's?
- agreement: how similar is it to the other methods' maps? Reported, not judged: all may be wrong together.

Rank correlations are Spearman's, of absolute values inside the brain. Maps of `gradient_x_input` and
`integrated_gradients` have the scan (less the baseline) as a factor whatever the weights are; for these, randomisation
and label randomisation use the partial correlation given that factor.

A map can be faithful to an untrained model and pass all of these, so the verdict also requires that the model itself
predicts better than chance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import nn

from kit.device import evaluation, scans_at_a_time
from kit.explain.explainer import Explainer
from kit.explain.saliency import CONTRIBUTIONS, TIMES_IMAGE, baseline_of, cubes, frozen
from kit.explain.targets import encoder_of
from kit.models.features import stages_of
from kit.provenance import write_stamped
from kit.runs import Run, progress

FRACTIONS = np.linspace(0, 1, 9)  # of the brain's voxels, deleted or inserted
ORDERS = 8  # random orders of cubes to compare with
NOISE_SD = 0.05  # times the brain's standard deviation: less than scanner noise between two scans


class Thresholds(NamedTuple):
    """Limits for calling a map supported. They are judgement calls; the reason is given for each.

    Attributes:
        randomised: largest rank correlation with the map of random weights. Maps that Adebayo et al. call unchanged
            stay far above 0.5, those they accept fall to 0.2 or below; smooth maps can reach 0.5 by chance.
        shuffled: the same for a model trained on shuffled labels.
        faithful: smallest mean area by which deletion and insertion beat random order, in standard deviations of random
            orders. Of 60 maps of white noise, on five real heads, two had more; a verdict is on a mean over scans.
        stable: smallest rank correlation after noise and shift. Below 0.5 most of the map is not about this brain.
        outside: largest share outside the brain relative to a uniform map; above 1 the map favours the background.
        incomplete: largest relative error of integrated gradients' sum; their authors ask for 5 %.
    """

    randomised: float = 0.5
    shuffled: float = 0.5
    faithful: float = 3.0
    stable: float = 0.5
    outside: float = 1.0
    incomplete: float = 0.05


THRESHOLDS = Thresholds()


def reinitialised(model: nn.Module, seed: int, only: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of a model with randomised layers; the model itself is unchanged.

    Layers are reset by their own `reset_parameters`, which also clears BatchNorm's running statistics. Parameters
    outside such layers (class tokens, position embeddings) are drawn from a normal distribution with their previous
    mean and standard deviation. Drawing on the CPU makes a seed give the same copy on every device.

    Args:
        model: any.
        seed: of the weights.
        only: names of modules to randomise with all their submodules; None: all.
    """
    device = next(model.parameters()).device
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # A separate stream: the plain seed could reproduce the initial weights of training.
        torch.manual_seed(int(np.random.SeedSequence([1810, 3292, seed]).generate_state(1)[0]))
        for name, module in fresh.named_modules():
            if only is not None and not any(name == each or name.startswith(f"{each}.") for each in only):
                continue
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
                continue
            for parameter in module.parameters(recurse=False):
                parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())
    return fresh.to(device)


def layer_groups(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Group the layers with weights from the head down: (group name, module names).

    The kit's networks have a head, four stages (a ViT's blocks in four groups), and the layers before and after those;
    other networks are grouped by their children. A ViT's class token belongs to no group.
    """
    names = {module: name for name, module in model.named_modules()}
    encoder = encoder_of(model)
    if encoder is None:
        return [(name, [name]) for name, child in model.named_children()
                if next(child.parameters(), None) is not None][::-1]
    stages = stages_of(encoder)
    parts = np.array_split(np.arange(len(stages)), min(4, len(stages)))[::-1]
    groups = [("head", ["head"])] if "head" in dict(model.named_children()) else []
    groups += [(f"stage {part[0] + 1}" + (f" to {part[-1] + 1}" if len(part) > 1 else ""),
                [names[stages[number]] for number in part]) for part in parts]
    taken = [name for _, members in groups for name in members]
    rest = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
            and not any(name == each or name.startswith(f"{each}.") or each.startswith(f"{name}.") for each in taken)
            and ".decoder" not in f".{name}"]  # of a masked autoencoder, through which no feature goes
    return [*groups, ("stem and norm", rest)]


def rank_correlation(first: np.ndarray, second: np.ndarray, mask: np.ndarray, given: np.ndarray | None = None) -> float:
    """Spearman's rank correlation, -1 to 1, of two maps' absolute values inside a mask.

    All are (depth, height, width). nan if a map is constant inside the mask, as it then has no ranks.

    Args:
        given: a third such array; the result is then the partial correlation given its absolute values, or the plain
            one if a map has the ranks of `given`, as then nothing is left to correlate.
    """
    inside = np.asarray(mask, dtype=bool)
    ranked = [rankdata(np.abs(each[inside])) for each in (first, second, given) if each is not None]
    if np.ptp(ranked[0]) == 0 or np.ptp(ranked[1]) == 0:
        return float("nan")
    correlations = np.corrcoef(ranked)
    plain = float(correlations[0, 1])
    if given is None or np.ptp(ranked[2]) == 0:
        return plain
    left = np.sqrt((1 - correlations[0, 2] ** 2) * (1 - correlations[1, 2] ** 2))
    return float((plain - correlations[0, 2] * correlations[1, 2]) / left) if left > 1e-6 else plain


def _model_correlation(explainer: Explainer, scan: str, method: str, found: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two models' maps of one scan, partial where the module's docstring says so."""
    image, mask = explainer.read(scan)
    start = 0 if method == "gradient_x_input" else baseline_of(image, mask, explainer.options)
    given = image - start if method in TIMES_IMAGE else None
    return rank_correlation(found, other, mask, given)


def randomisation(explainer: Explainer, scan: str, maps: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Compare one scan's maps with those of copies of the model with randomised layers.

    Args:
        explainer: the model and the output to explain.
        scan: its name.
        maps: by method.
        seed: of the weights.

    Returns:
        One row per method and copy: `method`, `scan`, `how` (cascading or independent), `layers` (those randomised),
        `share` (of the model's weights), `rank_correlation`.
    """
    groups = layer_groups(explainer.model)
    plan = [("cascading", groups[: number + 1]) for number in range(len(groups))]
    plan += [("independent", [group]) for group in groups[1:]]
    sizes = {name: parameter.numel() for name, parameter in explainer.model.named_parameters()}
    rows = []
    for how, drawn in progress(plan, desc="randomised copies"):
        names = [name for _, members in drawn for name in members]
        fresh = reinitialised(explainer.model, seed, names)
        layers = drawn[0][0] if len(drawn) == 1 else f"{drawn[0][0]} to {drawn[-1][0]}"
        share = sum(size for name, size in sizes.items()
                    if any(name.startswith(f"{each}.") for each in names)) / sum(sizes.values())
        for method, found in maps.items():
            same = _model_correlation(explainer, scan, method, found, explainer.map(scan, method, model=fresh))
            rows.append((method, scan, how, layers, share, same))
    return pd.DataFrame(rows, columns=["method", "scan", "how", "layers", "share", "rank_correlation"])


def curves(explainer: Explainer, scan: str, maps: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Record the output while cubes of brain are deleted from a scan or inserted into the baseline, strongest first.

    Cubes have half the side of occlusion's, at least two voxels, and deleted ones take the baseline's values. The
    strongest have the largest mean over their brain voxels: by their sum, full cubes would come before those at the
    brain's edge whatever the map. If some are equal, these come in random order, and the output is the mean over such
    orders. For signed contributions, cubes that push the output away from the baseline's output come first.

    Returns:
        One row per method (or `random 0`, ...), kind and fraction: `method`, `kind` (deletion or insertion), `fraction`
        of the brain's voxels (in whole cubes), `output`.
    """
    image, mask = explainer.read(scan)
    score, side = explainer.of(explainer.model, scan), max(2, explainer.options.patch // 2)
    number = cubes(mask, side)
    sizes, empty = np.bincount(number[mask]), baseline_of(image, mask, explainer.options)
    ends = _outputs(score, [image, empty], explainer)
    rng = np.random.default_rng([seed, 1806])
    drawn = [rng.permutation(len(sizes)) for _ in range(ORDERS)]
    orders: list[tuple[str, np.ndarray]] = []
    for method, found in maps.items():
        weight = found * (np.sign(ends[0] - ends[1]) or 1.0) if method in CONTRIBUTIONS else np.abs(found)
        means = np.bincount(number[mask], weights=weight[mask]) / sizes
        tied = len(np.unique(means)) < len(means)  # as where Grad-CAM is zero, or within one of occlusion's cubes
        orders += [(method, any_order[np.argsort(-means[any_order], kind="stable")])
                   for any_order in (drawn if tied else drawn[:1])]
    orders += [(f"random {turn}", order) for turn, order in enumerate(drawn)]
    placed = [(name, _places(order, sizes)) for name, order in orders]
    jobs = [(name, kind, fraction, places) for name, places in placed for fraction in FRACTIONS
            for kind in ("deletion", "insertion")]

    def changed(kind: str, fraction: float, places: np.ndarray) -> np.ndarray:
        first = places[number] < fraction
        return np.where(first == (kind == "insertion"), image, empty)

    outputs = _outputs(score, (changed(*job) for _, *job in jobs), explainer, len(jobs))
    table = pd.DataFrame([job[:3] for job in jobs], columns=["method", "kind", "fraction"]).assign(output=outputs)
    return table.groupby(["method", "kind", "fraction"], sort=False, as_index=False)["output"].mean()


def _places(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Share of the brain's voxels that comes before the middle of each cube; infinite for the cubes without brain."""
    places = np.full(len(sizes) + 1, np.inf)
    places[order] = (sizes[order].cumsum() - sizes[order] / 2) / sizes.sum()
    return places


def areas(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the areas between a method's curves and those of random order, from `curves`.

    Returns:
        One row per method: `deletion`, `insertion`: how much sooner the output falls, or rises, than in random order,
        as a share of the range of its own and the random curves; 0 equals random order, below 0 is worse. `by_chance`:
        the standard deviation of random orders' means of the two. nan if the output never changes.
    """
    wide = table.pivot_table(index=["method", "kind"], columns="fraction", values="output")
    names = wide.index.get_level_values("method")
    ends = wide.xs("deletion", level="kind")
    rises = np.sign(ends[0.0].mean() - ends[1.0].mean())  # whether the scan's output is above the baseline's
    area = pd.Series(np.trapezoid(wide.to_numpy(), FRACTIONS, axis=1), wide.index).unstack("kind")
    drawn = area.index.str.startswith("random ")
    sooner = (area - area[drawn].mean()) * {"deletion": -rises, "insertion": rises}
    found = sooner[~drawn].assign(by_chance=sooner[drawn].mean(axis=1).std())
    span = pd.Series({name: float(np.ptp(wide[names.str.startswith("random ") | (names == name)].to_numpy()))
                      for name in found.index}, dtype=float)
    return found.div(span.where(span > 0), axis=0).rename_axis(None, axis=1)


@torch.no_grad()
def _outputs(score: nn.Module, images: Iterable[np.ndarray], explainer: Explainer,
             count: int | None = None) -> np.ndarray:
    """Run a module over images in batches: (images,)."""
    where, size = next(score.parameters()).device, scans_at_a_time(explainer.store.grid.shape)
    found: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    with frozen(score), evaluation(where), progress(total=count, desc="deletion and insertion",
                                                    disable=count is None) as bar:
        def run() -> None:
            batch = torch.from_numpy(np.stack(waiting)[:, None]).to(where)
            found.append(score(batch).float().cpu().numpy())
            bar.update(len(waiting))
            waiting.clear()

        for image in images:
            waiting.append(np.asarray(image, np.float32))
            if len(waiting) == size:
                run()
        if waiting:
            run()
    return np.concatenate(found)


def stability(explainer: Explainer, scan: str, maps: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Rank correlations of a scan's maps with those after slight noise, and after a shift by one voxel along x.

    Returns:
        One row per method: `noise`, `shift`; 0 if only the changed scan's map is the same everywhere in the brain, nan
        if the map itself is.
    """
    image, mask = explainer.read(scan)
    noise = np.random.default_rng([seed, 5]).normal(0, NOISE_SD * image[mask].std(), image.shape)
    noisy = np.where(mask, image + noise, 0).astype(np.float32)
    shifted = [np.concatenate([np.zeros_like(values[..., :1]), values[..., :-1]], -1) for values in (image, mask)]
    rows = {}
    for method, found in maps.items():
        after = explainer.map(scan, method, image=shifted[0], mask=shifted[1])
        back = np.concatenate([after[..., 1:], np.zeros_like(after[..., :1])], -1)
        rows[method] = {"noise": rank_correlation(found, explainer.map(scan, method, image=noisy, mask=mask), mask),
                        "shift": rank_correlation(found, back, mask)}
        if np.ptp(np.abs(found[mask])) > 0:  # else a map that noise wipes out would be left out of the means
            rows[method] = {name: 0.0 if np.isnan(value) else value for name, value in rows[method].items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def outside_share(found: np.ndarray, mask: np.ndarray) -> float:
    """Share of an unmasked map's absolute values outside the brain, over a uniform map's; nan if the map is zero."""
    weight, out = np.abs(found.astype(np.float64)), ~np.asarray(mask, bool)
    if not (weight.sum() > 0 and out.any()):
        return float("nan")
    return float(weight[out].sum() / weight.sum() / out.mean())


def incompleteness(explainer: Explainer, scan: str, found: np.ndarray) -> float:
    """Relative error of integrated gradients' sum: it should equal the scan's output minus the baseline's."""
    image, mask = explainer.read(scan)
    score = explainer.of(explainer.model, scan)
    ends = _outputs(score, [image, baseline_of(image, mask, explainer.options)], explainer)
    difference = float(ends[0] - ends[1])
    return abs(float(found.sum(dtype=np.float64)) - difference) / abs(difference) if difference else float("nan")


def agreement(maps: dict[str, np.ndarray], mask: np.ndarray) -> pd.DataFrame:
    """Rank correlations between all methods' maps: (methods, methods)."""
    names = list(maps)
    return pd.DataFrame([[rank_correlation(maps[one], maps[other], mask) for other in names] for one in names],
                        index=names, columns=names)


class Checked(NamedTuple):
    """Results of all checks.

    Attributes:
        table: one row per method and scan: `randomised` and `head` (rank correlation with all layers randomised, and
            with only the head, or an encoder's last stage), `shuffled` (nan without such a model), `deletion`,
            `insertion`, `by_chance`, `noise`, `shift`, `outside`, `incomplete` (nan except for integrated gradients),
            `agreement` (mean with the other methods). All are nan where the map is the same everywhere.
        randomised: see `randomisation`.
        agreement: see `agreement`; mean over scans.
        verdicts: see `verdicts`.
    """

    table: pd.DataFrame
    randomised: pd.DataFrame
    agreement: pd.DataFrame
    verdicts: pd.DataFrame


def check_maps(explainer: Explainer, scans: Sequence[str], methods: Sequence[str], run: Run, *, model_fault: str = "",
               shuffled: nn.Module | None = None, seed: int = 0) -> Checked:
    """Run all checks; writes `checks.csv`, `randomisation.csv`, `agreement.csv` and `verdicts.csv`.

    Args:
        explainer: the model and the output to explain.
        scans: names of the scans to check on.
        methods: of the maps.
        run: receives the tables.
        model_fault: why the model itself cannot be trusted, such as predicting no better than chance; see
            `kit.explain.maps.no_better_than_chance`. "" if it can; else none of its maps is supported.
        shuffled: the same network trained on shuffled labels.
        seed: of weights, orders and noise.
    """
    tables, copies, alike = [], [], []
    for scan in scans:
        mask = explainer.read(scan)[1]
        maps = {method: explainer.map(scan, method) for method in methods}
        copies.append(randomisation(explainer, scan, maps, seed))
        alike.append(agreement(maps, mask))
        tables.append(_numbers(explainer, scan, maps, copies[-1], alike[-1], shuffled, seed))
    checked = Checked(pd.concat(tables, ignore_index=True), pd.concat(copies, ignore_index=True),
                      pd.concat(alike).groupby(level=0, sort=False).mean(), verdicts(pd.concat(tables), model_fault))
    for name, table in (("checks", checked.table), ("randomisation", checked.randomised),
                        ("agreement", checked.agreement.rename_axis("method").reset_index()),
                        ("verdicts", checked.verdicts)):
        write_stamped(run / f"{name}.csv", table)
    return checked


def _numbers(explainer: Explainer, scan: str, maps: dict[str, np.ndarray], copies: pd.DataFrame, alike: pd.DataFrame,
             shuffled: nn.Module | None, seed: int) -> pd.DataFrame:
    mask = explainer.read(scan)[1]
    cascade = copies[copies["how"] == "cascading"].groupby("method", sort=False)["rank_correlation"]
    table = pd.DataFrame({"randomised": cascade.nth(-1).to_numpy(), "head": cascade.nth(0).to_numpy()},
                         index=list(maps))
    table["shuffled"] = [np.nan if shuffled is None else _model_correlation(
        explainer, scan, method, found, explainer.map(scan, method, model=shuffled)) for method, found in maps.items()]
    ordered = {method: found for method, found in maps.items() if np.ptp(found[mask]) > 0}  # a flat map orders no cubes
    table = table.join(areas(curves(explainer, scan, ordered, seed))).join(stability(explainer, scan, maps, seed))
    table["outside"] = [outside_share(found, mask) for found in maps.values()]
    table["incomplete"] = [incompleteness(explainer, scan, found) if method == "integrated_gradients" else np.nan
                           for method, found in maps.items()]
    others = alike.where(~np.eye(len(alike), dtype=bool))
    table["agreement"] = others.mean(axis=1)
    return table.rename_axis("method").reset_index().assign(scan=scan)


def verdicts(table: pd.DataFrame, model_fault: str = "", limits: Thresholds = THRESHOLDS) -> pd.DataFrame:
    """Judge each method by its means over the scans of which it has a map; the verdict says how many have none.

    Args:
        table: see `Checked`.
        model_fault: see `check_maps`.
        limits: beyond which a check fails.

    Returns:
        One row per method: `method`, `supported` (bool), `verdict` (which checks fail, or that it passes).
    """
    blank = table[["randomised", "noise"]].isna().all(axis=1)  # the map is the same everywhere
    scans, without = table["method"].value_counts(), table["method"][blank].value_counts()
    means = table[~blank].groupby("method").mean(numeric_only=True).reindex(table["method"].unique())
    rows = []
    for method, row in means.iterrows():
        faults = [model_fault] * bool(model_fault) + _faults(row, limits)
        anew = ("no map" if np.isnan(row["randomised"]) else f"another map (rank correlation {row['randomised']:.2f})")
        sooner = f"{row[['deletion', 'insertion']].mean():.2f} of the range ({row['by_chance']:.2f} by chance)"
        words = "not supported: " + "; ".join(faults) if faults else (
            f"passes: {anew} with random weights, beats random order by {sooner}, at least "
            f"{min(row['noise'], row['shift']):.2f} after noise and shift")
        if 0 < without.get(method, 0) < scans[method]:
            words += f" (no map in {without[method]} of {scans[method]} scans)"
        rows.append((method, not faults, words))
    return pd.DataFrame(rows, columns=["method", "supported", "verdict"])


def _faults(row: pd.Series, limits: Thresholds) -> list[str]:
    if np.isnan(row["randomised"]) and np.isnan(row["noise"]):
        return ["the map is the same everywhere"]
    faithful, faults = row[["deletion", "insertion"]].mean(), []
    if row["randomised"] > limits.randomised:
        faults.append(f"random weights give much the same map (rank correlation {row['randomised']:.2f})")
    if row["shuffled"] > limits.shuffled:
        faults.append(f"so do shuffled labels ({row['shuffled']:.2f})" if faults else
                      f"shuffled labels give much the same map ({row['shuffled']:.2f})")
    if np.isnan(faithful):
        faults.append("the output never changes, whatever is removed")
    elif not faithful > limits.faithful * row["by_chance"]:
        faults.append("removing what it marks changes the output hardly sooner than removing brain at random "
                      f"({faithful:.2f} of the range; {limits.faithful:g} SD of random orders, "
                      f"{limits.faithful * row['by_chance']:.2f}, are required)")
    faults += [f"it is another map after {what} ({row[name]:.2f})"
               for name, what in (("noise", "a little noise"), ("shift", "a shift by one voxel"))
               if not row[name] >= limits.stable]
    if row["outside"] > limits.outside:
        faults.append(f"it prefers what is outside the brain ({row['outside']:.1f} times a uniform map)")
    if row["incomplete"] > limits.incomplete:
        faults.append(f"its sum is off by {100 * row['incomplete']:.0f} % (take more steps)")
    return faults


def caption(method: str, table: pd.DataFrame) -> str:
    """Caption of a method's map: its name, with "not supported" if `verdicts` says so, or "not checked"."""
    found = table.loc[table["method"] == method, "supported"]
    if not len(found):
        return f"{method}: not checked"
    return method if found.all() else f"{method}: not supported"
