"""Time and memory of mlx-lm's own generation, one row at a time: what its users wait for."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from mlx_distill.peak import resident

ANSWER, REPEATS = 32, 5  # tokens; timed runs of each length, after one to warm up
NO_PEAK = "no GPU, and this system does not tell peak resident memory"

Clock = Callable[[], float]  # seconds


class Times(NamedTuple):
    """Seconds of one generation."""

    first: float  # from the prompt to the first token, ready to be read
    further: float  # of a further token, mean over `ANSWER` - 1


def middle(values: Iterable[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles (of 5 values: of the 2nd and the 4th)."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / 2


def one_generation(model: Any, prompt: mx.array, clock: Clock = time.perf_counter) -> Times:
    """Read a prompt and write `ANSWER` tokens.

    `generate_step` hands out a token once it is computed, and has begun the next by then; on the CPU it has
    nearly finished that one. So the first token waits for most of the second there, as it does for mlx-lm's
    users, and the time from the first to the last is that of `ANSWER` - 1 tokens. The one under way at the
    end is waited for, or the next generation would pay for it.
    """
    started = clock()
    moments = [clock() for _ in generate_step(prompt, model, max_tokens=ANSWER)]
    mx.synchronize(generation_stream)
    return Times(moments[0] - started, (moments[-1] - moments[0]) / (ANSWER - 1))


def in_turn(lengths: Iterable[int], rounds: int) -> list[int]:
    """Each length once a round, every other round backwards: a machine that slows down favours none."""
    there = list(lengths)
    return [length for i in range(rounds) for length in (there if i % 2 == 0 else there[::-1])]


def timed(
    model: Any, prompts: Mapping[int, mx.array], clock: Clock = time.perf_counter
) -> dict[int, dict[str, float]]:
    """Speed at each prompt length: medians over `REPEATS` generations, and their spread (see `middle`)."""
    found: dict[int, list[Times]] = {length: [] for length in prompts}
    for length in in_turn(prompts, REPEATS):
        found[length].append(one_generation(model, prompts[length], clock))
    rows = {}
    for length, times in found.items():
        rows[length] = {
            **with_spread("prefill_tokens_per_second", [length / one.first for one in times]),
            **with_spread("decode_tokens_per_second", [1 / one.further for one in times]),
            **with_spread("time_to_first_token_ms", [1e3 * one.first for one in times]),
        }
    return rows


def with_spread(name: str, values: Iterable[float]) -> dict[str, float]:
    median, spread = middle(values)
    return {name: median, f"{name}_spread": spread}


def peak_memory(work: Callable[[], Any], base: int | None) -> dict[str, Any]:
    """`peak_memory_gib` while `work` ran, the weights included.

    On a GPU that is MLX's counter. On the CPU, where MLX also counts buffers that were never touched, it is
    the resident memory beyond `base`, as Linux tells it; memory that earlier work kept is in it, so the work
    that needs least goes first.

    Args:
        base: bytes resident before the model was opened.
    """
    mx.clear_cache()
    if mx.default_device() == mx.gpu:
        mx.reset_peak_memory()
        work()
        return {"peak_memory_gib": mx.get_peak_memory() / 2**30}
    reset = resident("VmHWM", reset_peak=True)
    work()
    peak = None if reset is None else resident("VmHWM")
    if peak is None or base is None:
        return {"peak_memory_gib": None, "peak_memory_gib_why": NO_PEAK}
    return {"peak_memory_gib": max(0, peak - base) / 2**30}
