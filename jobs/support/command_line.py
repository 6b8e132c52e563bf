"""Shared by all jobs: command lines, one-line error messages, exit codes and SIGTERM."""

import contextlib
import difflib
import importlib
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from heartseg.config.experiment import Experiment, flatten, from_json, to_json, without_effect
from heartseg.config.recipes import RECIPES
from heartseg.errors import StorageError, StorageRefused, UserError, io_errors_as_user_errors, require
from heartseg.storage import filesystem

log = logging.getLogger("heartseg.jobs")
ROOT = Path(__file__).resolve().parents[2]
# Marks a nested dataclass whose fields become flags without its name as a prefix.
FLAT = tyro.conf.arg(name="")
RECIPE = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar=f"[{'|'.join(RECIPES)}|--config FILE]",
        help="A recipe (name one before --help to see its defaults instead of seed's), or a file with a complete experiment.",
    ),
]
# Set in every submitted job: the configuration that Ray passes to its driver.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Names of environment variables whose values must stay secret.
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
# Prefixes of variables of ours, Ray, W&B, S3 and torchrun that must count as unset if empty; not every program does so.
MEANINGLESS_IF_EMPTY = ("HEARTSEG_", "RAY_", "WANDB_", "AWS_", "TMPDIR", "WORLD_SIZE", "RANK", "LOCAL_")
# A UNIX socket's path has at most 107 bytes, of which Ray's own folders below TMPDIR take 68.
LONGEST_TMPDIR = 39
# tyro's messages about a command line, and ours.
MISTAKES = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (\S+).*", r"\1 must be a whole number, not \2."),
    (r"Error parsing (\S+): could not convert string to float: (\S+).*", r"\1 must be a number, not \2."),
    (r"Error parsing (\S+): no type matching (?:{None}\|)?{?(.+?)}? could be .* from \[(.*?)\].*", r"\1 must be \2, not \3."),
    (r"invalid choice (.+) for argument '(.+)'. Expected one of \((?:'', )?(.+?)\).*", r"\2 must be one of \3, not \1."),
    (r"Missing value for argument '(.+?)'.*", r"\1 needs a value; --help lists all flags."),
    (r".* -{3,} (.*?)\.? -{3,} .*", r"\1; --help lists all flags."),
)
ALIKE = 0.7  # of 0 to 1: flags that share no word must be as similar as --dta and --data
MOST_SUGGESTIONS = 4
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h: the storage does not answer, and another attempt may help.
EXIT_STORAGE_ERROR = 75


def main(job: Callable[[Sequence[str]], None]) -> None:
    """Run a job; a user's mistake or a refused write becomes a one-line message and exit code 2, an outage exit code 75."""
    if job.__module__ == "__main__":
        # Objects sent to workers must be importable there: Ray would pickle the classes of a script by value.
        job = importlib.import_module(f"jobs.{Path(job.__code__.co_filename).stem}").job
    configure_logging()
    install_sigterm_handler()
    warn_about_secrets()
    prepare_environment()
    try:
        with io_errors_as_user_errors():
            job(sys.argv[1:])
    except (UserError, StorageRefused) as error:
        exit_with_message(str(error), EXIT_USER_ERROR)
    except StorageError as error:
        exit_with_message(str(error), EXIT_STORAGE_ERROR)
    except KeyboardInterrupt:
        # Ray may raise its own KeyboardInterrupt instead of ours; our handler leaves SIG_IGN behind.
        terminated = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        exit_with_message("stopped; rerun the same command to resume.", 143 if terminated else 130)


def exit_with_message(message: str, code: int) -> None:
    """Print a one-line message after the job's name, and end the process."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 part`, `2 parts`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, otherwise the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def install_sigterm_handler() -> None:
    """Turn SIGTERM into an exception in the main thread, so that a job ends cleanly."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the exit
        raise KeyboardInterrupt  # only this interrupts a wait in Ray

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def warn_about_secrets() -> None:
    """Warn of secrets in a submitted job's runtime_env, which Ray shows to everyone who can see the dashboard."""
    given = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env", {}).get("env_vars", {})
    fix = "set it where the cluster starts instead (cluster/README.md, Secrets), and replace the secret if others could see it."
    for name in sorted(name for name, value in given.items() if value and SECRET.search(name)):
        log.warning("%s is in this job's runtime_env, which Ray's dashboard shows: %s", name, fix)


