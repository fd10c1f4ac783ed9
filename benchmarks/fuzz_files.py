"""Damage ONNX files, certificates and references at random, and read them with verify, lint, ptq and diagnose.

    python benchmarks/fuzz_files.py --damages 500

A damage should give an expected error of one line. Reported are tracebacks of other kinds, crashes of the
process, more than five seconds, more than 1 GB, and damaged files that `verify` accepts.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.certificate import Certificate
from ovit_engine.cli.group import EXPECTED

SECONDS, BYTES = 5, 2**30

KINDS = ("onnx", "certificate", "reference")


def make_files(folder: Path) -> None:
    """Write a small trained network and its int8 file, whose certificate and reference lie beside it."""
    from ovit_engine.post_training.ptq_onnx import ptq_onnx

    rng = np.random.default_rng(0)
    weights = {"c": (8, 3, 3, 3), "f": (8 * 36, 16), "h": (16, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Flatten", ["r"], ["v"]),
        helper.make_node("MatMul", ["v", "f"], ["m"]),
        helper.make_node("MatMul", ["m", "h"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "float.onnx"
    )
    images = rng.standard_normal((64, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "inputs.npz", x=images)
    images = images[:32] * 1.01
    ptq_onnx(folder / "float.onnx", folder / "int8.onnx", [images], data=[(images, None)])


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, swap or overwrite some of it."""
    data, way = bytearray(content), rng.randrange(6)
    place = rng.randrange(len(data))
    if way == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[place:]
    elif way == 2:
        del data[place : place + rng.randrange(1, 64)]
    elif way == 3:
        data[place:place] = data[rng.randrange(len(data)) :][: rng.randrange(1, 64)]
    elif way == 4:
        length = rng.randrange(1, 32)
        other = rng.randrange(len(data))
        data[place : place + length], data[other : other + length] = data[other:][:length], data[place:][:length]
    else:
        data[place : place + 10] = rng.choice(
            (b"\xff" * 10, b"\0" * 10, b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"9" * 10)
        )
    return bytes(data)


def damage_fields(content: bytes, rng: random.Random) -> bytes:
    """Change one field of an ONNX graph to something of its type."""
    model = onnx.load_model_from_string(content)
    graph, way = model.graph, rng.randrange(9)
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    number = rng.choice((-1, 0, 1, 2, 7, 2**31, 2**40, -(2**63)))
    if way == 0 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = number
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = number
    elif way == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = number
    elif way == 2:
        tensor.data_type = rng.randrange(25)
    elif way == 3:
        node.op_type = rng.choice(graph.node).op_type
    elif way == 4 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([name for each in graph.node for name in each.output])
    elif way == 5:
        graph.node.remove(node)
    elif way == 6:
        shape = rng.choice([*graph.input, *graph.output]).type.tensor_type.shape
        rng.choice(shape.dim).dim_value = number
    elif way == 7 and model.metadata_props:
        entry = rng.choice(model.metadata_props)
        entry.value = rng.choice(("", "[" * 5000, "{}", "null", '{"a":' * 3000, entry.value[: len(entry.value) // 2]))
    else:
        model.opset_import[0].version = abs(number) % 2**31
    return model.SerializeToString()


def commands(folder: Path) -> dict[str, Callable[[], Any]]:
    """What reads the files, by the name of the command."""
    from ovit_engine.analysis.diagnose import diagnose_file
    from ovit_engine.certificate.verify import verify_file
    from ovit_engine.cli.lint import of_file
    from ovit_engine.post_training.onnx_graph import read
    from ovit_engine.post_training.onnx_images import read_inputs
    from ovit_engine.post_training.ptq_onnx import ptq_onnx

    def ptq() -> None:
        batches, data = read_inputs(read(folder / "float.onnx"), folder / "inputs.npz")
        ptq_onnx(folder / "float.onnx", folder / "again.onnx", batches, data=data, search=False)

    images = [np.load(folder / "inputs.npz")["x"]]
    return {
        "verify": lambda: verify_file(folder / "int8.onnx"),
        "lint": lambda: of_file(folder / "int8.onnx"),
        "diagnose": lambda: diagnose_file(folder / "int8.onnx", images),
        "ptq": ptq,
    }


def attack(folder: Path, first: int, last: int) -> None:
    """Damage and read; a JSON line for each fault, and one before each damage, for a process that dies."""
    signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    names = {
        "onnx": ("int8.onnx", ("verify", "lint", "diagnose")),
        "float": ("float.onnx", ("ptq", "lint")),
        "certificate": ("int8.certificate.json", ("verify",)),
        "reference": ("int8.reference.npz", ("verify",)),
        "inputs": ("inputs.npz", ("ptq",)),
    }
    run = commands(folder)
    for seed in range(first, last):
        for kind, (file, readers) in names.items():
            path, rng = folder / file, random.Random(f"{seed} {kind}")
            content = path.read_bytes()
            is_graph = kind in ("onnx", "float")
            changed = damage_fields(content, rng) if is_graph and rng.random() < 0.5 else damage(content, rng)
            if changed == content:
                continue
            path.write_bytes(changed)
            try:
                for command in readers:
                    print(json.dumps([seed, kind, command]), flush=True)
                    fault = _fault(command, run[command])
                    if fault == "accepted" and kind == "certificate" and _facts(changed) == _facts(content):
                        continue
                    if fault:
                        print(json.dumps([seed, kind, command, fault]), flush=True)
            finally:
                path.write_bytes(content)


def _facts(content: bytes) -> Any:
    """What a certificate says of its file; not of the machine, and no digits that differ between machines."""
    said = Certificate.from_json(content.decode()).model_dump_json(exclude={"machine", "versions", "notes"})
    return json.loads(said, parse_float=lambda text: round(float(text), 2))


def _late(*_: Any) -> None:
    raise TimeoutError


def _fault(command: str, read: Callable[[], Any]) -> str | None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    fault = None
    signal.alarm(2 * SECONDS)
    try:
        read()
        if command == "verify":
            fault = "accepted"
    except TimeoutError:
        fault = "hangs"
    except EXPECTED as error:
        fault = None if str(error) else f"empty {type(error).__name__}"
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = "" if where is None else f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        fault = f"{type(error).__name__} {str(error)[:80]} {place}"
    finally:
        signal.alarm(0)
    if time.monotonic() - start > SECONDS:
        fault = f"{time.monotonic() - start:.1f} s {fault or ''}"
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"{growth >> 20} MiB more" if growth > BYTES else fault


def main() -> int:
    """Run the attack in processes that may die, and count what they report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=500, help="of each kind of file")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        attack(given.worker, given.first, given.first + given.damages)
        return 0
    faults: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "files")
        folder.mkdir()
        make_files(folder)
        seed, end = given.first, given.first + given.damages
        while seed < end:
            copy = Path(name, f"copy{seed}")
            shutil.copytree(folder, copy)
            arguments = ["--worker", str(copy), "--first", str(seed), "--damages", str(end - seed)]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
            faults += [line for line in lines if len(line) == 4]
            if done.returncode == 0:
                break
            faults.append([*lines[-1][:3], f"the process died ({done.returncode}): {done.stderr[-300:]}"])
            seed = lines[-1][0] + 1
    for fault in faults:
        print(*fault)
    print(f"{given.damages} damages of each kind, {len(faults)} faults")
    for (command, what), count in Counter((line[2], line[3]) for line in faults).most_common():
        print(f"{count:5} {command}: {what}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
