"""Memory that `plan` predicts against what a run takes: fourteen configurations, and ten that chance draws.

    OPENBLAS_NUM_THREADS=1 python benchmarks/plan_bench.py

Each in three processes of its own: one writes models and rows, one predicts, as `mlx-distill plan` does and
before anything has run, and one runs. The measured number is that of `memory.json`: on the CPU growth of
resident memory over the process just before models are loaded, with the cache limit of a run; on a GPU the
peak of MLX's counter. Of both the largest over all stages is compared. MLX's own counter is told beside them:
on the CPU it leaves out what the allocator keeps, and counts pages that nobody touched.

The fourteen `CASES` had a say in what is counted, as docs/memory.md tells; the `drawn` ones of `SEEDS` had
none. Last come the two tables of docs/memory.md, in Markdown, and JSON lines. `--only NAME` runs one
configuration ("drawn 7.1" is attempt 1 of seed 7), `--drawn FIRST LAST` some seeds, `--calibrate` whole
runs by which the model was corrected.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from record import record

SMALL = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
}
BIG = {**SMALL, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}


class Case(NamedTuple):
    """A recipe, and what it needs: models of these shapes, and rows of these lengths."""

    vocabulary: int = 2000
    student: dict[str, Any] = SMALL
    teacher: dict[str, Any] | None = BIG
    loaded: bool = False  # the student is read from a folder
    lengths: tuple[int, int] = (250, 257)  # tokens of a row
    prompt: int = 16  # of them
    sections: Mapping[str, Any] = MappingProxyType({})
    upto: str = "train"
    what: str = ""  # in the table


def train(**options: Any) -> dict[str, Any]:
    return {"train": {"batch_tokens": 4096, **options}}


LORA = {"student": {"method": "lora", "rank": 8}}
CACHED = {"teacher": {"source": "cache", "top_k": 32}}
CASES = {
    "full, live teacher": Case(
        what="4 x 192, V 2,000, teacher 6 x 384, 4,096 tokens a batch", sections=train()
    ),
    "LoRA, live teacher": Case(
        what="6 x 384, 2,048 tokens", student=BIG, loaded=True, sections={**LORA, **train(batch_tokens=2048)}
    ),
    "checkpointing": Case(
        what="6 x 384, 4,096 tokens, `gradient_checkpointing`",
        student=BIG,
        sections=train(gradient_checkpointing=True),
    ),
    "cached teacher": Case(
        what="V 8,000, 2,048 tokens, top 32", vocabulary=8000, sections={**CACHED, **train(batch_tokens=2048)}
    ),
    "long rows": Case(
        what="900 to 1,020 tokens, 4,096 a batch",
        student={**SMALL, "num_attention_heads": 3},
        lengths=(900, 1020),
        sections=train(),
    ),
    "short rows, micro-batches": Case(
        what="40 to 110 tokens, 3 x 2,048",
        lengths=(40, 110),
        prompt=8,
        sections=train(batch_tokens=2048, micro_batches=3),
    ),
    "vocabulary 32,768": Case(
        what="1,024 tokens",
        vocabulary=32768,
        teacher=SMALL,
        lengths=(120, 129),
        sections=train(batch_tokens=1024),
    ),
    "vocabulary 151,936": Case(
        what="2 x 96, 512 tokens, `logits_mib: 192`",
        vocabulary=151936,
        student={**SMALL, "hidden_size": 96, "num_hidden_layers": 2},
        teacher={**SMALL, "hidden_size": 96, "num_hidden_layers": 2},
        lengths=(120, 129),
        sections=train(batch_tokens=512, logits_mib=192),
    ),
    "on-policy": Case(
        what="answers of 64 tokens, 2,048 a batch",
        lengths=(60, 65),
        prompt=32,
        sections={**train(batch_tokens=2048), "generate": {"on_policy": {"max_tokens": 64}}},
    ),
    "quantized teacher, QAD": Case(
        what="teacher in 4 bits, 2,048 tokens",
        student=SMALL,
        upto="quantize",
        sections={
            "teacher": {"quantize": {"bits": 4, "group_size": 64}},
            "quantize": {"method": "qad", "bits": 4, "group_size": 64, "steps": 3},
            **train(batch_tokens=2048),
        },
    ),
    "mixture of experts": Case(
        what="4 x 192, 2 of 8 experts of width 256, 1,024 tokens",
        student={
            **SMALL,
            "model_type": "qwen3_moe",
            "intermediate_size": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        sections=train(batch_tokens=1024),
    ),
    "LoRA, cached teacher, checkpointing": Case(
        what="6 x 384, 1,024 tokens, top 32",
        student=BIG,
        loaded=True,
        sections={**LORA, **CACHED, **train(batch_tokens=1024, gradient_checkpointing=True)},
    ),
    "labels alone, grouped heads": Case(
        what="6 x 192, feed-forward 1,024, 2 of 6 heads have keys, V 12,000, 1,024 tokens",
        vocabulary=12000,
        student={
            **SMALL,
            "model_type": "qwen3",
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
        },
        teacher=None,
        sections=train(batch_tokens=1024),
    ),
    "evaluation of both models": Case(
        what="4 x 192, V 16,000, reverse KL, 512 tokens, fidelity on 16 rows",
        vocabulary=16000,
        teacher=SMALL,
        lengths=(120, 129),
        upto="evaluate",
        sections={
            "objective": {"reverse_kl": {}},
            "evaluate": {"tasks": ["fidelity"], "baseline": False},
            "tested": True,
            **train(batch_tokens=512),
        },
    ),
}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skewed_forward_kl",
    "adaptive_kl",
)


def drawn(seed: int, attempt: int = 0) -> Case:
    """A configuration that nobody chose: each number of it is drawn by itself.

    Args:
        attempt: of several for a seed, until one is predicted to take what is asked for.
    """
    random = np.random.default_rng([seed, attempt])

    def chance(share: float) -> bool:
        return bool(random.random() < share)

    def one_of(*values: Any) -> Any:
        return values[random.integers(len(values))]

    def between(low: float, high: float) -> int:
        """Even on a scale of logarithms, both ends included."""
        return round(float(np.exp(random.uniform(np.log(low), np.log(high)))))

    def shape() -> dict[str, Any]:
        kind, hidden = one_of("llama", "llama", "qwen3", "qwen3_moe"), 32 * between(2, 12)
        heads = one_of(*(n for n in (2, 4, 6, 8, 12) if hidden % n == 0 and hidden // n % 8 == 0))
        ratio = random.uniform(1.0, 4.0)
        experts = {"num_experts": one_of(4, 8), "num_experts_per_tok": 2} if kind == "qwen3_moe" else {}
        return {
            "model_type": kind,
            "hidden_size": hidden,
            "intermediate_size": 16 * round(ratio * hidden / (32 if experts else 16)),
            "num_hidden_layers": between(2, 12),
            "num_attention_heads": heads,
            "num_key_value_heads": one_of(heads, *(n for n in (1, 2, 4) if heads % n == 0)),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": chance(0.6),
            **experts,
        }

    student, taught, cached = shape(), chance(0.8), chance(0.4)
    while True:
        teacher = shape() if taught else None
        if teacher is None or teacher["num_hidden_layers"] * teacher["hidden_size"] >= 256:
            break
    vocabulary = between(500, 40000)
    # Experts are no matrices that DoRA can split into length and direction.
    method = one_of("full", "full", "lora", "lora" if "num_experts" in student else "dora")
    short = between(24, 400)
    lengths = (
        (short, short + 1) if chance(0.5) else (short, min(512, round(short * random.uniform(1.2, 4)) + 1))
    )
    tokens, passes, steps = between(512, 4096), one_of(1, 1, 2, 3), int(random.integers(3, 9))
    options: dict[str, Any] = {"batch_tokens": tokens, "micro_batches": passes, "steps": steps}
    options |= {"gradient_checkpointing": True} if chance(0.25) else {}
    sections: dict[str, Any] = {}
    if method != "full":
        sections["student"] = {"method": method, "rank": one_of(4, 8, 16, 32)}
    if taught and cached:
        sections["teacher"] = {"source": "cache", "top_k": one_of(8, 16, 32, 64)}
    loss = one_of(*DIVERGENCES) if taught else "cross_entropy"
    sections["objective"] = {loss: {}}
    if taught and chance(0.3):
        sections["objective"] = {loss: {"weight": 0.7}, "cross_entropy": {"weight": 0.3}}
    if chance(0.3):
        sections["valid"] = True
        options["eval_every"] = 2
    if compares := taught and chance(0.3):
        sections |= {"evaluate": {"tasks": ["fidelity"], "baseline": False}, "tested": True}
    told = [
        f"{student['model_type']} {student['num_hidden_layers']} x {student['hidden_size']}",
        f"V {vocabulary:,}",
        f"{lengths[0]} to {lengths[1] - 1} tokens a row"
        if lengths[1] > short + 1
        else f"{short} tokens a row",
        f"{passes} x {tokens:,}",
        method,
        " + ".join(sections["objective"]),
    ]
    if teacher is not None:
        source = f"top {sections['teacher']['top_k']} of" if cached else "live"
        told.append(f"{source} {teacher['num_hidden_layers']} x {teacher['hidden_size']}")
    told += ["checkpointing"] if "gradient_checkpointing" in options else []
    told += ["validation"] if "valid" in sections else []
    told += ["fidelity"] if compares else []
    return Case(
        vocabulary=vocabulary,
        student=student,
        teacher=teacher,
        loaded=method != "full" or chance(0.3),
        lengths=lengths,
        prompt=int(random.integers(4, 1 + short // 2)),
        sections={**sections, "train": options},
        upto="evaluate" if compares else "train",
        what=", ".join(told),
    )


CALIBRATION = {
    "DoRA": Case(
        what="10 x 128, 2 x 1,024 tokens",
        student={
            **SMALL,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
        },
        teacher=SMALL,
        loaded=True,
        lengths=(80, 91),
        sections={"student": {"method": "dora", "rank": 16}, **train(batch_tokens=1024, micro_batches=2)},
    ),
    "answers, then their cache": Case(
        what="V 4,000, 24 answers at a time of up to 128 tokens, top 16, 2,048 tokens",
        vocabulary=4000,
        lengths=(60, 65),
        sections={
            "teacher": {"source": "cache", "top_k": 16},
            "generate": {"max_tokens": 128, "batch_size": 24},
            "asked": True,
            **train(batch_tokens=2048),
        },
    ),
    "mixed rows, validation": Case(
        what="rows of 30 to 400 tokens, 3,072 a batch, V 6,000",
        vocabulary=6000,
        lengths=(30, 400),
        prompt=8,
        sections={**train(batch_tokens=3072, steps=6, eval_every=3), "valid": True},
    ),
    "plain": Case(teacher=None, sections=train(batch_tokens=2048)),
    "wide": Case(student=BIG, teacher=None, sections=train(batch_tokens=2048)),
    "short": Case(lengths=(60, 65), sections=train(batch_tokens=2048)),
    "mixed lengths": Case(lengths=(100, 250), teacher=None, sections=train(batch_tokens=2048, steps=8)),
    "micro": Case(student=BIG, teacher=None, sections=train(batch_tokens=1024, micro_batches=2)),
    "answers": Case(
        lengths=(60, 65),
        upto="generate",
        sections={**train(), "generate": {"max_tokens": 96, "batch_size": 32}, "asked": True},
    ),
    "own": Case(
        student=BIG,
        lengths=(120, 129),
        prompt=64,
        sections={**train(batch_tokens=1024), "generate": {"on_policy": {"max_tokens": 32}}},
    ),
    "validation": Case(
        vocabulary=4000,
        lengths=(120, 129),
        sections={**train(batch_tokens=1024, eval_every=2), "valid": True},
    ),
    "qad": Case(
        student=BIG,
        upto="quantize",
        sections={
            "quantize": {"method": "qad", "bits": 4, "group_size": 64, "steps": 2},
            **train(batch_tokens=1024),
        },
    ),
    "dwq": Case(
        upto="quantize",
        sections={
            "quantize": {"method": "dwq", "bits": 4, "group_size": 64, "steps": 2},
            **train(batch_tokens=1024),
        },
    ),
    "stored": Case(
        vocabulary=4000, sections={"teacher": {"source": "cache", "top_k": 16}, **train(batch_tokens=1024)}
    ),
    "stored, large": Case(
        vocabulary=20000,
        teacher=SMALL,
        lengths=(120, 129),
        sections={"teacher": {"source": "cache", "top_k": 64}, **train(batch_tokens=512)},
    ),
    "features": Case(
        sections={
            "objective": {"forward_kl": {}, "hidden_mse": {"layers": "last", "weight": 0.1}},
            **train(batch_tokens=2048),
        },
    ),
    "exits": Case(
        vocabulary=8000,
        teacher=None,
        sections={
            "objective": {"cross_entropy": {}, "exit_cross_entropy": {"exits": [2, 3]}},
            **train(batch_tokens=2048),
        },
    ),
}


def build(case: Case, folder: Path) -> None:
    """Models and rows of a configuration, in a process whose memory nobody measures."""
    from mlx_distill import models
    from mlx_distill.options import Shape

    tokenizer = words(case.vocabulary)
    teacher = models.build(Shape(**(case.teacher or case.student)), tokenizer, 1)
    network: Any = teacher.model
    table = network.model.embed_tokens
    table.weight[1] = 4 * table.weight[1]  # or answers would hardly ever end
    models.save(folder / "teacher", teacher)
    models.save(folder / "student", models.build(Shape(**case.student), tokenizer, 2))
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(case.lengths[0], case.lengths[1], size=64):
        ids = random.integers(10, case.vocabulary, size=int(length) - 1)
        text = [f"w{number}" for number in ids]
        rows.append(
            {"prompt": " ".join(text[: case.prompt]) + " ", "completion": " ".join(text[case.prompt :])}
        )
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(lines[:16]), encoding="utf-8")
    asked = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(asked), encoding="utf-8")


def words(size: int) -> Any:
    """A tokenizer with a word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(fast)


