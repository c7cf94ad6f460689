"""What is said of the student's distance to its teacher or to the labels."""

from mlx_distill.metrics import CUT_FROM, METRICS, Models, is_pruned, number
from mlx_distill.verdict.scores import nothing_to_distil
from mlx_distill.verdict.words import Pairs, sentence, share

_BESIDE = (
    ("teacher", "for the teacher"),
    ("baseline", "for the baseline"),
    ("student_before", "before training"),
)
_WORDS = {
    "better": "better than",
    "worse": "worse than",
    "no difference seen": "not seen to differ from",
}


def divergence(pairs: Pairs, models: Models, scored: bool) -> list[str]:
    """The student's distance to the teacher; without one, or across tokenizers, to the labels.

    Args:
        scored: a score said already whether there was anything to distil.
    """
    student = models["student"]
    # Nats a token of different tokens do not compare; bits a byte do.
    names = ("bits_per_byte",) if "kl_why" in student else ("kl", "nll")
    measured = [METRICS[name] for name in names if METRICS[name].measured(student) is not None]
    if not measured:
        return []
    metric = measured[0]
    against, told = [], []
    for name, words in _BESIDE:
        value = metric.measured(models.get(name))
        if name == "student_before" and is_pruned(models):
            continue  # `healed` says it
        if value is None or (metric.name, name) == ("kl", "teacher"):
            continue
        found = pairs.get((metric.name, "student", name))
        if found is None:
            against.append(f"{metric.write(value)} {words}")
        elif found.low is None:
            against.append(f"{metric.write(value)} {words} ({found.apart})")
        else:
            on = "" if told else f", {found.on}"
            told.append(f"{_WORDS[found.verdict]} {metric.write(value)} {words} ({found.apart}{on})")
    called = {"kl": "KL to the teacher", "bits_per_byte": "nll in bits per byte of text"}
    line = f"The student's {called.get(metric.name, metric.name)} is {metric.text(student)}"
    if against:
        line += f", against {' and '.join(against)}"
    if told:
        line += f", {' and '.join(told)}"
    agreement = METRICS["top1_agreement"]
    if agreement.measured(student) is not None:
        line += f"; {agreement.text(student)} of its first choices are the teacher's"
    labels = METRICS["bits_per_byte" if metric.name == "bits_per_byte" else "nll"]
    return [f"{line}.", *([] if scored else nothing_to_distil([labels], pairs, models))]


def healed(models: Models) -> list[str]:
    """What training made of a student that was cut out of another model."""
    if not is_pruned(models):
        return []
    before, student = models["student_before"], models["student"]
    mine, whole, zero = (number(before.get(key)) for key in ("parameters", CUT_FROM, "sparsity"))
    cuts = [f"Cut to {share(mine / whole)} of the weights"] if mine and whole and mine < whole else []
    cuts += [f"with {share(zero)} of its weights at zero"] if zero else []
    for name, words in (("kl", "KL to the teacher"), ("nll", "nll")):
        metric = METRICS[name]
        if metric.measured(before) is not None and metric.measured(student) is not None:
            values = f"{metric.write(before[name])} before healing and is {metric.text(student)} after"
            return [sentence(f"{', '.join([*cuts, f'its {words}'])} was {values}")]
    return []
