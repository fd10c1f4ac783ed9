"""GOHSP's phases against a reference that holds Z and U apart, and by brute force: who goes, how hard, until when."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ovit_engine import Calibration, Engine
from ovit_engine.structured.gates import find_sites, installed
from ovit_engine.structured.recording import is_recording
from tests.modifiers.gated import IMAGES, LABELS, batch, engine_for, explicit_scores, train, vit
from tests.structured.test_head_graph import by_iteration, by_loops
from tests.structured.test_head_outputs import first_outputs

CALIBRATION = Calibration(TensorDataset(IMAGES, LABELS), nn.functional.cross_entropy)
SOFT = "head_sparsity: 0.5, unit_sparsity: 0.4"


def started(options: str, steps: int = 10, **vit_options: Any) -> tuple[Any, Engine]:
    model = vit(**vit_options)
    return model, engine_for(model, f"gohsp: {{{options}}}", steps)


def trained(options: str, steps: int = 10, each: Callable[[int], Any] = lambda step: None, **more: Any) -> Any:
    model, engine = started(options, more.pop("length", steps))
    return model, train(model, engine, steps, each=each, calibration=CALIBRATION, **more)


def phase(engine: Engine) -> Any:
    return engine.modifiers[0]._soft_phase  # type: ignore[attr-defined]


def logged(engine: Engine, name: str) -> dict[int, float]:
    return {step: value for step, what, value in engine.run.history if what == f"gohsp/{name}"}


# --- rank


def test_the_heads_that_go_are_those_the_walk_visits_least() -> None:
    for kernel, temperature, invert in (
        ("shift", 1.0, False),
        ("clip", 1.0, False),
        ("exp", 0.3, False),
        ("shift", 1.0, True),
    ):
        heat = f", temperature: {temperature}" if kernel == "exp" else ""
        options = f"end: 5st, head_sparsity: 0.5, rank: {{kernel: {kernel}{heat}, invert: {str(invert).lower()}}}"
        model, engine = started(options)
        before = copy.deepcopy(model)
        train(model, engine, 0, calibration=CALIBRATION)
        importance = by_iteration(by_loops(first_outputs(before, IMAGES), kernel, temperature))
        order = sorted(range(4), key=lambda head: (-1 if invert else 1) * importance[head])
        assert phase(engine).plan["blocks.0.attn.proj"].nonzero().flatten().tolist() == sorted(order[2:]), kernel


def test_without_calibration_training_shows_the_outputs() -> None:
    """Three steps of eight images at weights that stand still: the same as a pass over all of them."""
    model, engine = started("end: 7st, head_sparsity: 0.5, rank: {steps: 3}", drop_rate=0.0)
    seen = []

    def each(step: int) -> None:
        seen.append((bool(phase(engine).plan), all(map(is_recording, find_sites(model, ["heads"])))))

    train(model, engine, 4, each=each, rate=0.0)
    assert seen == [(False, True)] * 3 + [(True, False)] * 2
    other, calibrated = started("end: 7st, head_sparsity: 0.5")
    train(other, calibrated, 1, calibration=CALIBRATION)
    assert {name: keep.tolist() for name, keep in phase(engine).plan.items()} == {
        name: keep.tolist() for name, keep in phase(calibrated).plan.items()
    }


def test_taylor_ranks_by_gradients_of_the_first_steps() -> None:
    model, engine = started(f"end: 7st, start: 1st, {SOFT}, rank: {{score: taylor, steps: 2}}")
    before = copy.deepcopy(model)
    train(model, engine, 3, rate=0.0, calibration=CALIBRATION)
    expected = explicit_scores(before, [batch(1), batch(2)])
    for block in range(2):
        name = f"blocks.{block}.attn.proj"
        assert off_heads(engine)[block] == sorted(expected[name].argsort()[:2].tolist())


@pytest.mark.parametrize("score", ["l1", "random"])
def test_rankers_that_need_nothing(score: str) -> None:
    plans = []
    for seed in (1, 1, 2):
        seeded = f", seed: {seed}" if score == "random" else ""
        _, engine = trained(f"end: 7st, head_sparsity: 0.5, rank: {{score: {score}{seeded}}}", 1, length=10)
        plans.append({name: keep.tolist() for name, keep in phase(engine).plan.items()})
    assert plans[0] == plans[1]
    assert (plans[0] == plans[2]) == (score == "l1")


@pytest.mark.parametrize(
    ("options", "heads", "units"),
    [  # 4 heads, 96 units in each of two blocks
        ("head_sparsity: 0.5", 2, None),
        ("head_sparsity: 0.3", 2, None),
        ("head_sparsity: 0.8", 1, None),
        ("unit_sparsity: 0.4", None, 57),
        ("head_sparsity: 0.25, unit_sparsity: 0.99", 3, 1),
        ("parameter_sparsity: 0.4", 2, 58),
    ],
)
def test_so_many_are_left_exactly(options: str, heads: int | None, units: int | None) -> None:
    """G11."""
    model, engine = trained(f"end: 4st, every: 2st, {options}", 6, length=6)
    engine.detach()
    for site in installed(model):
        expected = heads if site.kind == "heads" else units
        if options.startswith("parameter"):
            assert abs(int(site.gate.sum()) - expected) <= (site.kind == "units")
        else:
            assert int(site.gate.sum()) == expected
    assert {site.kind for site in installed(model)} == {
        kind for kind, count in (("heads", heads), ("units", units)) if count
    }
    if options.startswith("parameter"):
        gone = sum(int((~site.gate).sum()) * site.parameters for site in installed(model))
        total = sum(parameter.numel() for parameter in vit().parameters())
        assert 0.4 <= gone / total < 0.4 + 49 / total


# --- soft


def members(kind: str, index: int) -> list[tuple[str, Any]]:
    """Where a head or unit of the first block lies: 24 features, 4 heads of 6, 96 units."""
    if kind == "heads":
        rows = [part * 24 + index * 6 + i for part in range(3) for i in range(6)]
        columns = [index * 6 + i for i in range(6)]
        return [("attn.qkv.weight", rows), ("attn.qkv.bias", rows), ("attn.proj.weight", (slice(None), columns))]
    return [("mlp.fc1.weight", [index]), ("mlp.fc1.bias", [index]), ("mlp.fc2.weight", (slice(None), [index]))]


class Reference:
    """The written Lagrangian in float64, with Z and U apart and groups by explicit indices."""

    def __init__(self, model: nn.Module, heads: dict[int, list[int]], lam: float, rho: float, ramp: float) -> None:
        self.heads, self.lam, self.rho, self.ramp = heads, lam, rho, ramp
        weights = self.weights(model)
        self.u = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.z = self.project(weights)

    @staticmethod
    def weights(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: p.detach().double()
            for name, p in model.named_parameters()
            if ".fc" in name and "fc2.bias" not in name
        }

    def project(self, point: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: torch.zeros_like(value) for name, value in point.items()}
        for block in range(2):
            norms = []
            for unit in range(96):
                places = [(f"blocks.{block}.{name}", where) for name, where in members("units", unit)]
                norms.append((sum(float(point[name][where].square().sum()) for name, where in places), places))
            for _, places in sorted(norms, key=lambda each: -each[0])[:57]:
                for name, where in places:
                    kept[name][where] = point[name][where]
        return kept

    def update(self, model: nn.Module) -> None:
        weights = self.weights(model)
        self.z = self.project({name: weight + self.u[name] for name, weight in weights.items()})
        self.u = {name: (self.u[name] + weight - self.z[name]) / self.ramp for name, weight in weights.items()}
        self.lam, self.rho = self.lam * self.ramp, self.rho * self.ramp

    def gradients(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        double = copy.deepcopy(model).double()
        parameters = dict(double.named_parameters())
        lagrangian = nn.functional.cross_entropy(double(x.double()), y)
        for block, gone in self.heads.items():
            for head in gone:
                for name, where in members("heads", head):
                    lagrangian = lagrangian + self.lam / 2 * parameters[f"blocks.{block}.{name}"][where].square().sum()
        for name in self.z:
            lagrangian = lagrangian + self.rho / 2 * (parameters[name] - self.z[name] + self.u[name]).square().sum()
        found = torch.autograd.grad(lagrangian, list(parameters.values()))
        return dict(zip(parameters, found, strict=True))


def off_heads(engine: Engine) -> dict[int, list[int]]:
    plan = phase(engine).plan
    return {block: (~plan[f"blocks.{block}.attn.proj"]).nonzero().flatten().tolist() for block in range(2)}


@pytest.mark.parametrize("way", ["plain", "scaler", "fused"])
def test_gradients_are_those_of_the_lagrangian(way: str) -> None:
    """G8, over two updates of Z and U: as the optimizer sees them, in units of what it divides by."""
    model, engine = started(f"end: 9st, every: 2st, {SOFT}, penalty: {{heads: 0.3, units: 0.2, ramp: 1.5}}")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=way == "fused")
    engine.attach(optimizer, calibration=CALIBRATION)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way != "plain")
    seen: dict[str, Tensor] = {}

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        seen["scale"] = torch.tensor(1.0) if scale is None else scale.clone()
        seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    optimizer.register_step_pre_hook(look)
    model.train()
    reference = Reference(model, off_heads(engine), 0.3, 0.2, 1.5)
    for step in range(6):
        expected = reference.gradients(model, *batch(step))
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert float(seen["scale"]) == (1024 if way == "fused" else 1)
        for name, gradient in expected.items():
            difference = (seen[name].double() / seen["scale"] - gradient).abs().max()
            assert difference <= 1e-6 * max(1.0, float(gradient.abs().max())), (step, name)
        if step % 2 == 1:
            reference.update(model)
    assert reference.u["blocks.1.mlp.fc1.weight"].any()
    assert phase(engine).rates == pytest.approx({"heads": 0.3 * 1.5**3, "units": 0.2 * 1.5**3})


def test_a_skipped_step_moves_nothing() -> None:
    model, engine = started(f"end: 9st, every: 1st, {SOFT}")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer, calibration=CALIBRATION)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = engine.state_dict()["modifiers"]
    scaler.scale(nn.functional.cross_entropy(model(IMAGES), LABELS) * math.inf).backward()
    scaler.step(optimizer)
    assert engine.run.step == 0
    assert str(engine.state_dict()["modifiers"]) == str(before)


def test_a_closure_makes_the_same_steps() -> None:
    found = []
    for by_closure in (False, True):
        model, engine = started(f"end: 3st, every: 1st, {SOFT}")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine.attach(optimizer, calibration=CALIBRATION)
        for step in range(4):
            x, y = batch(step)

            def evaluate(x: Tensor = x, y: Tensor = y) -> Any:
                optimizer.zero_grad()  # noqa: B023
                loss = nn.functional.cross_entropy(model(x), y)  # noqa: B023
                loss.backward()
                return loss

            if by_closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("share", [0.1, 2.0])
def test_penalties_start_as_a_share_of_the_first_gradients(share: float) -> None:
    model, engine = started(f"end: 9st, {SOFT}, penalty: {{share: {share}}}")
    engine.attach(torch.optim.SGD(model.parameters(), 0.1), calibration=CALIBRATION)
    plan = phase(engine).plan
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    squares = {kind: [0.0, 0.0] for kind in ("heads", "units")}
    for kind, reader, count in (("heads", "attn.proj", 4), ("units", "mlp.fc2", 96)):
        for block, index in itertools.product(range(2), range(count)):
            if not plan[f"blocks.{block}.{reader}"][index]:
                for name, where in members(kind, index):
                    parameter = model.get_parameter(f"blocks.{block}.{name}")
                    squares[kind][0] += float(parameter.grad[where].square().sum())
                    squares[kind][1] += float(parameter.detach()[where].square().sum())
    engine.run.optimizers[0].step()
    for kind, (task, pull) in squares.items():
        assert logged(engine, f"{kind}_penalty")[0] == pytest.approx(share * math.sqrt(task / pull), rel=1e-4)


def test_penalties_grow_to_a_limit_or_until_nothing_is_left() -> None:
    _, engine = trained(
        f"end: 9st, every: 1st, {SOFT}, penalty: {{units: 0.1, heads: 0.1, ramp: 2, limit: 5}}", 8, length=10
    )
    assert list(logged(engine, "heads_penalty").values()) == pytest.approx(
        [0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    )
    options = "units: 0.1, heads: 0.1, ramp: 2, tolerance: 0.9"
    _, engine = trained(f"end: 9st, every: 1st, {SOFT}, penalty: {{{options}}}", 8, length=10)
    assert set(logged(engine, "heads_penalty").values()) == {0.1}


def test_other_kinds_of_weights_stay_alone() -> None:
    """Only what may go is drawn: with a rate of zero no other gradient changes."""
    model, engine = started(f"end: 9st, {SOFT}, penalty: {{heads: 5, units: 5}}")
    engine.attach(torch.optim.SGD(model.parameters(), 0.0), calibration=CALIBRATION)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    engine.run.optimizers[0].step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter.grad, before[name])}
    parts = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight")
    # biases start at zero, and so does what draws them
    assert moved == {f"blocks.{block}.{part}" for block in range(2) for part in parts if "bias" not in part}
