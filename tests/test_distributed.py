"""Several processes share a run, and leave what one would have left."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten, tree_map
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill import __version__
from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.distributed import ALONE, Ranks, copies, helping, joining
from mlx_distill.distributed import watching as watching_module
from mlx_distill.distributed.dealing import Deal, adds_nothing, deal_of
from mlx_distill.distributed.links import Door, Link, Message, knock
from mlx_distill.distributed.watching import Watch
from mlx_distill.errors import DataError, Diverged, ModelError, RecipeError, Stopped
from mlx_distill.interrupt import Interrupts
from mlx_distill.models.divided import divide
from mlx_distill.odd_files import odd_in
from mlx_distill.optimizer import make_optimizer
from mlx_distill.preflight import prepare
from mlx_distill.recipe import determining
from mlx_distill.recipe import load as load_recipe
from mlx_distill.teacher import NoTeacher
from mlx_distill.train import make_objective, make_step

SIZES = [(size, micro) for size in range(1, 6) for micro in range(1, 5)]

# Which rank computes what


@pytest.mark.parametrize(("size", "micro_batches"), SIZES)
def test_every_row_of_a_step_is_computed_once(size: int, micro_batches: int):
    rows = {i: [Encoded([10 * i + j, 1, 2], 1) for j in range(3)] for i in range(2 * micro_batches)}
    for step in (1, 2):
        seen: Counter[int] = Counter()
        for rank in range(size):
            deal = Deal(rank, size, micro_batches)
            for piece in deal.pieces(step):
                assert piece.number // deal.each == step - 1
                batch = piece.of(make_batch(rows[piece.micro_batch]))
                if not adds_nothing(batch):
                    seen.update(np.array(batch.tokens)[:, 0].tolist())
        wanted = [row.tokens[0] for i in range(micro_batches) for row in rows[(step - 1) * micro_batches + i]]
        assert seen == Counter(wanted)


def test_no_rank_computes_a_whole_micro_batch_more_than_another():
    for size, micro_batches in SIZES:
        counts = []
        for rank in range(size):
            deal = Deal(rank, size, micro_batches)
            counts.append(sum(1 / piece.parts for piece in deal.pieces(1) if not piece.idle))
        assert sum(counts) == pytest.approx(micro_batches)
        assert max(counts) - min(counts) <= 1


def test_a_loss_that_weighs_whole_batches_keeps_them_whole():
    balanced = tiny_recipe(
        objective={"forward_kl": {}, "hidden_mse": {"balanced": True}}, train={"micro_batches": 1}
    )
    assert deal_of(balanced, 1, 4).parts == 1
    assert [piece.idle for piece in deal_of(balanced, 1, 4).pieces(1)] == [True]
    assert deal_of(tiny_recipe(), 1, 4).parts == 4


def gradients_of_ranks(size: int, micro_batches: int) -> list[Any]:
    """Sums and weight of each rank for one step on rows of very different length."""
    recipe = tiny_recipe(
        teacher=None,
        student={"tokenizer": {"pieces": 64}},
        objective={"cross_entropy": {}},
        train={"micro_batches": micro_batches, "compile": False},
    )
    student = tiny_model().model
    optimizer = make_optimizer(recipe.train)
    optimizer.init(student.trainable_parameters())
    functions = make_step(make_objective(student, [], recipe, 50), optimizer, recipe)
    lengths = [20, 20, 1, 1, 20, 1, 20, 1]
    each = len(lengths) // micro_batches
    rows = rows_of(lengths)
    batches = [make_batch(rows[i * each : (i + 1) * each]) for i in range(micro_batches)]
    found = []
    for rank in range(size):
        total: Any = None
        for piece in Deal(rank, size, micro_batches).pieces(1):
            batch = piece.of(batches[piece.micro_batch])
            gradients, _ = functions.gradients(batch, [NoTeacher().targets(batch)], {})
            new = [gradients, batch.weights.sum()]
            new = tree_map(mx.zeros_like, new) if adds_nothing(batch) else new
            total = new if total is None else tree_map(mx.add, total, new)
        mx.eval(total)
        found.append(total)
    return found


def mean_of(sums: list[Any]) -> dict[str, mx.array]:
    gradients, weight = sums[0]
    for more, other in sums[1:]:
        gradients, weight = tree_map(mx.add, gradients, more), weight + other
    leaves: Any = tree_flatten(gradients)
    return {name: array / weight for name, array in leaves}


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 1), (2, 4), (3, 2), (4, 1), (5, 4)])
def test_the_gradient_is_that_of_one_process(size: int, micro_batches: int):
    alone = mean_of(gradients_of_ranks(1, micro_batches))
    ranks = gradients_of_ranks(size, micro_batches)
    assert largest_gap(mean_of(ranks), alone) < 1e-6

    # The usual mistake, the mean over machines of their means (`nn.average_gradients`), must not pass.
    busy = [mean_of([one]) for one in ranks if one[1].item()]
    wrong = {name: sum((one[name] for one in busy), mx.array(0.0)) / len(busy) for name in alone}
    assert largest_gap(wrong, alone) > 1e-2


# Connections


def met(*, stranger: bool = False) -> tuple[dict[Any, Link], dict[str, Link]]:
    """The links of rank 0 and of rank 1."""
    door = Door(["127.0.0.1"])
    found: dict[Any, Link] = {}
    thread = threading.Thread(target=lambda: found.update(door.let_in(2, 20)))
    thread.start()
    if stranger:
        with socket.create_connection(("127.0.0.1", door.card["port"])) as strange:
            strange.sendall(b"\xff" * 37)
            assert strange.recv(1) == b""  # shut
    mine = knock(door.card, 1)
    thread.join()
    return found, mine


Pair = tuple[Link, Link]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Rank 0's link to rank 1, and rank 1's to rank 0."""
    found, mine = met()
    yield found[1, "orders"], mine["orders"]
    for link in [*found.values(), *mine.values()]:
        link.close()


