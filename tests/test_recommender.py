"""The wrapper: recommendations for new users, evaluation, saving, loading, and bad input."""

import functools
import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import metarec_jax as mr
from metarec_jax.evaluation.baselines import BASELINES, OF_RATINGS
from metarec_jax.state import saving
from metarec_jax.tasks.batching import features

QUICK = {"objective": "click", "epochs": 2, "progress": False, "buckets": 1, "model_options": {"width": 4}}


@pytest.fixture(scope="module")
def recommender(synthetic):
    return mr.train(synthetic, seed=1, **QUICK)


@pytest.fixture
def saved(recommender, tmp_path):
    recommender.save(tmp_path / "model")
    return tmp_path / "model"


def everything(recommender, history):
    """Scores of all items by `adapt` and `predict` as training and evaluation call them."""
    data = recommender.catalogue
    rows = data.items.encode(list(history))[None]
    known = features(data_with_one_user(data), np.zeros(1, int), rows)
    known["order"] = np.arange(rows.shape[1], dtype=np.int32)[None]
    target = recommender.target.grade(np.array([list(history.values())], np.float32))
    adapted = recommender.strategy.adapt(
        recommender.params, mr.Examples(known, target, np.ones_like(target)), jax.random.key(0)
    )
    every = np.arange(len(data.items))[None]
    asked = features(data_with_one_user(data), np.zeros(1, int), every)
    asked["order"] = np.full(every.shape, rows.shape[1], np.int32)
    return np.array(recommender.strategy.predict(recommender.params, adapted, asked))[0]


def data_with_one_user(data):
    """The dataset with its unknown user in row 0 and no other."""
    return replace(data, user_features={f.name: f.unknown()[None] for f in data.user_fields})


def assert_best_of_all_scores(recommender, explained=True):
    """What is recommended, and what is explained, has the best of all scores, whatever is computed once."""
    history = {1: 5.0, 2: 1.0, 5: 4.0}
    scores = everything(recommender, history)
    scores[[0, *recommender.catalogue.items.encode([1, 2, 5])]] = -np.inf
    got = recommender.recommend(history, k=12)
    expected = recommender.target.decode(np.sort(scores)[::-1][:12])
    np.testing.assert_allclose([r.score for r in got], expected, rtol=2e-4, atol=1e-5)
    if explained:
        found = recommender.explain(history, got[0].item)
        np.testing.assert_allclose(found.score, got[0].score, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model", ["gru", *(pytest.param(n, marks=pytest.mark.grid) for n in ("deepfm", "mlp", "two_tower"))]
)
def test_recommendations_of_every_kind_of_network_have_the_best_scores(model, synthetic):
    assert_best_of_all_scores(mr.train(synthetic, "ridge", model, **QUICK | {"epochs": 1}))


def test_a_batch_gives_what_each_user_gets_alone(recommender):
    histories = [{1: 5, 2: 1}, {}, [(i, 3.0) for i in range(1, 21)]]
    together = recommender.batch.recommend(histories, k=4)
    for history, got in zip(histories, together, strict=True):
        alone = recommender.recommend(history, k=4)
        assert [r.item for r in got] == [r.item for r in alone]
        np.testing.assert_allclose([r.score for r in got], [r.score for r in alone], rtol=1e-4)


def test_seen_items_are_left_out_unless_asked_for(recommender):
    history = {i: 5.0 for i in range(1, 31)}
    assert not {r.item for r in recommender.recommend(history, k=60)} & set(history)
    assert len(recommender.recommend(history, k=60)) == 30
    assert len(recommender.recommend(history, k=60, exclude_seen=False)) == 60


def test_a_user_without_history_gets_a_ranking_that_follows_the_items_mean_rating(recommender, synthetic):
    ranking = [r.item for r in recommender.recommend({}, k=60)]
    assert sorted(ranking) == list(range(1, 61))
    clicks = (
        np.bincount(synthetic.item, synthetic.rating >= 4, len(synthetic.items))[1:] / np.bincount(synthetic.item)[1:]
    )
    position = np.empty(60)
    position[np.array(ranking) - 1] = np.arange(60)
    assert np.corrcoef(position, clicks)[0, 1] < -0.5


def test_unknown_items_are_allowed_and_repeated_ones_count_once_with_the_later_rating(recommender):
    known = recommender.recommend([(1, 5.0)], k=3)
    with pytest.warns(mr.UnknownItemWarning, match=r"1 of 2 items in the history are unknown"):
        assert len(recommender.recommend({10**12: 5.0, 1: 5.0}, k=3)) == 3
    assert recommender.recommend([(1, 1.0), (1, 5.0)], k=3) == known


