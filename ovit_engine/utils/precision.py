"""Full float32 precision in the solver and in reference outputs, whatever the training script has set.

TensorFloat32 rounds inputs to ten bits; at the dampings used here that turned 237 of 256 inverse Fisher blocks to NaN.
Training scripts switch it on globally, for convolutions on a GPU PyTorch itself does, and what is called under autocast
would be cast to half precision.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Disable TF32, bfloat16 products, autocast and gradients; restore everything afterwards, also on errors."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        accelerator = torch.accelerator.current_accelerator()
        for device in ("cpu", *([] if accelerator is None else [accelerator.type])):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_highest_precision())
        yield


@contextmanager
def _highest_precision() -> Iterator[None]:
    """PyTorch has two interfaces for one setting, and reading the old one raises after the new one was used."""
    convolutions = torch.backends.cudnn.conv, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, *convolutions  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"  # untouched: the new interface was used
    torch.set_float32_matmul_precision("highest")
    for backend in convolutions:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
