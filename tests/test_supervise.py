"""The supervisor: what it starts again, what it does not, and that the student is the same for it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import workshop
from workshop import command

from mlx_distill import supervise as supervisor
from mlx_distill.errors import RecipeError
from mlx_distill.interrupt import Interrupted, Interrupts
from mlx_distill.supervise import FIRST_PAUSE, TRIES, arguments, keep_awake, supervise

# A program in the place of a run: it notes how it was started, does what `plan` says of this try, and ends.
CHILD = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
plan = json.loads((folder.parent / "plan.json").read_text())
notes = folder.parent / "tries.jsonl"
tries = len(notes.read_text().splitlines()) if notes.exists() else 0
with open(notes, "a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
act = plan[min(tries, len(plan) - 1)]
if act.get("opens", True):
    folder.mkdir(exist_ok=True)
    (folder / "fingerprint").write_text(f"{tries}")
    os.utime(folder / "fingerprint", ns=(tries + 1, tries + 1))
    (folder / "log.txt").touch()
if "makes" in act:
    (folder / act["makes"]).mkdir(parents=True)
if "finishes" in act:
    (folder / "stages.json").write_text(json.dumps({name: {} for name in act["finishes"]}))
sys.stdout.write(act.get("out", ""))
sys.stdout.flush()
os.write(2, act.get("err", "").encode())
if "kills" in act:
    os.kill(os.getpid(), act["kills"])
if act.get("waits"):
    def came(number, frame):
        with open(folder / "came", "a") as file:
            file.write(f"{number} ")
        time.sleep(0.2)  # as long as a checkpoint takes: a second signal would be noted
        sys.exit(act.get("code", 128 + number))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, came)
    (folder / ".ready").write_text(str(os.getpgid(0)))
    (folder / ".ready").rename(folder / "ready")
    time.sleep(60)
sys.exit(act.get("code", 0))
"""
ABORT = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer "
    "execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)\n"
)
KILLED = {"kills": signal.SIGKILL}


