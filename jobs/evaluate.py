"""Scores on the native grid, clinical indices and the report: `python jobs/evaluate.py --checkpoint RUN --data /data/shards`.

Also `--checkpoint RUN --truth /data/CAMUS`, or `--predictions /data/masks --truth /data/CAMUS` for masks from elsewhere.
"""

import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.config.experiment import PredictConfig
from heartseg.errors import require
from heartseg.evaluation import cross_validation
from heartseg.evaluation.scoring import PAGE, SUMMARY
from heartseg.reporting import text_tables
from heartseg.reporting.report import write_report
from heartseg.storage import filesystem
from jobs.support import command_line
from jobs.support.command_line import counted
from jobs.support.evaluation import Options, plan_checkpoint, plan_files, read_complete, score


def run(options: Options) -> str:
    """Score, and return the folder of `images.parquet`, `patients.parquet`, `summary.json` and `report.html`."""
    if options.pool:
        return pool(options)
    without = {"pattern": "it applies only to --predictions"}
    if options.predictions:
        without = {"which": "--predictions are finished masks", "overwrite": "--predictions are always scored again"}
    command_line.refuse_unused(Options(), options, without)
    plan = plan_files(options) if options.predictions else plan_checkpoint(options)
    is_new = options.overwrite or plan.run is None
    summary = None if is_new else read_complete(plan.out, plan.described)
    if summary:
        print(f"{plan.out} is complete.")
    print(summary_text(summary or score(plan, options)))
    return plan.out


def pool(options: Options) -> str:
    """Combine finished evaluations into one; returns its folder."""
    only = "--pool takes only finished evaluations and --out"
    others = {one.name for one in fields(Options)} - {"pool", "out", "launcher", "post"}
    command_line.refuse_unused(Options(), options, dict.fromkeys(others, only))
    unused = "--tta, --largest-component and --fill-holes have no effect here"
    require(options.post == PredictConfig(), f"{unused}: {only}. Leave them out.")
    out = command_line.required_path(options.out, "out", "a folder for the pooled scores")
    summary = cross_validation.pool([command_line.absolute(path, "pool") for path in options.pool], out)
    write_report(out)
    print(summary_text(summary))
    return out


def summary_text(summary: dict) -> str:
    """What was scored, the tables, and the first images that could not be scored."""
    images, patients = counted(summary["images"], "image"), counted(summary["patients"], "patient")
    lines = [f"{images} of {patients} ({summary['group']}), native grid"]
    if summary["group"] == "train":
        lines.append("The model was trained on these patients: for scores on new ones, use --group test or val.")
    lines.append(text_tables.summary_text(summary))
    missing, shown = summary["missing"], 10
    lines += [f"{counted(len(missing), 'image')} not scored:"] * bool(missing)
    lines += [f"  {row['file']}: {row['reason']}" for row in missing[:shown]]
    lines += [f"  and {len(missing) - shown} more, in {SUMMARY}"] * (len(missing) > shown)
    return "\n".join(lines)


def job(argv: list[str]) -> None:
    about = "Score a trained model, or masks from any other program, and write the report."
    out = run(command_line.parse_line(Options, argv, "python jobs/evaluate.py", about))
    print(filesystem.join(out, PAGE))


if __name__ == "__main__":
    command_line.main(job)
