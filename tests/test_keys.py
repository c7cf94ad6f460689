"""Random numbers follow from (seed, purpose, step) alone."""

import mlx.core as mx

from mlx_distill.keys import generator, seed_global


def drawn(seed, purpose, step):
    return generator(seed, purpose, step).integers(1 << 62, size=4).tolist()


def test_the_same_triple_gives_the_same_numbers_whatever_ran_before():
    first = drawn(0, "order", 3)
    drawn(5, "dropout", 1)
    assert drawn(0, "order", 3) == first
    assert first[0] == 3293280051978449392  # on every machine


def test_no_two_triples_share_a_stream():
    triples = [(s, p, t) for s in (0, 1, 11) for p in ("order", "dropout", "1") for t in (0, 1, 11)]
    assert len({tuple(drawn(*triple)) for triple in triples}) == len(triples)


def test_the_global_state_is_set_the_same_way():
    seed_global(0, "dropout", 7)
    one = mx.random.uniform(shape=(4,)).tolist()
    mx.random.uniform(shape=(9,))
    seed_global(0, "dropout", 7)
    assert mx.random.uniform(shape=(4,)).tolist() == one
    seed_global(0, "dropout", 8)
    assert mx.random.uniform(shape=(4,)).tolist() != one
