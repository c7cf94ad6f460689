"""Bits, tokens and values of the cache: what is written is what is read, and what it costs."""

import numpy as np
import pytest

from mlx_distill.cache import values
from mlx_distill.cache.bits import SLACK, WIDEST, get_bits, put_bits
from mlx_distill.cache.tokens import TokenCode, pack_rows, unpack_rows

V = 3000


def sets_of(
    count: int, kept: int, vocabulary: int = V, *, zipf: bool = True, seed: int = 0, meaning: int = 0
) -> np.ndarray:
    """Sets of different tokens, frequent as Zipf has it, or all alike; `meaning` says which are frequent."""
    random = np.random.default_rng(seed)
    names = np.random.default_rng(meaning).permutation(vocabulary)
    if 4 * kept > vocabulary:
        weights = 1 / np.arange(1, vocabulary + 1) if zipf else np.ones(vocabulary)
        noisy = np.log(weights) + random.gumbel(size=(count, vocabulary))
        return names[np.argpartition(-noisy, kept - 1, axis=-1)[:, :kept]].astype(np.int32)
    # One token after another until so many are different.
    below = np.cumsum(1 / np.arange(1, vocabulary + 1)) if zipf else np.arange(1.0, vocabulary + 1)
    found = np.searchsorted(below, below[-1] * random.random((count, 8 * kept)))
    return names[np.stack([list(dict.fromkeys(row))[:kept] for row in found.tolist()])].astype(np.int32)


