"""The ranking objective: its loss against numpy in float64, what is drawn, and every strategy trained to rank."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import metarec_jax as mr
from metarec_jax.strategies.catalogue import adapt, score, score_shared
from metarec_jax.strategies.observed import popularity, tables
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.wrappers.labels import SHIFTS
from metarec_jax.strategies.wrappers.ranked import _drawn, ranking_loss, with_negatives
from metarec_jax.tasks.observed import Observed, observe
from metarec_jax.tasks.ranking import Chosen, Known, RankingTask
from metarec_jax.training.build import build, default_model

DATA = mr.data.synthetic(users=60, items=30, ratings_per_user=(8, 16), seed=3)
TARGET = mr.tasks.Target("ranking", 4.0, levels=(1.0, 3.0, 5.0))
EVERY = mr.STRATEGIES | mr.strategies.RANKING
FAMILIES = ("ridge", "alpaca", "melu", "nlba", "tanp", "mwuf", "in_context", "gated", "lora", "reptile")
SOME = [*FAMILIES, *mr.strategies.RANKING]
TRAINED = ["ridge", "melu", "in_context", "ials", "stack"]  # the slowest test
PADDED = ["ridge", "tanp", "mwuf", "in_context", *mr.strategies.RANKING]
POPULAR_AT_FIRST = [name for name in SOME if name != "content"]  # it is a member of `stack`, and 0 without a history
KEY = jax.random.key(0)


def model_options(name):
    return {} if default_model(name) == "design" else {"width": 4}


@cache
def built(name):
    return build(name, None, default_model(name), model_options(name), DATA, TARGET)


@cache
def observed():
    return observe(mr.tasks.Histories.of(DATA, np.arange(1, 51)), TARGET)


@cache
def untrained(name):
    """Initial parameters, with the tables of the training users."""
    return {**jax.jit(built(name).init)(KEY), "tables": jax.device_put(tables(built(name), observed()))}


def trains(name):
    """Whether it has parameters; others learn all in closed form."""
    return bool(untrained(name).keys() - {"tables", SHIFTS})


def perturbed(params):
    """Parameters away from their initial zeros, so that no term is hidden by one; the tables as they are."""
    own = {name: x for name, x in params.items() if name != "tables"}
    moved = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), own)
    return moved | {"tables": params["tables"]}


def random_task(items, users=5, support=6, query=4, seed=0):
    """A batch with padding in supports, in queries and for a whole user; one query item is in the support, too."""
    rng = np.random.default_rng(seed)
    rows = np.stack([1 + rng.permutation(items - 1)[: support + query] for _ in range(users)]).astype(np.int32)
    weight = (np.arange(support) < rng.integers(0, support + 1, users)[:, None]).astype(np.float32)
    mask = (np.arange(query) < rng.integers(1, query + 1, users)[:, None]).astype(np.float32)
    weight[0], mask[0] = 1, 1
    rows[0, support + 1] = rows[0, 0]
    weight[-1], mask[-1] = 0, 0
    target = rng.choice([0.0, 0.5, 1.0], size=weight.shape, p=[0.2, 0.2, 0.6]).astype(np.float32)
    known = Known(np.where(weight > 0, rows[:, :support], 0), target * weight, weight, {}, {})
    return RankingTask(known, Chosen(np.where(mask > 0, rows[:, support:], 0), mask))


def with_garbage(task, items):
    """The task with anything at masked places of supports and queries, and of users that fill up a batch."""
    rng = np.random.default_rng(1)

    def garbage(x, mask, high):
        other = rng.integers(1, high, x.shape) if high else rng.normal(size=x.shape)
        return np.where(mask > 0, x, other).astype(x.dtype)

    known, query = task
    target = garbage(known.target, known.weight, 0)
    known = known._replace(items=garbage(known.items, known.weight, items), target=target)
    return RankingTask(known, query._replace(rows=garbage(query.rows, query.mask, items)))


def toy(width=3):
    """A user is the weighted mean of the vectors of the support, and scores are products; its loss ranks."""

    def adapt(params, support, key):
        value = jnp.where(support.mask > 0, support.mask * support.target, 0.0)
        rows = params["in"][support.features["item_id"]]
        return params["bias"] + jnp.einsum("un,unf->uf", value, rows) / (1 + value.sum(1, keepdims=True))

    def predict(params, adapted, features):
        return jnp.einsum("unf,uf->un", params["out"][features["item_id"]], adapted)

    return Strategy(lambda key: {}, adapt, predict, lambda *_: None, ranks=True)


def toy_params(items, width=3, scale=1.0):
    rng = np.random.default_rng(5)
    tables = {
        "items": {"item_id": np.arange(items, dtype=np.int32)},
        "log_popularity": np.log(rng.dirichlet(np.full(items, 3.0))).astype(np.float32),
    }
    vectors = {name: rng.normal(size=(items, width)).astype(np.float32) * scale for name in ("in", "out")}
    return jax.tree.map(jnp.asarray, {**vectors, "bias": rng.normal(size=width).astype(np.float32), "tables": tables})


def loss_by_hand(params, task, focus):
    """The loss that the docstring of `Ranking` states, user by user, in float64."""
    known, losses = task.known, []
    vectors = {name: np.asarray(params[name], np.float64) for name in ("in", "out", "bias")}
    for u in range(len(known.items)):
        real = known.weight[u] > 0
        value = known.weight[u][real] * known.target[u][real].astype(np.float64)
        user = vectors["bias"] + value @ vectors["in"][known.items[u][real]] / (1 + value.sum())
        left = np.setdiff1d(np.arange(1, len(vectors["out"])), known.items[u][real])
        scores = dict(zip(left.tolist(), vectors["out"][left] @ user, strict=True))
        total = np.log(sum(np.exp(s) for s in scores.values()))
        chosen = [scores[r] for r in task.query.rows[u][task.query.mask[u] > 0].tolist() if r in scores]
        if chosen:
            log_p = np.array(chosen) - total
            count = known.weight[u] @ known.target[u]
            weight = np.exp(log_p) ** (focus * count / (count + 50))
            losses.append(-(weight @ log_p) / weight.sum())
    return np.mean(losses)


@pytest.mark.parametrize("focus", [0.0, 0.7, 2.0])
def test_the_full_loss_equals_numpy_in_float64(focus):
    task, params = random_task(12), toy_params(12)
    value, _ = ranking_loss(toy(), mr.Ranking(focus=focus, unknown=0.0))(params, task, KEY)
    np.testing.assert_allclose(value, loss_by_hand(params, task, focus), rtol=1e-5)


@pytest.mark.parametrize("sample", [None, 5])
def test_a_discount_of_popular_items_is_no_part_of_the_loss(sample):
    task, params, plain = random_task(12), toy_params(12), toy()

    def predict(params, adapted, features):
        return plain.predict(params, adapted, features) - 0.3 * popularity(params, features)

    discounted = plain._replace(predict=predict, novelty=0.3)
    objective = mr.Ranking(sample=sample, unknown=0.2)
    values = [ranking_loss(s, objective)(params, task, KEY)[0] for s in (plain, discounted)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    without_add_back = ranking_loss(discounted._replace(novelty=0.0), objective)(params, task, KEY)[0]
    assert abs(without_add_back - values[0]) > 1e-3


def test_the_weights_of_the_focus_are_held_constant():
    """The gradient is that of a weighted mean of log-likelihoods, whose weights do not move."""
    task, params = random_task(12), toy_params(12)
    loss = ranking_loss(toy(), mr.Ranking(focus=1.0, unknown=0.0))
    count = (task.known.weight * task.known.target).sum(1)[:4, None]

    def with_weights(bias, weights):
        scores = score_shared(toy(), params | {"bias": bias}, adapted(bias), task.known, params["tables"]["items"])
        seen = np.where(task.known.weight > 0, task.known.items, 0)
        scores = scores.at[:, 0].set(-jnp.inf).at[np.arange(5)[:, None], seen].set(-jnp.inf)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(scores[:4]), task.query.rows[:4], 1)
        kept = (task.query.mask[:4] > 0) & jnp.isfinite(log_p)
        log_p = jnp.where(kept, log_p, 0.0)
        weights = jnp.where(kept, jnp.exp(log_p * count / (count + 50)), 0.0) if weights is None else weights
        return -((weights * log_p).sum(1) / weights.sum(1)).mean(), weights

    def adapted(bias):
        return adapt(toy(), params | {"bias": bias}, params["tables"]["items"], task.known)

    bias = params["bias"]
    _, weights = with_weights(bias, None)
    expected = jax.grad(lambda b: with_weights(b, weights)[0])(bias)
    found = jax.grad(lambda b: loss(params | {"bias": b}, task, KEY)[0])(bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_the_sampled_loss_is_the_full_one_in_expectation(by):
    """Up to the bias of a logarithm, half of the variance of its argument's relative error."""
    items = 200
    task, params = random_task(items), toy_params(items, scale=0.7)
    full, _ = ranking_loss(toy(), mr.Ranking(focus=0.0, unknown=0.0))(params, task, KEY)
    off = []
    for sample in (20, 180):
        loss = ranking_loss(toy(), mr.Ranking(sample=sample, by=by, focus=0.0, unknown=0.0))
        draw = jax.jit(jax.vmap(lambda key, loss=loss: loss(params, task, key)[0]))
        values = np.asarray(draw(jax.random.split(KEY, 2000)))
        error = values.std() / 2000**0.5
        assert abs(values.mean() - full) < 4 * error + values.std() ** 2 * 5
        off.append(np.sqrt(np.mean((values - float(full)) ** 2)))
    assert off[1] < 0.5 * off[0]  # three times less with nine times as many


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_sampled_scores_are_corrected_by_how_likely_a_draw_is(by):
    """The mean of exp(total) over draws is its sum over all items: without the correction it would be far off."""
    items = 50
    params, task = toy_params(items), random_task(items)
    scores = np.random.default_rng(2).normal(size=items)
    draw = jax.vmap(lambda key: _drawn(by, 30, params["tables"]["log_popularity"], task, key))
    drawn, log_chance = draw(jax.random.split(KEY, 3000))
    assert (np.asarray(drawn) > 0).all()
    estimate = (np.exp(scores)[np.asarray(drawn)] / np.exp(np.asarray(log_chance, np.float64))).mean(1)
    np.testing.assert_allclose(estimate.mean(), np.exp(scores)[1:].sum(), atol=4 * estimate.std() / 3000**0.5)