class Place:
    """A folder in which a fake run is supervised."""

    def __init__(self, folder, capfd):
        self.folder, self.capfd, self.pauses = folder, capfd, []
        (folder / "child.py").write_text(CHILD, encoding="utf-8")

    @property
    def run(self):
        return self.folder / "run"

    def commands(self):
        child = [sys.executable, str(self.folder / "child.py"), str(self.run)]
        return [*child, "first"], [*child, "again"]

    def supervise(self, *plan):
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        return supervise(*self.commands(), [self.run], pause=self.pauses.append)

    def tries(self):
        return [
            json.loads(line)[0]
            for line in (self.folder / "tries.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    def log(self):
        """Lines of log.txt without their times."""
        return [line[21:] for line in (self.run / "log.txt").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def place(tmp_path, capfd):
    return Place(tmp_path, capfd)


def checkpoint(step):
    return {"makes": f"checkpoints/step-{step:06d}"}


def test_a_run_that_crashes_is_gone_on_with_until_it_succeeds(place):
    code = place.supervise(
        KILLED | checkpoint(10),
        {"kills": signal.SIGSEGV} | checkpoint(20),
        {"code": 1, "finishes": ["train"]},
        {"code": 0, "out": "done\n"},
    )
    assert code == 0
    assert place.tries() == ["first", "again", "again", "again"]
    assert place.pauses == [FIRST_PAUSE, 4 * FIRST_PAUSE, 16 * FIRST_PAUSE]
    assert place.log() == [
        "supervisor: the run ended by SIGKILL (kill -9, or the system was out of memory)",
        "supervisor: try 2 of 5 in 1 s",
        "supervisor: the run ended by SIGSEGV",
        "supervisor: try 3 of 5 in 4 s",
        "supervisor: the run ended by exit code 1",
        "supervisor: try 4 of 5 in 16 s",
    ]


def test_output_is_shown_as_it_is(place):
    shown = "\x1b[2K  12%|██  | 3/25\r\x1b[31mno newline at the end"
    assert place.supervise({"out": "step 1\n", "err": shown}) == 0
    said = place.capfd.readouterr()
    assert said.out == "step 1\n"
    assert said.err == shown


@pytest.mark.parametrize("plan", [[KILLED], [KILLED | checkpoint(10), KILLED]])
def test_without_progress_it_ends(plan, place):
    """One more try after the first crash; then each must get further than all before."""
    assert place.supervise(*plan) == 128 + signal.SIGKILL
    assert len(place.tries()) == 2
    assert place.log()[-2:] == [
        "supervisor: this try got no further than those before it; no other is made",
        f"go on with: {shlex.join(place.commands()[1])}",
    ]


def test_a_stage_or_stored_targets_are_progress_and_half_a_file_is_not(place):
    plan = [KILLED, KILLED | {"makes": "cache/teacher/shard-1"}, KILLED | {"makes": "cache/.part"}]
    assert place.supervise(*plan) == 137
    assert len(place.tries()) == 3


def test_what_cannot_be_read_is_no_progress_and_no_fault(place):
    """The run that goes on says itself what is damaged."""
    place.run.mkdir()
    (place.run / "stages.json").write_text('{"train": ', encoding="utf-8")
    (place.run / "cache").symlink_to(place.folder / "gone")
    assert place.supervise(KILLED) == 137
    assert len(place.tries()) == 2


def test_a_cache_that_runs_share_is_looked_at_too(place):
    store = place.folder / "shared"
    first, again = place.commands()
    (place.folder / "plan.json").write_text(
        json.dumps([KILLED, KILLED | {"makes": "../shared/shard-1"}, KILLED, {}]), encoding="utf-8"
    )
    assert supervise(first, again, [place.run], [store], pause=place.pauses.append) == 137
    assert len(place.tries()) == 3


def test_the_tries_are_bounded(place):
    assert place.supervise(*(KILLED | checkpoint(step) for step in range(20))) == 137
    assert len(place.tries()) == TRIES
    assert place.log()[-2] == f"supervisor: this was try {TRIES} of {TRIES}"


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ({"code": 0}, 0),
        ({"code": 2}, 2),  # the user's input
        ({"code": 70}, 70),  # diverged: it would again
        ({"code": 75, "err": "error: the drive is full (x); make room, then go on\n"}, 75),
        ({"code": 130}, 130),
        ({"code": 143}, 143),
        ({"kills": signal.SIGTERM}, 143),  # somebody stopped it before it could catch that
        ({"kills": signal.SIGINT}, 130),
    ],
)
def test_what_another_try_does_not_better_is_not_tried_again(act, code, place):
    assert place.supervise(act | checkpoint(10)) == code
    assert place.tries() == ["first"] and place.pauses == []
    assert place.log() == []


def test_out_of_memory_is_tried_again(place):
    error = "error: train: out of memory; lower `train.batch_tokens` ...; then go on\n"
    assert place.supervise({"code": 75, "err": error} | checkpoint(10), {"code": 0}) == 0
    assert place.tries() == ["first", "again"]
    assert place.log()[0] == "supervisor: the run ended by exit code 75: out of memory"


def test_the_watchdog_of_macos_is_known_and_explained(place):
    act = {"kills": signal.SIGABRT, "err": "loading\n" + ABORT}
    assert place.supervise(act) == 75  # as the table of exit codes has it, and not 134
    told = "\n".join(place.log())
    assert "SIGABRT: macOS ended the work on the GPU, because it held up the display (mlx#3267)" in told
    for remedy in (
        "--caffeinate",
        "caffeinate -s",
        "SSH",
        "train.batch_tokens",
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT",
    ):
        assert remedy in told
    said = place.capfd.readouterr().err
    assert said.count(ABORT) == 2 and "-> let the display sleep" in said
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT" not in os.environ  # a hint, and nothing that is set
    # An abort without these words is not explained by them.
    assert place.supervise({"kills": signal.SIGABRT}) == 134


def test_an_array_that_is_too_large_is_not_tried_again(place):
    error = (
        "RuntimeError: [metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum\n"
    )
    assert place.supervise({"code": 1, "err": error} | checkpoint(10), {"code": 0}) == 75
    assert place.tries() == ["first"]


def test_a_crash_before_the_folder_is_opened_starts_as_before(place):
    """Or `--overwrite` would become `--resume` of the run that it was to replace."""
    place.run.mkdir()
    (place.run / "fingerprint").write_text("another run's", encoding="utf-8")
    assert place.supervise(KILLED | {"opens": False}, {}) == 0
    assert place.tries() == ["first", "first"]


def test_the_arguments_of_each_try():
    typed = [
        "run",
        "r.yaml",
        "train.steps=5",
        "--supervise",
        "--overwrite",
        "--caffeinate",
        "--trust-remote-code",
    ]
    assert arguments(typed, go_on=False) == [*typed[:3], "--overwrite", "--trust-remote-code"]
    assert arguments(typed, go_on=True) == [*typed[:3], "--trust-remote-code", "--resume"]
    assert arguments([*typed[:3], "--resume"], go_on=True) == [*typed[:3], "--resume"]


def wait_for(path, seconds=30.0):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("code", [None, 1])
def test_a_signal_is_handed_on_once_and_ends_both(number, code, place):
    """Even if the run ends by a fault instead: the user wanted it to end."""

    def send():
        wait_for(place.run / "ready")
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    with Interrupts().caught():  # as in the command line
        sender.start()
        act = {"waits": True} | ({} if code is None else {"code": code}) | checkpoint(10)
        ended = place.supervise(act, {})
    sender.join()
    assert ended == (code or 128 + number)
    assert (place.run / "came").read_text(encoding="utf-8") == f"{int(number)} "
    assert place.tries() == ["first"]
    assert signal.getsignal(number) is before


def test_the_terminal_reaches_the_run_through_the_supervisor_alone(place):
    """Ctrl-C goes to the whole group in front; twice it would not wait for a checkpoint."""
    (place.folder / "plan.json").write_text(json.dumps([{"waits": True}]), encoding="utf-8")
    first, again = place.commands()
    code = (
        f"from pathlib import Path; from mlx_distill.supervise import supervise; import sys\n"
        f"sys.exit(supervise({first!r}, {again!r}, [Path({str(place.run)!r})]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(workshop.REPOSITORY)}
    both = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, env=environment)
    wait_for(place.run / "ready")
    # The signals of one moment may come as one, so that it was one alone does not show it.
    assert int((place.run / "ready").read_text(encoding="utf-8")) != both.pid
    os.killpg(both.pid, signal.SIGINT)  # as the terminal does
    assert both.wait(timeout=30) == 130
    assert (place.run / "came").read_text(encoding="utf-8") == "2 "


def test_a_signal_between_two_tries_ends_it(place):
    def pause(seconds):
        os.kill(os.getpid(), signal.SIGTERM)

    (place.folder / "plan.json").write_text(json.dumps([KILLED]), encoding="utf-8")
    first, again = place.commands()
    with Interrupts().caught(), pytest.raises(Interrupted) as caught:
        supervise(first, again, [place.run], pause=pause)
    assert caught.value.exit_code == 143
    assert place.tries() == ["first"]


def test_a_process_left_behind_does_not_hold_it_up(place):
    """It has inherited stderr, which never ends."""
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '20']).pid, flush=True); sys.exit(2)"
    started = time.monotonic()
    assert supervise([sys.executable, "-c", code], [], []) == 2
    assert time.monotonic() - started < 15
    os.kill(int(place.capfd.readouterr().out), signal.SIGKILL)


