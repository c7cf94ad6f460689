"""What comes from others is data: it names no code that runs, no file outside its folder; and what is ours,
keys and passwords, stays out of the run folder."""

import gzip
import io
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import workshop
from fake_server import KEY, Fake, Reply, fake, said
from tiny import tiny_tokenizer
from workshop import command, contents

from mlx_distill import models
from mlx_distill.cache.shards import read_arrays
from mlx_distill.console import Console
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt
from mlx_distill.errors import DataError, ModelError, RunFolderError
from mlx_distill.evaluate.problems import read_problems
from mlx_distill.interrupt import Interrupted
from mlx_distill.metrics import number
from mlx_distill.models import check_model, check_saveable
from mlx_distill.probes.turns import turn_end
from mlx_distill.run import Run
from mlx_distill.run_folder import environment
from mlx_distill.secrets_out import without_secrets
from mlx_distill.supervise import _reached
from mlx_distill.time_limit import time_limit

__all__ = ["fake"]  # a fixture

CODE = """
from pathlib import Path
Path("HERE/ran").touch()
from transformers import PreTrainedTokenizerFast

class Mine(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workshop of one's own, and a place for the modules that transformers copies."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return Path(shutil.copytree(made, tmp_path / "workshop"))


def change(path: Path, **keys: Any) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({key: value for key, value in (tree | keys).items() if value != "-"}), encoding="utf-8"
    )


def with_code(folder: Path, name: str = "teacher") -> Path:
    """A model whose tokenizer is Python code, which leaves a file where it runs."""
    (folder / name / "tokenization_mine.py").write_text(CODE.replace("HERE", str(folder)), encoding="utf-8")
    change(
        folder / name / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_mine.Mine"]},
        tokenizer_class="Mine",
    )
    return folder / "ran"


# --- code of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "recipe.yaml"),
        ("train", "recipe.yaml"),
        ("plan", "recipe.yaml", "teacher.model=stranger", "student={model: teacher}"),
        (
            "plan",
            "recipe.yaml",
            "teacher.model=stranger",
            "student={prune: {model: teacher, ratio: 0.5}}",
        ),
        ("chat", "teacher", "--prompt", "x"),
        ("compare", "stranger", "teacher", "--prompt", "x"),
    ],
)
@pytest.mark.parametrize("how", ["tokenizer", "legacy tokenizer", "model_file", "pickle", "overlap"])
def test_every_way_to_name_a_model_is_checked(
    how: str, arguments: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, teacher = with_code(folder), folder / "teacher"
    if how == "tokenizer":
        wanted = "tokenizer_config.json: `auto_map`: the tokenizer is Python code"
    elif how == "legacy tokenizer":
        change(teacher / "tokenizer_config.json", auto_map=[None, "tokenization_mine.Mine"])
        wanted = "tokenizer_config.json: `auto_map`: the tokenizer is Python code"
    elif how == "model_file":
        change(teacher / "config.json", model_file="tokenization_mine.py")
        wanted = "`model_file` asks to run Python code"
    elif how == "pickle":
        change(teacher / "tokenizer_config.json", auto_map="-")
        (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
        wanted = "no model*.safetensors, only .bin files"
    else:
        change(teacher / "tokenizer_config.json", auto_map="-")
        path = teacher / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
        wanted = "model.safetensors: not a sound safetensors file"
    before = contents(folder)
    ended = command(folder, capsys, *arguments)
    assert ended.code == 2
    [line] = ended.err
    assert line.startswith("error: ") and wanted in line
    assert contents(folder) == before
    assert not ran.exists()


def test_code_of_a_tokenizer_runs_if_told_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = with_code(folder)
    (folder / "teacher" / "modeling_x.py").write_text("raise SystemExit('this ran')", encoding="utf-8")
    ended = command(folder, capsys, "train", "recipe.yaml", "--trust-remote-code")
    assert ended.code == 0, ended.err
    assert ran.exists()
    assert ended.err[0].startswith("--trust-remote-code: tokenizers of these models may run Python code")
    # What was saved is data again: no code, and none named.
    student = folder / "runs" / "tiny" / "models" / "student"
    assert not list((folder / "runs").rglob("*.py"))
    assert "auto_map" not in (student / "tokenizer_config.json").read_text(encoding="utf-8")
    ran.unlink()
    ended = command(folder, capsys, "chat", "tiny", "--prompt", "def", "--max-tokens", "2")
    assert ended.code == 0, ended.err
    assert not ran.exists()


def test_a_recipe_cannot_ask_for_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = with_code(folder)
    for word in ("trust_remote_code=true", "teacher.trust_remote_code=true", "teacher.trust=true"):
        ended = command(folder, capsys, "plan", "recipe.yaml", word)
        assert ended.code == 2
        assert "unknown key" in ended.err[0]
    assert not ran.exists()


def test_a_student_needs_a_tokenizer_that_is_data() -> None:
    class Slow:
        is_fast = False

    Slow.__module__ = "transformers_modules.mine.tokenization_mine"
    with pytest.raises(ModelError, match="no student could be saved with it"):
        check_saveable(Slow())
    check_saveable(tiny_tokenizer())


def test_a_saved_folder_holds_no_code(folder: Path, tmp_path: Path) -> None:
    """mlx-lm's own `save` copies every `*.py` beside the weights."""
    (folder / "teacher" / "modeling_x.py").write_text("raise SystemExit('this ran')", encoding="utf-8")
    change(folder / "teacher" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    loaded = models.load(str(folder / "teacher"), "x")
    models.save(tmp_path / "ours", loaded)
    assert not list((tmp_path / "ours").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" in loaded.config  # the model in memory keeps what it came with

    from mlx_lm.utils import save as mlx_lm_save

    mlx_lm_save(tmp_path / "theirs", folder / "teacher", loaded.model, loaded.tokenizer, dict(loaded.config))
    assert list((tmp_path / "theirs").glob("*.py"))  # the usual mistake


# --- a model that cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"rms_norm_eps": "-"}, "mlx-lm cannot load this model: .*rms_norm_eps"),
        ({"rope_traditional": "x"}, "mlx-lm cannot run this model"),
        ({"hidden_size": -1}, "`hidden_size` is a whole number from 1 to 2147483647; got '-1'"),
        ({"hidden_size": 10**400}, "`hidden_size` is a whole number"),
        ({"hidden_size": 64.0}, "`hidden_size` is a whole number"),
        ({"hidden_size": 2**31 - 1}, "mlx-lm cannot load this model"),
        (
            {"num_hidden_layers": 10**9},
            "`num_hidden_layers` 1000000000, and the weight files hold 2. tensors",
        ),
        ({"num_hidden_layers": 3}, r"Missing 9 parameters: model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"Received 9 parameters not in model: .* \(see model\.safetensors\)"),
        ({"intermediate_size": 95}, r"for parameter .*mlp\.[a-z_]+\.weight \(see model\.safetensors\)"),
        ({"text_config": []}, "`text_config` is an object"),
        ({"architectures": [[]]}, "unhashable type"),
        ({"quantization": []}, "mlx-lm cannot load this model"),
        ({"eos_token_id": "x"}, "`eos_token_id` is an id or a list of them"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "mlx-lm cannot load this model"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_a_folder_is_made(
    keys: dict[str, Any], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder / "teacher" / "config.json", **keys)
    before = contents(folder)
    ended = command(folder, capsys, "train", "recipe.yaml")
    assert ended.code == 2
    [line] = ended.err
    assert line.startswith("error: ") and re.search(wanted, line), line
    assert contents(folder) == before


def test_a_model_is_checked_without_reading_a_weight(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(mx, "eval", none)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    check_model(made / "teacher", "teacher.model")
    assert mx.get_peak_memory() - before < 1000  # scalars; its weights take a hundred times as much
    with pytest.raises(ModelError, match="a weight was read"):
        models.load(str(made / "teacher"), "x")  # which evaluates


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "teacher" / "model.safetensors", folder / "teacher" / "model-2.safetensors")
    with pytest.raises(ModelError, match=r"stands in model-2\.safetensors and in model\.safetensors"):
        models.load(str(folder / "teacher"), "x")


# --- templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% set x = cycler.__init__.__globals__.os.system('touch ran') %}",
        "{{ raise_exception.__globals__['os'] }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.has_chat_template = template, True
    with pytest.raises(DataError, match="rows.jsonl:1: the chat template refuses the messages"):
        encode_prompt(Row(prompt="x", origin="rows.jsonl:1"), tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ " + "(" * 5000 + " }}", "maximum recursion depth"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ 10**9999 }}", "Exceeds the limit"),
        (5, "Can't compile"),
    ],
)
def test_a_template_may_raise_whatever_python_does(template: Any, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.has_chat_template = template, True
    with pytest.raises(DataError, match=f"rows.jsonl:1: the chat template refuses the messages .*{reason}"):
        encode_prompt(Row(prompt="x", origin="rows.jsonl:1"), tokenizer)


def test_a_template_that_writes_nothing_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.has_chat_template = "{{ none_such }}", True
    with pytest.raises(DataError, match="the chat template writes nothing for the messages"):
        encode(Row(prompt="x", completion="y", origin="rows.jsonl:1"), tokenizer)


def test_a_template_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_distill.data.template.LONGEST", 0.01)
    tokenizer = tiny_tokenizer()
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template, tokenizer.has_chat_template = loop, True
    with pytest.raises(ModelError, match=r"takes longer than 0\.01 s"):
        encode_prompt(Row(prompt="x", origin="rows.jsonl:1"), tokenizer)
    with pytest.raises(ModelError, match="takes longer"):
        turn_end(tokenizer)


def test_ctrl_c_ends_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.has_chat_template = "{{ messages }}", True

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(2)

    tokenizer.apply_chat_template = stopped
    for ask in (turn_end, lambda one: encode_prompt(Row(prompt="x"), one)):
        with pytest.raises(Interrupted):
            ask(tokenizer)


def test_a_time_limit_leaves_everything_as_it_was() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, never)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with pytest.raises(TimeoutError, match=r"longer than 0\.001 s"), time_limit(0.001):
            time.sleep(1000)
        assert signal.getsignal(signal.SIGALRM) is never
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        signal.setitimer(signal.ITIMER_REAL, 0)
        with time_limit(1000):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "", "a\\b", "a\nb", "-x", "~"])
