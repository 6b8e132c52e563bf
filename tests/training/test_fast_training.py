"""What makes training fit and go fast changes no result: parts of a batch, ranks, compression, compilation, batch sizes."""

import json
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from heartseg.config.experiment import ModelConfig
from heartseg.config.training import TrainConfig
from heartseg.errors import UserError
from heartseg.metrics import segmentation
from heartseg.metrics.segmentation import ScoreSums
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity, Loader, check_shares, share
from heartseg.training import distributed, engine
from heartseg.training.distributed import Ranks
from helpers.experiments import tiny_experiment
from jobs import train as train_job

ALONE = Ranks(0, 1, torch.device("cpu"))


def network(norm: type[nn.Module] = nn.GroupNorm) -> nn.Module:
    """A network of three layers that is the same at every call."""
    torch.manual_seed(3)
    middle = nn.GroupNorm(2, 8) if norm is nn.GroupNorm else norm(8)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), middle, nn.ReLU(), nn.Conv2d(8, 4, 1))


def with_train(**changes):
    base = tiny_experiment()
    return replace(base, train=replace(base.train, **changes))


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, 1, 16, 16, generator=generator), torch.randint(4, (size, 16, 16), generator=generator).byte()


def train(experiment, ranks: Ranks = ALONE, model: nn.Module | None = None, steps: int = 2) -> tuple[engine.TrainState, list]:
    """Some updates on one global batch: the state, and each step's loss and predictions."""
    images, masks = batch(experiment.train.batch_size)
    rows = share(experiment.train.batch_size, ranks.rank, ranks.world_size)

    def wrap(model):
        return distributed.wrap_model(model, ranks, experiment.train)

    state = engine.start(experiment, model or network(), ranks, wrap)
    state.wrapped.train()
    return state, [engine.train_step(experiment, state, images[rows], masks[rows], ranks) for _ in range(steps)]


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("size", "parts"), [(12, 3), (7, 3), (7, 2)])
def test_an_update_in_parts_is_the_update_of_the_whole_batch(size, parts):
    whole, whole_steps = train(with_train(batch_size=size))
    split, split_steps = train(with_train(batch_size=size, accumulate=parts))
    assert_same_weights(whole.model, split.model, 1e-5)
    for one, other in zip(whole_steps, split_steps, strict=True):
        torch.testing.assert_close(one[0], other[0])
        assert one[1].shape == (size, 16, 16) and (one[1] == other[1]).float().mean() > 0.999


def test_every_part_has_two_images():
    check_shares(12, 2, accumulate=3)
    with pytest.raises(UserError, match="12 over 2 workers, each in 4 parts.*--train.accumulate 3 or less"):
        check_shares(12, 2, accumulate=4)
    with pytest.raises(UserError, match="train.accumulate"):
        TrainConfig(epochs=1, batch_size=12, accumulate=7)
    with pytest.raises(UserError, match="train.accumulate needs train.compile"):
        TrainConfig(epochs=1, batch_size=12, accumulate=2, compile="reduce-overhead")


def _one_of_two(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ranks, kept = distributed.current(torch.device("cpu")), {}
    settings = {"plain": {}, "parts": {"accumulate": 3}, "bf16": {"compress_gradients": True}}
    for name, setting in settings.items():
        kept[name] = train(with_train(batch_size=13, **setting), ranks)[0].model.state_dict()
    # How often gradients travel for one update in three parts.
    experiment, travelled = with_train(batch_size=13, accumulate=3), []

    def wrap(model):
        wrapped = distributed.wrap_model(model, ranks, experiment.train)
        wrapped.register_comm_hook(None, lambda _, bucket: travelled.append(1) or _sent(bucket))
        return wrapped

    state = engine.start(experiment, network(), ranks, wrap)
    images, masks = batch(6)
    engine.train_step(experiment, state, images, masks, ranks)
    kept["travelled"] = torch.tensor(len(travelled))
    asked = replace(experiment, model=replace(experiment.model, norm="batch", sync_bn="on"))
    try:
        engine.start(asked, network(nn.BatchNorm2d), ranks, wrap)
    except UserError as error:
        kept["refused"] = str(error)
    torch.save(kept, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _sent(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What two processes over gloo have reached: a batch of 13 divides neither between them nor into parts."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(_one_of_two, args=(os.path.join(folder, "store"), folder), nprocs=2)
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize(("setting", "tolerance"), [("plain", 1e-6), ("parts", 1e-6), ("bf16", 1e-3)])
def test_two_ranks_follow_one_with_parts_and_with_compressed_gradients(two_ranks, setting, tolerance):
    alone = train(with_train(batch_size=13))[0].model.state_dict()
    for rank in two_ranks:
        for name, value in rank[setting].items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=tolerance)
    assert all(torch.equal(two_ranks[0][setting][name], two_ranks[1][setting][name]) for name in alone)


def test_compressed_gradients_are_not_the_exact_ones(two_ranks):
    assert not torch.equal(two_ranks[0]["bf16"]["0.weight"], two_ranks[0]["plain"]["0.weight"])


def test_gradients_travel_once_an_update(two_ranks):
    assert [rank["travelled"].item() for rank in two_ranks] == [1, 1]


def test_shared_batch_statistics_are_refused_on_cpus_and_left_alone_where_nothing_is_asked(two_ranks):
    assert all("--model.sync-bn on needs GPUs" in rank["refused"] for rank in two_ranks)
    model, cpus = network(nn.BatchNorm2d), Ranks(0, 2, torch.device("cpu"))
    assert distributed.share_batch_statistics(model, ModelConfig("resnet50"), cpus) is model
    assert distributed.share_batch_statistics(model, ModelConfig("resnet50", sync_bn="on"), ALONE) is model


def test_on_several_gpus_batch_statistics_are_shared_and_names_stay():
    gpus, config = Ranks(0, 2, torch.device("cuda", 0)), ModelConfig("mobilenet_v3_large", bn_momentum=0.03)
    model = build_model(config)
    names = list(model.state_dict())
    shared = distributed.share_batch_statistics(model, config, gpus)
    norms = [m for m in shared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) and m.momentum == 0.03 for m in norms)
    assert list(shared.state_dict()) == names
    off = build_model(config)
    assert distributed.share_batch_statistics(off, replace(config, sync_bn="off"), gpus) is off
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in off.modules())


