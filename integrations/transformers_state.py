"""The engine's state inside the checkpoints of Hugging Face's Trainer, and whether it loaded the weights beside it."""

import base64
import io
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from ovit_engine.engine import Engine


def packed(engine: Engine) -> dict[str, Any]:
    """The engine's state as JSON takes it, and enough of the weights to see whether they are loaded with it."""
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    return {"engine": base64.b64encode(file.getvalue()).decode(), "weights": _sampled(engine.model)}


def unpack(engine: Engine, state: TrainerState, name: str) -> None:
    """Load what `packed` gave the callback `name`. Raises ValueError where it, or the weights, are missing."""
    states: Any = state.stateful_callbacks or {}
    saved, where = states.get(name), f"the checkpoint of step {state.global_step}"
    if saved is None:
        raise ValueError(f"{where} was not trained under a recipe: it holds no engine's state")
    parts = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
    loaded = _sampled(engine.model)
    lost = [name for name, value in parts["weights"].items() if loaded.get(name) != value]
    if lost:
        raise ValueError(f"the Trainer did not load {len(lost)} weights of {where}, such as {lost[0]!r}")
    engine.load_state_dict(torch.load(io.BytesIO(base64.b64decode(parts["engine"])), weights_only=True))


def _sampled(model: nn.Module) -> dict[str, float]:
    """The first number of each parameter."""
    return {name: float(parameter.detach().flatten()[0]) for name, parameter in model.named_parameters()}