def test_a_run_has_a_name_and_no_path(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder.parent)
    ended = command(folder, capsys, "plan", "recipe.yaml", f"name={json.dumps(name)}")
    assert ended.code == 2
    assert "`name`" in ended.err[0]
    assert contents(folder.parent) == before


def test_a_cache_is_never_made_of_a_folder_with_other_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "00000.safetensors").write_text("a thing of mine", encoding="utf-8")
    before = contents(folder)
    cached = ("teacher.source=cache", "teacher.top_k=8", "teacher.cache=mine")
    ended = command(folder, capsys, "train", "recipe.yaml", *cached)
    assert ended.code == 2
    assert "mine is no cache and not empty" in ended.err[0]
    assert contents(folder) == before


@pytest.mark.parametrize("typed", ["plan", "compress", "report", "recipes", "watch"])
def test_a_name_that_no_file_system_takes(
    typed: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = command(folder, capsys, typed, "a" * 5000)
    assert ended.code == 2
    [line] = ended.err
    assert line.startswith("error: ")
    long = "teacher={model: teacher, source: cache, top_k: 4, cache: %s}" % ("a" * 5000)
    assert command(folder, capsys, "plan", "recipe.yaml", long).code in (0, 2)


def test_a_command_that_is_no_utf8_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux a file may be called anything; Python hands its bytes on as halves of surrogate pairs."""
    monkeypatch.setattr(sys, "argv", ["mlx-distill", "train", "caf\udce9.yaml"])
    assert json.dumps(environment()["command"], ensure_ascii=False).encode()


def test_a_batch_has_an_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan of batches filled up with rows drawn again took for ever."""
    ended = command(folder, capsys, "plan", "recipe.yaml", "train.batch_tokens=1000000000000")
    assert ended.code == 2
    assert ended.err[0].startswith("error: recipe.yaml: `train.batch_tokens`")


def test_problems_do_not_unpack_to_more_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_distill.evaluate.problems.LARGEST", 1000)
    path = tmp_path / "humaneval.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(DataError, match="unpacked, more than 1000 bytes"):
        read_problems(str(path), "x")
    path.write_bytes(gzip.compress(b"x" * 999)[:12] + b"\xff" * 40)
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(str(path), "x")


@pytest.mark.parametrize("content", ["", "[", "[" * 99999, "3"])
def test_the_supervisor_passes_over_a_damaged_list_of_stages(content: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(content, encoding="utf-8")
    assert _reached([tmp_path], []) == set()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 7, b"\xff" * 99, b"\x02" + bytes(7) + b"[]", b"\2" + bytes(9)]
)
def test_a_damaged_shard_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError):
        read_arrays(tmp_path / "x")


