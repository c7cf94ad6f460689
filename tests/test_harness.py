"""lm-evaluation-harness on a model in memory: real tasks of one's own where the package is there."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import workshop

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.data.template import opening
from mlx_distill.errors import DataError, MissingExtra, RecipeError
from mlx_distill.evaluate import harness as harnessed
from mlx_distill.evaluate.harness import check_harness, decoding, harness
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate, Sampling
from mlx_distill.score import log_likelihoods

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 3}}
output_type: {kind}
{more}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "x"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""
ROWS = [
    {"question": f"def add(x, {i}):", "choices": [" return x", " return x + x + x"], "right": i % 2}
    for i in range(6)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workshop.make(tmp_path_factory.mktemp("workshop"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    kinds = {
        "tiny_choice": ("multiple_choice", CHOICE),
        "tiny_written": ("generate_until", WRITTEN),
        "tiny_rolling": ("loglikelihood_rolling", ROLLING),
    }
    for name, (kind, more) in kinds.items():
        text = TASK.format(name=name, data=folder / "rows.jsonl", kind=kind, more=more)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(made: Path) -> Loaded:
    return models.load(str(made / "student"), "student.model")


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    package = pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(harnessed, "_manager", lambda: package.tasks.TaskManager(include_defaults=False))
    return package


def options(made: Path, *names: str, **more: Any) -> Evaluate:
    return Evaluate(tasks=["harness"], harness=[str(made / f"{name}.yaml") for name in names], **more)


def log_p(loaded: Loaded, tokens: list[int], vocabulary: int | None = None) -> np.ndarray:
    """(T - 1, V) log-probabilities of what follows each token, in float64 by their definition."""
    logits = np.array(loaded.model(mx.array(tokens[:-1])[None])[0].astype(mx.float32), dtype=np.float64)
    logits = logits[:, : vocabulary or max(loaded.tokenizer.get_vocab().values()) + 1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# --- log-likelihoods, for which no package is needed ---


def test_log_likelihoods_are_sums_over_counted_tokens(loaded: Loaded) -> None:
    """Of rows of unlike length in one batch, by their definition; padding, taken along, would show."""
    random_ids = np.random.default_rng(0)
    vocabulary = max(loaded.tokenizer.get_vocab().values()) - 30  # the model has more
    rows = []
    for length, start in ((2, 1), (9, 4), (40, 39), (40, 1), (33, 12)):
        rows.append(Encoded(random_ids.integers(0, vocabulary, length).tolist(), start))
    greedy = [3]
    for _ in range(5):
        greedy.append(int(log_p(loaded, [*greedy, 0], vocabulary)[-1].argmax()))
    rows += [Encoded(greedy, 2), Encoded([*greedy[:-1], (greedy[-1] + 1) % vocabulary], 2)]
    found = log_likelihoods(loaded.model, rows, vocabulary)
    for row, (value, likeliest) in zip(rows, found, strict=True):
        chances, labels = log_p(loaded, row.tokens, vocabulary)[row.start - 1 :], row.tokens[row.start :]
        assert value == pytest.approx(sum(chances[range(len(labels)), labels]), abs=1e-4)
        assert likeliest == (chances.argmax(-1) == labels).all()
    assert [likeliest for _, likeliest in found] == [False] * 5 + [True, False]


# --- what a task may ask for ---


def test_decoding_as_a_task_asks_for_it() -> None:
    assert decoding({"until": "\n", "max_gen_toks": 9}, 50) == (["\n"], 9, Sampling())
    assert decoding({"until": ["a", ""], "do_sample": False, "temperature": 0.7}, 50) == (
        ["a"],
        50,
        Sampling(),
    )
    drawn = decoding({"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "num_beams": 1}, 50)
    assert drawn == ([], 50, Sampling(temperature=0.7, top_p=0.9))
    with pytest.raises(
        RecipeError, match="`evaluate.harness`: a task asks for `num_beams` 4, which is not here"
    ):
        decoding({"num_beams": 4}, 50)


def test_numbers_are_named_by_task_metric_and_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group its own numbers alone; of a tag, which has none, those of its tasks."""
    monkeypatch.setattr(harnessed, "version", lambda name: "0.4.13")
    found = {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 10},
            "gsm8k": {"exact_match,strict": 0.2, "exact_match_stderr,strict": "N/A", "exact_match,loose": 1},
            "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.01},
            "mmlu_law": {"acc,none": 0.4, "acc_stderr,none": 0.02},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"], "gsm8k": []},
        "n-samples": {"arc_easy": {"original": 100, "effective": 10}},
        "versions": {"gsm8k": 3.0, "arc_easy": 1.0},
    }
    assert harnessed._metrics(found, ["ai2_arc", "gsm8k", "mmlu"]) == {
        "harness_arc_easy_acc": 0.5,
        "harness_arc_easy_acc_stderr": 0.1,
        "harness_arc_easy_examples": 10,
        "harness_gsm8k_exact_match_strict": 0.2,
        "harness_gsm8k_exact_match_loose": 1.0,
        "harness_mmlu_acc": 0.3,
        "harness_mmlu_acc_stderr": 0.01,
        "harness_version": "lm_eval 0.4.13, arc_easy 1.0, gsm8k 3.0",
    }


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    harnessed._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mlx-distill\[harness\]'"):
        check_harness(["arc_easy"])


# --- with the package ---


