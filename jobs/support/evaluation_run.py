"""Carries out an evaluation's plan: predicts and scores, in this process or on Ray, and writes the folder of the results.

Ray sends these functions to the workers by their name, so they stand in a module that every node can import.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import pandas
import torch
from tqdm import tqdm

from heartseg.errors import StorageError, UserError
from heartseg.evaluation import scoring
from heartseg.inference.segmenter import Ensemble, Segmenter, clean, load_all
from heartseg.reporting.report import write_report
from jobs.support import command_line, ray_runtime
from jobs.support.evaluation_plan import EvaluationPlan, Options

# Patients that a worker gets at a time: 16 images, one or a few batches.
PATIENTS_PER_TASK = 4
# Tasks of each actor that are predicted or scored at a time: a GPU is faster than many cores that score.
TASKS_AHEAD = 16


def score(plan: EvaluationPlan, options: Options) -> dict:
    """Score, write the plan's folder and return its summary; raises UserError if nothing can be scored."""
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
    scoring.write_results(plan.out, image_rows.drop(columns="mask"), patient_rows, summary)
    write_report(plan.out, plan.run)
    return summary


def collect(plan: EvaluationPlan, options: Options) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, of patients, and of what is missing, in the order of the patients."""
    tasks = [plan.patients[i : i + PATIENTS_PER_TASK] for i in range(0, len(plan.patients), PATIENTS_PER_TASK)]
    stream = score_here(plan, tasks) if options.launcher == "plain" else score_on_ray(plan, tasks, options.workers)
    rows: tuple[list[dict], list[dict], list[dict]] = [], [], []
    with tqdm(total=len(plan.patients), unit=" patients", disable=None) as bar:
        for patients, scored in zip(tasks, stream, strict=True):
            for found, more in zip(rows, scored, strict=True):
                found += more
            bar.update(len(patients))
    return rows


class Predictor:
    """Patients to cases and masks; loads the model once in each process."""

    def __init__(self, plan: EvaluationPlan, cores: int = 0):
        self.plan = plan
        if cores:  # an actor of Ray's, which would have one thread
            command_line.configure_logging()
            torch.set_num_threads(cores)

    @functools.cached_property
    def segmenter(self) -> Segmenter | Ensemble | None:
        """The model, or the models; None for masks of files."""
        return load_all(self.plan.predictor) if isinstance(self.plan.predictor, tuple) else None

    def predict(self, patients: list[str]) -> tuple[list, list, list[dict]]:
        """The patients' cases without their images, a mask for each, and what is missing."""
        cases, missing = self.plan.truth.cases(patients)
        if self.segmenter:
            masks, unpredicted = scoring.segment_cases(self.segmenter, cases, self.plan.post), []
        else:
            masks, unpredicted = self.plan.predictor.masks(cases)
            masks = [one and dataclasses.replace(one, mask=clean(one.mask, self.plan.post)) for one in masks]
        return [dataclasses.replace(case, image=None) for case in cases], masks, missing + unpredicted


def score_predicted(predicted: tuple[list, list, list[dict]]) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, of patients and of what is missing, from what `Predictor.predict` returned."""
    cases, masks, missing = predicted
    return *scoring.score_patients(cases, masks), missing


def score_here(plan: EvaluationPlan, tasks: list[list[str]]) -> Iterator[tuple]:
    """Score task by task in this process."""
    predictor = Predictor(plan)
    return (score_predicted(predictor.predict(patients)) for patients in tasks)


def score_on_ray(plan: EvaluationPlan, tasks: list[list[str]], workers: int) -> Iterator[tuple]:
    """Predict on actors (with a GPU each if there are any) and score on CPUs meanwhile; results in the tasks' order."""
    import ray
    from ray.util import ActorPool

    ray_runtime.start_ray(workers)
    share = ray_runtime.worker_resources(workers)
    # Without GPUs the actors' threads use every core: they reserve half of each, so that the scoring fits.
    resources = {"num_gpus": 1, "num_cpus": 1} if "GPU" in share else {"num_cpus": share["CPU"] / 2}
    tries = {"max_restarts": ray_runtime.MAX_TRIES, "max_task_retries": ray_runtime.MAX_TRIES}
    predictor, scorer = ray.remote(**resources, **tries)(Predictor), ray.remote(num_cpus=0.5)(score_predicted)
    actors = [predictor.remote(plan, int(share["CPU"])) for _ in range(workers)]
    pool = ActorPool(actors * TASKS_AHEAD)
    try:
        yield from pool.map(lambda actor, patients: scorer.remote(actor.predict.remote(patients)), tasks)
    except ray.exceptions.RayTaskError as error:
        cause = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise (cause if isinstance(cause, (UserError, StorageError)) else error) from None
