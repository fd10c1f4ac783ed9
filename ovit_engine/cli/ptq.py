"""ovit ptq: int8 without training."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.post_training.ptq import Compared

log = logging.getLogger(__name__)


@click.command(short_help="Quantize a trained model without training, to a verified ONNX file.")
@click.argument("source", type=click.Path(path_type=Path), required=False, metavar="[MODEL.onnx]")
@options.model
@options.model_args
@options.checkpoint
@options.pretrained
@options.data
@options.data_root
@click.option("--recipe", help="Recipe whose quantize is followed; its times play no part. Defaults if left out.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@options.workers
@options.variables
@options.shapes
@options.preprocessing
@click.option("--exclude", multiple=True, help="A layer of MODEL.onnx that stays float: its name, or re:EXPRESSION.")
@click.option(
    "--observer", type=click.Choice(["min_max", "percentile", "mse"]), help="How MODEL.onnx's ranges are taken."
)
@click.option(
    "--search/--no-search",
    default=True,
    help="Where int8 is too far from MODEL.onnx: try other observers, then leave the costliest layers in float.",
)
def ptq(
    source: Path | None,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    checkpoint: Path | None,
    pretrained: bool,
    data: str,
    data_root: Path | None,
    recipe: str | None,
    output: Path,
    workers: int,
    variables: tuple[tuple[str, Any], ...],
    **of_file: Any,
) -> None:
    """Take int8 ranges from some training images, write the ONNX file, and compare it with the float model.

    The model is a timm model with trained weights, or MODEL.onnx, a float file of any tool: then --model only tells
    how images are prepared, if neither the file nor --mean, --std and the like do. For inputs that are not images
    --data names an .npz file with an array [N, ...] for each input, and "labels" if there are classes.
    """
    from ovit_engine.certificate.render import print_certificate

    options.check_weights(checkpoint, pretrained)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {str(output.parent)!r} to write {output.name!r} to")
    for path, kind in ((source, "such file:"), (checkpoint, "checkpoint")):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"no {kind} {str(path)!r}")
    if source is not None:
        if checkpoint is not None or pretrained or recipe is not None or model_args:
            raise click.UsageError(
                "MODEL.onnx has its weights, and a recipe names layers of a PyTorch model: no --checkpoint, "
                "--pretrained, --recipe or --model-arg"
            )
        found = _from_onnx(source, model, data, data_root, output, workers, of_file)
    else:
        from ovit_engine.core.recipe import Recipe
        from ovit_engine.post_training.ptq import DEFAULT

        read = Recipe.parse(DEFAULT) if recipe is None else Recipe.load(recipe, **dict(variables))
        if given := [name for name, value in of_file.items() if value not in (None, (), True)]:
            raise click.UsageError(f"--{given[0].replace('_', '-')} is for MODEL.onnx: a recipe tells it (--recipe)")
        found = _from_weights(read, model, model_args, checkpoint, pretrained, data, data_root, output, workers)
    print_certificate(found.certificate)
    for line in found.lines():
        click.echo(line)


def _from_weights(
    read: "Recipe",
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    checkpoint: Path | None,
    pretrained: bool,
    data: str,
    data_root: Path | None,
    output: Path,
    workers: int,
) -> "Compared":
    from torch.utils.data import DataLoader

    from ovit_engine.core.recipe import Recipe
    from ovit_engine.post_training import ptq as after
    from ovit_engine.post_training.setup import set_up
    from ovit_engine.training.data import config_of, warn_if_classes_differ

    modifier = after.quantize_of(read)
    run = None if checkpoint is None else after.run_of(checkpoint)
    if run is not None and read.training.model is None:  # the run tells the model
        read = replace(read, training=Recipe.parse(run["recipe"]).training)
    read = options.with_options(read, model, model_args)
    bench = set_up(
        read,
        data=data,
        checkpoint=checkpoint,
        pretrained=pretrained,
        device="cpu",
        workers=workers,
        root=data_root,
        config=None if run is None else config_of(run["preprocessing"]),  # as the run's images were
    )
    images = bench.plain()
    if checkpoint is not None and run is None and data != "digits":
        told = ", ".join(f"{key} {images.preprocessing[key]}" for key in ("mean", "std", "crop"))
        log.warning("%s does not tell its preprocessing: timm's of that model is taken (%s)", checkpoint.name, told)
    batches = after.calibration_batches(images.train, modifier.calibration_images, seed=read.training.seed)
    search_data: Any = ()
    if modifier.search is not None:
        search_data = after.search_batches(images.train, modifier.calibration_images, seed=read.training.seed)
    warn_if_classes_differ(images, bench.model(bench.example_inputs).shape[-1])
    return after.ptq(
        bench.model,
        read,
        batches,
        output,
        example_inputs=bench.example_inputs,
        data=DataLoader(images.val, batch_size=64, num_workers=workers),
        search_data=search_data,
        masks=None if run is None else after.masks_of(run, bench.model),
        preprocessing=images.preprocessing,
    )


def _from_onnx(
    source: Path,
    model: str | None,
    data: str,
    data_root: Path | None,
    output: Path,
    workers: int,
    of_file: Mapping[str, Any],
) -> "Compared":
    from torch.utils.data import DataLoader

    from ovit_engine.post_training.onnx_graph import read
    from ovit_engine.post_training.onnx_images import classes_of, image_config, read_inputs
    from ovit_engine.post_training.ptq import calibration_batches
    from ovit_engine.post_training.ptq_onnx import IMAGES, Batch, ptq_onnx
    from ovit_engine.training.data import load_data, warn_if_classes_differ

    proto, shapes = read(source), dict(of_file["shapes"])
    batches: Sequence[Batch]
    compared: Iterable[Any]
    told: Mapping[str, Any] = {}
    if data.endswith(".npz"):
        batches, compared = read_inputs(proto, Path(data))
    else:
        config = image_config(proto, source.name, model, data, options.preprocessing_of(of_file), shapes)
        images = load_data(data, config=config, root=data_root)
        warn_if_classes_differ(images, classes_of(proto))
        batches = [batch.numpy() for (batch,) in calibration_batches(images.train, IMAGES)]
        compared, told = DataLoader(images.val, batch_size=64, num_workers=workers), images.preprocessing
    return ptq_onnx(
        source,
        output,
        batches,
        data=compared,
        preprocessing=told,
        shapes=shapes,
        exclude=of_file["exclude"],
        observer=of_file["observer"],
        search=of_file["search"],
    )
