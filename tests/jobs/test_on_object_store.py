"""Source, shards and runs on an object store: jobs produce the same bytes and numbers as in a folder, even after a kill."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from heartseg.config.experiment import PredictConfig, TrackingConfig
from heartseg.datasets.camus import CamusTree
from heartseg.errors import StorageError, UserError
from heartseg.models import checkpoint
from heartseg.shards.reader import open_shards
from heartseg.shards.writer import MANIFEST, SPLITS
from heartseg.storage import filesystem
from heartseg.storage.locks import LOCK_NAME
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import changed_train
from helpers.s3_server import KEYS, Proxy, environment
from jobs import evaluate, preprocess, train
from jobs.support import evaluation, ray_preprocessing

PLAIN = train.Options(launcher="plain")
LOSSES = ("train/loss", "test/loss", "test/dice")


def new_folder() -> str:
    return f"s3://bucket/{uuid.uuid4().hex[:8]}"


def losses(path: str) -> list[float]:
    return [epoch[name] for epoch in run_directory.read_record(path) for name in LOSSES]


@pytest.fixture(scope="module")
def source(s3, phantom) -> str:
    folder = new_folder()
    for path in sorted(Path(phantom).rglob("*")):
        if path.is_file():
            filesystem.publish(filesystem.join(folder, *path.relative_to(phantom).parts), path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(source) -> str:
    out = new_folder()
    preprocess.run(tiny_experiment(source=source, out=out), preprocess.Options(launcher="plain"))
    return out


@pytest.fixture(scope="module")
def local_run(shards, tmp_path_factory) -> str:
    """The reference: the same training with everything in folders."""
    return train.run(tiny_experiment(data=shards, runs=str(tmp_path_factory.mktemp("local"))), PLAIN)


@pytest.fixture(scope="module")
def run(data) -> str:
    """A finished training on the object store, tracked by wandb offline."""
    tracked = TrackingConfig(wandb="offline")
    return train.run(tiny_experiment(data=data, runs=new_folder(), tracking=tracked), PLAIN)


def same_files(ours: str, theirs: str) -> bool:
    names = [name for name in filesystem.list_names(theirs) if name.endswith((".parquet", MANIFEST, SPLITS))]
    hashes = [[filesystem.sha256(filesystem.read_bytes(filesystem.join(f, n))) for n in names] for f in (ours, theirs)]
    return len(names) >= 3 and hashes[0] == hashes[1]


def test_shards_on_the_store_are_byte_for_byte_those_of_a_folder(data, shards, source):
    assert same_files(data, shards)
    assert {name for name in filesystem.list_names(data) if name.startswith(".")} <= {LOCK_NAME}
    preprocess.run(tiny_experiment(source=source, out=data), preprocess.Options(launcher="plain"))  # complete: no change
    assert same_files(data, shards)


@pytest.mark.slow
def test_training_scores_and_report_on_the_store_are_those_of_a_folder(run, local_run):
    assert losses(run) == losses(local_run)
    assert checkpoint.last(run).card["weights_sha256"] == checkpoint.last(local_run).card["weights_sha256"]
    assert not [name for name in filesystem.list_names(run) if name.endswith(".part")]
    found = [evaluate.run(evaluate.Options(checkpoint=path, launcher="plain")) for path in (run, local_run)]
    ours, theirs = (filesystem.read_json(filesystem.join(path, "summary.json")) for path in found)
    assert ours["scores"] == theirs["scores"] and ours["images"] == 8
    assert b"</html>" in filesystem.read_bytes(filesystem.join(found[0], "report.html"))


@pytest.mark.slow
def test_wandbs_files_move_from_the_machine_to_the_run(run):
    (offline,) = [name for name in filesystem.list_names(run + "/wandb") if name.startswith("offline-run-")]
    (file,) = [name for name in filesystem.list_names(f"{run}/wandb/{offline}") if name.endswith(".wandb")]
    assert filesystem.size_or_none(f"{run}/wandb/{offline}/{file}") > 1000
    assert filesystem.list_names(f"{run}/wandb/{offline}/files/media/images")
    assert not os.path.exists(os.path.dirname(os.environ["WANDB_CACHE_DIR"]))


def tiny_arguments(data: str, folder: str) -> list[str]:
    flags = ["--image.height", "64", "--image.width", "64", "--train.epochs", "3", "--train.batch-size", "6"]
    flags += ["--train.deterministic", "--tracking.wandb", "off", "--launcher", "plain", "--checkpoint-seconds", "0"]
    return ["quick", *flags, "--data", data, "--runs", folder]


@pytest.mark.slow
def test_an_outage_during_preprocessing_quarantines_nothing_and_the_same_command_writes_the_same_bytes(source, s3, shards):
    out = new_folder()
    experiment = tiny_experiment(source=source, out=out)
    reads = 0

    def answer(head: bytes) -> bytes | None:
        nonlocal reads
        reads += head.startswith(b"GET ") and b".nii.gz" in head
        return b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" if reads > 5 else None

    with (
        Proxy(s3, answer=answer) as proxy,
        environment(**KEYS, AWS_ENDPOINT_URL=proxy.url),
        pytest.raises(StorageError, match=r"\.nii\.gz"),
    ):
        preprocess.run(experiment, preprocess.Options(launcher="plain"))
    with pytest.raises(UserError, match="holds no finished shards"):
        open_shards(out)
    filesystem.remove(f"{out}/{LOCK_NAME}")  # the outage kept the job from removing its claim
    preprocess.run(experiment, preprocess.Options(launcher="plain"))
    assert same_files(out, shards)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_killed_in_an_upload_resumes_to_the_same_weights(data, s3):
    undisturbed, disturbed = new_folder(), new_folder()
    train.job(tiny_arguments(data, undisturbed))
    with Proxy(s3, cut_at=55, hold=True) as proxy:  # in the second epoch's checkpoint
        with environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
            job = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "train.py"), *tiny_arguments(data, disturbed)])
        assert proxy.was_cut.wait(120)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    (name,) = filesystem.list_names(undisturbed)
    ours, theirs = f"{disturbed}/{name}", f"{undisturbed}/{name}"
    assert checkpoint.last(ours).epoch == 1
    filesystem.remove(f"{ours}/{LOCK_NAME}")  # a minute's wait for the dead claim
    train.job(tiny_arguments(data, disturbed))
    assert checkpoint.last(ours).card["weights_sha256"] == checkpoint.last(theirs).card["weights_sha256"]
    assert [epoch["epoch"] for epoch in run_directory.read_record(ours)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_every_job_under_ray_has_the_results_of_a_folder(source, shards, local_run):
    out = new_folder()
    preprocess.run(tiny_experiment(source=source, out=out + "/shards", workers=2), preprocess.Options())
    assert same_files(out + "/shards", shards)
    path = train.run(tiny_experiment(data=out + "/shards", runs=out + "/runs", workers=2), train.Options())
    assert losses(path) == pytest.approx(losses(local_run), rel=5e-3)
    two, one = (
        filesystem.read_json(filesystem.join(evaluate.run(options), "summary.json"))
        for options in (
            evaluate.Options(checkpoint=path, workers=2),
            evaluate.Options(checkpoint=path, launcher="plain", overwrite=True),
        )
    )
    assert two["images"] == one["images"] == 8
    assert two["scores"]["dice"]["mean"] == pytest.approx(one["scores"]["dice"]["mean"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_outage_during_a_training_with_two_workers_ends_it_with_a_one_line_error(data, s3):
    folder = new_folder()
    arguments = [a for a in tiny_arguments(data, folder) if a not in ("--launcher", "plain")] + ["--workers", "2"]
    with Proxy(s3, cut_at=120) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        # Its workers are not restarted: the outage would meet them three times more.
        once = "ray_runtime.build_trainer = functools.partial(ray_runtime.build_trainer, tries=0)"
        line = [*changed_train(once), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert proxy.was_cut.is_set()
    errors = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]  # between Ray's lines
    assert done.returncode == 75 and len(errors) == 1 and "cannot be reached" in errors[0], done.stderr
    (name,) = filesystem.list_names(folder)
    assert checkpoint.last(f"{folder}/{name}") is not None


@pytest.mark.slow
def test_an_outage_seen_by_a_worker_is_not_reported_as_a_mistake(phantom, ray_session):
    task = (CamusTree(phantom), "s3://no-such-bucket/shards", "part-00000.parquet", ["patient0001"], tiny_experiment().image)
    with pytest.raises(StorageError, match="bucket that does not exist") as found:
        list(ray_preprocessing.write_parts_with_ray([task], 1))
    assert "Traceback" not in str(found.value)

    class Away:
        def cases(self, patients):
            raise StorageError("s3://bucket does not answer.")

    plan = evaluation.EvaluationPlan(Away(), ("run",), ["patient0001"], "out", None, PredictConfig(), {})
    with pytest.raises(StorageError, match="^s3://bucket does not answer.$"):
        list(evaluation.score_on_ray(plan, [["patient0001"]], 1))
