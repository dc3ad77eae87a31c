"""Compare refused and flagged scans with the rest, by each label, to reveal selection bias."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from kit.cohort.tabular import ages

# Labels with more classes are not tested; numbers with fewer than FEWEST_NUMBERS distinct values count as classes, and
# so do all numbers of sites.
MOST_CLASSES = 12
FEWEST_NUMBERS = 6
# Significance level, after Holm's correction over the labels tested.
ALPHA = 0.05
FEW = 10  # people or scans hit, below which only the largest differences would be found


def selection_bias(labels: pd.DataFrame, hit: np.ndarray, people: pd.Series | None = None) -> pd.DataFrame:
    """Test whether the scans that a filter hits, or their people, differ from the rest.

    Numbers are compared by the Mann-Whitney U test, two classes by Fisher's exact test, and more classes by the
    chi-square statistic with row permutations. Holm's method corrects p over the labels.

    Args:
        labels: one scan a row; columns that cannot separate groups are skipped.
        hit: (rows,) bool, whether the filter refused or flagged the scan in that row.
        people: (rows,) whose scan it is. One person's scans are not independent, so each person counts once: with the
            first known value of each label, and as hit if any scan is. None: each row is another person.

    Returns:
        One row per label that could be tested, smallest p first: label, hit, rest (medians, or class shares), p,
        differs.
    """
    if people is not None:
        names = people.to_numpy()
        labels, hit = labels.groupby(names).first(), pd.Series(hit).groupby(names).any().to_numpy()
    rows = []
    for name in labels:
        values = ages(labels[name]) if str(name).casefold() == "age" else labels[name]
        if str(name).casefold() == "site":  # numbers of sites are names
            values = values.astype(str).str.removesuffix(".0").where(values.notna())
        known = values.notna().to_numpy() & (values.astype(str).str.strip() != "").to_numpy()
        chosen, rest = values[known & hit], values[known & ~hit]
        if len(chosen) and len(rest) and (tested := _tested(chosen, rest)):
            rows.append({"label": name, **tested})
    table = pd.DataFrame(rows, columns=["label", "hit", "rest", "p"]).sort_values("p", ignore_index=True)
    steps = len(table) - np.arange(len(table))
    table["p"] = np.minimum(np.maximum.accumulate(table["p"].to_numpy() * steps), 1.0) if len(table) else table["p"]
    return table.assign(differs=table["p"] < ALPHA)


def warning(name: str, count: int, table: pd.DataFrame) -> str:
    """Return one line that says which groups a filter hit.

    Args:
        name: who or what was hit, such as "people with flagged scans".
        count: how many, in the unit that `selection_bias` compared.
        table: from `selection_bias`.
    """
    if table.empty:
        return f"{count} {name}: too few, or no labels to compare them by"
    if not table["differs"].any():
        few = "; so few would hardly show one" if count < FEW else ""
        return (f"{count} {name}: no difference from the rest was found in {', '.join(table['label'])} (smallest p = "
                f"{table['p'].min():.2g}{few})")
    parts = [f"{row.label} (p = {row.p:.2g}: {row.hit} against {row.rest})"
             for row in table[table["differs"]].itertuples()]
    return (f"WARNING: {count} {name} differ from the rest in {'; '.join(parts)}. Look at them before you study these "
            "labels.")


def _tested(chosen: pd.Series, rest: pd.Series) -> dict[str, object] | None:
    """Return both groups' medians or shares, and p; None for constant values or too many different texts."""
    both = pd.concat([chosen, rest])
    different = both.nunique()
    if different < 2:
        return None
    if pd.api.types.is_numeric_dtype(both) and not pd.api.types.is_bool_dtype(both) and different >= FEWEST_NUMBERS:
        p = stats.mannwhitneyu(chosen.astype(float), rest.astype(float)).pvalue
        return {"hit": f"median {chosen.median():.4g}", "rest": f"median {rest.median():.4g}", "p": float(p)}
    if different > MOST_CLASSES:
        return None
    counts = pd.crosstab(np.r_[np.ones(len(chosen)), np.zeros(len(rest))], both.astype(str).to_numpy())
    if different == 2:
        p = stats.fisher_exact(counts.to_numpy()).pvalue
    else:
        batch = max(1, 10**7 // len(both))  # bounds memory; the result does not depend on it
        method = stats.PermutationMethod(n_resamples=9999, batch=batch, rng=np.random.default_rng(0))
        p = stats.chi2_contingency(counts.to_numpy(), correction=False, method=method).pvalue
    shares = counts.div(counts.sum(axis=1), axis=0)
    hit, others = (", ".join(f"{share:.0%} {name}" for name, share in shares.loc[group].items()) for group in (1, 0))
    return {"hit": hit, "rest": others, "p": float(p)}
