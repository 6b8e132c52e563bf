"""Scores on the native grid, clinical indices and the report, of a checkpoint or of anyone's masks.

`python jobs/evaluate.py --checkpoint RUN --data /data/shards`, `--checkpoint RUN --truth /data/CAMUS`, or
`--predictions /data/masks --truth /data/CAMUS`.
"""

import dataclasses
import functools
import logging
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas
from tqdm import tqdm

from heartseg.errors import UserError, require
from heartseg.evaluation import cross_validation, scoring
from heartseg.evaluation.scoring import write_results
from heartseg.inference.postprocessing import clean
from heartseg.inference.segmenter import Ensemble, Segmenter, load_all
from heartseg.reporting import text_tables
from heartseg.reporting.report import write_report
from heartseg.storage import filesystem
from jobs.support import command_line, ray_runtime
from jobs.support.evaluation_plan import Options, Plan, plan_checkpoint, plan_files

# Patients that are handed to a worker at a time: 16 images, one or a few batches.
PATIENTS_PER_TASK = 4


def run(options: Options) -> str:
    """Score; returns the folder with `images.parquet`, `patients.parquet`, `summary.json` and `report.html`."""
    if options.pool:
        others = (options.checkpoint, options.data, options.truth, options.predictions, options.ensemble)
        require(not any(others), "--pool takes finished evaluations and --out, and nothing else.")
        out = command_line.absolute(command_line.require(options.out, "--out", "a folder for the pooled scores"), "out")
        summary = cross_validation.pool([command_line.absolute(path, "pool") for path in options.pool], out)
        write_report(out)
        print(f"{told(summary)}\n{text_tables.summary_text(summary)}")
        return out
    plan = plan_files(options) if options.predictions else plan_checkpoint(options)
    finished = "" if options.overwrite else finished_text(plan)
    if finished:
        print(f"{plan.out} is complete.\n{finished}")
        return plan.out
    summary = score(plan, options)
    print(f"{told(summary)}\n{text_tables.summary_text(summary)}{missing_text(summary['missing'])}")
    return plan.out


def told(summary: dict) -> str:
    """What was scored."""
    return f"{summary['images']} images of {summary['patients']} patients ({summary['group']}), native grid"


def score(plan: Plan, options: Options) -> dict:
    """Score, write the plan's folder and return its summary; raises UserError where nothing can be scored."""
    started = time.perf_counter()
    images, patients, missing = collect(plan, options)
    if not images:
        raise UserError(
            f"None of the {len(plan.patients)} patients can be scored: {missing[0]['file']} {missing[0]['reason']}."
        )
    image_rows, patient_rows = pandas.DataFrame(images), pandas.DataFrame(patients)
    summary = scoring.summarise(image_rows, patient_rows, missing)
    summary |= plan.described | {"seconds": time.perf_counter() - started}
    scoring.write_examples(plan.out, image_rows, plan.truth)
    write_results(plan.out, image_rows.drop(columns="mask"), patient_rows, summary)
    write_report(plan.out, plan.run)
    return summary


def finished_text(plan: Plan) -> str:
    """The table of an evaluation that is there already, of the same checkpoint and data; empty where there is none."""
    path = filesystem.join(plan.out, "summary.json")
    if plan.run is None or not (filesystem.exists(path) and filesystem.exists(filesystem.join(plan.out, "report.html"))):
        return ""
    summary = filesystem.read_json(path)
    same = {key: summary.get(key) for key in plan.described} == plan.described
    return text_tables.summary_text(summary) if same else ""


def missing_text(missing: list[dict]) -> str:
    """The first stills that are missing, for a terminal."""
    shown = "".join(f"\n  {row['file']}: {row['reason']}" for row in missing[:10])
    more = f"\n  and {len(missing) - 10} more, in summary.json" if len(missing) > 10 else ""
    return f"\n{len(missing)} images are not scored:{shown}{more}" if missing else ""


