"""Checks before anything long: each is shown where it says something, and where it is silent."""

import gc
import io
import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from tiny import SHAPE, rows_of, tiny_model, tiny_recipe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from workshop import command

from mlx_distill import disk, pipeline, recipe
from mlx_distill.console import Console
from mlx_distill.data.rows import Row
from mlx_distill.errors import Diverged, ModelError, RunFolderError, Stopped
from mlx_distill.interrupt import Interrupted
from mlx_distill.memory import Estimate
from mlx_distill.models import build, load, parameter_count
from mlx_distill.options import Shape
from mlx_distill.peak import PeakMemory
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.probes import judging, probe, room, step
from mlx_distill.probes.longest import largest_batch
from mlx_distill.probes.probe import Probes, random_state_kept
from mlx_distill.probes.readings import TRICKY, split_differently
from mlx_distill.probes.room import check_room, needed_gib
from mlx_distill.probes.stand_in import stand_in
from mlx_distill.probes.step import check_numbers, try_step
from mlx_distill.probes.turns import other_turns, turn_end
from mlx_distill.probes.widths import check_widths
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.work import Work

QWEN = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "qwen2.5"
CHATML = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
LOADED = ["student={model: student}"]
LORA = ["student={model: student, method: lora, rank: 4, dropout: 0.1}"]


