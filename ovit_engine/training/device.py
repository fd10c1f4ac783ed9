"""The device of a command line."""

import torch

from ovit_engine.distributed.launch import launched


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes a GPU if there is one. Each process of a machine gets its own GPU.

    Raises:
        ValueError: the device is not here, or there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}: write auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no GPU here")
    launch = launched()
    if device.type == "cuda" and launch.count > 1:
        gpus = torch.cuda.device_count()
        if launch.local >= gpus:
            raise ValueError(f"{gpus} GPUs for more processes: start {gpus} a machine (--nproc-per-node {gpus})")
        device = torch.device("cuda", launch.local)
        torch.cuda.set_device(device)
    return device
