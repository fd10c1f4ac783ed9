"""Token pruning, oViT, 2:4 and int8 training in one recipe on the digits: one file, verified."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.certificate.verify import verify_file
from ovit_engine.tokens import param_groups
from tests.slow.digits import BATCH, NOISE, accuracy, images, trained_vit

EPOCHS = 24
RECIPE = """
name: stacked
modifiers:
  - dynamic_vit: {keep: 0.7, blocks: [1, 2, 3]}
  - distill: {logits: 0.5, tokens: 0.5}
  - ovit_prune: {start: 6ep, end: 12ep, every: 3ep, sparsity: {from: 0.3, to: 0.6}, block: 64, gradients: 128,
                 targets: ["re:blocks.*attn.(qkv|proj).weight"]}
  - magnitude_prune: {start: 6ep, pattern: "2:4", targets: ["re:blocks.*mlp.fc(1|2).weight"]}
  - cyclic_lr: {max: 1.0e-3, min: 1.0e-5, period: 3ep, end: 15ep}
  - cyclic_lr: {max: 5.0e-4, min: 1.0e-5, period: 9ep, start: 15ep}
  - quantize: {start: 15ep}
"""


@pytest.mark.slow
def test_one_recipe_of_everything(tmp_path: Path) -> None:
    model = trained_vit(0)
    dense = accuracy(copy.deepcopy(model))
    loader = DataLoader(images()[0], batch_size=BATCH, shuffle=True, drop_last=True)
    engine = Engine(model, Recipe.parse(RECIPE), steps_per_epoch=len(loader), epochs=EPOCHS).prepare()
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)
    engine.attach(optimizer, calibration=Calibration(images()[0], nn.functional.cross_entropy))
    model.train()
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            engine.loss(nn.functional.cross_entropy(model(x + NOISE * torch.randn(len(x), 1, 8, 8)), y)).backward()
            optimizer.step()
    engine.detach()
    _, x, y = images()
    held_out = DataLoader(TensorDataset(x, y), batch_size=64)
    engine.export(tmp_path / "m.onnx", x[:1], data=held_out)
    certificate = verify_file(tmp_path / "m.onnx")
    assert certificate.accuracy is not None
    print(f"dense {dense:.4f}, tokens 0.7, oViT 60 %, 2:4, int8: {certificate.accuracy.file:.4f}")
    layers = {layer.name: layer for layer in certificate.layers}
    attention = [layer for name, layer in layers.items() if ".attn." in name and name.startswith("blocks")]
    mlp = [layer for name, layer in layers.items() if ".mlp." in name]
    assert sum(layer.zeros for layer in attention) >= round(0.6 * sum(layer.numel for layer in attention))
    assert [layer.broken_2_4 for layer in mlp] == [0] * 8
    assert all(layer.quantized for layer in (*attention, *mlp))
    assert not any(layer.quantized for name, layer in layers.items() if "token_predictor" in name)
    counts = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "TopK"]
    assert len(counts) == 3
    assert certificate.accuracy.file >= dense - 0.02
