"""The seed recipe at its real size, read from shards: batches in, four maps out."""

import torch

from heartseg.config.recipes import seed
from heartseg.models import deeplabv3
from heartseg.shards.loader import Intensity, Loader
from heartseg.shards.reader import load_groups, open_shards
from heartseg.training.losses import one_hot
from helpers.experiments import tiny_experiment
from jobs import preprocess


def test_the_seeds_network_takes_its_batch_and_returns_four_maps(phantom, tmp_path):
    recipe, out = seed(), str(tmp_path)
    preprocess.run(tiny_experiment(source=phantom, out=out, image=recipe.image), preprocess.Options(launcher="plain"))
    frames = load_groups(open_shards(out), ["train"])["train"]
    loader = Loader.of(frames, rank=0, world_size=1, device=torch.device("cpu"))
    images, masks = next(loader.training_batches(recipe.train.batch_size, recipe.train.seed, epoch=0))
    assert images.shape == (12, 1, 256, 256) and images.min() >= 0 and images.max() <= 1
    assert one_hot(masks).shape == (12, 4, 256, 256)
    network = deeplabv3.build_model(recipe.model).to(memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        logits = deeplabv3.forward(recipe.train, network, Intensity().apply(images[:1]))
        assert logits.shape == (1, 4, 256, 256) and logits.isfinite().all()
        assert network.to("meta")(images.to("meta")).shape == (12, 4, 256, 256)
    # ResNet-101 has 33 bottlenecks of three convolutions, a stem and four shortcuts.
    backbone = network.network.backbone
    assert sum(isinstance(m, torch.nn.Conv2d) for m in backbone.modules()) == 33 * 3 + 1 + 4
