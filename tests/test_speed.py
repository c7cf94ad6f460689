"""Speed says what it is said to say: of work whose cost is known, on a clock that is known."""

import json
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import KVCache
from tiny import SHAPE, tiny_tokenizer

from mlx_distill import metrics, models
from mlx_distill.errors import Fault
from mlx_distill.evaluate import speed, timing
from mlx_distill.evaluate.fresh import Scratch, ask
from mlx_distill.evaluate.speed import NAMES, measure_speed, not_measured, too_long
from mlx_distill.evaluate.timing import ANSWER, REPEATS, in_turn, middle, one_generation, timed
from mlx_distill.options import Shape

RATES = NAMES[:3]


class Model:
    """Takes a known time for each token on a clock of its own, and computes nothing."""

    def __init__(self, seconds: float = 0.25, slower: float = 0.0):
        self.seconds, self.slower, self.now = seconds, slower, 0.0
        self.calls: list[int] = []  # tokens of each

    def make_cache(self) -> list[Any]:
        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        number = tokens.shape[1]
        self.calls.append(number)
        self.now += number * self.seconds * (1 + self.slower * self.now)
        return mx.zeros((1, number, 4))

    def clock(self) -> float:
        return self.now


def prompts_of(*lengths: int) -> dict[int, mx.array]:
    return {length: mx.zeros(length, dtype=mx.int32) for length in lengths}


def test_the_median_and_half_the_distance_between_the_quartiles() -> None:
    assert middle([5.0, 1.0, 2.0, 4.0, 100.0]) == (4.0, 1.5)  # of 1 2 4 5 100: 4, and (5 - 2) / 2
    assert middle([3.0, 3.0, 3.0]) == (3.0, 0.0)
    values = np.random.default_rng(0).normal(size=9)
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    assert middle(values.tolist()) == pytest.approx((median, (high - low) / 2))


def test_a_known_cost_is_timed_exactly() -> None:
    """Reading 16 tokens, and the token that mlx-lm begins before it hands out the first."""
    for seconds in (0.25, 2.0):
        model = Model(seconds)
        found = timed(model, prompts_of(16), model.clock)[16]
        assert found["decode_tokens_per_second"] == pytest.approx(1 / seconds)
        assert found["time_to_first_token_ms"] == pytest.approx(1e3 * seconds * 17)
        assert found["prefill_tokens_per_second"] == pytest.approx(16 / (17 * seconds))
        assert [found[f"{name}_spread"] for name in RATES] == [0.0, 0.0, 0.0]
        assert len(model.calls) == REPEATS * (2 + ANSWER)  # the prompt in two parts, and the answer
        # The usual mistake, the prompt counted to the answer, must be far from it.
        assert abs(sum(model.calls) / REPEATS / ANSWER - 1) > 0.4


