"""2:4 against dense on a CUDA device, with torch's own kernels, product by product.

Torch compresses a 2:4 weight for cuSPARSELt where it is there and for CUTLASS elsewhere. Products are replayed from a
CUDA graph, so that the GPU is timed and not Python, and walk over copies of the weight: in a network the weights of the
other layers have driven this one out of the cache.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ovit_engine.analysis.layer_shapes import LayerShape
from ovit_engine.analysis.paired_timing import Timer, measure_rounds, paired_ratio, self_noise
from ovit_engine.analysis.sparse_table import ProductRow, SparseTable
from ovit_engine.certificate.machine import versions
from ovit_engine.utils.progress import Progress
from ovit_engine.utils.suggest import suggest

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}

# int8 kernels take whole multiples of rows; torch's dense one more than 16
_INT8_ROWS = 32

_COPIES = 32

_COPIES_BYTES = 2**30

_MIN_SECONDS = 0.001

# an idle GPU runs at a fraction of its clock, and takes a while to rise
_WARM_UP_SECONDS = 0.1

_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2, "int8": 0.0}

Product = Callable[[Tensor], Tensor]


def bench_sparse(
    shapes: Sequence[LayerShape],
    *,
    batch_sizes: Sequence[int] = (1, 8, 64),
    dtypes: Sequence[str] = tuple(DTYPES),
    repeats: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> SparseTable:
    """Time every shape at every batch size in every type, each product once.

    Raises:
        ValueError: torch finds no GPU here, an unknown type, or numbers out of range.
    """
    if repeats < 5 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"need repeats >= 5 and batch sizes >= 1, got {repeats}, {list(batch_sizes)}")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"no type {unknown[0]!r}{suggest(unknown[0], DTYPES)}")
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here: run this where the GPU is, the table can be used anywhere")
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    wanted = sorted({(s.out_features, s.in_features, s.rows * size) for s in shapes for size in batch_sizes})
    products = [(dtype, *product) for dtype in dtypes for product in wanted]
    rows = []
    for index, (dtype, out_features, in_features, count) in enumerate(products):
        if progress is not None:
            progress(f"{dtype} {out_features}x{in_features}", index, len(products))
        product = ProductRow(dtype=dtype, out_features=out_features, in_features=in_features, rows=count)
        rows.append(_measure(product, repeats, generator))
    properties = torch.cuda.get_device_properties(0)
    cusparselt = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return SparseTable(
        device=properties.name,
        capability=(properties.major, properties.minor),
        backend="cutlass" if cusparselt is None else "cusparselt",
        versions={**versions(), "cuda": str(torch.version.cuda), "cusparselt": str(cusparselt or "none")},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        repeats=repeats,
        rows=tuple(rows),
    )


def two_of_four(weight: Tensor) -> Tensor:
    """`weight` [out, in] with the two smallest of four neighbours along `in` zeroed.

    Raises:
        ValueError: `in` is no multiple of 4.
    """
    if weight.shape[1] % 4:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of 4")
    groups = weight.reshape(-1, 4)
    # ties would keep fewer or more than two: the order of a stable sort settles them
    order = groups.abs().to(torch.float32).argsort(dim=1, stable=True)
    return groups.scatter(1, order[:, :2], 0).reshape(weight.shape)


def _measure(product: ProductRow, repeats: int, generator: np.random.Generator) -> ProductRow:
    try:
        timers, launch = _timers(product)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # torch refuses shapes with RuntimeError
        return replace(product, unsupported=(str(error).splitlines() or [type(error).__name__])[0])
    _warm_up(timers)
    seconds = measure_rounds(timers, repeats, generator, min_seconds=_MIN_SECONDS)
    (dense_low, sparse_low), (dense, sparse), (dense_high, sparse_high) = np.quantile(
        seconds[:2], [0.25, 0.5, 0.75], axis=1
    ).tolist()
    return replace(
        product,
        dense=dense,
        dense_quartiles=(dense_low, dense_high),
        sparse=sparse,
        sparse_quartiles=(sparse_low, sparse_high),
        ratio=paired_ratio(seconds[0], seconds[1], generator, noise=self_noise(seconds[0], seconds[2], generator)),
        launch=launch,
    )


def _warm_up(timers: Sequence[Timer]) -> None:
    """Keep the GPU at work: it was idle while the weights were compressed and the graphs captured."""
    end = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < end:
        for timer in timers:
            timer(1)


def _timers(product: ProductRow) -> tuple[list[Timer], Literal["graph", "eager"]]:
    """Timers of the dense, the sparse and again the dense product (how far is it from itself?), and their launch.

    Raises ValueError if the sparse product is not the dense one; torch raises for shapes that it does not support.
    """
    kind, shape = DTYPES[product.dtype], (product.out_features, product.in_features)
    copies = max(1, min(_COPIES, _COPIES_BYTES // (product.out_features * product.in_features * kind.itemsize)))
    weights = [two_of_four(_random(*shape, dtype=kind)) for _ in range(copies)]
    inputs = _random(product.rows, product.in_features, dtype=kind)
    if kind == torch.int8:
        inputs = pad(inputs, (0, 0, 0, -product.rows % _INT8_ROWS))
    dense = [_dense(weight) for weight in weights]
    sparse = [_sparse(weight) for weight in weights]
    _check_equal(dense[0](inputs), sparse[0](inputs), _TOLERANCE[product.dtype])
    try:
        return [_graph_timer(calls, inputs) for calls in (dense, sparse, dense)], "graph"
    except RuntimeError:  # a kernel that can't be captured
        torch.cuda.synchronize()
        return [_event_timer(lambda c=c: _call(c, inputs), len(c)) for c in (dense, sparse, dense)], "eager"  # type: ignore[misc]


def _call(calls: Sequence[Product], inputs: Tensor) -> None:
    for call in calls:
        call(inputs)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device="cuda")
    return torch.randn(shape, dtype=dtype, device="cuda")


def _dense(weight: Tensor) -> Product:
    if weight.dtype == torch.int8:
        return lambda inputs: torch._int_mm(inputs, weight.t())
    return lambda inputs: linear(inputs, weight)


def _sparse(weight: Tensor) -> Product:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*prototype stage.*")
        compressed = torch.sparse.to_sparse_semi_structured(weight)
    if weight.dtype != torch.int8:
        return lambda inputs: linear(inputs, compressed)
    packed, meta = compressed.packed, compressed.meta
    assert packed is not None
    # int32 as the dense product has it: the default of cuSPARSELt is int8, of CUTLASS int32
    if meta is None:
        return lambda inputs: torch._cslt_sparse_mm(packed, inputs.t(), out_dtype=torch.int32).t()
    return lambda inputs: torch._sparse_semi_structured_mm(packed, meta, inputs.t(), out_dtype=torch.int32).t()


def _check_equal(dense: Tensor, sparse: Tensor, tolerance: float) -> None:
    """Raise ValueError where the sparse kernel computed something else; figures of it would mean nothing."""
    error = float((dense.double() - sparse.double()).abs().max() / dense.double().abs().max())
    if not error <= tolerance:
        raise ValueError(f"the sparse product differs from the dense one by {error:.2g} of its largest value")


def _graph_timer(calls: Sequence[Product], inputs: Tensor) -> Timer:
    """Seconds a product by replays of a graph that holds each call once; RuntimeError if it can't be captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels choose their workspace on first use, which capture forbids
        _call(calls, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _call(calls, inputs)
    return _event_timer(graph.replay, len(calls))


def _event_timer(run: Callable[[], object], products: int) -> Timer:
    """CUDA events around the runs; `products` are in each."""

    def timed(loops: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / loops / products

    return timed