def letters(template: str | None = None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer with one id a letter."""
    known = [
        "<unk>",
        "</s>",
        "<end>",
        *"\n :?.+-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    core = Tokenizer(models.WordLevel({one: place for place, one in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["</s>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def turns(student: Any, teacher: Any, used: Any = None, **how: bool) -> list[str]:
    defaults = {"chats": True, "on_policy": False, "all_own": False}
    return other_turns(
        student and ("student.model", student), {"teacher.model": teacher}, used or teacher, **defaults | how
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, and to change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ready(*overrides: str) -> Prepared:
    return prepare(recipe.load("recipe.yaml", overrides))


def work_of(*overrides: str, said: io.StringIO | None = None) -> Work:
    prepared, folder = ready(*overrides), Path("run")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Work(Run(folder, Console(said or io.StringIO())), prepared.recipe, prepared)


def probed(*overrides: str) -> list[str]:
    """What the probes of a run say, which then ends."""
    said = io.StringIO()
    work = work_of(*overrides, said=said)
    Probes(work, PeakMemory(work.run.folder, work.prepared.memory)).before("generate")
    return [line for line in said.getvalue().splitlines() if line.startswith("probes: ")]


def run(*overrides: str, upto: str = "train", **how: Any) -> tuple[Path, list[str]]:
    """The folder of a run, and what the probes said."""
    said = io.StringIO()
    found = pipeline.run(recipe.load("recipe.yaml", overrides), Console(said), upto=upto, **how)
    return found, [line for line in said.getvalue().splitlines() if line.startswith("probes: ")]


def bits(runs: Path) -> dict[str, bytes]:
    """The weights of a run's student and of its checkpoints."""
    return {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("*.safetensors")}


# Without weights: how tokenizers of one vocabulary read.


def without_merges(file: Path) -> None:
    """The same tokens, of which only the letters are ever used."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["model"]["merges"] = []
    file.write_text(json.dumps(tree), encoding="utf-8")


def test_equal_maps_are_not_equal_readings(folder: Path) -> None:
    assert ready(*LOADED).notes == []
    without_merges(folder / "student" / "tokenizer.json")
    [line] = ready(*LOADED).notes
    assert line.startswith("`student.model` has the vocabulary of `teacher.model`, but splits text in")
    assert "16 of 16 rows differ, and the student learns that of `teacher.model`" in line
    # Of a teacher that is only listened to, nothing is learned.
    shutil.copytree("student", "second")
    [line] = ready("teacher.others=[{model: second}]").notes
    assert line.startswith("`teacher.others.0.model` has") and line.endswith("it reads that one")


def test_readings_that_part_only_in_tricky_text_are_found() -> None:
    """Letters lower-cased by one of them: no row of the data shows it, and the first difference is told."""
    one, other = letters(), letters()
    rows = [Row(prompt="a b", completion="c"), Row(text="abc")]
    assert split_differently({"student.model": one, "teacher.model": other}, "teacher.model", rows) == []
    from tokenizers import normalizers

    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    [line] = split_differently({"student.model": one, "teacher.model": other}, "teacher.model", rows)
    assert "0 of 2 rows differ" in line
    assert "['I', " in line and "['i', " in line


@pytest.mark.skipif(not QWEN.exists(), reason="needs ../shared/tokenizers")
def test_a_real_tokenizer_and_one_that_splits_words_otherwise() -> None:
    from transformers import AutoTokenizer

    qwen = AutoTokenizer.from_pretrained(QWEN)
    assert all(qwen.decode(qwen.encode(text)) for text in TRICKY)
    core = Tokenizer.from_str(qwen.backend_tokenizer.to_str())
    words = pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=qwen.eos_token)
    assert other.get_vocab() == qwen.get_vocab()
    rows = [Row(text="12345"), Row(text="and so on")]
    [line] = split_differently({"student.model": qwen, "teacher.model": other}, "teacher.model", rows)
    assert (
        "it makes ['Ġso', 'Ġon'] of ' so on', and `teacher.model` ['Ġ', 'so', 'Ġ', 'on']; 1 of 2 rows" in line
    )


# Ends of turns and chat templates.


def test_a_base_student_ends_otherwise_than_its_teacher() -> None:
    chat, base = letters(CHATML, eos="<end>"), letters()
    [line, template] = turns(base, chat)
    assert line.startswith("`student.model` ends a turn with '</s>', `teacher.model` with '<end>'")
    assert template == "`student.model` has no chat template; the student learns the one of `teacher.model`"
    assert "may run to `generate.on_policy.max_tokens`" in turns(base, chat, on_policy=True)[0]
    with pytest.raises(ModelError, match="learns from its own answers alone.*`generate.on_policy.share` be"):
        turns(base, chat, on_policy=True, all_own=True)
    # Plain text has no turns: only the eos counts, which is another here too.
    assert len(turns(base, chat, chats=False)) == 1
    assert turns(letters(eos="<end>"), chat, chats=False) == []
    assert turns(letters(CHATML, eos="<end>"), chat) == []
    assert turns(None, chat) == []


def test_the_end_of_a_turn_is_what_the_template_writes() -> None:
    assert turn_end(letters(CHATML, eos="<end>")) == turn_end(letters(CHATML)) == 2
    assert turn_end(letters()) == turn_end(letters(CHATML), chats=False) == 1
    # A template that closes a turn with a token at which the model does not stop.
    endless = letters(CHATML)
    [line] = turns(None, endless)
    assert line.startswith("`teacher.model` closes a turn with '<end>' in its chat template, but stops only")
    assert "add 2 to `eos_token_id` in its generation_config.json" in line
    assert (
        len([line for line in turns(endless, letters(), used=endless) if "its answers run on" in line]) == 1
    )


def test_other_templates_are_told_with_the_first_difference() -> None:
    chat, other = letters(CHATML, eos="<end>"), letters("be kind." + CHATML, eos="<end>")
    [line] = turns(other, chat)
    assert line.startswith("`student.model` has another chat template than `teacher.model`, 'be kind.")
    assert "' in place of 'u:What is 2 + 2?" in line
    assert line.endswith("the student learns the one of `teacher.model` and is saved with it")
    assert turns(other, chat, chats=False) == []
    [line] = turns(chat, letters(eos="<end>"), used=chat)
    assert line.startswith("`teacher.model` has no chat template, and reads the one of `student.model`")
    teachers = {"teacher.model": chat, "teacher.others.0.model": other}
    [line] = other_turns(None, teachers, chat, chats=True, on_policy=False, all_own=False)
    assert line.startswith("`teacher.others.0.model` has another chat template than the one that rows are")
    refusing = letters("{{ raise_exception('no') }}", eos="<end>")
    assert turns(refusing, refusing) == []  # a row that it refuses is told of with its place


def test_an_own_end_stops_an_own_run(folder: Path) -> None:
    """The whole way: files, recipe, one line."""
    own = [*LOADED, "generate={on_policy: {max_tokens: 4}}", "objective={forward_kl: }"]
    assert ready(*own).notes == []
    config = folder / "student" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "eos_token_id": 5}), encoding="utf-8"
    )
    file = folder / "student" / "tokenizer_config.json"
    piece = sorted(ready(*own).tokenizer.get_vocab().items(), key=lambda one: one[1])[5][0]
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "eos_token": piece}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="the student has to learn to stop, and no row shows it where"):
        ready(*own)
    [line] = ready(*LOADED).notes
    assert line.endswith("before training its answers run to their longest")


# Widths.


def test_padded_matrices_are_told_and_narrow_ones_refused() -> None:
    qwen = {"student.model": 151936, "teacher.model": 152064}
    [line] = check_widths(qwen, 151665, [5])
    assert line.startswith(
        "padding: matrices have more rows (`student.model` 151936, `teacher.model` 152064) than the "
        "tokenizer has tokens (151665)"
    )
    assert check_widths({"student.model": 50, "teacher.model": None}, 50, [49]) == []
    narrow = {"student.model": 48, "teacher.model": 48}
    [line] = check_widths(narrow, 50, [47])
    assert "its tokenizer has 50 tokens, and its matrices 48 rows" in line
    with pytest.raises(ModelError, match="the data holds token 48; choose"):
        check_widths(narrow, 50, [3, 48])
    with pytest.raises(ModelError, match="`student.model`: .* logits cannot be compared"):
        check_widths(narrow | {"teacher.model": 64}, 50, [3])


def test_widths_come_from_the_files(folder: Path) -> None:
    for name in ("student", "teacher"):
        widen(folder / name)
    [line] = ready(*LOADED).notes
    assert line.startswith("padding: matrices have more rows (`teacher.model` 160, `student.model` 160)")


def widen(model: Path, rows: int = 160) -> None:
    """Pad a model's matrices, as Qwen's are."""
    weights = load_file(model / "model.safetensors")
    for name, array in weights.items():
        if array.shape[0] == 150:
            weights[name] = np.concatenate([array, np.ones((rows - 150, array.shape[1]), array.dtype)])
    save_file(weights, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}), encoding="utf-8")


def test_a_new_student_has_a_row_for_every_id_where_ids_have_gaps() -> None:
    """As many rows as there are tokens would be too few, and MLX reads what lies behind them."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 9}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert len(tokenizer) == 3
    built = build(Shape(**SHAPE), tokenizer, 0)
    assert built.config["vocab_size"] == built.model(mx.array([[9]])).shape[-1] == 10


# Room on the drive.

MEMORY = Estimate(4.0, 1.0, 2.0, 0.0, 0.0, {}, 64.0)


def test_room_is_counted_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tiny_recipe(train={"steps": 1000, "save_every": 100, "keep": 2})
    # Two kept of student and baseline each, one being written; both models.
    assert needed_gib(options, MEMORY) == {"checkpoints": 5 * 3.0, "models": 8.0}
    rare = tiny_recipe(train={"steps": 150, "save_every": 100}, evaluate={"tasks": [], "baseline": False})
    assert needed_gib(rare, MEMORY) == {"checkpoints": 2 * 3.0, "models": 4.0}
    assert needed_gib(tiny_recipe(), MEMORY)["checkpoints"] == 0

    def free(gib: float) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=int(gib * 2**30))
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)

    needed = needed_gib(options, MEMORY)
    free(100)
    assert check_room(tmp_path / "runs" / "new", options, needed) is None
    free(25)
    told = "23 GiB are needed on the drive (checkpoints 15, models 8), and 25 GiB are free"
    assert told in str(check_room(tmp_path / "new", options, needed))
    free(20)
    with pytest.raises(RunFolderError, match=r"20 GiB are free; make room, .*train.keep=1 \(now 2\)"):
        check_room(tmp_path / "new", options, needed)
    # Caches count too; those of answers that nobody has written yet are told, and no reason to refuse.
    free(50)
    cached = {"caches": 30.0, **needed}
    with pytest.raises(RunFolderError, match=r"53 GiB are needed on the drive \(caches 30, checkpoints 15"):
        check_room(tmp_path / "new", options, cached)
    assert "caches 30" in str(check_room(tmp_path / "new", options, cached, guessed={"caches"}))
    # What the folder holds already is not needed again.
    (tmp_path / "old").mkdir()
    with open(tmp_path / "old" / "weights", "wb") as file:
        file.truncate(12 * 2**30)  # sparse
    free(20)
    assert check_room(tmp_path / "old", options, needed) is None