# --- a run folder that was damaged ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop with a trained run."""
    root = Path(shutil.copytree(made, tmp_path_factory.mktemp("trained") / "workshop"))
    done = workshop.process(root, "train", "recipe.yaml")
    assert done.wait() == 0
    return root


DAMAGED = [
    "",
    "[",
    "[]",
    "[" * 9999,
    '{"train": 3}',
    '{"train": {"train_tokens": "x"}}',
    '{"train": {"train_seconds": NaN}}',
    '{"a": {"models": 1}}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_list_of_stages_is_a_line(
    content: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "runs" / "tiny" / "stages.json"
    whole = path.read_text(encoding="utf-8")
    path.write_text(content, encoding="utf-8")
    ended = command(trained, capsys, "train", "recipe.yaml", "--resume")
    path.write_text(whole, encoding="utf-8")
    assert ended.code == 2
    [line] = ended.err
    assert line.startswith(f"error: {path.relative_to(trained)}: damaged (")
    assert line.endswith("remove it and go on with --resume: what is whole is not done again")


def test_the_way_on_is_one(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "runs" / "tiny"
    whole, student = (
        (run / "stages.json").read_text(encoding="utf-8"),
        run / "models" / "student" / "model.safetensors",
    )
    before = student.read_bytes()
    (run / "stages.json").unlink()
    assert command(trained, capsys, "train", "recipe.yaml", "--resume").code == 0
    assert json.loads((run / "stages.json").read_text(encoding="utf-8")).keys() == json.loads(whole).keys()
    assert student.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"), [(b'"a"', b'"b"'), (b"1}", b"2}"), (b"{", b""), (b"\n", b""), (b'{"a": 1}\n', b"")]
)
def test_rows_that_were_changed_are_not_learned(old: bytes, new: bytes, tmp_path: Path) -> None:
    run = Run(tmp_path, Console(io.StringIO()))
    rows = [{"a": 1}, {"b": "\u2028"}]
    run.write_rows("generated", rows)
    assert run.read_rows("generated") == rows
    path = tmp_path / "samples" / "generated.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(RunFolderError, match="generated.jsonl: damaged .*go on with --resume"):
        run.read_rows("generated")
    path.unlink()
    with pytest.raises(RunFolderError, match="generated.jsonl: gone; remove"):
        run.read_rows("generated")


