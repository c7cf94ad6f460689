"""Which tokens: a set of k out of V, by how often each token is among the likeliest.

Tokens are numbered by frequency, and the numbers cut into runs of 1, 2, 4, 8, ... so wide that a set has
about one member in each: narrow where tokens are frequent, wide where they are rare. A set is then written
as its sorted members' runs (one bit a member and one a run, the code of Elias and Fano) and each one's place
within its run. For tokens that are all equally frequent the runs are equally wide, and the code is Elias and
Fano's own. It takes a twentieth or so more than the entropy of independent tokens of these frequencies.
"""

import zlib

import numpy as np

from mlx_distill.cache.bits import WIDEST, get_bits, put_bits

UNIFORM = 0.05  # share of the frequencies that every token has alike: the first rows do not show all
NUMBERING = 1024  # sets that number the tokens: more make a table that costs more than it saves


class TokenCode:
    """Numbers tokens by frequency, and writes sets of them; a multiset may name a token more than once.

    Args:
        classes: (V,) uint8, larger for tokens that are more frequent; each a factor of 2.
        widths: (R,) uint8, bits of the place within each run.
    """

    def __init__(self, classes: np.ndarray, widths: np.ndarray):
        self.classes, self.widths = classes, widths.astype(np.uint8)
        self.token_at = np.argsort(-classes.astype(np.int16), kind="stable").astype(np.int32)
        self._rank_of = np.empty_like(self.token_at)
        self._rank_of[self.token_at] = np.arange(len(classes), dtype=np.int32)
        sizes = np.int64(1) << self.widths.astype(np.int64)
        self._first = (np.cumsum(sizes) - sizes).astype(np.int32)  # rank with which each run begins

    @classmethod
    def of(cls, indices: np.ndarray, vocabulary: int) -> "TokenCode":
        """The code for sets like these, (N, k) of token ids below `vocabulary`.

        Where a numbering saves less than it takes itself, tokens keep their own numbers.
        Some sets, from all over, number the tokens, and the others tell how frequent these are: counted in
        the same sets, those at the top would look more frequent than they are.
        """
        numbers = np.arange(len(indices)) % max(2, len(indices) // NUMBERING) == 0
        numbering, others = indices[numbers], indices[~numbers]
        if len(others) == 0:
            others = indices
        counts = np.bincount(numbering.ravel(), minlength=vocabulary)
        classes = np.ceil(np.log2(counts + 1.0)).astype(np.uint8)  # 0, 1, 2-3, 4-7, ... times
        seen = np.bincount(others.ravel(), minlength=vocabulary)
        in_class = np.bincount(classes, weights=seen) / np.maximum(np.bincount(classes), 1)
        members = indices.shape[1]
        frequency = (1 - UNIFORM) * in_class / len(others) + UNIFORM * members / vocabulary
        order = np.argsort(-classes.astype(np.int16), kind="stable")
        numbered = cls(classes, _runs(frequency[classes[order]]))
        plain = cls.plain(vocabulary, members)
        return min(plain, numbered, key=lambda code: code._bytes(indices))

    @classmethod
    def plain(cls, vocabulary: int, members: int) -> "TokenCode":
        """The code of sets of so many, of tokens that are all equally frequent."""
        return cls(np.zeros(vocabulary, dtype=np.uint8), _runs(np.full(vocabulary, members / vocabulary)))

    def _bytes(self, indices: np.ndarray) -> int:
        """What these sets take, and the code itself."""
        high, _, widths = self.encode(indices)
        return high.nbytes + int(widths.sum()) // 8 + sum(array.nbytes for array in self.pack().values())

    def high_bytes(self, members: int) -> int:
        """Bytes that say the runs of a set of so many."""
        return -(-(members + len(self.widths)) // 8)

    def sort(self, indices: np.ndarray) -> np.ndarray:
        """(N, k): the order in which the members of each set are written."""
        return np.argsort(self._rank_of[indices], axis=-1, kind="stable")

    def encode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sets (N, k), sorted by `sort`: their runs, (N, H) uint8, places within these, and their widths."""
        ranks = self._rank_of[indices]
        runs = np.searchsorted(self._first, ranks, side="right") - 1
        sets, members = indices.shape
        bits = np.zeros((sets, members + len(self.widths)), dtype=np.uint8)
        np.put_along_axis(bits, runs + np.arange(members), 1, axis=-1)
        return np.packbits(bits, axis=-1, bitorder="little"), ranks - self._first[runs], self.widths[runs]

    def decode_runs(self, high: np.ndarray, members: int) -> np.ndarray:
        """(N, k) runs of the members of each set."""
        bits = np.unpackbits(high, axis=-1, count=members + len(self.widths), bitorder="little")
        ones = np.flatnonzero(bits).reshape(len(high), members)
        before = np.arange(len(high))[:, None] * bits.shape[1] + np.arange(members)
        return ones - before

    def decode(self, runs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Token ids (N, k) int32 of places within runs."""
        return self.token_at[self._first[runs] + places]

    def pack(self) -> dict[str, np.ndarray]:
        """Arrays of which `unpack` makes the code again."""
        classes = zlib.compress(self.classes.tobytes(), 9)
        return {"classes": np.frombuffer(classes, dtype=np.uint8), "widths": self.widths}

    @classmethod
    def unpack(cls, arrays: dict[str, np.ndarray]) -> "TokenCode":
        classes = np.frombuffer(zlib.decompress(arrays["classes"].tobytes()), dtype=np.uint8)
        return cls(classes, arrays["widths"])


def _runs(frequency: np.ndarray) -> np.ndarray:
    """Widths of runs of ranks in which a set has one member on average, or fewer."""
    below = np.concatenate([[0.0], np.cumsum(frequency)])
    widths, first, size = [], 0, len(frequency)
    while first < size:
        width = 0
        while width < WIDEST and first + 2**width < size:
            if below[min(first + 2 ** (width + 1), size)] - below[first] > 1:
                break
            width += 1
        widths.append(width)
        first += 2**width
    return np.array(widths, dtype=np.uint8)


def pack_rows(places: np.ndarray, widths: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places within runs, packed so that every row begins at a byte.

    Args:
        places, widths: (N, k) of `TokenCode.encode`.
        starts: (R + 1,) which of the N sets each row begins with.

    Returns:
        the bytes, and (R + 1,) int64 at which byte each row begins.
    """
    bits, ends = _offsets(widths)
    first = np.concatenate([[0], ends])[starts]  # in bits, over all rows without gaps
    row_bytes = np.concatenate([[0], np.cumsum(-(-np.diff(first) // 8))])
    shift = np.repeat(8 * row_bytes[:-1] - first[:-1], np.diff(starts))
    at = bits + shift[:, None]
    packed = put_bits(places.ravel(), widths.ravel(), at.ravel(), int(row_bytes[-1]))
    return packed, row_bytes


def unpack_rows(
    packed: np.ndarray, widths: np.ndarray, counts: np.ndarray, row_bytes: np.ndarray
) -> np.ndarray:
    """The places within runs (N, k) that `pack_rows` wrote.

    Args:
        packed: with `bits.SLACK` bytes behind the last row.
        counts: (R,) sets of each row.
        row_bytes: (R,) at which byte of `packed` each row begins.
    """
    bits, ends = _offsets(widths)
    starts = np.concatenate([[0], np.cumsum(counts)])
    first = np.concatenate([[0], ends])[starts]
    shift = np.repeat(8 * row_bytes - first[:-1], counts)
    at = bits + shift[:, None]
    return get_bits(packed, widths.ravel(), at.ravel()).reshape(widths.shape)


def _offsets(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each number begins if all follow one another, (N, k), and where each set ends, (N,), in bits."""
    ends = np.cumsum(widths.ravel(), dtype=np.int64).reshape(widths.shape)
    return ends - widths, ends[:, -1]
