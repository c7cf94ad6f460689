"""A model folder seen by a fresh process: opened with plain `mlx_lm.load`, its logits and its speed.

`python -m mlx_distill.evaluate.fresh FOLDER REQUEST` is the child; `fresh_look` starts it. In a
process of its own a folder cannot lean on what is left in memory, and memory can be measured.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import Fault

PROMPT, ANSWER, REPEATS = 128, 32, 3  # tokens, tokens, timed runs after one warm-up


class FreshLook(NamedTuple):
    """What a fresh process found."""

    logits: np.ndarray  # (T, V) float32, for the probe
    tokens: list[int]  # what its tokenizer makes of `text`
    speed: dict[str, Any]  # as in evaluation.json; a null has its reason beside it


def fresh_look(folder: Path, probe: list[int], *, text: str = "", speed: bool = False) -> FreshLook:
    """Open a model folder in a fresh process with plain `mlx_lm.load`.

    Args:
        probe: token ids to compute logits for.
        text: for its tokenizer.
        speed: also time prefill and decoding, and measure memory.

    Raises:
        Fault: the folder cannot be opened there.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, out = Path(scratch) / "request.json", Path(scratch) / "logits.npy"
        request.write_text(json.dumps({"probe": probe, "text": text, "speed": speed, "out": str(out)}))
        command = [sys.executable, "-m", "mlx_distill.evaluate.fresh", str(folder), str(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Fault(f"{folder}: plain mlx_lm.load cannot open what was exported ({last[:300]})")
        found = json.loads(done.stdout.splitlines()[-1])
        return FreshLook(np.load(out, allow_pickle=False), found.pop("tokens"), found)


def check_equal(folder: Path, expected: np.ndarray, found: np.ndarray) -> float:
    """Compare logits of a reloaded folder with those of the model in memory.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        Fault: they differ by more than a thousandth.
    """
    if expected.shape != found.shape:
        raise Fault(f"{folder}: reloaded logits have shape {found.shape}, not {expected.shape}")
    gap = float(np.abs(expected - found).max() / max(1e-9, np.abs(expected).max()))
    if not gap <= 1e-3:
        raise Fault(
            f"{folder}: reloaded in a fresh process its logits differ by {gap:.2g} of the largest one"
        )
    return gap


def _child(folder: str, request: dict[str, Any]) -> None:
    import mlx.core as mx
    import mlx_lm

    before = _resident("VmRSS", reset_peak=True)
    model, tokenizer, *_ = mlx_lm.load(folder)
    logits = model(mx.array(request["probe"])[None])[0].astype(mx.float32)
    np.save(request["out"], np.array(logits))
    result: dict[str, Any] = {"tokens": tokenizer.encode(request["text"])}
    if request["speed"]:
        prompt = mx.array((request["probe"] * PROMPT)[:PROMPT])
        result |= _speed(model, prompt)
        # On the CPU, MLX's own counter counts buffers that were never touched; resident memory is true.
        if mx.default_device() == mx.gpu:
            result["peak_memory_gib"] = mx.get_peak_memory() / 2**30
        elif before is not None:
            result["peak_memory_gib"] = ((_resident("VmHWM") or 0) - before) / 2**30
        else:
            result["peak_memory_gib"] = None
            result["peak_memory_gib_why"] = "no GPU, and this system does not tell peak resident memory"
    print(json.dumps(result))


def _speed(model: Any, prompt: Any) -> dict[str, float]:
    """Medians of `REPEATS` runs, one row at a time."""
    from mlx_lm.generate import generate_step

    firsts, rests = [], []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        first = 0.0
        for place, _ in enumerate(generate_step(prompt, model, max_tokens=ANSWER)):
            if place == 0:
                first = time.perf_counter() - started
        firsts.append(first)
        rests.append((time.perf_counter() - started - first) / (ANSWER - 1))
    first, rest = statistics.median(firsts[1:]), statistics.median(rests[1:])
    return {
        "prefill_tokens_per_second": PROMPT / first,
        "decode_tokens_per_second": 1 / rest,
        "time_to_first_token_ms": first * 1e3,
    }


def _resident(name: str, *, reset_peak: bool = False) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes, where Linux tells; None elsewhere."""
    try:
        if reset_peak:  # or the peak of importing would hide a small model
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