@pytest.mark.parametrize(
    ("history", "k", "message"),
    [
        ({1: float("nan")}, 5, "finite number"),
        ({1: float("inf")}, 5, "finite number"),
        ({1: "five"}, 5, "finite number"),
        ({1: 500.0}, 5, "off the scale"),
        ({"1": 5.0}, 5, "strings"),
        ({1.5: 5.0}, 5, "must be an integer"),
        ([(2, 5.0), (1, 2, 3)], 5, "every entry must be"),
        (5, 5, "expected"),
        ("abc", 5, "expected"),
        ({1: 5.0}, 0, "k must be"),
        ({1: 5.0}, 2.5, "k must be"),
    ],
)
def test_bad_histories_get_a_clear_error(recommender, history, k, message):
    with pytest.raises(mr.DataError, match=message):
        recommender.recommend(history, k=k)


def test_user_attributes_reach_the_scores_and_unknown_ones_are_refused():
    rng = np.random.default_rng(0)
    group, users = np.array(["a", "b"] * 20), np.repeat(np.arange(40), 15)
    items = np.concatenate([rng.permutation(30)[:15] for _ in range(40)])
    data = mr.data.from_tables(
        {
            "user_id": users,
            "item_id": items,
            "rating": np.where(group[users] == "a", 5.0, rng.integers(1, 6, size=600)),
        },
        {"user_id": np.arange(40), "group": group, "age": np.arange(40.0)},
    )
    recommender = mr.train(data, **QUICK)
    everything = mr.tasks.features(recommender.catalogue, np.array([1, 2]), np.tile(np.arange(1, 31), (2, 1)))
    nothing = mr.Examples(jax.tree.map(lambda x: x[:, :8], everything), np.zeros((2, 8)), np.zeros((2, 8)))
    adapted = recommender.strategy.adapt(recommender.params, nothing, jax.random.key(0))
    scores = np.asarray(recommender.strategy.predict(recommender.params, adapted, everything))
    attributes = [{"group": "a", "age": 0.0}, {"group": "b", "age": 1.0}]
    for own, got in zip(scores, recommender.batch.recommend([{}, {}], k=30, users=attributes), strict=True):
        np.testing.assert_allclose([r.score for r in got], 1 / (1 + np.exp(-np.sort(own)[::-1])), rtol=1e-4)
    assert not np.allclose(scores[0], scores[1])
    with pytest.raises(mr.DataError, match="'colour' is unknown"):
        recommender.recommend({}, user={"colour": "red"})
    with pytest.raises(mr.DataError, match="1 users for 2 histories"):
        recommender.batch.recommend([{}, {}], users=[{"group": "a"}])


def test_string_ids_and_ids_beyond_32_bits_come_back_as_they_went_in():
    rng = np.random.default_rng(0)
    for ids in (np.array([f"sku-{i}" for i in range(25)]), 2**40 + np.arange(25)):
        users = np.repeat(np.arange(40), 15)
        items = np.concatenate([rng.permutation(ids)[:15] for _ in range(40)])
        data = mr.data.from_tables({"user_id": users, "item_id": items, "rating": rng.integers(1, 6, size=600)})
        got = mr.train(data, **QUICK).recommend({ids[0].item(): 5.0}, k=25)
        assert {r.item for r in got} == set(ids[1:].tolist())
        assert all(r.title is None for r in got)


FAMILIES = ("ridge", "alpaca", "melu", "nlba", "tanp", "mwuf", "in_context", "gated", "lora")  # families


CLICKS, RATINGS = (
    [n if n in some else pytest.param(n, marks=pytest.mark.grid) for n in FAMILIES]
    for some in (("ridge", "mwuf", "in_context"), ("ridge", "tanp"))
)


@pytest.mark.parametrize("strategy", CLICKS)  # they rank in strategies/test_ranked.py
def test_every_family_is_trained_on_clicks_evaluated_saved_and_loaded(strategy, synthetic, tmp_path):
    trains_evaluates_saves_and_loads(strategy, "click", synthetic, tmp_path)


@pytest.mark.parametrize("strategy", RATINGS)
def test_every_family_is_trained_on_ratings_evaluated_saved_and_loaded(strategy, synthetic, tmp_path):
    trains_evaluates_saves_and_loads(strategy, "rating", synthetic, tmp_path)


