"""The Grain sampler: the same batches from the same numbers, wherever one starts."""

import json

import jax
import numpy as np
import pytest

import metarec_jax as mr

pytest.importorskip("grain")


@pytest.fixture(scope="module")
def users():
    data = mr.data.synthetic(users=90, items=40, seed=0)
    return mr.tasks.Histories.of(data, np.arange(1, 90)), mr.tasks.Target("click")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_is_a_function_of_its_number(users):
    one, two = (mr.tasks.sampler(*users, query=5, batch_size=8, seed=3, unknown=0.1) for _ in range(2))
    for i in (0, 17, 500):
        same(one[i], two[i])
    assert not np.array_equal(one[0].positions, mr.tasks.sampler(*users, query=5, batch_size=8, seed=4)[0].positions)


def test_the_position_is_plain_json_and_takes_up_where_it_was(users):
    dataset = mr.tasks.sampler(*users, query=5, batch_size=8)
    loop = iter(dataset.to_iter_dataset())
    for _ in range(7):
        next(loop)
    state = json.loads(json.dumps(loop.get_state()))
    rest = [next(loop) for _ in range(5)]
    fresh = iter(mr.tasks.sampler(*users, query=5, batch_size=8).to_iter_dataset())
    fresh.set_state(state)
    for batch in rest:
        same(next(fresh), batch)


def test_shards_share_no_user_and_leave_none_out(users):
    histories, target = users
    seen = []
    for number in range(3):
        dataset = mr.tasks.sampler(histories, target, query=5, batch_size=4, shard=(number, 3), buckets=2)
        seen.append({int(p) for i in range(40) for p in dataset[i].positions})
    assert sum(map(len, seen)) == len(set().union(*seen)) == len(histories)


def test_tasks_are_those_of_their_users_and_little_is_padding(users):
    histories, target = users
    dataset = mr.tasks.sampler(histories, target, query=5, batch_size=8)
    places = real = 0
    for i in range(60):
        task, positions = dataset[i]
        places, real = places + task.support.mask.size, real + task.support.mask.sum()
        for u, position in enumerate(positions):
            history = histories.data.item[histories.index[histories.starts[position] : histories.starts[position + 1]]]
            drawn = [part.features["item_id"][u][part.mask[u] > 0] for part in task]
            assert set(np.concatenate(drawn).tolist()) <= set(history.tolist())
            assert len(np.concatenate(drawn)) == len(history)
    assert 1 - real / places < 0.2


def test_a_shard_that_does_not_exist_is_refused(users):
    for shard in ((3, 3), (-1, 2), (89, 100)):
        with pytest.raises(ValueError, match="does not exist"):
            mr.tasks.sampler(*users, shard=shard)


def test_batches_of_one_number_have_the_same_shapes_in_all_shards(users):
    datasets = [mr.tasks.sampler(*users, query=5, batch_size=4, shard=(n, 7), buckets=6) for n in range(7)]
    shapes = [[d[i].task.support.mask.shape for d in datasets] for i in range(40)]
    assert all(len(set(each)) == 1 for each in shapes)
    assert len({each[0] for each in shapes}) > 1  # several widths
