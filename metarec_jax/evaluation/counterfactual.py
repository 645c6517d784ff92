"""Off-policy evaluation: estimate another policy's click or conversion rate from logged feedback.

Arrays are over logged rounds and computed in float64: `reward` `[n]`, `propensity` `[n]` (the logging policy's
probability of the logged action) and `target` `[n]` (the evaluated policy's probability of the same action). Intervals
are normal approximations for a mean of independent rounds.
"""

from typing import NamedTuple

import numpy as np

from metarec_jax.errors import DataError


class Estimate(NamedTuple):
    """An estimated rate.

    Attributes:
      value: the estimate.
      error: its standard error.
      low, high: its 95 % interval.

    Example:
      >>> estimate = mr.evaluation.counterfactual.on_policy(np.array([1.0, 0.0, 0.0, 1.0]))
      >>> estimate.value, round(estimate.error, 3), round(estimate.high, 3)  # 0.5 + 1.96 standard errors
      (0.5, 0.289, 1.066)
    """

    value: float
    error: float
    low: float
    high: float


def on_policy(reward: np.ndarray) -> Estimate:
    """Estimate the logging policy's own rate: the mean reward `[n]`.

    Example:
      >>> mr.evaluation.counterfactual.on_policy(np.array([1.0, 0.0, 0.0, 1.0])).value
      0.5
    """
    return _estimate(_finite("reward", reward))


def ips(reward: np.ndarray, propensity: np.ndarray, target: np.ndarray, *, clip: float | None = None) -> Estimate:
    """Estimate a policy's rate by inverse propensity scoring (IPS).

    The mean of w r with w = target / propensity. Unbiased; `clip` bounds w, which lowers the variance and adds some
    bias.

    Args:
      reward, propensity, target: `[n]`, see the module.
      clip: largest weight (default: no limit).

    Raises:
      DataError: an array is empty, of another length or not finite, or has an invalid probability.
      ValueError: `clip` is not positive.

    Example:
      Two rounds of a uniform policy over two actions; the evaluated policy always takes the action of the first round:

      >>> reward, propensity, target = np.array([1.0, 1.0]), np.array([0.5, 0.5]), np.array([1.0, 0.0])
      >>> mr.evaluation.counterfactual.ips(reward, propensity, target).value  # (2 * 1 + 0 * 1) / 2
      1.0

    References:
      Horvitz and Thompson, 1952. Strehl et al., Learning from Logged Implicit Exploration Data, NIPS 2010.
    """
    reward, weight = _weights(reward, propensity, target, clip)
    return _estimate(weight * reward)


def snips(reward: np.ndarray, propensity: np.ndarray, target: np.ndarray, *, clip: float | None = None) -> Estimate:
    """Estimate a policy's rate by self-normalised IPS: sum of w r over sum of w.

    Consistent, within the range of the rewards, and with less variance than IPS. The standard error is that of a ratio
    (delta method).

    Args:
      reward, propensity, target: `[n]`, see the module.
      clip: largest weight (default: no limit).

    Raises:
      DataError: as in `ips`, or all weights are 0.
      ValueError: `clip` is not positive.

    Example:
      >>> reward, propensity, target = np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([0.75, 0.25])
      >>> mr.evaluation.counterfactual.snips(reward, propensity, target).value  # 1.5 * 1 / (1.5 + 0.5)
      0.75

    References:
      Swaminathan and Joachims, The Self-Normalized Estimator for Counterfactual Learning, NIPS 2015, eq. 8.
    """
    reward, weight = _weights(reward, propensity, target, clip)
    if not weight.sum():
        raise DataError(
            "snips: the evaluated policy shows nothing that was logged (all weights are 0); use direct_method instead"
        )
    value = float((weight * reward).sum() / weight.sum())
    return _estimate(value + weight * (reward - value) / weight.mean())


def direct_method(expected: np.ndarray, policy: np.ndarray) -> Estimate:
    """Estimate a policy's rate by a reward model.

    The mean over rounds of the sum over actions of policy x expected. It inherits the bias of the model.

    Args:
      expected: `[n, actions]` expected rewards.
      policy: `[n, actions]` the evaluated policy's probabilities; each row sums to 1.

    Raises:
      DataError: shapes differ, a value is not finite, or a row of `policy` is not a distribution.

    Example:
      >>> expected, policy = np.array([[0.25, 0.75], [0.5, 1.0]]), np.array([[0.0, 1.0], [0.5, 0.5]])
      >>> mr.evaluation.counterfactual.direct_method(expected, policy).value  # (0.75 + 0.75) / 2
      0.75
    """
    expected, policy = _policy(expected, policy)
    return _estimate((policy * expected).sum(1))


