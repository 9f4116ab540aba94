from __future__ import annotations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from forge.config import RouterConfig
from forge.router.fit import centroid, fit_rows, fit_temperature, lda, ridge
from forge.router.statistics import LayerStatistics

CLASSES, WIDTH = 4, 12


def _data(tokens: int, seed: int, isotropic: bool = False) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    means = random.normal(size=(CLASSES, WIDTH)) + 2.0
    mixing = np.eye(WIDTH) if isotropic else random.normal(size=(WIDTH, WIDTH)) / 2
    draw = np.random.default_rng(seed)
    labels = draw.choice(CLASSES, size=tokens, p=[0.1, 0.2, 0.3, 0.4])
    return means[labels] + draw.normal(size=(tokens, WIDTH)) @ mixing, labels


def _statistics(x: np.ndarray, labels: np.ndarray) -> LayerStatistics:
    statistics = LayerStatistics.empty(CLASSES, WIDTH)
    for partition in range(CLASSES):
        for chunk in np.array_split(x[labels == partition], 3):
            statistics.add(partition, chunk)
    return statistics


def test_lda_decides_as_scikit_learn_does() -> None:
    x, labels = _data(4000, 1)
    held_out, _ = _data(3000, 2)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(x, labels)
    weights, bias = lda(_statistics(x, labels), 0.0)
    assert (np.argmax(held_out @ weights.T + bias, axis=1) == reference.predict(held_out)).all()


def test_statistics_add_up() -> None:
    x, labels = _data(900, 3)
    whole = _statistics(x, labels)
    parts = _statistics(x[:400], labels[:400]) + _statistics(x[400:], labels[400:])
    np.testing.assert_allclose(parts.within_DD, whole.within_DD, atol=1e-10)
    np.testing.assert_allclose(parts.means_KD, whole.means_KD, atol=1e-12)


@pytest.mark.parametrize("method", ["lda", "ridge", "centroid"])
def test_rows_without_a_bias_route_nearly_as_well_as_with_one(method: str) -> None:
    # Nearest mean assumes isotropic noise, so that is what it is tested on.
    x, labels = _data(8000, 4, isotropic=method == "centroid")
    held_out, truth = _data(4000, 5, isotropic=method == "centroid")
    statistics = _statistics(x, labels)
    weights, bias = {"lda": lda, "ridge": ridge, "centroid": centroid}[method](statistics, 1e-3)
    with_bias = (np.argmax(held_out @ weights.T + bias, axis=1) == truth).mean()
    rows = fit_rows(statistics, RouterConfig(method=method))
    without = (np.argmax(held_out @ rows.T, axis=1) == truth).mean()
    assert with_bias > 0.5
    assert without > with_bias - 0.05


def test_the_folded_bias_is_right_in_expectation() -> None:
    x, labels = _data(8000, 6)
    statistics = _statistics(x, labels)
    weights, bias = lda(statistics, 1e-3)
    rows = fit_rows(statistics, RouterConfig(method="lda"))
    mean = statistics.means_KD.mean(axis=0)
    np.testing.assert_allclose(rows @ mean, weights @ mean + bias - bias.mean(), atol=1e-8)


def test_the_temperature_recovers_a_known_scale() -> None:
    random = np.random.default_rng(8)
    logits = random.normal(size=(20000, CLASSES)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([random.choice(CLASSES, p=row) for row in probabilities])
    assert fit_temperature(logits / 5, labels) == pytest.approx(5, rel=0.05)


def test_a_partition_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="every partition needs tokens"):
        fit_rows(LayerStatistics.empty(2, 3), RouterConfig())
