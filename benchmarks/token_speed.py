"""DeiT-Small at 224 pixels with fewer tokens against all of them, in ONNX Runtime: speed beside operations saved.

    python benchmarks/token_speed.py
    python benchmarks/token_speed.py --batch-sizes 1 --repeats 10 --threads 2

Weights are random (no download): latency depends on how many tokens there are, not on which; accuracy is not looked at.
All files are measured in the same rounds, in random order, and the dense one twice: what is within its own noise is no
difference.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else "2")

import timm
import torch

from ovit_engine import Engine, Recipe
from ovit_engine.export.bench import bench
from ovit_engine.flops import count_flops

IMAGES = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
LINES = {
    "dense": "",
    "dynamic_vit": "dynamic_vit: {keep: 0.7}",
    "evit": "evit: {keep: 0.7}",
    "tome": "tome: {r: 13}",
}


def written(name: str, folder: Path) -> tuple[Path, float]:
    """The file of a model, and its multiply-adds an image in billions."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224")
    lines = f"modifiers: [{f'{{{LINES[name]}}}' if LINES[name] else ''}]"
    engine = Engine(model, Recipe.parse(lines), steps_per_epoch=1, epochs=1)
    optimizer = torch.optim.SGD(engine.prepare().model.parameters(), 0.0)
    engine.attach(optimizer)
    engine.loss(model(IMAGES[:2]).square().mean()).backward()
    optimizer.step()
    engine.detach()
    path = folder / f"{name}.onnx"
    # as few images as may be compared: without data 256 are
    engine.export(path, IMAGES[:1], data=[(IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64))])
    return path, count_flops(model, IMAGES[:1]).dense / 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: written(name, Path(folder)) for name in LINES}
        dense, macs = files["dense"]
        report = bench(
            [path for path, _ in files.values()],
            baseline=dense,
            batch_sizes=arguments.batch_sizes,
            threads=arguments.threads,
            repeats=arguments.repeats,
        )
        report.render()
    for row in report.rows:
        if row.ratio is not None:
            fewer = macs / files[row.path.stem][1]
            reached = f"{row.ratio.verdict}, {(row.ratio.median - 1) / (fewer - 1):.0%} of what operations give"
            print(f"{row.path.stem} at batch {row.batch_size}: {fewer:.2f} x fewer operations, {reached}")


if __name__ == "__main__":
    main()
