"""Synthetic ratings with known user preferences, for tests and for experiments without a download."""

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field, as_objects, encode_table
from metarec_jax.data.vocabulary import Vocabulary


def synthetic(
    users: int = 200,
    items: int = 100,
    ratings_per_user: tuple[int, int] = (15, 40),
    rank: int = 2,
    noise: float = 0.5,
    genres: int = 4,
    seed: int = 0,
) -> Dataset:
    """Draw a dataset from a linear latent-factor model.

        rating_ui = 3.5 + b_u + b_i + p_u . q_i + noise * eps,   eps ~ N(0, 1)
        b_u, b_i ~ N(0, 0.3^2),  p_u ~ N(0, I_rank / rank),  q_i = c_{genre(i)} + 0.3 * N(0, I_rank),
        c_g ~ N(0, I_rank)

    The best possible prediction is `truth = 3.5 + b_u + b_i + p_u . q_i`; its error has standard deviation `noise`.
    Ratings are neither rounded nor clipped. The number of ratings of a user is uniform in `ratings_per_user`; each user
    rates distinct random items at random times within one year.

    Args:
      users, items: number of users and of items.
      ratings_per_user: smallest and largest number of ratings of a user.
      rank: dimension of the latent factors.
      noise: standard deviation of the rating noise.
      genres: number of genres; the genre is the only item field (categorical).
      seed: random seed.

    Returns:
      A `Dataset` whose `truth` is `[users + 1, items + 1]`; row and column 0 (unknown) are NaN.

    Raises:
      ValueError: `ratings_per_user` is not an increasing range within [1, items].

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> data
      Dataset(synthetic: 853 interactions, 30 users, 40 items)
      >>> data.truth.shape, [field.name for field in data.item_fields]
      ((31, 41), ['genre'])
    """
    if not 1 <= ratings_per_user[0] <= ratings_per_user[1] <= items:
        raise ValueError(f"ratings_per_user must satisfy 1 <= low <= high <= items ({items}), got {ratings_per_user}")
    rng = np.random.default_rng(seed)
    user_bias, item_bias = 0.3 * rng.normal(size=users), 0.3 * rng.normal(size=items)
    taste = rng.normal(size=(users, rank)) / np.sqrt(rank)
    genre = rng.integers(genres, size=items)
    vector = rng.normal(size=(genres, rank))[genre] + 0.3 * rng.normal(size=(items, rank))
    truth = np.full((users + 1, items + 1), np.nan)
    truth[1:, 1:] = 3.5 + user_bias[:, None] + item_bias + taste @ vector.T

    counts = rng.integers(ratings_per_user[0], ratings_per_user[1] + 1, size=users)
    user = np.repeat(np.arange(1, users + 1), counts).astype(np.int32)
    item = np.concatenate([rng.choice(items, size=n, replace=False) + 1 for n in counts]).astype(np.int32)
    names = as_objects([f"genre {g}" for g in genre])
    field = Field.fit("genre", names)
    vocabulary = Vocabulary(np.arange(1, items + 1), "item_id")
    return Dataset(
        name="synthetic",
        user=user,
        item=item,
        rating=(truth[user, item] + noise * rng.normal(size=len(user))).astype(np.float32),
        timestamp=rng.integers(0, 365 * 86_400, size=len(user)),
        users=Vocabulary(np.arange(1, users + 1), "user_id"),
        items=vocabulary,
        item_fields=(field,),
        item_features=encode_table((field,), {"genre": names}, np.arange(1, items + 1), items + 1),
        titles=as_objects(["", *(f"item {i} ({g})" for i, g in enumerate(names, 1))]),
        report={"rows": len(user), "duplicates": 0},
        truth=truth,
    )
