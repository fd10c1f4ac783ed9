"""oViT against a plain rank-1 implementation: CPU seconds on one thread, peak extra memory, agreement of masks.

    python benchmarks/pruning_solver.py [--rounds 2] [--weights 196608] [--block 192] [--gradients 256]

Both run by turns in one process, which measures CPU time; each runs once more in a process of its own, which measures
the peak of resident memory above what was there before the call. Goals: at least 10 times fewer CPU seconds, at most
1.2 copies of numel * block floats. A goal that is missed is printed, not raised.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import rank1_reference
import torch
from torch import Tensor

from ovit_engine.pruning import prune_tensors

SPARSITY, DAMP = 0.75, 1e-8
SPEED_GOAL, MEMORY_GOAL = 10.0, 1.2


def make_input(numel: int, block: int, count: int) -> tuple[Tensor, Tensor]:
    """A weight [numel / block, block] and correlated gradients of the size real ones have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(numel // block, block, generator=generator) * 0.05
    mixing = torch.randn(block, block, generator=generator) / block**0.5
    gradients = torch.randn(count, *weight.shape, generator=generator) @ mixing * 1e-2
    return weight, gradients


def run_ours(weight: Tensor, gradients: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mask and weights from the solver."""
    masks, weights = prune_tensors([weight], [gradients], sparsity=SPARSITY, block=block, damp=DAMP)
    return masks[0], weights[0]


def run_reference(weight: Tensor, gradients: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mask and weights from the yardstick."""
    return rank1_reference.prune(weight, gradients, sparsity=SPARSITY, block=block, damp=DAMP)


CONTENDERS = {"ours": run_ours, "reference": run_reference}


def peak_bytes(name: str, numel: int, block: int, count: int) -> int:
    """Peak resident memory of one call above the level before it, in this process (Linux)."""
    weight, gradients = make_input(numel, block, count)
    run = functools.partial(CONTENDERS[name], block=block)
    run(weight[:2], gradients[:2, :2])  # libraries and their buffers are loaded on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run(weight, gradients)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def cpu_seconds(weight: Tensor, gradients: Tensor, block: int, rounds: int) -> tuple[dict[str, float], float]:
    """Least CPU seconds of each contender over the rounds, and the share of equal mask entries."""
    best = dict.fromkeys(CONTENDERS, float("inf"))
    masks: dict[str, Tensor] = {}
    for number in range(rounds):
        for name, run in CONTENDERS.items():
            start = time.process_time()
            masks[name], _ = run(weight, gradients, block)
            seconds = time.process_time() - start
            best[name] = min(best[name], seconds)
            print(f"round {number + 1}  {name:<10} {seconds:7.2f} CPU s", flush=True)
    return best, float((masks["ours"] == masks["reference"]).double().mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=196_608)
    parser.add_argument("--block", type=int, default=192)
    parser.add_argument("--gradients", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = (args.weights, args.block, args.gradients)
    torch.set_num_threads(1)
    if args.peak_of:
        print(json.dumps(peak_bytes(args.peak_of, *size)))
        return
    copy = args.weights * args.block * 4
    print(
        f"{args.weights} weights, block {args.block}, {args.gradients} gradients, torch {torch.__version__}, 1 thread"
    )
    seconds, agreement = cpu_seconds(*make_input(*size), args.block, args.rounds)
    copies = {}
    for name in CONTENDERS:
        command = [sys.executable, *sys.argv, "--peak-of", name]
        copies[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / copy
    for name in CONTENDERS:
        print(f"{name:<10} {seconds[name]:7.2f} CPU s   {copies[name]:5.2f} copies of {copy / 2**20:.0f} MiB extra")
    ratio = seconds["reference"] / seconds["ours"]
    print(f"mask agreement {agreement:.6f}")
    print(f"speed   {ratio:5.1f} x   goal >= {SPEED_GOAL:g} x        {_verdict(ratio >= SPEED_GOAL)}")
    memory = copies["ours"]
    print(f"memory  {memory:5.2f}     goal <= {MEMORY_GOAL:g} copies   {_verdict(memory <= MEMORY_GOAL)}")


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
