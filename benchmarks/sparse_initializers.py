"""Does ONNX Runtime win anything from ONNX sparse initializers? File size, memory, load and run time of one weight.

python benchmarks/sparse_initializers.py [--size 4096] [--sparsity 0.75]
"""

import argparse
import subprocess
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def model(weight: np.ndarray, *, sparse: bool) -> bytes:
    """x @ weight, an int8 weight behind DequantizeLinear."""
    where = np.flatnonzero(weight).astype(np.int64)
    values = numpy_helper.from_array(weight.reshape(-1)[where], "w")
    stored = [helper.make_sparse_tensor(values, numpy_helper.from_array(where, "i"), weight.shape)] if sparse else []
    dense = [] if sparse else [numpy_helper.from_array(weight, "w")]
    nodes, name = [], "w"
    if weight.dtype == np.int8:
        dense += [numpy_helper.from_array(np.float32(0.01), "s"), numpy_helper.from_array(np.int8(0), "z")]
        nodes, name = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"])], "f"
    nodes.append(helper.make_node("MatMul", ["x", name], ["y"]))
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", len(weight)]) for end in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], dense, sparse_initializer=stored)
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    ).SerializeToString()
    return content


def resident() -> float:
    """MB that this process holds (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def measure(kind: str, form: str, size: int, sparsity: float) -> None:
    """One form in a process of its own, so that memory is its own."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(size, size)).astype(np.float32)
    weight[rng.random((size, size)) < sparsity] = 0
    if kind == "int8":
        weight = np.clip(np.round(weight * 40), -127, 127).astype(np.int8)
    content = model(weight, sparse=form == "sparse")
    del weight
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    before, start = resident(), time.perf_counter()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - start
    image = {"x": np.ones((1, size), np.float32)}
    times = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, image)
        times.append(time.perf_counter() - start)
    print(
        f"{kind:8} {form:7} file {len(content) / 1e6:7.1f} MB   memory +{resident() - before:6.1f} MB   "
        f"load {loaded:5.2f} s   run {np.median(times) * 1e3:6.2f} ms"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(*given.one, given.size, given.sparsity)
    else:
        for kind in ("float32", "int8"):
            for form in ("dense", "sparse"):
                flags = ["--size", str(given.size), "--sparsity", str(given.sparsity)]
                subprocess.run([sys.executable, __file__, "--one", kind, form, *flags], check=True)
