"""What many tests share: a small phantom tree, its shards, one S3 server and one Ray per process, and the measurements."""

import os
import sys
import time
import uuid

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads each wait for one another: five times as long

import pytest
from hypothesis import settings

from heartseg.datasets.image_folder import open_source
from heartseg.datasets.phantom import write_phantom
from heartseg.shards.preprocessing import write_shards
from helpers import s3_server
from helpers.experiments import CAMUS, skip_or_fail, tiny_experiment
from helpers.job_process import MARK

os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # 2 s by default, and each report waits for the next check
# 15 by default: beside another test that computes, Ray's workers would get 4 % of a core.
os.environ |= {"RAY_worker_niceness": "0"}
os.environ.pop("WANDB_API_KEY", None)
os.environ["HEARTSEG_NAME_KEY"] = "the tests'"  # otherwise predictions would keep a secret in the user's home
os.environ[MARK] = uuid.uuid4().hex

# A property test that sets its own max_examples says why.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("HEARTSEG_HYPOTHESIS", "quick"))


def pytest_collection_modifyitems(items):
    """Tests that use Ray first, then the files from the last name to the first: what takes long is not left to the end."""
    items.sort(key=lambda item: ("ray_session" in item.fixturenames, item.path), reverse=True)


@pytest.fixture(autouse=True)
def same_threads():
    """A test that sets torch's threads leaves them as they were: sums on other threads differ in their last bits."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> str:
    """A CAMUS tree of 8 synthetic patients at a quarter of the size."""
    folder = str(tmp_path_factory.mktemp("phantom"))
    write_phantom(folder, patients=8, scale=0.25)
    return folder


@pytest.fixture(scope="session")
def shards(phantom, tmp_path_factory) -> str:
    """Shards of the phantom on a 64 x 64 grid: 6 patients to train, 2 to test."""
    folder, experiment = str(tmp_path_factory.mktemp("shards")), tiny_experiment()
    return write_shards(open_source(phantom), folder, experiment.image, experiment.split).path


@pytest.fixture(scope="session")
def camus() -> str:
    if not os.path.isdir(CAMUS):
        skip_or_fail(f"no CAMUS at {CAMUS}: set HEARTSEG_CAMUS")
    return CAMUS


@pytest.fixture(scope="session")
def s3():
    """The URL of an S3 server on loopback, which serves every `s3://` path of this process and its children."""
    url = s3_server.start_server()
    with s3_server.environment(**s3_server.KEYS, AWS_ENDPOINT_URL=url):
        yield url


LONGEST_IDLE_S = 30
RAY_LAST_USED: list[float] = []


@pytest.fixture(scope="module")
def ray_session(s3):
    """One Ray on loopback for every test that needs one; its workers inherit the S3 server's address.

    It restarts after half a minute without use: a driver that had not used its Ray for a quarter of an hour was never
    notified that its next actor had started, and waited for ever (Ray 2.60).
    """
    import ray

    from jobs.support import ray_runtime

    os.environ.pop("RAY_ADDRESS", None)
    if RAY_LAST_USED and time.monotonic() - RAY_LAST_USED[-1] > LONGEST_IDLE_S:
        ray.shutdown()
    ray_runtime.start_ray(2)
    yield
    RAY_LAST_USED.append(time.monotonic())


def pytest_sessionfinish():
    if RAY_LAST_USED:
        import ray

        ray.shutdown()


@pytest.fixture()
def measurement(record_property):
    """Adds a line to the measurements that the session prints at its end."""
    return lambda line: record_property("measurement", line)


def pytest_terminal_summary(terminalreporter):
    """Print the measurements; xdist brings the properties of its processes' reports here."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    properties = [entry for report in reports if report.when == "call" for entry in report.user_properties]
    if lines := [line for name, line in properties if name == "measurement"]:
        terminalreporter.section("measurements")
        terminalreporter.write("".join(f"{line}\n" for line in lines))
