"""Parameter groups in which the scorers of tokens are apart, so that their learning rate can be another."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ovit_engine.targets import is_scorer, unwrapped


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
    """Identities of the parameters of scorers, as they are now."""
    return {id(parameter) for name, parameter in unwrapped(model).named_parameters() if is_scorer(name)}


def backbone_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of an optimizer's groups that hold no scorer.

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
