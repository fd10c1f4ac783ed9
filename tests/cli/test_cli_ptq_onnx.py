"""`ovit ptq FILE.onnx`: what the command line says of the images and inputs of a file of another tool."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from ovit_engine.certificate.verify import verify_file
from ovit_engine.training.arrangement import arrangement
from ovit_engine.training.data import config_of, load_data
from tests.cli.conftest import Ovit

COLORS = {"blue": (10, 20, 240), "green": (10, 240, 30), "red": (240, 10, 20)}


@pytest.fixture
def files(ovit: Ovit) -> None:
    """Images of three colors in three classes; a file that takes [batch, H, W, C] in BGR, pixels 0 to 255."""
    for part in ("train", "val"):
        for name, color in COLORS.items():
            folder = Path("images", part, name)
            folder.mkdir(parents=True)
            for index in range(12):
                Image.new("RGB", (8, 8), tuple(max(0, each - index) for each in color)).save(folder / f"{index}.png")
    names = ["blue", "green", "red"]
    assert sorted(COLORS) == names
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("MatMul", ["m", "head"], ["y"]),
    ]
    weight = np.zeros((192, 3), np.float32)
    for channel in range(3):
        weight[channel::3, channel] = 1 / 64
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "h", "w", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
        [
            numpy_helper.from_array(np.array([-1, 192]), "flat"),
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.eye(3, dtype=np.float32), "head"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "bgr.onnx")


ARGUMENTS = ["--shape", "x=1,8,8,3", "--channels", "bgr", "--mean", "0", "--std", str(1 / 255), "--crop", "1"]


@pytest.mark.usefixtures("files")
def test_a_file_of_other_order_sees_its_images_as_it_wants_them(ovit: Ovit) -> None:
    """Mean blue of a blue image is the first of BGR: 100 % accuracy, and 33 % in the wrong order."""
    done = ovit("ptq", "bgr.onnx", "--data", "images", "--output", "int8.onnx", *ARGUMENTS)
    assert done.exit_code == 0, done.output
    assert "accuracy 100.00% float, 100.00% int8" in done.output
    told = json.loads(Path("int8.certificate.json").read_text())["preprocessing"]
    assert told["layout"] == "nhwc"
    assert told["channels"] == "bgr"
    image, label = load_data("images", config=config_of(told)).val[0]
    assert (tuple(image.shape), label) == ((8, 8, 3), 0)
    np.testing.assert_allclose(image[0, 0], COLORS["blue"][::-1], atol=1e-3)
    assert ovit("verify", "int8.onnx", "--data", "images").exit_code == 0
    wrong = ovit("ptq", "bgr.onnx", "--data", "images", "--output", "int8.onnx", *ARGUMENTS[:2], *ARGUMENTS[4:])
    assert "accuracy 33.33% float" in wrong.output


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "leaves sizes of 'x' free ([?, ?, ?, 3]): give them, --shape x=1,SIZE,SIZE,3"),
        (["--shape", "y=1,8,8,3"], "bgr.onnx has no input 'y'; there are x"),
        (["--shape", "x=1,0,8,3"], "'x=1,0,8,3' is not an input with its sizes"),
        (["--shape", "x"], "'x' is not an input with its sizes"),
        ([*ARGUMENTS[:2], "--mean", "0.1,0.2"], "--mean has 2 values, bgr.onnx takes 3 channels"),
        ([*ARGUMENTS[:2], "--std", "0"], "'0' is not positive numbers"),
        ([*ARGUMENTS[:2], "--mean", "nan"], "'nan' is not numbers"),
        ([*ARGUMENTS, "--exclude", "v"], "target 'v' matches no layer of bgr.onnx"),
    ],
)
def test_options_that_do_not_fit(ovit: Ovit, arguments: list[str], told: str) -> None:
    done = ovit("ptq", "bgr.onnx", "--data", "images", "--output", "int8.onnx", *arguments)
    assert done.exit_code != 0
    assert told in " ".join(done.output.split())
    assert len([line for line in done.output.splitlines() if "error" in line]) == 1


@pytest.mark.usefixtures("files")
def test_arrays_are_inputs(ovit: Ovit) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 3
    images = generator.uniform(0, 20, (80, 8, 8, 3)).astype(np.float32)
    images[np.arange(80), :, :, labels] += 200
    np.savez("inputs.npz", x=images, labels=labels)
    done = ovit("ptq", "bgr.onnx", "--data", "inputs.npz", "--shape", "x=1,8,8,3", "--output", "int8.onnx")
    assert done.exit_code == 0, done.output
    assert "accuracy 100.00% float, 100.00% int8" in done.output
    assert verify_file("int8.onnx").parity.images == 40
    np.savez("inputs.npz", image=images)
    done = ovit("ptq", "bgr.onnx", "--data", "inputs.npz", "--shape", "x=1,8,8,3", "--output", "other.onnx")
    assert "'inputs.npz' has no array 'x'; there are image" in done.output


def test_options_of_a_file_are_refused_for_a_checkpoint(ovit: Ovit) -> None:
    done = ovit("ptq", "--model", "vit_tiny_patch16_224", "--data", "digits", "--output", "a.onnx", "--mean", "0.5")
    assert "--mean is for MODEL.onnx: a recipe tells it (--recipe)" in done.output


def test_an_unknown_order_is_an_error() -> None:
    assert arrangement({"channels": "rgb", "layout": "nhwc"}) == {"layout": "nhwc"}
    with pytest.raises(ValueError, match="channels must be rgb or bgr, not 'gbr'"):
        arrangement({"channels": "gbr"})


@pytest.mark.usefixtures("files")
def test_diagnose_takes_another_tools_file_and_how_it_wants_its_images(
    ovit: Ovit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our metadata, and with the float file beside it."""
    ovit("ptq", "bgr.onnx", "--data", "images", "--output", "int8.onnx", *ARGUMENTS)
    model = onnx.load("int8.onnx")
    del model.metadata_props[:]
    onnx.save(model, "other.onnx")
    monkeypatch.setattr(sys.modules["ovit_engine.cli.diagnose"], "_SECONDS", 0)  # the command has that name too
    done = ovit("diagnose", "other.onnx", "--data", "images", "--reference", "bgr.onnx", *ARGUMENTS)
    assert done.exit_code == 0, done.output
    assert "100.00% agree, accuracy 100.00% with bgr.onnx, whose accuracy is 100.00%" in done.output
    assert "diagnose: 2 variants of the file were run" in done.output
    wrong = ovit("diagnose", "other.onnx", "--data", "images", *ARGUMENTS[:2], *ARGUMENTS[4:])
    assert "accuracy 33.33%" in wrong.output
    np.savez("inputs.npz", x=np.random.default_rng(0).uniform(0, 255, (80, 8, 8, 3)).astype(np.float32))
    arrays = ovit("diagnose", "other.onnx", "--data", "inputs.npz", "--shape", "x=1,8,8,3")
    assert "other.onnx on 40 images" in arrays.output