@pytest.mark.parametrize("sample", [12, 1_000_000])
def test_a_sample_of_the_size_of_the_catalogue_is_the_full_loss(sample):
    task, params = random_task(12), toy_params(12)
    full, every = (ranking_loss(toy(), mr.Ranking(sample=s, unknown=0.0))(params, task, KEY)[0] for s in (None, sample))
    assert full == every


@pytest.mark.parametrize("by", ["uniform", "popularity", "batch"])
@pytest.mark.parametrize("sample", [1, 8])
def test_gradients_of_the_sampled_loss_are_finite(by, sample):
    task, params = random_task(12), toy_params(12, scale=30.0)
    own = {name: params.pop(name) for name in ("in", "out", "bias")}
    loss = ranking_loss(toy(), mr.Ranking(sample=sample, by=by))
    value, gradient = jax.value_and_grad(lambda p: loss(params | p, task, KEY)[0])(own)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("by", ["uniform", "popularity", "batch"])
def test_padding_never_changes_the_sampled_loss(by):
    task, params = random_task(12), toy_params(12)
    own = {name: params.pop(name) for name in ("in", "out", "bias")}
    loss = ranking_loss(toy(), mr.Ranking(sample=6, by=by))
    step = jax.jit(jax.value_and_grad(lambda p, task: loss(params | p, task, KEY)[0]))
    (value, gradient), (padded, padded_gradient) = step(own, task), step(own, with_garbage(task, 12))
    np.testing.assert_allclose(padded, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded_gradient, gradient)


