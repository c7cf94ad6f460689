"""The metrics of `evaluation.json`: their order, units, better direction, and how they are written.

One place, so that the report, the verdict and the command line write a number alike.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Models = Mapping[str, Mapping[str, Any]]  # `models` of evaluation.json: model -> metric -> value


class Metric(NamedTuple):
    """A metric as a column: `write` gives the number without its unit."""

    name: str
    meaning: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    write: Callable[[float], str] = lambda value: f"{value:.3f}"

    @property
    def heading(self) -> str:
        """The name without its unit, which stands below it in a table."""
        for unit in ("_tokens_per_second", "_per_token", "_seconds", "_mib", "_gib", "_ms"):
            if self.unit and self.name.endswith(unit):
                name = self.name.removesuffix(unit).replace("_", " ")
                return f"{name} time" if unit == "_seconds" else name
        return self.name.replace("_", " ")

    def measured(self, metrics: Mapping[str, Any] | None) -> float | None:
        """The value where there is a finite one."""
        return number((metrics or {}).get(self.name))

    def stderr(self, metrics: Mapping[str, Any] | None) -> float | None:
        return number((metrics or {}).get(f"{self.name}_stderr"))

    def spread(self, metrics: Mapping[str, Any] | None) -> float | None:
        """Half the distance between the quartiles of repeated measurements, of speed and energy."""
        return number((metrics or {}).get(f"{self.name}_spread"))

    def text(self, metrics: Mapping[str, Any]) -> str:
        """The measured value with its standard error and unit, as a sentence has it."""
        value, stderr = self.measured(metrics), self.stderr(metrics)
        assert value is not None
        spread = f" ± {self.write(stderr)}" if stderr else ""
        return f"{self.write(value)}{spread}{f' {self.unit}' if self.unit else ''}"


def number(value: Any) -> float | None:
    """`value` where it is a finite number that a float can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def percent(share: float) -> str:
    """0.9167 as "91.7"."""
    return f"{100 * share:.1f}"


