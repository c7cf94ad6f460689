"""All that a wrong input can do: one line that says so, exit code 2, and nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import workshop
from workshop import command, contents, process

from mlx_distill import cli, recipe, supervise
from mlx_distill.bundled import copy_recipe
from mlx_distill.cache.contents import refuse_others
from mlx_distill.cli import around
from mlx_distill.errors import RunFolderError

FROM_SHAPE = ["student.shape=null"]  # with student.model=...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad inputs. No test may change it."""
    root = workshop.make(tmp_path_factory.mktemp("workshop"))
    (root / "malformed.yaml").write_text("name: [tiny\nstudent: {\n", encoding="utf-8")
    (root / "list.yaml").write_text("- name\n", encoding="utf-8")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (root / "broken.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', encoding="utf-8"
    )
    (root / "no_form.jsonl").write_text('{"promt": "a", "completion": "b"}\n', encoding="utf-8")
    (root / "unanswered.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (root / "empty.jsonl").write_text("", encoding="utf-8")
    (root / "empty_folder").mkdir()
    (root / "table.csv").write_text("a,b\n", encoding="utf-8")
    for name in ("no_weights", "truncated", "no_config", "bad_config", "no_tokenizer", "index_names_more"):
        shutil.copytree(root / "teacher", root / name)
    (root / "no_weights" / "model.safetensors").unlink()
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "no_config" / "config.json").unlink()
    (root / "bad_config" / "config.json").write_text('{"model_type": ', encoding="utf-8")
    for file in (root / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    index = {"weight_map": {"more": "model-00002-of-00002.safetensors"}}
    (root / "index_names_more" / "model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )
    (root / "runs" / "mine").mkdir(parents=True)
    (root / "runs" / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (root / "runs" / "done").mkdir()
    (root / "runs" / "done" / "fingerprint").write_text("0123456789abcdef\n", encoding="utf-8")
    (root / "runs" / "done" / "recipe.yaml").write_text(
        workshop.RECIPE.replace("steps: 4", "steps: 400"), encoding="utf-8"
    )
    (root / "runs" / "file").write_text("", encoding="utf-8")
    (root / "runs" / "dangling").symlink_to(root / "nowhere")
    return root


# Arguments behind `run`, and the line on stderr; all of these are found before transformers is imported.
WRONG = {
    "no recipe": (
        ["nosuch.yaml"],
        "nosuch.yaml: no such recipe; `mlx-distill recipes` lists the bundled ones",
    ),
    "no bundled recipe": (["nosuch"], "nosuch: no such recipe"),
    "a folder": (["teacher"], "teacher: cannot be read as a recipe"),
    "malformed YAML": (["malformed.yaml"], "malformed.yaml: line 2, column 8: not readable as YAML"),
    "no mapping": (["list.yaml"], "list.yaml: a recipe is a mapping"),
    "not text": (["binary.yaml"], "binary.yaml: cannot be read as a recipe"),
    "unknown key": (["recipe.yaml", "train.step=4"], "unknown key `train.step`; did you mean `train.steps`?"),
    "wrong type": (["recipe.yaml", "train.steps=many"], "`train.steps`: a whole number; got 'many'"),
    "no override": (["recipe.yaml", "train.steps"], "override 'train.steps': write section.key=value"),
    "path traversal": (["recipe.yaml", "name=../../x"], "`name`: letters, digits and"),
    "no data file": (
        ["recipe.yaml", "data.train=god.jsonl"],
        "god.jsonl: no such file .*did you mean good.jsonl?",
    ),
    "no test file": (["recipe.yaml", "data.test=god.jsonl"], "god.jsonl: no such file"),
    "no test data": (
        ["recipe.yaml", "data.test=null"],
        "`evaluate.tasks` [fidelity] measure on `data.test`",
    ),
    "no tests in it": (
        ["recipe.yaml", "evaluate.tasks=[code]"],
        "'code' needs rows with `tests` in `data.test`",
    ),
    "broken line": (["recipe.yaml", "data.train=broken.jsonl"], "broken.jsonl:2: no JSON: Expecting"),
    "no form": (["recipe.yaml", "data.train=no_form.jsonl"], "no_form.jsonl:1: .*did you mean `prompt`?"),
    "empty file": (["recipe.yaml", "data.train=empty.jsonl"], "empty.jsonl: empty; one JSON object a line"),
    "empty folder": (["recipe.yaml", "data.train=empty_folder"], "empty_folder has no train.jsonl"),
    "another format": (["recipe.yaml", "data.train=table.csv"], "table.csv is no .jsonl file"),
    "no corpus": (["recipe.yaml", "data.train=pockt"], "did you mean `pocket`?"),
    "no model folder": (["recipe.yaml", "teacher.model=./nosuch"], "teacher.model: no folder './nosuch'"),
    "a model file": (["recipe.yaml", "teacher.model=good.jsonl"], "good.jsonl is a file; name the folder"),
    "no weights": (
        ["recipe.yaml", "teacher.model=no_weights"],
        "teacher.model: no_weights: no model*.safetensors",
    ),
    "truncated": (["recipe.yaml", "teacher.model=truncated"], "truncated/model.safetensors: truncated: "),
    "truncated student": (
        ["recipe.yaml", *FROM_SHAPE, "student.model=truncated"],
        "student.model: truncated/model.safetensors: truncated: ",
    ),
    "no config": (["recipe.yaml", "teacher.model=no_config"], "no_config: no config.json"),
    "bad config": (
        ["recipe.yaml", "teacher.model=bad_config"],
        "bad_config/config.json: not readable as JSON",
    ),
    "a missing shard": (
        ["recipe.yaml", "teacher.model=index_names_more"],
        "names model-00002-of-00002.safeten",
    ),
    "another tokenizer": (
        ["recipe.yaml", *FROM_SHAPE, "student.model=stranger"],
        "the student's tokenizer differs from the teacher's in ",
    ),
    "a run that exists": (["recipe.yaml", "name=done"], "runs/done holds a run already: go on with --resume"),
    "no run folder": (["recipe.yaml", "name=mine"], "runs/mine holds other files and is no run folder"),
    "nothing to resume": (["recipe.yaml", "name=mine", "--resume"], "runs/mine holds other files"),
    "nothing to overwrite": (
        ["recipe.yaml", "name=mine", "--overwrite"],
        "no run folder; --overwrite will not",
    ),
    "a file in its place": (["recipe.yaml", "name=file"], "runs/file cannot be written; it is no folder"),
    "a link to nothing": (
        ["recipe.yaml", "name=dangling"],
        "runs/dangling cannot be written; it is no folder",
    ),
    "both": (["recipe.yaml", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
}
# What only a tokenizer can tell.
WRONG_FOR_THE_TOKENIZER = {
    "all too long": (
        ["recipe.yaml", "data.max_tokens=3"],
        "`data.train`: every row is longer than `data.max_tok",
    ),
    "another recipe": (
        ["recipe.yaml", "name=done", "--resume"],
        "runs/done was made by another recipe (`train.steps` was 400 and is 4); start anew with --overwrite",
    ),
    "no tokenizer": (
        ["recipe.yaml", "teacher.model=no_tokenizer"],
        "no_tokenizer: the tokenizer cannot be loaded",
    ),
    "no answer": (["recipe.yaml", "data.train=unanswered.jsonl"], "unanswered.jsonl:1: no answer"),
    "prompts too long": (
        ["recipe.yaml", "data={prompts: good.jsonl, test: good.jsonl, max_tokens: 3}"],
        "every row is longer than `data.max_tokens` 3",
    ),
}


@pytest.mark.parametrize("case", [*WRONG, *WRONG_FOR_THE_TOKENIZER])
def test_a_wrong_input_is_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = {**WRONG, **WRONG_FOR_THE_TOKENIZER}[case]
    before = contents(folder)
    ended = command(folder, capsys, "run", *arguments)
    assert ended.code == 2
    assert len(ended.err) == 1
    assert ended.err[0].startswith("error: ")
    for part in message.split(".*"):
        assert part in ended.err[0]
    assert contents(folder) == before


def test_an_unwritable_place_for_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("teacher", "good.jsonl", "recipe.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "runs").write_text("", encoding="utf-8")
    before = contents(tmp_path)
    ended = command(tmp_path, capsys, "run", "recipe.yaml")
    assert (ended.code, len(ended.err)) == (2, 1)
    assert "runs cannot be written; it is no folder" in ended.err[0]
    assert contents(tmp_path) == before


def test_several_mistakes_are_as_many_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(folder, capsys, "run", "recipe.yaml", "train.step=1", "seed=-1")
    assert ended.code == 2
    assert [line.split(";")[0] for line in ended.err] == [
        "error: recipe.yaml: `seed`: greater than or equal to 0",
        "error: recipe.yaml: unknown key `train.step`",
    ]


def test_wrong_inputs_are_found_before_the_slow_imports(folder: Path) -> None:
    """transformers, and mlx-lm with it, takes most of a second to import; a wrong input is told sooner."""
    program = """
import json, sys
import mlx_distill.cli as cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mlx-distill", "run", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        slow = {"transformers", "mlx_lm"} & set(sys.modules)
        if ended.code != 2 or slow:
            print(arguments, ended.code, slow)
"""
    asked = json.dumps([arguments for arguments, _ in WRONG.values()])
    environment = {"PYTHONPATH": str(workshop.REPOSITORY), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, asked],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == len(WRONG)


def test_a_process_ends_with_the_code_and_without_a_traceback(folder: Path) -> None:
    child = process(folder, "run", "recipe.yaml", "train.step=4")
    out, err = child.communicate()
    assert (child.returncode, out) == (2, "")
    assert err == "error: recipe.yaml: unknown key `train.step`; did you mean `train.steps`?\n"


def test_a_usage_error_is_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, capsys, "run").code == 2
    assert command(folder, capsys, "rum", "recipe.yaml").code == 2
    assert command(folder, capsys, "run", "recipe.yaml", "--quick").code == 2


def test_version_and_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_distill import __version__

    assert command(folder, capsys, "--version").out == f"mlx-distill {__version__}\n"
    text = command(folder, capsys, "--help").out
    for name in (
        "run",
        "plan",
        "generate",
        "train",
        "quantize",
        "evaluate",
        "export",
        "report",
        "recipes",
        "doctor",
    ):
        assert f"  {name} " in text


def test_plan_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    ended = command(folder, capsys, "plan", "recipe.yaml", "train.steps=7")
    assert (ended.code, ended.err) == (0, [])
    assert "steps: 7" in ended.out
    assert "batch_tokens: 256" in ended.out
    assert "data.train: 12 rows, " in ended.out
    assert contents(folder) == before
    ended = command(folder, capsys, "plan", "recipe.yaml", "teacher.model=truncated")
    assert (ended.code, len(ended.err)) == (2, 1)


def test_recipes_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = command(tmp_path, capsys, "recipes").out.splitlines()
    names = [line.split()[0] for line in listed]
    assert "pocket_teacher" in names
    assert all(len(line.split()) > 3 for line in listed)  # each says what it is
    assert command(tmp_path, capsys, "recipes", "pocket_teacher").out.split() == [
        str(tmp_path / "pocket_teacher.yaml")
    ]
    again = command(tmp_path, capsys, "recipes", "pocket_teacher")
    assert (again.code, len(again.err)) == (2, 1)
    assert "exists already" in again.err[0]
    unknown = command(tmp_path, capsys, "recipes", "nosuch")
    assert unknown.code == 2
    assert "no bundled recipe `nosuch`; there are: " in unknown.err[0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("quickstrat", "`quickstart`"),
        ("quickstart.yml", "`quickstart`"),
        ("qwen3-4b-to-2b", "`prune_and_distill/qwen3-4b-to-2b`"),
        ("recipy.yaml", "`recipe.yaml`"),
    ],
)
def test_a_recipe_of_nearly_this_name_is_told(
    name: str, meant: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = command(folder, capsys, "plan", name)
    assert (ended.code, ended.err) == (2, [f"error: {name}: no such recipe; did you mean {meant}?"])
    if name != "recipy.yaml":  # which is no bundled one
        ended = command(folder, capsys, "recipes", name)
        assert ended.err == [f"error: no bundled recipe `{name}`; did you mean {meant}?"]


def test_a_recipe_cannot_be_copied_to_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"quickstart.yaml: cannot be written \(Not a directory\)"):
        copy_recipe("quickstart", tmp_path / "file")


def test_a_report_is_asked_for_by_the_name_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("done", "runs/done"):
        ended = command(folder, capsys, "report", name)
        assert (ended.code, len(ended.err)) == (2, 1)
        assert ended.err[0].startswith("error: runs/done/evaluation.json: no such file; write it with")
    ended = command(folder, capsys, "report", "nosuch")
    assert ended.code == 2 and ended.err[0].startswith("error: nosuch: no such file or folder")


@pytest.mark.parametrize("stage", ["run", "train", "evaluate", "compress"])
def test_mlx_has_a_folder_to_compile_in(
    stage: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its C++ says so in a traceback, behind what was loaded and begun."""
    before = contents(folder)
    for place in ("nosuch", "good.jsonl", ""):
        monkeypatch.setenv("TMPDIR", place)
        ended = command(folder, capsys, stage, "recipe.yaml")
        assert (ended.code, len(ended.err)) == (2, 1)
        assert ended.err[0].startswith(f"error: TMPDIR={place}: no folder that can be written")
    assert contents(folder) == before


@pytest.mark.parametrize("arguments", [["recipes", "quickstart"], ["run", "quickstart"], ["watch", "x"]])
def test_a_folder_that_is_gone(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["mlx-distill", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the folder that you are in is there no more; go to another\n"


@pytest.mark.parametrize(
    "override",
    [
        f"evaluate={{tasks: [humaneval], files: {{humaneval: {'x' * 5000}}}}}",
        f"teacher={{model: embedded, source: cache, top_k: 4, cache: {'x' * 5000}}}",
    ],
)
def test_a_name_that_no_file_system_takes(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ["train.steps=2", "train.warmup=0", "data.prompts=null"]
    monkeypatch.setattr(sys, "argv", ["mlx-distill", "cache", "quickstart", *steps, override])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "xxx" in line
    assert not (tmp_path / "runs").exists()


def test_a_cache_in_the_home_of_nobody_is_no_fault(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """`~nosuch` stays as it is, as in every other path; pathlib's `expanduser` would raise."""
    cache = ["teacher.source=cache", "teacher.top_k=8", "teacher.cache=~nosuch/x"]
    seen = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(supervise, "supervise", lambda *given: seen.append(given) or 7)
    with pytest.raises(typer.Exit):
        around.supervised(["recipe.yaml", *cache], supervise=True, caffeinate=False)
    [(_, _, _, stores)] = seen
    assert stores == [Path("~nosuch/x")]
    refuse_others(recipe.load("recipe.yaml", cache), {"teacher": {}})


def test_each_command_is_told_in_a_whole_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut off at 80 columns, and the commands stand in the order in which they are needed."""
    monkeypatch.setenv("COLUMNS", "80")
    listed = command(folder, capsys, "--help").out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed] == list(cli.COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
