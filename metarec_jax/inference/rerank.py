"""Re-ranking: lists of items that are unlike each other."""

import numpy as np


def diversify(rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """Maximal marginal relevance: positions in `rows` of up to `k` items, one after the other that with the largest

        (1 - diversity) * score - diversity * (the largest cosine with an item picked before)

    Args:
      rows: `[n]` candidates, best first.
      scores: `[n]` of them; here from 0 (the worst of them) to 1.
      vectors: `[stock, width]` of length 1.
      k: how many.
      diversity: from 0 to 1.
    """
    spread = np.ptp(scores) if len(scores) else 0.0
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    alike, likeness = np.full(len(rows), -np.inf), vectors[rows]
    picked: list[int] = []
    for _ in range(min(k, len(rows))):
        worth = (1 - diversity) * relevance - (diversity * alike if picked else 0.0)
        worth[picked] = -np.inf
        picked.append(int(worth.argmax()))
        alike = np.maximum(alike, likeness @ likeness[picked[-1]])
    return np.array(picked, int)
