"""Promises of the choice of a device: a GPU that cannot be used is an error, not days of training on the CPU."""

import pytest
import torch

from heartseg.errors import UserError
from heartseg.models import devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU cannot be used")


def test_a_gpu_that_pytorch_cannot_use_is_an_error_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.choose_device() == torch.device("cpu")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    with pytest.raises(UserError, match=r"^PyTorch cannot use this machine's GPU \(.+\): install .+ to use the CPU\.$"):
        devices.choose_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.choose_device() == torch.device("cpu")
