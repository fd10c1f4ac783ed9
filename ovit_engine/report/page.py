"""The report's page: a run's folder as one HTML text without scripts and without a network."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from ovit_engine.analysis.bench_report import BenchReport
from ovit_engine.certificate.render import fact_rows
from ovit_engine.core.capabilities import timeline_rows
from ovit_engine.report.advice import advise
from ovit_engine.report.figures import draw_scatter, draw_timeline
from ovit_engine.report.run_folder import OnnxFile, RunFolder
from ovit_engine.report.timeline import timeline_of
from ovit_engine.report.tradeoff import metric_of, over_latency, over_size
from ovit_engine.report.words import megabytes, percent
from ovit_engine.utils.templates import render_html

SECTIONS = (
    ("next", "What to try next"),
    ("timeline", "Timeline"),
    ("layers", "Sparsity per layer"),
    ("tradeoff", "Accuracy over size and latency"),
    ("certificate", "Certificate"),
    ("recipe", "Recipe"),
)
# figures are drawn for both widths, so that text keeps its size
_WIDE, _HALF, _NARROW = 1080.0, 500.0, 330.0
_MOST_ROWS = 200
_STATES = {
    True: ("same", "The file has the bytes that were measured."),
    False: ("other", "The file is not the one that was measured: its bytes have changed."),
    None: ("gone", "The certificate is here, the file is not."),
}


def render_page(run: RunFolder) -> str:
    """Return the whole page. Equal folders give equal pages; whatever comes from files is escaped."""
    course, latency = timeline_of(run), over_latency(run)
    charts = [chart for chart in (over_size(run), latency) if chart is not None]
    return render_html(
        Path(__file__).with_name("report.html"),
        title=run.path.resolve().name if run.recipe is None else run.recipe.name,
        description="" if run.recipe is None else run.recipe.description,
        sections=SECTIONS,
        tiles=_tiles(run),
        problems=run.problems,
        advice=advise(run),
        timeline=None if course is None else [draw_timeline(course, width) for width in (_WIDE, _NARROW)],
        layers=run.layers,
        layers_note=_layers_note(run),
        charts=[[draw_scatter(chart, width) for width in (_HALF, _NARROW)] for chart in charts],
        has_latency=latency is not None,
        benches=[_bench(bench) for bench in run.benches],
        tables=run.tables,
        files=[_file(run, file) for file in run.files],
        recipe=None if run.training is None else run.training.recipe_text,
        plan=_plan(run),
        folder=str(run.path),
        version=metadata.version("ovit-engine"),
        percent=percent,
    )


def _tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the numbers that people look for first: (what, how much, of what)."""
    tiles = []
    if run.training is not None and run.measured:
        step, value = run.measured[-1]
        share = 0 <= value <= 1
        epoch = f"after epoch {run.training.clock.epochs(step):g}"
        tiles.append((run.metric, percent(value) if share else f"{value:.4g}", epoch))
    elif run.epochs:
        tiles.append(("accuracy", percent(run.epochs[-1].accuracy), f"after epoch {run.epochs[-1].epoch}"))
    total = sum(layer.numel for layer in run.layers)
    if total:
        zeros = sum(layer.sparsity * layer.numel for layer in run.layers)
        tiles.append(("zeros", percent(zeros / total), f"of {total:,} weights in {len(run.layers)} layers"))
    for file in [file for file in run.files if file.path.parent == run.path][:2]:
        facts = file.certificate
        right = metric_of(run, file)
        note = "" if right is None else f"{percent(right)} {run.metric}, "
        note += f"{megabytes(facts.gzip_bytes)} gzip, {percent(facts.int8_share)} of weights int8"
        tiles.append((run.label(file), megabytes(facts.bytes), note))
    if run.sweep is not None:
        names = ", ".join(percent(point.sparsity) for point in run.sweep.points)
        tiles.append(("sweep points", str(len(run.sweep.points)), names))
    return tiles


def _layers_note(run: RunFolder) -> str:
    if not run.layers:
        return ""
    shares = [layer.sparsity for layer in run.layers]
    source = "the last checkpoint" if run.training is not None else "the first file with pruned weights"
    return (
        f"Of {source}: {len(shares)} weights with a mask, from {percent(min(shares))} to {percent(max(shares))} zeros."
    )


def _bench(bench: BenchReport) -> dict[str, Any]:
    rows = []
    for row in bench.rows:
        low, high = (value * 1e3 for value in row.quartiles)
        verdict = "" if row.ratio is None else row.ratio.describe()
        spread = (f"{low:.3f}-{high:.3f}", f"{row.throughput:,.0f}")
        rows.append((bench.labels[row.path], str(row.batch_size), f"{row.median * 1e3:.3f}", verdict, *spread))
    against = "" if bench.baseline is None else f"against {bench.labels[bench.baseline]}"
    return {"rows": rows, "against": against, "where": f"{bench.where}, {bench.conditions.date}", "notes": bench.notes}


def _file(run: RunFolder, file: OnnxFile) -> dict[str, Any]:
    state, words = _STATES[file.unchanged]
    return {
        "name": run.label(file),
        "state": state,
        "words": words,
        "facts": fact_rows(file.certificate),
        "notes": file.certificate.notes,
    }


def _plan(run: RunFolder) -> list[tuple[str, ...]]:
    """Return the recipe's timeline: (epoch, step, what, value)."""
    if run.recipe is None or run.training is None:
        return []
    clock = run.training.clock
    rows = timeline_rows(run.recipe.modifiers, clock)
    shown: list[tuple[str, ...]] = [
        (f"{clock.epochs(step):g}", str(step), what, value) for step, what, value in rows[:_MOST_ROWS]
    ]
    return shown + ([("", "", f"... {len(rows) - _MOST_ROWS:,} more", "")] if len(rows) > _MOST_ROWS else [])