def test_a_user_who_has_seen_every_item_and_a_batch_without_users_have_no_loss():
    params = toy_params(7)
    rows, ones = np.arange(1, 7, dtype=np.int32)[None], np.ones((1, 6), np.float32)
    seen = RankingTask(Known(rows, ones, ones, {}, {}), Chosen(rows[:, :2], ones[:, :2]))
    nobody = jax.tree.map(np.zeros_like, seen)
    own = {name: params.pop(name) for name in ("in", "out", "bias")}
    for objective in (mr.Ranking(), mr.Ranking(sample=3)):
        for task in (seen, nobody):
            loss = partial(ranking_loss(toy(), objective), task=task, key=KEY)
            value, gradient = jax.value_and_grad(lambda p, loss=loss: loss(params | p)[0])(own)
            assert value == 0
            assert not any(np.asarray(x).any() for x in gradient.values())


def test_hidden_items_are_unknown_ones():
    """With `unknown=1` every item has the id 0: all items left have one score."""
    task, params = random_task(12), toy_params(12)
    value, _ = ranking_loss(toy(), mr.Ranking(unknown=1.0))(params, task, KEY)
    left = [11 - int((w > 0).sum()) for w in task.known.weight[:-1]]
    np.testing.assert_allclose(value, np.mean(np.log(left)), rtol=1e-5)


