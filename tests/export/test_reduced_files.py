"""Files with fewer tokens: counts are measured, promised, held against the recipe, and shown."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from ovit_engine import Engine, Recipe
from ovit_engine.certificate import ExportError
from ovit_engine.certificate.check import check
from ovit_engine.certificate.measure import Provenance
from ovit_engine.certificate.model import FORMAT, Promise, certificate_path, page_path, reference_path
from ovit_engine.certificate.notes import Note
from ovit_engine.certificate.parity import Reference, random_sample
from ovit_engine.certificate.token_counts import TokenCounts
from ovit_engine.certificate.verify import verify_file
from ovit_engine.export.exporter import publish
from ovit_engine.flops import count_flops
from ovit_engine.structured.shrink_model import shrink
from tests.exported_files import findings, table_of
from tests.structured.shrinking import IMAGES, switch, vit

LINE = "dynamic_vit: {keep: 0.7, blocks: [0, 1]}"
COUNTS = TokenCounts(entering=17, attention=(12, 8), leaving=8)
WORDS = "17 -> 12, 8 before the attention of blocks 0, 1"


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: Any) -> Any:
    """Fewer tokens, heads and units, in int8: path, certificate, and multiply-adds as PyTorch counts them."""
    path = tmp_path_factory.mktemp("reduced") / "model.onnx"
    model = switch(vit())
    text = f"modifiers: [{{{LINE}}}, {{quantize: {{start: 0st, freeze_observers: 1st}}}}]"
    engine = Engine(model, Recipe.parse(text), steps_per_epoch=2, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        engine.loss(model.train()(IMAGES).square().mean()).backward()
        optimizer.step()
    engine.detach()
    certificate = engine.export(path, IMAGES[:1])
    shrink(model.eval())
    return path, certificate, count_flops(model, IMAGES[:1]).dense / 2


@pytest.fixture
def mine(reduced: Any, tmp_path: Path) -> Path:
    for file in reduced[0].parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / "model.onnx"


def test_the_certificate_tells_tokens_and_multiply_adds(reduced: Any) -> None:
    path, certificate, macs = reduced
    assert certificate.tokens == certificate.promise.tokens == COUNTS
    assert certificate.macs == macs
    text, page = table_of(certificate), page_path(path).read_text()
    for words in (f"tokens {WORDS}", f"multiply-adds {certificate.macs:,} an image"):
        assert words in text
    assert f"tokens {WORDS}" in " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())
    content = json.loads(certificate_path(path).read_text())
    assert content["tokens"] == {"entering": 17, "attention": [12, 8], "leaving": 8}
    assert content["macs"] == macs
    assert content["format"] == FORMAT
    assert verify_file(path).tokens == COUNTS


def keep_one_less(model: onnx.ModelProto) -> None:
    """The last TopK keeps one token less, and the shapes behind it go along."""
    nodes = list(model.graph.node)
    last = max(i for i, node in enumerate(nodes) if node.op_type == "TopK")
    shapes = {node.input[1] for node in nodes[last:] if node.op_type in ("TopK", "Reshape")}
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            values = numpy_helper.to_array(tensor).copy()
            values[(values == 8) & (np.arange(values.size) == 1) | (values == 7)] -= 1  # [-1, tokens, ...], [patches]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_a_count_that_was_changed_by_hand_is_found(mine: Path) -> None:
    model = onnx.load(mine)
    keep_one_less(model)
    onnx.save(model, mine)
    assert f"tokens: promised {WORDS}, the file has 17 -> 12, 7 before the attention of blocks 0, 1" in findings(mine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(macs=c["macs"] - 1), "macs differs: the certificate says"),
        (lambda c: c["tokens"].update(leaving=7), "tokens differs: the certificate says 17 -> 12, 8 before"),
        (lambda c: c.update(tokens=None), "tokens differs: the certificate says None"),
    ],
)
def test_an_edited_certificate_is_told(mine: Path, change: Any, words: str) -> None:
    content = json.loads(certificate_path(mine).read_text())
    change(content)
    certificate_path(mine).write_text(json.dumps(content))
    (line,) = findings(mine)
    assert words in line


def test_a_file_without_the_promised_counts_is_not_written(reduced: Any, tmp_path: Path) -> None:
    proto, reference = onnx.load(reduced[0]), Reference.load(reference_path(reduced[0]))
    origin = Provenance.read(proto)
    promise = origin.promise.model_copy(update={"tokens": COUNTS.model_copy(update={"leaving": 6})})
    sample = random_sample([IMAGES[:1].shape], [np.dtype("float32")])
    with pytest.raises(ExportError, match=f"tokens: promised {WORDS}; 6 out of the last, the file has {WORDS}"):
        publish(proto, tmp_path / "model.onnx", replace(origin, promise=promise), sample, reference)
    assert not list(tmp_path.iterdir())


def test_counts_that_can_not_be_measured_are_told_with_the_reason(reduced: Any) -> None:
    note = Note(code="tokens_unknown", reason="attention is that of windows, not of an image")
    certificate = reduced[1].model_copy(update={"tokens": None, "notes": (note,)})
    line = f"tokens: promised {WORDS}; tokens are not counted: attention is that of windows, not of an image"
    assert check(certificate, certificate.promise)[0] == line


def test_a_promise_without_tokens_reads_as_ever() -> None:
    assert Promise.model_validate_json('{"layers": []}').tokens is None
