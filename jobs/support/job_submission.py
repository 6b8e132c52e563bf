"""Runs stages as Ray jobs: submits and follows them, finds them again by id, and stops them when interrupted."""

import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from heartseg.errors import UserError, require
from jobs.support import command_line
from jobs.support.command_line import first_line, log

POLL_INTERVAL_S = 1.0
MAX_LOG_BYTES_PER_S = 1_000_000
# A dashboard that has not answered for this long will not come back by itself.
DASHBOARD_TIMEOUT_S = 120.0
# Stopping a job takes up to Ray's grace period (3 s by default on the head) and the time that its workers need to exit.
STOP_TIMEOUT_S = 60.0
ALIVE = ("PENDING", "RUNNING")


class JobFailed(RuntimeError):
    """A job failed, but not through a user's mistake: another attempt may help."""


class Cluster:
    """The cluster at RAY_API_SERVER_ADDRESS or RAY_ADDRESS; raises UserError if none answers."""

    def __init__(self):
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        from jobs.support import ray_runtime

        # They log every file that is not uploaded and every closed connection.
        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", ray_runtime.UPLOAD_LOGGER):
            logging.getLogger(name).setLevel(logging.WARNING)
        fix = 'start one (cluster/local.sh start), set its address and token (eval "$(cluster/local.sh env)"), or use --local.'
        # Without an address, Ray would use whichever cluster was started last on this machine.
        has_address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        require(bool(has_address), f"--submit needs RAY_API_SERVER_ADDRESS, the dashboard address of a cluster: {fix}")
        try:
            self.client = JobSubmissionClient()
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise UserError(f"--submit finds no cluster ({first_line(error)}): {fix}") from error

    def run(self, job: str, arguments: list[str], job_id: str) -> None:
        """Run a job under an id until it ends, or follow the job that has it; raises UserError for a mistake, or JobFailed."""
        try:
            self.submit(job, arguments, job_id)
            output = self.follow(job_id)
        except KeyboardInterrupt:
            self.stop(job_id)
            raise
        details = self.ask(self.client.get_job_info, job_id)
        if details is None:
            raise JobFailed(f"The cluster no longer knows {job_id}: it may have been restarted")
        if details.status == "SUCCEEDED":
            return
        # The one-line message that it ended with, otherwise the last line of its output.
        lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
        message = ([line for line in lines if line.startswith(f"{job}.py: ")] or lines or ["it printed nothing"])[-1]
        if details.driver_exit_code == command_line.EXIT_USER_ERROR:
            raise UserError(f"{job_id}: {message}")
        ended = f"{details.status.value} (exit code {details.driver_exit_code})"
        raise JobFailed(f"{job_id} ended as {ended}: {message}")

    def submit(self, job: str, arguments: list[str], job_id: str) -> None:
        """Submit a job unless the cluster knows its id, from an earlier command or after a lost reply."""

        def submit_once() -> str:
            if self.status(job_id):
                return "found"
            entrypoint = shlex.join(["python", f"jobs/{job}.py", *arguments])
            # Settings and secrets belong in the cluster's own environment, not in a runtime_env.
            runtime_env = {"working_dir": str(command_line.ROOT)}
            self.client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env)
            return "submitted"

        log.info("%s %s", self.ask(submit_once), job_id)

    def status(self, job_id: str) -> str | None:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; None for a job that this cluster does not know."""
        details = self.ask(self.client.get_job_info, job_id)
        return details and str(details.status.value)

    def follow(self, job_id: str) -> str:
        """Print a job's output until it ends; returns all of it."""
        output, is_alive = "", True
        while is_alive:
            is_alive = self.status(job_id) in ALIVE
            try:
                # The last read has the job's message, so it is repeated while the dashboard does not answer.
                read = self.client.get_job_logs if is_alive else partial(self.ask, self.client.get_job_logs)
                printed, output = len(output), read(job_id) or output
                print(output[printed:], end="", flush=True)
            except (RuntimeError, OSError, UserError) as error:  # its node may be gone, and its log with it
                log.debug("The log of %s cannot be read: %s", job_id, error)
            if is_alive:
                time.sleep(POLL_INTERVAL_S + len(output) / MAX_LOG_BYTES_PER_S)  # Ray sends the whole log each time
        return output

    def stop(self, job_id: str) -> None:
        """Stop a job and wait until it has ended; if that fails, warn with the command to type."""
        log.info("stopping %s …", job_id)
        end = time.monotonic() + STOP_TIMEOUT_S
        try:
            if self.status(job_id) in ALIVE:
                self.ask(self.client.stop_job, job_id)
            while self.status(job_id) in ALIVE:
                require(time.monotonic() < end, f"it had not stopped after {STOP_TIMEOUT_S:g} s")
                time.sleep(POLL_INTERVAL_S)
        except (UserError, KeyboardInterrupt) as error:
            message = "%s may still be running (%s): stop it with `ray job stop %s`."
            log.warning(message, job_id, str(error) or "interrupted again", job_id)

    def ask(self, question: Callable[..., Any], *arguments: str) -> Any:
        """The cluster's reply, None for a job that it does not know; waits up to DASHBOARD_TIMEOUT_S for an answer."""
        from ray.exceptions import AuthenticationError

        end = time.monotonic() + DASHBOARD_TIMEOUT_S
        while True:
            try:
                return question(*arguments)
            except (AuthenticationError, OSError, RuntimeError) as error:  # errors of requests are OSErrors
                code = re.search(r"status code (\d{3})", str(error))  # in the messages of Ray's client
                if "does not exist" in str(error) or code and code[1] == "404":
                    return None
                if not isinstance(error, OSError) and not (code and code[1] >= "500"):
                    raise UserError(f"The cluster refused the request ({first_line(error)}): check its token.") from error
                if time.monotonic() > end:
                    fix = "start it or check RAY_API_SERVER_ADDRESS, then rerun the same command."
                    raise UserError(f"The cluster did not answer ({first_line(error)}): {fix}") from error
                time.sleep(POLL_INTERVAL_S)
