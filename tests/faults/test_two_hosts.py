"""Training over two hosts that share a network and an object store and nothing else, and the loss of one of them."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import pytest

from heartseg.config.experiment import to_json
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers import two_hosts
from helpers.experiments import ROOT, skip_or_fail, tiny_experiment
from helpers.job_process import changed_train
from jobs import preprocess, train

CLUSTER = {"RAY_ADDRESS": f"10.77.0.1:{two_hosts.PORT}"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def hosts(phantom):
    """The two hosts, with shards on the first one's object store, and the tiny experiment as a file that both see."""
    if reason := two_hosts.missing():
        skip_or_fail(reason)
    with two_hosts.joined() as (first, second), tempfile.NamedTemporaryFile("w", suffix=".json", dir="/var/tmp") as config:
        experiment = tiny_experiment(source=phantom, out="s3://bucket/shards", data="s3://bucket/shards")
        preprocess.run(experiment, preprocess.Options(launcher="plain"))
        json.dump(to_json(experiment), config)
        config.flush()
        yield first, second, config.name


def command(config: str, name: str, workers: str, epochs: int) -> list[str]:
    arguments = ["--config", config, "--runs", f"s3://bucket/{name}", "--workers", workers, "--train.epochs", str(epochs)]
    # It checks every 10 s instead of 30 for nodes to grow onto.
    return [*changed_train("ray_runtime.SECONDS_TO_GROW = 10"), *arguments]


def record(name: str) -> list[dict]:
    """The epochs of the only run in a folder of the bucket."""
    folder = f"s3://bucket/{name}"
    found = [entry for entry in filesystem.list_names(folder) if entry.startswith("tiny-")]
    return run_directory.read_record(filesystem.join(folder, found[0])) if found else []


def wait_until(condition, host: two_hosts.Host, training: subprocess.Popen, seconds: float = 300) -> float:
    """Wait for a condition in a training; returns the time it took, or fails with the training's output."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds and training.poll() is None, host.output(training)[-5000:]
        time.sleep(0.3)
    return time.monotonic() - started


def test_two_hosts_train_what_one_process_trains(hosts, shards, tmp_path, measurement):
    first, _, config = hosts
    code, output = first.run(*command(config, "two", "2", 6), **CLUSTER)
    assert code == 0, output
    assert {row["workers"] for row in record("two")} == {2}  # with one CPU a host, one on each
    base = tiny_experiment(data=shards, runs=str(tmp_path))
    alone = train.run(replace(base, train=replace(base.train, epochs=6)), train.Options(launcher="plain"))
    dices = [run[-1]["test/dice"] for run in (record("two"), run_directory.read_record(alone))]
    measurement("final Dice: two hosts {:.4f}, one process {:.4f}".format(*dices))
    assert dices[0] == pytest.approx(dices[1], abs=0.005)


def test_the_doctor_checks_both_hosts_and_the_link_between_them(hosts):
    first, _, _ = hosts
    doctor = [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--workers", "2", "--seconds", "1", "--json"]
    code, output = first.run(*doctor, "--runs", "s3://bucket/doctor", **CLUSTER)
    found = {one["name"]: one for one in json.JSONDecoder().raw_decode(output[output.index("\n{\n") + 1 :])[0]["findings"]}
    assert code in (0, 1) and found["Ray"]["numbers"]["nodes"] == 2, output
    (other,) = (one for name, one in found.items() if name.startswith("node "))
    assert "10.77.0.2" in other["name"] and "CPUs" in other["found"] and "GPUs" in other["found"]
    link = found["workers"]
    assert link["numbers"]["workers"] == 2 and link["numbers"]["gb_per_s"] > 0 and not link["wrong"]


def test_an_elastic_run_continues_without_the_second_host_and_grows_when_it_returns(hosts, measurement):
    first, second, config = hosts
    training = first.start(*command(config, "elastic", "1:2", 2000), **CLUSTER, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10")
    wait = partial(wait_until, host=first, training=training)
    wait(lambda: len(record("elastic")) >= 3 and record("elastic")[-1]["workers"] == 2)
    second.kill()
    before = len(record("elastic"))
    lost_s = wait(lambda: len(record("elastic")) > before)
    assert record("elastic")[-1]["workers"] == 1
    second.boot()
    second.join(first)
    back_s = wait(lambda: record("elastic")[-1]["workers"] == 2)
    output = first.stop(training)
    assert "stopped; rerun the same command to resume" in output
    measurement(f"--workers 1:2, seconds to the next epoch: a host's power cut {lost_s:.1f}, the host back {back_s:.1f}")
    numbers = [row["epoch"] for row in record("elastic")]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_run_that_is_not_elastic_ends_with_a_one_line_error_when_the_link_is_cut(hosts, measurement):
    first, second, config = hosts
    training = first.start(*command(config, "fixed", "2", 2000), **CLUSTER, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5")
    wait_until(lambda: len(record("fixed")) >= 2, first, training)
    two_hosts.ip("-n", first.name, "link", "set", first.link, "down")
    started = time.monotonic()
    training.wait(timeout=250)
    measurement(f"the link cut, --workers 2: reported after {time.monotonic() - started:.1f} s")
    output = first.output(training)
    assert training.returncode == 2, output
    assert "\ntrain.py: The cluster had no room for 2 workers with 1 CPU" in output, output
    two_hosts.ip("-n", first.name, "link", "set", first.link, "up")
