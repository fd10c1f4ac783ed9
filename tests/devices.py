"""The device of tests marked `gpu`: a CUDA device, or the simulated one where it was registered (simulated_device/)."""

import pytest
import torch

SIMULATED = "sim"
ACCELERATOR = SIMULATED if torch._C._get_privateuse1_backend_name() == SIMULATED else "cuda"
DEVICES = ["cpu", pytest.param(ACCELERATOR, marks=pytest.mark.gpu)]