def recipe_of(case: Case, folder: Path) -> dict[str, Any]:
    sections = dict(case.sections)
    asked, valid = sections.pop("asked", False), sections.pop("valid", False)
    student: dict[str, Any] = {"shape": case.student}  # in the words of its teacher
    if case.loaded or case.teacher is None:
        student = {"model": str(folder / "student"), "method": "full"}
    data: dict[str, Any] = {"max_tokens": case.lengths[1] + case.prompt + 128}
    data |= {"prompts": str(folder / "prompts.jsonl")} if asked else {"train": str(folder / "train.jsonl")}
    data |= {"valid": str(folder / "valid.jsonl")} if valid else {}
    data |= {"test": str(folder / "valid.jsonl")} if sections.pop("tested", False) else {}
    tree: dict[str, Any] = {
        "name": "measured",
        "student": {**student, **sections.pop("student", {})},
        "data": data,
        "objective": {"forward_kl": {}} if case.teacher is not None else {"cross_entropy": {}},
        "evaluate": {"tasks": []},
        "export": {"formats": []},
    }
    if case.teacher is not None:
        tree["teacher"] = {"model": str(folder / "teacher"), **sections.pop("teacher", {})}
    options = {"steps": 3, "learning_rate": 1e-4, "log_every": 0, "save_every": 0, "compile": False}
    return {**tree, **sections, "train": {**options, **sections.pop("train")}}


