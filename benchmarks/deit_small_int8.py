"""DeiT-Small at 224 pixels, float against int8, both exported by us: size and paired latency in ONNX Runtime.

Weights are random (no download): latency and size do not depend on them, accuracy is not looked at. Run as
`python benchmarks/deit_small_int8.py`; add `--threads 2` or `--batch-size 8` for other settings. A few minutes.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import timm
import torch

from ovit_engine import Engine, Recipe
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.certificate import Promise
from ovit_engine.export.exporter import export_model

IMAGE = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224")
    with tempfile.TemporaryDirectory() as folder:
        dense, int8 = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        export_model(copy.deepcopy(model).eval(), dense, IMAGE, promise=Promise())
        engine = Engine(
            model, Recipe.parse("modifiers: [{quantize: {freeze_observers: 1st}}]"), steps_per_epoch=2, epochs=1
        )
        engine.attach(torch.optim.SGD(model.parameters(), 0.0))
        for _ in range(2):  # the observers need to see a batch
            model(IMAGE).sum().backward()
            engine.run.optimizers[0].step()
        engine.detach()
        certificate = engine.export(int8, IMAGE)
        print(
            f"size: {dense.stat().st_size / int8.stat().st_size:.2f} x smaller ({int8.stat().st_size / 2**20:.1f} MiB)"
        )
        print(f"runtime operators: {certificate.runtime_ops}")
        bench_files(
            [int8],
            baseline=dense,
            batch_sizes=[arguments.batch_size],
            threads=arguments.threads,
            repeats=arguments.repeats,
        ).render()


if __name__ == "__main__":
    main()
