"""A certificate for people."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ovit_engine.certificate.model import INTEGER_KERNELS, Certificate, Latency, count_weights
from ovit_engine.certificate.sparse_cores import (
    READINESS_COLUMNS,
    SparseLayer,
    from_facts,
    has_2_4,
    matrices,
    readiness_row,
)
from ovit_engine.utils.console import table_console

_NO_RECIPE = hashlib.sha256(b"").hexdigest()


def print_certificate(certificate: Certificate, console: Console | None = None) -> None:
    """Print everything in a certificate for people: in colour on a terminal, plain elsewhere."""
    (console or table_console()).print(certificate_tables(certificate))


def certificate_tables(certificate: Certificate) -> RenderableType:
    """Return the tables of `print_certificate`."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in fact_rows(certificate):
        facts.add_row(name, Text(value))
    parts: list[RenderableType] = [facts]
    if certificate.promise.layers:
        parts += [Text(), _layers(certificate)]
    if has_2_4(certificate):
        parts += [Text(), readiness_table(map(from_facts, matrices(certificate)))]
    parts += [Text(f"note: {note}", style="yellow") for note in certificate.notes]
    return Group(*parts)


def fact_rows(certificate: Certificate) -> list[tuple[str, str]]:
    """What holds for the file as a whole: name and value."""
    rows = [
        ("file", f"{certificate.file}  sha256 {certificate.sha256[:16]}  opset {certificate.opset}"),
        ("recipe", recipe_text(certificate)),
        ("size", sizes_text(certificate)),
        ("inputs", ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in certificate.inputs.items())),
        (
            "sparsity",
            f"{certificate.sparsity:.2%} of {count_weights(certificate.pruned):,} pruned weights, "
            f"{certificate.total_sparsity:.2%} of all {count_weights(certificate.layers):,}",
        ),
        (
            "int8",
            f"{certificate.int8_share:.1%} of all weights, {len(certificate.quantized)} layers; "
            f"{certificate.other_numbers:,} numbers besides weights (biases, norms, embeddings, scales)",
        ),
        ("kernels", f"{certificate.integer_kernels} integer kernels in ONNX Runtime: {_kernels(certificate)}"),
        ("parity", parity_text(certificate)),
    ]
    if certificate.manifest:
        rows.insert(5, ("removed", removed_text(certificate)))
    if certificate.tokens is not None:
        rows.insert(4, ("tokens", str(certificate.tokens)))
    if certificate.macs is not None:
        rows.insert(4, ("multiply-adds", f"{macs_text(certificate.macs)} an image, zeros counted in full"))
    if certificate.accuracy is not None:
        hits = certificate.accuracy
        rows.append(
            ("accuracy", f"{hits.file:.2%} top-1, {certificate.reference} {hits.pytorch:.2%} ({hits.images} images)")
        )
    if certificate.preprocessing:
        rows.append(("preprocessing", ", ".join(f"{key} {value}" for key, value in certificate.preprocessing.items())))
    rows += [("latency", _latency(row)) for row in certificate.latency]
    machine = certificate.machine
    rows.append(("machine", f"{machine.cpu}, {machine.cores} cores, int8: {' '.join(machine.int8) or 'none'}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in certificate.versions.items())))
    return rows


def _layers(certificate: Certificate) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    promised = {layer.name for layer in certificate.promise.layers}
    rows = [row for row in layer_rows(certificate) if row[0] in promised]
    for column, cells in zip(LAYER_COLUMNS, zip(LAYER_COLUMNS, *rows, strict=True), strict=True):
        # where the terminal is narrow the last column is cut: the kernels are counted in full above
        width = None if column == LAYER_COLUMNS[-1] else max(map(len, cells))
        table.add_column(column, no_wrap=True, min_width=width, justify="right" if column == "zeros" else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def readiness_table(
    layers: Iterable[SparseLayer], columns: Mapping[str, Callable[[SparseLayer], str]] | None = None
) -> Table:
    """Which layers sparse tensor cores can take, a row each; ``columns`` adds a cell a layer under each heading."""
    columns = columns or {}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in (*READINESS_COLUMNS[:-1], *columns):
        table.add_column(column, no_wrap=True)
    table.add_column(READINESS_COLUMNS[-1])
    for layer in layers:
        *cells, verdict = readiness_row(layer)
        table.add_row(*(Text(cell) for cell in (*cells, *(of(layer) for of in columns.values()), verdict)))
    return table


LAYER_COLUMNS = ("weight", "shape", "type", "zeros", "pattern", "kernel")


def layer_rows(certificate: Certificate) -> list[tuple[str, ...]]:
    """A row of LAYER_COLUMNS for each weight of the file."""
    patterns = {layer.name: layer.pattern for layer in certificate.promise.layers}
    rows: list[tuple[str, ...]] = []
    for layer in certificate.layers:
        pattern = patterns.get(layer.name, "-")
        rows.append(
            (
                layer.name,
                "x".join(str(size) for size in layer.shape),
                layer.dtype,
                f"{layer.sparsity:.2%}",
                pattern if isinstance(pattern, str) else f"block {pattern['block']}",
                certificate.kernels.get(layer.name, "float"),
            )
        )
    return rows


def removed_text(certificate: Certificate) -> str:
    """What is said of parts that are not in the file, and so can't be measured."""
    text = f"{certificate.manifest} are left, as the run said: a file can't show what it lacks"
    if certificate.dead:
        text += (
            f"; with {certificate.dead:,} weights that are said to have left as dead, "
            f"{certificate.sparsity_with_dead:.2%} of the pruned ones are zero"
        )
    return text


def sizes_text(certificate: Certificate) -> str:
    """Raw and compressed sizes beside the bound."""
    parts = [size_text(certificate.bytes), f"{size_text(certificate.gzip_bytes)} by gzip -6"]
    if certificate.zstd_bytes is not None:
        parts.append(f"{size_text(certificate.zstd_bytes)} by zstd -12")
    stored, bound = size_text(certificate.weight_bytes), size_text(certificate.weight_entropy_bytes)
    return f"{', '.join(parts)}; weights {stored}, at their entropy {bound}"


def recipe_text(certificate: Certificate) -> str:
    """Name and hash of the recipe; a file can be written without one."""
    name = certificate.recipe_name or "-"
    if certificate.recipe_sha256 == _NO_RECIPE:
        return f"{name}, without the text of a recipe"
    return f"{name}  sha256 {certificate.recipe_sha256[:16]}"


def parity_text(certificate: Certificate) -> str:
    """Agreement with its interval, cosine and largest error in words."""
    parity = certificate.parity
    source = "images" if parity.source == "data" else "random inputs"
    return (
        f"{parity.agreement:.2%} same argmax as {certificate.reference} on {parity.images} {source} "
        f"(95 % interval {parity.agreement_low:.2%} to {parity.agreement_high:.2%}), "
        f"cosine {parity.cosine:.5f}, largest error {parity.max_error:.2%} of the largest logit"
    )


def _latency(row: Latency) -> str:
    against = "" if row.ratio is None else f", {row.ratio.describe()} against {row.baseline}"
    return (
        f"{row.file}: {row.median * 1e3:.3f} ms ({row.low * 1e3:.3f}-{row.high * 1e3:.3f}) a batch of {row.batch_size}"
        f", {row.throughput:.0f} images/s, {row.threads} thread(s){against}"
    )


def _kernels(certificate: Certificate) -> str:
    found = [f"{count} {op}" for op, count in certificate.runtime_ops.items() if op in INTEGER_KERNELS]
    return ", ".join(found) or "none"


def macs_text(count: int) -> str:
    """Multiply-adds as a reader takes them in."""
    for scale, letter in ((1e9, "G"), (1e6, "M")):
        if count >= scale:
            return f"{count / scale:.2f} {letter}"
    return f"{count:,}"


def size_text(count: int) -> str:
    """Bytes as a reader takes them in."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
