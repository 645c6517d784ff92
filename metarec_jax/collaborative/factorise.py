"""Linear models fitted in closed form on the host: iALS, EASE and item-kNN for implicit feedback, ALS for ratings.

Implicit feedback is a sparse matrix `[users, items]` of confidences, 0 without an interaction. Strategies are
initialised from these models, and comparison tables use them as baselines.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from metarec_jax.errors import DataError

SYSTEMS = 1 << 20  # maximum matrix elements of the linear systems solved at once, so that they stay in the cache
CELLS = 1 << 22  # maximum elements of a tile computed at once


class Factors(NamedTuple):
    """User vectors `[users, rank]` and item vectors `[items, rank]`."""

    users: np.ndarray
    items: np.ndarray


class Means(NamedTuple):
    """Mean of all ratings, and item biases `[items]`: shrunk means of the residuals."""

    mean: float
    items: np.ndarray


class RatingFactors(NamedTuple):
    """Mean of all ratings, item biases `[items]` and item vectors `[items, rank]`."""

    mean: float
    bias: np.ndarray
    items: np.ndarray


def log_popularity(matrix: sp.csr_matrix, pseudo: float = 1.0) -> np.ndarray:
    """Compute the log share of interactions of each item, `[items]` float32.

    Args:
      matrix: confidences `[users, items]`.
      pseudo: pseudo-count added to each item, so that all logs are finite.
    """
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
    """Fit implicit-feedback matrix factorisation by alternating least squares (iALS).

    The penalty of a row is proportional to its total weight:

        sum_{observed} c_ui (1 - x_u . y_i)^2 + a sum_{all} (x_u . y_i)^2
            + l sum_u (c_u + a items) |x_u|^2 + l sum_i (c_i + a users) |y_i|^2

    Args:
      matrix: confidences c `[users, items]`; c_u and c_i are its row and column sums.
      rank: width of the vectors.
      unobserved: a (default: from `scales`).
      penalty: l (default: from `scales`).
      sweeps: number of sweeps; each solves all users and all items once.
      seed: of the initial item vectors.

    References:
      Hu, Koren and Volinsky, Collaborative Filtering for Implicit Feedback Datasets, ICDM 2008.
      Rendle et al., Revisiting the Performance of iALS on Item Recommendation Benchmarks, RecSys 2022, equations 3 to 5
      (with nu = 1).
    """
    defaults = scales(matrix)
    unobserved, penalty = (d if x is None else x for x, d in zip((unobserved, penalty), defaults, strict=True))
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
    """Choose `unobserved` a and `penalty` l of `ials` for these confidences.

    a gives all user-item pairs together 8.6 times the weight of the observed ones, as a = 0.3 does on MovieLens-100K.
    l sets `a l items`, the penalty of a user without interactions, to a fifth of the mean row sum, and to 5 at most.
    """
    users, items = matrix.shape
    mean = max(float(matrix.sum()), 1.0) / users
    unobserved = 8.6 * mean / items
    return unobserved, min(5.0, mean / 5) / (unobserved * items)


def one_thread() -> threadpool_limits:
    """Limit BLAS to one thread: more threads slow down many small systems."""
    return threadpool_limits(1, "blas")


def fold_in(rows: sp.csr_matrix, vectors: np.ndarray, unobserved: float, penalty: float) -> np.ndarray:
    """Compute the vectors of a sparse matrix's rows from the vectors of its columns; see `ials`.

    In the basis where V'V is diagonal, a row with n < `rank` entries needs only an n x n system: with
    D = a V'V + l (...) and Y = C^1/2 V, (D + Y'Y)^-1 Y' = D^-1 Y' (I + Y D^-1 Y')^-1.

    Args:
      rows: confidences `[rows, columns]`.
      vectors: V, `[columns, rank]`.
      unobserved: a.
      penalty: l.

    Returns:
      `[rows, rank]` float32.
    """
    rank, weight, lengths = vectors.shape[1], np.asarray(rows.sum(1)).ravel(), np.diff(rows.indptr)
    if not rows.nnz:
        return np.zeros((rows.shape[0], rank), np.float32)
    spectrum, basis = np.linalg.eigh(unobserved * (vectors.T @ vectors))
    rotated = vectors @ basis
    ridge = penalty * (weight + unobserved * rows.shape[1]) + 1e-6
    solutions = np.empty((rows.shape[0], rank), np.float32)
    by_length, start = np.argsort(lengths, kind="stable"), 0
    while start < len(by_length):  # batches of rows of similar length bound the padding and the memory
        longest = max(int(lengths[by_length[min(start + 63, len(by_length) - 1)]]), 1)
        part = by_length[start : start + max(64, SYSTEMS // (rank * max(longest, rank)))]
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
        solutions[part] = solved[..., 0]
    return solutions @ basis.T


def ease(matrix: sp.csr_matrix, penalty: float = 400.0) -> np.ndarray:
    """Fit EASE, the linear item-item model with zero diagonal; returns B `[items, items]` float32.

        B = argmin |X - X B|^2 + l |B|^2,  diag(B) = 0;   B = I - P diag(P)^-1,   P = (X'X + l I)^-1

    Args:
      matrix: X, `[users, items]`.
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
    """Fit EASE with X'X replaced by its `rank` largest components.

        X'X ~ V S^2 V',   D = S^2 / (S^2 + l),   B_ij = (V D)_i . V_j / (1 - V_j D V_j')   for i != j

    Exact if `rank` is the rank of X. The diagonal is not 0: callers must not score an item from itself.

    Args:
      matrix: X, `[users, items]`.
      rank: number of components.
      penalty: l.
      seed: of the initial vector of the SVD iteration.

    Returns:
      `Factors` of the left and right vectors of B, `[items, rank]` each.
    """
    rank = min(rank, min(matrix.shape) - 1)
    start = np.random.default_rng(seed).random(min(matrix.shape))
    _, values, right = sp.linalg.svds(matrix.astype(np.float64), rank, v0=start)
    shrink = values**2 / (values**2 + penalty)
    left = right.T * shrink
    rest = np.maximum(1 - (left * right.T).sum(1), 1e-6)
    return Factors(left.astype(np.float32), (right.T / rest[:, None]).astype(np.float32))


def item_knn(matrix: sp.csr_matrix, neighbours: int = 100, shrink: float = 10.0) -> sp.csr_matrix:
    """Compute item-kNN similarities by the shrunk cosine of item columns, `[items, items]` sparse.

        s_ij = x_i . x_j / (|x_i| |x_j| + shrink)

    Args:
      matrix: X, `[users, items]`.
      neighbours: number of nearest neighbours kept for each item, in its column.
      shrink: added to the denominator.

    References:
      Sarwar et al., Item-based Collaborative Filtering Recommendation Algorithms, WWW 2001.
      Ferrari Dacrema et al., Are We Really Making Much Progress?, RecSys 2019, section 2.2 (shrinkage).
    """
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(0)).ravel())
    columns, parts = matrix.tocsc(), []
    count = np.bincount(matrix.indices, np.diff(matrix.indptr)[_row_of(matrix)], matrix.shape[1])
    tile = np.cumsum(np.minimum(count, matrix.shape[1])) // CELLS  # entries of the product, at most
    for start, stop in pairwise([0, *(1 + np.flatnonzero(np.diff(tile))), matrix.shape[1]]):
        product = (matrix.T @ columns[:, start:stop]).tocoo()
        keep = product.row != product.col + start
        row, column, value = product.row[keep], product.col[keep] + start, product.data[keep]
        value = value / (norm[row] * norm[column] + shrink)
        order = np.lexsort((-value, column))
        place = np.arange(len(order)) - np.searchsorted(column[order], column[order])
        order = order[place < neighbours]
        parts.append((value[order], row[order], column[order]))
    value, row, column = (np.concatenate(x) for x in zip(*parts, strict=True))
    return sp.csr_matrix((value, (row, column)), shape=(matrix.shape[1],) * 2)


