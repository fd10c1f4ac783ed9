"""ONNX files with fewer tokens: constant counts, any batch, the same tokens as PyTorch keeps."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from ovit_engine.tokens import attended, selector
from ovit_engine.tokens import merging as merger
from tests.tokens.models import IMAGES, logits, randomised
from tests.tokens.training import attached, train


class Case(NamedTuple):
    """A line of a recipe, the counts of the file's TopK nodes, those of them that choose tokens, and the model."""

    line: str
    counts: list[int]
    choosing: list[int]
    model: dict[str, Any]


CASES = {
    "dynamic_vit": Case("dynamic_vit: {keep: 0.7, blocks: [0, 1]}", [11, 7], [0, 1], {"distilled": True, "depth": 2}),
    "svite_tokens": Case("svite_tokens: {keep: 0.6}", [9], [0], {"reg_tokens": 2, "depth": 1}),
    "evit": Case(
        "evit: {keep: 0.5, blocks: [0, 1], fuse: true, start: 1st}",
        [16, 9],  # all are put in order, of which the first stay
        [0, 1],
        {"distilled": True, "qk_norm": True, "depth": 2},
    ),
    # in each block those of A are put in order, of which the first go; then the places of the rest
    "tome": Case("tome: {r: 3}", [8, 5, 6, 3], [0, 2], {"init_values": 0.5, "depth": 2}),
}


def exported(path: Path, *lines: str, averaged: bool = False, **options: Any) -> tuple[Any, onnx.ModelProto]:
    """A model trained for two steps, or an average of its weights, and its file."""
    model, engine, optimizer = attached(*lines, steps=2, drawn="evit" not in lines[0], **options)
    copied = ModelEmaV3(model, decay=0.5).module if averaged else None
    train(engine, optimizer, 2)
    engine.detach()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    if copied is not None:  # whose scorers choose other tokens
        randomised(copied, seed=2)
    engine.export(path, IMAGES[:1], model=copied)
    # the model that was trained stays in training form
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return model if copied is None else copied, onnx.load(path)


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}


def tops(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "TopK"]


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


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Places of the tokens that PyTorch chooses from here on: those that stay, or of tome those that go."""
    found: list[Tensor] = []

    def top(scores: Tensor, keep: int) -> Tensor:
        found.append(scores.topk(keep, dim=1).indices)
        return found[-1]

    def keep(*args: Any, **kwargs: Any) -> Any:
        tokens, index = attend(*args, **kwargs)
        found.append(index)
        return tokens, index

    def match(*args: Any) -> Any:
        matching = pair(*args)
        found.append(matching.sources)
        return matching

    attend, pair = attended.keep_attended, merger.match_tokens
    monkeypatch.setattr(selector, "top_tokens", top)
    monkeypatch.setattr(attended, "keep_attended", keep)
    monkeypatch.setattr(merger, "match_tokens", match)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_file_keeps_the_tokens_that_pytorch_keeps(case: str, tmp_path: Path, chosen: list[Tensor]) -> None:
    line, counts, choosing, options = CASES[case]
    model, proto = exported(tmp_path / "m.onnx", line, averaged=case == "dynamic_vit", **options)
    assert [int(constants(proto)[node.input[1]].item()) for node in tops(proto)] == counts
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan", "NonZero", "ScatterElements"}
    if case != "svite_tokens":
        check_shapes(proto)
    for place in choosing:  # a debug output: the places that each TopK gives
        output = tops(proto)[place].output[1]
        proto.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.INT64, None))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    for batch in (1, 3, 64):
        chosen.clear()
        expected = logits(model, images[:batch])
        found, *places = run(proto, images[:batch])
        assert np.abs(found - expected.numpy()).max() < 1e-4
        assert len(chosen) == len(places) == len(choosing)
        for ours, theirs in zip(chosen, places, strict=True):
            assert 0 < ours.shape[1] <= theirs.shape[1]
            assert np.array_equal(np.sort(ours.numpy(), 1), np.sort(theirs[:, : ours.shape[1]], 1))


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


def test_an_int8_file_has_fewer_tokens_too(tmp_path: Path) -> None:
    _, proto = exported(tmp_path / "m.onnx", "evit: {keep: 0.6, blocks: [0], fuse: false}", "quantize: {}", depth=1)
    kinds = {each.data_type for each in proto.graph.initializer if len(each.dims) == 2}
    assert onnx.TensorProto.INT8 in kinds
    (top,) = tops(proto)
    assert int(constants(proto)[top.input[1]].item()) == 10
