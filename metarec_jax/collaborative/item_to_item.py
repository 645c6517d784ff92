"""Item-to-item transition and similarity tables from sequences, computed on the host."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

BLOCK = 1000  # rows processed at a time, to bound memory


class Sequences(NamedTuple):
    """Users' item sequences, earliest first, concatenated.

    Attributes:
      starts: `[users + 1]`; the items of user u are `items[starts[u] : starts[u + 1]]`.
      items: `[interactions]` item rows.
      rows: number of item rows.
    """

    starts: np.ndarray
    items: np.ndarray
    rows: int

    def counts(self) -> np.ndarray:
        """Return the number of interactions of each item, `[rows]` float32."""
        return np.bincount(self.items, minlength=self.rows).astype(np.float32)

    def without_last(self) -> tuple["Sequences", np.ndarray]:
        """Split off the last item of users with two or more items; return the rest and the last items `[users]`."""
        length = np.diff(self.starts)
        users = np.flatnonzero(length >= 2)
        last = self.items[self.starts[users + 1] - 1]
        keep = np.ones(len(self.items), bool)
        keep[self.starts[users + 1] - 1] = False
        owner = np.repeat(np.arange(len(length)), length)
        chosen = keep & np.isin(owner, users)
        starts = np.concatenate([[0], np.cumsum(length[users] - 1)])
        return Sequences(starts, self.items[chosen], self.rows), last

    def latest(self, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each user's latest items `[users, longest]`, most recent last and padded in front, and their mask."""
        at = self.starts[1:, None] - np.arange(longest, 0, -1)
        mask = at >= self.starts[:-1, None]
        return np.where(mask, self.items[np.maximum(at, 0)], 0).astype(np.int32), mask


def transitions(
    sequences: Sequences, window: int, weight: Callable[[int], float], damping: float = 0.0
) -> sp.csr_matrix:
    """Count weighted item pairs, with the earlier item in rows and the later in columns.

    Args:
      sequences: sequences of all users.
      window: maximum distance of a pair.
      weight: weight of a pair as a function of its distance 1, 2, ...
      damping: a user with n items has weight n^-damping.

    Returns:
      Sparse `[rows, rows]`, without pairs of an item with itself.
    """
    length = np.diff(sequences.starts)
    user = np.repeat(np.arange(len(length)), length)
    share = np.maximum(length, 1.0)[user] ** -damping
    items = sequences.items
    pairs = [(np.flatnonzero(user[d:] == user[:-d]), d) for d in range(1, min(window, len(items) - 1) + 1)]
    row, column = (np.concatenate([items[p + shift * d] for p, d in pairs]) for shift in (0, 1))
    value = np.concatenate([weight(d) * share[p] for p, d in pairs]).astype(np.float32)
    other = row != column
    return sp.csr_matrix((value[other], (row[other], column[other])), shape=(sequences.rows,) * 2)


def attribute_rows(codes: list[np.ndarray]) -> sp.csr_matrix:
    """Build normalised idf vectors of the items' categorical values, sparse `[items, values]`.

    Args:
      codes: codes of each field, `[items]` or `[items, values]`; 0 is no value.
    """
    parts = []
    for field in codes:
        table = field.reshape(len(field), -1)
        row, place = np.nonzero(table)
        shape = (len(table), int(table.max(initial=0)) + 1)
        part = sp.csr_matrix((np.ones(len(row), np.float32), (row, table[row, place])), shape=shape)
        part.data[:] = 1
        frequency = np.asarray(part.sum(0)).ravel()
        idf = np.log(len(table) / np.maximum(frequency, 1)) * (frequency > 0)
        parts.append(sp.csr_matrix(part @ sp.diags(idf)))
    joined = sp.hstack(parts, format="csr").astype(np.float32)
    return _scaled(joined, np.sqrt(np.asarray(joined.multiply(joined).sum(1)).ravel()))


def vectors(sequences: Sequences, rank: int, power: int = 3, seed: int = 0) -> np.ndarray:
    """Compute item embeddings `[items, rank]` of unit length by randomised SVD.

    Each entry of the user-item matrix is 1 / sqrt(user count * item count).

    Args:
      sequences: sequences of all users.
      rank: width of the vectors.
      power: number of power iterations.
      seed: of the random start.

    References:
      Halko, Martinsson and Tropp, Finding Structure with Randomness, SIAM Review 2011, algorithm 4.4.
    """
    length = np.diff(sequences.starts)
    user, counts = np.repeat(np.arange(len(length)), length), np.bincount(sequences.items, minlength=sequences.rows)
    value = (1 / np.sqrt(length[user] * counts[sequences.items])).astype(np.float32)
    x = sp.csr_matrix((value, (user, sequences.items)), shape=(len(length), sequences.rows))
    other, rank = x.T.tocsr(), min(rank, *x.shape)
    start = np.random.default_rng(seed).standard_normal((x.shape[1], min(rank + 20, *x.shape))).astype(np.float32)
    basis = x @ start
    for _ in range(power):
        basis = x @ np.linalg.qr(other @ np.linalg.qr(basis)[0])[0]
    _, values, right = np.linalg.svd((other @ np.linalg.qr(basis)[0]).T, full_matrices=False)
    scaled = right[:rank].T * np.sqrt(values[:rank])
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9)


