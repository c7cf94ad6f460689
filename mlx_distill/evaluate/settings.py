"""How each task of an evaluation was asked and judged, so that a number can be made again."""

from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.data.sources import digest
from mlx_distill.data.template import encode_prompt
from mlx_distill.evaluate.answering import SCORERS
from mlx_distill.work import Work

VERSIONS = {
    **{task: scorer.version for task, scorer in SCORERS.items()},
    "choice": 1,
    "fidelity": 1,
    "speed": 2,
}


def settings(work: Work) -> dict[str, dict[str, Any]]:
    """For each task of `evaluate.tasks`: its version, its rows, their digest, and how answers were written.

    `prompt` is the first one, as the student reads it.
    """
    options, prepared = work.recipe.evaluate, work.prepared
    writing: dict[str, Any] = {
        "seed": work.recipe.seed,
        **options.model_dump(include={"max_tokens", "samples", "batch_size"}),
        **options.model_dump(include={"temperature", "top_k", "top_p"}),
        "temperatures_tried": options.tune or None,
    }
    running = {"seconds": options.seconds}
    published = {one.name: one for one in prepared.published}
    found: dict[str, dict[str, Any]] = {}
    for task in options.tasks:
        rows = [row for row in prepared.test_rows if row.task == task]
        if task in published:
            found[task] = _of(published[task].version, published[task].rows, work) | writing | running
        elif task in SCORERS:
            found[task] = _of(VERSIONS[task], rows, work) | writing | (running if task == "code" else {})
        elif task == "choice":
            found[task] = _of(VERSIONS[task], rows, work)
        elif task == "fidelity":
            both = zip(prepared.test_rows, prepared.test, strict=True)
            rows = [row for row, ids in both if ids.start < len(ids.tokens)]  # with an answer
            found[task] = {"version": VERSIONS[task], "rows": len(rows), "digest": digest(rows)}
        elif task == "speed":
            found[task] = {"version": VERSIONS[task], "prompt_lengths": options.prompt_lengths}
        else:
            found[task] = {"tasks": options.harness, "limit": options.limit, "seed": work.recipe.seed}
    return found


def _of(version: Any, rows: list[Row], work: Work) -> dict[str, Any]:
    tokenizer = work.prepared.tokenizer
    prompt = tokenizer.decode(encode_prompt(rows[0], tokenizer)) if rows else None
    return {"version": version, "rows": len(rows), "digest": digest(rows), "prompt": prompt}
