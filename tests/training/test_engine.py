"""Savings of memory and time change no result, ruined weights are never kept, and ranks evaluate one model."""

import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from heartseg.config.experiment import ModelConfig
from heartseg.config.training import AugmentConfig, ScheduleConfig
from heartseg.errors import UserError
from heartseg.metrics import segmentation
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity, Loader, check_shares, epoch_order, share, stream_order
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import distributed, engine, run_directory, worker
from heartseg.training.distributed import Ranks
from helpers.experiments import tiny_experiment
from jobs import train as train_job
from jobs.support import ray_training

ALONE = Ranks(0, 1, torch.device("cpu"))


def network(norm: type[nn.Module] = nn.GroupNorm) -> nn.Module:
    """A network of three layers that is the same at every call."""
    torch.manual_seed(3)
    middle = nn.GroupNorm(2, 8) if norm is nn.GroupNorm else norm(8)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), middle, nn.ReLU(), nn.Conv2d(8, 4, 1))


def with_train(**changes):
    return tiny_experiment(train=replace(tiny_experiment().train, **changes))


def with_average(decay: float):
    return tiny_experiment(optim=replace(tiny_experiment().optim, ema_decay=decay))


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, 1, 16, 16, generator=generator), torch.randint(4, (size, 16, 16), generator=generator).byte()


def started(experiment, ranks: Ranks, model: nn.Module) -> engine.TrainState:
    return engine.start(experiment, model, ranks, lambda model: distributed.wrap_model(model, ranks, experiment.train))


def train(experiment, ranks: Ranks = ALONE) -> tuple[engine.TrainState, list]:
    """Two updates on one global batch: the state, and each step's loss and predictions."""
    (images, masks), state = batch(experiment.train.batch_size), started(experiment, ranks, network())
    rows = share(experiment.train.batch_size, ranks.rank, ranks.world_size)
    state.wrapped.train()
    return state, [engine.train_step(experiment, state, images[rows], masks[rows], ranks) for _ in range(2)]


def loader(rank: int = 0, world_size: int = 1, size: int = 28) -> Loader:
    images, masks = batch(size)
    return Loader((images * 255).byte(), masks, rank, world_size)


def fit(experiment, ranks: Ranks = ALONE, groups=("train", "test"), ruin=None, ruin_after: int = 4, keep=None) -> list:
    """Each epoch's metrics, or the result of `keep`; `ruin` gets the state after an update of the first epoch."""
    state, found = started(experiment, ranks, network(nn.BatchNorm2d)), []

    def after_step(epoch: int, step: int, steps: int) -> None:
        if ruin and (epoch, step) == (1, ruin_after):
            ruin(state)

    def after_epoch(state: engine.TrainState, metrics: dict) -> None:
        assert {group["lr"] for group in state.optimizer.param_groups} == {metrics["lr"]}
        found.append(keep(state) if keep else metrics)

    loaders = dict.fromkeys(groups, loader(ranks.rank, ranks.world_size))
    engine.fit(experiment, state, loaders, Intensity(), ranks, after_epoch, after_step)
    return found


@pytest.mark.parametrize(("size", "parts"), [(12, 3), (7, 3), (7, 2)])
def test_an_update_in_parts_is_the_update_of_the_whole_batch(size, parts):
    check_shares(12, 2, accumulate=3)
    with pytest.raises(UserError, match="12 over 2 workers, each in 4 micro-batches.*--train.accumulate 3 or less"):
        check_shares(12, 2, accumulate=4)  # of which one would have one image
    whole, whole_steps = train(with_train(batch_size=size))
    split, split_steps = train(with_train(batch_size=size, accumulate=parts))
    torch.testing.assert_close(split.model.state_dict(), whole.model.state_dict(), rtol=1e-5, atol=1e-5)
    for one, other in zip(whole_steps, split_steps, strict=True):
        torch.testing.assert_close(one[0], other[0])
        assert one[1].shape == (size, 16, 16) and (one[1] == other[1]).float().mean() > 0.999


def set_first(tensor: torch.Tensor, value: float) -> None:
    tensor.data.view(-1)[0] = value