def product(
    a: sp.spmatrix, b: sp.spmatrix, size: int, transform: Callable | None = None, diagonal: bool = False
) -> sp.csr_matrix:
    """Return the `size` largest entries of each row of `transform(a @ b)`, without the diagonal and column 0.

    Args:
      a, b: `[rows, n]` and `[n, rows]`.
      size: maximum number of entries per row; only entries above 0 are kept.
      transform: `transform(entries, columns) -> entries`; must map 0 to 0.
      diagonal: keep the diagonal.
    """
    parts = []
    for start in range(0, a.shape[0], BLOCK):
        part = a[start : start + BLOCK] @ b
        part = sp.csr_matrix(part if sp.issparse(part) else np.where(part > 0, part, 0), dtype=np.float32)
        row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
        if transform is not None:
            part.data = transform(part.data, part.indices).astype(np.float32)
        part.data[(part.indices == 0) | ((part.indices == start + row) & (not diagonal))] = 0
        parts.append(top(part, size))
    return sp.vstack(parts, format="csr")


def similar_rows(a: sp.csr_matrix, size: int, transform: Callable | None = None) -> sp.csr_matrix:
    """Return `product(a, a.T, size, transform)`, computed once for equal rows of `a`.

    Items of a few categories have few distinct rows, each of them similar to thousands of items.
    """
    a.sort_indices()
    spans = zip(a.indptr[:-1], a.indptr[1:], strict=True)
    number: dict[tuple[bytes, bytes], int] = {}
    which = np.array(
        [number.setdefault((a.indices[s:e].tobytes(), a.data[s:e].tobytes()), len(number)) for s, e in spans]
    )
    _, first = np.unique(which, return_index=True)
    every = product(a[first], a.T.tocsr(), size + 1, transform, diagonal=True)[which]
    row = np.repeat(np.arange(every.shape[0]), np.diff(every.indptr))
    every.data[every.indices == row] = 0
    return top(every, size)


def stochastic(matrix: sp.spmatrix) -> sp.csr_matrix:
    """Divide each row by its sum; empty rows stay empty."""
    return _scaled(sp.csr_matrix(matrix), np.asarray(matrix.sum(1)).ravel())


def padded(matrix: sp.csr_matrix, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return columns and values `[rows, size]` of each row's largest entries, largest first, padded with 0."""
    lengths = np.diff(matrix.indptr)
    size = max(min(size, int(lengths.max(initial=0))), 1)
    columns, values = np.zeros((len(lengths), size), np.int32), np.zeros((len(lengths), size), np.float32)
    by_length = np.argsort(lengths, kind="stable")
    data, indices = np.append(matrix.data, -np.inf), np.append(matrix.indices, 0)  # index -1 is padding
    for start in range(0, len(lengths), BLOCK):  # rows of similar length together, to bound the padding
        rows = by_length[start : start + BLOCK]
        place = np.arange(lengths[rows[-1]])
        mask = place < lengths[rows, None]
        at = np.where(mask, matrix.indptr[rows, None] + place, -1)
        if len(place) > size:
            at = np.take_along_axis(at, np.argpartition(-data[at], size - 1, axis=1)[:, :size], 1)
        at = np.take_along_axis(at, np.argsort(-data[at], axis=1, kind="stable"), 1)
        columns[rows, : at.shape[1]] = indices[at]
        values[rows, : at.shape[1]] = np.where(at >= 0, data[at], 0)
    return columns, values


def top(matrix: sp.csr_matrix, size: int) -> sp.csr_matrix:
    """Keep the `size` largest entries of each row."""
    columns, values = padded(matrix, size)
    row = np.repeat(np.arange(len(columns)), columns.shape[1])
    kept = sp.csr_matrix((values.ravel(), (row, columns.ravel())), shape=matrix.shape)
    kept.eliminate_zeros()
    return kept


def _scaled(matrix: sp.csr_matrix, by: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(sp.diags(1 / np.maximum(by, 1e-12)) @ matrix).astype(np.float32)
