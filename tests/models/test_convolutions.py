"""Promises of the faster convolutions: nn.Conv2d's results and gradients, its parameters, and less work."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from heartseg.config.experiment import ModelConfig
from heartseg.models import convolutions
from heartseg.models.deeplabv3 import build_model


def faster(plain: nn.Conv2d) -> nn.Conv2d:
    ours = nn.Sequential(copy.deepcopy(plain))
    convolutions.faster(ours)
    assert isinstance(ours[0], convolutions.Conv2d)
    return ours[0]


def pair(rate: int, bias: bool = False, depthwise: bool = False) -> tuple[nn.Conv2d, nn.Conv2d]:
    outputs, groups = (6, 6) if depthwise else (5, 1)
    plain = nn.Conv2d(6, outputs, 3, padding=rate, dilation=rate, groups=groups, bias=bias)
    return plain, faster(plain)


def results(convolution: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input, the weight and the bias."""
    images = images.clone().requires_grad_()
    output = convolution(images)
    output.square().sum().backward()
    return [output.detach(), images.grad, *(parameter.grad for parameter in convolution.parameters())]


SIDES, YES_OR_NO = st.integers(1, 40), st.booleans()


@given(rate=st.integers(2, 40), height=SIDES, width=SIDES, bias=YES_OR_NO, depthwise=YES_OR_NO, last=YES_OR_NO)
def test_every_rate_on_every_grid_gives_the_results_and_gradients_of_pytorch(rate, height, width, bias, depthwise, last):
    layout = torch.channels_last if last else torch.contiguous_format
    images = torch.randn(2, 6, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(rate))
    both = pair(rate, bias, depthwise)
    plain, ours = (results(each.double(), images.contiguous(memory_format=layout)) for each in both)
    torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [17, 20, 31, 32, 36])
def test_taps_that_see_padding_only_are_not_computed(rate):
    operations, inside = [], 1 if rate >= 32 else 1 + 2 * (32 - rate) / 32
    for convolution in pair(rate):
        with FlopCounterMode(display=False) as counter:
            convolution(torch.randn(1, 6, 32, 32))
        operations.append(counter.get_total_flops())
    assert operations[1] == operations[0] / 9 * inside**2


@pytest.mark.parametrize("kernel,stride,rate", [(3, 2, 1), (5, 1, 2)])
def test_depthwise_gradients_under_bf16_are_at_least_as_near_to_float32_as_pytorch_s(kernel, stride, rate):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, kernel, stride, rate * (kernel // 2), rate, groups=16, bias=False)
    ours, images = faster(plain), torch.randn(4, 16, 12, 12)
    exact = results(plain, images)
    plain.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        theirs, found = results(plain, images), results(ours, images)
    assert found[0].dtype == theirs[0].dtype == torch.bfloat16
    for truth, their, our in zip(exact, theirs, found, strict=True):
        assert (our.float() - truth).norm() <= 1.001 * (their.float() - truth).norm()
        torch.testing.assert_close(our.float(), truth, rtol=0.02, atol=0.02 * float(truth.abs().max()))


@pytest.mark.parametrize("backbone", ["mobilenet_v3_large", "resnet50"])
def test_a_network_keeps_its_parameters_and_its_logits(backbone):
    networks = []
    for own in (True, False):
        torch.manual_seed(3)
        networks.append(build_model(ModelConfig(backbone=backbone), own).eval())
        assert any(isinstance(module, convolutions.Conv2d) for module in networks[-1].modules()) == own
    ours, plain = networks
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    images = torch.randn(2, 1, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-5)


def test_an_exported_convolution_has_the_form_for_inference():
    convolution, images = pair(12)[1], torch.zeros(2, 6, 16, 16)
    with torch.no_grad():
        graph = torch.export.export(convolution, (images,)).graph
    assert not any("split" in str(node.target) for node in graph.nodes)
    assert any("split" in str(node.target) for node in torch.export.export(convolution, (images,)).graph.nodes)