def trains_evaluates_saves_and_loads(strategy, target, synthetic, tmp_path):
    recommender = mr.train(synthetic, strategy, **QUICK | {"objective": target})
    results = recommender.evaluate(baselines=strategy == "ridge")
    if strategy == "ridge":
        assert set(results) == {strategy} | {b for b in BASELINES if target == "click" or not b.endswith(OF_RATINGS)}
    assert all(np.isfinite(v) for row in results.values() for v in row.values())
    recommender.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, recommender.params)
    assert loaded.evaluate(synthetic, baselines=False) == {strategy: results[strategy]}
    assert_best_of_all_scores(loaded, explained=strategy in ("alpaca", "nlba", "tanp", "mwuf"))


@pytest.mark.parametrize("given", [{"target": "rating"}, {"query": 5}])
def test_what_the_protocol_says_is_not_said_twice(given, synthetic):
    with pytest.raises(TypeError, match=rf"protocol=mr.ColdUsers\({next(iter(given))}"):
        mr.train(synthetic, **given)


def test_training_is_reproducible_and_learns(synthetic):
    one, two = (mr.train(synthetic, seed=5, **QUICK) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    longer = mr.train(synthetic, seed=5, epochs=40, progress=False, buckets=1, protocol=mr.ColdUsers(target="rating"))
    results = longer.evaluate()
    assert results["alpaca"]["rmse"] < results["two means"]["rmse"]
    # the best possible error is the noise, 0.5
    assert 0.4 < results["alpaca"]["rmse"] < 0.75


def test_one_compilation_for_each_bucket_shape_over_all_trainings(synthetic, monkeypatch):
    traces = []

    def counting(model, **options):
        inner = mr.ridge(model, **options)

        def loss(params, task, key):
            traces.append(task.support.mask.shape)  # runs when traced, not when executed
            return inner.loss(params, task, key)

        return inner._replace(loss=loss)

    monkeypatch.setitem(mr.STRATEGIES, "counting", counting)
    stars = replace(synthetic, rating=np.clip(np.round(synthetic.rating), 2, 4))
    options = {"objective": "click", "epochs": 3, "progress": False, "buckets": (16, 24, 40), "batch_size": 16}
    for seed in range(3):
        mr.train(stars, "counting", "linear", seed=seed, **options)
    assert len(traces) == len(set(traces)) <= 3


@pytest.mark.filterwarnings("ignore::metarec_jax.core.fastweights.PlainFormWarning")  # what inner Adam costs
def test_strategies_and_models_of_the_callers_own_need_to_be_named_again_when_loading(synthetic, tmp_path):
    strategy = functools.partial(mr.maml, inner=optax.adam(0.05, eps_root=1e-8), steps=2)
    recommender = mr.train(synthetic, strategy, **QUICK)
    recommender.save(tmp_path / "model")
    with pytest.raises(mr.ModelFileError, match="strategy="):
        mr.load(tmp_path / "model")
    loaded = mr.load(tmp_path / "model", strategy=strategy)
    assert loaded.recommend({1: 5.0}) == recommender.recommend({1: 5.0})
    with pytest.raises(mr.ModelFileError, match="must be those of the training"):
        mr.load(tmp_path / "model", strategy=mr.ridge)


def test_trained_members_read_the_grades_by_their_own_labels(synthetic, recommender):
    member = mr.given(recommender.strategy, recommender.params)
    both = mr.train(synthetic, lambda model, loss: mr.ensemble([member, member]), seed=1, **QUICK)
    np.testing.assert_allclose(
        [r.score for r in both.recommend({1: 5.0, 2: 1.0})],
        [r.score for r in recommender.recommend({1: 5.0, 2: 1.0})],
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match="have labels of their own, and others not"):
        mr.train(synthetic, lambda model, loss: mr.ensemble([member, mr.ridge(model, loss=loss)]), **QUICK)


def test_a_function_has_the_network_of_its_name(synthetic):
    made = functools.partial(functools.partial(mr.ridge, penalty=2.0), steps=2)
    for strategy, network in ((made, "linear"), (lambda model, loss: mr.anil(model, loss=loss), "mlp")):
        assert mr.train(synthetic, strategy, **QUICK).trained.recipe["model"]["name"] == network


def test_a_half_life_alone_is_kept_by_load(saved):
    assert mr.load(saved, half_life=5.0).half_life == 5.0


def test_ratings_that_are_all_clicks_or_none_cannot_train_clicks(synthetic):
    for rating, said in ((1.0, "none is a click"), (5.0, "each is a click")):
        with pytest.raises(mr.DataError, match=said):
            mr.train(replace(synthetic, rating=np.full_like(synthetic.rating, rating)), **QUICK)


def test_saving_replaces_a_model_and_never_anything_else(recommender, saved, tmp_path):
    recommender.save(saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("do not touch")
    with pytest.raises(mr.ModelFileError, match="is no model"):
        recommender.save(other)
    assert (other / "chapter.txt").read_text() == "do not touch"


@pytest.mark.parametrize("fails", ["a part", "the last step"])
def test_a_failed_save_leaves_the_model_that_was_there_and_nothing_else(recommender, tmp_path, monkeypatch, fails):
    recommender.save(tmp_path / "model")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*args):
        raise OSError("no space left on device")

    def last(source, to, replace=os.replace):
        return full() if str(source).endswith("fresh") else replace(source, to)

    if fails == "the last step":
        monkeypatch.setattr(os, "replace", last)
    parts = {"rater": full} if fails == "a part" else None
    r = recommender
    with pytest.raises(OSError, match="no space left"):
        saving.write(tmp_path / "model", {}, r.catalogue, r.params, r.stock, parts)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_saved_when_labels_were_values_loads_as_it_was(recommender, saved):
    history, arrays = {1: 5.0, 2: 1.0}, load_file(saved / "arrays.safetensors")
    start = recommender.target.encode(np.array(recommender.target.levels))
    arrays["params['labels']"] = start + arrays.pop("params['label_shifts']")
    save_file(arrays, saved / "arrays.safetensors")
    config = json.loads((saved / "model.json").read_text())
    config["sha256"]["arrays.safetensors"] = sha256((saved / "arrays.safetensors").read_bytes()).hexdigest()
    (saved / "model.json").write_text(json.dumps(config))
    loaded = mr.load(saved).recommend(history)
    assert [r.item for r in loaded] == [r.item for r in recommender.recommend(history)]
    np.testing.assert_allclose([r.score for r in loaded], [r.score for r in recommender.recommend(history)], rtol=1e-5)


def test_labels_that_no_gradient_reaches_stay_what_a_click_says(synthetic):
    recommender = mr.train(synthetic, "fomaml", strategy_options={"steps": 1}, **QUICK)
    assert not np.asarray(recommender.params["label_shifts"]).any()


@pytest.mark.parametrize("file", ["model.json", "catalogue.json", "arrays.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_model_is_refused_with_the_files_name(saved, file, damage):
    path = saved / file
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[0] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(mr.ModelFileError, match=file):
        mr.load(saved)


def test_foreign_and_newer_models_are_refused(saved, tmp_path):
    with pytest.raises(mr.ModelFileError, match="missing"):
        mr.load(tmp_path / "nothing")
    config = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(mr.ModelFileError, match="format 99"):
        mr.load(saved)
    (saved / "model.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(mr.ModelFileError, match="not a model of metarec_jax"):
        mr.load(saved)
    shutil.rmtree(saved)


def test_a_loaded_model_is_evaluated_on_its_own_dataset_only(saved, synthetic):
    loaded = mr.load(saved)
    with pytest.raises(mr.DataError, match="holds no interactions"):
        loaded.evaluate()
    with pytest.raises(mr.DataError, match="does not have the items"):
        loaded.evaluate(mr.data.synthetic(users=60, items=61))
    assert loaded.evaluate(synthetic, support=3)
    for wrong in ("3", -1, 1.5, True):
        with pytest.raises(mr.OptionError, match="support: expected a number of interactions of 0 or more, or None"):
            loaded.evaluate(synthetic, support=wrong)


def test_unknown_names_and_impossible_data_are_refused(synthetic):
    with pytest.raises(ValueError, match="'mammal' is unknown; choose from alpaca, prototypes"):
        mr.train(synthetic, "mammal")
    with pytest.raises(ValueError, match="model 'vgg' is unknown"):
        mr.train(synthetic, model="vgg")
    with pytest.raises(mr.DataError, match="widen the window"):
        mr.train(mr.data.synthetic(users=20, items=8, ratings_per_user=(5, 8)), objective="click")
    with pytest.raises(FloatingPointError, match="lower the outer learning rate"):
        mr.train(synthetic, optimizer=optax.sgd(1e30), **QUICK)