def test_numbers_of_any_width_come_back() -> None:
    random = np.random.default_rng(0)
    widths = np.concatenate([np.arange(WIDEST + 1), random.integers(0, WIDEST + 1, size=500)])
    numbers = random.integers(0, 2**widths)
    ends = np.cumsum(widths)
    size = -(-int(ends[-1]) // 8)
    packed = put_bits(numbers, widths, ends - widths, size)
    assert packed.shape == (size,)
    read = get_bits(np.concatenate([packed, np.zeros(SLACK, dtype=np.uint8)]), widths, ends - widths)
    np.testing.assert_array_equal(read, numbers)
    # By hand: 5 in 3 bits, then 2 in 2, low bits first.
    assert put_bits(np.array([5, 2]), np.array([3, 2]), np.array([0, 3]), 1).tolist() == [0b10101]
    # Offsets that are not the same on both sides must not pass.
    shifted = get_bits(np.concatenate([packed, np.zeros(4, dtype=np.uint8)]), widths, ends - widths + 1)
    assert not np.array_equal(shifted, numbers)


def written_and_read(code: TokenCode, found: np.ndarray, starts: list[int]) -> tuple[np.ndarray, float]:
    """What comes back, and bytes a set."""
    ordered = np.take_along_axis(found, code.sort(found), axis=-1)
    high, places, widths = code.encode(ordered)
    assert high.shape[-1] == code.high_bytes(found.shape[-1])
    low, row_bytes = pack_rows(places, widths, np.array(starts))
    runs = code.decode_runs(high, found.shape[-1])
    padded = np.concatenate([low, np.zeros(SLACK + 1, dtype=np.uint8)])
    back = unpack_rows(padded, code.widths[runs], np.diff(starts), row_bytes[:-1])
    return code.decode(runs, back), (high.nbytes + low.nbytes) / len(found)


@pytest.mark.parametrize(
    ("kept", "vocabulary", "count"), [(1, 50, 7), (8, 50, 20), (50, 50, 3), (50, V, 300), (256, V, 20)]
)
@pytest.mark.parametrize("zipf", [True, False])
def test_sets_come_back_whatever_the_code_was_made_of(
    kept: int, vocabulary: int, count: int, zipf: bool
) -> None:
    found = sets_of(count, kept, vocabulary, zipf=zipf)
    starts = sorted({0, 1, count // 2, count})
    for made_of in (found, found[:1], sets_of(4, kept, vocabulary, zipf=not zipf, meaning=1)):
        code = TokenCode.of(made_of, vocabulary)
        back, _ = written_and_read(code, found, starts)
        np.testing.assert_array_equal(np.sort(back), np.sort(found))
        # The code itself comes back from its bytes.
        again, _ = written_and_read(TokenCode.unpack(code.pack()), found, starts)
        np.testing.assert_array_equal(again, back)


def test_a_multiset_keeps_what_it_names_twice() -> None:
    found = np.random.default_rng(0).integers(0, 20, size=(40, 30)).astype(np.int32)
    code = TokenCode.of(found, 20)
    back, _ = written_and_read(code, found, [0, 40])
    np.testing.assert_array_equal(np.sort(back), np.sort(found))
    assert (np.diff(back.astype(np.int64), axis=-1) == 0).any()


def entropy(found: np.ndarray, vocabulary: int) -> float:
    """Bytes a set, of tokens that are there or not independently of each other."""
    share = np.bincount(found.ravel(), minlength=vocabulary) / len(found)
    share = np.clip(share, 1e-12, 1 - 1e-12)
    return float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum() / 8)


def test_frequent_tokens_take_fewer_bytes() -> None:
    kept = 50
    for zipf in (True, False):
        found, fresh = sets_of(1500, kept, zipf=zipf), sets_of(300, kept, zipf=zipf, seed=1)
        _, taken = written_and_read(TokenCode.of(found, V), fresh, [0, 300])
        assert taken < 1.2 * entropy(found, V)  # which is too low by what the sample overfits
        if zipf:  # numbered by another frequency it must not pass, nor at a fixed width
            _, other = written_and_read(TokenCode.of(sets_of(1500, kept, meaning=1), V), fresh, [0, 300])
            assert taken < 0.85 * other
            assert taken < 0.6 * kept * np.ceil(np.log2(V)) / 8


def test_tokens_all_alike_are_not_numbered() -> None:
    """Counted in the sets that number them, the first would look twice as frequent as they are."""
    found = sets_of(200, 50, zipf=False)
    code = TokenCode.of(found, V)
    assert code.classes.max() == 0  # a numbering saves nothing
    assert len({*code.widths[:-8].tolist()}) == 1  # the last runs are what is left over
    assert sum(array.nbytes for array in code.pack().values()) < 200
    assert TokenCode.of(sets_of(200, 50), V).classes.max() > 0


def log_p_of(count: int, kept: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    logits = np.sort(scale * np.random.default_rng(seed).gumbel(size=(count, V)))[:, ::-1]
    log_p = logits - np.log(np.exp(logits - logits[:, :1]).sum(-1, keepdims=True)) - logits[:, :1]
    shuffled = np.random.default_rng(1).permuted(log_p[:, :kept], axis=-1)
    tail = np.exp(log_p[:, kept:]).sum(-1)
    return shuffled.astype(np.float32), np.log(tail).astype(np.float32) if kept < V else None


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("kept", [1, 8, 50, V])
def test_values_cost_little_and_add_up_to_one(kept: int, scale: float) -> None:
    exact = log_p_of(30 if kept == V else 100, kept, scale)
    packed = values.encode(*exact)
    assert packed["values"].shape[-1] == -(-6 * kept // 8)
    stored = values.decode(packed, kept)
    assert (stored[1] is None) == (exact[1] is None) == (kept == V)
    whole = np.exp(stored[0].astype(np.float64)).sum(-1)
    whole += 0 if stored[1] is None else np.exp(stored[1].astype(np.float64))
    np.testing.assert_allclose(whole, 1, rtol=2e-6)
    assert np.isfinite(stored[0]).all()
    added = values.kl(exact, stored)
    assert added.mean() < (1e-3 if kept == V else 3e-4)  # thousands of tokens alike: many small errors
    assert added.max() < (2e-3 if kept == V else 1e-3)
    if kept > 1:  # values of another place must not pass
        wrong = values.kl(exact, (np.roll(stored[0], 1, axis=0), stored[1]))
        assert wrong.mean() > 100 * max(1e-9, added.mean()) or scale > 4


def test_the_extremes_stay_finite_and_possible() -> None:
    log_p = np.full((3, 4), -1e30, dtype=np.float32)
    log_p[:, 2] = 0
    log_p[1] = -np.inf
    log_p[1, 0] = 0
    log_p[2] = np.log(0.25)
    tail = np.array([-1e30, -np.inf, -1e30], dtype=np.float32)
    stored, stored_tail = values.decode(values.encode(log_p, tail), 4)
    assert stored_tail is not None
    assert np.isfinite(stored).all()
    assert np.isfinite(stored_tail).all()
    np.testing.assert_allclose(stored[0], [-31.9, -31.9, 0, -31.9], atol=0.1)  # `LOWEST` below
    np.testing.assert_allclose(stored[2], np.log(0.25), rtol=1e-6)  # all alike, exactly

    # A tail of very many tokens, far above each of those that are kept.
    flat, tail = np.full((1, 4), -12.0, dtype=np.float32), np.log1p(np.array([-4 * np.exp(-12.0)]))
    stored, stored_tail = values.decode(values.encode(flat, tail), 4)
    np.testing.assert_allclose(stored, -12, atol=1e-3)


def test_kl_is_that_of_the_definition() -> None:
    exact, stored = log_p_of(5, 8, 1.0), log_p_of(5, 8, 2.0, seed=3)
    assert exact[1] is not None
    assert stored[1] is not None
    sides = [(exact[0], exact[1]), (stored[0], stored[1])]
    p, q = (np.exp(np.concatenate([k, t[:, None]], axis=-1).astype(np.float64)) for k, t in sides)
    p, q = (one / one.sum(-1, keepdims=True) for one in (p, q))
    np.testing.assert_allclose(values.kl(exact, stored), (p * np.log(p / q)).sum(-1), rtol=1e-9)
    assert (values.kl(exact, exact) == 0).all()


def test_bytes_at_a_real_vocabulary() -> None:
    """The numbers that docs/cache.md promises, on few places: 50 of 151,936 tokens."""
    vocabulary, kept = 151_936, 50
    for zipf, most in ((True, 110), (False, 130)):
        found = sets_of(1000, kept, vocabulary, zipf=zipf)
        code = TokenCode.of(found[:900], vocabulary)
        _, taken = written_and_read(code, found[900:], [0, 100])
        packed = values.encode(*log_p_of(100, kept, 1.0))
        taken += sum(array.nbytes for array in packed.values()) / 100
        assert taken < most - 4  # which keys, starts and the table of tokens may take
