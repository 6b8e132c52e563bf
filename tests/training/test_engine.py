"""An epoch's end: nothing is kept of weights that its last update has ruined, and ranks evaluate one model."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from heartseg.config.experiment import from_json, to_json
from heartseg.errors import UserError
from heartseg.models import checkpoint
from heartseg.shards.loader import Intensity, Loader, epoch_order
from heartseg.shards.reader import open_shards
from heartseg.shards.streaming_loader import stream_order
from heartseg.training import distributed, engine, run_directory, worker
from heartseg.training.distributed import Ranks
from helpers.experiments import tiny_experiment

ALONE = Ranks(0, 1, torch.device("cpu"))


def network() -> nn.Module:
    """Three layers with batch statistics, the same at every call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def loader(rank: int = 0, world_size: int = 1) -> Loader:
    """28 images, four batches of the tiny experiment's."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (28, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return Loader(images, (images[:, 0] // 64).byte(), rank, world_size)


def fit(experiment, ranks: Ranks = ALONE, groups=("train", "test"), ruin=lambda state: None) -> list[dict]:
    """The metrics of each epoch; `ruin` is called with the state after the first one's last update."""
    rows = loader(ranks.rank, ranks.world_size)
    wrap = lambda model: distributed.wrap_model(model, ranks, experiment.train)  # noqa: E731
    state, found = engine.start(experiment, network(), ranks, wrap), []

    def after_step(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == (1, steps):
            ruin(state)

    engine.fit(
        experiment, state, dict.fromkeys(groups, rows), Intensity(), ranks, lambda _, metrics: found.append(metrics), after_step
    )
    return found


def set_first(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] = value


RUINS = {
    "a weight": lambda state: set_first(state.model[3].weight, float("nan")),
    "an average": lambda state: set_first(state.average.model[3].weight, float("inf")),
    "a running statistic": lambda state: set_first(state.model[1].running_var, float("inf")),
}


@pytest.mark.parametrize("groups", [("train",), ("train", "test")])
@pytest.mark.parametrize("ruined", RUINS)
def test_an_epoch_whose_last_update_ruins_the_weights_is_not_handed_on(ruined, groups):
    with pytest.raises(engine.NonFiniteLoss) as caught:
        fit(tiny_experiment(), groups=groups, ruin=RUINS[ruined])
    rows = loader().batch_rows(7, tiny_experiment().train.seed, 0, 3)
    assert (caught.value.epoch, caught.value.step, caught.value.rows) == (1, 4, rows)


def test_weights_that_are_finite_and_too_large_to_compute_with_are_seen_in_an_evaluated_groups_loss():
    def enlarge(state):
        with torch.no_grad():
            state.average.model[3].weight.fill_(3e38)

    with pytest.raises(engine.NonFiniteLoss):
        fit(tiny_experiment(), ruin=enlarge)


def test_a_ruined_epochs_checkpoint_does_not_take_the_place_of_the_last_good_one(shards, tmp_path):
    base = tiny_experiment(data=shards, runs=str(tmp_path))
    base = replace(base, train=replace(base.train, epochs=3))
    run, models, updates = run_directory.open_run(base, open_shards(shards)), [], []

    def after_update(*of_optimizer) -> None:
        updates.append(1)
        if len(updates) == 6:  # the last of the second epoch's three
            set_first(models[0].network.classifier[-1].bias, float("nan"))

    hook = register_optimizer_step_post_hook(after_update)
    try:
        with pytest.raises(UserError, match=r"epoch 2, step 3 is not finite.*the checkpoint of the epoch before is kept"):
            worker.train_rank(base, run, ALONE, lambda model: models.append(model) or model)
    finally:
        hook.remove()
    kept = checkpoint.last(run.path)
    assert kept.epoch == 1 and all(value.isfinite().all() for value in kept.weights().values())
    worker.train_rank(base, run, ALONE, lambda model: model)
    assert [row["epoch"] for row in run_directory.read_record(run.path)] == [1, 2, 3]


def _one_of_two(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    ranks, seen = distributed.current(torch.device("cpu")), []
    whole = engine.evaluate

    def evaluate(experiment, model, *others):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return whole(experiment, model, *others)

    engine.evaluate = evaluate
    for ema_decay in (0.0, 0.9):
        base = tiny_experiment()
        fit(replace(base, optim=replace(base.optim, ema_decay=ema_decay)), ranks)
    try:
        fit(tiny_experiment(), ranks, groups=("train",), ruin=lambda state: rank and RUINS["a running statistic"](state))
    except engine.NonFiniteLoss as error:
        seen.append({"epoch": torch.tensor(error.epoch)})
    torch.save(seen, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_evaluate_one_model_and_stop_together(tmp_path):
    mp.spawn(_one_of_two, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(one) == len(other) == 5
    for mine, others in zip(one, other, strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, others[name]), name


def test_a_large_seed_draws_and_a_negative_one_is_refused():
    base = tiny_experiment()
    noisy = replace(base, augment=replace(base.augment, noise=0.1), train=replace(base.train, seed=2**63 - 1, epochs=1))
    assert len(fit(noisy)) == 1
    assert sorted(stream_order([9, 9], 6, 2**63 - 1, 0).flatten().tolist()) == list(range(18))
    assert epoch_order(5, 2**40, 1).tolist() != epoch_order(5, 2**40, 2).tolist()
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match="train.seed must be from 0"):
            from_json(to_json(base) | {"train": to_json(base.train) | {"seed": seed}})