def predict(case: Case, folder: Path) -> None:
    """What `mlx-distill plan` says of each stage, in GiB, as the last line."""
    from mlx_distill.preflight import prepare
    from mlx_distill.recipe import decode

    found = prepare(decode(recipe_of(case, folder))).memory
    stages = {name: parts.together for name, parts in found.by_stage.items()}
    print(json.dumps({"stages": stages, "training": found.training._asdict()}))


def run_one(case: Case, folder: Path) -> None:
    """The run itself; its memory.json and MLX's own counter as the last line."""
    import mlx_distill  # noqa: F401, I001  (before mlx, whose BLAS it replaces)
    import mlx.core as mx
    from mlx_distill.console import Console
    from mlx_distill.pipeline import run
    from mlx_distill.recipe import decode

    made = run(decode(recipe_of(case, folder)), Console(), upto=case.upto, root=folder / "runs")
    found = json.loads((made / "memory.json").read_text(encoding="utf-8"))
    # Since the process began; on a GPU a run sets it back at each stage, and measures by it anyway.
    print(json.dumps({**found, "counter": mx.get_peak_memory() / 2**30}))


class Compared(NamedTuple):
    """A configuration predicted, then measured; all in GiB."""

    stages: dict[str, float]  # predicted
    training: dict[str, float]  # predicted, part by part
    measured: dict[str, float]
    counter: float  # of MLX, at its largest

    @property
    def predicted(self) -> float:
        return max(self.stages.values())

    @property
    def at(self) -> str:
        return max(self.measured, key=self.measured.__getitem__)

    @property
    def error(self) -> float:
        return self.predicted / self.measured[self.at] - 1


