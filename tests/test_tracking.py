"""Tracking against a server on loopback that wandb's own client talks to: rows arrive as they come, and faults cost little."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_experiment
from wandb_server import KEY, Server, serving

from heartseg import runs, storage, tracking
from heartseg.config import TrackingConfig
from heartseg.shards import open_shards

EPOCHS = 10
# A process that tracks as a training does, without the training: what each call costs, it prints.
TRACKS = """
import json, logging, sys, time
from heartseg import runs, tracking
from heartseg.config import from_json
logging.basicConfig(level=logging.INFO)
run, epochs, pause_s = runs.find_run(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
tracker = tracking.build_tracker(from_json(run.description["experiment"]), run, True, runs.read_record(run.path))
record, slowest_s = [], 0.0
for epoch in range(1, epochs + 1):
    record.append({"epoch": epoch, "test/dice": epoch / epochs})
    runs.write_record(run.path, record)
    began = time.monotonic()
    tracker.log(record[-1])
    slowest_s = max(slowest_s, time.monotonic() - began)
    time.sleep(pause_s)
began = time.monotonic()
tracker.finish()
print(json.dumps({"slowest_log_s": slowest_s, "finish_s": time.monotonic() - began}))
"""
WANDB = str(Path(sys.executable).with_name("wandb"))
# What tests cannot wait for: wandb sends every 15 s, and tries again after 2 s. It takes whole seconds.
FAST = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_X_FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1"}


def start(shards: str, folder: Path, epochs: int = EPOCHS, **environment: str) -> subprocess.Popen:
    """A plain training process on tiny shards; what it says goes to `folder`.log."""
    sizes = ["--image.height", "64", "--image.width", "64", "--train.batch-size", "8", "--train.epochs", str(epochs)]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "quick", *sizes, "--launcher", "plain"]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [*command, "--data", shards, "--runs", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | FAST | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def track(shards: str, folder: Path, epochs: int, pause_s: float, **environment: str) -> tuple[Path, dict, str]:
    """Track a run in a process of its own: the run, the seconds that calls took, and what was said."""
    experiment = tiny_experiment(data=shards, runs=str(folder), tracking=TrackingConfig())
    run = runs.open_run(experiment, open_shards(shards))
    command = [sys.executable, "-c", TRACKS, run.path, str(epochs), str(pause_s)]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | FAST | environment, timeout=200)
    assert said.returncode == 0, said.stderr
    return Path(run.path), json.loads(said.stdout.splitlines()[-1]), said.stdout + said.stderr


def finish(process: subprocess.Popen, folder: Path) -> str:
    """Wait for a training process to end well; returns what it and those before it said."""
    assert process.wait(timeout=200) == 0, folder.with_suffix(".log").read_text()
    return folder.with_suffix(".log").read_text()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a condition holds; fails where the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the training ended first"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def kill_after(condition, process: subprocess.Popen) -> None:
    """SIGKILL as soon as a condition holds: no handler runs, nothing is finished."""
    wait_for(condition, process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def the_run(folder: Path) -> Path:
    """The only run in a folder of runs."""
    (path,) = [entry for entry in folder.iterdir() if entry.is_dir()]
    return path


def sync(server: Server, *arguments: str) -> str:
    """The command that our sentences and the README name."""
    environment = os.environ | server.environment()
    done = subprocess.run([WANDB, "sync", *arguments], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kept_rows(fragment: Path) -> list[dict]:
    """The history rows of a `.wandb` file, by wandb's own reader."""
    asked = [WANDB, "leet", "inspect", "--json", str(fragment)]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]


def assert_same(rows: list[dict], record: list[dict]) -> None:
    """Tracked rows hold the record's metrics, epoch by epoch."""
    assert [row["epoch"] for row in rows] == [epoch["epoch"] for epoch in record]
    for row, epoch in zip(rows, record, strict=True):
        assert {name: row[name] for name in epoch} == pytest.approx(epoch)


