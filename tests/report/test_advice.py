"""What to try next: each rule speaks where its measurement is there, with its figures, and is silent elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest

from ovit_engine.analysis.bench_report import BenchReport, BenchRow
from ovit_engine.analysis.sparse_table import SparseTable
from ovit_engine.certificate.machine import Conditions
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.core.schedule import Clock
from ovit_engine.report import read_run
from ovit_engine.report.advice import advise
from ovit_engine.report.run_folder import Epoch, MaskedWeight, OnnxFile, RunFolder, TrainingRecord
from ovit_engine.sweep.folder import Index, Point

LAYER = MaskedWeight(name="fc.weight", shape=(4, 4), pattern="unstructured", sparsity=0.5)
TABLE = SparseTable(device="A", capability=(8, 0), backend="cutlass", versions={}, date="", repeats=5, rows=())


def training(history=(), *, step=100, finished=True, layers=(LAYER,)) -> TrainingRecord:
    return TrainingRecord(
        clock=Clock(10, 100), step=step, finished=finished, recipe_text="", history=tuple(history), layers=layers
    )


def epochs(*accuracies: float) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(epoch=number, loss=1.0, accuracy=value, lr=0.1, sparsity=0.5)
        for number, value in enumerate(accuracies, 1)
    )


def sweep(*metrics: float | None, best="max") -> Index:
    points = tuple(
        Point(
            sparsity=0.5 + 0.1 * number,
            measured=0.5,
            step=0,
            epoch=0,
            metric=metric,
            checkpoint="",
            bytes=1,
            gzip_bytes=1,
            parameters=1,
            parameters_left=1,
        )
        for number, metric in enumerate(metrics)
    )
    return Index(
        recipe="r",
        recipe_hash="",
        asked=(),
        metric="accuracy",
        best=best,
        onnx=False,
        finished=True,
        baseline=None,
        points=points,
    )


@pytest.fixture
def files(whole_run) -> tuple[OnnxFile, ...]:
    return read_run(whole_run).files


def bench(path: Path, ratio: Ratio, spread: float = 0.01) -> BenchReport:
    row = BenchRow(path=path, batch_size=1, median=1.0, quartiles=(1.0, 1.0 + spread), ratio=ratio)
    machine = gather_machine()
    conditions = Conditions(machine=machine, cores=1, versions={}, load=None, date="")
    return BenchReport(rows=(row,), baseline=path.with_name("d.onnx"), threads=1, repeats=5, conditions=conditions)


def gather_machine():
    from ovit_engine.certificate.model import Machine

    return Machine(cpu="A", cores=1, int8=())


def run(**known) -> RunFolder:
    return RunFolder(path=Path("runs/my run"), **known)


def said(folder: RunFolder) -> list[str]:
    return [advice.what for advice in advise(folder)]


SAME, FASTER = Ratio(median=1, low=0.9, high=1.1), Ratio(median=2, low=1.9, high=2.1)


def test_an_empty_folder_gets_no_advice():
    assert advise(run()) == ()


def test_a_run_that_was_broken_off():
    (advice,) = advise(run(training=training(step=37, finished=False)))
    assert advice.command == "ovit train --resume 'runs/my run'"
    assert "step 37 of 100" in advice.why
    assert "Finish the training." not in said(run(training=training()))
    of_ones_own = replace(training(step=37, finished=False), bundled=False)
    (advice,) = advise(run(training=of_ones_own))
    assert advice.what == "Finish the training."
    assert advice.command is None


@pytest.mark.parametrize(
    ("accuracies", "rises"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), True),
        ((0.1, 0.2, 0.3, 0.4, 0.6, 0.5), False),  # was higher before
        ((0.6, 0.6, 0.6, 0.6, 0.6, 0.604), False),  # by too little
        ((0.1, 0.2, 0.3, 0.4, 0.5), False),  # too short to tell
    ],
)
def test_accuracy_that_still_rises(accuracies, rises):
    folder = run(epochs=epochs(*accuracies), training=training())
    found = [advice for advice in advise(folder) if advice.what.startswith("Train longer")]
    assert len(found) == rises
    if rises:
        assert "rose by 30.0 points over the last 3" in found[0].why
        tail = replace(folder, sweep=sweep(0.6, 0.6))
        (further,) = [advice for advice in advise(tail) if advice.what.startswith("Train the pruned")]
        assert further.command == "ovit sweep 'runs/my run' --continue 0.6"
    unfinished = replace(folder, training=training(finished=False))
    assert not [what for what in said(unfinished) if what.startswith("Train longer")]


HISTORY = [
    (10, "accuracy", 0.9),
    (20, "p/sparsity", 0.4),
    (20, "accuracy", 0.88),
    (30, "p/sparsity", 0.8),
    (40, "accuracy", 0.5),
    (100, "accuracy", 0.8),
]


def test_the_step_that_cost_most_is_named_unless_it_was_made_good():
    (advice,) = [each for each in advise(run(training=training(HISTORY))) if each.what.startswith("Prune in smaller")]
    assert advice.why.startswith("The step to 80 % at epoch 3 cost 38.0 points of accuracy until it was next measured")
    assert "ended 10.0 points below its best" in advice.why
    for history in ([*HISTORY[:-1], (100, "accuracy", 0.89)], [entry for entry in HISTORY if entry[1] == "accuracy"]):
        assert not [what for what in said(run(training=training(history))) if what.startswith("Prune")]
    losses = replace(run(training=training(HISTORY)), sweep=sweep(best="min"))
    assert not [what for what in said(losses) if what.startswith("Prune")]


def test_a_sweep_that_falls_and_one_that_does_not():
    (advice,) = advise(run(sweep=sweep(0.9, 0.89, 0.8)))
    assert advice.what == "Take the point at 60 %, or fine-tune the one at 70 %."
    assert "from 89 % to 80 %" in advice.why
    assert advice.command.endswith("--continue 0.7")
    assert said(run(sweep=sweep(0.9, 0.91, 0.895))) == ["Sweep to higher sparsities."]
    assert said(run(sweep=sweep(0.9, None))) == []
    assert said(run(sweep=sweep(0.9, 0.895, 0.885))) == []  # falls, but by no cliff
    assert said(run(sweep=sweep(3.0, 2.0, best="min"))) == []


def test_a_run_that_is_too_short_says_nothing_of_higher_sparsities():
    flat = run(sweep=sweep(0.9, 0.9), epochs=epochs(0.9, 0.9, 0.9, 0.9, 0.9, 0.9))
    assert said(flat) == ["Sweep to higher sparsities."]
    assert said(replace(flat, epochs=epochs(0.9, 0.9))) == []  # too few epochs to tell
    assert said(run(sweep=sweep(0.2, 0.3))) == []  # training gained more than pruning cost
    rising = replace(flat, epochs=epochs(0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    assert said(rising) == ["Train the pruned model further."]
    assert "Sweep to higher sparsities." not in said(replace(flat, training=training(finished=False)))
    assert said(run(sweep=replace(sweep(0.8, 0.8), baseline=0.9))) == []  # it lost much before its first point
    assert said(run(sweep=replace(sweep(0.9, 0.9), baseline=0.91))) == ["Sweep to higher sparsities."]


def test_the_cliff_is_named_as_what_it_is():
    (advice,) = advise(run(sweep=sweep(0.9, 0.8, 0.5)))
    assert "first step" in advice.why


def test_emptied_layers():
    empty = replace(LAYER, sparsity=1.0)
    folder = run(training=training(layers=(LAYER, empty, empty), finished=False))
    assert "Nothing is left of fc.weight and 1 more" in [advice.why for advice in advise(folder)][1]


def test_export_and_bench_are_asked_for_once(files):
    assert said(run(training=training())) == ["Export a verified ONNX file."]
    folder = run(training=training(), files=files)
    assert said(folder) == ["Measure latency, best against a dense file of the same model."]
    assert said(replace(folder, benches=(bench(files[0].path, FASTER),))) == []
    assert said(run(files=tuple(replace(file, unchanged=None) for file in files))) == []


def changed(file: OnnxFile, **facts) -> OnnxFile:
    return replace(file, certificate=file.certificate.model_copy(update=facts))


def test_files_that_were_changed_or_measured_on_little(files):
    assert said(run(files=(replace(files[0], unchanged=False),)))[0].startswith("Don't ship ")
    facts = files[0].certificate
    random = changed(files[0], parity=facts.parity.model_copy(update={"source": "random"}))
    few = changed(files[0], parity=facts.parity.model_copy(update={"images": 255}))
    lost = changed(files[0], accuracy=facts.accuracy.model_copy(update={"pytorch": 0.9, "file": 0.8}))
    whys = [" ".join(advice.why for advice in advise(run(files=(file,)))) for file in (random, few, lost)]
    assert "on 450 random inputs, no real images" in whys[0]
    assert "on 255 images only" in whys[1]
    assert "right on 80 % of 450 images, PyTorch on 90 %" in whys[2]


def test_zeros_alone_are_not_fast_and_nobody_says_so_without_a_bench(files):
    int8, sparse = files
    slow = run(files=(sparse,), benches=(bench(sparse.path, SAME),))
    (advice,) = advise(slow)
    assert advice.what.startswith("Add quantize")
    assert "float with 75 % zeros, and the bench says within noise (0.90-1.10x)" in advice.why
    assert said(replace(slow, files=files)) == []  # int8 is there already
    assert said(replace(slow, benches=(bench(sparse.path, FASTER),))) == []
    assert said(run(files=(int8,), benches=(bench(int8.path, SAME),))) == []


def test_a_noisy_bench(files):
    (advice,) = advise(run(files=files, benches=(bench(files[0].path, FASTER, spread=0.5),)))
    assert advice.what == "Bench again on a quiet machine."
    assert "50% of the median apart" in advice.why


def test_two_of_four_without_a_gpu(files):
    pairs = training(layers=(replace(LAYER, pattern="2:4"),))
    folder = run(training=pairs, files=files, benches=(bench(files[0].path, FASTER),))
    (advice,) = advise(folder)
    assert advice.command.startswith("ovit bench --device cuda ")
    assert said(replace(folder, tables=(TABLE,))) == []
