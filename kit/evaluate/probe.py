"""Linear probes on frozen features."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from kit.evaluate.metrics import auc, one_vs_rest
from kit.evaluate.tasks import Task

PENALTIES = tuple(10.0 ** power for power in range(-4, 5))  # ridge, or 1 / C of logistic regression
DEFAULT = 1.0  # the penalty where validation cannot choose, as in scikit-learn


def fit_probe(features: np.ndarray, labels: np.ndarray, validation_features: np.ndarray, validation_labels: np.ndarray,
              kind: str) -> Pipeline:
    """Standardise, then fit logistic or ridge regression, with the penalty that does best on validation.

    Best means the largest AUC (macro one-versus-rest for several classes) or the smallest squared error; ties go to
    the stronger penalty. Validation labels of one class have no AUC; then the penalty is `DEFAULT`.

    Args:
        features, validation_features: (scans, width) float.
        labels, validation_labels: (scans,) class 0 to K - 1, or the number. Training must hold every class, as outputs
            are numbered by the classes that it holds; validation may lack some.
        kind: "classification" or "regression".
    """
    def fitted(penalty: float) -> Pipeline:
        last = (LogisticRegression(C=1 / penalty, max_iter=2000) if kind == "classification"
                else Ridge(penalty, solver="svd"))  # more features than scans: the default solver warns
        return make_pipeline(StandardScaler(), last).fit(features, labels)

    def loss(probe: Pipeline) -> float:
        guess = predict_probe(probe, validation_features, kind)
        if kind == "classification":
            return -_auc(validation_labels, guess)
        return float(np.square(validation_labels - guess).mean())

    if kind == "classification" and len(set(validation_labels)) < 2:
        return fitted(DEFAULT)
    # ties go to the first, the stronger penalty
    return min((fitted(penalty) for penalty in reversed(PENALTIES)), key=loss)


def predict_probe(probe: Pipeline, features: np.ndarray, kind: str) -> np.ndarray:
    """Predict (scans,) log-odds of class 1, or the number; for K > 2 classes (scans, K) logits."""
    return probe.decision_function(features) if kind == "classification" else probe.predict(features)


def probe_tested(task: Task, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fit a linear probe on the training part's features and predict each tested part that has features."""
    kind, parts = task.labels.kind, task.parts
    fitted = fit_probe(features["train"], parts["train"].labels, features["validation"], parts["validation"].labels,
                       kind)
    return {name: predict_probe(fitted, values, kind) for name, values in features.items() if name in task.tested}


def _auc(labels: np.ndarray, guess: np.ndarray) -> float:
    """AUC of validation scans, each counted once; for K > 2 classes the mean over those that validation holds."""
    even = np.ones((1, len(labels)))
    if guess.ndim == 1:
        return float(auc(labels, guess, even)[0])
    odds = one_vs_rest(guess)
    return float(np.nanmean([auc(labels == each, odds[:, each], even)[0] for each in range(odds.shape[1])]))
