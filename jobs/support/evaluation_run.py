"""Carries out an evaluation's plan: predicts and scores, in this process or on Ray, and writes the folder of the results.

Ray sends these functions to the workers by their name, so they stand in a module that every node can import.
"""

import dataclasses
import functools
import logging
import pickle
import time
from collections.abc import Iterator

import pandas
from tqdm import tqdm

from heartseg.errors import StorageError, UserError
from heartseg.evaluation import scoring
from heartseg.inference.postprocessing import clean
from heartseg.inference.segmenter import Ensemble, Segmenter, load_all
from heartseg.reporting.report import write_report
from jobs.support import command_line, ray_runtime
from jobs.support.evaluation_plan import EvaluationPlan, Options

# Patients that a worker gets at a time: 16 images, one or a few batches.
PATIENTS_PER_TASK = 4


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
    found: dict[int, tuple] = {}
    with tqdm(total=len(plan.patients), unit=" patients", disable=None) as bar:
        for index, scored in stream:
            found[index] = scored
            bar.update(len(tasks[index]))
    images, patients, missing = zip(*(found[index] for index in range(len(tasks))), strict=True)
    return sum(images, []), sum(patients, []), sum(missing, [])


class Predictor:
    """Patients to cases and masks; loads the model once in each process."""

    def __init__(self, plan: EvaluationPlan):
        self.plan = plan

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


def score_predicted(cases: list, masks: list, missing: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, of patients and of what is missing, from what `Predictor.predict` returns."""
    return *scoring.score_patients(cases, masks), missing


def score_here(plan: EvaluationPlan, tasks: list[list[str]]) -> Iterator[tuple[int, tuple]]:
    """Score task by task in this process."""
    predictor = Predictor(plan)
    for index, patients in enumerate(tasks):
        yield index, score_predicted(*predictor.predict(patients))


class PredictTask(Predictor):
    """A Predictor as Ray Data calls it: a batch is one task."""

    def __init__(self, plan: EvaluationPlan, tasks: list[list[str]], cores: int):
        import torch

        command_line.configure_logging()
        torch.set_num_threads(cores)
        super().__init__(plan)
        self.tasks = tasks

    def __call__(self, batch: dict) -> dict:
        index = int(batch["id"][0])
        try:
            predicted = self.predict(self.tasks[index])
        except (UserError, StorageError) as error:
            predicted = error  # returned as a value: if it were raised, Ray would wrap it in a traceback
        return {"index": [index], "predicted": [pickle.dumps(predicted)]}


def score_task(batch: dict) -> dict:
    """Score what an actor predicted, on a CPU, while the actor predicts the next patients."""
    predicted = pickle.loads(batch["predicted"][0])
    scored = predicted if isinstance(predicted, Exception) else score_predicted(*predicted)
    return {"index": batch["index"], "scored": [pickle.dumps(scored)]}


def score_on_ray(plan: EvaluationPlan, tasks: list[list[str]], workers: int) -> Iterator[tuple[int, tuple]]:
    """Predict on actors (with a GPU each if there are any) and score on CPUs, as a stream."""
    import ray

    ray_runtime.start_ray(workers)
    share = ray_runtime.worker_resources(workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that the progress bars are off
    # Without GPUs the actors' threads use every core: they reserve half of each, so that the scoring fits.
    actors = {"num_gpus": 1, "num_cpus": 1} if "GPU" in share else {"num_cpus": share["CPU"] / 2}
    stream = (
        ray.data.range(len(tasks), override_num_blocks=len(tasks))
        .map_batches(
            PredictTask,
            fn_constructor_args=(plan, tasks, int(share["CPU"])),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            **actors,
        )
        .map_batches(score_task, batch_size=1, num_cpus=0.5)
    )
    for row in stream.iter_rows():
        scored = pickle.loads(row["scored"])
        if isinstance(scored, Exception):
            raise scored
        yield row["index"], scored
