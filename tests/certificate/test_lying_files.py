"""Five files that lie, with a forger who measures again and recomputes every hash: verification names the tensor."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from ovit_engine.certificate import VerificationError
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.measure import Origin, measure_file
from ovit_engine.certificate.model import (
    Certificate,
    LayerFacts,
    Promise,
    PromisedLayer,
    certificate_path,
    page_path,
    reference_path,
)
from ovit_engine.certificate.parity import Reference, accuracy, compare
from ovit_engine.certificate.stated import contradictions
from ovit_engine.certificate.verify import verify_file
from ovit_engine.cli import main
from ovit_engine.export.writer import set_metadata


def tensor_of(model, name):
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tensor


def change(model, name, edit):
    tensor = tensor_of(model, name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))


def make_float(model, name):
    """Store a quantized weight in float, as other tools do under the name of int8."""
    (reader,) = [node for node in model.graph.node if name in node.input]
    scale = numpy_helper.to_array(tensor_of(model, f"{name}_scale"))
    change(model, name, lambda levels: (levels * scale).astype(np.float32))
    reader.CopyFrom(onnx.helper.make_node("Identity", [name], list(reader.output)))


def forge(path, *, edit=lambda model: None, recipe=None, promise=None):
    """Edit the model, then make metadata, certificate and every hash agree with it, parity measured for real."""
    model = onnx.load(path)
    edit(model)
    found = {entry.key: entry.value for entry in model.metadata_props}
    if recipe is not None:
        found["ovit.recipe"] = recipe
        found["ovit.recipe_sha256"] = hashlib.sha256(recipe.encode()).hexdigest()
    if promise is not None:
        found["ovit.promise"] = json.dumps(promise(json.loads(found["ovit.promise"])))
    set_metadata(model, found)
    onnx.save(model, path)
    origin = Origin.read(model)
    reference = Reference.load(reference_path(path))
    logits = run_outputs(open_session(path), reference.stored)
    certificate = measure_file(
        path,
        origin,
        reference_sha256=hashlib.sha256(reference_path(path).read_bytes()).hexdigest(),
        parity=compare(logits, reference.logits, reference.source),
        parity_stored=None,
        accuracy=accuracy(logits, reference.logits, reference.labels),
    )
    set_metadata(model, {**found, "ovit.sparsity": origin._sparsity_of(certificate.layers)})
    onnx.save(model, path)
    content = path.read_bytes()
    certificate = certificate.model_copy(update={"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})
    certificate_path(path).write_text(certificate.to_json())
    page_path(path).write_text(to_html(certificate))


def findings(path):
    with pytest.raises(VerificationError) as caught:
        verify_file(path)
    return caught.value.violations


def some(lines, *words):
    return any(all(word in line for word in words) for line in lines)


def test_the_forger_of_these_tests_is_good_enough_to_pass_where_nothing_was_changed(vit_copy):
    forge(vit_copy.path)
    assert verify_file(vit_copy.path).sparsity == vit_copy.certificate.sparsity


def test_float_weights_claimed_int8(vit_copy):
    name = "blocks.0.attn.qkv.weight"
    forge(vit_copy.path, edit=lambda model: make_float(model, name))
    assert f"{name}: promised int8, the file stores FLOAT" in findings(vit_copy.path)


def test_float_weights_with_the_promise_withdrawn(vit_copy):
    name = "blocks.0.attn.qkv.weight"

    def withdraw(promise):
        for layer in promise["layers"]:
            layer["quantized"] = layer["quantized"] and layer["name"] != name
        return promise

    forge(vit_copy.path, edit=lambda model: make_float(model, name), promise=withdraw)
    assert some(findings(vit_copy.path), f"{name}: ", "not PyTorch's")


def test_one_broken_group(vit_copy):
    name = "blocks.0.attn.proj.weight"

    def fill(levels):
        column = levels[:4, 0]
        column[column == 0] = 1
        return levels

    forge(vit_copy.path, edit=lambda model: change(model, name, fill))
    lines = findings(vit_copy.path)
    assert f"{name}: promised 2:4, 1 groups with more than 2 non-zero" in lines
    assert f"{name}: 2 of 64 rows are not PyTorch's" in lines


@pytest.mark.parametrize(
    ("name", "factor"), [("blocks.0.mlp.fc2.weight_scale", 4.0), ("blocks.1.attn.qkv.input.scale", 1.02)]
)
def test_a_wrong_scale(vit_copy, name, factor):
    forge(vit_copy.path, edit=lambda model: change(model, name, lambda scale: (scale * factor).astype(np.float32)))
    assert some(findings(vit_copy.path), f"{name}: ", f"not PyTorch's: {factor:g} times as large")


def test_one_wrong_level(vit_copy):
    name = "blocks.1.mlp.fc2.weight"

    def nudge(levels):
        row, column = np.argwhere((levels > 1) & (levels < 100))[0]
        levels[row, column] += 1
        return levels

    forge(vit_copy.path, edit=lambda model: change(model, name, nudge))
    assert findings(vit_copy.path) == (f"{name}: 1 of 256 rows are not PyTorch's",)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(vit_copy, share):
    content = vit_copy.path.read_bytes()
    vit_copy.path.write_bytes(content[: int(share * len(content))])
    (line,) = findings(vit_copy.path)
    assert line.startswith("model.onnx: not a readable ONNX file, truncated: ")
    assert f"of the {len(content)} bytes" in line


def test_a_file_cut_between_two_fields(vit_copy):
    size = vit_copy.path.stat().st_size
    model = onnx.load(vit_copy.path)
    del model.metadata_props[:]
    onnx.save(model, vit_copy.path)
    (line,) = findings(vit_copy.path)
    assert line.startswith("model.onnx: no ovit-engine metadata, ")
    assert f"truncated: {vit_copy.path.stat().st_size} of the {size} bytes" in line


def test_a_tensor_whose_bytes_were_cut(vit_copy):
    model = onnx.load(vit_copy.path)
    tensor = tensor_of(model, "blocks.0.mlp.fc1.weight")
    tensor.raw_data = tensor.raw_data[:-7]
    onnx.save(model, vit_copy.path)
    assert some(findings(vit_copy.path), "blocks.0.mlp.fc1.weight: ")


TWO_OF_FOUR = "magnitude_prune: {pattern: '2:4', targets: ['re:blocks.*weight']}"
MORE = "magnitude_prune: {pattern: '2:4', targets: ['re:(blocks.*|head).weight']}"
ONE_OF_FOUR = "magnitude_prune: {pattern: '1:4', targets: ['re:blocks.*qkv.weight']}"
SPARSER = "obert_prune: {sparsity: 0.9, pattern: '2:4', targets: ['preset:vit']}"


@pytest.mark.parametrize(
    ("modifiers", "words"),
    [
        ("[]", ("blocks.0.attn.qkv.weight", "the recipe does not prune it")),
        (f"[{{{TWO_OF_FOUR}}}]", ("blocks.0.attn.qkv.weight", "the recipe does not quantize it")),
        (f"[{{{ONE_OF_FOUR}}}]", ("blocks.0.attn.qkv.weight", "the recipe prunes it 1:4, the file promises 2:4")),
        (f"[{{{SPARSER}}}, {{quantize: {{}}}}]", ("blocks.", "the recipe's obert_prune asks for 90.00%")),
        (f"[{{{MORE}}}, {{quantize: {{}}}}]", ("head.weight", "the recipe prunes it, the file promises nothing")),
        (f"[{{{TWO_OF_FOUR}}}, {{quantize: {{targets: 're:head'}}}}]", ("head.weight", "the recipe quantizes it")),
        ("", ("the recipe in the metadata is no recipe", "list of modifiers")),
        ("{", ("the recipe in the metadata is no recipe",)),
    ],
)
def test_another_recipe(vit_copy, modifiers, words):
    forge(vit_copy.path, recipe=f"modifiers: {modifiers}")
    assert some(findings(vit_copy.path), *words)


def test_points_of_a_sweep_come_before_the_end_of_their_recipe() -> None:
    """The model at 50 % was kept before int8 training began, and before the second pruner did."""
    sweep = "ovit_prune: {sparsity: {from: 0.5, to: 0.9}, sweep: [0.5, 0.9], targets: [a.weight]}"
    later = "magnitude_prune: {start: 9ep, sparsity: 0.5, targets: [b.weight]}"
    text = f"modifiers: [{{{sweep}}}, {{{later}}}, {{quantize: {{start: 9ep}}}}]"
    promise = Promise(layers=(PromisedLayer(name="a.weight", zeros=50),))
    options = {"op": "Gemm", "shape": (10, 10), "dtype": "FLOAT", "quantized": False, "numel": 100}
    half = [LayerFacts(name="a.weight", zeros=50, **options), LayerFacts(name="b.weight", zeros=0, **options)]
    assert contradictions(text, promise, half) == []
    (line,) = contradictions(text, promise, [LayerFacts(name="a.weight", zeros=20, **options), half[1]])
    assert line.startswith("a.weight: 20.00% zeros; the recipe's ovit_prune asks for 50.00%")
    assert len(contradictions(text.replace(", sweep: [0.5, 0.9]", ""), promise, half)) >= 3


def test_another_recipe_with_its_own_promise(vit_copy):
    forge(vit_copy.path, recipe="modifiers: []", promise=lambda promise: {"layers": []})
    assert some(findings(vit_copy.path), "blocks.1.mlp.fc1.weight: stored as INT8, the recipe does not quantize it")


def test_traces_of_tensors_cannot_be_left_out(vit_copy):
    path = reference_path(vit_copy.path)
    parts = {key: value for key, value in np.load(path).items() if not key.startswith("tensor:")}
    np.savez_compressed(path, **parts)
    forge(vit_copy.path)
    assert findings(vit_copy.path) == ("the reference holds none of PyTorch's tensors",)


def test_an_interval_that_is_too_good(vit_copy):
    path = certificate_path(vit_copy.path)
    stated = Certificate.from_json(path.read_text())
    parity = stated.parity.model_copy(update={"agreement_low": 0.9999})
    path.write_text(stated.model_copy(update={"parity": parity}).to_json())
    assert some(findings(vit_copy.path), "parity: the interval of")


def test_the_command_lists_one_finding_a_line(vit_copy):
    forge(vit_copy.path, edit=lambda model: make_float(model, "blocks.0.attn.qkv.weight"))
    result = CliRunner().invoke(main, ["verify", str(vit_copy.path)])
    first, *lines = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first == f"ovit: error: model.onnx fails: {len(lines)} findings"
    assert "  - blocks.0.attn.qkv.weight: promised int8, the file stores FLOAT" in lines
    assert all(line.startswith("  - ") and len(line) < 250 for line in lines)
