"""ONNX files of what reduces tokens inside blocks: constant counts, any batch, the same tokens as in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn.functional import cross_entropy

from ovit_engine import Engine
from ovit_engine.tokens import attended, merger
from tests.loops import recipe
from tests.tokens.models import IMAGES, logits, vit
from tests.tokens.test_export import check_shapes, run

# the constants of TopK in the file; of them those whose first places are the tokens that stay (evit) or go (tome)
CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "evit": (
        "evit: {keep: 0.5, blocks: [0, 1], fuse: true, start: 1st}",
        [16, 9],
        {"distilled": True, "qk_norm": True, "depth": 2},
    ),
    "tome": ("tome: {r: 3}", [8, 5, 6, 3], {"init_values": 0.5, "depth": 2}),
}


def exported(path: Path, *modifiers: str, **model: Any) -> tuple[Any, onnx.ModelProto]:
    """A model trained for two steps, and its file."""
    built = vit(**model)
    engine = Engine(built, recipe(*modifiers), steps_per_epoch=2, epochs=1).prepare()
    optimizer = torch.optim.SGD(built.parameters(), 1e-3)
    engine.attach(optimizer)
    built.train()
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(built(IMAGES), torch.arange(6) % 5).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    engine.detach()
    engine.export(path, IMAGES[:1])
    return built, onnx.load(path)


@pytest.mark.parametrize("case", CASES)
def test_the_file_keeps_the_tokens_that_pytorch_keeps(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modifier, counts, options = CASES[case]
    model, proto = exported(tmp_path / "m.onnx", modifier, **options)
    tops = [node for node in proto.graph.node if node.op_type == "TopK"]
    constants = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    assert [int(constants[node.input[1]].item()) for node in tops] == counts
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan", "NonZero", "ScatterElements"}
    check_shapes(proto)
    chosen: list[Tensor] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        tokens, index = attend(*args, **kwargs)
        chosen.append(index)
        return tokens, index

    def match(*args: Any) -> Any:
        matching = pair(*args)
        chosen.append(matching.sources)
        return matching

    attend, pair = attended.keep_attended, merger.match_tokens
    monkeypatch.setattr(attended, "keep_attended", keep)
    monkeypatch.setattr(merger, "match_tokens", match)
    for node in tops[:: 2 if case == "tome" else 1]:  # a debug output: the places that it gives
        proto.graph.output.append(helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None))
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    for batch in (1, 3, 64):
        chosen.clear()
        expected = logits(model, images[:batch])
        found, *places = run(proto, images[:batch])
        assert np.abs(found - expected.numpy()).max() < 1e-4
        assert len(chosen) == len(places) == 2
        for ours, theirs in zip(chosen, places, strict=True):
            assert ours.shape[1] <= theirs.shape[1]
            assert np.array_equal(np.sort(ours.numpy(), 1), np.sort(theirs[:, : ours.shape[1]], 1))


def test_an_int8_file_has_fewer_tokens_too(tmp_path: Path) -> None:
    _, proto = exported(tmp_path / "m.onnx", "evit: {keep: 0.6, blocks: [0], fuse: false}", "quantize: {}", depth=1)
    kinds = {each.data_type for each in proto.graph.initializer if len(each.dims) == 2}
    assert onnx.TensorProto.INT8 in kinds
    (top,) = [node for node in proto.graph.node if node.op_type == "TopK"]
    constants = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    assert int(constants[top.input[1]].item()) == 10
