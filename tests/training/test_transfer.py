"""Starting from a recommender that was trained on other data: which row lands where, and that it helps."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import Vocabulary
from metarec_jax.training.transfer import carry_over

PROTOCOL = mr.ColdUsers(target="rating", minimum=12)
QUICK = {"progress": False, "model_options": {"width": 4}, "model": "linear"}


def renamed(data, names):
    """The dataset with these item ids (for rows 1, 2, ...), which sort into other rows."""
    order = np.argsort(names)
    row = np.zeros(len(names) + 1, np.int32)
    row[order + 1] = np.arange(1, len(names) + 1)
    back = np.append(0, order + 1)
    features = {name: table[back] for name, table in data.item_features.items()}
    vocabulary = Vocabulary(np.asarray(names)[order], "item_id")
    return replace(data, item=row[data.item], items=vocabulary, item_features=features, titles=data.titles[back])


@pytest.fixture(scope="module")
def worlds():
    """One world of 80 items, seen by 240 users in items 1 to 60 and by 60 other users in items 21 to 80."""
    data = mr.data.synthetic(users=300, items=80, noise=0.3, seed=4)
    names = np.random.default_rng(0).permutation(80) + 1000

    def part(users, items):
        keep = (data.user >= users[0]) & (data.user < users[1]) & (data.item > items[0]) & (data.item <= items[1])
        first, last = items
        sub = replace(
            data,
            **{name: getattr(data, name)[keep] for name in ("user", "rating", "timestamp")},
            item=data.item[keep] - first,
            items=Vocabulary(np.arange(1, last - first + 1), "item_id"),
            item_features={n: np.concatenate([t[:1], t[first + 1 : last + 1]]) for n, t in data.item_features.items()},
            titles=np.concatenate([data.titles[:1], data.titles[first + 1 : last + 1]]),
        )
        return renamed(sub, names[first:last])

    return part((1, 241), (0, 60)), part((241, 301), (20, 80))


@pytest.fixture(scope="module")
def source(worlds):
    return mr.train(worlds[0], "ridge", epochs=40, protocol=PROTOCOL, **QUICK)


@pytest.fixture(scope="module")
def train(worlds):
    """Trains on the second dataset, always one strategy value: everything compiles once."""
    built = []

    def once(model, loss):
        if not built:
            built.append(mr.ridge(model, loss=loss))
        return built[0]

    return partial(mr.train, worlds[1], once, protocol=PROTOCOL, **QUICK)


def test_rows_land_where_their_raw_values_are(worlds, source, train):
    items, known = worlds[1].items, source.catalogue.items
    moved, fresh = train(epochs=0, start=source), train(epochs=0)
    theirs, ours, new = (
        np.asarray(r.params["model"]["embedding"]["item_id"]["embedding"]) for r in (source, moved, fresh)
    )
    shared = np.intersect1d(known.ids, items.ids)
    assert len(shared) == 40
    assert not np.array_equal(known.encode(shared), items.encode(shared))
    np.testing.assert_array_equal(ours[items.encode(shared)], theirs[known.encode(shared)])
    np.testing.assert_array_equal(ours[0], theirs[0])
    rest = items.encode(np.setdiff1d(items.ids, known.ids))
    np.testing.assert_array_equal(ours[rest], new[rest])
    for params in ("log_penalty", "model"):
        one, two = (r.params[params].get("head", r.params[params]) for r in (source, moved))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_transferred_model_is_better_than_one_from_scratch(source, train):
    for epochs in (0, 1):
        moved, fresh = (train(epochs=epochs, start=s).evaluate(baselines=False)["strategy"] for s in (source, None))
        assert moved["rmse"] < 0.9 * fresh["rmse"]


def test_a_loaded_model_can_be_started_from_and_is_left_as_it_was(source, train, tmp_path):
    source.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    one, two = (train(epochs=1, start=s) for s in (source, loaded))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    jax.tree.map(np.testing.assert_array_equal, source.params, loaded.params)


def field(values, kind="categorical"):
    vocabulary = Vocabulary.of(values)
    return Field("", kind, len(vocabulary), 1, vocabulary)


def test_fields_that_mean_something_else_or_are_new_stay_fresh():
    known = {"item_id": field([1, 2, 3]), "item/genre": field(["a", "b"], "multi"), "user/age": field(["x"])}
    fields = {"item_id": field([2, 3, 4, 5]), "item/genre": field(["b", "c"], "multi"), "item/maker": field(["m"])}

    def params(fields, value, inputs):
        tables = {
            name: {"embedding": np.full((f.size, 2), value) + np.arange(f.size)[:, None]} for name, f in fields.items()
        }
        return {"embedding": tables, "layer": np.full((inputs, 2), value), "head": np.full(2, value)}

    old, new = params(known, 100.0, 5), params(fields, -100.0, 6)
    got = carry_over(old, new, known, fields)
    tables = {name: np.asarray(t["embedding"])[:, 0] for name, t in got["embedding"].items()}
    np.testing.assert_array_equal(tables["item_id"], [100, 102, 103, -97, -96])
    np.testing.assert_array_equal(tables["item/genre"], [100, 102, -98])
    np.testing.assert_array_equal(tables["item/maker"], [-100, -99])
    np.testing.assert_array_equal(got["layer"], new["layer"])  # it reads other fields
    np.testing.assert_array_equal(got["head"], old["head"])
    got = carry_over(old, new, known, fields, shared=("item/genre",))
    np.testing.assert_array_equal(np.asarray(got["embedding"]["item_id"]["embedding"])[:, 0], [100, -99, -98, -97, -96])
    strings = fields | {"item_id": field(["2", "3", "4", "5"])}  # no integer is a string
    got = carry_over(old, new, known, strings)
    np.testing.assert_array_equal(np.asarray(got["embedding"]["item_id"]["embedding"])[:, 0], [100, -99, -98, -97, -96])
    with pytest.raises(ValueError, match="layers read them in order"):
        carry_over(old, new, known, dict(reversed(fields.items())))
    members = jax.tree.map(lambda a: np.stack([a, a]), (old, new))  # an ensemble's axis comes before the rows
    got = carry_over(*members, known, fields)
    np.testing.assert_array_equal(got["embedding"]["item_id"]["embedding"][1, :, 0], tables["item_id"])


@pytest.mark.parametrize("name", ["ials", "ease", "item_knn", "stack"])
def test_item_weights_of_closed_form_rankers_land_where_their_raw_ids_are(worlds, name, tmp_path):
    quick = {"epochs": 0, "progress": False, "buckets": 1, "ratings": None}
    first = mr.train(worlds[0], name, **quick)

    def weights(params):
        return params["members"][0] if name == "stack" else params

    weights(first.params)["weight"] = np.arange(61) + 0.5
    weights(first.params)["dislike"] = np.float32(7)
    first.save(tmp_path / "model")
    known, items = worlds[0].items, worlds[1].items
    both = np.intersect1d(known.ids, items.ids)
    for start in (first, mr.load(tmp_path / "model")):
        own = weights(mr.train(worlds[1], name, start=start, **quick).params)
        np.testing.assert_array_equal(own["weight"][items.encode(both)], known.encode(both) + 0.5)
        assert own["weight"][0] == 0.5
        assert own["dislike"] == 7
        assert not own["weight"][items.encode(np.setdiff1d(items.ids, known.ids))].any()
    apart = weights(mr.train(worlds[1], name, start=first, shared=["item/genre"], **quick).params)
    assert np.flatnonzero(apart["weight"]).tolist() == [0]


def test_stacks_of_other_members_are_refused_with_what_to_do(worlds):
    quick = {"epochs": 0, "progress": False, "buckets": 1, "ratings": None}
    first = mr.train(worlds[0], "stack", strategy_options={"members": ["ease", "content"]}, **quick)
    with pytest.raises(ValueError, match=r"start does not fit at .*missing in start.*start.trained.recipe names them"):
        mr.train(worlds[1], "stack", start=first, **quick)
    options = first.trained.recipe["strategy"]["options"]
    assert mr.train(worlds[1], "stack", start=first, strategy_options=options, **quick).recommend([1001], 3)


def test_what_does_not_fit_is_refused(worlds, source, train):
    def other(*args, model_options=QUICK["model_options"], **options):
        given = {"protocol": PROTOCOL, "model_options": model_options, "progress": False, "epochs": 0} | options
        return mr.train(worlds[1], *args, start=source, **given)

    with pytest.raises(
        ValueError,
        match=r"does not fit at .*embedding.*shape .*, 4. in start, .* .*, 8. in this training; strategy and model",
    ):
        other("ridge", model_options={"width": 8})
    with pytest.raises(ValueError, match=r"does not fit at .*layers"):
        other("ridge", "mlp")
    with pytest.raises(ValueError, match=r"does not fit at .*log_"):
        other("pretrain", "linear")
    with pytest.raises(ValueError, match="start predicts a rating, this training a click"):
        other(protocol=replace(PROTOCOL, target="click"))
    with pytest.raises(ValueError, match=r"shared: \['item/colour'\] not in both datasets"):
        train(epochs=0, start=source, shared=("item/colour",))


def test_what_is_no_recommender_and_shared_without_a_start_are_refused(synthetic):
    with pytest.raises(TypeError, match=r"start must be a Recommender, got str; a saved one: mr.load\(path\)"):
        mr.train(synthetic, objective="click", start="my-model", **QUICK)
    with pytest.raises(ValueError, match="give both or none"):
        mr.train(synthetic, objective="click", shared=["item_id"], **QUICK)
