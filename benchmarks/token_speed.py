"""DeiT-Small at 224 pixels with fewer tokens against all of them, in ONNX Runtime: speed beside operations saved.

    python benchmarks/token_speed.py
    python benchmarks/token_speed.py --batch-sizes 1 --repeats 10 --threads 2

Weights are random (no download): latency depends on how many tokens there are, not on which; accuracy is not looked at.
"""

import tempfile
from pathlib import Path

import timm
import torch
from paired import arguments, compare

from ovit_engine import Engine, Recipe
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
    settings = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        compare(dict(written(name, Path(folder)) for name in LINES), settings)


if __name__ == "__main__":
    main()
