"""Memory that `plan` predicts against what a run takes: eighteen configurations, from tiny to small.

    OPENBLAS_NUM_THREADS=1 python benchmarks/plan_bench.py

Each in three processes of its own: one writes models and rows, one predicts, as `mlx-distill plan` does and
before anything has run, and one runs. The measured number is that of `memory.json`: on the CPU growth of
resident memory over the process just before models are loaded, with the cache limit of a run; on a GPU the
peak of MLX's counter. Of both the largest over all stages is compared. MLX's own counter is told beside them:
on the CPU it leaves out what the allocator keeps, and counts pages that nobody touched.

Some of the first fourteen had a say in a constant or in what is counted, as docs/memory.md tells; the last
four, `HELD_OUT`, had none. Last come the table of docs/memory.md, in Markdown, and JSON lines. `--only NAME`
runs one configuration, `--calibrate` those on which constants were fitted that need a whole run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
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
# Written down last, and measured once: no constant was touched since.
HELD_OUT = {
    "DoRA, deep and narrow": Case(
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
    "a head of its own, Jensen-Shannon": Case(
        what="qwen3 3 x 256, V 10,000, 1,024 tokens",
        vocabulary=10000,
        student={
            **SMALL,
            "model_type": "qwen3",
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "tie_word_embeddings": False,
        },
        teacher=SMALL,
        lengths=(150, 200),
        sections={"objective": {"jensen_shannon": {}}, **train(batch_tokens=1024)},
    ),
    "mixed rows, validation": Case(
        what="rows of 30 to 400 tokens, 3,072 a batch, V 6,000",
        vocabulary=6000,
        lengths=(30, 400),
        prompt=8,
        sections={**train(batch_tokens=3072, steps=6, eval_every=3), "valid": True},
    ),
}
CALIBRATION = {
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
    table.weight[1] = 2 * table.weight[1]  # or answers would hardly ever end
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
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text("".join(lines[:16]))
    asked = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows]
    (folder / "prompts.jsonl").write_text("".join(asked))


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
    student: dict[str, Any] = {"model": str(folder / "student")} if case.loaded else {"shape": case.student}
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
    elif case.student is not None:
        tree["student"] = {"model": str(folder / "student"), "method": "full"}
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
    found = json.loads((made / "memory.json").read_text())
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


def compared(name: str) -> Compared:
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            done = subprocess.run(
                [sys.executable, __file__, "--step", step, "--only", name, "--folder", folder],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{name}: {step} failed\n{done.stdout}\n{done.stderr}")
            said[step] = done.stdout.strip().rpartition("\n")[2]
    before, after = json.loads(said["predict"]), json.loads(said["run"])
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
    parser.add_argument("--step", choices=[*STEPS])
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    every = {**CASES, **HELD_OUT, **CALIBRATION}
    if asked.step:
        STEPS[asked.step](every[asked.only], asked.folder)
        return
    chosen = CALIBRATION if asked.calibrate else {**CASES, **HELD_OUT}
    if asked.only:
        chosen = {asked.only: every[asked.only]}
    lines, table, errors = [], [], dict[str, float]()
    for name, case in chosen.items():
        found = compared(name)
        errors[name] = abs(found.error)
        table.append(row_of(name, case.what, found))
        print(table[-1], flush=True)
        both = {stage: (found.stages.get(stage, 0.0), gib) for stage, gib in found.measured.items()}
        told = (f"{stage} ({1024 * one:.0f}, {1024 * other:.0f})" for stage, (one, other) in both.items())
        print("    predicted and measured, MiB:", ", ".join(told), flush=True)
        parts = (f"{part} {1024 * gib:.0f}" for part, gib in found.training.items() if gib)
        print("    predicted of training:", ", ".join(parts), flush=True)
        config = {"case": name, "stage": found.at, "predicted_gib": found.predicted}
        config |= {"measured_gib": found.measured[found.at], "mlx_counter_gib": found.counter}
        lines.append(
            {"name": "predicted_over_measured", "value": 1 + found.error, "unit": "", "config": config}
        )
    print("", HEADING, RULE, *table, sep="\n")
    if asked.calibrate or asked.only:
        return
    for of, names in {"": [*chosen], "_held_out": [*HELD_OUT]}.items():
        worst = max(errors[name] for name in names)
        config = {"cases": len(names)}
        lines.append({"name": f"worst_relative_error{of}", "value": worst, "unit": "", "config": config})
    record("plan", lines)


HEADING = (
    "| configuration | | predicted, MiB | measured, MiB | at its largest in | error | MLX's counter, MiB |"
)
RULE = "|---|---|---|---|---|---|---|"
STEPS = {"build": build, "predict": predict, "run": run_one}

if __name__ == "__main__":
    main()
