"""Tracking against a server on loopback that wandb's own client talks to: every epoch is one row, live, offline and killed."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from heartseg.config.experiment import from_json
from heartseg.datasets.image_folder import open_source
from heartseg.shards.preprocessing import write_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory, wandb_logger
from helpers import tracked_runs
from helpers.experiments import tiny_experiment
from helpers.tracked_runs import EPOCHS, assert_same, finish, kill_after, start, the_run, track, tracked_run, without_key
from helpers.wandb_server import KEY, serving


@pytest.fixture(scope="module")
def online(shards, tmp_path_factory):
    """A training killed when the server has its first row, and resumed: the server, the run and the output."""
    folder = tmp_path_factory.mktemp("online") / "runs"
    with serving() as server:
        process = start(shards, folder, **server.environment())
        kill_after(lambda: any(run.rows() for run in server.runs.values()), process)
        epochs_when_killed = len(run_directory.read_record(str(the_run(folder))))
        said = finish(start(shards, folder, **server.environment()), folder)
        yield server, the_run(folder), said, epochs_when_killed


def test_an_online_run_has_its_id_its_configuration_and_every_epoch_once_at_once_also_when_killed_and_resumed(online):
    server, run, _, epochs_when_killed = online
    # The fixture saw a row while the process lived, and killed it before its last epoch.
    assert 1 <= epochs_when_killed < EPOCHS
    ((name, sent),) = server.runs.items()
    assert max(sent.arrivals.values()) - sent.arrivals[0] > 1
    assert name == filesystem.read_json(str(run / "experiment.json"))["wandb_id"]
    assert sent.config["train.epochs"] == EPOCHS and sent.config["optim.lr"] > 0 and "data_fingerprint" in sent.config
    assert {"test/dice", "train/loss", "lr", "overlays"} <= set(sent.rows()[0])
    assert_same(sent.rows(), run_directory.read_record(str(run)))
    assert sent.exit_code == 0 and any(name.startswith("media/images/") for name in sent.uploads)


def test_the_best_checkpoint_is_one_artifact_with_its_lineage_the_key_is_in_no_file_or_log_and_only_the_run_is_sent(online):
    server, run, said, _ = online
    ((name, artifact),) = server.artifacts.items()
    described = filesystem.read_json(str(run / "experiment.json"))
    assert name == described["wandb_id"] + "-model"
    assert artifact["metadata"]["data_fingerprint"] == described["data_fingerprint"]
    assert artifact["files"] == {"checkpoint.json", "model.safetensors"} and artifact["is_committed"]
    assert KEY not in said and without_key(run)
    # wandb's reports on itself also hold a process for 10 s at its exit where the server is silent.
    assert {path.split("/")[1] for path in server.paths} == {"graphql", "files", "upload", "artifact"}


@pytest.fixture(scope="module")
def offline(shards, tmp_path_factory):
    """A run whose tracker is killed offline in mid-run, and resumed."""
    run = tracked_run(shards, tmp_path_factory.mktemp("offline"))
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    process = tracked_runs.start_tracking(run, 4, 1.5, **environment)
    kill_after(lambda: len(run_directory.read_record(run.path)) >= 2, process)
    track(run, 4, artifact=True, **environment)
    return Path(run.path)


def test_the_newest_offline_fragment_of_a_killed_run_holds_every_epoch_once_and_replaces_the_first(offline):
    first, second = sorted(offline.glob("wandb/offline-run-*/*.wandb"))
    assert_same(tracked_runs.kept_rows(second), run_directory.read_record(str(offline)))
    assert first.with_suffix(".wandb.synced").exists() and without_key(offline)


def test_the_readmes_command_sends_the_fragments_as_one_run_without_gaps_or_duplicates(offline):
    with serving() as server:
        for _ in range(2):  # the second time changes nothing
            tracked_runs.sync(server, *map(str, sorted(offline.glob("wandb/offline-run-*"))))
        (name,) = server.runs
        assert name == filesystem.read_json(str(offline / "experiment.json"))["wandb_id"]
        assert_same(server.runs[name].rows(), run_directory.read_record(str(offline)))
        assert [row["_step"] for row in server.runs[name].rows()] == list(range(4))
        assert server.artifacts[f"{name}-model"]["is_committed"]


@pytest.mark.parametrize(("dataset", "is_marked", "sent"), [("", True, False), ("camus", False, False), ("camus", True, True)])
@patch.dict(os.environ, WANDB_MODE="offline")
def test_overlays_of_a_tree_that_only_looks_like_camus_stay_out_of_wandb(dataset, is_marked, sent, phantom, tmp_path):
    tree, shards = shutil.copytree(phantom, tmp_path / "tree", ignore=lambda *_: ["phantom.json"]), str(tmp_path / "shards")
    write_shards(open_source(str(tree), dataset=dataset), shards, tiny_experiment().image, tiny_experiment().split)
    manifest = filesystem.read_json(f"{shards}/manifest.json")  # older shards guessed the dataset from patients' names
    filesystem.publish_json(f"{shards}/manifest.json", manifest | {"dataset_is_marked": is_marked})
    run = tracked_run(shards, tmp_path / "runs")
    tracker = wandb_logger.build_tracker(from_json(run.description["experiment"]), run, True, [])
    tracker.overlays(1, *np.zeros((3, 1, 8, 8), np.uint8), ["patient0001_2CH_ED"])  # image, mask and prediction
    tracker.log({"epoch": 1})
    tracker.finish()
    assert any(Path(run.path).rglob("media/images/*.png")) == sent