def test_a_stranger_is_not_let_in():
    found, mine = met(stranger=True)
    assert sorted(found) == [(1, "orders"), (1, "watch")]
    for link in [*found.values(), *mine.values()]:
        link.close()


def test_who_does_not_come_is_named():
    with pytest.raises(Stopped, match=r"rank 1 did not connect to rank 0 within 0 s.*firewall.*127\.0\.0\.1"):
        Door(["127.0.0.1"]).let_in(3, 0.01)
    card = {"addresses": ["127.0.0.1"], "port": 1, "token": "0" * 32}
    with pytest.raises(Stopped, match="rank 2 reaches rank 0 at none of 127.0.0.1"):
        knock(card, 2)


@pytest.mark.parametrize("sees", [True, False])
def test_files_are_linked_where_they_are_seen_and_copied_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Pair, sees: bool
):
    monkeypatch.setattr(copies, "AT_ONCE", 5)
    if not sees:
        monkeypatch.setattr(copies, "is_same", lambda path, told: False)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name, content in {"a": b"some thirteen", "b": b"", "c": b"12345"}.items():
        (here / name).write_bytes(content)
    (there / "cache").mkdir(parents=True)
    (there / "cache" / "a").write_bytes(b"of an earlier stage, and longer")
    mine, theirs = pair
    first, second = Ranks(0, 2, None, [mine]), Ranks(1, 2, None, [theirs])

    def helps() -> None:
        while (order := second.order()) is not None:
            task, part = order.value["task"], order.value["part"]
            done = copies.find(there, part) if task == "find" else copies.write(there, part, order.data)
            second.reply(done)

    thread = threading.Thread(target=helps)
    thread.start()
    for _ in range(2):  # the second time over what the first has linked
        copies.give(first, {f"cache/{name}": here / name for name in "abc"})
    first.finish()
    thread.join()
    for name in "abc":
        assert (there / "cache" / name).read_bytes() == (here / name).read_bytes()
    assert (there / "cache").is_symlink() == sees
    assert odd_in(there / "cache") is None


def test_alone_nothing_is_shared():
    assert ALONE.share("answers", [[1, 2]], lambda part: Message(sum(part))) == [Message(3)]
    assert ALONE.exchange(1) == [1]
    assert ALONE.from_first(lambda: 2) == 2
    assert ALONE.every_part([3, 4], lambda items: [2 * item for item in items]) == [6, 8]


def test_only_what_a_launcher_starts_is_one_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not joining.launched()
    (tmp_path / "hosts").write_text("\n", encoding="utf-8")  # as `mlx.launch -n 1` has it
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert not joining.launched()
    (tmp_path / "hosts").write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]', encoding="utf-8")
    assert joining.launched()


# What the other ranks do