def named(name: str) -> Case:
    """A configuration by its name; of a drawn one that is its seed and, behind a dot, the attempt."""
    if name in CASES or name in CALIBRATION:
        return {**CASES, **CALIBRATION}[name]
    seed, _, attempt = name.removeprefix(DRAWN).partition(".")
    return drawn(int(seed), int(attempt or 0))


def drawn_and_compared(seed: int) -> tuple[Case, Compared]:
    """The first attempt of a seed that is predicted to take what `WITHIN` says."""
    for attempt in range(100):
        found = compared(f"{DRAWN}{seed}.{attempt}", WITHIN)
        if found is not None:
            return drawn(seed, attempt), found
    raise SystemExit(f"seed {seed}: nothing of a size that can be measured")


def compared(name: str, within: tuple[float, float] = (0.0, math.inf)) -> Compared | None:
    """A configuration predicted and measured; None where the prediction in GiB is not within these."""
    with tempfile.TemporaryDirectory() as folder:

        def said(step: str) -> Any:
            done = subprocess.run(
                [sys.executable, __file__, "--step", step, "--only", name, "--folder", folder],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{name}: {step} failed\n{done.stdout}\n{done.stderr}")
            return json.loads(done.stdout.strip().rpartition("\n")[2] or "null")

        said("build")
        before = said("predict")
        if not within[0] <= max(before["stages"].values()) <= within[1]:
            return None
        after = said("run")
    if before["stages"] != after["predicted_stages_gib"]:
        raise SystemExit(
            f"{name}: the run predicted {after['predicted_stages_gib']}, the plan {before['stages']}"
        )
    measured = {stage: gib for stage, gib in after["measured_gib"].items() if gib is not None}
    return Compared(before["stages"], before["training"], measured, after["counter"])


def row_of(name: str, what: str, found: Compared) -> str:
    mib = [round(1024 * gib) for gib in (found.predicted, found.measured[found.at], found.counter)]
    cells = [
        name,
        what,
        *(f"{one:,}" for one in mib[:2]),
        found.at,
        f"{100 * found.error:+.1f} %",
        f"{mib[2]:,}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--drawn", type=int, nargs=2, metavar=("FIRST", "LAST"))
    parser.add_argument("--step", choices=[*STEPS])
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.step:
        STEPS[asked.step](named(asked.only), asked.folder)
        return
    whole = not (asked.only or asked.calibrate or asked.drawn)
    first, last = asked.drawn or SEEDS
    names = [asked.only] if asked.only else [*CALIBRATION] if asked.calibrate else [*CASES] if whole else []
    seeds = range(first, last + 1) if whole or asked.drawn else ()
    lines, tables, errors = [], dict[str, list[str]](), dict[str, list[float]]()

    def told(name: str, case: Case, found: Compared, of: str) -> None:
        errors.setdefault(of, []).append(found.error)
        tables.setdefault(of, []).append(row_of(name, case.what, found))
        print(tables[of][-1], flush=True)
        both = {stage: (found.stages.get(stage, 0.0), gib) for stage, gib in found.measured.items()}
        each = (f"{stage} ({1024 * one:.0f}, {1024 * other:.0f})" for stage, (one, other) in both.items())
        print("    predicted and measured, MiB:", ", ".join(each), flush=True)
        parts = (f"{part} {1024 * gib:.0f}" for part, gib in found.training.items() if gib)
        print("    predicted of training:", ", ".join(parts), flush=True)
        config = {"case": name, "stage": found.at, "predicted_gib": found.predicted}
        config |= {"measured_gib": found.measured[found.at], "mlx_counter_gib": found.counter}
        lines.append(
            {"name": "predicted_over_measured", "value": 1 + found.error, "unit": "", "config": config}
        )

    for name in names:
        found = compared(name)
        assert found is not None  # whatever is predicted
        told(name, named(name), found, "")
    for seed in seeds:
        told(f"{DRAWN}{seed}", *drawn_and_compared(seed), "_held_out")
    for table in tables.values():
        print("", HEADING, RULE, *table, sep="\n")
    for of, found in errors.items():
        sizes = [abs(error) for error in found]
        for which, value in {"worst": max(sizes), "median": median(sizes)}.items():
            config = {"cases": len(sizes), "lowest": min(found), "highest": max(found)}
            lines.append(
                {"name": f"{which}_relative_error{of}", "value": value, "unit": "", "config": config}
            )
    if whole:
        record("plan", lines)
    else:
        print(*map(json.dumps, lines), sep="\n")


HEADING = (
    "| configuration | | predicted, MiB | measured, MiB | at its largest in | error | MLX's counter, MiB |"
)
RULE = "|---|---|---|---|---|---|---|"
DRAWN = "drawn "  # before the seed
SEEDS = (1000, 1009)  # the first and last of those that are recorded
WITHIN = (0.15, 3.0)  # GiB predicted of a drawn one
STEPS = {"build": build, "predict": predict, "run": run_one}

if __name__ == "__main__":
    main()
