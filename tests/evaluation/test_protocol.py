"""The hash of a result's setting: the same everywhere for the same setting, another for any other."""

import subprocess
import sys
from dataclasses import replace

import numpy as np

import metarec_jax as mr

SCRIPT = """
import metarec_jax as mr
data = mr.data.synthetic(users=20, items=40, seed=0)
print(mr.evaluation.describe(data, mr.ColdUsers(), seeds=[0, 1], support=(1, None))["hash"])
"""


def described(data=None, protocol=None, seeds=(0, 1), support=(1, None)):
    data = mr.data.synthetic(users=20, items=40, seed=0) if data is None else data
    return mr.evaluation.describe(data, protocol or mr.ColdUsers(), seeds=seeds, support=support)


def test_the_hash_is_the_same_in_another_process():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == described()["hash"]


def test_any_change_of_the_setting_changes_the_hash_and_a_name_does_not():
    data = mr.data.synthetic(users=20, items=40, seed=0)
    rating, genre = data.rating.copy(), {k: v.copy() for k, v in data.item_features.items()}
    rating[5] += 1
    genre["genre"][3] += 1
    changed = [
        described(replace(data, rating=rating)),
        described(replace(data, item_features=genre)),
        described(replace(data, timestamp=data.timestamp + 1)),
        described(protocol=mr.ColdUsers(query=9)),
        described(protocol=mr.ColdUsers(train_on="all")),
        described(seeds=(0, 2)),
        described(support=(3, None)),
    ]
    hashes = {d["hash"] for d in [described(), *changed]}
    assert len(hashes) == 1 + len(changed)
    assert described(replace(data, name="another"))["hash"] == described()["hash"]


def test_a_setting_reads_as_one_line():
    line = mr.evaluation.in_words(described(seeds=range(3)))
    assert line.startswith(f"[{described(seeds=range(3))['hash']}] synthetic, ColdUsers(minimum=13,")
    assert line.endswith("splits 0 to 2")
    assert mr.evaluation.in_words(described(seeds=(4, 2))).endswith("splits 4, 2")
    assert np.unique([len(described()["hash"])]).tolist() == [10]