def helped(monkeypatch: pytest.MonkeyPatch, folder: Path, pair: Pair, *overrides: str, **known: Any) -> Any:
    """Rank 1 in a thread, in `folder`, and rank 0 that gives it no order; what it had set MLX's limit to."""
    workshop.make(folder)
    monkeypatch.chdir(folder)
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_memory_limit", limits.append)
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limit)
    monkeypatch.setattr(helping.Forwarded, "caught", lambda self: nullcontext())  # this is no main thread
    mine, theirs = pair
    first, second = Ranks(0, 2, None, [mine]), Ranks(1, 2, None, [theirs], Watch(1, []))
    faults: list[BaseException] = []

    def helps() -> None:
        try:
            helping.help_out(second)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=helps)
    thread.start()
    prepared = prepare(load_recipe(folder / "recipe.yaml", list(overrides)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in known.items():
                patch.setattr(*((prepared,) if name == "fingerprint" else (helping,)), name, value)
            helping.agree(first, prepared)
    finally:
        first.finish()
        thread.join()
    return limits, faults


def test_every_rank_keeps_to_the_recipe_of_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Pair
):
    limits, faults = helped(monkeypatch, tmp_path, pair, "train.memory_gib=3")
    assert faults == []
    assert limits == [3 * 2**30]


def test_ranks_that_read_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Pair
):
    with pytest.raises(DataError, match="rank 1 reads other data or other weights than rank 0"):
        helped(monkeypatch, tmp_path, pair, fingerprint="another")


def test_ranks_of_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, pair: Pair):
    mine, theirs = pair
    other = {"mlx-distill": __version__, "mlx": "0.1", "mlx-lm": version("mlx-lm")}
    thread = threading.Thread(target=lambda: Ranks(1, 2, None, [theirs]).exchange(other))
    thread.start()
    line = f"rank 1 has mlx 0.1 and rank 0 {version('mlx')}; install the same on both"
    with pytest.raises(DataError, match=line):
        helping._same_versions(Ranks(0, 2, None, [mine]))
    thread.join()


# The end of one is the end of all


def watching(rank: int, link: Link) -> tuple[Watch, list[int], threading.Event]:
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    return Watch(rank, [link], end=end), codes, ended


def test_a_rank_that_dies_ends_the_others(pair: Pair, capfd: pytest.CaptureFixture[str]):
    mine, theirs = pair
    watch, codes, ended = watching(0, mine)
    words: list[str] = []
    watch.last_words = words.append
    theirs.close()
    assert ended.wait(20)
    assert codes == [75]
    assert words == ["rank 1 ended without a word; all stop; go on with --resume"]
    assert capfd.readouterr().err == f"error: {words[0]}\n"


def test_a_rank_that_fails_says_why(pair: Pair, capfd: pytest.CaptureFixture[str]):
    mine, theirs = pair
    _, codes, ended = watching(0, mine)
    theirs.send({"ended": "teacher.model: no such folder", "code": 2})
    assert ended.wait(20)
    assert codes == [2]  # nothing to go on with: it would end there again
    assert capfd.readouterr().err == "error: rank 1 ended (teacher.model: no such folder); all stop\n"


