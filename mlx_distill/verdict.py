"""What a run showed, in plain sentences that say no more than its numbers do."""

from collections.abc import Mapping
from typing import Any

from mlx_distill.metrics import CUT_FROM, METRICS, Metric, Models, is_pruned, label, number, ordered

_SCORES = ("pass@1", "exact_match", "rougeL")


def verdict(models: Models) -> list[str]:
    """The sentences, most important first; one at least.

    A difference is given with its standard error where both sides have one (as if the two were
    independent, which is cautious: they answer the same problems), and is called "within two standard
    errors" where it is.
    """
    student = models.get("student")
    if student is None:
        return ["No student was evaluated; the table below holds what was."]
    scores = [METRICS[name] for name in _SCORES if METRICS[name].measured(student) is not None]
    lines = []
    for metric in scores:
        lines += _score(metric, models)
    lines += _divergence(models)
    lines += _healed(models)
    lines += _quantized(scores, models)
    lines += _decoded(models)
    if lines and "teacher" in models and "baseline" not in models:
        lines.append("No baseline was trained, so nothing here shows what the teacher added.")
    if not lines:
        lines.append("No score of the student was measured; the table below holds what was.")
    return lines


def _score(metric: Metric, models: Models) -> list[str]:
    student, teacher = models["student"], models.get("teacher")
    mine, theirs = metric.measured(student), metric.measured(teacher)
    assert mine is not None
    if theirs and teacher:
        share = mine / theirs
        verb = "keeps" if share < 1 else "reaches"
        first = (
            f"The student {verb} {_share(share)} of the teacher's {metric.name}{_share_of_parameters(models)}"
        )
        lines = [f"{first}: {metric.text(student)} against {metric.text(teacher)}."]
    else:
        lines = [f"The student's {metric.name} is {metric.text(student)}."]
    baseline, before = models.get("baseline"), models.get("student_before")
    parts = []
    if baseline and metric.measured(baseline) is not None:
        gap = _gap(metric, baseline, student)
        end = ", so here the teacher did not help" if _clearly_better(metric, baseline, student) else ""
        article = "an" if metric.name[0] in "aeiou" else "a"
        reached = f"reaches {article} {metric.name} of {metric.text(baseline)}"
        how = (
            "pruned alike and trained on labels alone, it"
            if is_pruned(models)
            else ("trained without the teacher, the same student")
        )
        parts.append(f"{how} {reached}, {gap}{end}")
    if before and metric.measured(before) is not None:
        parts.append(f"{_before(models)} its {metric.name} was {metric.text(before)}")
    if parts:
        together = "; ".join(parts)
        lines.append(f"{together[0].upper()}{together[1:]}.")
    return lines


def _divergence(models: Models) -> list[str]:
    """The student's distance to the teacher; without one, or across tokenizers, to the labels."""
    student = models["student"]
    # Nats a token of different tokens do not compare; bits a byte do.
    names = ("bits_per_byte",) if "kl_why" in student else ("kl", "nll")
    measured = [METRICS[name] for name in names if METRICS[name].measured(student) is not None]
    if not measured:
        return []
    metric = measured[0]
    beside = []
    for name, words in (
        ("teacher", "for the teacher"),
        ("baseline", "for the baseline"),
        ("student_before", "before training"),
    ):
        value = metric.measured(models.get(name))
        if name == "student_before" and is_pruned(models):
            continue  # `_healed` says it
        if value is not None and (metric.name, name) != ("kl", "teacher"):
            beside.append(f"{metric.write(value)} {words}")
    called = {"kl": "KL to the teacher", "bits_per_byte": "nll in bits per byte of text"}
    line = f"The student's {called.get(metric.name, metric.name)} is {metric.text(student)}"
    if beside:
        line += f", against {' and '.join(beside)}"
    agreement = METRICS["top1_agreement"]
    if agreement.measured(student) is not None:
        line += f"; {agreement.text(student)} of its first choices are the teacher's"
    return [f"{line}."]