def test_unknown_tasks_are_refused_by_name() -> None:
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    harnessed._manager.cache_clear()
    check_harness(["arc_easy", "mmlu", "ai2_arc"])  # a task, a group, a tag
    for name, message in {
        "arc_easi": "has no task 'arc_easi'; did you mean arc_easy?",
        "humaneval": "humaneval runs what a model wrote outside of the sandbox; take humaneval or mbpp",
        "none.yaml": "no file none.yaml",
    }.items():
        with pytest.raises(RecipeError, match="^`evaluate.harness`: ") as caught:
            check_harness([name])
        assert message in str(caught.value)


def test_the_tasks_of_a_run(
    lm_eval: Any, made: Path, loaded: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each number by its definition, with our own encoding of what the task asks."""
    names = ("tiny_choice", "tiny_written", "tiny_rolling")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - that the harness leaves both as they were
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    found = harness(loaded, options(made, *names, limit=4, batch_size=2), seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]  # noqa: NPY002
    assert found == harness(loaded, options(made, *names, limit=4, batch_size=64), seed=0)
    assert found["harness_tiny_choice_examples"] == 4
    assert found["harness_version"].endswith(", tiny_choice 3, tiny_rolling 3, tiny_written 3")
    assert capfd.readouterr() == ("", "")

    right, normalised, nats, size = 0, 0, 0.0, 0
    for row in ROWS[:4]:
        sums = []
        for choice in row["choices"]:
            context = opening(row["question"], loaded.tokenizer)
            tokens = opening(row["question"] + choice, loaded.tokenizer)
            chances = log_p(loaded, tokens)[len(context) - 1 :]
            sums.append(sum(chances[range(len(chances)), tokens[len(context) :]]))
        right += int(np.argmax(sums)) == row["right"]
        lengths = [len(choice) for choice in row["choices"]]
        normalised += int(np.argmax(np.array(sums) / lengths)) == row["right"]
        text = loaded.tokenizer.encode(row["question"], add_special_tokens=False)
        ends = loaded.tokenizer.eos_token_id
        chances = log_p(loaded, [ends, *text])
        nats -= sum(chances[range(len(text)), text])
        size += len(row["question"].encode())
    assert found["harness_tiny_choice_acc"] == right / 4
    assert found["harness_tiny_choice_acc_norm"] == normalised / 4
    assert found["harness_tiny_rolling_bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_answers_end_before_a_stop_string(lm_eval: Any, made: Path, loaded: Loaded) -> None:
    from lm_eval.api.instance import Instance

    from mlx_distill.evaluate.harness_model import HarnessModel
    from mlx_distill.progress import silent

    model = HarnessModel(loaded, options(made, "tiny_written"), 0, silent, sys.stderr)
    prompt = "def add(x, 1):"

    def ask(*many: dict[str, Any]) -> list[str]:
        asked = [Instance("generate_until", {}, (prompt, how), i) for i, how in enumerate(many)]
        return model.generate_until(asked)

    whole = ask({"max_gen_toks": 12})[0]
    stop = whole[2:4]
    assert whole.find(stop) < whole.find(whole[-3:])
    assert ask({"until": [whole[-3:], stop, "never seen"], "max_gen_toks": 12}, {"max_gen_toks": 12}) == [
        whole[: whole.find(stop)],
        whole,
    ]
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    assert ask(drawn)[0] == ask(drawn)[0] != whole


def test_likelihoods_behind_nothing_and_behind_spaces(lm_eval: Any, made: Path, loaded: Loaded) -> None:
    """An empty context has a token in front; a space at the end of one belongs to what follows."""
    from lm_eval.api.instance import Instance

    from mlx_distill.evaluate.harness_model import HarnessModel
    from mlx_distill.progress import silent

    model = HarnessModel(loaded, options(made, "tiny_choice"), 0, silent, sys.stderr)

    def likelihood(context: str, continuation: str) -> float:
        return model.loglikelihood(
            [Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True
        )[0][0]

    ends, text = loaded.tokenizer.eos_token_id, loaded.tokenizer.encode("return x", add_special_tokens=False)
    chances = log_p(loaded, [ends, *text])
    assert likelihood("", "return x") == pytest.approx(sum(chances[range(len(text)), text]), abs=1e-4)
    assert likelihood("def f(x): ", "return x") == pytest.approx(likelihood("def f(x):", " return x"))
    long = "def f(x): " * 100 + "def f(x):"  # longer than the model reads: its last 128 tokens count
    for context in ("def f(x):", long):
        before, whole = (opening(one, loaded.tokenizer) for one in (context, context + " return x"))
        kept = whole[-129:]
        labels = whole[len(before) :]
        chances = log_p(loaded, kept)[-len(labels) :]
        assert likelihood(context, " return x") == pytest.approx(
            sum(chances[range(len(labels)), labels]), abs=1e-4
        )


def test_data_that_cannot_be_had_is_said_in_one_line(
    lm_eval: Any, made: Path, loaded: Loaded, tmp_path: Path
) -> None:
    text = TASK.format(name="gone", data=tmp_path / "gone.jsonl", kind="multiple_choice", more=CHOICE)
    (tmp_path / "gone.yaml").write_text(text, encoding="utf-8")
    asked = Evaluate(tasks=["harness"], harness=[str(tmp_path / "gone.yaml")])
    with pytest.raises(
        DataError, match=r"^`evaluate.harness` \['.*gone.yaml'\]: FileNotFoundError: "
    ) as caught:
        harness(loaded, asked, seed=0)
    assert "\n" not in str(caught.value)
