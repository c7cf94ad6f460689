"""How many places' logits are held at once."""

# Float32 arrays over the vocabulary that a chunk of forward_kl holds at once, for each distribution: logits,
# probabilities, and gradients of both. From benchmarks/losses_bench.py; others hold more.
COPIES = 4.5


def chunk_of(logits_mib: int, vocabulary: int, *, logits: int) -> int:
    """Places at a time: as many as `train.logits_mib` holds, 16 at least.

    A power of two, and from 128 on a multiple of 128, as the number of counted places is: an odd last chunk
    could not take over the memory of the others.

    Args:
        logits: how many distributions over the vocabulary a place has at once: the student's, one of each
            exit, and one of each live teacher.
    """
    places = int(logits_mib * 2**20 / (vocabulary * 4 * COPIES * logits))
    return places // 128 * 128 if places >= 128 else max(16, 2 ** (max(1, places).bit_length() - 1))
