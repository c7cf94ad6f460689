"""What went into a student: where its lessons came from, and the memory that it took."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.run_record import RunRecord

_PARTS = ("student", "teachers", "logits")  # of `predicted_gib`, in the page's colours 1, 0 and 4
_COLORS = {"student": 1, "teachers": 0, "logits": 4}


def counted(generated: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many answers were written and kept, and how many each filter dropped; None without any."""
    if not generated:
        return None
    kept = sum(1 for row in generated if row.get("kept"))
    reasons = [str(row.get("reason") or "no reason given") for row in generated if not row.get("kept")]
    dropped = Counter(reason.partition(":")[0] for reason in reasons)  # the filter, without what it measured
    return {"written": len(generated), "kept": kept, "dropped": dropped.most_common()}


def lineage(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Of each run the steps from prompts to tokens trained on, and what was dropped on the way."""
    made = []
    for run in runs:
        found = counted(run.generated)
        steps = _steps(run, found)
        if steps or found:
            dropped = found["dropped"] if found else []
            most = max((number for _, number in dropped), default=1)
            rows = [
                {"reason": reason, "number": number, "share": f"{100 * number / most:.1f}"}
                for reason, number in dropped
            ]
            made.append({"name": run.name if len(runs) > 1 else None, "steps": steps, "dropped": rows})
    return made


def _steps(run: RunRecord, found: Mapping[str, Any] | None) -> list[dict[str, str]]:
    steps = []

    def add(number: float, what: str, note: str = "") -> None:
        steps.append(
            {"number": f"{number:,}" if number < 1e6 else m.count(number), "what": what, "note": note}
        )

    if found:
        prompts = len({str(row.get("row", row.get("prompt"))) for row in run.generated})
        add(prompts, "prompts")
        per = found["written"] / prompts
        add(found["written"], "answers written", f"{per:.3g} to each prompt" if per > 1 else "")
        lost = found["written"] - found["kept"]
        share = f"{lost:,} dropped ({100 * lost / found['written']:.2g} %)" if lost else "none dropped"
        add(found["kept"], "kept", share)
    train, baseline = run.stage("train"), run.stage("baseline")
    rows, tokens = m.number(train.get("rows")), m.number(train.get("train_tokens"))
    if rows is not None:
        labelled = m.number(baseline.get("rows"))
        note = ""
        if labelled is not None and labelled <= rows:
            note = (
                f"{labelled:,} labelled, {rows - labelled:,} answers" if rows > labelled else "all labelled"
            )
        add(rows, "rows to learn from", note)
    if tokens is not None:
        theirs = m.number(baseline.get("train_tokens"))
        add(tokens, "tokens learned", f"the baseline: {m.count(theirs)}, labels alone" if theirs else "")
    return steps


def memory(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Predicted against measured GiB as bars of one scale; None where no run has a memory.json."""
    known = [(run, run.memory) for run in runs if run.memory]
    groups, notes = [], list[str]()
    for run, found in known:
        predicted, measured = _numbers(found.get("predicted_gib")), _numbers(found.get("measured_gib"))
        rows = []
        if "together" in predicted:
            parts = [(name, predicted[name]) for name in _PARTS if name in predicted]
            rows.append(("predicted for training", predicted["together"], parts))
        worked = [stage for stage in measured if run.stages.get(stage, True) and stage != "report"]
        rows += [(f"measured: {stage}", measured[stage], [("", measured[stage])]) for stage in worked]
        of = f"{run.name}: " if len(runs) > 1 else ""
        machine, most = m.number(found.get("machine_gib")), max(measured.values(), default=None)
        if machine:
            notes.append(f"{of}The machine lends {m.three_digits(machine)} GiB.")
        if found.get("why"):
            notes.append(f"{of}Not measured: {found['why']}.")
        elif measured and found.get("how"):
            notes.append(f"{of}Measured is {found['how']}, the largest while each stage ran.")
        train = measured.get("train", most)
        if train and predicted.get("together"):
            ratio = predicted["together"] / train
            notes.append(f"{of}Predicted is {ratio:.2g} times what training took.")
        if rows:
            groups.append({"name": run.name if len(runs) > 1 else "", "rows": rows})
    if not groups and not notes:
        return None
    scale = max((peak for group in groups for _, peak, _ in group["rows"]), default=1.0) or 1.0
    for group in groups:
        group["rows"] = [
            {
                "label": label,
                "text": m.three_digits(peak),
                "exact": repr(peak),
                "parts": [
                    {"color": _COLORS.get(name, 3), "width": f"{100 * part / scale:.2f}"}
                    for name, part in parts
                ],
            }
            for label, peak, parts in group["rows"]
        ]
    drawn = any(len(row["parts"]) > 1 for group in groups for row in group["rows"])
    legend = [(_COLORS[name], name) for name in _PARTS] if drawn else []
    return {"groups": groups, "legend": legend, "notes": notes}


def _numbers(found: Any) -> dict[str, float]:
    items = found.items() if isinstance(found, dict) else []
    return {str(name): value for name, raw in items if (value := m.number(raw)) is not None and value >= 0}