def test_caches_are_counted_before_the_first_stage(folder: Path) -> None:
    cached = ["teacher={model: teacher, source: cache, top_k: 4}", "objective={forward_kl: }"]
    prepared = ready(*cached)
    assert disk.needed(prepared.recipe, prepared)["caches"] > 0 and disk.guessed(prepared) == set()
    assert disk.guessed(ready(*cached, "data.prompts=good.jsonl")) == {"caches"}
    assert disk.guessed(ready(*cached, "teacher.cache=elsewhere")) == {"caches"}
    assert "caches" not in disk.needed(ready().recipe, ready())


# With weights.


def test_a_run_with_probes_ends_with_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students, checkpoints and caches, of runs that draw random numbers, store targets, or write rows."""
    saves = "train={steps: 2, batch_tokens: 256, learning_rate: 1e-2, save_every: 1, log_every: 1}"
    plain = "train.compile=false"
    kinds = {
        "dropout": LORA,
        "cached": ["teacher={model: teacher, source: cache, sampled: 4}", "objective={forward_kl: }", plain],
        "own": ["generate={on_policy: {max_tokens: 4, share: 0.5}}", plain],
        "self": [*LORA, "teacher={model: student, ema: 0.9}", plain],
    }
    for name, overrides in kinds.items():
        with_probes, said = run(f"name={name}", saves, *overrides)
        assert said and (with_probes / "probes.json").exists()
        found = bits(with_probes)
        with monkeypatch.context() as patch:
            patch.setattr(Probes, "before", lambda self, stage: None)
            without, said = run(f"name={name}", saves, *overrides, overwrite=True)
        assert not said and bits(without) == found, name


def test_a_run_that_was_probed_and_stopped_goes_on_to_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = "train={steps: 4, batch_tokens: 256, learning_rate: 1e-2, save_every: 2, log_every: 0}"
    save = StageLog.save

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run(*LORA, often)
    assert Path("runs/tiny/probes.json").exists()
    found = bits(run(*LORA, often, resume=True)[0])
    monkeypatch.setattr(Probes, "before", lambda self, stage: None)
    assert bits(run(*LORA, often, overwrite=True)[0]) == found


def test_the_random_state_is_put_back() -> None:
    mx.random.seed(7)
    first = mx.random.normal((3,))
    mx.random.seed(7)
    with random_state_kept():
        mx.random.normal((5,))
    assert mx.array_equal(mx.random.normal((3,)), first)
    mx.random.seed(7)
    mx.random.normal((5,))  # and without
    assert not mx.array_equal(mx.random.normal((3,)), first)


def test_probes_are_made_once_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    keep = Probes._keep
    monkeypatch.setattr(Probes, "_keep", lambda self, key, work: made.append(key) or keep(self, key, work))

    def stopped(*_: Any) -> None:
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "generate_answers", stopped)
        with pytest.raises(Interrupted):
            run()
    assert made == ["teachers", "student"]
    runs, said = run(resume=True)
    assert made == ["teachers", "student"] and not said
    found = json.loads((runs / "probes.json").read_text(encoding="utf-8"))
    assert found["student"]["losses"].keys() == {"forward_kl", "cross_entropy"}
    assert json.loads((runs / "memory.json").read_text(encoding="utf-8"))["measured_gib"].keys() >= {
        "probes",
        "train",
    }
    # Neither where nothing is trained, nor for a student that is there.
    run("name=answers", upto="generate")
    (runs / "probes.json").unlink()
    run(upto="quantize", resume=True)
    assert made == ["teachers", "student"]


CUT = "student={prune: {ratio: 0.75, axes: [feed_forward], rounds: 2, heal: 1}}"


def test_a_student_that_is_cut_out_is_tried_when_it_is_there(folder: Path) -> None:
    """And before: a model as large as the first of its rounds, or its memory would show after the healing."""
    sizes: list[int] = []

    def noted(work: Work, student: Any, largest: Any, stored: Any) -> Any:
        sizes.append(parameter_count(student.model))
        return try_step(work, student, largest, stored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "try_step", noted)
        runs, said = run(CUT)
    found = json.loads((runs / "probes.json").read_text(encoding="utf-8"))
    assert found.keys() == {"teachers", "stand_in", "student"}
    assert said[0].endswith("by a model as large as the student that is to be cut out")
    assert found["stand_in"].keys() == {"rows", "width", "seconds", "peak_gib"}
    stages = json.loads((runs / "stages.json").read_text(encoding="utf-8"))
    healed = sum(array.size for array in load_file(runs / "models/round-1/model.safetensors").values())
    assert sizes == [healed, stages["prune"]["parameters"]] and sizes[0] > sizes[1]


def test_memory_for_a_student_that_is_cut_out_shows_before_the_first_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "make_step", lambda *_: Greedy)
    with pytest.raises(Stopped, match="the first step, on 8 x 32 tokens: out of memory"):
        run(CUT)
    # Adapters on one in half precision, beside a teacher that is the student.
    own = "student={method: lora, rank: 2, prune: {model: student, ratio: 0.75, axes: [feed_forward]}}"
    work = work_of(own, "teacher={model: student}")
    assert work.prepared.planned is not None
    work.prepared.planned = work.prepared.planned._replace(bytes_each=2.0)
    made = stand_in(work)
    types = {str(array.dtype) for _, array in tree_flatten(made.model.parameters())}  # type: ignore[misc]
    assert types == {"mlx.core.bfloat16", "mlx.core.float32"}
    assert len(tree_flatten(made.model.trainable_parameters())) < 40


def test_a_teacher_that_does_not_repeat_itself_is_told() -> None:
    loaded, tokens = tiny_model(), mx.array([[3, 7, 9, 4]])
    assert judging.largest_difference(loaded.model, tokens, "teacher.model") == 0.0
    noise = iter([0.0, 1e-3])

    def other(tokens: mx.array) -> mx.array:
        return loaded.model(tokens) + next(noise)

    assert judging.largest_difference(other, tokens, "teacher.model") == pytest.approx(1e-3, rel=0.1)


def test_what_a_teacher_that_does_not_repeat_itself_costs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "largest_difference", lambda *_: 0.5)
    said = probed()
    assert "`teacher.model` is not deterministic: the same batch twice gave logits up to 0.5 apart" in said[0]
    # What is stored is asked once.
    cached = ["teacher={model: teacher, source: cache, top_k: 4}", "objective={forward_kl: }"]
    said = probed(*cached)
    assert not any("deterministic" in line for line in said)


def test_a_teacher_that_knows_no_more_is_told(folder: Path) -> None:
    _, said = run(
        "train.steps=40", "train.compile=false", "teacher=null", "objective={cross_entropy: }", *LOADED
    )
    assert len(said) == 1  # no teacher, nothing to compare
    taught = str(Path("runs/tiny/models/student"))
    said = probed(f"teacher.model={taught}")
    assert not any("nothing to distil" in line for line in said)
    said = probed(f"student={{model: {taught}}}")
    [line] = [line for line in said if "nothing to distil" in line]
    assert line.startswith(
        "probes: `teacher.model` finds the answers in `data.train` no likelier than the un"
    )
    # Of itself no student knows more, and nobody is told so.
    said = probed("teacher.model=student", f"student={{model: {taught}}}")
    assert len(said) == 1


def test_a_sample_is_bounded() -> None:
    rows = [Row(prompt="a", completion="b")] * 100
    prepared: Any = SimpleNamespace(train_rows=rows, train=rows_of([700] * 100), valid_rows=[], valid=[])
    prepared.teachers, prepared.recipe = {}, tiny_recipe()
    found = judging.sample(prepared)
    assert found is not None and len(found.rows) == judging.ROWS
    assert {len(row.tokens) for row in found.encoded} == {judging.LONGEST}
    prepared.train_rows, prepared.train = [], []
    prepared.valid_rows, prepared.valid = rows[:3], rows_of([5] * 3)
    assert (judging.sample(prepared) or found).key == "valid"
    # Where a teacher has other tokens, rows are whole: short ones, or else the shortest.
    prepared.teachers = {"teacher": SimpleNamespace(foreign=True)}
    for lengths, wanted in (([700, 600, 20, 30], [23, 33]), ([700, 600], [603])):
        prepared.train_rows, prepared.train = rows[: len(lengths)], rows_of(lengths)
        assert [len(row.tokens) for row in (judging.sample(prepared) or found).encoded] == wanted
    prepared.train_rows, prepared.train = [], []
    prepared.valid_rows, prepared.valid = [], []
    assert judging.sample(prepared) is None


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_weights_that_are_not_finite_stop_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = folder / name / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, file)
    ended = command(folder, capsys, "run", "recipe.yaml", "student={model: student}")
    assert (ended.code, len(ended.err)) == (2, 1)
    assert ended.err[0].startswith(f"error: `{name}.model`: ")
    assert (
        "logits on the first rows of the data are not finite, in float32; its weights are damaged"
        in ended.err[0]
    )
    assert not (folder / "runs/tiny").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "run",
        "recipe.yaml",
        "objective={forward_kl: {temperature: 1e-38}, cross_entropy: }",
        "train.compile=false",
    ]
    ended = command(folder, capsys, *arguments)
    assert (ended.code, len(ended.err)) == (70, 1)
    assert ended.err[0].startswith("error: `objective.forward_kl` is nan on 8 x 32 tokens, before anything")
    assert "; change its options (temperature 1e-38), or leave it out" in ended.err[0]
    terms = tiny_recipe().objective
    with pytest.raises(Diverged, match=r"the gradient is inf on 8 x 32 tokens, .* loss is finite \(forw"):
        check_numbers({"forward_kl": 1.0}, float("inf"), terms, "8 x 32 tokens")
    check_numbers({"forward_kl": 1.0}, 2.0, terms, "8 x 32 tokens")


class Greedy:
    """A step that takes too much, in MLX's own words, where they reach Python."""

    @staticmethod
    def gradients(*_: Any) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIO)")