def count(value: float) -> str:
    """1029312 as "1.03 M"; below ten thousand every digit."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else 0.9995 * size):
            return f"{value / size:#.3g}".rstrip(".") + f" {letter}"
    return f"{value:,.0f}"


def three_digits(value: float) -> str:
    """Three significant digits, and every digit before the point."""
    size = abs(value)
    if size == 0:
        return "0"
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4}f}"


def seconds(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


QUALITY = (
    Metric("pass@1", "share of problems whose tests the first answer passes", "%", "higher", percent),
    Metric("pass@5", "share of problems that at least one of 5 answers solves", "%", "higher", percent),
    Metric("pass@10", "share of problems that at least one of 10 answers solves", "%", "higher", percent),
    Metric("humaneval_pass@1", "the same on HumanEval: of first answers", "%", "higher", percent),
    Metric("humaneval_pass@5", "of 5 answers at least one", "%", "higher", percent),
    Metric("humaneval_pass@10", "of 10 answers at least one", "%", "higher", percent),
    Metric("mbpp_pass@1", "the same on MBPP: of first answers", "%", "higher", percent),
    Metric("mbpp_pass@5", "of 5 answers at least one", "%", "higher", percent),
    Metric("mbpp_pass@10", "of 10 answers at least one", "%", "higher", percent),
    Metric("exact_match", "share of answers that equal a reference", "%", "higher", percent),
    Metric("accuracy", "share of choices that are right, by their probability", "%", "higher", percent),
    Metric("accuracy_normalised", "the same, by their probability a byte", "%", "higher", percent),
    Metric("rougeL", "longest common word sequence with the best reference", "", "higher"),
    Metric("rouge1", "common words with the best reference", "", "higher"),
    Metric("rouge2", "common word pairs with the best reference", "", "higher"),
    Metric("length_ratio", "words by those of the reference nearest in length"),
    Metric("copy_rate", "share of runs of four words that stand in the source", "%", "", percent),
    Metric("unfaithful", "share of names and numbers that are not in the source", "%", "lower", percent),
    Metric("kl", "mean KL(teacher‖model)", "nats/token", "lower"),
    Metric("kl_median", "median over tokens of KL(teacher‖model)", "nats/token", "lower"),
    Metric("kl_p95", "95th percentile over tokens of KL(teacher‖model)", "nats/token", "lower"),
    Metric("top1_agreement", "tokens whose likeliest choice is the teacher's", "%", "higher", percent),
    Metric("nll", "-log of the probability of the labels", "nats/token", "lower"),
    Metric("bits_per_byte", "the same, in bits per byte of text", "", "lower"),
    Metric("perplexity", "e to the nll", "", "lower", three_digits),
    Metric("ece", "expected calibration error", "", "lower"),
    Metric("unfinished", "share of answers that were cut off", "%", "lower", percent),
    Metric("empty", "share of answers without a word", "%", "lower", percent),
    Metric("temperature", "at which the answers were drawn; 0: the likeliest token", write="{:g}".format),
)
COST = (
    Metric("parameters", "numbers in the weights", "", "lower", count),
    Metric("sparsity", "share of the weights that are zero", "%", "", percent),
    Metric("size_mib", "weights on disk", "MiB", "lower", three_digits),
    Metric("bits_per_weight", "of a quantized model, scales included", "bits", "lower", three_digits),
    Metric("prefill_tokens_per_second", "reading a prompt", "tokens/s", "higher", three_digits),
    Metric("decode_tokens_per_second", "writing an answer", "tokens/s", "higher", three_digits),
    Metric("time_to_first_token_ms", "from the prompt to the first token", "ms", "lower", three_digits),
    Metric("peak_memory_gib", "largest memory in use", "GiB", "lower", three_digits),
    Metric("joules_per_token", "energy of writing, beyond rest", "J/token", "lower", three_digits),
    Metric("joules_per_token_gross", "the same, with that at rest", "J/token", "lower", three_digits),
    Metric("joules_per_prompt_token", "energy of reading, beyond rest", "J/token", "lower", three_digits),
    Metric("idle_watts", "power at rest, before", "W", "", three_digits),
    Metric("train_tokens", "counted tokens trained on", "", "", count),
    Metric("train_seconds", "time in training", "s", "", seconds),
)
METRICS = {metric.name: metric for metric in (*QUALITY, *COST)}

SCORES = {  # of which more is better, by the task of `evaluate.tasks` that measures them, the first one first
    "code": ("pass@1", "pass@5", "pass@10"),
    "humaneval": ("humaneval_pass@1", "humaneval_pass@5", "humaneval_pass@10"),
    "mbpp": ("mbpp_pass@1", "mbpp_pass@5", "mbpp_pass@10"),
    "exact": ("exact_match",),
    "choice": ("accuracy", "accuracy_normalised"),
    "summary": ("rougeL", "rouge1", "rouge2"),
    "fidelity": ("top1_agreement",),
}

COLORS = {"teacher": 0, "student": 1, "baseline": 2, "student_before": 3}  # the page's --c0 to --c3
LABELS = {"student_before": "student before training", "baseline": "baseline, no teacher"}
_OF_PRUNED = {
    "student_before": "pruned, before healing",
    "baseline": "baseline: pruned and trained on labels alone",
}
CUT_FROM = "weights_before_pruning"  # metric of `student_before`, if it was cut out of another model


def label(model: str, models: Models | None = None) -> str:
    """The name of a model of `evaluation.json`, as people read it.

    Args:
        models: all of the run: a student that was cut out of another model has other controls.
    """
    return (_OF_PRUNED if is_pruned(models or {}) else LABELS).get(model, model)


def is_pruned(models: Models) -> bool:
    """Whether the student was cut out of another model."""
    return CUT_FROM in models.get("student_before", {})


def color(model: str) -> int:
    """Which of the report's colours a model has, everywhere on the page."""
    return COLORS.get(model, 4)


def ordered(models: Models) -> list[str]:
    """Names of the models as the table lists them; those with no fixed place last, the largest first."""
    first = ("teacher", "student_before", "baseline", "student")
    rest = [name for name in models if name not in first]
    rest.sort(key=lambda name: -(number(models[name].get("size_mib")) or float("inf")))
    return [*(name for name in first if name in models), *rest]


def others(models: Models) -> tuple[Metric, ...]:
    """Columns for the numbers that `models` hold beyond the metrics above."""
    known = {metric.name for metric in (*QUALITY, *COST)}
    names = {
        name: None
        for metrics in models.values()
        for name, value in metrics.items()
        if name not in known and (value is None or number(value) is not None)
    }
    extra = [
        name
        for name in names
        if not name.endswith(("_stderr", "_spread", "_why", "_problems", "_examples"))
        and name not in ("problems", "questions", "summaries", "choices")
    ]
    return tuple(_unlisted(name) for name in extra)


def _unlisted(name: str) -> Metric:
    """A metric that is not above; of those of lm-evaluation-harness the usual ones are understood."""
    if name.startswith("harness_") and re.search(r"_(acc|acc_norm|acc_bytes|exact_match)(_[a-z-]+)?$", name):
        return Metric(name, "as lm-evaluation-harness has it", "%", "higher", percent)
    if name.startswith("harness_") and name.endswith(("perplexity", "bits_per_byte")):
        return Metric(name, "as lm-evaluation-harness has it", "", "lower", three_digits)
    return Metric(name, "", write=lambda value: f"{value:.6g}")
