"""Factorise: the plain models, fitted in closed form on the host: iALS, EASE, item-kNN of implicit feedback, ALS of
ratings.

Those of implicit feedback take a sparse matrix `[users, items]` of confidences, 0 where there is no interaction.
Strategies start from them, and they are the baselines of every table.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from metarec_jax.errors import DataError

CELLS = 1 << 22  # numbers of the systems that are solved together


class Factors(NamedTuple):
    """User vectors `[users, rank]` and item vectors `[items, rank]`."""

    users: np.ndarray
    items: np.ndarray


class Means(NamedTuple):
    """Mean of all ratings, and the shrunk mean `[items]` of each item's residuals after it."""

    mean: float
    items: np.ndarray


class RatingFactors(NamedTuple):
    """Mean of all ratings, item biases `[items]` and item vectors `[items, rank]`."""

    mean: float
    bias: np.ndarray
    items: np.ndarray


def log_popularity(matrix: sp.csr_matrix, pseudo: float = 1.0) -> np.ndarray:
    """`[items]` float32 log share of the interactions, with a pseudo-count, so that it is finite for every item."""
    count = np.asarray(matrix.sum(0)).ravel() + pseudo
    return (np.log(count) - np.log(count.sum())).astype(np.float32)


def ials(
    matrix: sp.csr_matrix,
    rank: int = 64,
    *,
    unobserved: float | None = None,
    penalty: float | None = None,
    sweeps: int = 8,
    seed: int = 0,
) -> Factors:
    """Alternating least squares of implicit feedback, with a penalty in proportion to how much a row says.

        sum_{observed} c_ui (1 - x_u . y_i)^2 + a sum_{all} (x_u . y_i)^2
            + l sum_u (c_u + a items) |x_u|^2 + l sum_i (c_i + a users) |y_i|^2

    Args:
      matrix: confidences c; c_u and c_i are the sums of its rows and columns.
      rank: width of the vectors.
      unobserved: a (default: that of `scales`).
      penalty: l (default: that of `scales`).
      sweeps: each solves all users and all items once.
      seed: of the first item vectors.

    References:
      Hu, Koren and Volinsky, Collaborative Filtering for Implicit Feedback Datasets, ICDM 2008.
      Rendle et al., Revisiting the Performance of iALS on Item Recommendation Benchmarks, RecSys 2022, equations 3 to 5
      (with nu = 1).
    """
    usual = scales(matrix)
    unobserved, penalty = (u if given is None else given for given, u in zip((unobserved, penalty), usual, strict=True))
    by_user = matrix.tocsr().astype(np.float32)
    by_item = by_user.T.tocsr()
    rng = np.random.default_rng(seed)
    items = rng.normal(0, 0.1 / np.sqrt(rank), (by_user.shape[1], rank)).astype(np.float32)
    with one_thread():
        for _ in range(sweeps):
            users = fold_in(by_user, items, unobserved, penalty)
            items = fold_in(by_item, users, unobserved, penalty)
        return Factors(fold_in(by_user, items, unobserved, penalty), items)


def scales(matrix: sp.csr_matrix) -> tuple[float, float]:
    """`unobserved` a and `penalty` l of `ials` that suit these confidences.

    What is not observed has 8.6 times the weight of what is, as with a = 0.3 on MovieLens-100K. a l items, the penalty
    of a user who has done nothing, is a fifth of what users say on average, and 5 at most.
    """
    users, items = matrix.shape
    mean = max(float(matrix.sum()), 1.0) / users
    unobserved = 8.6 * mean / items
    return unobserved, min(5.0, mean / 5) / (unobserved * items)


def one_thread() -> threadpool_limits:
    """Keeps BLAS to one thread: several cost more than they gain on many small systems."""
    return threadpool_limits(1, "blas")


