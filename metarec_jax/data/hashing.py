"""Hashing: ids and texts to 64 bits, the same in every process and on every machine, as Python's own `hash` is not."""

import numpy as np

PRIME = np.uint64(0x100000001B3)  # of the 64-bit FNV hashes
OFFSET = np.uint64(0xCBF29CE484222325)


def hashed(values: np.ndarray) -> np.ndarray:
    """64-bit hashes `[n]` (uint64) of int64 ids or unicode strings `[n]`.

    Of strings FNV-1a over their code points, h <- (h xor c) * prime; both kinds then pass SplitMix64's finaliser, so
    that the low bits, which a remainder reads, depend on all others.

    References:
      Fowler, Noll and Vo, the FNV hash, RFC 9923; Steele et al., Fast Splittable Pseudorandom Number Generators,
      OOPSLA 2014, figure 16.
    """
    if values.dtype.kind == "U":
        width = values.dtype.itemsize // 4
        points = np.ascontiguousarray(values).view(np.uint32).reshape(len(values), width)
        h = np.full(len(values), OFFSET)
        for column in points.T:  # a string's end is padded with zeros
            h = np.where(column != 0, (h ^ column) * PRIME, h)
    else:
        h = values.astype(np.int64).view(np.uint64)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def grams(text: str, size: int) -> list[str]:
    """The words of a text, then the parts of `size` letters of each, `<` and `>` marking its ends; each once.

    References:
      Bojanowski et al., Enriching Word Vectors with Subword Information, TACL 2017, section 3.2.
    """
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    marked = [f"<{word}>" for word in words]
    parts = (w[i : i + size] for w in marked for i in range(len(w) - size + 1)) if size else ()
    return list(dict.fromkeys([*marked, *parts]))