def test_a_static_graph_is_taken_only_where_it_can_be():
    # Verified with torch 2.15: static_graph and no_sync end in an internal assertion.
    static = {with_: distributed.ddp_options(with_train(**dict([with_])).train)["static_graph"] for with_ in
              [("accumulate", 1), ("accumulate", 2), ("compile", "default")]}  # fmt: skip
    assert list(static.values()) == [True, False, False]


@pytest.mark.slow
def test_a_compiled_run_has_the_names_and_nearly_the_numbers_of_another():
    eager, eager_steps = train(with_train(batch_size=4))
    compiled, steps = train(with_train(batch_size=4, compile="default"))
    assert compiled.wrapped is not compiled.model
    assert list(compiled.state_dict()["model"]) == list(eager.state_dict()["model"])
    assert_same_weights(eager.model, compiled.model, 1e-4)
    torch.testing.assert_close(steps[1][0], eager_steps[1][0], rtol=1e-4, atol=1e-4)


def test_equal_bits_are_prepared_before_the_first_matrix_product(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    engine.set_arithmetic(with_train(deterministic=False).train)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and torch.backends.cudnn.benchmark
    engine.set_arithmetic(with_train(deterministic=True).train)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("size", [1, 4, 32])
def test_scores_do_not_depend_on_the_evaluation_batch(size):
    images, masks = batch(10)
    loader = Loader((images * 255).byte(), masks, 0, 1)
    found = [
        engine.evaluate(with_train(eval_batch_size=s), network(nn.BatchNorm2d), loader, Intensity(), ALONE) for s in (3, size)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-6, nan_ok=True)


def test_counts_on_a_gpu_are_those_on_a_cpu():
    # The GPU's way runs here too; an image at native size is far below where float32 would round.
    prediction, target = batch(3)[1].long(), batch(4)[1][:3]
    assert torch.equal(segmentation._count_by_product(prediction, target), segmentation._count_by_cell(prediction, target))
    large = torch.full((1, 1200, 1600), 2, dtype=torch.uint8)
    assert segmentation._count_by_product(large, large)[0, 2, 2] == 1200 * 1600


def test_predicted_labels_are_those_of_argmax_also_among_equals():
    scores = torch.randint(3, (200, 4, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    labels = segmentation.predicted_labels(scores)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), scores.argmax(dim=1))


def test_sums_that_were_looked_at_go_on():
    labels, sums = torch.ones(2, 3, 3, dtype=torch.uint8), ScoreSums(torch.device("cpu"))
    sums.add(torch.tensor(1.0), labels, labels)
    assert sums.sums[1, 0] == 2
    sums.add(torch.tensor(3.0), labels, 2 * labels)
    assert sums.means()["loss"] == 2.0 and sums.means()["accuracy"] == 0.5


def test_a_profile_is_a_trace_of_three_steps(shards, tmp_path):
    options = train_job.Options(launcher="plain", profile=True)
    path = train_job.run(tiny_experiment(data=shards, runs=str(tmp_path)), options)
    with open(os.path.join(path, "profile", "steps.json")) as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 3 and any("conv" in event.get("name", "") for event in events)