RUINS = {
    "a weight": lambda state: set_first(state.model[3].weight, float("nan")),
    "an average": lambda state: set_first(state.average.model[3].weight, float("inf")),
    "a running statistic": lambda state: set_first(state.model[1].running_var, float("inf")),
    # Finite, and too large to compute with: only the loss of an evaluated group shows it.
    "a large average": lambda state: state.average.model[3].weight.fill_(3e38),
}
CASES = [(name, groups, 4, 4) for name in list(RUINS)[:3] for groups in (("train",), ("train", "test"))]
CASES += [("a weight", ("train",), 2, 3), ("a large average", ("train", "test"), 4, 4)]


@pytest.mark.parametrize(("ruined", "groups", "after", "step"), CASES)
def test_an_update_that_ruins_the_weights_stops_the_run_with_its_epoch_step_and_rows(ruined, groups, after, step):
    with pytest.raises(engine.NonFiniteLoss) as caught:
        fit(tiny_experiment(), groups=groups, ruin=RUINS[ruined], ruin_after=after)
    rows = loader().batch_rows(7, tiny_experiment().train.seed, 0, step - 1)
    assert (caught.value.epoch, caught.value.step, caught.value.rows) == (1, step, rows)


def test_a_ruined_epochs_checkpoint_does_not_take_the_place_of_the_last_good_one(shards, tmp_path):
    base = tiny_experiment(data=shards, runs=str(tmp_path))
    run, models, updates = run_directory.open_run(base, open_shards(shards)), [], []

    def after_update(*of_optimizer) -> None:
        updates.append(1)
        if len(updates) == 6:  # the last of the second epoch's three
            set_first(models[0].network.classifier[-1].bias, float("nan"))

    with (
        register_optimizer_step_post_hook(after_update),
        pytest.raises(UserError, match=r"epoch 2, step 3 is not finite.*the checkpoint of the previous epoch is kept"),
    ):
        worker.train_rank(base, run, ALONE, lambda model: models.append(model) or model)
    kept = checkpoint.last(run.path)
    assert kept.epoch == 1 and all(value.isfinite().all() for value in kept.weights().values())
    worker.train_rank(base, run, ALONE, lambda model: model)
    assert [row["epoch"] for row in run_directory.read_record(run.path)] == [1, 2]


