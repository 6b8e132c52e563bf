"""Promises of the choice of a device: a GPU that cannot be used is an error, not days of training on the CPU."""

import pytest
import torch

from heartseg.errors import UserError
from heartseg.models import devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU cannot be used")


def test_a_gpu_that_pytorch_cannot_use_is_an_error_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.choose_device(3) == torch.device("cpu")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    with pytest.raises(UserError, match=r"^PyTorch cannot use this machine's GPU \(.+\): install .+ to use the CPU\.$"):
        devices.choose_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.choose_device() == torch.device("cpu")


def test_each_process_has_a_gpu_of_its_own_or_none_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose_device(1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"^Process 3 has no GPU, since this machine shows only 2: .*--nproc-per-node 2"):
        devices.choose_device(2)