STEPS = 120  # enough that whoever kills is in time
TRAIN = ["train", "recipe.yaml", f"train.steps={STEPS}", "train.save_every=20", "train.log_every=1"]


@pytest.mark.parametrize("when", [[20], pytest.param([20, 60], marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_with_the_same_bits(when, tmp_path, capfd):
    """A real one, by SIGKILL: in the middle of training, and again a few checkpoints later."""
    folder = workshop.make(tmp_path)
    assert command(folder, capfd, *TRAIN, "name=undisturbed").code == 0

    run = folder / "runs" / "killed"
    kills, over = [], threading.Event()

    def kill():
        for step in when:
            while not over.is_set():
                saved = [int(path.name[5:]) for path in run.glob("checkpoints/step-*")]
                if saved and max(saved) >= step:
                    break
                time.sleep(0.005)
            else:
                return
            state = json.loads((run / "progress.json").read_text(encoding="utf-8"))
            if state["pid"] not in kills:
                kills.append(state["pid"])
                os.kill(state["pid"], signal.SIGKILL)

    words = [sys.executable, "-m", "mlx_distill"]
    typed = [*TRAIN, "name=killed", "--supervise"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(workshop.REPOSITORY))
        killer = threading.Thread(target=kill)
        killer.start()
        first, again = ([*words, *arguments(typed, go_on=go_on)] for go_on in (False, True))
        code = supervise(first, again, [Path("runs/killed")], pause=lambda _: None)
        over.set()
        killer.join()
    said = capfd.readouterr()
    assert code == 0, said.err
    assert len(kills) == len(when)
    assert said.out.count("student: going on from step") == len(when)
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.count("supervisor: the run ended by SIGKILL") == len(when)
    one, other = (
        folder / f"runs/{name}/models/student/model.safetensors" for name in ("undisturbed", "killed")
    )
    assert one.read_bytes() == other.read_bytes()
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))  # no step twice, none missing


def test_the_command_line_supervises(tmp_path, capsys, monkeypatch):
    """It hands its own arguments on, knows the folders, and ends with the code of the run."""
    seen = []

    def noted(first, again, folders, stores):
        seen.append((first, again, folders, stores))
        return 75

    folder = workshop.make(tmp_path)
    monkeypatch.setattr(supervisor, "supervise", noted)
    words = ["train", "recipe.yaml", "name=other", "train.steps=3"]
    ended = command(folder, capsys, *words, "--supervise", "--overwrite")
    assert ended.code == 75
    shared = "teacher={model: teacher, source: cache, top_k: 4, cache: store}"
    command(folder, capsys, "run", "recipe.yaml", shared, "--supervise")
    bits = "compress={bits: [8, 4]}"
    grid = "quantize={group_size: 32}"
    compressed = command(folder, capsys, "compress", "recipe.yaml", bits, grid, "--supervise")
    assert compressed.code == 75, compressed.err
    program = [sys.executable, "-m", "mlx_distill"]
    assert seen[0] == (
        [*program, *words, "--overwrite"],
        [*program, *words, "--resume"],
        [Path("runs/other")],
        [],
    )
    assert seen[1][2:] == ([Path("runs/tiny")], [Path("store")])
    assert seen[2][1] == [*program, "compress", "recipe.yaml", bits, grid, "--resume"]
    assert not (folder / "runs").exists()  # nothing ran


def test_a_wrong_recipe_stops_before_anything_is_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "supervise", lambda *_: pytest.fail("started"))
    ended = command(workshop.make(tmp_path), capsys, "run", "recipe.yaml", "train.step=3", "--supervise")
    assert ended.code == 2 and len(ended.err) == 1


def test_caffeinate_elsewhere_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    ended = command(workshop.make(tmp_path), capsys, "train", "recipe.yaml", "--caffeinate")
    assert ended.code == 2
    assert ended.err == ["error: --caffeinate keeps a Mac awake, and this is linux; leave it out"]


def test_caffeinate_watches_this_process(monkeypatch):
    started = []
    monkeypatch.setattr(supervisor.sys, "platform", "darwin")
    monkeypatch.setattr(supervisor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda words, **_: started.append(words))
    keep_awake()
    assert started == [["/usr/bin/caffeinate", "-s", "-w", str(os.getpid())]]
    monkeypatch.setattr(supervisor.shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match="no program `caffeinate`"):
        keep_awake()
