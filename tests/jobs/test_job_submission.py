"""A submitted job's follower against a dashboard that errs as real ones do: refusals, silence and failures of its own.

The dashboard is a plain HTTP server that answers a job's questions with what a test tells it to; tests/test_submit.py asks a
real one.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from ray.train import WorkerGroupError

from heartseg.errors import StorageError, UserError
from jobs.support import command_line, job_submission, ray_training

JOB = "train-0404abcd"


@pytest.fixture()
def dashboard(monkeypatch):
    """The client of a dashboard, and what it answers next: pairs of code and status; the last one stays."""
    answers: list[tuple[int, dict | str]] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/api/version":
                code, said = 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            elif self.path.endswith("/logs"):
                code, said = 200, {"logs": "train.py: The store does not answer.\n"}
            elif self.path.endswith("/tail"):
                code, said = 502, "no way through"
            else:
                code, said = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(code)
            self.end_headers()
            self.wfile.write((said if isinstance(said, str) else json.dumps(said)).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(job_submission, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(job_submission, "SECONDS_OF_SILENCE", 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
        yield job_submission.Cluster(), answers
        server.shutdown()


def details(status: str, code: int | None = None) -> tuple[int, dict]:
    """A dashboard's answer about a job."""
    told = {"type": "SUBMISSION", "job_id": None, "submission_id": JOB, "driver_info": None, "status": status}
    return 200, told | {"entrypoint": "python jobs/train.py", "driver_exit_code": code}


@pytest.mark.parametrize("code", [401, 403])
def test_a_token_that_is_refused_is_a_sentence(dashboard, code):
    cluster, answers = dashboard
    answers.append((code, "Unauthorized: Missing authentication token"))
    with pytest.raises(UserError, match="is the token its own"):
        cluster.status(JOB)
    with pytest.raises(UserError, match="is the token its own"):
        cluster.follow(JOB)


def test_a_dashboard_that_fails_for_a_while_is_asked_again_and_one_that_always_does_is_a_sentence(dashboard):
    cluster, answers = dashboard
    answers += [(500, "traceback"), (503, "starting"), details("RUNNING")]
    assert cluster.status(JOB) == "RUNNING"
    answers[:] = [(500, "traceback")]
    with pytest.raises(UserError, match="does not answer .*500"):
        cluster.status(JOB)


def test_a_job_that_is_not_known_is_none_and_its_name_is_no_code(dashboard):
    cluster, answers = dashboard
    answers.append((404, f"Job {JOB} does not exist"))
    assert cluster.status(JOB) is None
    answers[:] = [(400, f"bad request for {JOB}")]
    with pytest.raises(UserError, match="refuses"):
        cluster.status(JOB)


def test_a_log_that_cannot_be_followed_does_not_end_the_following(dashboard):
    cluster, answers = dashboard
    answers += [details("RUNNING"), details("RUNNING"), details("SUCCEEDED", 0)]
    cluster.run("train", [], JOB)


def test_a_store_that_was_away_is_worth_another_try_and_a_mistake_is_not(dashboard):
    cluster, answers = dashboard
    answers.append(details("FAILED", command_line.EXIT_STORAGE_ERROR))
    with pytest.raises(job_submission.JobFailed, match="The store does not answer"):
        cluster.run("train", [], JOB)
    answers[:] = [details("FAILED", command_line.EXIT_USER_ERROR)]
    with pytest.raises(UserError, match="The store does not answer"):
        cluster.run("train", [], JOB)


def test_a_store_that_was_away_for_one_worker_is_no_mistake_of_the_whole_training():
    failure = WorkerGroupError("one of them failed", {1: StorageError("s3://bucket does not answer.")})
    with pytest.raises(StorageError, match="s3://bucket does not answer"):
        ray_training.raise_user_error(failure, 2, {"CPU": 1})


@pytest.mark.parametrize(("submitted", "code"), [(True, 75), (False, 2)])
def test_only_a_submitted_job_tells_a_store_that_was_away_from_a_mistake(submitted, code, monkeypatch, capsys):
    def job(argv):
        raise StorageError("s3://bucket does not answer.")

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.delenv(command_line.JOB_CONFIG, raising=False)
    if submitted:
        monkeypatch.setenv(command_line.JOB_CONFIG, "{}")
    monkeypatch.setattr(command_line, "install_sigterm_handler", lambda: None)  # the test's own process keeps its signals
    with pytest.raises(SystemExit) as left:
        command_line.main(job)
    assert left.value.code == code and capsys.readouterr().err == "train.py: s3://bucket does not answer.\n"
