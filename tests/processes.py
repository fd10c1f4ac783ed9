"""Processes that tests start: forked from one that has imported what takes seconds, and in which nothing ever ran."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_IMPORTED = [
    "pytest",
    "sklearn.datasets",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "ovit_engine.cli.train",
    "ovit_engine.engine",
    "ovit_engine.training.api",
    "ovit_engine.modifiers",
]


def train_together(work: Callable[..., object], *arguments: Any, ranks: int = 2) -> None:
    """Run `work(rank, *arguments)` in processes of its own; the first error of one ends all and is raised."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="forkserver")  # type: ignore[no-untyped-call]


def started(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process that runs `work(*arguments)`."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    process.start()
    return process
