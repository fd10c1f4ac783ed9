"""ovit lint: which layers the sparse tensor cores of a GPU can take."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.analysis.sparse_table import SparseTable
    from ovit_engine.certificate.sparse_cores import SparseLayer, TensorRTChoice
    from ovit_engine.engine import Engine

UNMEASURED = "rules only: whether 2:4 makes a layer faster, no one knows before it is measured on the GPU"


@click.command(short_help="Tell which layers sparse tensor cores can take.")
@click.argument("target", metavar="RECIPE|FILE.onnx")
@click.option(
    "--trt-log", type=click.Path(path_type=Path), help="What trtexec --verbose printed: adds what TensorRT chose."
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="What ovit bench --device cuda --output wrote: adds from how many rows on 2:4 was faster there.",
)
@options.model
@options.model_args
@options.variables
def lint(
    target: str,
    trt_log: Path | None,
    measured: Path | None,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    variables: tuple[tuple[str, Any], ...],
) -> None:
    """Tell of each layer of a file or of a recipe's model whether NVIDIA's sparse tensor cores can take it, or why not.

    For a file also the trtexec line that builds it, and with --trt-log what TensorRT chose. Rules of shape, type and
    pattern decide what can run sparse; whether it is faster for it only a measurement tells, which --measured reads.
    """
    from ovit_engine.analysis.sparse_table import read_table
    from ovit_engine.certificate.render import readiness_table
    from ovit_engine.certificate.sparse_cores import total_line, trtexec_line
    from ovit_engine.utils.console import table_console

    is_file = Path(target).suffix == ".onnx"
    if trt_log is not None and not is_file:
        raise click.UsageError("--trt-log goes with the ONNX file that trtexec read")
    table = None if measured is None else read_table(measured)
    lines = [] if table else [UNMEASURED]
    if is_file:
        layers, inputs = of_file(Path(target))
        lines.append(trtexec_line(target, inputs, int8=any(layer.weight == "INT8" for layer in layers)))
    else:
        from ovit_engine.cli.validate import prepared
        from ovit_engine.core.recipe import Recipe

        layers = list(of_recipe(prepared(Recipe.load(target, **dict(variables)), model, model_args)))
    console = table_console()
    columns: dict[str, Callable[[SparseLayer], str]] = {}
    if trt_log is not None:
        choice = _choice(trt_log)
        columns["TensorRT"] = lambda layer: choice.of(layer.node)
    if table is not None:
        columns[f"measured on {table.device}"] = lambda layer: _measured(layer, table)
    console.print(readiness_table(layers, columns))
    for line in (total_line(layers), *lines):
        console.print(line, soft_wrap=True)


def _measured(layer: "SparseLayer", table: "SparseTable") -> str:
    """Whether 2:4 was faster for a weight of this shape and type; nothing is guessed of other shapes."""
    even = table.find(layer.out, layer.k, "int8" if layer.weight in ("INT8", "UINT8") else "float16")
    return "-" if even is None else even.describe()


def _choice(log: Path) -> "TensorRTChoice":
    from ovit_engine.certificate.sparse_cores import read_trt_log

    if not log.is_file():
        raise FileNotFoundError(f"no such file: {log}")
    try:
        return read_trt_log(log.read_text(errors="replace"))
    except ValueError as error:
        raise ValueError(f"{str(log)!r}: {error}") from None


def of_file(path: Path) -> "tuple[list[SparseLayer], dict[str, tuple[int | str, ...]]]":
    """The layers of any ONNX file with their weights measured, and its inputs."""
    from ovit_engine.certificate import Promise
    from ovit_engine.certificate.measure import input_shapes
    from ovit_engine.certificate.sparse_cores import from_facts
    from ovit_engine.certificate.stored import load_onnx
    from ovit_engine.certificate.weights import measure_layers
    from ovit_engine.export.module_names import name_by_module

    model = load_onnx(path)
    name_by_module(model)
    layers = [from_facts(facts) for facts in measure_layers(model, Promise(), {})]
    if not layers:
        raise ValueError(f"{str(path)!r} has no MatMul, Gemm or Conv that reads a weight")
    return layers, input_shapes(model)


def of_recipe(engine: "Engine") -> "Iterable[SparseLayer]":
    """The Linear and Conv2d layers of a prepared engine as they will be in the file."""
    import torch
    from torch import nn

    from ovit_engine.certificate.sparse_cores import SparseLayer, group_count
    from ovit_engine.masking.parameters import clean_name
    from ovit_engine.masking.targets import find_slots
    from ovit_engine.pruning.patterns import NM
    from ovit_engine.quant import FakeQuantize

    sparse: set[str] = set()
    for modifier in engine.modifiers:
        pattern = getattr(modifier, "pattern", None)
        if isinstance(pattern, NM) and pattern.group == 4 and pattern.keep <= 2:
            sparse |= {slot.name for slot in find_slots(engine.model, getattr(modifier, "targets", None) or [])}
    types = {torch.int8: "INT8", torch.uint8: "UINT8"}
    for path, module in engine.model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        name, shape = clean_name(f"{path}.weight".lstrip(".")), module.weight.shape
        weight, activation = (getattr(module, f"{kind}_quantizer", None) for kind in ("weight", "input"))
        grid = weight.grid if isinstance(weight, FakeQuantize) else None
        seen = activation.grid if isinstance(activation, FakeQuantize) else None
        fits = shape[1] % 4 == 0
        yield SparseLayer(
            name=name,
            out=shape[0],
            k=shape[1],
            weight="FLOAT" if grid is None else types[grid.dtype],
            activation=None if seen is None else types[seen.dtype],
            weight_symmetric=grid is None or grid.symmetric,
            activation_symmetric=seen is None or seen.symmetric,
            broken=None if not fits else 0 if name in sparse else group_count(shape),
            groups=group_count(shape),
        )
