"""Re-ranking: diversify a list of items."""

import numpy as np


def diversify(rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """Return positions in `rows` of up to `k` items by maximal marginal relevance (MMR), best first.

    Items are picked greedily by the largest

        (1 - diversity) * score - diversity * (the largest cosine with an item picked before)

    Args:
      rows: `[n]` candidates, best first.
      scores: `[n]` scores of the candidates, rescaled to 0 (worst) to 1 (best) here.
      vectors: `[stock, width]` unit vectors of the items.
      k: number of items.
      diversity: from 0 to 1.
    """
    spread = np.ptp(scores) if len(scores) else 0.0
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    max_cosine, candidate_vectors = np.full(len(rows), -np.inf), vectors[rows]
    picked: list[int] = []
    for _ in range(min(k, len(rows))):
        marginal = (1 - diversity) * relevance - (diversity * max_cosine if picked else 0.0)
        marginal[picked] = -np.inf
        picked.append(int(marginal.argmax()))
        max_cosine = np.maximum(max_cosine, candidate_vectors @ candidate_vectors[picked[-1]])
    return np.array(picked, int)
