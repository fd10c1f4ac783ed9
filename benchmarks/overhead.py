"""What the engine costs an optimizer step: the same loop with and without it, by turns.

    python benchmarks/overhead.py                                                     # a ViT of 8x8 digits
    python benchmarks/overhead.py --model vit_tiny_patch16_224 --batch 32 --threads 2 --steps 1 --rounds 20

Each round runs a few steps of every variant in random order, right after one another, and gives one ratio to the plain
loop. "plain again" is a second plain loop: its spread is what the machine's noise alone does. Where a step is long,
that noise is more than the engine: "hooks" is the CPU time between two clocks of our own before and after the engine's
hooks on the optimizer (events, learning rate, projection of masks), as a share of the plain step. Goal: under 2 %.
Training with fake-quantized layers costs what the layers cost, and with a teacher what its forward pass costs: they
have lines of their own and no goal. A goal that is missed is printed, not raised.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "1")

import timm
import torch
from torch import nn

from ovit_engine import Engine, Recipe

GOAL = 0.02
TARGETS = r"targets: ['re:blocks\..*(qkv|proj|fc1|fc2)\.weight']"
MASKS = (
    f"{{magnitude_prune: {{sparsity: 0.75, {TARGETS}}}}}, {{cyclic_lr: {{max: 1.0e-3, min: 1.0e-5, period: 100st}}}}"
)
RECIPES = {
    "plain again": None,
    "empty recipe": "modifiers: []",
    "masks and cyclic_lr": f"modifiers: [{MASKS}]",
    "and quantize, observing": f"modifiers: [{MASKS}, {{quantize: {{freeze_observers: 100%}}}}]",
    "and quantize, frozen": f"modifiers: [{MASKS}, {{quantize: {{freeze_observers: 1st}}}}]",
    "distill": "modifiers: [{distill: {logits: 0.5, tokens: 0.5}}]",
}
NO_GOAL = ("plain again", "and quantize, observing", "and quantize, frozen", "distill")
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 6, "num_heads": 4}


@dataclass
class Loop:
    """One optimizer step of a model, and the seconds that its hooks took in each."""

    step: Callable[[], None]
    hooks: list[float] = field(default_factory=list)


def make_loop(recipe: str | None, name: str, batch: int, total: int) -> Loop:
    """A fresh model, under `recipe` if there is one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL) if name == "digits" else timm.create_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = (
        torch.randn(batch, *((1, 8, 8) if name == "digits" else (3, 224, 224))),
        torch.randint(10, (batch,)),
    )
    clocks: list[float] = []

    def note(*_: Any) -> None:
        clocks.append(time.process_time())

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if engine is not None:
            loss = engine.loss(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        begin, begun, end, ended = clocks
        loop.hooks.append(begun - begin + ended - end)
        clocks.clear()

    loop = Loop(step)
    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    engine = None
    if recipe is not None:
        engine = Engine(model, Recipe.parse(recipe), steps_per_epoch=total, epochs=1).attach(optimizer)
    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    return loop


def seconds(step: Callable[[], None], steps: int) -> float:
    """CPU time of a step in seconds, mean of a few: other processes on the machine do not count."""
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


def measure(name: str, rounds: int, steps: int, batch: int) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Of each variant the ratios to the plain loop, one a round, and its hooks' seconds a step; the plain step's."""
    total = (rounds + 1) * steps
    plain = make_loop(None, name, batch, total)
    loops = {variant: make_loop(recipe, name, batch, total) for variant, recipe in RECIPES.items()}
    for loop in (plain, *loops.values()):
        seconds(loop.step, steps)  # warm up
        loop.hooks.clear()
    ratios: dict[str, list[float]] = {variant: [] for variant in loops}
    baseline = []
    order = random.Random(0)
    for _ in range(rounds):
        found = {}
        for variant in order.sample(["plain", *loops], len(loops) + 1):
            found[variant] = seconds((plain if variant == "plain" else loops[variant]).step, steps)
        baseline.append(found["plain"])
        for variant in loops:
            ratios[variant].append(found[variant] / found["plain"])
    hooks = {variant: statistics.median(loop.hooks) for variant, loop in loops.items()}
    return ratios, hooks, statistics.median(baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="a timm model that takes 224x224 images, or digits")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps of each loop in a round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ratios, hooks, plain = measure(options.model, options.rounds, options.steps, options.batch)
    print(
        f"torch {torch.__version__}, {options.model}, {options.threads} thread(s), batch {options.batch}, "
        f"{options.rounds} rounds of {options.steps} steps; plain loop {plain * 1e3:.2f} CPU ms a step"
    )
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        # of the median; 1.25 = sqrt(pi / 2), normal noise
        error = 1.25 * statistics.stdev(values) / len(values) ** 0.5
        share = hooks[name] / plain
        verdict = "" if name in NO_GOAL else f"  goal {GOAL:.0%}: {'reached' if share < GOAL else 'MISSED'}"
        print(
            f"{name:24} median ratio {middle:.4f} +- {error:.4f} (quartiles {low:.4f} .. {high:.4f}), "
            f"hooks {hooks[name] * 1e3:.3f} ms = {share:.2%}{verdict}"
        )


if __name__ == "__main__":
    main()
