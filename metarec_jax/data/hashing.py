"""Hashing: 64-bit hashes of ids and strings.

Unlike Python's `hash`, they are the same in every process and on every machine.
"""

import numpy as np

PRIME = np.uint64(0x100000001B3)  # of 64-bit FNV
OFFSET = np.uint64(0xCBF29CE484222325)


def hashed(values: np.ndarray) -> np.ndarray:
    """Compute 64-bit hashes of ids or strings.

    Strings are hashed by FNV-1a over their code points, h <- (h xor c) * prime. Hashes of strings and integer ids then
    pass through SplitMix64's finaliser: their low bits, which a modulus uses, depend on all other bits.

    Args:
      values: `[n]` int64 ids or unicode strings.

    Returns:
      `[n]` uint64.

    References:
      Fowler, Noll and Vo, the FNV hash, RFC 9923; Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA
      2014, figure 16.
    """
    if values.dtype.kind == "U":
        width = values.dtype.itemsize // 4
        points = np.ascontiguousarray(values).view(np.uint32).reshape(len(values), width)
        h = np.full(len(values), OFFSET)
        for column in points.T:  # numpy pads shorter strings with zeros
            h = np.where(column != 0, (h ^ column) * PRIME, h)
    else:
        h = values.astype(np.int64).view(np.uint64)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def grams(text: str, size: int) -> list[str]:
    """Split a text into its distinct words and their character n-grams.

    Args:
      text: any text.
      size: n-gram length in letters; 0 for words only.

    Returns:
      Words, marked as `<word>`, then n-grams, which include the marks.

    References:
      Bojanowski et al., Enriching Word Vectors with Subword Information, TACL 2017, section 3.2.
    """
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    marked = [f"<{word}>" for word in words]
    parts = (w[i : i + size] for w in marked for i in range(len(w) - size + 1)) if size else ()
    return list(dict.fromkeys([*marked, *parts]))
