"""Is it learning? Measures on embeddings of validation scans, and a verdict in plain words.

- alignment of the two views of a scan, and uniformity over scans, averaged over the views: Wang & Isola 2020
  (arXiv 2005.10242), alpha 2, t 2
- effective rank of the features: RankMe, Garrido et al. 2023 (arXiv 2210.02885)
- std: mean standard deviation of the embedding's dimensions on the unit sphere, times sqrt(width); 1 is evenly spread
- probes: how well a nearest-neighbour or ridge model predicts a label from the features, across participants
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kit.cohort.identity import participant_ids, site_names
from kit.cohort.labels import sexes
from kit.cohort.tabular import ages, spelled
from kit.device import device, evaluation, scans_at_a_time
from kit.seeding import rng_for
from kit.store.dataset import PreparedScans, load_batches
from kit.store.sampler import in_order
from kit.train.loss import nt_xent
from kit.train.objectives import MaskedReconstruction, Objective

LABELS = ("age", "sex", "site", "dataset")  # columns of the index to probe, in any case; all but age are classes
SITES = ("site", "dataset")  # the verdict on memorising site uses the first of these that could be probed
MEAN_SCANS = 512  # most training scans that `mean_scan_loss` averages
LEAST = 20  # fewest participants for a probe, and validation scans for a verdict on the validation loss


def look(objective: Objective, scans: PreparedScans, rows: pd.DataFrame) -> dict[str, float]:
    """Measure the encoder on validation scans, in evaluation mode.

    Args:
        objective: see `kit.train.objectives.Objective`.
        scans, rows: validation scans, and their rows of the index in the same order.

    Returns:
        rank: effective rank of the features, at most scans - 1.
        alignment, uniformity, std: of SimCLR's embeddings.
        found: for SimCLR, the share of views whose nearest other view is their partner, among both views of all these
            scans; 1 / (2 scans - 1) by chance. The log's top1 is this share within a training batch.
        probe_LABEL: balanced accuracy for each label, or R² for age.
        classes_site, classes_dataset: number of classes in these probes, for their chance level. A class needs two
            participants.

        The dict is empty if a feature or embedding is not finite.
    """
    features, views = embed(objective, scans)
    if not all(bool(part.isfinite().all()) for part in (features, views) if part is not None):
        return {}
    measures = {"rank": effective_rank(features)}
    if views is not None:
        first, second = F.normalize(views, dim=-1)
        _, top1 = nt_xent(first, second, 1.0, gather=False)
        measures |= {"alignment": alignment(first, second), "uniformity": (uniformity(first) + uniformity(second)) / 2,
                     "std": std(torch.cat([first, second])), "found": float(top1)}
    people = participant_ids(rows).to_numpy()
    for name in LABELS:
        if (column := spelled(rows, name)) is None:
            continue
        named = rows.rename(columns={column: name})
        labels = ages(named[name]) if name == "age" else _classes(named, name)
        if name == "age" and not pd.api.types.is_numeric_dtype(labels):
            continue  # bands such as 60-65
        if name in SITES:  # a site of one participant is never trained on when it is tested: its recall would be 0
            per_site = pd.Series(people, rows.index).groupby(labels).nunique()
            labels = labels.where(labels.map(per_site) > 1)
        if (value := quick_probe(features.numpy(), labels, people)) is not None:
            measures[f"probe_{name}"] = value
            if name in SITES:
                measures[f"classes_{name}"] = float(labels.nunique())
    return measures


def _classes(rows: pd.DataFrame, name: str) -> pd.Series:
    """Labels as text, as sites may be numbers. Site 1 of two datasets makes two sites; `M` and `male` make one sex."""
    known = site_names(rows) if name == "site" else sexes(rows[name]) if name == "sex" else rows[name]
    return known.astype("string")


@torch.no_grad()
def embed(objective: Objective, scans: PreparedScans, views: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features of the unaugmented scans (scans, width), and for SimCLR the views' embeddings (2, scans, width)."""
    objective.eval()
    features, embeddings = [], []
    for batch in load_batches(scans, in_order(len(scans), scans_at_a_time(scans.store.grid.shape))):
        batch = batch.to(device())
        with evaluation(device()):
            features.append(objective.encoder(batch.images).float().cpu())
            if objective.compares and views:
                embeddings.append(objective(batch, 0, embed=True).float().cpu())
    return torch.cat(features), torch.cat(embeddings, 1) if embeddings else None


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance between the two views of a scan, unit vectors (scans, width); 0 is perfect."""
    return float((first - second).square().sum(1).mean())


def uniformity(points: torch.Tensor) -> float:
    """Log of the mean Gaussian potential of unit vectors (points, width); lower is more even, 0 is a single point."""
    return float(torch.pdist(points).square().mul(-2).exp().mean().log())


def std(points: torch.Tensor) -> float:
    """Mean per-axis standard deviation of unit vectors (points, width), times sqrt(width): 0 collapsed, 1 even."""
    return float(points.std(0).mean() * math.sqrt(points.shape[1]))


def effective_rank(features: torch.Tensor) -> float:
    """RankMe: exponential of the entropy of the normalised singular values of centred features (scans, width)."""
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float((-(share * share.log()).sum()).exp())


def quick_probe(features: np.ndarray, labels: pd.Series, participants: np.ndarray) -> float | None:
    """How well features (scans, width) predict a label, in five folds of participants.

    Returns:
        balanced accuracy of five nearest neighbours, or for numbers R² of a ridge regression; None if there are too
        few participants or only one value.
    """
    known = labels.notna().to_numpy()
    features, labels, participants = features[known], labels[known], participants[known]
    if len(set(participants)) < LEAST or labels.nunique() < 2:
        return None
    number = pd.api.types.is_numeric_dtype(labels)
    model = RidgeCV(10.0 ** np.arange(-2, 5)) if number else KNeighborsClassifier(5)
    target = labels.to_numpy(float) if number else pd.factorize(labels)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class may be missing from a fold
        guess = cross_val_predict(make_pipeline(StandardScaler(), model), features, target, groups=participants,
                                  cv=GroupKFold(5))
    return float(r2_score(target, guess) if number else balanced_accuracy_score(target, guess))


@torch.no_grad()
def mean_scan_loss(objective: MaskedReconstruction, learned: PreparedScans, validation: PreparedScans) -> float:
    """Loss of the mean scan: the validation loss of always predicting the mean training scan, which an MAE must beat.

    Targets are averaged patch by patch, over the scans whose patch holds brain, and scored on the same masked patches
    as the MAE. At most `MEAN_SCANS` training scans are used, drawn by the seed.
    """
    objective.eval()
    where, model, size = device(), objective.autoencoder, scans_at_a_time(learned.store.grid.shape)
    drawn = rng_for(objective.seed).permutation(len(learned))[:MEAN_SCANS].tolist()
    total = count = torch.zeros((), device=where)
    for batch in load_batches(learned, [drawn[start:start + size] for start in range(0, len(drawn), size)]):
        batch = batch.to(where)
        holds = model.hold_brain(batch.masks)[..., None]
        total = total + (model.targets(batch.images, objective.normalise) * holds).sum(0)
        count = count + holds.sum(0)
    mean, loss = total / count.clamp_min(1), 0.0
    for batch in load_batches(validation, in_order(len(validation), size)):
        batch = batch.to(where)
        loss += float(objective.score(batch, mean, objective.masks(batch, 0))["loss"]) * len(batch) / len(validation)
    return loss


def monitor_of(learned: PreparedScans, validation: PreparedScans, rows: pd.DataFrame, every: int,
               epochs: int) -> Callable[[Objective, int], dict[str, float]]:
    """Make the monitor for `kit.train.loop.fit`: it looks after the first, the last and every `every`-th epoch.

    It never looks at fewer than three validation scans. For an MAE with at least two, it also returns `mean_scan_loss`
    after every epoch.

    Args:
        learned: training scans, for the mean scan.
        validation: the scans to look at.
        rows: of the validation scans in the index.
        every: epochs between two looks; 0: never look.
        epochs: of the whole run.
    """
    constant: dict[str, float] = {}  # computed at the first call, and the same throughout a run

    def monitor(objective: Objective, epoch: int) -> dict[str, float]:
        if isinstance(objective, MaskedReconstruction) and len(validation) > 1 and not constant:
            constant["mean_scan_loss"] = mean_scan_loss(objective, learned, validation)
        looks = every and len(rows) > 2 and (epoch % every == 0 or epoch in (1, epochs))
        return constant | (look(objective, validation, rows) if looks else {})

    return monitor


def verdict(log: pd.DataFrame, chance: float, sites: int = 0, validation_scans: int = 0) -> str:
    """Say in one line whether it is learning, not learning, collapsed, memorising site or overfitting, and why.

    - Few partners found: the share of views that find their partner (the log's `top1`) is below twice
      chance, or below chance plus 0.1 if that is less.
    - Collapsed: few partners found, and std below 0.1 or uniformity above -0.05; or an effective rank below 1.5 and
      below half its first value.
    - Not learning: the validation loss is not finite, the loss fell by less than 1 %, few partners found, or an MAE's
      validation loss is not below that of always predicting the mean training scan (`mean_scan_loss`).
    - Memorising site: chance-corrected site accuracy above 0.6 and up by more than 0.1 since the first epoch.
    - Overfitting: in each of the last three epochs the validation loss was above its best by more than a fifth of its
      first value, and the training loss is lower than at that best. Needs at least 20 validation scans, since the
      loss of fewer is too noisy.

    Args:
        log: one row per epoch, from `pretrain`.
        chance: share of views that find their partner by chance, see `kit.train.pretrain.by_chance`.
        sites: number of sites that the validation scans come from, for a log without `classes_site` and
            `classes_dataset`; 0 or 1: unknown.
        validation_scans: their number; 0: unknown.
    """
    if len(log) < 2:
        return "too early to say: fewer than two epochs"
    ended = log.dropna(subset=["seconds"]) if "seconds" in log else log.iloc[:0]  # without an unfinished epoch
    if "validation_loss" in ended and len(ended) and not math.isfinite(ended["validation_loss"].iloc[-1]):
        return ("NOT LEARNING: the validation loss is not finite, so in evaluation mode the network's output is not; "
                "lower learning_rate, or set clip: 1")
    seen = log.dropna(subset=["rank"]) if "rank" in log else log.iloc[:0]
    last, fell = log.iloc[-1], (log["loss"].iloc[0] - log["loss"].iloc[-1]) / abs(log["loss"].iloc[0])
    now, start = (seen.iloc[-1], seen.iloc[0]) if len(seen) else ({}, {})
    few_found = "top1" not in last or last["top1"] < min(2 * chance, chance + 0.1)
    if few_found and "std" in now and (now["std"] < 0.1 or now["uniformity"] > -0.05):
        return (f"COLLAPSED: all scans get nearly the same embedding (std {now['std']:.2f} of 1, uniformity "
                f"{now['uniformity']:.2f}); lower learning_rate, warm up longer, or take a larger batch")
    if "rank" in now and now["rank"] < min(1.5, 0.5 * start["rank"]):
        return (f"COLLAPSED: the features of all scans lie on one line (effective rank {now['rank']:.1f}, "
                f"{start['rank']:.1f} at first)")
    if fell < 0.01:
        return (f"NOT LEARNING: the loss went from {log['loss'].iloc[0]:.3f} to {last['loss']:.3f}, less than 1 % "
                "down; look at learning_rate, temperature and the views")
    if "top1" in last and few_found:
        return (f"NOT LEARNING: {last['top1']:.1%} of the views find their partner, by chance {chance:.1%} would; "
                "look at learning_rate, temperature and the views")
    if "mean_scan_loss" in log and (words := _no_better_than_the_mean(log)):
        return words
    label = next((name for name in SITES if f"probe_{name}" in now and not pd.isna(now[f"probe_{name}"])), None)
    site, sites = f"probe_{label}", int(now.get(f"classes_{label}", sites))
    if label and sites > 1:
        skill = {name: (row[site] - 1 / sites) / (1 - 1 / sites) for name, row in (("now", now), ("start", start))}
        if skill["now"] > 0.6 and skill["now"] > skill["start"] + 0.1:
            return (f"MEMORISING SITE: the site can be predicted from the features with {now[site]:.0%} balanced "
                    f"accuracy (chance {1 / sites:.0%}, {start[site]:.0%} at first): the encoder learns the scanner; "
                    "use stronger intensity augmentation, or check the preparation")
    if validation_scans >= LEAST and (words := _overfitting(log, validation_scans)):
        return words
    words = f"LEARNING: the loss fell by {fell:.0%}"
    if "top1" in last:
        words += f"; {last['top1']:.0%} of the views find their partner (chance {chance:.1%})"
    elif "mean_scan_loss" in log and log["validation_loss"].notna().any():
        held_out = log.dropna(subset=["validation_loss"]).iloc[-1]
        words += (f"; on held-out scans it is {held_out['validation_loss']:.3f}, that of the mean scan "
                  f"{held_out['mean_scan_loss']:.3f}")
    elif "validation_loss" not in log:
        words += "; whether it beats the mean scan is unknown: that takes two validation scans"
    probes = [f"{name.removeprefix('probe_')} {now[name]:.2f}" for name in seen if name.startswith("probe_")]
    return words + (f"; read off the features: {', '.join(probes)}" if probes else "")


def _no_better_than_the_mean(log: pd.DataFrame) -> str:
    """The verdict on an MAE that is no better than the mean scan; empty if it is better, or cannot be compared."""
    known = log.dropna(subset=["validation_loss", "mean_scan_loss"])
    if known.empty or known["validation_loss"].iloc[-1] < known["mean_scan_loss"].iloc[-1]:
        return ""
    now = known.iloc[-1]
    return (f"NOT LEARNING: on held-out scans the loss is {now['validation_loss']:.3f}, while always predicting the "
            f"mean training scan gives {now['mean_scan_loss']:.3f}; train for more epochs, or look at learning_rate")


def _overfitting(log: pd.DataFrame, validation_scans: int) -> str:
    """The verdict on overfitting, or nothing; see `verdict` for the rule."""
    known = log.dropna(subset=["validation_loss"]) if "validation_loss" in log else log.iloc[:0]
    if len(known) < 4:
        return ""
    best, last, loss = known.loc[known["validation_loss"].idxmin()], known.iloc[-1], known["validation_loss"]
    rose = loss.iloc[-3:].min() - best["validation_loss"] > 0.2 * loss.iloc[0]
    if not rose or last["loss"] >= best["loss"]:
        return ""
    return (f"OVERFITTING: it is memorising the scans: on {validation_scans} validation scans the loss was "
            f"{best['validation_loss']:.3f} after epoch {best['epoch']:.0f} and is {last['validation_loss']:.3f} now, "
            f"while that of training fell from {best['loss']:.3f} to {last['loss']:.3f}; train for fewer epochs, on "
            "more scans, or with stronger views")
