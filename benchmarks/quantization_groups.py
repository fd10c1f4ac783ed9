"""What each group of `quantize` costs and gains after training: agreement with float, speed in ONNX Runtime.

    python benchmarks/quantization_groups.py --checkpoint runs/digits_vit_dense     # the demo model, real images
    python benchmarks/quantization_groups.py --model deit_small_patch16_224         # random weights, noise: speed

Speed is the ratio to the float file in paired rounds; agreement and cosine are those of the file with the float model.
"""

import argparse
import copy
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ovit_engine import Recipe
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.certificate.kernels import INTEGER_KERNELS, count_ops, open_session, run_outputs, runtime_graph
from ovit_engine.certificate.parity import compare, take_sample
from ovit_engine.export.writer import write_onnx
from ovit_engine.post_training import ptq as after
from ovit_engine.quant import bake
from ovit_engine.training.checkpoint import load_weights
from ovit_engine.training.data import load_data
from ovit_engine.training.models import make_model

GROUPS = {
    "default": "{}",
    "default, gpu": "{preset: gpu}",
    "+ head": "{groups: [linear, conv, head]}",
    "+ patch_embed": "{groups: [linear, conv, patch_embed]}",
    "+ attention": "{groups: [linear, conv, attention]}",
    "+ layer_norm": "{groups: [linear, conv, layer_norm]}",
    "all": "{groups: [linear, conv, patch_embed, head, attention, layer_norm]}",
}
OBSERVERS = {
    **{f"activations {name}": f"{{activations: {{observer: {name}}}}}"
       for name in ("min_max", "moving_average", "percentile", "mse")},
    "percentile 99.9": "{activations: {observer: percentile, percentile: 99.9}}",
    "weights mse": "{weights: {observer: mse}}",
    "weights a tensor": "{weights: {per: tensor}}",
    "7 bits": "{weights: {bits: 7}}",
    "smooth 0.5": "{ptq: {smooth: 0.5}}",
    "bias correction": "{ptq: {bias_correction: true}}",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a run of ovit train on the digits")
    source.add_argument("--model", help="a timm model with random weights")
    parser.add_argument("--observers", action="store_true", help="observers and corrections instead of groups")
    parser.add_argument("--images", type=int, default=64, help="of noise, with --model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    model, batches, data, example = from_run(arguments.checkpoint) if arguments.checkpoint else random(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "float.onnx"
        write_onnx(copy.deepcopy(model), example, dense)
        sample = take_sample(data, [tuple(example.shape)], [np.float32])
        exact = run_outputs(open_session(dense), sample.inputs)
        files: dict[str, Path] = {}
        for index, (name, options) in enumerate((OBSERVERS if arguments.observers else GROUPS).items()):
            path = Path(folder) / f"{index}.onnx"
            rounded = copy.deepcopy(model)
            quantize = after.quantize_of(Recipe.parse(f"modifiers: [{{quantize: {options}}}]"))
            quantize.quantize(rounded, batches)
            # not through the gate: a random network turns one rounding level into another answer
            write_onnx(bake(rounded), example, path)
            logits = run_outputs(open_session(path), sample.inputs)
            parity = compare(logits, exact, sample.source)
            kernels = sum(count for op, count in count_ops(runtime_graph(path)).items() if op in INTEGER_KERNELS)
            top1 = "" if sample.labels is None else f"top-1 {(logits.argmax(1) == sample.labels).mean():.2%}  "
            files[name] = path
            print(
                f"{name:28} agreement {parity.agreement:.2%}  cosine {parity.cosine:.5f}  {top1}"
                f"{kernels} integer kernels  {path.stat().st_size / 1e6:.2f} MB",
                flush=True,
            )
        if not arguments.observers:
            speed(files, dense, arguments)


def speed(files: dict[str, Path], dense: Path, arguments: Any) -> None:
    report = bench_files(
        list(files.values()),
        baseline=dense,
        batch_sizes=[arguments.batch_size],
        threads=arguments.threads,
        repeats=arguments.repeats,
    )
    names = {path: name for name, path in files.items()} | {dense: "float"}
    for row in report.rows:
        verdict = "" if row.ratio is None else row.ratio.describe()
        print(f"{names[row.path]:28} {row.median * 1e3:9.3f} ms  {verdict}")
    print(f"{report.machine.cpu}, int8: {' '.join(report.machine.int8)}, {report.threads} thread(s), "
          f"batch {arguments.batch_size}, {report.repeats} paired rounds")  # fmt: skip


def from_run(checkpoint: Path) -> Any:
    run = after.run_of(checkpoint)
    assert run is not None
    model = make_model(Recipe.parse(run["recipe"]).training)
    load_weights(model, checkpoint)
    images = load_data("digits")
    held_out = torch.utils.data.DataLoader(images.val, batch_size=64)
    return model.eval(), after.calibration_batches(images.train, 256), held_out, torch.zeros(1, 1, 8, 8)


def random(arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # trained gains differ by more than a factor of ten
                module.weight.copy_(torch.exp(0.7 * torch.randn_like(module.weight)))
    images = torch.randn(arguments.images, 3, 224, 224)
    batches = [(batch,) for batch in images.split(16)]
    return model, batches, [(batch, None) for batch in itertools.chain(*batches)], images[:1]


if __name__ == "__main__":
    main()