def _one_of_two(rank: int, store: str, folder: str, shards: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ranks = distributed.current(torch.device("cpu"))
    settings = {"plain": {}, "parts": {"accumulate": 3}, "bf16": {"compress_gradients": True}}
    kept = {name: train(with_train(batch_size=13, **one), ranks)[0].model.state_dict() for name, one in settings.items()}
    kept["travelled"] = 0  # how often ranks exchange gradients for one update in three parts

    def count(_, bucket):
        kept["travelled"] += 1
        (future := torch.futures.Future()).set_result(bucket.buffer())
        return future

    in_parts = with_train(batch_size=13, accumulate=3)
    state = started(in_parts, ranks, network())
    state.wrapped.register_comm_hook(None, count)
    engine.train_step(in_parts, state, *batch(6), ranks)
    kept["evaluated"], kept["heard"] = evaluated_models(ranks), distributed.from_main(f"of rank {rank}", ranks)
    try:
        fit(tiny_experiment(), ranks, groups=("train",), ruin=lambda state: rank and RUINS["a running statistic"](state))
    except engine.NonFiniteLoss as error:
        kept["stopped"] = error.epoch
    try:
        ray_training.open_on_every_rank(os.path.join(folder, "gone") if rank else folder, shards, ranks)
    except UserError as error:
        kept["unseen"] = str(error)
    torch.save(kept, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def evaluated_models(ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """The states that are scored after each epoch of a run without and of one with averaged weights."""
    kept = [fit(with_average(decay), ranks, keep=lambda s: checkpoint.snapshot(s.evaluated.state_dict())) for decay in (0, 0.9)]
    return kept[0] + kept[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shards) -> list[dict]:
    """The result of two processes over gloo: a batch of 13 divides neither between them nor into parts."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    filesystem.publish_json(os.path.join(folder, run_directory.DESCRIPTION), {})  # as if it were a run
    mp.spawn(_one_of_two, args=(os.path.join(folder, "store"), folder, shards), nprocs=2)
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]


def test_two_ranks_follow_one_and_gradients_travel_once_an_update_rounded_if_asked(two_ranks):
    alone, (first, second) = train(with_train(batch_size=13))[0].model.state_dict(), two_ranks
    for setting, tolerance in (("plain", 1e-6), ("parts", 1e-6), ("bf16", 1e-3)):
        for name, value in alone.items():
            torch.testing.assert_close(first[setting][name], value, rtol=0, atol=tolerance)
            assert torch.equal(first[setting][name], second[setting][name])
    assert [rank["travelled"] for rank in two_ranks] == [1, 1]
    assert not torch.equal(first["bf16"]["0.weight"], first["plain"]["0.weight"])


class Collectives(TorchDispatchMode):
    """The names of the collective operations that are called from Python or a module's forward pass."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("world_size", [8, 1024])
def test_an_update_exchanges_each_gradient_once_and_a_forward_pass_nothing_over_any_number_of_ranks(world_size):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)  # its collectives return at once
    try:
        ranks, sizes = Ranks(0, world_size, torch.device("cpu")), []
        experiment = with_train(batch_size=2 * world_size)
        state = started(experiment, ranks, network(nn.BatchNorm2d))

        def count(_, bucket):
            sizes.append(bucket.buffer().numel())
            (future := torch.futures.Future()).set_result(bucket.buffer())
            return future

        state.wrapped.register_comm_hook(None, count)
        state.wrapped.train()
        engine.train_step(experiment, state, *batch(2), ranks)
        assert sum(sizes) == sum(parameter.numel() for parameter in state.model.parameters())
        with Collectives() as forward:
            state.wrapped(batch(2)[0])
        with Collectives() as evaluation:
            distributed.share_buffers(state.evaluated, ranks)
            engine.evaluate(experiment, state.evaluated, loader(0, world_size), Intensity(), ranks)
        assert (forward.names, evaluation.names) == ([], ["c10d::broadcast_", "c10d::allreduce_"])
    finally:
        dist.destroy_process_group()


def test_ranks_evaluate_the_model_of_one_process_stop_together_and_all_report_storage_that_one_cannot_see(two_ranks):
    assert [rank["stopped"] for rank in two_ranks] == [1, 1] and {rank["heard"] for rank in two_ranks} == {"of rank 0"}
    (message,) = {rank["unseen"] for rank in two_ranks}
    assert message.startswith("Worker 1 on ") and message.endswith("Every node must see --runs and --data.")
    one, other, alone = *(rank["evaluated"] for rank in two_ranks), evaluated_models(ALONE)
    assert len(one) == len(other) == len(alone) == 4
    for mine, others, wanted in zip(one, other, alone, strict=True):
        assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
        # Batch normalisation sees a rank's images only, and so weights differ; statistics are of the same images.
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(mine[name], wanted[name], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_a_young_model_is_scored_and_kept_with_the_batch_statistics_of_its_own_weights(ema_decay, monkeypatch):
    images = loader().images.float() / 255

    def error(state: engine.TrainState) -> float:
        """The largest deviation of a channel's variance from that of the training images."""
        with torch.no_grad():
            wanted = state.evaluated[0](images).transpose(0, 1).flatten(1).var(dim=1)
        return (state.evaluated[1].running_var / wanted).log().abs().max().item()

    young = fit(with_average(ema_decay), keep=error)
    monkeypatch.setattr(engine, "YOUNG_STEPS", 3)  # an epoch has four
    lagging = fit(with_average(ema_decay), keep=error)
    assert max(young) < 0.1 < 1 < min(lagging)


def test_batch_statistics_of_few_images_are_shared_on_several_gpus_with_the_same_names_and_refused_on_cpus():
    gpus, cpus = (Ranks(0, 2, torch.device(kind)) for kind in ("cuda", "cpu"))
    config, share_statistics = (
        ModelConfig("mobilenet_v3_large", bn_momentum=0.03),
        partial(distributed.share_batch_statistics, images=7),
    )
    model, on = build_model(config), replace(config, sync_bn="on")
    names = list(model.state_dict())
    with pytest.raises(UserError, match="--model.sync-bn on requires GPUs"):
        share_statistics(model, on, cpus)
    assert share_statistics(model, config, cpus) is share_statistics(model, on, ALONE) is model
    assert share_statistics(model, replace(config, sync_bn="off"), gpus) is model
    assert share_statistics(model, config, gpus, images=8) is model
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    shared = share_statistics(model, config, gpus)
    norms = [m for m in shared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) and m.momentum == 0.03 for m in norms)
    assert list(shared.state_dict()) == names


@pytest.mark.slow
def test_a_compiled_run_has_the_names_and_nearly_the_numbers_of_another():
    eager, eager_steps = train(with_train(batch_size=4))
    compiled, steps = train(with_train(batch_size=4, compile="default"))
    assert compiled.wrapped is not compiled.model
    torch.testing.assert_close(compiled.state_dict()["model"], eager.state_dict()["model"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps[1][0], eager_steps[1][0], rtol=1e-4, atol=1e-4)


def test_equal_bits_are_prepared_before_the_first_matrix_product(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    engine.set_arithmetic(with_train(deterministic=False).train)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and torch.backends.cudnn.benchmark
    engine.set_arithmetic(with_train(deterministic=True).train)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("size", [1, 4, 32])
def test_scores_do_not_depend_on_the_evaluation_batch(size):
    model, rows = network(nn.BatchNorm2d), loader(size=10)
    three, other = (engine.evaluate(with_train(eval_batch_size=s), model, rows, Intensity(), ALONE) for s in (3, size))
    assert other == pytest.approx(three, rel=1e-6, nan_ok=True)


def test_counts_on_a_gpu_are_those_on_a_cpu_and_labels_those_of_argmax_also_among_equals():
    # The GPU's way runs here too; an image at native size is far below where float32 would round.
    prediction, target = batch(3)[1].long(), batch(4)[1][:3]
    assert torch.equal(segmentation._count_by_product(prediction, target), segmentation._count_by_cell(prediction, target))
    large = torch.full((1, 1200, 1600), 2, dtype=torch.uint8)
    assert segmentation._count_by_product(large, large)[0, 2, 2] == 1200 * 1600
    scores = torch.randint(3, (200, 4, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    labels = segmentation.predicted_labels(scores)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), scores.argmax(dim=1))


def test_a_profile_is_a_trace_of_three_steps(shards, tmp_path):
    options = train_job.Options(launcher="plain", profile=True)
    path = train_job.run(tiny_experiment(data=shards, runs=str(tmp_path)), options)
    events = filesystem.read_json(filesystem.join(path, "profile", "steps.json"))["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 3 and any("conv" in event.get("name", "") for event in events)


def test_the_largest_seed_draws():
    noisy = replace(with_train(seed=2**63 - 1, epochs=1), augment=AugmentConfig(noise=0.1))
    assert len(fit(noisy)) == 1
    assert sorted(stream_order([9, 9], 6, 2**63 - 1, 0).flatten().tolist()) == list(range(18))
    assert epoch_order(5, 2**40, 1).tolist() != epoch_order(5, 2**40, 2).tolist()


def test_the_rate_falls_evenly_over_all_steps_of_all_epochs_and_the_speed_is_images_by_seconds():
    began = time.perf_counter()
    found = fit(tiny_experiment(schedule=ScheduleConfig("polynomial", power=1.0)), groups=("train",))
    assert 0 < sum(metrics["seconds"] for metrics in found) <= time.perf_counter() - began
    # Of eight steps, the last ones of the two epochs are the fourth and the eighth.
    assert [metrics["lr"] for metrics in found] == pytest.approx([0.02 * 5 / 8, 0.02 * 1 / 8])
    assert [metrics["images_per_s"] * metrics["seconds"] for metrics in found] == pytest.approx([28, 28])


def test_compressed_gradients_change_nothing_in_a_single_process():
    plain, asked = (train(with_train(batch_size=4, compress_gradients=on))[0].model.state_dict() for on in (False, True))
    torch.testing.assert_close(asked, plain, rtol=0, atol=1e-6)


def test_batch_statistics_are_estimated_up_to_and_with_the_last_young_step(monkeypatch):
    monkeypatch.setattr(engine, "YOUNG_STEPS", 4)  # an epoch has four
    assert fit(with_average(0), keep=lambda state: state.evaluated[1].num_batches_tracked.item()) == [1, 5]
