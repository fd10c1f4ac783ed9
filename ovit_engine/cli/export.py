"""ovit export: from a run's checkpoint to a verified ONNX file."""

from pathlib import Path

import click

from ovit_engine.cli import options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--data", help="What parity and accuracy are measured on; the run's own data if left out.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
@click.option(
    "--baseline",
    "baselines",
    type=click.Path(path_type=Path),
    multiple=True,
    help="ONNX file to measure latency against, for the certificate: the dense float file, the dense int8 file.",
)
@click.option(
    "--sign",
    "key",
    type=options.EXISTING,
    metavar="KEY",
    help="Sign the file, its certificate and its reference with this private key (PEM, elliptic curve).",
)
@click.option(
    "--sign-certificate", type=options.EXISTING, metavar="CERT", help="Certificate of that key, for the signature."
)
@options.certificate_chain
def export(
    checkpoint: Path,
    output: Path,
    data: str | None,
    data_root: Path | None,
    baselines: tuple[Path, ...],
    key: Path | None,
    sign_certificate: Path | None,
    certificate_chain: tuple[Path, ...],
) -> None:
    """Write the ONNX file of a finished run and its certificate. CHECKPOINT is a run's folder or a .pt file of it."""
    import torch
    from torch.utils.data import DataLoader

    from ovit_engine.certificate import signing
    from ovit_engine.certificate.render import print_certificate
    from ovit_engine.training.data import config_of, load_data, warn_if_classes_differ
    from ovit_engine.training.runs import restore

    if key is None and (sign_certificate is not None or certificate_chain):
        raise click.UsageError("certificates belong to a signature: name the key with --sign")
    signer = None if key is None else signing.make_signer(key, sign_certificate, certificate_chain)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {str(output.parent)!r} to write {output.name!r} to")
    for baseline in baselines:
        if not baseline.is_file():
            raise FileNotFoundError(f"no such file: {baseline}")
    run = restore(checkpoint)
    if not run.engine.finished:
        epochs = run.engine.recipe.training.epochs
        raise ValueError(
            f"the run is at epoch {run.epoch} of {epochs}: go on with ovit train --resume {checkpoint}, then export"
        )
    images = load_data(data or run.data, config=config_of(run.preprocessing), root=data_root)
    with torch.no_grad():
        warn_if_classes_differ(images, run.model.eval()(torch.zeros(1, *run.preprocessing["size"])).shape[-1])
    certificate = run.engine.export(
        output,
        torch.zeros(1, *run.preprocessing["size"]),
        data=DataLoader(images.val, batch_size=64),
        preprocessing=run.preprocessing,
    )
    if baselines:
        from ovit_engine.analysis.certified_latency import add_latency

        certificate = add_latency(output, baselines)
    print_certificate(certificate)
    if signer is not None:
        click.echo(f"signed: {signing.sign_file(output, signer)}")