def _row_of(matrix: sp.csr_matrix) -> np.ndarray:
    """Return the row of each stored entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def dense_bytes(items: int, copies: int = 1) -> int:
    """Return the bytes of `copies` float32 matrices `[items, items]`."""
    return 4 * items * items * copies


def check_memory(what: str, needed: int, limit: int, instead: str) -> None:
    """Raise a `DataError` if `needed` bytes exceed `limit`; call it before the allocation.

    Args:
      what: what needs the memory, the subject of the message.
      needed, limit: bytes.
      instead: what to do instead, the end of the message.
    """
    if needed > limit:
        raise DataError(f"{what} needs {needed / 1e9:,.1f} GB, more than the limit of {limit / 1e9:,.1f} GB; {instead}")


def means(item: np.ndarray, rating: np.ndarray, items: int, shrink: float = 5.0) -> Means:
    """Compute the mean rating and shrunk item biases.

        b_i = sum_u (r_ui - mean) / (n_i + shrink)

    Args:
      item, rating: `[interactions]` item rows and ratings.
      items: number of item rows.
      shrink: pseudo-count of ratings at the mean, added to each item.

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
    """Fit ratings by alternating least squares on the residuals after shrunk item and user biases.

        sum_{ui} (r_ui - mean - b_i - b_u - x_u . y_i)^2 + l sum_u |x_u|^2 + l sum_i |y_i|^2

    Args:
      user, item, rating: `[interactions]` user keys of any kind, item rows and ratings.
      items: number of item rows.
      rank: width of the vectors.
      penalty: l.
      shrink: pseudo-count of ratings at the mean, added to each item and each user; see `means`.
      sweeps: number of sweeps; each solves all users and all items once.
      seed: of the initial item vectors.

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
    """Solve a ridge regression in each group.

    Args:
      group: `[n]` group of each row.
      x: `[n, rank]` inputs.
      y: `[n]` targets.
      groups: number of groups.
      penalty: of the squared norm of the weights.

    Returns:
      Weights `[groups, rank]`.
    """
    rank = x.shape[1]
    x = np.asfortranarray(x)
    moment = np.stack([np.bincount(group, x[:, a] * y, groups) for a in range(rank)], axis=1)
    return np.linalg.solve(gram_of(group, x, groups) + penalty * np.eye(rank), moment[..., None])[..., 0]


def gram_of(group: np.ndarray, x: np.ndarray, groups: int) -> np.ndarray:
    """Sum x x' over the rows of each group, `[groups, rank, rank]`; arguments as in `least_squares`."""
    rank = x.shape[1]
    x = np.asfortranarray(x)
    gram = np.empty((groups, rank, rank))
    for a in range(rank):
        for b in range(a + 1):
            gram[:, a, b] = gram[:, b, a] = np.bincount(group, x[:, a] * x[:, b], groups)
    return gram