def prepare_environment() -> None:
    """Remove settings that Ray and W&B cannot use: empty variables, trailing newlines, a long TMPDIR, a proxy for loopback."""
    for name in [name for name in os.environ if name.startswith(MEANINGLESS_IF_EMPTY)]:
        if value := os.environ.pop(name).strip():  # a secret mounted as a file ends with a newline
            os.environ[name] = value
    for name in ("TMPDIR", "RAY_TMPDIR"):
        if len(os.fsencode(os.environ.get(name, ""))) > LONGEST_TMPDIR:
            print(f"{name}={os.environ[name]} is too long a path for sockets: using /tmp instead.", file=sys.stderr)
            os.environ[name], tempfile.tempdir = "/tmp", None
    os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")  # "(RayTrainWorker pid=123)"; Ray reads it at its import
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if given != "*":
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [given, "localhost,127.0.0.1,::1"]))


def configure_logging() -> None:
    """Print heartseg's log lines, here and in Ray's workers; characters that a terminal cannot show become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
    logging.getLogger("heartseg").setLevel(logging.INFO)


def parse(options: Any, argv: Sequence[str], prog: str, description: str) -> tuple[Experiment, Any]:
    """Parse a recipe (default `seed`) or `--config FILE`, and changes to it; returns the experiment and the job's options.

    The class of `options` has a property `unused`, the experiment's fields that have no effect in the job, and why; and, if
    the job changes the experiment, a method `trained`, which returns all resulting experiments.
    """
    words, config = _split_words(argv)
    fields = [("recipe", RECIPE), ("experiment", Annotated[Experiment, FLAT]), ("options", Annotated[type(options), FLAT])]
    kind = make_dataclass("Command", fields, frozen=True)
    # The first word that names a recipe is almost always the recipe, not the value of a flag.
    likely = next((word for word in words if word in RECIPES), "seed")
    base = read_config(config) if config else RECIPES[likely]()
    parse_changes = partial(parse_line, kind, words, f"python jobs/{prog}", description)
    command = parse_changes(default=kind("", base, options))
    recipe = command.recipe or "seed"
    if config:
        require(not command.recipe, f"{command.recipe} and --config cannot be combined: leave one of them out.")
    elif recipe != likely:
        require(recipe in RECIPES, f"{recipe!r} is not a recipe: use one of {', '.join(RECIPES)}, or --config FILE.")
        base = RECIPES[recipe]()
        command = parse_changes(default=kind("", base, options))
    changed, options = command.experiment, command.options
    refuse_unused(base, changed, options.unused)
    refuse_unused(base, changed, without_effect(options.trained(changed) if hasattr(options, "trained") else [changed]))
    return with_environment(changed), options


def refuse_unused(base: object, changed: object, unused: Mapping[str, str]) -> None:
    """Raise UserError for a changed field that has no effect; `unused` holds the reasons by field name."""
    before, after = flatten(to_json(base)), flatten(to_json(changed))
    for field, value in after.items():
        reason = unused.get(field) or unused.get(field.partition(".")[0])
        message = f"--{field.replace('_', '-')} {value} has no effect here: {reason}. Leave it out."
        require(not reason or value == before[field], message)


def _split_words(argv: Sequence[str]) -> tuple[list[str], str]:
    """The words without `--config FILE`, and that file; `--workers 1:4` and `optim.lr=0.001` are expanded to flags."""
    parts = [word.split("=", 1) if word.startswith(("--config=", "--workers=")) else [word] for word in argv]
    words, config = list(itertools.chain(*parts)), ""
    if "--config" in words:
        place = words.index("--config")
        require(place + 1 < len(words), "--config needs a file: the complete experiment as JSON.")
        config = words[place + 1]
        del words[place : place + 2]
    fields, flag = flatten(to_json(RECIPES["seed"]())), ""
    for place, word in enumerate(words):
        if word.startswith("--"):
            flag = word
        elif flag == "--workers" and ":" in word:
            fewest, most = word.split(":", 1)
            words[place : place + 1] = [most, "--min-workers", fewest]
        elif "=" in word and word.partition("=")[0].replace("-", "_") in fields and flag != "--space.changes":
            words[place] = f"--{word}"
    return words, config


def read_config(path: str) -> Experiment:
    """The experiment in a JSON file, which may be under the key `experiment`, as in experiment.json and a checkpoint's card."""
    value, fix = filesystem.read_json(absolute(path, "config")), "give a JSON object, such as a run's experiment.json."
    require(isinstance(value, dict), f"--config {path} is not an experiment: {fix}")
    return from_json(value.get("experiment", value), origin=path)


