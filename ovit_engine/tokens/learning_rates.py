"""Separate learning rates for the scorers of tokens: parameter groups, and rates scaled for one step."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ovit_engine.masking.parameters import is_scorer, unwrapped


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: scorers of tokens apart from all else, in each no decay of biases, norms and embeddings.

    What does not decay are one-dimensional parameters and those that `model.no_weight_decay()` names, as timm groups
    them. The learning rate is the optimizer's for all: `dynamic_vit` scales that of the backbone at each step.

    Example:
        optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)
    """
    model = unwrapped(model)
    listed = getattr(model, "no_weight_decay", None)
    spared = set(listed()) if callable(listed) else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in spared
            groups.setdefault((is_scorer(name), decays), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[1] else 0.0}
        for key in sorted(groups)  # the backbone first
    ]


def scorer_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters of scorers, as they are now."""
    return {id(parameter) for name, parameter in unwrapped(model).named_parameters() if is_scorer(name)}


def backbone_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of an optimizer's groups that hold no scorer.

    Raises:
        ValueError: a group that holds scorers and other weights.
    """
    scorers = scorer_parameters(model)
    backbone = []
    for group in groups:
        found = {id(parameter) in scorers for parameter in group["params"]}
        if found == {True, False}:
            raise ValueError(
                "a parameter group of the optimizer holds predictors and other weights, whose learning rates differ: "
                "make it as AdamW(param_groups(model, weight_decay=...), lr=...), with param_groups of "
                "ovit_engine.tokens"
            )
        if found == {False}:
            backbone.append(group)
    return backbone


class ScaledRates:
    """Scales the learning rates of parameter groups for one step at a time."""

    def __init__(self) -> None:
        self._scaled: list[tuple[dict[str, Any], float, float]] = []  # group, before, written

    def scale(self, groups: Iterable[dict[str, Any]], factor: float) -> None:
        """Multiply the learning rate of each group; those of a step that never came to its end are put back first."""
        self.restore()
        for group in groups:
            before = float(group["lr"])
            _write(group, before * factor)
            self._scaled.append((group, before, float(group["lr"])))

    def restore(self) -> None:
        """Put back what `scale` found, where nobody wrote another rate since."""
        for group, before, written in self._scaled:
            if float(group["lr"]) == written:
                _write(group, before)
        self._scaled = []


def _write(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # a compiled step reads this tensor
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
