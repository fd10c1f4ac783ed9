"""What a certificate says that its own reference, or another of its lines, denies. No file need be run for it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ovit_engine.certificate.kernels import INTEGER_KERNELS
from ovit_engine.certificate.model import Certificate, Latency
from ovit_engine.certificate.parity import Reference, accuracy, wilson

# products that a runtime can make integer kernels of
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"}) | INTEGER_KERNELS

# a median of ratios is not the ratio of medians, and verdicts are rounded
_SLACK = 1.1

# images: shares are rounded, and other machines round a level the other way
_PART = 1.0

# as `bench_paired.Ratio.verdict` writes them
_NUMBER = r"\d+\.\d\d"

_VERDICT = re.compile(
    rf"(?:(?P<times>{_NUMBER})x (?P<word>faster|slower)|within noise) "
    rf"\((?P<low>{_NUMBER})-(?P<high>{_NUMBER})x(?:; the baseline varies by \d+%)?\)"
)


def inconsistencies(stated: Certificate, reference: Reference) -> list[str]:
    """What can't be true, a line each."""
    return [
        *_of_accuracy(stated, reference),
        *_of_parity(stated, reference),
        *_of_latency(stated),
        *_of_kernels(stated),
    ]


def _of_accuracy(stated: Certificate, reference: Reference) -> Iterator[str]:
    known = accuracy(reference.logits, reference.logits, reference.labels)
    hits = stated.accuracy
    if (hits is None) != (known is None):
        yield "the certificate and the reference disagree on whether there are labels"
    elif hits is not None and known is not None:
        if hits.images != len(reference.logits) or abs(hits.pytorch - known.pytorch) > 1e-9:
            yield (
                f"accuracy of {stated.reference}: the certificate says {hits.pytorch:.4f}, "
                f"the reference {known.pytorch:.4f}"
            )
        if abs(hits.file - hits.pytorch) > 1 - stated.parity.agreement + 1e-9:
            yield (
                f"accuracy {hits.file:.4f} can't be, with {hits.pytorch:.4f} of {stated.reference} "
                "and the agreement stated"
            )


def _of_parity(stated: Certificate, reference: Reference) -> Iterator[str]:
    count, whole, part = len(reference.logits), stated.parity, stated.parity_stored
    if whole.images != count or whole.source != reference.source:
        yield (
            f"parity speaks of {whole.images} {_kind(whole.source)}images, "
            f"the reference holds {count} {_kind(reference.source)}images"
        )
    for kind, parity in (("parity", whole), ("parity_stored", part)):
        if parity is None:
            continue
        low, high = wilson(parity.agreement, parity.images)
        if abs(parity.agreement_low - low) > 1e-6 or abs(parity.agreement_high - high) > 1e-6:
            yield (
                f"{kind}: the interval of {parity.agreement:.2%} of {parity.images} is {low:.2%}-{high:.2%}, "
                f"the certificate says {parity.agreement_low:.2%}-{parity.agreement_high:.2%}"
            )
    if part is not None:
        agree, of_part = whole.agreement * whole.images, part.agreement * part.images
        if not of_part - _PART <= agree <= of_part + whole.images - part.images + _PART:
            yield (
                f"parity: {whole.agreement:.2%} of {whole.images} images can't agree where {part.agreement:.2%} of the "
                f"{part.images} stored ones do"
            )


def _of_latency(stated: Certificate) -> Iterator[str]:
    """Stated times that contradict themselves: they cannot be measured again on another machine."""
    for row in stated.latency:
        where = f"latency of {row.file} at batch {row.batch_size}"
        if not 0 < row.low <= row.median <= row.high:
            yield f"{where}: the median {row.median} s does not lie within its quartiles {row.low} to {row.high}"
        elif abs(row.throughput * row.median - row.batch_size) > 1e-6 * row.batch_size:
            yield f"{where}: {row.throughput} images/s is not what a median of {row.median} s gives"
        elif (row.baseline is None) != (row.verdict is None):
            yield f"{where}: a verdict and a baseline go together"
        elif row.verdict is not None:
            bases = [r for r in stated.latency if r.baseline is None and (r.file, r.batch_size) == _base_of(row)]
            if not bases:
                yield f"{where}: no row of its baseline {row.baseline}"
            elif not any(_is_possible(row.verdict, base, row) for base in bases):
                ratio = bases[0].median / row.median
                yield f"{where}: {row.verdict!r} is not what the medians give, {ratio:.2f} times as fast"


def _base_of(row: Latency) -> tuple[str | None, int]:
    return row.baseline, row.batch_size


def _is_possible(verdict: str, base: Latency, row: Latency) -> bool:
    """Whether a verdict (`Ratio.verdict`) can come of such times: the ratio of two quartiles bounds that of medians."""
    found = _VERDICT.fullmatch(verdict)
    if found is None:
        return False
    least, most = base.low / row.high / _SLACK, base.high / row.low * _SLACK
    low, high = sorted((float(found["low"]), float(found["high"])))
    if found["word"] is None:
        return low <= most and high >= least
    times = float(found["times"])
    if not low <= times <= high:
        return False
    return least <= (times if found["word"] == "faster" else 1 / times) <= most


def _of_kernels(stated: Certificate) -> Iterator[str]:
    """Kernels belong to the machine that is stated: on another one only their limits are known."""
    kernels = sum(number for op, number in stated.runtime_ops.items() if op in INTEGER_KERNELS)
    if stated.integer_kernels != kernels:
        yield f"integer_kernels is {stated.integer_kernels}, runtime_ops has {kernels}"
    products = sum(number for op, number in stated.ops.items() if op in _PRODUCTS)
    if kernels > products:
        yield f"{kernels} integer kernels can't be, of {products} products in the file"
    integers = {layer.name for layer in stated.quantized}
    for name, kernel in stated.kernels.items():
        if name not in integers or kernel not in INTEGER_KERNELS:
            yield f"{name}: an integer kernel {kernel!r} is stated for what is no int8 weight, or is no such kernel"


def _kind(source: str) -> str:
    return "random " if source == "random" else ""