def fold_in(rows: sp.csr_matrix, vectors: np.ndarray, unobserved: float, penalty: float) -> np.ndarray:
    """`[rows, rank]` vectors of the rows of a sparse matrix, given the vectors of its columns; see `ials`.

    In the basis where V'V is diagonal, so that a row with fewer entries than `rank` is a system of so many equations:
    with D = a V'V + l (...) and Y = C^1/2 V, (D + Y'Y)^-1 Y' = D^-1 Y' (I + Y D^-1 Y')^-1.
    """
    rank, weight, lengths = vectors.shape[1], np.asarray(rows.sum(1)).ravel(), np.diff(rows.indptr)
    if not rows.nnz:
        return np.zeros((rows.shape[0], rank), np.float32)
    spectrum, basis = np.linalg.eigh(unobserved * (vectors.T @ vectors))
    rotated = vectors @ basis
    ridge = penalty * (weight + unobserved * rows.shape[1]) + 1e-6
    found = np.empty((rows.shape[0], rank), np.float32)
    by_length, start = np.argsort(lengths, kind="stable"), 0
    while start < len(by_length):  # rows of about the same length are solved together, in bounded memory
        longest = max(int(lengths[by_length[min(start + 63, len(by_length) - 1)]]), 1)
        part = by_length[start : start + max(64, CELLS // (rank * max(longest, rank)))]
        part = part[lengths[part] <= longest]
        start += len(part)
        place = np.arange(longest)
        mask = place < lengths[part, None]
        at = np.where(mask, rows.indptr[part, None] + place, 0)
        root = np.sqrt(np.where(mask, rows.data[at], 0))
        y = root[..., None] * rotated[rows.indices[at]]
        diagonal = np.maximum(spectrum, 0) + ridge[part, None]
        if longest < rank:
            z = y / diagonal[:, None]
            inner = z @ y.swapaxes(1, 2) + np.eye(longest, dtype=y.dtype)
            solved = z.swapaxes(1, 2) @ np.linalg.solve(inner, root[..., None])
        else:
            inner = y.swapaxes(1, 2) @ y
            inner[:, range(rank), range(rank)] += diagonal
            solved = np.linalg.solve(inner, y.swapaxes(1, 2) @ root[..., None])
        found[part] = solved[..., 0]
    return found @ basis.T


def ease(matrix: sp.csr_matrix, penalty: float = 400.0) -> np.ndarray:
    """`[items, items]` float32 weights B of the linear item-item model, whose diagonal is 0.

        B = argmin |X - X B|^2 + l |B|^2,  diag(B) = 0;   B = I - P diag(P)^-1,   P = (X'X + l I)^-1

    Args:
      matrix: X.
      penalty: l.

    References:
      Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019, equation 8.
    """
    gram = (matrix.T @ matrix).toarray().astype(np.float32)
    diagonal = np.diag_indices_from(gram)
    gram[diagonal] += penalty
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    weights[diagonal] = 0
    return weights


def low_rank_ease(matrix: sp.csr_matrix, rank: int, penalty: float = 400.0, seed: int = 0) -> Factors:
    """EASE with X'X replaced by its largest `rank` components: left and right vectors of B, `[items, rank]` each.

        X'X ~ V S^2 V',   D = S^2 / (S^2 + l),   B_ij = (V D)_i . V_j / (1 - V_j D V_j')   for i != j

    Exact where `rank` is that of X. The diagonal is not 0: callers never score an item from itself.

    Args:
      matrix: X.
      rank: components kept.
      penalty: l.
      seed: of the first vector of the iteration.
    """
    rank = min(rank, min(matrix.shape) - 1)
    start = np.random.default_rng(seed).random(min(matrix.shape))
    _, values, right = sp.linalg.svds(matrix.astype(np.float64), rank, v0=start)
    shrink = values**2 / (values**2 + penalty)
    left = right.T * shrink
    rest = np.maximum(1 - (left * right.T).sum(1), 1e-6)
    return Factors(left.astype(np.float32), (right.T / rest[:, None]).astype(np.float32))


def item_knn(matrix: sp.csr_matrix, neighbours: int = 100, shrink: float = 10.0) -> sp.csr_matrix:
    """`[items, items]` sparse similarities: the shrunk cosine of items' columns, of each item its nearest ones.

        s_ij = x_i . x_j / (|x_i| |x_j| + shrink)

    Args:
      matrix: X.
      neighbours: kept for each item.
      shrink: added to the denominator.

    References:
      Sarwar et al., Item-based Collaborative Filtering Recommendation Algorithms, WWW 2001.
      Ferrari Dacrema et al., Are We Really Making Much Progress?, RecSys 2019, section 2.2 (shrinkage).
    """
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(0)).ravel())
    product = (matrix.T @ matrix).tocoo()
    keep = product.row != product.col
    row, column, value = product.row[keep], product.col[keep], product.data[keep]
    value = value / (norm[row] * norm[column] + shrink)
    order = np.lexsort((-value, column))
    place = np.arange(len(order)) - np.searchsorted(column[order], column[order])
    order = order[place < neighbours]
    return sp.csr_matrix((value[order], (row[order], column[order])), shape=product.shape)