def parse_line(kind: type, argv: Sequence[str], prog: str, description: str | None = None, **default: Any) -> Any:
    """Parse a command line with tyro into a dataclass; its boxed errors become a one-line UserError."""
    shown, errors = io.StringIO(), io.StringIO()  # plain text: on a terminal, tyro draws coloured boxes
    ask = partial(tyro.cli, kind, prog=prog, description=description, **default)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
            return ask(args=list(argv))
    except SystemExit as stop:
        if stop.code in (0, None):
            print(re.sub(r"\s*\(default:\s*(''|None)?\) *", "", shown.getvalue()), end="")
            raise
        # tyro keeps the choices in a set: they are sorted, so that a mistake always has the same message.
        text = re.sub(r"'None', |, 'None'", "", " ".join(errors.getvalue().split()))
        text = re.sub(r"(?<=one of \()[^)]+", lambda choices: ", ".join(sorted(choices[0].split(", "))), text)
        if unknown := re.search(r"Unrecognized options: ([^\s,]+)", text):
            with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
                ask(args=["--help"])
            raise UserError(f"{unknown[1]} is not a flag of this command{similar_flag(unknown[1], shown.getvalue())}") from None
        found = next((match.expand(ours) for theirs, ours in MISTAKES if (match := re.search(theirs, text))), "")
        raise UserError(found or f"The command line cannot be parsed ({text[:200]}); --help lists all flags.") from None


def similar_flag(wrong: str, help_text: str) -> str:
    """The end of the message about an unknown flag: those that share the most words with its last part, or one spelt alike."""

    def words(flag: str) -> list[str]:
        return [word.removesuffix("s") for word in re.split(r"[-._=]+", flag.strip("-"))]

    def likeness(flag: str) -> tuple[int, float]:
        last = wrong.rpartition(".")[2].strip("-")
        shared = len(set(words(last)) & set(words(flag)))
        return shared, difflib.SequenceMatcher(None, last, flag.rpartition(".")[2].strip("-")).ratio()

    found = {flag: likeness(flag) for flag in sorted(set(re.findall(r"--[a-z][\w.-]*", help_text)))}
    nearest, (shared, ratio) = max(found.items(), key=lambda item: item[1])
    if (shared, ratio) < (0, ALIKE):
        return "; --help lists all flags."
    # One shared word, such as the size of an image or of a batch, does not decide which flag was meant: suggest all.
    rivals = [flag for flag, each in found.items() if each[0] == shared > 0 and (each[1] == 1 or ratio < 1)]
    names = sorted(rivals or [nearest], key=found.get, reverse=True)[:MOST_SUGGESTIONS]
    return f": did you mean {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}?"


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
    """The experiment with absolute paths, and missing ones taken from the environment."""
    defaults = {"source": "HEARTSEG_SOURCE", "data": "HEARTSEG_DATA", "runs": "HEARTSEG_RUNS"}
    paths = {name: getattr(experiment, name) or os.environ.get(variable, "") for name, variable in defaults.items()}
    here = "" if JOB_CONFIG in os.environ else "runs"  # a submitted job's folder is a temporary copy
    paths |= {"runs": paths["runs"] or here, "out": experiment.out}
    return replace(experiment, **{name: absolute(path, name) for name, path in paths.items() if path})


def absolute(path: str, name: str) -> str:
    """The absolute path; raises UserError for a relative path in a submitted job, whose folder is an uploaded copy."""
    path = os.path.expanduser(path)  # a shell leaves --out=~/results as it is
    is_relative = not (filesystem.is_uri(path) or os.path.isabs(path))
    fix = "but a submitted job runs in a copy of the folder: give an absolute path."
    require(not (is_relative and JOB_CONFIG in os.environ), f"--{name} {path} is relative, {fix}")
    return filesystem.absolute(path)


def required_path(path: str, name: str, meaning: str) -> str:
    """The absolute path of a flag that a job needs; raises UserError if it is missing."""
    require(bool(path), f"--{name} is missing: give {meaning}.")
    return absolute(path, name)