def test_negatives_weigh_as_much_as_the_positives_and_are_none_of_a_users_items():
    rng = np.random.default_rng(0)
    items = {"item_id": jnp.arange(9), "item/kind": jnp.arange(9) % 3}
    features = {"item_id": jnp.array([[1, 2, 3], [4, 5, 0]]), "user/age": jnp.array([[7, 7, 7], [8, 8, 8]])}
    features["item/kind"] = features["item_id"] % 3
    mask = jnp.array([[1.0, 0.5, 1.0], [1.0, 0.0, 0.0]])
    examples = mr.Examples(features, jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), mask)
    both = with_negatives(examples, items, jax.random.key(int(rng.integers(99))), 400, 2.0)
    rows, weight = np.asarray(both.features["item_id"][:, 3:]), np.asarray(both.mask[:, 3:])
    assert set(rows[0].tolist()) == set(range(1, 9))
    np.testing.assert_array_equal(rows[0], rows[1])  # drawn once for the batch
    np.testing.assert_array_equal(weight == 0, [np.isin(rows[0], [1, 2, 3]), rows[1] == 4])
    np.testing.assert_allclose(weight.max(1), 2.0 * np.array([1.5, 1.0]) / 400)
    np.testing.assert_array_equal(both.features["item/kind"][:, 3:], rows % 3)
    np.testing.assert_array_equal(both.features["user/age"][:, 3:], [[7] * 400, [8] * 400])
    assert not np.asarray(both.target[:, 3:]).any()
    for before, after in ((examples.target, both.target), (examples.mask, both.mask)):
        np.testing.assert_array_equal(before, after[:, :3])


def test_bad_settings_and_parameters_are_refused():
    for wrong in ({"by": "luck"}, {"sample": 0}, {"focus": -1.0}, {"folds": 1}, {"query": 0}, {"short": 1.5}):
        with pytest.raises(ValueError, match=r"by is|need sample|shares from 0 to 1"):
            mr.Ranking(**wrong)
    ranks = built("ease")
    assert mr.ranked(ranks) is ranks
    for params in ({"tables": 0}, jnp.zeros(3)):
        with pytest.raises(TypeError, match="must be a dict without"):
            mr.ranked(toy()._replace(ranks=False, init=lambda key, params=params: params)).init(KEY)


