"""Following a submitted job on a dashboard that fails as real ones do; test_submitted_pipeline.py asks a real one."""

import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from heartseg.errors import StorageError, StorageRefused, UserError
from jobs.support import command_line, job_submission
from jobs.support.ray_runtime import free_port

JOB = "train-0404abcd"


def details(status: str, code: int | None = None) -> tuple[int, dict]:
    shown = {"type": "SUBMISSION", "job_id": None, "submission_id": JOB, "driver_info": None, "status": status}
    return 200, shown | {"entrypoint": "python jobs/train.py", "driver_exit_code": code}


@pytest.fixture()
def dashboard(monkeypatch):
    """The client of a dashboard, and its next answers: pairs of code and status; the last one is repeated."""
    answers: list[tuple[int, dict | str]] = []
    logs: list[int | dict | str] = [200, {"logs": "epoch 1\ntrain.py: The store does not answer.\n"}]

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/api/version":
                code, said = 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            elif self.path.endswith("/logs"):
                code, said = logs
            else:
                code, said = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(code)
            self.end_headers()
            self.wfile.write((said if isinstance(said, str) else json.dumps(said)).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(job_submission, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(job_submission, "DASHBOARD_TIMEOUT_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
        yield job_submission.Cluster(), answers, logs
        server.shutdown()


def test_without_a_cluster_a_submission_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="--submit finds no cluster .*local.sh start"):
        job_submission.Cluster()
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with pytest.raises(UserError, match="--submit needs RAY_API_SERVER_ADDRESS"):
        job_submission.Cluster()


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([(500, "traceback"), (503, "starting"), details("RUNNING")], "RUNNING"),  # a dashboard that fails for a while
        ([(404, f"Job {JOB} does not exist")], None),
        ([(403, "Forbidden")], "check its token"),
        ([(400, f"bad request for {JOB}")], "refused the request.*check its token"),  # the name's 0404 is not a status code
        ([(500, "traceback")], "did not answer .*500.*rerun the same command"),
    ],
)
def test_a_dashboards_reply_is_a_status_or_a_one_line_error(dashboard, replies, expected):
    cluster, answers, _ = dashboard
    answers += replies
    if expected in (None, "RUNNING"):
        assert cluster.status(JOB) == expected
    else:
        with pytest.raises(UserError, match=expected):
            cluster.status(JOB)


def test_an_outage_is_worth_another_attempt_a_mistake_is_not_and_a_lost_log_ends_nothing(dashboard, capsys):
    cluster, answers, logs = dashboard
    answers += [details("RUNNING"), details("RUNNING"), details("FAILED", command_line.EXIT_STORAGE_ERROR)]
    with pytest.raises(job_submission.JobFailed, match="The store does not answer"):
        cluster.run("train", [], JOB)
    assert capsys.readouterr().out.count("epoch 1") == 1  # what was printed is not printed again
    answers[:] = [details("FAILED", command_line.EXIT_USER_ERROR)]
    with pytest.raises(UserError, match="The store does not answer"):
        cluster.run("train", [], JOB)
    logs[:] = [502, "no way through"]
    answers[:] = [details("RUNNING"), details("RUNNING"), details("SUCCEEDED", 0)]
    cluster.run("train", [], JOB)


def test_a_secret_in_a_jobs_runtime_env_is_warned_of_by_its_name(monkeypatch, caplog):
    given = {"MY_API_KEY": "1", "AWS_SECRET_ACCESS_KEY_ID": "", "HEARTSEG_RUNS": "/mine"}
    monkeypatch.setenv(command_line.JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": given}}))
    command_line.warn_about_secrets()
    assert [message.partition(" ")[0] for message in caplog.messages] == ["MY_API_KEY"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(StorageError("s3://bucket is away."), 75), (StorageRefused("s3://bucket is closed."), 2),
     (UserError("s3://bucket is not a name."), 2), (OSError(errno.ESTALE, "stale", "s3://bucket"), 75)],
)  # fmt: skip
def test_a_job_whose_storage_does_not_answer_has_its_own_exit_code(error, code, monkeypatch, capsys):
    def job(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(command_line, "install_sigterm_handler", lambda: None)  # the test's own process keeps its signals
    with pytest.raises(SystemExit) as left:
        command_line.main(job)
    assert left.value.code == code and capsys.readouterr().err.startswith("train.py: s3://bucket ")
