"""A sample of the malformed inputs of `benchmarks/fuzz.py`, which has thousands more."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
READ = ("recipe", "rows", "problems", "safetensors", "chat")


@pytest.fixture(scope="module")
def fuzz() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_malformed_input_is_answered_by_a_line(fuzz: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, no hang, no half-made run; and most of what is damaged is indeed refused."""
    found = fuzz.fuzz(2 * len(READ), seed=0, kinds=list(READ))
    assert found["fuzz_tracebacks"] == 0, capsys.readouterr().out
    assert found["fuzz_inputs"] == 2 * len(READ)
    assert all(sum(count.values()) == 2 for count in found["kinds"].values())
    assert sum(count["refused"] for count in found["kinds"].values()) > len(READ)


@pytest.mark.slow
def test_malformed_input_of_every_kind(fuzz: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz.fuzz(6 * len(fuzz.KINDS), seed=100)
    assert found["fuzz_tracebacks"] == 0, capsys.readouterr().out
    assert all(sum(count.values()) == 6 for count in found["kinds"].values())


@pytest.mark.parametrize("seed", range(30))
def test_something_else_than_a_file(seed: int, fuzz: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    path = tmp_path / "runs" / "x" / "a.json"
    path.write_text("{}", encoding="utf-8")
    done = fuzz.any_kind(path, random.Random(seed))
    assert not path.is_file() or done == "a link out", done


def test_what_may_not_happen_is_seen(fuzz: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fuzzer that finds nothing may be blind: an error that is none of ours, a hang, another exit code."""
    import time

    from fuzz_workshop import RECIPE

    from mlx_distill import plan
    from mlx_distill.errors import Fault, RecipeError

    def ends(act: Any) -> str | None:
        monkeypatch.setattr(plan, "plan_lines", act)
        (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        code, err = fuzz.run(tmp_path, ("plan", "recipe.yaml"))
        return fuzz._wrong(fuzz.KINDS["rows"], code, err)

    def raising(error: Exception) -> Any:
        def act(*_: Any, **__: Any) -> Any:
            raise error

        return act

    monkeypatch.setattr(fuzz, "LONGEST", 1)
    assert ends(raising(KeyError("x"))) == "a traceback"
    assert ends(raising(Fault("x"))) == "exit code 1"
    assert ends(raising(RecipeError("x\ny"))) == "2 lines, of which 2 are errors"
    assert ends(lambda *_, **__: time.sleep(9)) == "longer than 1 s"
    assert ends(raising(RecipeError("x"))) is None
    assert ends(lambda *_, **__: []) is None


def test_a_case_is_a_function_of_its_number(fuzz: Any) -> None:
    for kind in fuzz.KINDS.values():
        for damage in kind.damages:
            if damage is not fuzz.any_header:
                content = b'{"a": [1, {"b": null}]}\n{"c": 2}\n'
                assert damage(content, random.Random(3)) == damage(content, random.Random(3))