def without_key(run: Path) -> bool:
    """Whether no file of a run holds the key."""
    return not any(KEY.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def online(shards, tmp_path_factory):
    """A training that is killed when the server has its first row, and resumed: the server, the run, what was said."""
    folder = tmp_path_factory.mktemp("online") / "runs"
    with serving() as server:
        process = start(shards, folder, **server.environment())
        kill_after(lambda: any(run.rows() for run in server.runs.values()), process)
        epochs_when_killed = len(runs.read_record(str(the_run(folder))))
        said = finish(start(shards, folder, **server.environment()), folder)
        yield server, the_run(folder), said, epochs_when_killed


def test_rows_arrive_while_a_run_trains(online):
    server, _, _, epochs_when_killed = online
    # The fixture saw a row while the process lived, and killed it before its last epoch.
    assert 1 <= epochs_when_killed < EPOCHS
    (sent,) = server.runs.values()
    assert max(sent.arrivals.values()) - sent.arrivals[0] > 1


def test_an_online_run_has_its_id_its_configuration_and_every_epoch_once_also_when_killed_and_resumed(online):
    server, run, _, _ = online
    ((name, sent),) = server.runs.items()
    assert name == storage.read_json(str(run / "experiment.json"))["wandb_id"]
    assert sent.config["train.epochs"] == EPOCHS and sent.config["optim.lr"] > 0 and "data_fingerprint" in sent.config
    assert {"test/dice", "train/loss", "lr", "overlays"} <= set(sent.rows()[0])
    assert_same(sent.rows(), runs.read_record(str(run)))
    assert sent.exit_code == 0 and any(name.startswith("media/images/") for name in sent.uploads)


def test_the_best_checkpoint_is_sent_as_one_artifact_with_its_lineage(online):
    server, run, _, _ = online
    ((name, artifact),) = server.artifacts.items()
    assert name == storage.read_json(str(run / "experiment.json"))["wandb_id"] + "-model"
    assert artifact["metadata"]["data_fingerprint"] == storage.read_json(str(run / "experiment.json"))["data_fingerprint"]
    assert artifact["files"] == {"checkpoint.json", "model.safetensors"} and artifact["is_committed"]


def test_a_key_is_in_no_file_of_a_run_and_in_no_log(online):
    _, run, said, _ = online
    assert KEY not in said and without_key(run)


def test_nothing_but_the_run_is_sent(online):
    # wandb's reports on itself also hold a process for 10 s at its exit where the server is silent.
    assert {path.split("/")[1] for path in online[0].paths} == {"graphql", "files", "upload", "artifact"}


@pytest.fixture(scope="module")
def offline(shards, tmp_path_factory):
    """A training that is killed offline in mid-run, and resumed: the run and what was said."""
    folder = tmp_path_factory.mktemp("offline") / "runs"
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    process = start(shards, folder, 4, **environment)
    kill_after(lambda: folder.exists() and len(runs.read_record(str(the_run(folder)))) >= 2, process)
    said = finish(start(shards, folder, 4, **environment), folder)
    return the_run(folder), said


def test_offline_fragments_of_a_killed_run_hold_every_epoch_once(offline):
    run, said = offline
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    # Rows reach the disk each second: the kill has cost some of the first fragment, and the second makes them good.
    assert_same(kept_rows(first) + kept_rows(second), runs.read_record(str(run)))
    assert KEY not in said and without_key(run)


def test_the_command_of_the_readme_sends_the_fragments_as_one_run_without_gap_or_double(offline):
    run, _ = offline
    with serving() as server:
        for _ in range(2):  # the second time changes nothing
            sync(server, *map(str, sorted(run.glob("wandb/offline-run-*"))))
        (name,) = server.runs
        assert name == storage.read_json(str(run / "experiment.json"))["wandb_id"]
        assert_same(server.runs[name].rows(), runs.read_record(str(run)))
        assert [row["_step"] for row in server.runs[name].rows()] == list(range(4))
        assert server.artifacts[f"{name}-model"]["is_committed"]


def assert_kept_offline(run: Path, said: str) -> None:
    """All is in one offline fragment, and one sentence said so."""
    assert said.count("kept offline") == 1
    (fragment,) = run.glob("wandb/offline-run-*/*.wandb")
    assert_same(kept_rows(fragment), runs.read_record(str(run)))
    assert KEY not in said and without_key(run)


def assert_sent_later(server: Server, run: Path, said: str) -> None:
    """All is on disk, one sentence named a command, and the command gives a healthy server what it lacks."""
    record, (sent,) = runs.read_record(str(run)), server.runs.values()
    assert 1 <= len(sent.rows()) < len(record)
    command = f"wandb sync --include-online {run}/wandb"
    assert said.count(command) == 1
    (fragment,) = run.glob("wandb/run-*/*.wandb")
    assert_same(kept_rows(fragment), record)
    server.failure = None
    sync(server, *command.split()[2:])
    # Rows that had arrived come again under the step that they had.
    by_step = {row["_step"]: row for row in sent.rows()}
    assert_same([by_step[step] for step in sorted(by_step)], record)
    assert all(row == by_step[row["_step"]] for row in sent.rows())
    assert KEY not in said and without_key(run)


def test_a_server_that_never_answers_at_the_start_is_given_up_and_the_run_kept_offline(shards, tmp_path):
    with serving(failure="silent") as server:
        # 2 s instead of the 10 that the slow test waits.
        environment = server.environment() | {"WANDB_INIT_TIMEOUT": "2"}
        run, _, said = track(shards, tmp_path, 3, 0, **environment)
        assert server.failed_requests
    assert_kept_offline(run, said)


@pytest.mark.parametrize("failure", ["silent", "error"])
def test_a_server_that_fails_in_mid_run_slows_nothing_and_gets_the_rest_later(shards, tmp_path, failure):
    with serving(fail_after_rows=1, fail_with=failure) as server:
        environment = server.environment() | {"WANDB_FINISH_TIMEOUT": "2"}
        run, took, said = track(shards, tmp_path, 12, 0.3, **environment)
        assert server.failed_requests, said
        # A call hands over to a process of wandb's own: 5 ms where the machine is idle. The end waits as long as it is told.
        assert took["slowest_log_s"] < 1 and 2 <= took["finish_s"] < 6
        assert_sent_later(server, run, said)


@pytest.mark.slow
def test_a_server_that_comes_back_in_mid_run_gets_every_row_once(shards, tmp_path):
    with serving(fail_after_rows=1, fail_with="error") as server:
        threading.Thread(target=recover, args=[server], daemon=True).start()
        run, _, said = track(shards, tmp_path, 8, 0.3, **server.environment())
        (sent,) = server.runs.values()
        assert server.failed_requests and "wandb sync" not in said
        assert_same(sent.rows(), runs.read_record(str(run)))


def recover(server: Server) -> None:
    """Serve again after three failed requests."""
    while server.failed_requests < 3 and not server.closing.is_set():
        time.sleep(0.02)
    server.failure = None


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_fragment_that_an_early_kill_left_empty_does_not_stop_the_command(shards, tmp_path, mode):
    """The header of a `.wandb` file and no record is what a kill in the first second leaves."""
    experiment = tiny_experiment(data=shards, runs=str(tmp_path), tracking=TrackingConfig())
    run = runs.open_run(experiment, open_shards(shards))
    runs.write_record(run.path, [{"epoch": 1, "test/dice": 0.5}])
    name = run.description["wandb_id"]
    broken = Path(run.path, "wandb", f"offline-run-20260101_000000-{name}", f"run-{name}.wandb")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b":W&B\xef\xbe\x00")
    with serving() as server:
        environment = server.environment() | {"WANDB_MODE": mode}
        command = [sys.executable, "-c", TRACKS.replace("range(1,", "range(2,"), run.path, "2", "0"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | FAST | environment, timeout=100)
        if mode == "offline":
            sync(server, *map(str, sorted(Path(run.path).glob("wandb/offline-run-*"))))
        assert [row["epoch"] for row in server.runs[name].rows()] == [1, 2]


@pytest.mark.slow
def test_a_training_outlives_a_server_that_never_answers(shards, tmp_path):
    assert tracking.SETTINGS["init_timeout"] == 10
    folder = tmp_path / "runs"
    with serving(failure="silent") as server:
        said = finish(start(shards, folder, 2, **server.environment()), folder)
    assert "2 epochs done" in said
    assert_kept_offline(the_run(folder), said)


@pytest.mark.slow
def test_a_training_outlives_a_server_that_falls_silent_in_mid_run(shards, tmp_path):
    folder = tmp_path / "runs"
    with serving(fail_after_rows=1, fail_with="silent") as server:
        said = finish(start(shards, folder, WANDB_FINISH_TIMEOUT="2", **server.environment()), folder)
        assert f"{EPOCHS} epochs done" in said and (the_run(folder) / "MODEL_CARD.md").exists()
        assert_sent_later(server, the_run(folder), said)
