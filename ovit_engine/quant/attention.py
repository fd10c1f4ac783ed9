"""Attention whose two products, Q·K and A·V, take rounded operands.

The products are no layers: they stand in the forward of each model's attention module, as `@` or as torch's fused
kernel. So that forward runs as it is, and whatever multiplies two activations in it is intercepted.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.scheme import CPU, Scheme

# children of a quantized module, in the order in which the products take them
OPERANDS = ("query_quantizer", "key_quantizer", "attention_quantizer", "value_quantizer")
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


class QuantAttention(nn.Module):
    """What a quantized attention module is besides its own class; parameters keep their names."""

    @staticmethod
    def from_float(module: nn.Module, *, scheme: Scheme = CPU) -> "QuantAttention":
        """Turn `module` itself into its quantized form (disabled) and return it."""
        device = next((parameter.device for parameter in module.parameters()), None)
        module.__class__ = quantized_class(type(module))
        for name in OPERANDS:
            # the kernels' second operand is a weight by rights: keys and values take its type
            second = name in ("key_quantizer", "value_quantizer")
            quantizer = scheme.operand_quantizer(device) if second else scheme.activation_quantizer(device)
            module.add_module(name, quantizer.train(module.training))
        assert isinstance(module, QuantAttention)
        return module

    def to_float(self) -> None:
        """Undo `from_float`."""
        for name in OPERANDS:
            delattr(self, name)
        self.__class__ = type(self).__mro__[2]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        operands = [self.get_submodule(name) for name in OPERANDS]
        if all(map(_is_idle, operands)):
            return super().forward(*args, **kwargs)  # of the class beside this one
        with _Rounded(operands, type(self).__name__):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made while the program runs and stands in no module: name the one it was made from."""
        return _blank, (type(self).__mro__[2],), self.__dict__.copy()


def quantized_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return `kind` with rounded products; the same class each time."""
    return _quantized_class(cast(Hashable, kind))


@functools.cache
def _quantized_class(kind: Any) -> type[nn.Module]:
    return type(f"Quant{kind.__name__}", (QuantAttention, kind), {})


def attention_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that are attention themselves: timm's, and others whose class is called so.

    Told by `fused_attn`, which timm's have, or the name of the class; modules that only hold another one are not
    meant, and neither is `nn.MultiheadAttention`, whose products are inside torch.
    """
    found = [name for name, module in model.named_modules() if name and _is_attention_module(module)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _is_attention_module(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return False
    return hasattr(module, "fused_attn") or type(module).__name__.endswith(("Attention", "Attn", "Attention2d"))


def _blank(kind: type[nn.Module]) -> nn.Module:
    quantized = quantized_class(kind)
    return quantized.__new__(quantized)


def _is_idle(module: nn.Module) -> bool:
    """Whether a quantizer neither rounds nor watches; not asked where reading a flag would wait or break a graph."""
    if not isinstance(module, FakeQuantize) or torch.compiler.is_compiling() or module.enabled.device.type != "cpu":
        return False
    return not (module.enabled or module.observing)


class _Rounded(TorchFunctionMode):
    """Rounds the operands of the first two products inside."""

    def __init__(self, operands: Iterable[Callable[[Tensor], Tensor]], owner: str) -> None:
        super().__init__()
        self._operands, self._owner, self._seen = list(operands), owner, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        # a batch of matrices on either side: a product with one matrix is a layer's
        if func in _PRODUCTS and all(operand.dim() > 2 for operand in args[:2]):
            return self._product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if self._seen == len(self._operands):
            raise ValueError(f"{self._owner} has more products than Q·K and A·V: name it in exclude")
        first, second = self._operands[self._seen : self._seen + 2]
        self._seen += 2
        return torch.matmul(first(left), second(right))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` in its two products."""
        if is_causal or enable_gqa:
            raise ValueError(f"{self._owner} is causal or groups its queries, which is not quantized: exclude it")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self._product(query * factor, key.transpose(-2, -1))
        if attn_mask is not None:
            allowed = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
        weights = F.dropout(scores.softmax(dim=-1), dropout_p)
        return self._product(weights, value)
