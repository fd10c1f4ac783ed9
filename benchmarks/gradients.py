"""Several gradients from one backward pass against one backward pass each, by turns, and which way is taken by itself.

    python benchmarks/gradients.py [--threads 2] [--rounds 7] [--models digits_vit deit_tiny ...]

All goes through `Calibration.gradients`, loading and proof included; weights are random. Each round takes the same
gradients every way in random order and gives one ratio of wall seconds; the quartiles of the ratios are their spread.
The ratio of CPU seconds says more where others use the machine, but means little with several threads, as they spin.
Goals: at least 4 times as many small gradients (one image each) a second on the digits ViT on two cores, not fewer
on DeiT-Tiny at 224 pixels.
A goal that is missed is printed, not raised.
"""

import argparse
import logging
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "2")  # how many there may be; --threads says how many are used

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ovit_engine import Calibration
from ovit_engine.bases.gradient_pruner import chunk_size
from ovit_engine.gradients import backward as gradient_pass
from ovit_engine.gradients import calibration
from ovit_engine.masking.targets import find_slots

# least number of gradients for which batching is tried, and activations a backward pass; "batched" is what 3 GB hold,
# which 16 images of DeiT-Tiny a gradient exceed
WAYS = {
    "one by one": (2**62, 0),
    "batched": (0, 2**26),
    "by itself": (calibration.LEAST_COUNT, gradient_pass.ACTIVATIONS),
}


def digits_vit() -> nn.Module:
    """The ViT of tests/slow/digits.py: 4 blocks, 64 wide, 17 tokens."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )


BLOCKS = r"re:.*(qkv|proj|fc1|fc2)\.weight"
CONVS = r"re:(stages|layer).*(conv\d|conv_dw|fc1|fc2)\.weight"
# model, shape of an image, targets, images a gradient, gradients a round, goal
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], str, int, int, float | None]] = {
    "digits_vit, 1 image": (digits_vit, (1, 8, 8), BLOCKS, 1, 1024, 4.0),
    "digits_vit, 4 images": (digits_vit, (1, 8, 8), BLOCKS, 4, 1024, None),
    "digits_vit": (digits_vit, (1, 8, 8), BLOCKS, 16, 1024, None),
    "convnext_32": (lambda: timm.create_model("test_convnext"), (3, 32, 32), CONVS, 16, 64, None),
    "resnet_32": (lambda: timm.create_model("test_resnet", zero_init_last=False), (3, 32, 32), CONVS, 16, 64, None),
    "resnet10t_64": (lambda: timm.create_model("resnet10t", zero_init_last=False), (3, 64, 64), CONVS, 16, 32, None),
    "deit_tiny, 1 image": (lambda: timm.create_model("deit_tiny_patch16_224"), (3, 224, 224), BLOCKS, 1, 32, None),
    "deit_tiny": (lambda: timm.create_model("deit_tiny_patch16_224"), (3, 224, 224), BLOCKS, 16, 16, 1.0),
}


class Listener(logging.Handler):
    """Keeps the last line that says which way was taken."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def measure(name: str, rounds: int, listener: Listener) -> None:
    """Print one model's line."""
    make, shape, targets, images, count, goal = CASES[name]
    torch.manual_seed(0)
    model = make()
    slots = find_slots(model, [targets])
    data = TensorDataset(torch.randn(256, *shape), torch.randint(10, (256,)))
    source = Calibration(data, nn.functional.cross_entropy)
    chunk = chunk_size(sum(slot.tensor.numel() for slot in slots), count)  # as the pruners ask for them

    def take(way: str, keep: bool = False, count: int = count) -> tuple[float, float, list[Tensor]]:
        calibration.LEAST_COUNT, gradient_pass.ACTIVATIONS = WAYS[way]
        kept: list[Tensor] = []
        start, cpu = time.perf_counter(), time.process_time()
        for held in source.gradients(model, slots, count=count, images_per_gradient=images, chunk=chunk):
            kept = [part.clone() for part in held] if keep and not kept else kept
        return time.perf_counter() - start, time.process_time() - cpu, kept

    plain, batched = take("one by one", True, 16)[2], take("batched", True, 16)[2]
    worst = max(
        float(((a - b).abs().flatten(1).amax(1) / a.abs().flatten(1).amax(1)).max())
        for a, b in zip(plain, batched, strict=True)
    )
    ways = [way for way in WAYS if way != "batched" or "up to" in listener.last]
    chosen = ""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            taken[way].append(take(way)[:2])
            chosen = listener.last if way == "by itself" else chosen
    print(f"{name}: {images} images a gradient, {count} gradients in chunks of {chunk}, largest difference {worst:.1e}")
    for way, values in taken.items():
        rate = count / statistics.median(wall for wall, _ in values)
        ratios = [[a[i] / b[i] for a, b in zip(taken["one by one"], values, strict=True)] for i in (0, 1)]
        low, middle, high = statistics.quantiles(ratios[0], n=4)
        verdict = f"  goal {goal:g}: {'met' if middle >= goal else 'MISSED'}" if goal and way == "by itself" else ""
        cpu = statistics.median(ratios[1])
        print(
            f"  {way:<10} {rate:8.1f} gradients/s  {middle:5.2f} x ({low:.2f} .. {high:.2f}), CPU {cpu:.2f} x{verdict}"
        )
    print(f"  chosen: {chosen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    listener = Listener()
    gradient_pass.log.addHandler(listener)
    gradient_pass.log.setLevel(logging.DEBUG)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds")
    for name in options.models:
        measure(name, options.rounds, listener)


if __name__ == "__main__":
    main()
