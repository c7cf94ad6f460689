"""Tasks of lm-evaluation-harness, on a model that is in memory. Needs the extra `harness`.

mlx-lm has an adapter of its own (`mlx_lm.evaluate`). It opens the model anew, gives an empty context -inf,
leaves out the first token of a text whose likelihood is asked for, and draws greedily where a task asks for
a temperature; tests/test_upstream.py holds that, and says when it is no longer so.
"""

import contextlib
import difflib
import functools
import io
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.errors import DataError, MissingExtra, RecipeError
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate, Sampling
from mlx_distill.progress import Progress, silent

_NEUTRAL = (None, False, 0, 1, 1.0, "")  # values by which an option that we lack changes nothing


def check_harness(names: Sequence[str]) -> None:
    """Refuse names that are no tasks, before a model is loaded. Takes some seconds: there are 14,000 tasks.

    Args:
        names: of tasks, groups or tags of the harness, or YAML files with tasks of one's own.

    Raises:
        MissingExtra: the package `lm_eval` is not installed.
        RecipeError: no task of that name, or one that runs what a model wrote outside of the sandbox.
    """
    index = _manager().task_index
    for name in names:
        if Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise RecipeError(f"`evaluate.harness`: no file {name}")
        elif name not in index:
            near = difflib.get_close_matches(name, index, n=1, cutoff=0.6)
            advice = f"; did you mean {near[0]}?" if near else "; `lm-eval ls tasks` lists them"
            raise RecipeError(f"`evaluate.harness`: lm-evaluation-harness has no task {name!r}{advice}")
        elif (index[name].cfg or {}).get("unsafe_code"):
            raise _unsafe(name)


def harness(loaded: Loaded, options: Evaluate, *, seed: int, progress: Progress = silent) -> dict[str, Any]:
    """What the harness measures of a model on `options.harness`.

    Prompts go through the model's chat template where it has one, as in mlx-lm, with the number of examples
    that the task has.

    Args:
        options: `harness`, `limit` examples of each task, `batch_size`, and `max_tokens` where a task says
            nothing.
        seed: of the examples that a task chooses, and of answers that it draws.

    Returns:
        harness_TASK_METRIC and harness_TASK_METRIC_stderr, with _FILTER behind the metric where there is one;
        harness_TASK_examples, how many were asked; and harness_version, of the package and its tasks.

    Raises:
        DataError: the data of a task cannot be had: it comes from the Hub.
        RecipeError: a task asks for what cannot be done here.
    """
    manager = _manager()
    from lm_eval import simple_evaluate

    from mlx_distill.evaluate.harness_model import HarnessModel

    shown = sys.stderr
    with _undisturbed():
        model = HarnessModel(loaded, options, seed, progress, shown)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its bars
                found: Any = simple_evaluate(
                    model=model,
                    tasks=list(options.harness),
                    task_manager=manager,
                    limit=options.limit,
                    apply_chat_template=model.has_template,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=None,
                    fewshot_random_seed=seed,
                )
        except (OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"`evaluate.harness` {options.harness}: {type(error).__name__}: {reason}"
            ) from error
        except ValueError as error:
            if "unsafe" in str(error):
                raise _unsafe(", ".join(options.harness)) from None
            raise
    return _metrics(found, options.harness)


@functools.cache
def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra(
            "`evaluate.harness` needs lm-evaluation-harness: pip install 'mlx-distill[harness]'"
        ) from None
    return TaskManager()


def _unsafe(name: str) -> RecipeError:
    return RecipeError(
        f"`evaluate.harness`: {name} runs what a model wrote outside of the sandbox; "
        "take humaneval or mbpp of `evaluate.tasks`"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness seeds the global random numbers, which tasks draw from; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _metrics(found: dict[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """The numbers of the tasks and groups that were asked for; of a tag or a file, of all its tasks."""
    results, groups = found["results"], found.get("group_subtasks", {})
    inside = {task for name in results for task in groups.get(name, [])}
    names = [name for name in results if name in asked or name not in inside]
    metrics: dict[str, Any] = {}
    for name in names:
        for key, value in results[name].items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or not filtered:
                continue  # the alias, and "N/A" for an error that is not known
            kind, stderr = metric.removesuffix("_stderr"), "_stderr" * metric.endswith("_stderr")
            behind = "" if filtered == "none" else f"_{filtered}"
            metrics[f"harness_{name}_{kind}{behind}{stderr}"] = float(value)
        if (count := found.get("n-samples", {}).get(name)) is not None:
            metrics[f"harness_{name}_examples"] = count["effective"]
    versions = [f"{name} {number}" for name, number in sorted(found.get("versions", {}).items())]
    metrics["harness_version"] = ", ".join([f"lm_eval {version('lm_eval')}", *versions])
    return metrics


def decoding(asked: Mapping[str, Any], most: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, most tokens and how tokens are drawn, of what a task asks for.

    Args:
        most: tokens of an answer, where the task does not say.

    Raises:
        RecipeError: something that our generation lacks.
    """
    asked = dict(asked)
    until = asked.pop("until", None) or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = [asked.pop(name, None) for name in names]
    most = next((one for one in given if one is not None), most)
    temperature = float(asked.pop("temperature", None) or 0.0)
    draws = asked.pop("do_sample", temperature > 0) and temperature > 0
    top_k, top_p = asked.pop("top_k", None), asked.pop("top_p", None)
    for name, value in asked.items():
        if value not in _NEUTRAL:
            raise RecipeError(f"`evaluate.harness`: a task asks for `{name}` {value!r}, which is not here")
    sampling = Sampling()
    if draws:
        sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p or 1.0)
    return [until] if isinstance(until, str) else [stop for stop in until if stop], int(most), sampling
