"""ONNX files with fewer tokens: constant counts, any batch, the same tokens as PyTorch keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference
from torch import Tensor
from torch.nn.functional import cross_entropy

from ovit_engine import Engine
from ovit_engine.tokens import selector
from tests.loops import recipe
from tests.tokens.models import IMAGES, logits, randomised, vit

CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "dynamic_vit": ("dynamic_vit: {keep: 0.7, blocks: [0, 1]}", [11, 7], {"distilled": True, "depth": 2}),
    "svite_tokens": ("svite_tokens: {keep: 0.6}", [9], {"reg_tokens": 2, "depth": 1}),
}


def exported(path: Path, *modifiers: str, **model: Any) -> tuple[Any, onnx.ModelProto]:
    """A model trained for two steps, and its file."""
    built = vit(**model)
    engine = Engine(built, recipe(*modifiers), steps_per_epoch=2, epochs=1).prepare()
    randomised(built, seed=1)
    optimizer = torch.optim.SGD(built.parameters(), 1e-3)
    engine.attach(optimizer)
    built.train()
    for _ in range(2):
        optimizer.zero_grad()
        engine.loss(cross_entropy(built(IMAGES), torch.arange(6) % 5)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    engine.detach()
    engine.export(path, IMAGES[:1])
    assert built.blocks[-1]._forward_pre_hooks  # the model that was trained stays in training form
    return built, onnx.load(path)


def run(proto: onnx.ModelProto, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return found


def check_shapes(proto: onnx.ModelProto) -> None:
    """With the batch given every value has a known shape: nothing depends on what the model computes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    inferred = shape_inference.infer_shapes(fixed, data_prop=True, strict_mode=True)
    known = {
        value.name: value.type.tensor_type.shape.dim for value in (*inferred.graph.value_info, *fixed.graph.output)
    }
    assert {name for node in proto.graph.node for name in node.output} <= set(known)
    assert [name for name, dims in known.items() if not all(dim.HasField("dim_value") for dim in dims)] == []


@pytest.mark.parametrize("case", CASES)
def test_the_file_keeps_the_tokens_that_pytorch_keeps(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modifier, counts, options = CASES[case]
    model, proto = exported(tmp_path / "m.onnx", modifier, **options)
    tops = [node for node in proto.graph.node if node.op_type == "TopK"]
    constants = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    assert [int(constants[node.input[1]].item()) for node in tops] == counts
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan", "NonZero"}
    if case == "dynamic_vit":
        check_shapes(proto)
    kept: list[Tensor] = []

    def spy(scores: Tensor, keep: int) -> Tensor:
        kept.append(scores.topk(keep, dim=1).indices)
        return kept[-1]

    monkeypatch.setattr(selector, "top_tokens", spy)
    # a debug output: the places that each TopK gives
    for node in tops:
        proto.graph.output.append(helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    for batch in (1, 3, 64):
        kept.clear()
        expected = logits(model, images[:batch])
        found, *places = run(proto, images[:batch])
        assert np.abs(found - expected.numpy()).max() < 1e-4
        assert len(kept) == len(places) == len(counts)
        for ours, theirs in zip(kept, places, strict=True):
            assert np.array_equal(np.sort(ours.numpy(), 1), np.sort(theirs, 1))


def test_the_scorer_stays_float_in_an_int8_file(tmp_path: Path) -> None:
    _, proto = exported(tmp_path / "m.onnx", "dynamic_vit: {keep: 0.7, blocks: [0]}", "quantize: {}", depth=1)
    kinds = {each.name: each.data_type for each in proto.graph.initializer if len(each.dims) == 2}
    assert onnx.TensorProto.INT8 in kinds.values()
    scored = {name: kind for name, kind in kinds.items() if "token_predictor" in name}
    assert len(scored) == 4
    assert set(scored.values()) == {onnx.TensorProto.FLOAT}
    # nothing between the scorer's inputs and its TopK is rounded either
    producers = {name: node for node in proto.graph.node for name in node.output}
    (first, *_) = (node for node in proto.graph.node if node.op_type == "TopK")
    waiting, seen = [first.input[0]], set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or (node.op_type == "Concat" and "token_predictor" not in node.name) or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type != "LayerNormalization":
            waiting += [name for name in node.input if name in producers]
        assert node.op_type not in ("QuantizeLinear", "DequantizeLinear"), node.name
    assert len(seen) > 8
