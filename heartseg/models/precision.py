"""Whether a network computes in bf16 or float32: on CPUs the faster one, as measured, since bf16 can be slower there."""

import functools
import time

import torch
from torch.nn.functional import conv2d

ROUNDS = 5


def fastest(device: torch.device) -> str:
    """`bf16` or `fp32`, whichever this process computes faster in; on a GPU, bf16 if its hardware supports it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and cpu_rates()["bf16"] > cpu_rates()["fp32"] else "fp32"


def describe_rates() -> str:
    """The rates that the choice on a CPU rests on, such as `fp32 128, bf16 489 GFLOP/s per core`."""
    return ", ".join(f"{name} {rate:.0f}" for name, rate in cpu_rates().items()) + " GFLOP/s per core"


@functools.cache
def cpu_rates() -> dict[str, float]:
    """GFLOP/s of one core in float32 and bf16: a 3 x 3 convolution and a product over channels, forward and backward.

    Each is the best of a few alternating rounds, in the thread's own CPU time: a busy machine must not change the choice.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    side, channels, outputs = 32, 128, 512
    seconds = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.inference_mode(False), torch.enable_grad():
        images = torch.ones(2, channels, side, side).contiguous(memory_format=torch.channels_last)
        kernels = [torch.ones(channels, channels, 3, 3), torch.ones(outputs, channels, 1, 1)]
        kernels = [kernel.contiguous(memory_format=torch.channels_last).requires_grad_() for kernel in kernels]
        images.requires_grad_()
        for name in [*seconds] * ROUNDS:
            started = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                conv2d(conv2d(images, kernels[0], padding=1), kernels[1]).sum().backward()
            seconds[name] = min(seconds[name], time.thread_time() - started)
    torch.set_num_threads(threads)
    products = 2 * side**2 * channels * (9 * channels + outputs)
    return {name: 3 * 2 * products / 1e9 / least for name, least in seconds.items()}