class Heavy(Model):
    """Multiplies matrices on the device, so often for each call; lazily, as a model does."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.matrix = times, mx.random.normal((192, 192), key=mx.random.key(0)) / 14

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        state = mx.zeros((192, 192)) + tokens.sum()
        for _ in range(self.times):
            state = state @ self.matrix
        return state[None, :1, :4] + mx.zeros((1, tokens.shape[1], 4))


def test_what_the_device_computes_is_timed_and_not_what_python_says() -> None:
    """40 times the work: without waiting for it the two would take about the same."""
    once, often = (one_generation(Heavy(times), mx.zeros(2, dtype=mx.int32)) for times in (1, 40))
    assert often.further > 4 * once.further
    assert often.first > 4 * once.first / 3


def test_a_token_under_way_is_waited_for_before_the_next_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, waited = Model(), list[tuple[Any, int]]()
    monkeypatch.setattr(mx, "synchronize", lambda stream: waited.append((stream, len(model.calls))))
    one_generation(model, mx.zeros(4, dtype=mx.int32), model.clock)
    assert waited == [(generation_stream, 2 + ANSWER)]
    assert len(model.calls) == ANSWER + 2  # one more than was handed out: that is what is under way


def test_lengths_take_turns_so_that_drift_favours_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_turn([1, 2, 3], 3) == [1, 2, 3, 3, 2, 1, 1, 2, 3]

    def decode(order: Any = in_turn) -> list[float]:
        monkeypatch.setattr(timing, "in_turn", order)
        model = Model(0.01, slower=0.2)  # it grows hot
        found = timed(model, prompts_of(16, 17), model.clock)
        return [row["decode_tokens_per_second"] for row in found.values()]

    one, other = decode()
    assert one == pytest.approx(other, rel=0.15)
    # The usual mistake: all repeats of one length first.
    one, other = decode(lambda lengths, rounds: [n for n in lengths for _ in range(rounds)])
    assert one > 1.3 * other


def test_generation_without_tokens_reads_the_whole_prompt() -> None:
    """What energy of reading relies on in mlx-lm: a pass over the prompt, and nothing behind it."""
    model: Any = Model()
    assert list(generate_step(mx.zeros(9, dtype=mx.int32), model, max_tokens=0)) == []
    assert model.calls == [8, 1]


@pytest.mark.parametrize(
    ("config", "length", "why"),
    [
        ({}, 10**6, None),
        ({"max_position_embeddings": 512}, 512, None),
        ({"max_position_embeddings": 512}, 513, "513 tokens are more than the 512 positions of the model"),
        ({"text_config": {"max_position_embeddings": 64}}, 65, "65 tokens are more than the 64 positions"),
        ({"n_positions": 128, "text_config": None}, 96, None),
        ({"n_positions": 128}, 97, "97 tokens and an answer of 32 pass the 128 positions of the model"),
        ({"max_position_embeddings": None}, 9, None),
    ],
)
def test_a_prompt_beyond_the_positions_is_refused(config: Any, length: int, why: str | None) -> None:
    found = too_long(config, length, ANSWER)
    assert found is None if why is None else str(found).startswith(why)


def test_a_table_of_positions_is_as_long_as_it_must_be() -> None:
    """The last place that is looked up, of all that a generation computes."""
    places: list[int] = []

    class Placed(Model):
        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            places.extend(range(cache[0].offset, cache[0].offset + tokens.shape[1]))
            cache[0].update_and_fetch(*(mx.zeros((1, 1, tokens.shape[1], 1)) for _ in range(2)))
            return super().__call__(tokens, cache)

    one_generation(Placed(), mx.zeros(96, dtype=mx.int32))
    assert max(places) == 96 + ANSWER - 1
    assert too_long({"n_positions": 96 + ANSWER}, 96, ANSWER) is None


# --- a folder, in a fresh process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("speed") / "model"
    models.save(made, models.build(Shape(**SHAPE), tiny_tokenizer(), seed=1))
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Positions of this model end at 128."""
    return measure_speed(folder, [3, 5, 7], [32, 200, 8, 32])


def test_every_length_has_its_numbers_or_the_reason(found: dict[str, Any]) -> None:
    assert [row["prompt_tokens"] for row in found["speed"]] == [32, 200, 8]
    for row in found["speed"]:
        for name in NAMES:
            assert (row[name] is None) == (f"{name}_why" in row)
            assert row[name] is None or row[name] > 0
    good, beyond, _ = found["speed"]
    why = "200 tokens are more than the 128 positions of the model"
    assert {name: beyond[name] for name in NAMES} == dict.fromkeys(NAMES)
    assert {beyond[f"{name}_why"] for name in NAMES} == {why}
    assert all(good[name] is not None and good[f"{name}_spread"] >= 0 for name in RATES)
    assert good["time_to_first_token_ms"] == pytest.approx(1e3 * 32 / good["prefill_tokens_per_second"])


def test_the_names_without_a_length_mean_the_first_one(found: dict[str, Any]) -> None:
    first = {name: value for name, value in found["speed"][0].items() if name != "prompt_tokens"}
    assert first.items() <= found.items()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_memory_grows_with_the_prompt(found: dict[str, Any]) -> None:
    long, _, short = (row["peak_memory_gib"] for row in found["speed"])
    if long is None:
        assert found["peak_memory_gib_why"] == timing.NO_PEAK
    else:
        assert 0 < short <= long < 0.5