def _healed(models: Models) -> list[str]:
    """What training made of a student that was cut out of another model."""
    if not is_pruned(models):
        return []
    before, student = models["student_before"], models["student"]
    mine, whole, zero = (number(before.get(key)) for key in ("parameters", CUT_FROM, "sparsity"))
    cuts = [f"Cut to {_share(mine / whole)} of the weights"] if mine and whole and mine < whole else []
    cuts += [f"with {_share(zero)} of its weights at zero"] if zero else []
    for name, words in (("kl", "KL to the teacher"), ("nll", "nll")):
        metric = METRICS[name]
        if metric.measured(before) is not None and metric.measured(student) is not None:
            values = f"{metric.write(before[name])} before healing and is {metric.text(student)} after"
            line = f"{', '.join([*cuts, f'its {words}'])} was {values}."
            return [line[0].upper() + line[1:]]
    return []


def _before(models: Models) -> str:
    return "before healing" if is_pruned(models) else "before training"


def _quantized(scores: list[Metric], models: Models) -> list[str]:
    """What each smaller model of the student takes and keeps: a line each, or one for three and more."""
    size, student, kl = METRICS["size_mib"], models["student"], METRICS["kl"]
    lines, short = [], []
    for name in [name for name in ordered(models) if name.startswith("student-")]:
        quantized = models[name]
        parts, values = [], []
        mine, whole = size.measured(quantized), size.measured(student)
        if mine is not None:
            of = f" ({_share(mine / whole)} of the student)" if whole else ""
            parts.append(f"takes {size.text(quantized)}{of}")
            values.append(size.text(quantized))
        for metric in [metric for metric in scores if metric.measured(quantized) is not None]:
            parts.append(f"scores {metric.text(quantized)} {metric.name}, {_gap(metric, quantized, student)}")
            values.append(f"{metric.text(quantized)} {metric.name}")
        if not scores and kl.measured(quantized) is not None and kl.measured(student) is not None:
            parts.append(f"has a KL to the teacher of {kl.text(quantized)}, {_gap(kl, quantized, student)}")
            values.append(f"KL {kl.write(quantized['kl'])}")
        if parts:
            lines.append(f"{name} {' and '.join(parts)}.")
            short.append(f"{name} {', '.join(values)}")
    return lines if len(lines) < 3 else [f"Smaller models of it: {'; '.join(short)}."]


def _decoded(models: Models) -> list[str]:
    """At which temperatures the answers were drawn, where each model has its own."""
    tuned = {name: found for name, found in models.items() if found.get("tuned")}
    if not tuned:
        return []
    tried = list(dict.fromkeys(t for found in tuned.values() for t in found["tuned"]))
    chosen = ", ".join(f"{label(name)} {found['temperature']:g}" for name, found in tuned.items())
    among = f"{', '.join(tried[:-1])} and {tried[-1]}" if len(tried) > 1 else tried[0]
    return [f"Each model answers at its own best of the temperatures {among} on validation rows: {chosen}."]


def _share_of_parameters(models: Models) -> str:
    metric = METRICS["parameters"]
    mine, theirs = metric.measured(models.get("student")), metric.measured(models.get("teacher"))
    return f" at {_share(mine / theirs)} of its parameters" if mine and theirs else ""


def _gap(metric: Metric, one: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """ "63.8 ± 1.6 points less", seen from `one`."""
    difference, stderr = _difference(metric, one, student)
    unit = " points" if metric.unit == "%" else ""
    spread = f" ± {metric.write(stderr)}" if stderr is not None else ""
    if metric.write(abs(difference)) == metric.write(0.0):
        return "the same"
    within = ", within two standard errors" if stderr is not None and abs(difference) < 2 * stderr else ""
    return f"{metric.write(abs(difference))}{spread}{unit} {'less' if difference < 0 else 'more'}{within}"


def _clearly_better(metric: Metric, one: Mapping[str, Any], student: Mapping[str, Any]) -> bool:
    difference, stderr = _difference(metric, one, student)
    return difference > 2 * (stderr or 0.0)


def _difference(
    metric: Metric, one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[float, float | None]:
    """How far `one` lies above `other`, and the standard error of that."""
    mine, theirs = metric.measured(one), metric.measured(other)
    assert mine is not None and theirs is not None
    errors = metric.stderr(one), metric.stderr(other)
    if errors[0] is None or errors[1] is None:
        return mine - theirs, None
    return mine - theirs, (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def _share(share: float) -> str:
    """0.9167 as "92 %"; never rounded up to 100 %, never down to 0 %."""
    digits = 0 if 0.095 <= share < 0.995 or share >= 1.005 or share == 1 else 1
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.{digits}f} %"