def test_the_end_of_rank_0_is_told_by_rank_0_alone(pair: Pair, capfd: pytest.CaptureFixture[str]):
    mine, theirs = pair
    _, codes, ended = watching(1, theirs)
    watch, _, _ = watching(0, mine)
    watch.ended_by(Diverged("the gradient is not finite"))
    assert ended.wait(20)
    assert codes == [70]
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_a_rank_to_which_mlx_never_returns(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """One alone may be waited for: a step can take long."""
    monkeypatch.setattr(watching_module, "HUNG", 0.01)
    mine, theirs = pair
    watch, codes, ended = watching(0, mine)
    other, more, told = watching(1, theirs)
    monkeypatch.setattr(watch, "interrupts", Interrupts())  # whose handlers never run
    with watch.heeding():
        written = signal.set_wakeup_fd(-1, warn_on_full_buffer=False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        os.write(written, bytes([signal.SIGINT]))
        while not watch._signals:
            time.sleep(0.001)
        other.tell({"signal": signal.SIGINT})  # the same Ctrl-C, which reached all; no second one
        assert not ended.wait(0.1)
        os.write(written, bytes([signal.SIGHUP]))  # comes twice by itself
        os.write(written, bytes([signal.SIGINT]))
        assert ended.wait(20)
    assert codes == [130]
    assert capfd.readouterr().err == "error: SIGINT came twice, and MLX hangs; go on with --resume\n"
    assert told.wait(20)
    assert more == [130]


def test_an_orderly_end_is_none(pair: Pair, capfd: pytest.CaptureFixture[str]):
    mine, theirs = pair
    first, codes, _ = watching(0, mine)
    second, more, _ = watching(1, theirs)
    thread = threading.Thread(target=second.done)
    thread.start()
    first.done()
    thread.join()
    assert codes == more == []
    assert capfd.readouterr().err == ""


# Real processes


class Rank(NamedTuple):
    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def start(
    folder: Path, size: int, *command: str, others: Path | None = None
) -> "list[subprocess.Popen[str]]":
    """The processes that `mlx.launch -n SIZE --backend ring` starts.

    Args:
        others: where all but the first work, with a folder `tmp` for what they need for the time being.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]), encoding="utf-8")
    common = {**os.environ, "PYTHONPATH": str(workshop.REPOSITORY), "OPENBLAS_NUM_THREADS": "1"}
    common |= {"MLX_HOSTFILE": str(hosts), "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=others if others and rank else folder,
            env={**common, "MLX_RANK": str(rank)}
            | ({"TMPDIR": str(others / "tmp")} if others and rank else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes: "list[subprocess.Popen[str]]", seconds: float = 120) -> list[Rank]:
    try:
        said = [one.communicate(timeout=seconds) for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [Rank(one.returncode, *texts) for one, texts in zip(processes, said, strict=True)]


def ranks_run(folder: Path, size: int, *arguments: str) -> list[Rank]:
    return ends(start(folder, size, "-m", "mlx_distill", *arguments))


def ours(err: str) -> str:
    """Without what MLX's ring prints itself when a peer has gone."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("[ring]"))


def losses(folder: Path, name: str) -> list[tuple[str, int, float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    return [(one["stage"], one["step"], one["loss"]) for one in values if "loss" in one]


def assert_same_curve(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    assert [line[:2] for line in one] == [line[:2] for line in other]
    np.testing.assert_allclose([line[2] for line in one], [line[2] for line in other], rtol=tolerance)


def test_two_ranks_do_together_what_each_could_not_alone(tmp_path: Path):
    script = Path(__file__).with_name("two_ranks.py")
    first, second = ends(start(tmp_path, 2, str(script)))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    found = [json.loads(one.out) for one in (first, second)]
    assert [(one.pop("rank"), one.pop("size")) for one in found] == [(0, 2), (1, 2)]
    assert found[0] == found[1]
    one = found[0]
    assert one["total"] == {
        "wide": [3.0 * i for i in range(40)],
        "half": [[[3.0, 3.0]] * 3, "mlx.core.bfloat16"],
        "count": [2**24, "mlx.core.int32"],
        "weight": 2.0,
    }
    assert one["exchanged"] == [{"of": 0}, {"of": 1}]
    assert one["parts"] == [[item, item % 2] for item in range(7)]
    assert one["from_first"] == "of rank 0"
    assert one["counters"] == {"step": 3}
    assert one["bias"] == np.array([-0.0, np.nan, np.inf, 1e-45], np.float32).view(np.uint32).tolist()
    assert one["equal"] is None
    assert one["not due"] is None
    assert "step 10: weights had drifted apart (rank 1 by 9" in one["drifted"]
    single, shared = one["curves"]
    assert len(single) == 8
    assert single[-1] < 0.9 * single[0]  # it learns, so that a wrong gradient would show
    np.testing.assert_allclose(shared, single, rtol=1e-5)
    for how in ("tensor", "pipeline"):  # a teacher held in parts
        assert one[how]["logits"] < 1e-5
        assert one[how]["targets"] < 1e-5
        assert 0.4 < one[how]["held"] < 0.9
        assert one[how]["counted"]
        assert one[how]["same answers"]
        assert one[how]["tokens"] > 3
    assert one["fault"].startswith("step 10: the weights of rank 1 are 0.1 off those of rank 0; go on with")


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workshop.make(tmp_path)
    options = ["recipe.yaml", "train.steps=8", "train.compile=false"]
    single = workshop.command(tmp_path, capsys, "train", *options, "name=one")
    assert single.code == 0, single.err
    other = tmp_path / "another machine"
    (other / "tmp").mkdir(parents=True)
    before = workshop.contents(workshop.make(other))
    command = ["-m", "mlx_distill", "train", *options, "name=two"]
    first, second = ends(start(tmp_path, 2, *command, others=other))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err, first.err) == ("", "", "")
    # Rank 0 alone writes, and nothing stays of what it sent; in tmp/mlx are kernels that MLX compiled.
    assert {
        name for name in workshop.contents(other) if name.split("/")[:2] != ["tmp", "mlx"]
    } == before.keys()
    assert "2 processes share answers, caches and training" in first.out
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert len(one) == 8
    assert_same_curve(one, two)
    assert single.out.count(" step ") == first.out.count(" step ")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"one", "two"}


RECIPE = """
name: full
student:
  shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: teacher, source: cache, top_k: 8}
data: {train: good.jsonl, prompts: prompts.jsonl, valid: good.jsonl, test: good.jsonl, max_tokens: 256}
generate: {max_tokens: 100, batch_size: 2, temperature: 1.0, samples: 2, filters: {}}
objective:
  forward_kl: {weight: 1.0}
  cross_entropy: {weight: 0.5}
train: {steps: 6, batch_tokens: 512, learning_rate: 1e-3, micro_batches: 3, log_every: 1, eval_every: 3}
evaluate: {tasks: [fidelity]}
"""


def full(folder: Path) -> None:
    """A folder with a recipe that answers prompts, fills a cache, and trains from it."""
    workshop.make(folder)
    prompts = [{"prompt": f"def mul(y, {i}):"} for i in range(40)]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8"
    )
    (folder / "full.yaml").write_text(RECIPE, encoding="utf-8")


def alone(folder: Path, *arguments: str) -> None:
    process = workshop.process(folder, *arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "more"), [(2, []), (3, []), (4, []), (2, ["teacher.parallel=tensor", "generate.max_tokens=20"])]
)
def test_a_whole_run_is_that_of_one_process(tmp_path: Path, size: int, more: list[str]):
    full(tmp_path)
    alone(tmp_path, "run", "full.yaml", "name=one", *more)
    found = ranks_run(tmp_path, size, "run", "full.yaml", "name=many", *more)
    assert [one.code for one in found] == [0] * size, found
    assert {(one.out, one.err) for one in found[1:]} == {("", "")}
    one, many = tmp_path / "runs" / "one", tmp_path / "runs" / "many"
    for name in ("samples/generated.jsonl", "cache/teacher/00000.safetensors"):
        assert (one / name).read_bytes() == (many / name).read_bytes()
    assert_same_curve(losses(tmp_path, "one"), losses(tmp_path, "many"))
    assert workshop.contents(one).keys() == workshop.contents(many).keys()


@pytest.mark.slow
@pytest.mark.parametrize("own", ["share: 0.9, temperature: 1.0", "share: 0.6, buffer: 64"])
def test_own_answers_are_written_by_all_and_learned_by_all(tmp_path: Path, own: str):
    workshop.make(tmp_path)
    more = ["train.steps=8", "train.micro_batches=2", f"generate.on_policy={{max_tokens: 8, {own}}}"]
    alone(tmp_path, "train", "recipe.yaml", "name=one", *more)
    found = ranks_run(tmp_path, 3, "train", "recipe.yaml", "name=many", *more)
    assert [one.code for one in found] == [0] * 3, found
    assert_same_curve(losses(tmp_path, "one"), losses(tmp_path, "many"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path: Path, rank: int):
    """Killed behind step 20 of 24, which has a checkpoint; the rest is done by two, and by one."""
    workshop.make(tmp_path)
    options = ["recipe.yaml", "train.steps=24", "train.save_every=5"]
    processes = start(tmp_path, 3, "-m", "mlx_distill", "train", *options, "name=many")
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if "step    16/" in line:
            break
    processes[rank].kill()
    killed = time.monotonic()
    found = ends(processes, 30)
    assert time.monotonic() - killed < 10
    assert [one.code for place, one in enumerate(found) if place != rank] == [75, 75]
    line = f"error: rank {rank} ended without a word; all stop; go on with --resume"
    assert line in "".join(one.err for one in found)

    first, second = ranks_run(tmp_path, 2, "train", *options, "name=many", "--resume")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "going on from step 15" in first.out
    alone(tmp_path, "train", *options, "name=one")
    assert_same_curve(losses(tmp_path, "one"), losses(tmp_path, "many"))


@pytest.mark.slow
@pytest.mark.parametrize(("to", "number"), [([0, 1], signal.SIGINT), ([1], signal.SIGTERM)])
def test_a_signal_at_any_rank_saves_once_and_ends_all(tmp_path: Path, to: list[int], number: signal.Signals):
    workshop.make(tmp_path)
    processes = start(tmp_path, 2, "-m", "mlx_distill", "train", "recipe.yaml", "train.steps=5000")
    assert processes[0].stdout is not None
    next(line for line in processes[0].stdout if "step     5/" in line)
    for rank in to:
        processes[rank].send_signal(number)
    found = ends(processes, 30)
    assert [one.code for one in found] == [128 + number] * 2
    assert "--resume" in found[0].err
    assert ours(found[1].err) == ""
    assert len(list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("data", "error: rank 1 reads other data or other weights than rank 0"),
        ("model", "error: rank 1 ended (teacher.model: no folder 'teacher'"),
    ],
)
def test_a_machine_that_lacks_something_is_named(tmp_path: Path, change: str, line: str):
    workshop.make(tmp_path)
    other = tmp_path / "other"
    (other / "tmp").mkdir(parents=True)
    workshop.make(other)
    if change == "data":
        with (other / "good.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"prompt": "def more(x):", "completion": " return x"}\n')
    else:
        shutil.rmtree(other / "teacher")
    found = ends(start(tmp_path, 2, "-m", "mlx_distill", "train", "recipe.yaml", others=other), 60)
    assert [one.code for one in found] == [2, 2], found
    assert found[0].err.startswith(line), found[0].err
    assert found[0].err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_at_a_second_ctrl_c(tmp_path: Path):
    workshop.make(tmp_path)
    processes = start(tmp_path, 2, "-m", "mlx_distill", "train", "recipe.yaml", "train.steps=5000")
    assert processes[0].stdout is not None
    next(line for line in processes[0].stdout if "step     5/" in line)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1)  # now rank 0 waits for it, inside of MLX
    for _ in range(2):
        processes[0].send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = processes[0].communicate(timeout=30)
    processes[1].send_signal(signal.SIGCONT)
    ends(processes[1:], 30)
    assert [one.returncode for one in processes] == [130, 130]
    assert ours(err) == "error: SIGINT came twice, and MLX hangs; go on with --resume\n"


@pytest.mark.parametrize(
    ("what", "arguments"), [("compress", ["compress"]), ("--supervise", ["run", "--supervise"])]
)
def test_what_works_in_one_process_is_refused_as_one_of_several(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    arguments: list[str],
):
    (tmp_path / "recipe.yaml").write_text(workshop.RECIPE, encoding="utf-8")
    monkeypatch.setenv("MLX_RANK", "1")
    ended = workshop.command(tmp_path, capsys, *arguments, "recipe.yaml")
    line = f"error: `{what}` works in one process; start it without mlx.launch"
    assert (ended.code, ended.err) == (2, [line])
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


# A teacher held in parts


class Group:
    """As much of a group as dividing takes."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("how", "size", "line"),
    [
        ("pipeline", 2, "`teacher.model`: a llama cannot be divided by pipeline; use tensor"),
        ("tensor", 3, "cannot divide it by tensor among 3 processes .*; start another number of them"),
        ("tensor", 4, "cannot divide it by tensor among 4 processes .*; start another number of them"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(how: Any, size: int, line: str):
    """Four processes would have half a head each, which mlx-lm does not notice."""
    group: Any = Group(size)
    with pytest.raises(ModelError, match=line):
        divide(tiny_model().model, how, group, "`teacher.model`")


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"teacher": {"source": "live"}},
            "`parallel` is for a model that fills a cache; it needs source 'cache'",
        ),
        ({"teacher": {"quantize": {"bits": 4, "group_size": 32}}}, "divides the weights as they are stored"),
        (
            {"objective": {"hidden_mse": {}}, "teacher": {"parallel": "pipeline"}},
            "no process sees the hidden",
        ),
        (
            {"student": {"shape": None, "prune": {"ratio": 0.5}}},
            "`teacher.parallel`: `student.prune` cuts a teacher, which takes a whole one",
        ),
    ],
)
def test_what_a_divided_teacher_cannot_do_is_refused(sections: dict[str, Any], line: str):
    teacher = {"model": "embedded", "source": "cache", "top_k": 8, "parallel": "tensor"}
    sections = {**sections, "teacher": {**teacher, **sections.get("teacher", {})}}
    with pytest.raises(RecipeError, match=line):
        tiny_recipe(**sections)


def test_how_a_teacher_is_divided_is_no_part_of_what_is_learned():
    teacher = {"model": "embedded", "source": "cache", "top_k": 8}
    whole, divided = (tiny_recipe(teacher={**teacher, "parallel": how}) for how in (None, "tensor"))
    assert determining(whole) == determining(divided)