def doubly_robust(
    reward: np.ndarray,
    propensity: np.ndarray,
    action: np.ndarray,
    expected: np.ndarray,
    policy: np.ndarray,
    *,
    clip: float | None = None,
) -> Estimate:
    """Estimate a policy's rate by the direct method with a weighted correction of its error.

    The mean over rounds of E_policy[q] + w (r - q(action)). Unbiased if the propensities or the reward model are right.

    Args:
      reward, propensity: `[n]`.
      action: `[n]` logged actions.
      expected: `[n, actions]` expected rewards, q, of a model fitted on other rounds.
      policy: `[n, actions]` the evaluated policy's probabilities; each row sums to 1.
      clip: largest weight (default: no limit).

    Raises:
      DataError: an array has a wrong shape, a value that is not finite or an invalid probability.
      ValueError: `clip` is not positive.

    Example:
      The model expects 0.5 everywhere. The first round corrects it by 2 * (1 - 0.5). The second corrects it by 0, since
      the policy never takes its action:

      >>> reward, propensity, action = np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([0, 1])
      >>> expected, policy = np.full((2, 2), 0.5), np.array([[1.0, 0.0]] * 2)
      >>> mr.evaluation.counterfactual.doubly_robust(reward, propensity, action, expected, policy).value
      1.0

    References:
      Dudík, Langford and Li, Doubly Robust Policy Evaluation and Learning, ICML 2011, eq. 3.
    """
    expected, policy = _policy(expected, policy)
    action = np.asarray(action)
    if action.shape != (len(policy),) or action.min() < 0 or action.max() >= policy.shape[1]:
        raise DataError(f"action: expected {len(policy)} numbers from 0 to {policy.shape[1] - 1}")
    row = np.arange(len(action))
    reward, weight = _weights(reward, propensity, policy[row, action], clip)
    return _estimate((policy * expected).sum(1) + weight * (reward - expected[row, action]))


def _estimate(terms: np.ndarray) -> Estimate:
    value, error = float(terms.mean()), float(terms.std(ddof=1) / len(terms) ** 0.5) if len(terms) > 1 else np.nan
    return Estimate(value, error, value - 1.96 * error, value + 1.96 * error)


def _weights(
    reward: np.ndarray, propensity: np.ndarray, target: np.ndarray, clip: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return validated rewards and importance weights."""
    reward = _finite("reward", reward)
    logged, evaluated = _finite("propensity", propensity, len(reward)), _finite("target", target, len(reward))
    for name, values, low in (("propensity", logged, 1e-12), ("target", evaluated, 0.0)):
        if (bad := (values < low) | (values > 1)).any():
            row = int(np.argmax(bad))
            raise DataError(f"{name}: row {row} is {values[row]}, not a probability between {low:g} and 1")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    weight = evaluated / logged
    return reward, weight if clip is None else np.minimum(weight, clip)


def _policy(expected: np.ndarray, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    expected, policy = np.asarray(expected, np.float64), np.asarray(policy, np.float64)
    if expected.ndim != 2 or expected.shape != policy.shape or not len(policy):
        raise DataError(f"expected and policy must both be [n, actions], got {expected.shape} and {policy.shape}")
    for name, values in (("expected", expected), ("policy", policy)):
        if (bad := ~np.isfinite(values).all(1)).any():
            raise DataError(f"{name}: row {int(np.argmax(bad))} has a value that is not finite")
    if (bad := (policy.min(1) < 0) | (np.abs(policy.sum(1) - 1) > 1e-6)).any():
        raise DataError(f"policy: row {int(np.argmax(bad))} is no distribution over actions (its sum must be 1)")
    return expected, policy


def _finite(name: str, values: np.ndarray, length: int | None = None) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or (length is not None and len(array) != length):
        expected = "" if length is None else f" ({length})"
        raise DataError(f"{name}: expected one number a logged round{expected}, got an array of shape {array.shape}")
    if (bad := ~np.isfinite(array)).any():
        raise DataError(f"{name}: row {int(np.argmax(bad))} is {array[np.argmax(bad)]}; drop or correct such rounds")
    return array
