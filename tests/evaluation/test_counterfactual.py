"""Off-policy estimates: right on average where the truth is known, equal to obp's, and strict with bad logs."""

import numpy as np
import pytest

from metarec_jax.errors import DataError
from metarec_jax.evaluation import counterfactual as off

ACTIONS = 4


def world(rng, n):
    """Rounds of a world with known click rates: context in {0, 1}, logging and judged policy, rates `[2, actions]`."""
    rates = np.array([[0.1, 0.5, 0.3, 0.7], [0.6, 0.2, 0.8, 0.4]])
    logging, judged = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]]), np.array([[0.1, 0.2, 0.3, 0.4]] * 2)
    context = rng.integers(0, 2, n)
    action = (rng.random((n, 1)) > np.cumsum(logging[context], 1)).sum(1)
    reward = (rng.random(n) < rates[context, action]).astype(float)
    truth = (judged * rates).sum(1).mean()
    return context, action, reward, logging[context, action], judged[context], rates[context], truth


def test_estimates_are_right_on_average_and_their_intervals_cover():
    rng = np.random.default_rng(0)
    found = {name: [] for name in ("ips", "snips", "dr", "dr with a wrong model", "dm")}
    for _ in range(400):
        _, action, reward, propensity, judged, rates, truth = world(rng, 300)
        target = judged[np.arange(300), action]
        found["ips"].append(off.ips(reward, propensity, target))
        found["snips"].append(off.snips(reward, propensity, target))
        found["dr"].append(off.doubly_robust(reward, propensity, action, rates, judged))
        wrong = np.full_like(rates, 0.9)
        found["dr with a wrong model"].append(off.doubly_robust(reward, propensity, action, wrong, judged))
        found["dm"].append(off.direct_method(rates, judged))
    for name, estimates in found.items():
        values = np.array([e.value for e in estimates])
        np.testing.assert_allclose(values.mean(), truth, atol=4 * values.std() / 20, err_msg=name)
        if name != "dm":  # whose context is the only thing that varies
            covered = np.mean([e.low <= truth <= e.high for e in estimates])
            assert 0.9 < covered < 0.99, name
            np.testing.assert_allclose(np.mean([e.error for e in estimates]), values.std(), rtol=0.12, err_msg=name)
    errors = {name: np.std([e.value for e in estimates]) for name, estimates in found.items()}
    assert errors["dr"] < errors["snips"] < errors["ips"]


def test_estimates_equal_obp():
    ope = pytest.importorskip("obp.ope")
    rng = np.random.default_rng(1)
    _, action, reward, propensity, judged, rates, _ = world(rng, 200)
    model = np.clip(rates + rng.normal(0, 0.1, rates.shape), 0, 1)
    target = judged[np.arange(200), action]
    shared = {"reward": reward, "action": action, "pscore": propensity, "action_dist": judged[:, :, None]}
    shared["position"] = np.zeros(200, int)
    expected = {"estimated_rewards_by_reg_model": model[:, :, None]}
    ipw, snipw = ope.InverseProbabilityWeighting, ope.SelfNormalizedInverseProbabilityWeighting
    whole = shared | expected
    direct = {k: whole[k] for k in ("action_dist", "position", "estimated_rewards_by_reg_model")}
    pairs = [
        (off.ips(reward, propensity, target), ipw().estimate_policy_value(**shared)),
        (off.snips(reward, propensity, target), snipw().estimate_policy_value(**shared)),
        (off.direct_method(model, judged), ope.DirectMethod().estimate_policy_value(**direct)),
        (
            off.doubly_robust(reward, propensity, action, model, judged),
            ope.DoublyRobust().estimate_policy_value(**whole),
        ),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.value, theirs, rtol=1e-6)


def test_judging_the_logging_policy_itself_gives_its_own_mean():
    _, _, reward, propensity, *_ = world(np.random.default_rng(2), 100)
    plain = off.on_policy(reward)
    for estimate in (off.ips(reward, propensity, propensity), off.snips(reward, propensity, propensity)):
        np.testing.assert_allclose(estimate, plain, rtol=1e-6)


BAD = {
    "reward: row 1 is nan": ([1, np.nan], [0.5, 0.5], [0.5, 0.5]),
    "propensity: row 0 is 0": ([1, 1], [0, 0.5], [0.5, 0.5]),
    r"propensity: row 1 is 1\.5": ([1, 1], [0.5, 1.5], [0.5, 0.5]),
    r"target: row 0 is -0\.1": ([1, 1], [0.5, 0.5], [-0.1, 0.5]),
    "target: expected one number a logged round": ([1, 1], [0.5, 0.5], [0.5]),
    "reward: expected one number": ([], [], []),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_log_is_refused_with_its_row(message):
    for estimator in (off.ips, off.snips):
        with pytest.raises(DataError, match=message):
            estimator(*map(np.array, BAD[message]))


def test_a_bad_policy_or_model_is_refused():
    half = np.full((3, 2), 0.5)
    with pytest.raises(DataError, match="policy: row 0 is no distribution"):
        off.direct_method(half, half * 1.1)
    with pytest.raises(DataError, match="row 2 has a value that is not finite"):
        off.direct_method(np.where(np.arange(3)[:, None] == 2, np.inf, half), half)
    with pytest.raises(DataError, match="action: expected 3 numbers from 0 to 1"):
        off.doubly_robust(np.ones(3), np.ones(3), np.array([0, 1, 2]), half, half)
    with pytest.raises(DataError, match="nothing that was logged"):
        off.snips(np.ones(2), np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="clip"):
        off.ips(np.ones(2), np.ones(2), np.ones(2), clip=0)
