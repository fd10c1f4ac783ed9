"""ovit verify: is a file still what its certificate says?"""

from pathlib import Path
from typing import Any

import click

from ovit_engine.cli import options


@click.command(short_help="Measure a certificate again, from the file alone.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", help="Measure parity and accuracy on these images again, not on those kept beside the file.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
@click.option("--signature", type=options.EXISTING, metavar="SIG", help="Check this signature first.")
@click.option("--public-key", type=options.EXISTING, metavar="KEY", help="Public key of the signature (PEM).")
@options.certificate_chain
def verify(
    file: Path,
    data: str | None,
    data_root: Path | None,
    signature: Path | None,
    public_key: Path | None,
    certificate_chain: tuple[Path, ...],
) -> None:
    """Measure everything in the certificate of FILE again, from the file alone.

    With --signature also check that FILE, its certificate and its reference are those that were signed.
    """
    from ovit_engine.certificate.render import print_certificate
    from ovit_engine.certificate.signing import verify_signature
    from ovit_engine.certificate.verify import verify_file

    if (signature is not None) != bool(public_key or certificate_chain) or (public_key and certificate_chain):
        raise click.UsageError("--signature takes either --public-key or --certificate-chain, and these need it")
    if signature is not None:
        verify_signature(file, signature, key=public_key, chain=certificate_chain)
    certificate = verify_file(file, data=None if data is None else images_for(file, data, data_root))
    print_certificate(certificate)
    click.echo(f"{file} is what its certificate says")
    if signature is not None:
        click.echo(f"{signature} is a valid signature of it, its certificate and its reference")


def images_for(file: Path, data: str, root: Path | None) -> Any:
    """The validation images of `data`, prepared as the file's metadata say."""
    from torch.utils.data import DataLoader

    from ovit_engine.certificate.measure import Provenance
    from ovit_engine.certificate.stored import load_onnx
    from ovit_engine.training.data import config_of, load_data

    config = config_of(Provenance.read(load_onnx(file)).preprocessing)
    return DataLoader(load_data(data, config=config, root=root).val, batch_size=64)
