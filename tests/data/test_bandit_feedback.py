"""Open Bandit: the columns arrive as they are logged, and damage is told."""

import zipfile

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data import bandit_feedback
from metarec_jax.errors import DataError

HEAD = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3"
ROWS = [
    "0,2019-11-24 00:00:34.762830+00:00,1,3,0,0.5,a,x,p,q,0.0,1.0,2.0",
    "1,2019-11-24 00:01:53.965051+00:00,2,1,1,0.25,b,x,p,r,3.0,4.0,5.0",
]


@pytest.fixture
def cache(tmp_path):
    text = "\n".join([HEAD + "".join(f",user-item_affinity_{i}" for i in range(3)), *ROWS]) + "\n"
    with zipfile.ZipFile(tmp_path / "open-bandit.zip", "w") as archive:
        archive.writestr("random/men/men.csv", text)
    return tmp_path


def test_columns_arrive_as_logged(cache):
    log = mr.data.open_bandit("random", "men", cache=cache)
    assert log.actions == 3
    assert log.action.tolist() == [1, 2]
    assert log.position.tolist() == [2, 0]
    assert log.reward.tolist() == [0, 1]
    assert log.propensity.tolist() == [0.5, 0.25]
    assert log.user.tolist() == [[0, 0, 0, 0], [1, 0, 0, 1]]
    np.testing.assert_array_equal(log.affinity, [[0, 1, 2], [3, 4, 5]])
    assert (log.timestamp - log.timestamp[0]).tolist() == [0, 79]
    assert log.timestamp[0] == 1574553634


def test_unknown_names_and_damaged_archives_are_told(cache):
    with pytest.raises(DataError, match="campaign"):
        mr.data.open_bandit("random", "children", cache=cache)
    with pytest.raises(DataError, match="delete it"):
        mr.data.open_bandit("bts", "men", cache=cache)
    (cache / "open-bandit.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="damaged"):
        mr.data.open_bandit("random", "men", cache=cache)


def test_the_sample_is_taken_from_the_wheel_with_its_checksums(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bandit_feedback, "from_wheel", lambda *a: asked.append(a) or no_network())
    with pytest.raises(DataError, match="no network"):
        mr.data.open_bandit(cache=tmp_path)
    assert asked[0][:2] == ("obp==0.4.1", "obp/dataset/obd/")
    assert all(len(digest) == 64 for digest in asked[0][2].values())


def no_network():
    raise DataError("no network")