def dense_bytes(items: int, copies: int = 1) -> int:
    """Bytes of so many `[items, items]` float32 matrices."""
    return 4 * items * items * copies


def check_memory(what: str, needed: int, limit: int, instead: str) -> None:
    """Raise a `DataError` before anything is allocated where `needed` bytes exceed `limit`."""
    if needed > limit:
        raise DataError(f"{what} needs {needed / 1e9:,.1f} GB, more than the limit of {limit / 1e9:,.1f} GB; {instead}")


def means(item: np.ndarray, rating: np.ndarray, items: int, shrink: float = 5.0) -> Means:
    """Mean of ratings, and of each item the shrunk mean of its residuals.

        b_i = sum_u (r_ui - mean) / (n_i + shrink)

    Args:
      item, rating: `[interactions]` rows and ratings.
      items: how many rows there are.
      shrink: ratings at the mean that are added to each item.

    References:
      Koren, Factorization Meets the Neighborhood, KDD 2008, equation 1.
    """
    mean = float(rating.mean())
    total = np.bincount(item, rating - mean, items)
    return Means(mean, total / (np.bincount(item, minlength=items) + shrink))


def explicit_als(
    user: np.ndarray,
    item: np.ndarray,
    rating: np.ndarray,
    items: int,
    rank: int = 8,
    *,
    penalty: float = 5.0,
    shrink: float = 5.0,
    sweeps: int = 15,
    seed: int = 0,
) -> RatingFactors:
    """Alternating least squares of ratings: of what is left after the shrunk means of items and of users.

        sum_{ui} (r_ui - mean - b_i - b_u - x_u . y_i)^2 + l sum_u |x_u|^2 + l sum_i |y_i|^2

    Args:
      user, item, rating: `[interactions]` user keys of any kind, item rows and ratings.
      items: how many item rows there are.
      rank: width of the vectors.
      penalty: l.
      shrink: ratings at the mean that are added to each item and each user; see `means`.
      sweeps: each solves all users and all items once.
      seed: of the first item vectors.

    References:
      Zhou et al., Large-Scale Parallel Collaborative Filtering for the Netflix Prize, AAIM 2008.
    """
    plain = means(item, rating, items, shrink)
    owner = np.unique(user, return_inverse=True)[1]
    per_user = np.bincount(owner, rating - plain.mean - plain.items[item])
    per_user = per_user / (np.bincount(owner) + shrink)
    residual = rating - plain.mean - plain.items[item] - per_user[owner]
    vectors = np.random.default_rng(seed).normal(0, 0.1, (items, rank))
    for _ in range(sweeps):
        users = least_squares(owner, vectors[item], residual, len(per_user), penalty)
        vectors = least_squares(item, users[owner], residual, items, penalty)
    return RatingFactors(plain.mean, plain.items, vectors)


def least_squares(group: np.ndarray, x: np.ndarray, y: np.ndarray, groups: int, penalty: float) -> np.ndarray:
    """`[groups, rank]` ridge solutions of `y` `[n]` on `x` `[n, rank]` within each group `[n]`."""
    rank = x.shape[1]
    x = np.asfortranarray(x)
    moment = np.stack([np.bincount(group, x[:, a] * y, groups) for a in range(rank)], axis=1)
    return np.linalg.solve(gram_of(group, x, groups) + penalty * np.eye(rank), moment[..., None])[..., 0]


def gram_of(group: np.ndarray, x: np.ndarray, groups: int) -> np.ndarray:
    """`[groups, rank, rank]` sums of x x' of the rows `[n, rank]` of each group `[n]`."""
    rank = x.shape[1]
    x = np.asfortranarray(x)
    gram = np.empty((groups, rank, rank))
    for a in range(rank):
        for b in range(a + 1):
            gram[:, a, b] = gram[:, b, a] = np.bincount(group, x[:, a] * x[:, b], groups)
    return gram
