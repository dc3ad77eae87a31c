"""What is asked of a model: outputs, classes, similarity, a principal direction."""

import numpy as np
import pytest
import torch
from torch import nn

from kit.device import device, on_device
from kit.evaluate.predict import predict
from kit.explain.checks import reinitialised
from kit.explain.explainer import Explainer
from kit.explain.targets import TargetError, target_of
from kit.models.encoders import build_encoder
from kit.models.heads import Predictor
from kit.store.dataset import PreparedScans
from tests.conftest import GRID

TWO = {"task": "lesion", "kind": "classification", "classes": ["0", "1"]}
THREE = {"task": "group", "kind": "classification", "classes": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return on_device(build_encoder("resnet18_narrow", GRID)).eval()


@pytest.fixture(scope="module")
def rows(store):
    return store.index.head(6)


def value(output, model, store, scan) -> float:
    image = torch.from_numpy(store.read(scan)[0].astype(np.float32))[None, None].to(device())
    with torch.no_grad():
        found = output.of(on_device(model), scan).eval()(image)
    assert found.shape == (1,)
    return found.item()


def test_of_two_classes_one_is_the_others_negative(encoder, store, rows):
    model, scan = Predictor(encoder).eval(), rows["scan"].iloc[0]
    plain, one, none = (target_of(target, model, TWO, store, rows) for target in ("prediction", "1", "0"))
    assert plain.words == one.words == "log-odds of lesion = 1" and none.words == "log-odds of lesion = 0"
    assert value(plain, model, store, scan) == value(one, model, store, scan) == -value(none, model, store, scan)
    with pytest.raises(TargetError, match="target: got '2'; this model has prediction, 0, 1, similarity, views"):
        target_of("2", model, TWO, store, rows)


def test_of_several_classes_the_predicted_one_stays_the_one(encoder, store, rows):
    model, scan = Predictor(encoder, outputs=3).eval(), rows["scan"].iloc[0]
    logits = predict(model, PreparedScans(store, rows.head(1)))[0]
    plain = target_of("prediction", model, THREE, store, rows)
    assert value(plain, model, store, scan) == pytest.approx(logits.max(), rel=1e-4)
    assert value(target_of("b", model, THREE, store, rows), model, store, scan) == pytest.approx(logits[1], rel=1e-4)
    other = reinitialised(model, 4)
    of_other = predict(other, PreparedScans(store, rows.head(1)))[0]
    assert value(plain, other, store, scan) == pytest.approx(of_other[logits.argmax()], rel=1e-3)


def test_a_number_has_no_classes(encoder, store, rows):
    record = {"task": "age", "kind": "regression", "classes": []}
    standardised, raw = Predictor(encoder, mean=50, sd=12), Predictor(encoder)  # raw: `standardise: false`
    assert target_of("prediction", standardised, record, store, rows).words == "age, in training labels' SD"
    assert target_of("prediction", raw, record, store, rows).words == "age, in the label's own unit"
    with pytest.raises(TargetError, match="this model has prediction, similarity"):
        target_of("1", Predictor(encoder), record, store, rows)


def test_similarity_is_a_cosine_and_its_map_is_complete(encoder, store, rows):
    first, second, third = rows["scan"].iloc[:3]
    output = target_of("similarity", encoder, {}, store, rows)
    features = predict(encoder, PreparedScans(store, rows.head(3)))
    cosines = features @ features.T / np.outer(*[np.linalg.norm(features, axis=1)] * 2)
    assert value(output, encoder, store, third) == pytest.approx(cosines[2, 0], abs=1e-4)
    assert value(output, encoder, store, first) == pytest.approx(cosines[0, 1], abs=1e-4)  # nobody is like himself
    like = target_of("similarity", Predictor(encoder), TWO, store, rows, like=second)  # a head does not matter
    assert value(like, Predictor(encoder), store, third) == pytest.approx(cosines[2, 1], abs=1e-4)
    found = Explainer(encoder, like.of, like.words, store).map(third, "gradient")
    assert found.shape == GRID.shape and found.any()
    assert output.words == f"similarity to {first} (its own map: to {second})"
    assert like.words == f"similarity to {second} (its own map: to {first})"
    assert target_of("similarity", encoder, {}, store, rows.head(2), like=third).words == f"similarity to {third}"
    for alone in (None, first):
        with pytest.raises(TargetError, match="needs a second scan; name another in like, or show two"):
            target_of("similarity", encoder, {}, store, rows.head(1), like=alone)
    with pytest.raises(TargetError, match="the prepared scans have no 'nobody'"):
        target_of("similarity", encoder, {}, store, rows, like="nobody")


def test_a_scan_is_liker_to_its_own_views_than_to_anothers(encoder, store, rows):
    output = target_of("views", encoder, {}, store, rows)
    first, second = rows["scan"].iloc[[0, 3]]
    own = value(output, encoder, store, first)
    assert own == value(output, encoder, store, first)  # the views are the seed's
    image = torch.from_numpy(store.read(second)[0].astype(np.float32))[None, None].to(device())
    with torch.no_grad():
        assert own > output.of(encoder, first)(image).item()


def test_the_principal_direction_is_that_of_the_embeddings(encoder, store, rows):
    output = target_of("component", encoder, {}, store, rows)
    features = predict(encoder, PreparedScans(store, rows))
    found = np.array([value(output, encoder, store, scan) for scan in rows["scan"]])
    assert found.mean() == pytest.approx(0, abs=1e-4)
    assert np.square(found).sum() == pytest.approx(np.linalg.svd(features - features.mean(0))[1][0] ** 2, rel=1e-3)
    with pytest.raises(TargetError, match="three scans or more, these are 2"):
        target_of("component", encoder, {}, store, rows.head(2))
    with pytest.raises(TargetError, match="an encoder without a head has similarity, views, component"):
        target_of("prediction", encoder, {}, store, rows)
