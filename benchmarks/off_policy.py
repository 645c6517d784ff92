"""Off-policy estimates on real clicks: the rate of one logging policy, estimated from the log of another.

    python benchmarks/off_policy.py                # the Open Bandit sample, fetched once

The judged policy is "bts" (Thompson sampling): its probabilities at each position are how often its own log shows each
item there, smoothed, so that what it is compared with, its own click rate, is that of the same policy. The reward model
is a click rate for each item, shrunk to the mean, of the half of the log that is not estimated on. Prints a Markdown
table.
"""

import argparse

import numpy as np

import metarec_jax as mr
from metarec_jax.evaluation import counterfactual as off

SHRINK = 50.0  # impressions that the mean click rate is worth


def shown(log: mr.data.LoggedFeedback) -> np.ndarray:
    """`[positions, actions]` how often the policy shows each item at each position, each item once more than it did."""
    count = np.ones((log.position.max() + 1, log.actions))
    np.add.at(count, (log.position, log.action), 1)
    return count / count.sum(1, keepdims=True)


def click_rates(log: mr.data.LoggedFeedback, rows: np.ndarray) -> np.ndarray:
    """`[actions]` shrunk click rates of these rounds."""
    mean = log.reward[rows].mean()
    clicks = np.bincount(log.action[rows], log.reward[rows], log.actions)
    return (clicks + SHRINK * mean) / (np.bincount(log.action[rows], minlength=log.actions) + SHRINK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaigns", nargs="+", default=["all", "men", "women"])
    parser.add_argument("--clip", type=float, default=20.0, help="largest weight of the clipped estimate")
    given = parser.parse_args()
    print("| campaign | estimate of the click rate of bts | value | 95 % interval |\n|---|---|---|---|")
    for campaign in given.campaigns:
        log, judged = mr.data.open_bandit("random", campaign), mr.data.open_bandit("bts", campaign)
        policy = shown(judged)[log.position]
        target = policy[np.arange(len(log.action)), log.action]
        halves = np.arange(len(log.action)) % 2
        expected = np.zeros_like(policy)
        for half in (0, 1):
            expected[halves == half] = click_rates(log, np.flatnonzero(halves != half))
        rows = {
            "its own log (the truth)": off.on_policy(judged.reward),
            "the random policy's own rate": off.on_policy(log.reward),
            "IPS": off.ips(log.reward, log.propensity, target),
            f"IPS, weights up to {given.clip:g}": off.ips(log.reward, log.propensity, target, clip=given.clip),
            "SNIPS": off.snips(log.reward, log.propensity, target),
            "direct method": off.direct_method(expected, policy),
            "doubly robust": off.doubly_robust(log.reward, log.propensity, log.action, expected, policy),
        }
        for name, found in rows.items():
            print(f"| {campaign} | {name} | {found.value:.5f} | {found.low:.5f} to {found.high:.5f} |")


if __name__ == "__main__":
    main()
