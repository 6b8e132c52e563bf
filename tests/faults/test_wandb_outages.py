"""Servers that never answer, fall silent, fail or recover: tracking slows nothing, loses nothing and stops no training."""

import os
import threading
import time
from pathlib import Path

import pytest
import wandb

from heartseg.training import run_directory, wandb_logger
from helpers.tracked_runs import assert_same, finish, kept_rows, start, sync, the_run, track, tracked_run, without_key
from helpers.wandb_server import KEY, Server, serving


def assert_kept_offline(run: Path, said: str) -> None:
    """Everything is in one offline fragment, and one message said so."""
    assert said.count("logged offline") == 1
    fragments = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(fragments) == 1, said
    assert_same(kept_rows(fragments[0]), run_directory.read_record(str(run)))
    assert KEY not in said and without_key(run)


def assert_sent_later(server: Server, run: Path, said: str) -> None:
    """Everything is on disk, one message named a command, and the command sends a healthy server the missing data."""
    record, (sent,) = run_directory.read_record(str(run)), server.runs.values()
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


@pytest.fixture
def parents_service():
    """A wandb service started by this process, which wandb offers to every child through the environment."""
    wandb.teardown()  # of earlier tests
    wandb.setup().ensure_service()
    assert "WANDB_SERVICE" in os.environ
    yield
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("parents_service")
def test_a_training_outlives_a_server_that_never_answers_without_a_lost_row_even_if_its_parent_uses_wandb(shards, tmp_path):
    assert wandb_logger.SETTINGS["init_timeout"] == 10  # here 2
    folder = tmp_path / "runs"
    with serving(failure="silent") as server:
        said = finish(start(shards, folder, 2, **server.environment() | {"WANDB_INIT_TIMEOUT": "2"}), folder)
        assert server.failed_requests
    assert "2 epochs done" in said
    assert_kept_offline(the_run(folder), said)


@pytest.mark.parametrize("login", ["a key with a line end", "a login on this machine"])
def test_a_key_is_found_and_opens_the_server(shards, tmp_path, login):
    with serving() as server:
        environment = {"WANDB_BASE_URL": f"{server.url}\n", "WANDB_API_KEY": f" {KEY}\n", "WANDB_MODE": ""}
        if login == "a login on this machine":
            logins = tmp_path / "netrc"  # as `wandb login` writes it
            logins.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
            environment = {"WANDB_BASE_URL": server.url, "NETRC": str(logins)}
        run = tracked_run(shards, tmp_path)
        track(run, 1, **environment)
        assert [row["epoch"] for row in server.runs[run.description["wandb_id"]].rows()] == [1]


BAD_SETTINGS = [{"WANDB_API_KEY": "short"}, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "nonsense"}, {"WANDB_MODE": "onlin"}]
BAD_SETTINGS += [{"WANDB_MODE": "offline", "WANDB_FINISH_TIMEOUT": "soon"}]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda settings: list(settings)[-1])
def test_a_tracker_that_wandb_refuses_at_the_start_is_kept_offline_with_all_rows(shards, tmp_path, settings, caplog):
    run = tracked_run(shards, tmp_path)
    track(run, 1, **settings)
    (fragment,) = Path(run.path).glob("wandb/offline-run-*/*.wandb")
    assert [row["epoch"] for row in kept_rows(fragment)] == [1]
    assert caplog.text.count("logged offline") == 1 and "not tracked" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["silent", "error"])
def test_a_server_that_fails_in_mid_run_slows_nothing_and_gets_the_rest_later(shards, tmp_path, failure, caplog):
    with serving(fail_after_rows=1, fail_with=failure) as server:
        run = tracked_run(shards, tmp_path)
        took = track(run, 12, 0.3, **server.environment() | {"WANDB_FINISH_TIMEOUT": "2"})
        assert server.failed_requests
        # A call hands over to a process of wandb's own: 5 ms where the machine is idle. The end waits as long as it is set to.
        assert took["slowest_log_s"] < 1 and 2 <= took["finish_s"] < 6
        assert_sent_later(server, Path(run.path), caplog.text)


@pytest.mark.slow
def test_a_server_that_comes_back_in_mid_run_gets_every_row_once(shards, tmp_path, caplog):
    with serving(fail_after_rows=1, fail_with="error") as server:
        threading.Thread(target=recover, args=[server], daemon=True).start()
        run = tracked_run(shards, tmp_path)
        track(run, 8, 0.3, **server.environment())
        (sent,) = server.runs.values()
        assert server.failed_requests and "wandb sync" not in caplog.text
        assert_same(sent.rows(), run_directory.read_record(run.path))


def recover(server: Server) -> None:
    while server.failed_requests < 3 and not server.closing.is_set():
        time.sleep(0.02)
    server.failure = None


@pytest.mark.slow
@pytest.mark.parametrize("record", [[], [{"epoch": 1, "test/dice": 0.5}]], ids=["at once", "after an epoch"])
def test_a_fragment_that_a_kill_left_empty_does_not_stop_wandb_sync(shards, tmp_path, record):
    """A kill in the first second leaves the header of a `.wandb` file and nothing else."""
    run = tracked_run(shards, tmp_path)
    run_directory.write_record(run.path, record)
    name = run.description["wandb_id"]
    broken = Path(run.path, "wandb", f"offline-run-20260101_000000-{name}", f"run-{name}.wandb")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b":W&B\xef\xbe\x00")
    track(run, 2, WANDB_MODE="offline")
    with serving() as server:
        sync(server, *map(str, sorted(Path(run.path).glob("wandb/offline-run-*"))))
        assert [row["epoch"] for row in server.runs[name].rows()] == [1, 2]
