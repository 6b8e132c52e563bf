"""Stages as submitted Ray jobs: begun, followed to their end, found again after the follower died, and stopped with it."""

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from typing import Any

from heartseg.errors import UserError
from jobs.support import command_line, ray_runtime

log = logging.getLogger("heartseg.jobs")
SECONDS_BETWEEN_LOOKS = 1.0
# A dashboard that does not answer for so long is not coming back by itself.
SECONDS_OF_SILENCE = 120.0
# A stopped job has Ray's grace (3 s by default on the head) and what its workers take to leave.
SECONDS_TO_STOP = 60.0
ALIVE = ("PENDING", "RUNNING")
# Ray's loggers that tell of every file that is not uploaded, and of every connection that ends.
TALKATIVE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", ray_runtime.UPLOAD_LOGGER)


class JobFailed(RuntimeError):
    """A job ended without success, and not by a user's mistake: another try may help."""


class Cluster:
    """The cluster of RAY_API_SERVER_ADDRESS or RAY_ADDRESS; raises UserError where none answers."""

    def __init__(self):
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        mend = (
            'start one (cluster/local.sh start), set its address and token (eval "$(cluster/local.sh env)"), or give --local.'
        )
        # Ray itself would take whichever cluster was started last on this machine.
        if not (os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")):
            raise UserError(f"--submit needs RAY_API_SERVER_ADDRESS, a cluster's dashboard: {mend}")
        try:
            self.client = JobSubmissionClient()
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise UserError(f"--submit finds no cluster ({_first_line(error)}): {mend}") from error

    def run(self, job: str, arguments: list[str], job_id: str) -> None:
        """Run a job to its end under an id, or follow the one that has it already; its output is printed here.

        Raises UserError for a user's mistake, JobFailed for any other failure; stops the job on KeyboardInterrupt.
        """
        try:
            self.submit(job, arguments, job_id)
            self.follow(job_id)
        except KeyboardInterrupt:
            self.stop(job_id)
            raise
        if self.status(job_id) is None:
            raise JobFailed(f"The cluster has forgotten {job_id}: was it started anew?")
        details = self.ask(self.client.get_job_info, job_id)
        if str(details.status.value) == "SUCCEEDED":
            return
        said = self.last_words(job, job_id)
        if details.driver_exit_code == command_line.EXIT_USER_ERROR:
            raise UserError(f"{job_id}: {said}")
        raise JobFailed(f"{job_id} ended {details.status.value} (exit code {details.driver_exit_code}): {said}")

    def submit(self, job: str, arguments: list[str], job_id: str) -> None:
        """Submit a job, unless the cluster knows its id: of an earlier command, or of a reply that was lost."""
        if self.status(job_id):
            log.info("found %s", job_id)
            return
        entrypoint = shlex.join(["python", f"jobs/{job}.py", *arguments])

        def once() -> None:
            if not self.status(job_id):
                self.client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=self.runtime_env())

        self.ask(once)
        log.info("submitted %s", job_id)

    def runtime_env(self) -> dict:
        """The working directory, which is uploaded; settings and secrets belong to the cluster's own environment."""
        return {"working_dir": str(command_line.ROOT)}

    def status(self, job_id: str) -> str | None:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; None for a job that this cluster does not know."""
        try:
            return str(self.ask(self.client.get_job_status, job_id).value)
        except RuntimeError as error:
            if _http_code(error) == 404 or "does not exist" in str(error):
                return None
            raise UserError(f"The cluster refuses to tell of {job_id} ({_first_line(error)}): is the token its own?") from error

    def follow(self, job_id: str) -> None:
        """Print a job's output until it has ended; a broken connection is taken up again where it was."""
        import aiohttp

        printed = 0

        async def tail() -> None:
            nonlocal printed
            seen = 0
            async for text in self.client.tail_job_logs(job_id):
                fresh = text[max(0, printed - seen) :]  # the log comes from its start each time
                seen += len(text)
                if fresh:
                    print(fresh, end="", flush=True)
                    printed = max(printed, seen)

        while True:
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                log.debug("The log of %s broke off: %s", job_id, error)
            if self.status(job_id) not in ALIVE:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self, job_id: str) -> None:
        """Stop a job, and wait until it has; what hinders it is told."""
        log.info("stopping %s …", job_id)
        try:
            if self.status(job_id) in ALIVE:
                self.ask(self.client.stop_job, job_id)
            end = time.monotonic() + SECONDS_TO_STOP
            while self.status(job_id) in ALIVE and time.monotonic() < end:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if self.status(job_id) in ALIVE:
                log.warning("%s has not stopped yet: ray job status %s", job_id, job_id)
        except (UserError, KeyboardInterrupt) as error:
            log.warning("%s may still run (%s): ray job stop %s", job_id, str(error) or "interrupted again", job_id)

    def last_words(self, job: str, job_id: str) -> str:
        """The sentence that a job ended with, else the last line of its output."""
        try:
            text = re.sub(r"\x1b\[[0-9;]*m", "", self.ask(self.client.get_job_logs, job_id))
        except UserError as error:  # its node may have gone, with its log
            text = str(error)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        sentences = [line for line in lines if line.startswith(f"{job}.py: ")]
        return (sentences or lines or ["it said nothing"])[-1]

    def ask(self, question: Callable, *arguments, **named) -> Any:
        """A question to the cluster, asked again while nobody answers; raises UserError when that lasts, or for the token."""
        from ray.exceptions import AuthenticationError

        end = time.monotonic() + SECONDS_OF_SILENCE
        while True:
            try:
                return question(*arguments, **named)
            except AuthenticationError as error:
                raise UserError(f"The cluster refuses to tell ({_first_line(error)}): is the token its own?") from error
            except (OSError, RuntimeError) as error:  # requests' own are OSErrors: refused, reset, timed out
                if isinstance(error, RuntimeError) and _http_code(error) < 500:
                    raise
                if time.monotonic() > end:
                    raise UserError(f"The cluster does not answer ({_first_line(error)}): the same command goes on.") from error
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _http_code(error: Exception) -> int:
    """The code of the answer that Ray's client made an error of; 0 where there was none."""
    found = re.search(r"status code (\d{3})", str(error))
    return int(found[1]) if found else 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