def test_out_of_memory_shows_before_the_first_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing behind: with what has to be changed, the recipe could not go on with it."""
    monkeypatch.setattr(step, "make_step", lambda *_: Greedy)
    with pytest.raises(
        Stopped, match=r"the first step, on 8 x 32 tokens: out of memory.*; lower `train.batch"
    ):
        run()
    assert not Path("runs/tiny").exists()
    Path("runs/other").mkdir()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    run("train.batch_tokens=128")  # no --overwrite

    # What a stage has made stays; and nothing goes but what a run writes before its first.
    monkeypatch.setattr(pipeline, "generate_answers", lambda work: Greedy.gradients())
    with pytest.raises(Stopped):
        run("name=begun")
    assert Path("runs/begun/fingerprint").exists()
    monkeypatch.setattr(step, "make_step", lambda *_: Greedy)
    kept = Path("runs/begun/probes.json")
    kept.unlink()
    with pytest.raises(Stopped):
        run("name=begun", resume=True)
    assert Path("runs/begun/log.txt").exists()


def test_a_step_that_may_be_too_much_is_told_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(work_of(), PeakMemory(Path("run"), MEMORY._replace(machine=13.0)))
    said: list[str] = []
    monkeypatch.setattr(probes, "_say", said.append)
    largest = largest_batch(probes.work)
    probes._warn(largest)
    assert said[0].startswith("trying the largest batch, 8 x 32 tokens, at a predicted 7 of 13 GiB; if the")
    probes.memory.predicted = MEMORY
    probes._warn(largest)
    assert len(said) == 1


def test_more_memory_than_the_machine_lends_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.PeakMemory, "measured", lambda self, stage: 1e6)
    said = probed()
    assert re.search(r"1e\+06 GiB \(all of training, predicted: 0\.\d+\)", said[-2])
    assert said[-1].startswith("probes: this is more than the ")
    monkeypatch.setattr(probe.PeakMemory, "measured", lambda self, stage: None)
    said = probed()
    assert len(said) == 1 and "GiB" not in said[0]


def test_a_teacher_of_which_all_is_stored_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ["teacher={model: teacher, source: cache, top_k: 4, cache: targets}", "objective={forward_kl: }"]
    first, _ = run("name=first", *cached)
    loaded: list[str] = []
    teacher = Work.teacher
    monkeypatch.setattr(Work, "teacher", lambda self, place: loaded.append(place) or teacher(self, place))
    second, _ = run("name=second", *cached)
    told = [json.loads((runs / "probes.json").read_text(encoding="utf-8")) for runs in (first, second)]
    assert told[0]["teachers"]["teacher"]["nll"] > 0
    assert (loaded, told[1]["teachers"]) == ([], {"teacher": {"stored": True}})
    assert told[0]["student"]["losses"] == told[1]["student"]["losses"]  # the same targets, from both places
    rows = Path("good.jsonl").read_text(encoding="utf-8")
    Path("good.jsonl").write_text(rows + rows.splitlines()[0].replace("add", "sum") + "\n", encoding="utf-8")
    run("name=third", *cached)  # one more row to ask for
    assert loaded


def test_nats_of_other_tokens_are_of_the_same_text(folder: Path) -> None:
    """A model is as good in its own tokens as in those that it is told to read as another's."""
    rows = [{"prompt": "def add(x):", "completion": " return x + 1" * times} for times in (1, 2, 120)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    crossed = ["teacher={model: stranger}", *LOADED, "objective={cross_tokenizer: }"]
    for count in ("completion", "all"):
        prepared = ready(
            *crossed, f"data={{train: long.jsonl, test: good.jsonl, count: {count}, max_tokens: 2000}}"
        )
        found = judging.sample(prepared)
        assert found is not None and len(found.rows) == 2  # one is too long
        student = load("student", "student.model")
        nll = judging.nll_of(student, found, 150)
        assert judging.nll_of(student, found, 150, own=prepared.tokenizer) == pytest.approx(nll, rel=1e-6)


def test_teachers_that_are_stored_are_never_in_memory_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be stored because they do not fit beside each other."""
    shutil.copytree("teacher", "second")
    others = "others: [{model: second, source: cache, top_k: 4}]"
    most: list[int] = []
    teacher = Work.teacher

    def counted(self: Work, place: str = "teacher") -> Any:
        loaded = teacher(self, place)
        most.append(len(self._loaded))
        return loaded

    monkeypatch.setattr(Work, "teacher", counted)
    stored = [f"teacher={{model: teacher, source: cache, top_k: 4, {others}}}", "objective={forward_kl: }"]
    probed(*stored)
    assert set(most) == {1}
    # Beside one that runs live, nothing is left for the stage that fills the cache.
    work = work_of(f"teacher={{model: teacher, {others}}}", stored[1])
    Probes(work, PeakMemory(work.run.folder, MEMORY)).before("generate")
    assert work._loaded == {}
    with monkeypatch.context() as patch:  # as it would be without
        for module in (probe, step):
            patch.setattr(module, "make_room", lambda *_: None)
        probed(*stored)
    assert max(most) == 2


@pytest.mark.parametrize("overrides", [["train.gradient_checkpointing=true"], LORA])
def test_a_student_that_is_thrown_away_takes_no_more_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Nothing holds it in a circle: of one that goes through MLX's traces Python sees nothing."""
    made: list[Any] = []
    new = Work.new_student

    def noted(self: Work, *how: Any) -> Any:
        student = new(self, *how)
        made.append(weakref.ref(student.model))
        return student

    monkeypatch.setattr(Work, "new_student", noted)
    probes = Probes(work_of(*overrides), PeakMemory(Path("run"), MEMORY))
    gc.disable()
    try:
        probes.before("generate")
    finally:
        gc.enable()
    assert len(made) == 1 and made[0]() is None


# The largest batch.


def test_the_largest_batch_holds_the_longest_rows_at_full_size(folder: Path) -> None:
    lengths = [3] * 6 + [20] * 3
    rows = [{"prompt": "x", "completion": " y" * length} for length in lengths]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    work = work_of("data={train: mixed.jsonl, test: mixed.jsonl, max_tokens: 128}", "train.batch_tokens=240")
    found = largest_batch(work)
    longest = max(len(row.tokens) for row in work.prepared.train)
    rows_of_batch, width = found.batch.tokens.shape
    assert (width, rows_of_batch) == (16 * -(-(longest - 1) // 16), 240 // width)
    assert int(found.batch.counted.sum()) == rows_of_batch * (longest - work.prepared.train[-1].start)
    assert len(found.learned.rows) == 3 and found.batch.rows == (0, 1, 2, 0, 1, 2, 0, 1)[:rows_of_batch]
    assert not found.own


def test_answers_that_are_not_written_yet_count_at_their_longest(folder: Path) -> None:
    asked = ["data.prompts=good.jsonl", "generate.max_tokens=60", "train.batch_tokens=240"]
    found = largest_batch(work_of(*asked))
    longest = max(len(one.tokens) for one in ready(*asked).prompts) + 61
    assert max(len(row.tokens) for row in found.learned.encoded) == longest
    assert found.batch.tokens.shape == (3, 80)
    # But never above what is kept, and none where the student answers itself: as long as it may then.
    assert largest_batch(work_of(*asked, "data.max_tokens=40")).batch.tokens.shape == (5, 48)
    own = largest_batch(
        work_of(*asked[2:], "generate={on_policy: {max_tokens: 50}}", "objective={forward_kl: }")
    )
    assert own.own and own.batch.tokens.shape == (3, 64)