def test_numbers_of_a_file_are_numbers() -> None:
    values = [1, 2.5, 10**400, float("nan"), True, "1", None]
    assert [number(value) for value in values] == [1, 2.5, None, None, None, None, None]


def test_a_model_that_cannot_run_is_no_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "teacher" / "config.json", rope_theta={"a": None})
    ended = command(folder, capsys, "chat", "teacher", "--prompt", "def")
    assert ended.code == 2
    [line] = ended.err
    assert "mlx-lm cannot run this model" in line


@pytest.mark.parametrize("started", [True, 3, [], {}, None])
def test_watch_takes_any_environment(started: Any, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(trained / "runs" / "tiny" / "environment.json", command=started)
    assert command(trained, capsys, "watch", "tiny", "--once").code == 0


# --- secrets ------------------------------------------------------------------------------------


def test_no_secret_is_written_to_a_run_folder(
    folder: Path, fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in the environment, in what a server says, in a wrong option, on the command line."""
    hub, mine = "hf_" + "q" * 30, "correct-horse-battery"
    for name, value in {
        "HF_TOKEN": hub,
        "WANDB_API_KEY": "w" * 40,
        "SERVER_KEY": KEY,
        "MY_PASSWORD": mine,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxypass77@localhost:1")
    rows = [{"prompt": f"def sub(x, {i}):"} for i in range(4)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refusal = Reply(status=400, body={"error": f"no {KEY} here"})
    fake.script.extend([refusal, refusal, refusal, Reply(body=said(f"the key is {KEY}"))])
    server = f"url: '{fake.url}', model: tiny, key_variable: SERVER_KEY, at_once: 1"
    words = [
        "data.prompts=asked.jsonl",
        f"generate.endpoint={{{server}}}",
        f"generate.system={mine}",
    ]
    ended = command(folder, capsys, "train", "recipe.yaml", "--resume", *words)
    run = folder / "runs" / "tiny"
    # The one place for it is an option that says it: that is what the user wrote there.
    assert ended.code == 0, ended.err
    for secret in (hub, "w" * 40, KEY, "proxypass77"):
        holding = [path for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert not holding, secret
    holding = [path.name for path in run.rglob("*") if path.is_file() and mine.encode() in path.read_bytes()]
    assert holding == ["recipe.yaml"]
    assert "***" in json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"]
    assert any(key == f"Bearer {KEY}" for key in fake.keys)  # it was there to be found


def test_what_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    monkeypatch.setenv("OTHER_KEY", "true")
    monkeypatch.setenv("PLAIN", "plainly-visible")
    text = "x=abcdefgh1234 true plainly-visible https://me:word@host/v1"
    assert without_secrets(text) == "x=*** true plainly-visible https://***@host/v1"
    assert without_secrets("http://me:p@ss@host/a and me@x") == "http://***@host/a and me@x"
    assert without_secrets("http://host/v1?to=me@x") == "http://host/v1?to=me@x"
    for name in ("DB_PASS", "BASIC_AUTH", "aws_secret", "MY_CREDENTIALS"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert without_secrets(f"it is value-of-{name}") == "it is ***"
