"""The taste test: lists for users who like one genre hold that genre, and differ from each other."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

import metarec_jax as mr
from metarec_jax.collaborative import factorise

GENRES = ("Horror", "Children's", "Western", "Sci-Fi", "Romance")
K = 10


def movielens():
    """MovieLens-100K and, by genre, which items have it; skipped where it is not on this machine."""
    try:
        data = mr.data.load("ml-100k", download=False)
    except mr.DataError:
        pytest.skip("MovieLens-100K is not on this machine")
    field = next(f for f in data.item_fields if f.name == "genres")
    codes, table = field.vocabulary.encode(list(GENRES)), data.item_features["genres"]
    return data, {name: (table == code).any(1) for name, code in zip(GENRES, codes, strict=True)}


def known_tastes():
    """Users who rate two items of their genre 5 for each other one, and what they do not like 2."""
    rng, genres, items, users = np.random.default_rng(0), 5, 200, 400
    genre = np.arange(items) % genres
    rows = []
    for user in range(users):
        chance = np.where(genre == user % genres, 4.0, 1.0) / (1 + np.arange(items) / 40)
        for item in rng.choice(items, 25, replace=False, p=chance / chance.sum()):
            liked = rng.random() < (0.9 if genre[item] == user % genres else 0.4)
            rows.append((user, item, 5.0 if liked else 2.0))
    user, item, rating = map(np.array, zip(*rows, strict=True))
    table = {"item_id": np.arange(items), "genre": [f"genre {g}" for g in genre]}
    data = mr.data.from_tables({"user_id": user, "item_id": item, "rating": rating}, items=table)
    return data, {f"genre {g}": np.append(False, genre == g) for g in range(genres)}


@pytest.fixture(scope="module", params=[known_tastes, movielens])
def tastes(request):
    """Lists `{genre: rows}` of the default learner and of EASE, and which items are of each genre."""
    data, of_genre = request.param()
    recommender = mr.train(data, seed=0, ratings=None, progress=False)
    count, several = np.bincount(data.item, minlength=len(data.items)), sum(of_genre.values())
    profiles = {
        name: [r for r in np.argsort(-count, kind="stable") if has[r] and several[r] == 1][:5]
        for name, has in of_genre.items()
    }
    train = recommender.split(data, "").train
    liked = train.index[data.rating[train.index] >= 4]
    users = np.unique(data.user[liked], return_inverse=True)[1]
    matrix = sp.csr_matrix((np.ones(len(liked), np.float32), (users, data.item[liked])))
    weights = factorise.ease(sp.csr_matrix(matrix, shape=(matrix.shape[0], len(data.items))))
    ours, ease = {}, {}
    for name, rows in profiles.items():
        history = {item: 5.0 for item in data.items.decode(rows).tolist()}
        ours[name] = data.items.encode([x.item for x in recommender.recommend(history, k=K)]).tolist()
        scores = weights[rows].sum(0)
        scores[[0, *rows]] = -np.inf
        ease[name] = np.argsort(-scores, kind="stable")[:K].tolist()
    return ours, ease, of_genre


def test_lists_of_different_tastes_overlap_less_than_half(tastes):
    ours, _, _ = tastes
    overlaps = [len(set(a) & set(b)) / K for a, b in itertools.combinations(ours.values(), 2)]
    assert np.mean(overlaps) < 0.3
    assert max(overlaps) <= 0.5


def test_the_share_on_genre_is_at_least_that_of_ease(tastes):
    ours, ease, of_genre = tastes

    def share(lists):
        return np.mean([of_genre[name][rows].mean() for name, rows in lists.items()])

    assert share(ours) >= share(ease)
