"""A small student, a modifier that learns from its teacher, and what the term should be."""

from typing import Any, ClassVar

import timm
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from ovit_engine import Engine, Modifier, Recipe, Run
from ovit_engine.core.capabilities import Distillation
from ovit_engine.distillation.teacher import logits_of

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SIZES, **options})


class Learner(Distillation):
    """A term: mean square of what student and teacher differ in, logits and perhaps tokens."""

    name: ClassVar[str] = "learner"
    tokens: bool = False
    _terms: list[Tensor] = PrivateAttr(default_factory=list)
    _asked: int = PrivateAttr(default=0)

    def prepare(self, run: Run) -> None:
        assert run.teacher is not None
        if self.tokens:
            run.teacher.watch_tokens()

    def loss_term(self, run: Run) -> Tensor | None:
        self._asked += 1
        assert run.teacher is not None
        lesson = run.teacher.outputs()
        if lesson is None:
            return None
        term = (logits_of(lesson.student.output) - logits_of(lesson.teacher.output)).float().square().mean()
        if self.tokens:
            assert lesson.student.tokens is not None
            assert lesson.teacher.tokens is not None
            term = term + (lesson.student.tokens - lesson.teacher.tokens).square().mean()
        self._terms.append(term.detach())
        return term


def engine_for(model: nn.Module, *others: Modifier, teacher: nn.Module | None = None, **options: Any) -> Engine:
    recipe = Recipe("taught", (*others, Learner(**options)))
    return Engine(model, recipe, steps_per_epoch=4, epochs=1, teacher=teacher)


def started(model: Any, **options: Any) -> tuple[Engine, torch.optim.Optimizer]:
    other = vit(depth=len(model.blocks))
    with torch.no_grad():  # or student and teacher would be the same, and the term zero
        other.head.weight.add_(1.0)
        other.blocks[0].mlp.fc1.weight.mul_(3.0)
    engine = engine_for(model, **{"teacher": other, **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    return engine, optimizer


def learner(engine: Engine) -> Learner:
    found = engine.modifiers[-1]
    assert isinstance(found, Learner)
    return found


def cross_entropy(model: Any, x: Tensor = IMAGES, y: Tensor = LABELS) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def expected(engine: Engine, student: nn.Module, x: Tensor = IMAGES, y: Tensor = LABELS) -> Tensor:
    """The loss by hand, from the two models themselves."""
    assert engine.run.teacher is not None
    logits = student(x)
    with torch.no_grad():
        wanted = engine.run.teacher.module(x)
    loss: Tensor = nn.functional.cross_entropy(logits, y) + (logits - wanted).square().mean()
    return loss


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for own, their in zip(ours, theirs, strict=True):
        assert torch.allclose(own, their, rtol=tolerance, atol=tolerance), float((own - their).abs().max())


def forwards(module: nn.Module) -> list[bool]:
    """Filled with one entry a forward: whether it was in evaluation and without gradients."""
    calls: list[bool] = []
    module.register_forward_hook(lambda m, a, o: calls.append(not m.training and not torch.is_grad_enabled()))
    return calls