def test_spreads_are_no_metrics_of_their_own(found: dict[str, Any]) -> None:
    assert metrics.others({"student": found}) == ()
    column = metrics.METRICS["decode_tokens_per_second"]
    assert column.spread(found) == found["decode_tokens_per_second_spread"]
    assert column.spread({}) is None


def test_a_folder_that_does_not_open_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"plain mlx_lm\.load cannot open what was exported \(.*config.json"):
        measure_speed(tmp_path, [3], [8])


def test_without_a_length_nothing_is_opened(tmp_path: Path) -> None:
    found = measure_speed(tmp_path, [3], [])
    assert found == not_measured("`evaluate.prompt_lengths` names no length")
    assert found.keys() == {*NAMES, *(f"{name}_why" for name in NAMES)}


# --- processes that end too soon ------------------------------------------------------------------

CHILD = """
import os, sys, json, signal
folder = sys.argv[2]
if "answers" in sys.argv[1]:
    open(os.path.join(folder, "answer.json"), "w").write(json.dumps({"said": sys.argv[1]}))
if "killed" in sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
if "fails" in sys.argv[1]:
    raise ValueError("no such thing")
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    (tmp_path / "short_lived.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    return Scratch(tmp_path / "scratch")


def test_what_a_process_said_before_it_ended_is_kept(child: Scratch) -> None:
    found, why = ask("short_lived", Path("answers-killed"), {}, child)
    assert found == {"said": "answers-killed"}
    assert why == f"its process was ended by signal 9 ({signal.strsignal(9)})"
    assert ask("short_lived", Path("answers-fails"), {}, child)[1] == "ValueError: no such thing"
    assert ask("short_lived", Path("answers"), {}, child)[1] == ""


def test_a_process_that_said_nothing_is_a_fault(child: Scratch) -> None:
    with pytest.raises(Fault, match="fails: plain mlx_lm.load cannot open .*ValueError: no such thing"):
        ask("short_lived", Path("fails"), {}, child)


def test_what_a_dead_process_had_measured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that it told, and for all others why there are none."""
    told = dict.fromkeys(RATES, 2.0) | {"peak_memory_gib": 0.5}
    rows = [{"prompt_tokens": 8, **told}, {"prompt_tokens": 999, "why": "too long"}]
    answer = {"doing": "its energy was measured", "rows": rows, "about": {"power_source": "AC Power"}}
    monkeypatch.setattr(speed, "ask", lambda *_: (answer, "its process was ended by signal 11"))
    found = measure_speed(Path("any"), [3], [8, 999, 16])
    why = "while its energy was measured: its process was ended by signal 11"
    first = {**told, "joules_per_token": None, "joules_per_token_why": why}
    assert found["speed"][0] == {"prompt_tokens": 8, **first}
    assert found["speed"][1] == {"prompt_tokens": 999, **not_measured("too long")}
    assert found["speed"][2] == {"prompt_tokens": 16, **not_measured(why)}
    assert found == {**first, "power_source": "AC Power", "speed": found["speed"]}


def test_too_little_memory_for_one_length_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with a generation that MLX refuses at 64 tokens."""
    plain = timing.one_generation

    def refused(model: Any, prompt: mx.array, *clock: Any) -> Any:
        if len(prompt) == 64:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return plain(model, prompt, *clock)

    monkeypatch.setattr(timing, "one_generation", refused)
    scratch = Scratch(tmp_path)
    (tmp_path / "request.json").write_text(json.dumps({"probe": [3], "lengths": [64, 8]}), encoding="utf-8")
    speed._child(folder, scratch)
    refused_row, good = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))["rows"]
    assert refused_row == {"prompt_tokens": 64, "why": "RuntimeError: [malloc] Unable to allocate 9 bytes."}
    assert good["decode_tokens_per_second"] > 0
