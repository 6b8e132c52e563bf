"""What many tests share: a small phantom tree, its shards, a tiny experiment, and the one Ray of a session (of a process)."""

import os
import time

import pytest

from heartseg.datasets.phantom import write_phantom
from heartseg.datasets.source import open_source
from heartseg.shards.preprocessing import write_shards
from helpers import s3_server
from helpers.experiments import tiny_experiment

RAY_KEPT_S = 30
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # Ray looks every 2 s else, and each report waits for it
os.environ.pop("WANDB_API_KEY", None)


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
def s3():
    """An S3 server on loopback, which every `s3://` path of this process and its children means; returns its URL."""
    url = s3_server.start_server()
    with s3_server.environment(**s3_server.KEYS, AWS_ENDPOINT_URL=url):
        yield url


RAY_LAST_USED: list[float] = []


@pytest.fixture(scope="module")
def ray_session(s3):
    """One Ray on loopback for every test that needs one; its workers know the S3 server, as its environment does.

    After half a minute in which other files were tested it begins anew: a driver that had not used its Ray for a quarter of an
    hour of them was never told that its next actor was there (Ray 2.60), and waited for ever.
    """
    import ray

    from jobs.support import ray_runtime

    os.environ.pop("RAY_ADDRESS", None)
    if RAY_LAST_USED and time.monotonic() - RAY_LAST_USED[-1] > RAY_KEPT_S:
        ray.shutdown()
    ray_runtime.start_ray(2)
    yield
    RAY_LAST_USED.append(time.monotonic())


def pytest_sessionfinish(session):
    if RAY_LAST_USED:
        import ray

        ray.shutdown()
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes
        session.config.workeroutput |= {"faults": FAULTS, "told": TOLD}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What one of xdist's processes has for the tables at the end; one that died has nothing."""
    output = getattr(node, "workeroutput", {})
    FAULTS.extend(output.get("faults", ()))
    TOLD.extend(output.get("told", ()))


FAULTS: list[tuple[str, int | None, float | None]] = []


@pytest.fixture()
def fault_table():
    """Adds a row to the table of faults that the session ends with: the fault, recorded epochs trained again, seconds."""
    return lambda fault, again, seconds: FAULTS.append((fault, again, seconds))


TOLD: list[str] = []


@pytest.fixture(scope="session")
def told():
    """Adds a line to what the session ends with: what stood for what is not here, the moments that a seed drew, numbers."""
    return TOLD.append


def pytest_terminal_summary(terminalreporter):
    if TOLD:
        terminalreporter.section("told by tests")
        for line in TOLD:
            terminalreporter.write_line(line)
    if FAULTS:
        terminalreporter.section("faults: recorded epochs trained again, seconds to the next recorded epoch")
        for fault, again, seconds in FAULTS:
            numbers = f"{'-' if again is None else again:>3} {'-' if seconds is None else f'{seconds:.1f} s':>9}"
            terminalreporter.write_line(f"{fault:<60} {numbers}")