def collect(plan: Plan, options: Options) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, of patients, and of what is missing, in the order of the patients."""
    tasks = [plan.patients[i : i + PATIENTS_PER_TASK] for i in range(0, len(plan.patients), PATIENTS_PER_TASK)]
    found: dict[int, tuple] = {}
    with tqdm(total=len(plan.patients), unit=" patients", disable=None) as bar:
        for index, scored in (score_here if options.launcher == "plain" else score_on_ray)(plan, tasks, options.workers):
            found[index] = scored
            bar.update(len(tasks[index]))
    images, patients, missing = zip(*(found[index] for index in range(len(tasks))), strict=True)
    return sum(images, []), sum(patients, []), sum(missing, [])


class Predict:
    """Patients to cases and masks; loads the model once in each process."""

    def __init__(self, plan: Plan):
        self.plan = plan

    @functools.cached_property
    def segmenter(self) -> Segmenter | Ensemble | None:
        """The model, or the models; None for masks of files."""
        paths = self.plan.predictor
        if not isinstance(paths, tuple):
            return None
        return load_all(paths)

    def __call__(self, patients: list[str]) -> tuple[list, list, list[dict]]:
        """The patients' cases without their images, a mask for each, and what is missing."""
        cases, missing = self.plan.truth.cases(patients)
        if self.segmenter:
            masks, unpredicted = scoring.segment_cases(self.segmenter, cases, self.plan.post), []
        else:
            masks, unpredicted = self.plan.predictor.masks(cases)
            masks = [one and dataclasses.replace(one, mask=clean(one.mask, self.plan.post)) for one in masks]
        return [dataclasses.replace(case, image=None) for case in cases], masks, missing + unpredicted


def score_here(plan: Plan, tasks: list[list[str]], workers: int) -> Iterator[tuple[int, tuple]]:
    """Score task by task in this process."""
    predictor = Predict(plan)
    for index, patients in enumerate(tasks):
        cases, masks, missing = predictor(patients)
        yield index, (*scoring.score_patients(cases, masks), missing)


class PredictTasks(Predict):
    """`Predict` as Ray Data calls it: a batch is one task."""

    def __init__(self, plan: Plan, tasks: list[list[str]], cores: int):
        import torch

        command_line.show_log()
        torch.set_num_threads(cores)
        super().__init__(plan)
        self.tasks = tasks

    def __call__(self, batch: dict) -> dict:
        index = int(batch["id"][0])
        try:
            predicted = super().__call__(self.tasks[index])
        except UserError as error:
            predicted = error  # it comes back as a value: raised, Ray would wrap it in a traceback
        return {"index": [index], "predicted": [pickle.dumps(predicted)]}


def score_task(batch: dict) -> dict:
    """Score what an actor predicted, on a CPU, while the actor is at the next patients."""
    predicted = pickle.loads(batch["predicted"][0])
    if not isinstance(predicted, UserError):
        cases, masks, missing = predicted
        predicted = (*scoring.score_patients(cases, masks), missing)
    return {"index": batch["index"], "scored": [pickle.dumps(predicted)]}


def score_on_ray(plan: Plan, tasks: list[list[str]], workers: int) -> Iterator[tuple[int, tuple]]:
    """Predict on actors (a GPU each where there are any) and score on CPUs, as a stream."""
    import ray

    ray_runtime.start_ray(workers)
    asked = ray_runtime.worker_resources(workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of the progress bars that are off
    # Without GPUs the actors' threads take every core: half of it is asked for, so that there is room for the scoring.
    actors = {"num_gpus": 1, "num_cpus": 1} if "GPU" in asked else {"num_cpus": asked["CPU"] / 2}
    stream = (
        ray.data.range(len(tasks), override_num_blocks=len(tasks))
        .map_batches(
            PredictTasks,
            fn_constructor_args=(plan, tasks, int(asked["CPU"])),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **actors,
        )
        .map_batches(score_task, batch_size=1, num_cpus=0.5)
    )
    for row in stream.iter_rows():
        scored = pickle.loads(row["scored"])
        if isinstance(scored, UserError):
            raise scored
        yield row["index"], scored


def job(argv: Sequence[str]) -> None:
    """The command line."""
    about = "Score a trained model, or anyone's masks, and write the report."
    out = run(command_line.parse_line(Options, argv, "python jobs/evaluate.py", about))
    print(filesystem.join(out, "report.html"))


if __name__ == "__main__":
    command_line.main(job)
