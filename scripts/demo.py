"""The main job on real images: dense training, oViT to 75 %, int8, ONNX, certificate, bench. Run by scripts/demo."""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.analysis.bench_report import BenchReport
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.certificate import Certificate, Promise
from ovit_engine.certificate.render import print_certificate
from ovit_engine.export.deploy import promise_of
from ovit_engine.export.exporter import export_model
from ovit_engine.modifiers.quantize import Quantize
from ovit_engine.quant import bake, set_enabled
from ovit_engine.training.data import ImageData, load_data
from ovit_engine.utils.console import table_console

console = table_console()
if not console.is_terminal:
    console.width = 120
EXAMPLE = torch.zeros(1, 1, 8, 8)


@dataclass
class Result:
    """What the demo made: a certificate for each file, accuracies on the held-out images."""

    dense: Certificate
    sparse: Certificate
    int8: Certificate
    report: BenchReport


def train(
    model: nn.Module,
    recipe: Recipe,
    data: ImageData,
    seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> Engine:
    """A plain PyTorch loop; the lines with `engine` are all that a recipe needs."""
    torch.manual_seed(seed)
    hyper = recipe.training
    loader = DataLoader(data.train, hyper.batch_size, shuffle=True, drop_last=True)

    engine = Engine(model, recipe, steps_per_epoch=len(loader), epochs=hyper.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), hyper.lr, weight_decay=hyper.weight_decay)
    engine.attach(optimizer, calibration=Calibration(loader, cross_entropy))
    for epoch in range(hyper.epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels, label_smoothing=hyper.label_smoothing).backward()
            optimizer.step()
        after_epoch(epoch)
    engine.detach()
    return engine


def make_model(recipe: Recipe, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    assert recipe.training.model
    return timm.create_model(recipe.training.model, **recipe.training.model_args)


def compress(output: Path, *, seed: int, say: Callable[[str], None]) -> Result:
    """Dense training, pruning and int8 training, export: three ONNX files with certificates in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    dense_recipe, recipe = Recipe.load("digits_vit_dense"), Recipe.load("digits_vit_ovit_75_int8")
    data = load_data("digits", augmentation=recipe.training.augmentation)
    held_out = DataLoader(data.val, batch_size=64)

    def write(model: nn.Module, name: str, promise: Promise, **origin: str) -> Certificate:
        options = {"data": held_out, "preprocessing": data.preprocessing, "promise": promise}
        return export_model(model, output / name, EXAMPLE, **origin, **options)

    say(f"1/4  train a dense ViT on {len(data.train)} scanned digits, {dense_recipe.training.epochs} epochs")
    model = make_model(dense_recipe, seed)
    train(model, dense_recipe, data, seed, after_epoch=progress(dense_recipe, say))
    dense = write(
        copy.deepcopy(model),
        "dense.onnx",
        Promise(),
        recipe_name=dense_recipe.name,
        recipe_text=dense_recipe.dump(),
    )
    say(f"     {dense.accuracy.file:.2%} of the {len(data.val)} held-out images are right")

    quantize = next(modifier for modifier in recipe.modifiers if isinstance(modifier, Quantize))
    say(f"2/4  recipe {recipe.name}: oViT from 40 % to 75 %, int8 training from {quantize.start}")
    sparse: list[nn.Module] = []

    tell = progress(recipe, say)

    def keep_sparse(epoch: int) -> None:
        tell(epoch)
        if f"{epoch + 1}ep" == quantize.start:  # the pruned model before int8 training, for comparison
            sparse.append(copy.deepcopy(model).eval())

    engine = train(model, recipe, data, seed, after_epoch=keep_sparse)
    for step, name, value in engine.run.history:
        shown = f"{value:.1%}" if name.endswith("sparsity") else f"{value:.2f}"
        say(f"     step {step:3}: {name} {shown}")

    say("3/4  export, measure each file from its bytes, compare with PyTorch image by image")
    set_enabled(sparse[0], False)
    floating = bake(sparse[0])
    floats = write(
        floating,
        "sparse.onnx",
        promise_of(floating, engine.run.masks),
        recipe_name=f"{recipe.name} before int8 training",
    )
    int8 = engine.export(output / "model.onnx", EXAMPLE, data=held_out, preprocessing=data.preprocessing)

    say("4/4  measure latency, file against file in turn")
    files = [output / name for name in ("sparse.onnx", "model.onnx")]
    report = bench_files(files, baseline=output / "dense.onnx", batch_sizes=(1, 64), threads=1)
    return Result(dense, floats, int8, report)


def progress(recipe: Recipe, say: Callable[[str], None]) -> Callable[[int], None]:
    """A line every eight epochs, with what is still to come at the present speed."""
    started = time.perf_counter()

    def tell(epoch: int) -> None:
        done, epochs = epoch + 1, recipe.training.epochs
        if done % 8 == 0:
            left = (time.perf_counter() - started) / done * (epochs - done)
            say(f"     epoch {done} of {epochs}, about {left:.0f} s left")

    return tell


def summary(result: Result) -> Table:
    """One row a file: what was measured."""
    table = Table(title="What came out", title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("file", no_wrap=True)
    for column in ("accuracy", "zeros", "int8 weights", "size", "gzip", "1 image", "64 images"):
        table.add_column(column, justify="right")
    rows = {(row.path.name, row.batch_size): row.median for row in result.report.rows}
    for certificate in (result.dense, result.sparse, result.int8):
        table.add_row(
            certificate.file,
            f"{certificate.accuracy.file:.2%}",
            f"{certificate.sparsity:.1%}",
            f"{certificate.int8_share:.1%}",
            f"{certificate.bytes / 1024:.0f} KiB",
            f"{certificate.gzip_bytes / 1024:.0f} KiB",
            *(f"{rows[certificate.file, size] * 1e3:.3f} ms" for size in (1, 64)),
        )
    return table


WHY = """\
"zeros" are of the weights that the recipe prunes (the block Linears), counted in the file. ONNX Runtime computes with
zeros as with any other number: they make the compressed file smaller, not the run faster. Int8 can make it faster, but
matrices 64 wide gain little: the verdicts above are what this machine measured, and benchmarks/deit_small_int8.py
measures a larger model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small tensors gain nothing by a second, and lose much where another program has it
    started = time.perf_counter()
    result = compress(arguments.output, seed=arguments.seed, say=console.print)
    console.print()
    print_certificate(result.int8, console)
    console.print()
    result.report.render(console)
    console.print()
    console.print(summary(result))
    console.print(WHY)
    console.print(f"\n{time.perf_counter() - started:.0f} s. Files: {arguments.output}/")
    console.print(
        f"Check the file anywhere, without this model's code: .venv/bin/ovit verify {arguments.output}/model.onnx"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing is lost but this run; start it again")
