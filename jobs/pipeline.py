"""Everything in order, skipping what is done: `python jobs/pipeline.py quick --source /data/CAMUS --workers 2`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg import storage
from heartseg.config import Experiment
from heartseg.model import check_installation
from jobs import evaluate, preprocess, runtime, train


@dataclass(frozen=True)
class Options:
    """How to run the stages."""

    frames: Literal["stills", "sequence"] = "stills"
    """Train on the ED and ES images, or on every frame of the half sequences."""
    fresh: bool = False
    """Train a new run where the same command would resume or reuse one."""


def run(experiment: Experiment, options: Options) -> str:
    """Preprocess, train, evaluate; returns the path of the report."""
    check_installation()
    out = experiment.out or runtime.absolute("results", "out")
    shards = storage.join(out, shards_name(experiment, options))
    print("1/3 preprocess")
    preprocess.run(replace(experiment, out=shards), preprocess.Options(frames=options.frames))
    print("2/3 train")
    run_path = train.run(replace(experiment, data=shards, runs=storage.join(out, "runs")), train.Options(fresh=options.fresh))
    print("3/3 evaluate")
    evaluation = evaluate.run(evaluate.Options(checkpoint=run_path, data=shards, workers=experiment.workers))
    return storage.join(evaluation, "report.html")


def shards_name(experiment: Experiment, options: Options) -> str:
    """A folder for each grid, kind of frames and division, as `shards-128x128-official`."""
    image, split = experiment.image, experiment.split
    fold = f"-{split.fold + 1}of{split.folds}" if split.kind == "kfold" else ""
    sequence = "-sequence" if options.frames == "sequence" else ""
    return f"shards-{image.height}x{image.width}{sequence}-{split.kind}{fold}"


def job(argv: Sequence[str]) -> None:
    """The command line."""
    experiment, options = runtime.parse(
        Options(),
        argv,
        "pipeline.py",
        "Preprocess, train and evaluate, skipping what is done. --out: results by default.",
    )
    print(run(experiment, options))


if __name__ == "__main__":
    runtime.main(job)
