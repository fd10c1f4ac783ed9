"""A certificate as one self-contained page: no script, nothing from a network."""

from __future__ import annotations

from pathlib import Path

from ovit_engine.certificate.model import Certificate
from ovit_engine.certificate.render import LAYER_COLUMNS, fact_rows, layer_rows
from ovit_engine.certificate.sparse_cores import READINESS_COLUMNS, from_facts, has_2_4, matrices, readiness_row
from ovit_engine.utils.templates import render_html


def to_html(certificate: Certificate) -> str:
    """Return the whole page, UTF-8 text. It shows the certificate; only `ovit verify` checks it."""
    names = dict.fromkeys([*certificate.ops, *certificate.runtime_ops])
    sparse = matrices(certificate) if has_2_4(certificate) else ()
    return render_html(
        Path(__file__).with_name("certificate.html"),
        title=f"Certificate of {certificate.file}",
        certificate=certificate,
        facts=fact_rows(certificate),
        layer_columns=LAYER_COLUMNS,
        layers=layer_rows(certificate),
        readiness_columns=READINESS_COLUMNS,
        readiness=[readiness_row(from_facts(layer)) for layer in sparse],
        operators=[(name, certificate.ops.get(name, 0), certificate.runtime_ops.get(name, 0)) for name in names],
        hashes=[
            ("file", certificate.sha256),
            ("recipe", certificate.recipe_sha256),
            (f"{certificate.reference}'s outputs", certificate.reference_sha256),
        ],
    )
