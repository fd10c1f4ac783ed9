"""`ovit ptq`: from weights to a verified int8 file, and how close it is to the float model."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image

from ovit_engine.certificate import Certificate
from ovit_engine.certificate.verify import verify_file
from ovit_engine.training.checkpoint import load_checkpoint
from ovit_engine.training.digits import split_digits
from ovit_engine.training.runs import restore
from tests.cli.conftest import Ovit
from tests.exported_files import table_of

SIZES = ("img_size=8", "patch_size=2", "in_chans=1", "num_classes=10", "embed_dim=32", "depth=2", "num_heads=2")
MODEL = ["--model", "vit_tiny_patch16_224", *(word for size in SIZES for word in ("--model-arg", size))]
# a float model, as learned as a few seconds allow
TRAINED = """
name: short
training:
  model: vit_tiny_patch16_224
  model_args: {img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, embed_dim: 32, depth: 2, num_heads: 2}
  epochs: 20  # after 10, rounding still changes more than 1 % of the answers on some processors
  batch_size: 64
modifiers:
  - cyclic_lr: {max: 4.0e-3, min: 1.0e-4, warmup: 1ep}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from click.testing import CliRunner

    from ovit_engine.cli import main

    folder = tmp_path_factory.mktemp("short")
    (folder / "short.yaml").write_text(TRAINED)
    arguments = [
        "train",
        "--recipe",
        folder / "short.yaml",
        "--data",
        "digits",
        "--output",
        folder / "run",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return folder / "run"


def agreement(output: str) -> float:
    found = re.search(r"([\d.]+)% of 450 images have the same argmax as the float model", output)
    assert found, output
    return float(found[1])


def test_a_run_of_ours_needs_no_recipe(ovit: Ovit, run: Path) -> None:
    """Defaults agree with float on 98 % of the images."""
    done = ovit("ptq", "--data", "digits", "--checkpoint", run, "--output", "int8.onnx")
    assert done.exit_code == 0, done.output
    assert agreement(done.output) >= 98
    certificate = verify_file("int8.onnx")
    assert certificate.int8_share > 0.95
    assert certificate.integer_kernels == 8
    accuracies = re.search(r"accuracy ([\d.]+)% float, ([\d.]+)% int8", done.output)
    assert accuracies
    # counted again, by onnxruntime alone
    _, held_out, _ = split_digits((1, 8, 8), None)
    images = [held_out[index] for index in range(450)]
    session = onnxruntime.InferenceSession("int8.onnx")
    (logits,) = session.run(None, {"input": torch.stack([image for image, _ in images]).numpy()})
    correct = np.mean(logits.argmax(1) == np.array([label for _, label in images]))
    assert f"{correct:.2%}" == f"{accuracies[2]}%"
    assert float(accuracies[1]) > 50


def test_a_recipe_says_how_and_its_times_play_no_part(ovit: Ovit, run: Path) -> None:
    Path("how.yaml").write_text("""
name: how
modifiers:
  - magnitude_prune: {sparsity: 0.5, targets: ["re:.*fc1.weight"]}
  - quantize:
      start: 900ep
      groups: [linear, attention, patch_embed, head]
      preset: gpu
      ptq: {images: 64, smooth: 0.5, bias_correction: true}
""")
    done = ovit("ptq", "--data", "digits", "--checkpoint", run, "--recipe", "how.yaml", "--output", "int8.onnx")
    assert done.exit_code == 0, done.output
    assert "smoothed 4 layers behind 4 LayerNorms" in done.output
    assert "bias correction: 10 layers" in done.output
    assert agreement(done.output) >= 95
    certificate = Certificate.from_json(Path("int8.certificate.json").read_text())
    assert certificate.integer_kernels == 14
    assert certificate.recipe_name == "how"
    assert not any(layer.sparsity > 0.2 for layer in certificate.layers)  # nothing was pruned


def test_zeros_of_a_pruned_run_are_promised(ovit: Ovit, tmp_path: Path) -> None:
    Path("sparse.yaml").write_text(
        TRAINED.replace("epochs: 20", "epochs: 1").replace("warmup: 1ep", "warmup: 2st")
        + '  - magnitude_prune: {pattern: "2:4", targets: ["re:blocks.*fc1.weight"]}\n'
    )
    ovit("train", "--recipe", "sparse.yaml", "--data", "digits", "--output", "run", "--device", "cpu")
    done = ovit("ptq", "--data", "digits", "--checkpoint", "run", "--output", "int8.onnx")
    assert done.exit_code == 0, done.output
    certificate = verify_file("int8.onnx")
    assert {layer.name for layer in certificate.pruned} == {f"blocks.{i}.mlp.fc1.weight" for i in range(2)}
    assert all(layer.broken_groups == 0 and layer.sparsity >= 0.5 for layer in certificate.pruned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--data", "digits", "--output", "nowhere/a.onnx"], "no folder 'nowhere' to write 'a.onnx' to"),
        (["--data", "digits", "--output", "a.onnx"], "no model: name one with --model"),
        (["--data", "digits", "--checkpoint", "lost.pt", "--output", "a.onnx"], "no checkpoint 'lost.pt'"),
        (["--data", "digits", "--recipe", "digits_vit_dense", "--output", "a.onnx"], "has 0 'quantize' modifiers"),
        (["--data", "digits", "--checkpoint", "a.pt", "--pretrained", "--output", "a.onnx"], "not both"),
    ],
)  # fmt: skip
def test_errors_are_one_line(ovit: Ovit, arguments: list[str], message: str) -> None:
    done = ovit("ptq", *arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert not list(Path().glob("*.onnx"))


def test_random_weights_are_told(ovit: Ovit) -> None:
    done = ovit("ptq", *MODEL, "--data", "digits", "--output", "a.onnx")
    assert "warning: the weights are random" in done.output


@pytest.fixture(scope="module")
def float_file(run: Path) -> Path:
    """As another tool would write it: torch's exporter, weights in a second file."""
    model = restore(run).model.eval()
    file = run.parent / "float.onnx"
    images = torch.zeros(2, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (images,), str(file), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert file.with_name("float.onnx.data").exists()
    return file


def test_a_file_of_another_tool(ovit: Ovit, float_file: Path) -> None:
    done = ovit("ptq", float_file, "--data", "digits", "--output", "int8.onnx")
    assert done.exit_code == 0, done.output
    assert "does not tell its preprocessing" not in done.output  # the digits tell theirs
    assert agreement(done.output) >= 98
    certificate = verify_file("int8.onnx")
    words = table_of(certificate)
    assert certificate.reference == "float.onnx"
    assert "same argmax as float.onnx on" in words
    assert "top-1, float.onnx " in words
    assert [layer.name for layer in certificate.layers if not layer.quantized] == [
        "head.weight",
        "patch_embed.proj.weight",
    ]
    assert certificate.integer_kernels == len(certificate.quantized) == 8
    graph = onnx.load("int8.onnx").graph
    weights = [
        tensor for tensor in graph.initializer if len(tensor.dims) > 1 and tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(weights) == 8
    before = float_file.read_bytes()
    done = ovit("ptq", float_file, "--data", "digits", "--output", float_file)
    assert "float.onnx is the float file itself: name another output" in done.output
    assert float_file.read_bytes() == before
    done = ovit("ptq", "int8.onnx", "--data", "digits", "--output", "again.onnx")
    assert "int8.onnx is quantized already (QuantizeLinear): give the float file" in done.output


def test_images_of_another_folder_are_prepared_as_the_runs_were(ovit: Ovit, run: Path) -> None:
    """Also where they are of other classes, which is told."""
    pixels = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b", "c"):
            folder = Path("images", part, name)
            folder.mkdir(parents=True)
            for index in range(12):
                Image.fromarray(pixels.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    done = ovit("ptq", "--data", "images", "--checkpoint", run, "--output", "int8.onnx")
    assert "images has 3 classes, the model has 10: its accuracy means nothing" in done.output
    told = json.loads(Path("int8.certificate.json").read_text())["preprocessing"]
    trained = restore(run).preprocessing
    for key in ("size", "mean", "std", "crop", "interpolation"):
        assert told[key] == trained[key], key
    assert "does not tell its preprocessing" not in done.output
    torch.save(load_checkpoint(run)["model"], "own.pt")  # as a loop of one's own keeps it
    Path("short.yaml").write_text(TRAINED.replace("cyclic_lr: {max: 4.0e-3, min: 1.0e-4, warmup: 1ep}", "quantize: {}"))
    done = ovit("ptq", "--data", "images", "--checkpoint", "own.pt", "--recipe", "short.yaml", "--output", "own.onnx")
    assert "own.pt does not tell its preprocessing: timm's of that model is taken (mean [0.5]" in done.output


def test_a_file_that_loses_too_much_is_not_written(
    ovit: Ovit, float_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges from images that are nothing like the real ones."""
    monkeypatch.setattr(
        "ovit_engine.post_training.ptq.calibration_batches", lambda *args: [(torch.full((32, 1, 8, 8), -0.8),)]
    )
    done = ovit("ptq", float_file, "--data", "digits", "--output", "int8.onnx")
    assert done.exit_code == 1
    assert re.search(r"int8.onnx breaks its promise: \d findings\n- parity:", done.output.replace("  -", "-"))
    assert not Path("int8.onnx").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lost.onnx", [], "no such file: 'lost.onnx'"),
        ("tiny.yaml", [], "'tiny.yaml' is not an ONNX file"),
        ("tiny.yaml", ["--pretrained"], "MODEL.onnx has its weights"),
        (
            "vector.onnx",
            [],
            "vector.onnx takes [0, 4] float32, which are not images: give its inputs, --data inputs.npz",
        ),
        ("fixed.onnx", [], "fixed.onnx takes batches of 4096 only: 1024 at most"),
        ("one.onnx", [], "one.onnx has no MatMul, Gemm or Conv with a weight to quantize, but the last"),
    ],
)
def test_files_that_cannot_be_quantized(ovit: Ovit, name: str, arguments: list[str], message: str) -> None:
    weight = numpy_helper.from_array(np.ones((10, 1, 8, 8), np.float32), "w")
    for file, node, shape in (
        ("vector.onnx", helper.make_node("Relu", ["x"], ["y"]), ["b", 4]),
        ("one.onnx", helper.make_node("Conv", ["x", "w"], ["y"]), ["b", 1, 8, 8]),
        ("fixed.onnx", helper.make_node("Conv", ["x", "w"], ["y"]), [4096, 1, 8, 8]),
    ):
        values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
        graph = helper.make_graph([node], "g", values[:1], values[1:], [weight] if "w" in node.input else [])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    done = ovit("ptq", name, "--data", "digits", "--output", "int8.onnx", *arguments)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
