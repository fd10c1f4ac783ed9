"""Batch normalization around quantized convolutions: which can be folded, holding the statistics, the fold itself."""

from functools import partial

import torch
from torch import Tensor, nn

# timm's BatchNormAct2d and SyncBatchNormAct normalize, then call their children `drop` and `act`; known by name because
# this package imports torch only
_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct"}


def has_activation(module: nn.Module) -> bool:
    """Return whether `module` is a timm batch-norm that also applies an activation."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__name__ in _WITH_ACTIVATION


def is_foldable(module: nn.Module) -> bool:
    """Return whether `module` is an affine map of each channel in eval mode, which a convolution can take over."""
    known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or has_activation(module)
    return known and isinstance(module.running_mean, Tensor)


def fold_factors(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (factor, new bias), float64 [channels]: `norm(y + bias) == factor * y + new_bias` in eval mode."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = 1.0 / torch.sqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -mean.double() if bias is None else bias.detach().double() - mean.double()
    shift = shift * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def freeze_batch_norm(model: nn.Module) -> list[str]:
    """Hold every batch-norm's statistics while the rest of `model` trains; returns the names.

    Quantization ranges that chase moving statistics never settle, and the folded file uses the running statistics:
    late in QAT the model should train with what will be deployed. The affine parameters still train. The modules stay
    in eval mode through `model.train()`, until `unfreeze_batch_norm`.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            # an instance attribute: survives deepcopy and pickle, as a hook or a subclass of timm's classes would not
            module.__dict__["train"] = partial(_stay_in_eval, module)
            names.append(name)
    return names


def unfreeze_batch_norm(model: nn.Module) -> None:
    """Undo `freeze_batch_norm`; the modules take the mode of `model`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.__dict__.pop("train", None) is not None:
            module.train(model.training)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `module.train`: children (an output quantizer) follow `mode`, the normalization does not."""
    for child in module.children():
        child.train(mode)
    module.training = False
    return module
