"""The router in closed form: naive Bayes from counts, or discriminants from statistics, without a bias.

Mixtral's gate has no bias. With mu the mean of the partition means, v = W^-1 mu / (mu' W^-1 mu) satisfies E[v.x] = 1, so
the row w_k + b_k v gives the same logits in expectation as w_k x + b_k.

Shapes: K partitions, D model width, N tokens.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from forge.config import ModelConfig, RouterConfig
from forge.router.context import context_columns, context_rank, evidence
from forge.router.statistics import Array, LayerStatistics

#: Temperatures are searched within exp(+-this): wide enough for ridge, whose logits lie between 0 and 1.
_LOG_TEMPERATURE_RANGE = 5.0


def fit_rows(statistics: LayerStatistics, config: RouterConfig) -> Array:
    """Rows of the gate, shape (K, D), before the temperature.

    Raises:
        ValueError: a partition has no tokens.
    """
    if (statistics.counts_K == 0).any():
        raise ValueError("every partition needs tokens before the router can be fitted")
    weights_KD, bias_K = _METHODS[config.method](statistics, config.shrinkage)
    return fold_bias(statistics, config.shrinkage, weights_KD, bias_K)


def bayes_rows(config: ModelConfig, counts_KV: Array) -> Array:
    """Rows that turn the mean evidence in the context channels into log odds, (K, D): naive Bayes on the text so far.

    The same in every layer, and without a bias to fold: the evidence has mean zero over the partitions, which count alike.
    """
    rows_KD = np.zeros((len(counts_KV), config.d_model))
    rank = context_rank(config, len(counts_KV))
    if rank > 0:
        rows_KD[:, context_columns(config, rank)] = evidence(counts_KV, rank)[1]
    return rows_KD


def lda(statistics: LayerStatistics, shrinkage: float) -> tuple[Array, Array]:
    """Linear discriminant analysis (Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, eq. 4.10).

    w_k = W^-1 mu_k and b_k = -1/2 mu_k' W^-1 mu_k + log pi_k, with W the pooled within-partition covariance, shrunk, and
    pi_k the partition's share of tokens.

    Returns:
        Weights (K, D) and biases (K,) of the log posterior up to a constant.
    """
    means_KD = statistics.means_KD
    weights_KD = np.asarray(np.linalg.solve(statistics.shrunk_within_DD(shrinkage), means_KD.T).T, dtype=np.float64)
    prior_K = statistics.counts_K / statistics.counts_K.sum()
    bias_K: Array = -0.5 * (weights_KD * means_KD).sum(axis=1) + np.log(prior_K)
    return weights_KD, bias_K


def ridge(statistics: LayerStatistics, shrinkage: float) -> tuple[Array, Array]:
    """Ridge regression of the centred one-hot label on the centred gate input; the bias restores the means."""
    n = statistics.counts_K.sum()
    prior_K = statistics.counts_K / n
    mean_D = statistics.sums_KD.sum(axis=0) / n
    covariance_DD = statistics.second_DD / n - np.outer(mean_D, mean_D)
    cross_KD = statistics.sums_KD / n - np.outer(prior_K, mean_D)
    scale = np.trace(covariance_DD) / len(mean_D)
    weights_KD = np.linalg.solve(covariance_DD + shrinkage * scale * np.eye(len(mean_D)), cross_KD.T).T
    return weights_KD, prior_K - weights_KD @ mean_D


def centroid(statistics: LayerStatistics, shrinkage: float) -> tuple[Array, Array]:
    """Nearest partition mean: LDA with the identity, scaled to the mean variance, for W and equal shares."""
    means_KD = statistics.means_KD
    variance = float(np.trace(statistics.within_DD)) / means_KD.shape[1]
    return means_KD / variance, -0.5 * (means_KD**2).sum(axis=1) / variance


def fold_bias(statistics: LayerStatistics, shrinkage: float, weights_KD: Array, bias_K: Array) -> Array:
    """Fold the biases into rows without a bias along v, for which E[v.x] = 1.

    The mean bias is dropped first: it moves all logits alike, and what is folded only in expectation had better be small.
    """
    mean_D = statistics.means_KD.mean(axis=0)
    direction_D = np.linalg.solve(statistics.shrunk_within_DD(shrinkage), mean_D)
    direction_D /= mean_D @ direction_D
    return weights_KD + np.outer(bias_K - bias_K.mean(), direction_D)


def fit_temperature(logits_NK: Array, labels_N: np.ndarray) -> float:
    """The factor on the logits under which the held-out labels are most likely (Guo et al. 2017, eq. 9; here 1/T)."""

    def loss(log_factor: float) -> float:
        scaled_NK = logits_NK * np.exp(log_factor)
        top_N = scaled_NK.max(axis=1)
        log_z_N = top_N + np.log(np.exp(scaled_NK - top_N[:, None]).sum(axis=1))
        return float((log_z_N - scaled_NK[np.arange(len(labels_N)), labels_N]).mean())

    bounds = (-_LOG_TEMPERATURE_RANGE, _LOG_TEMPERATURE_RANGE)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


_METHODS = {"lda": lda, "ridge": ridge, "centroid": centroid}
