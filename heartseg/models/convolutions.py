"""Convolutions that compute the same as nn.Conv2d with less work, for the layers in which DeepLabv3 wastes the most.

The atrous rates of DeepLabv3's head (12, 24, 36) are meant for large images. At 256 x 256 and an output stride of 8, its
feature map is 32 x 32: at rate 36, eight of the nine taps see only padding; at rate 24, these eight see padding at three
quarters of their positions or more. Libraries multiply these zeros anyway: an eighth of ResNet-101's arithmetic.
"""

import torch
from torch import nn
from torch.nn.functional import conv2d, pad


class Conv2d(nn.Conv2d):
    """An nn.Conv2d with the same parameters and, up to rounding, the same results and gradients."""

    def _conv_forward(self, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _is_depthwise(self) and weight.dtype == torch.float32 and _slow_in_bf16(images):
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(images.float(), weight, bias).to(torch.bfloat16)
        if _is_dilated_depthwise(self) and images.ndim == 4 and images.device.type == "cpu" and torch.is_grad_enabled():
            return _by_phases(images, weight, bias, self.dilation[0])
        if _is_atrous(self):
            rate, grid = self.dilation[0], images.shape[-2:]
            if rate >= max(grid):
                return conv2d(images, weight[:, :, 1:2, 1:2], bias)
            # Many small products are faster than one large one in the backward pass on CPUs; GPUs were not measured.
            halved = max(grid) < 2 * rate < 2 * min(grid)
            if halved and images.ndim == 4 and torch.is_grad_enabled() and images.device.type != "cuda":
                return _by_blocks(images, weight, bias, rate)
        return super()._conv_forward(images, weight, bias)


def faster(module: nn.Module) -> None:
    """Replace a module's atrous and depthwise convolutions in place with the faster `Conv2d`; parameters stay the same."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and (_is_atrous(child) or _is_depthwise(child)):
            # On the meta device, so that no random numbers are drawn for unused weights.
            new = Conv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, child.dilation,
                child.groups, child.bias is not None, device="meta",
            )  # fmt: skip
            new.weight, new.bias = child.weight, child.bias
            setattr(module, name, new)
        else:
            faster(child)


def _slow_in_bf16(images: torch.Tensor) -> bool:
    """True if a depthwise convolution's gradients would use oneDNN's slow kernels, with three to ten times float32's time."""
    is_training = images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return is_training and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _is_depthwise(convolution: nn.Conv2d) -> bool:
    return convolution.groups == convolution.in_channels > 1


def _is_dilated_depthwise(convolution: nn.Conv2d) -> bool:
    """True for a square, dilated one whose output has its input's size."""
    size, rate = convolution.kernel_size[0], convolution.dilation[0]
    padding = rate * (size // 2)
    is_plain = _is_depthwise(convolution) and convolution.out_channels == convolution.in_channels
    return is_plain and rate > 1 and size % 2 == 1 and convolution.padding_mode == "zeros" and (
        (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
        == ((size, size), (1, 1), (padding, padding), (rate, rate))
    )  # fmt: skip


def _is_atrous(convolution: nn.Conv2d) -> bool:
    """True for a 3 x 3 convolution over all channels whose output has its input's size."""
    rate = convolution.dilation[0]
    return convolution.groups == 1 and rate > 1 and convolution.padding_mode == "zeros" and (
        (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
        == ((3, 3), (1, 1), (rate, rate), (rate, rate))
    )  # fmt: skip


def _by_blocks(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """A convolution whose rate exceeds half the grid, as products of nine blocks."""
    taps = weight.flatten(2).unbind(2)
    # Each axis is cut at `n - rate` and at `rate`. For each output block: the input blocks it sees, and through which of the
    # three taps. The outer blocks see themselves and each other; the middle one sees only itself, through the centre.
    seen = (((0, 1), (2, 2)), ((1, 1),), ((2, 1), (0, 0)))
    height, width = (n - rate for n in images.shape[-2:])
    rows = images.split([height, rate - height, height], dim=2)
    blocks = [row.split([width, rate - width, width], dim=3) for row in rows]

    def product(vertical: tuple, horizontal: tuple) -> torch.Tensor:
        stack = torch.cat([blocks[i][j] for i, _ in vertical for j, _ in horizontal], dim=1)
        kernel = torch.cat([taps[3 * u + v] for _, u in vertical for _, v in horizontal], dim=1)
        return conv2d(stack, kernel[:, :, None, None], bias)

    return torch.cat([torch.cat([product(vertical, horizontal) for horizontal in seen], dim=3) for vertical in seen], dim=2)


def _by_phases(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """A dilated depthwise convolution as an ordinary one of every `rate`-th row and column, whose gradients take a quarter of
    the time on CPUs: oneDNN has no fast kernel for the dilated one's."""
    count, channels, height, width = images.shape
    images = pad(images, (0, -width % rate, 0, -height % rate))
    rows, columns = images.shape[2] // rate, images.shape[3] // rate
    # In channels-last order, as the images are laid out, so that the result is too.
    phases = images.permute(0, 2, 3, 1).reshape(count, rows, rate, columns, rate, channels).permute(0, 2, 4, 1, 3, 5)
    phases = phases.reshape(count * rate**2, rows, columns, channels).permute(0, 3, 1, 2)
    phases = conv2d(phases, weight, bias, padding=weight.shape[-1] // 2, groups=channels)
    whole = phases.permute(0, 2, 3, 1).reshape(count, rate, rate, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
    return whole.reshape(count, rows * rate, columns * rate, channels).permute(0, 3, 1, 2)[:, :, :height, :width]
