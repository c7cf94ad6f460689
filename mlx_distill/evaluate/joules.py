"""Joules a token: work repeated in windows long enough for a meter, less what the machine takes at rest."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlx_distill.evaluate.energy import EnergyMeter
from mlx_distill.evaluate.timing import ANSWER, Clock, in_turn, with_spread

SECONDS, WINDOWS = 1.0, 3  # least length of a window; windows of each kind

Work = Callable[[], int]  # does a piece of work and waits for it; the number of tokens


class Window(NamedTuple):
    joules: float
    rails: dict[str, float]
    seconds: float
    tokens: int


def energies(
    model: Any,
    prompts: Mapping[int, mx.array],
    meter: EnergyMeter,
    *,
    clock: Clock = time.perf_counter,
    wait: Callable[[float], None] = time.sleep,
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Energy of a token written and of a token read, at each prompt length.

    Never raises: where it cannot be measured, `joules_per_token` is null and its reason stands beside it.

    Returns:
        metrics of each length, and what holds for all of them: `energy_meter`, `idle_watts`.
    """
    why = meter.why
    if meter.available:
        try:
            return _energies(model, prompts, meter, clock, wait)
        except Exception as error:
            why = str(error) if isinstance(error, _Still) else f"{type(error).__name__}: {error}"
            why = f"{meter.label}: {why}"
    return {length: _null("joules_per_token", str(why)) for length in prompts}, {}


class _Still(Exception):
    """A counter that does not count."""


def _energies(
    model: Any,
    prompts: Mapping[int, mx.array],
    meter: EnergyMeter,
    clock: Clock,
    wait: Callable[[float], None],
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    def rest() -> int:
        wait(SECONDS)
        return 0

    if not prompts:
        return {}, {}
    wait(SECONDS)  # clocks fall only a moment after the work
    at_rest = [_window(meter, rest, clock) for _ in range(WINDOWS)]
    watts = statistics.median(window.joules / window.seconds for window in at_rest)
    written: dict[int, list[Window]] = {length: [] for length in prompts}
    read: dict[int, list[Window]] = {length: [] for length in prompts}
    for length in in_turn(prompts, WINDOWS):
        read[length].append(_window(meter, reading(model, prompts[length]), clock))
        written[length].append(_window(meter, writing(model, prompts[length]), clock))
    rows = {}
    for length in prompts:
        gross = [window.joules / window.tokens for window in written[length]]
        rows[length] = {
            **_net("joules_per_token", written[length], watts),
            "joules_per_token_gross": statistics.median(gross),
            "joules_per_token_rails": _rails(written[length]),
            **_net("joules_per_prompt_token", read[length], watts),
        }
    return rows, {"energy_meter": meter.label, "idle_watts": watts}


def _window(meter: EnergyMeter, work: Work, clock: Clock) -> Window:
    """Work again and again until the window is long enough."""
    tokens, started = 0, clock()
    meter.begin()
    while True:
        tokens += work()
        if clock() - started >= SECONDS:
            break
    found = meter.end()
    seconds = clock() - started
    if not found.joules > 0:
        raise _Still(f"its counter did not move within {seconds:.1f} s")
    return Window(found.joules, found.rails, seconds, tokens)


def reading(model: Any, prompt: mx.array) -> Work:
    """Read the prompt, up to the logits behind it."""

    def work() -> int:
        for _ in generate_step(prompt, model, max_tokens=0):  # it computes a token and keeps it
            pass
        mx.synchronize(generation_stream)
        return len(prompt)

    return work


def writing(model: Any, prompt: mx.array) -> Work:
    """Write `ANSWER` tokens behind the prompt, which was read before, each time from the same place.

    Caches that cannot go back, those of recurrent layers and full windows, cost the same wherever they stand.
    """
    cache = make_prompt_cache(model)
    for _ in generate_step(prompt, model, max_tokens=0, prompt_cache=cache):
        pass
    trim_prompt_cache(cache, 1)  # the prompt's last token is read again, to begin with

    def work() -> int:
        for _ in generate_step(prompt[-1:], model, max_tokens=ANSWER, prompt_cache=cache):
            pass
        mx.synchronize(generation_stream)
        computed = ANSWER + 1  # it has begun one more than it hands out
        trim_prompt_cache(cache, computed)
        return computed

    mx.synchronize(generation_stream)
    return work


def _net(name: str, windows: list[Window], watts: float) -> dict[str, Any]:
    """Median and spread of what a token takes beyond rest; null where that drowns in the power at rest."""
    values = [(window.joules - watts * window.seconds) / window.tokens for window in windows]
    found = with_spread(name, values)
    if found[name] > 0:
        return found
    busy = statistics.median(window.joules / window.seconds for window in windows)
    return _null(name, f"no more than at rest: {busy:.3g} W at work, {watts:.3g} W before")


def _rails(windows: list[Window]) -> dict[str, float]:
    """Median joules a token of each rail, what it takes at rest included."""
    return {
        rail: statistics.median(window.rails.get(rail, 0.0) / window.tokens for window in windows)
        for rail in windows[0].rails
    }


def _null(name: str, why: str) -> dict[str, Any]:
    return {name: None, f"{name}_why": why}
