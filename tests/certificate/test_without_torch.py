"""A machine that only verifies: onnx, onnxruntime and NumPy, no PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# an import of one of these ends the process
BLOCKED = [
    "torch",
    "timm",
    "onnxscript",
    "onnx_ir",
    "torchvision",
    "neural_compressor",
    "safetensors",
    "scipy",
    "sklearn",
]


def run_blocked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`ovit ARGUMENTS` in a process that cannot import what belongs to training."""
    code = (
        f"import sys, runpy; blocked = {BLOCKED}\n"
        "for name in blocked: sys.modules[name] = None\n"
        f"sys.argv = ['ovit', *{[str(a) for a in arguments]}]\n"
        "runpy.run_module('ovit_engine', run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_the_block_blocks():
    result = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['torch'] = None; from ovit_engine import Engine"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert "torch" in result.stderr


@pytest.mark.parametrize("kind", ["vit", "convnet"])
def test_verify_needs_no_torch(kind, request):
    file = request.getfixturevalue(kind)
    result = run_blocked("verify", file.path)
    assert result.stderr == ""
    assert "is what its certificate says" in result.stdout


def test_verify_finds_a_lie_without_torch(vit_copy):
    content = bytearray(vit_copy.path.read_bytes())
    content[len(content) // 2] ^= 1
    vit_copy.path.write_bytes(content)
    result = run_blocked("verify", vit_copy.path)
    assert result.returncode == 1
    assert result.stderr.startswith("ovit: error: model.onnx fails: ")
    assert "sha256 differs" in result.stderr
