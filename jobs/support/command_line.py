"""What every job shares: its command line, one-line error messages, exit codes and SIGTERM."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from heartseg.config.experiment import Experiment, from_json
from heartseg.config.recipes import RECIPES
from heartseg.errors import StorageError, StorageRefused, UserError, io_errors_as_user_errors
from heartseg.storage import filesystem

log = logging.getLogger("heartseg.jobs")
ROOT = Path(__file__).resolve().parents[2]
# Marks a nested dataclass whose fields become flags without its name as a prefix.
FLAT = tyro.conf.arg(name="")
# Set in every submitted job: the configuration that Ray passes to its driver.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Names of environment variables whose values no one else should see.
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h: the storage does not answer, and another attempt may help.
EXIT_STORAGE_ERROR = 75


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: the job ends in order. A KeyboardInterrupt, since nothing else ends a wait of Ray's."""


def main(job: Callable[[Sequence[str]], None]) -> None:
    """Run a job; a user's mistake or a refused write becomes a one-line message and exit code 2, an outage one and 75."""
    if job.__module__ == "__main__":
        # What Ray sends to workers must be importable there: it would pickle the classes of a script by value.
        job = importlib.import_module(f"jobs.{Path(job.__code__.co_filename).stem}").job
    configure_logging()
    install_sigterm_handler()
    warn_about_secrets()
    try:
        with io_errors_as_user_errors():
            job(sys.argv[1:])
    except (UserError, StorageRefused) as error:
        exit_with_message(str(error), EXIT_USER_ERROR)
    except StorageError as error:
        exit_with_message(str(error), EXIT_STORAGE_ERROR)
    except KeyboardInterrupt:
        # Ray may raise a KeyboardInterrupt of its own instead of ours; our handler has left SIG_IGN behind.
        terminated = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        exit_with_message("stopped; rerun the same command to resume.", 143 if terminated else 130)


def exit_with_message(message: str, code: int) -> None:
    """Print a one-line message after the job's name, and end the process."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def install_sigterm_handler() -> None:
    """Make SIGTERM an exception in the main thread, so that a job ends in order."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the end
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def warn_about_secrets() -> None:
    """Warn of secrets in a submitted job's runtime_env: Ray shows it to everyone who sees the dashboard."""
    given = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env", {}).get("env_vars", {})
    for name in sorted(name for name, value in given.items() if value and SECRET.search(name)):
        log.warning(
            "%s stands in this job's runtime_env, which Ray's dashboard shows: set it where the cluster starts instead "
            "(cluster/README.md, Secrets), and change it if others could see it.",
            name,
        )


def configure_logging() -> None:
    """Print the log lines of heartseg, here and in Ray's workers; what a terminal cannot show becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
    logging.getLogger("heartseg").setLevel(logging.INFO)


def parse(options: Any, argv: Sequence[str], prog: str, description: str) -> tuple[Experiment, Any]:
    """A recipe (`seed` where none is named) or `--config FILE`, then changes to it: the experiment and the job's options.

    `options` is an instance of the job's own dataclass. Raises UserError for any mistake on the command line.
    """
    experiment, rest = _pick_recipe(_spell_out_elastic(list(argv)))

    fields = [("experiment", Annotated[Experiment, FLAT]), ("options", Annotated[type(options), FLAT])]
    kind = make_dataclass("Command", fields, frozen=True)
    shown = f"python jobs/{prog} [{'|'.join(RECIPES)}|--config FILE]"
    command = parse_line(kind, rest, shown, description, default=kind(experiment, options))
    return with_environment(command.experiment), command.options


def _spell_out_elastic(argv: list[str]) -> list[str]:
    """`--workers 1:4` as `--workers 4 --min-workers 1`."""
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--workers":
            continue
        taken = 1 if equals else 2
        fewest, colon, most = (value if equals else "".join(argv[place + 1 : place + 2])).partition(":")
        if colon:
            return [*argv[:place], "--workers", most, "--min-workers", fewest, *argv[place + taken :]]
    return argv


def _pick_recipe(argv: list[str]) -> tuple[Experiment, list[str]]:
    if argv and argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs a file: the complete experiment as JSON.")
        value = filesystem.read_json(argv[1])
        if not isinstance(value, dict):
            raise UserError(f"--config {argv[1]} is not an experiment: give a JSON object, such as a run's experiment.json.")
        # A run's experiment.json and a checkpoint's card hold the experiment under this key.
        return from_json(value.get("experiment", value), origin=argv[1]), argv[2:]
    if not argv or argv[0].startswith("-"):
        return RECIPES["seed"](), argv
    if argv[0] not in RECIPES:
        raise UserError(f"There is no recipe {argv[0]!r}: use one of {', '.join(RECIPES)}, or --config FILE.")
    return RECIPES[argv[0]](), argv[1:]


def parse_line(kind: type, argv: Sequence[str], prog: str, description: str, default: Any = None) -> Any:
    """tyro's command line for a dataclass; turns its boxed errors into a one-line UserError."""
    errors = io.StringIO()
    arguments = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(argv), prog=prog, description=description, **arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│ ") for line in errors.getvalue().splitlines() if line.startswith("│")]
        message = " ".join(lines).split(" ───")[0].strip("─ ") or "The command line cannot be parsed"
        raise UserError(f"{message.rstrip('.')}; --help lists all flags.") from None


def as_flags(values: dict, prefix: str = "--") -> list[str]:
    """Values by field as a command line: `{"trials": 2, "space": {"lr_points": 3}}` as `--trials 2 --space.lr-points 3`."""
    words = []
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            words += as_flags(value, f"{flag}.")
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def with_environment(experiment: Experiment) -> Experiment:
    """The experiment with absolute paths, those that were not given taken from the environment."""
    defaults = {"source": "HEARTSEG_SOURCE", "data": "HEARTSEG_DATA", "runs": "HEARTSEG_RUNS"}
    paths = {name: getattr(experiment, name) or os.environ.get(variable, "") for name, variable in defaults.items()}
    if JOB_CONFIG not in os.environ:  # a submitted job's folder is a temporary copy
        paths["runs"] = paths["runs"] or "runs"
    paths["out"] = experiment.out
    return replace(experiment, **{name: absolute(path, name) for name, path in paths.items() if path})


def absolute(path: str, name: str) -> str:
    """The absolute path; raises UserError for a relative one in a submitted job, whose folder is an uploaded copy."""
    if JOB_CONFIG in os.environ and not (filesystem.is_uri(path) or os.path.isabs(path)):
        raise UserError(
            f"--{name} {path} is relative, and a submitted job runs in a copy of the folder: give an absolute path."
        )
    return filesystem.absolute(path)


def require_flag(value: str, flag: str, meaning: str) -> str:
    """The value of a flag that a job needs; raises UserError if it is missing."""
    if not value:
        raise UserError(f"{flag} is missing: give {meaning}.")
    return value
