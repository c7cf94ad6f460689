"""Numbers of any width, packed into bytes and read back, many at once. Low bits come first."""

import numpy as np

WIDEST = 24  # bits of a number: with 7 to skip, it lies within 4 bytes
SLACK = 3  # bytes behind the last number, so that 4 can always be read


def put_bits(numbers: np.ndarray, widths: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """Numbers written at bit offsets of `size` bytes, uint8.

    Args:
        numbers: (N,) integers, each below 2**width.
        widths: (N,) bits of each, 0 to `WIDEST`.
        starts: (N,) offset of each in bits; what is written nowhere is 0.
    """
    bits = np.zeros(8 * size, dtype=np.uint8)
    for bit in range(int(widths.max(initial=0))):
        wide = np.flatnonzero(widths > bit)
        bits[starts[wide] + bit] = (numbers[wide] >> bit) & 1
    return np.packbits(bits, bitorder="little")


def get_bits(packed: np.ndarray, widths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Numbers (N,) int32 of the given widths at the given bit offsets.

    Args:
        packed: uint8, with `SLACK` bytes behind the last number.
        widths: (N,), or one for all.
    """
    wide = packed.astype(np.uint32)
    four = wide[:-3] | wide[1:-2] << 8 | wide[2:-1] << 16 | wide[3:] << 24  # the 4 bytes from each byte on
    read = four[starts >> 3] >> (starts & 7).astype(np.uint32)
    return (read & ((np.uint32(1) << widths.astype(np.uint32)) - np.uint32(1))).astype(np.int32)