@pytest.mark.parametrize("name", [n if n in PADDED else pytest.param(n, marks=pytest.mark.grid) for n in SOME])
def test_padding_never_changes_the_loss_or_the_gradient(name):
    task, params = random_task(31), perturbed(untrained(name))
    own = {key: x for key, x in params.items() if key != "tables"}
    loss = ranking_loss(built(name), mr.Ranking())
    step = jax.jit(jax.value_and_grad(lambda p, task: loss({**p, "tables": params["tables"]}, task, KEY)[0]))
    value, gradient = step(own, task)
    padded, padded_gradient = step(own, with_garbage(task, 31))
    assert np.isfinite(value)
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    assert np.isfinite(largest)
    assert (largest > 0) == trains(name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), padded_gradient, gradient
    )


@pytest.mark.parametrize("name", SOME)
def test_items_that_all_users_share_have_the_scores_that_each_user_gives_them(name):
    strategy, params, known = built(name), perturbed(untrained(name)), random_task(31).known
    items = params["tables"]["items"]
    rows = np.tile(np.arange(31, dtype=np.int32), (len(known.items), 1))

    @jax.jit
    def both(params):
        adapted = adapt(strategy, params, items, known)
        each = score(strategy, params, items, adapted, known, rows)
        return score_shared(strategy, params, adapted, known, items), each

    shared, each = both(params)
    assert shared.shape == (5, 31)
    np.testing.assert_allclose(shared[:, 1:], each[:, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", POPULAR_AT_FIRST)
def test_before_training_a_user_without_a_history_gets_what_is_popular(name):
    """Of a catalogue whose items differ in popularity by far."""
    chosen = np.repeat(np.arange(1, 31), np.geomspace(1, 60, 30).astype(int))
    rng = np.random.default_rng(0)
    users = np.concatenate([rng.permutation(60)[: (chosen == i).sum()] for i in range(1, 31)])
    one = np.ones(len(chosen), np.float32)
    counted = Observed(users, chosen, one, one > 0, observed().features, {}, 60)
    strategy = built(name)
    params = {**untrained(name), "tables": jax.device_put(tables(strategy, counted))}
    known = Known.blank(1, 8, [], [])

    @jax.jit
    def scores(params):
        items = params["tables"]["items"]
        return score_shared(strategy, params, adapt(strategy, params, items, known), known, items)[0]

    found = np.asarray(scores(params))[1:]
    assert scipy.stats.spearmanr(found, params["tables"]["log_popularity"][1:]).statistic > 0.9


@pytest.mark.parametrize("name", [name for name in EVERY if name not in SOME])
def test_every_strategy_takes_the_ranking_loss(name):
    """By shapes alone, which no compiler needs to see; `grid` has the others' training, too."""
    own = jax.eval_shape(built(name).init, KEY)
    given = jax.eval_shape(lambda: tables(built("ridge"), observed()))

    def loss(own, given):
        return ranking_loss(built(name), mr.Ranking())({**own, "tables": given}, random_task(30), KEY)[0]

    gradient = jax.eval_shape(jax.grad(loss), own, given)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, own)


@pytest.mark.parametrize("name", [n if n in TRAINED else pytest.param(n, marks=pytest.mark.grid) for n in EVERY])
def test_every_strategy_learns_to_rank(name, tmp_path):
    """An epoch of training, its validation, lists of distinct items that the user has not seen, and a file."""
    options = {"epochs": 1, "progress": False, "buckets": 1, "model_options": model_options(name)}
    trained = mr.train(DATA, name, objective="ranking", **options)
    assert len(trained.history) == trains(name)
    for entry in trained.history:
        assert np.isfinite(entry["loss"])
        assert 0 <= entry["ndcg@100"] <= 1
    histories = [{}, {1: 5.0, 2: 1.0, 7: 4.0}, {i: 5.0 for i in range(1, 26)}]
    lists = trained.batch.recommend(histories, k=10)
    for history, got in zip(histories, lists, strict=True):
        items = [r.item for r in got]
        assert len(items) == len(set(items)) == min(10, 30 - len(history))
        assert not set(items) & set(history)
        assert set(items) <= set(range(1, 31))
        values = [r.score for r in got]
        assert np.isfinite(values).all()
        assert values == sorted(values, reverse=True)
    trained.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    assert loaded.batch.recommend(histories, k=10) == lists
