"""Several gradients from one backward pass: the mathematics, on plain tensors.

The loss of each gradient is taken on its own rows of one large forward pass. Backward then stops at the outputs of
linear layers and convolutions, where the rows can still be told apart, and the weight's gradient is formed of each
part: dY^T X. This is right while images do not act on each other and every use of a weight is seen. Nothing here proves
that: compare with plain backward first, and then hold to `Trace`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Size = int | Sequence[int]


def add_linear_gradients(rows: Tensor, x: Tensor, dy: Tensor, *, beta: float = 1.0) -> None:
    """rows <- beta rows + dY^T X of each of equal runs: rows [count, out, in], x [count run, *, in], dy [.., out]."""
    count = rows.shape[0]
    x, dy = x.reshape(count, -1, x.shape[-1]), dy.reshape(count, -1, dy.shape[-1])
    rows.baddbmm_(dy.transpose(1, 2), x, beta=beta)


def add_conv_gradients(
    rows: Tensor,
    x: Tensor,
    dy: Tensor,
    *,
    beta: float = 1.0,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> None:
    """rows <- beta rows + the gradient of a convolution's weight of each of equal runs of images.

    rows [count, out, in / groups, *kernel], x [count run, in, *], dy [count run, out, *].

    torch's own kernel, once for each: im2col with one batched product took five to ten times as long on two cores (3x3
    and 7x7 kernels on 8x8 and 28x28 maps), and one convolution with `count` times the groups gained nothing.
    """
    kernel = rows.shape[3:]
    if isinstance(padding, str):
        x, padding = _explicit_padding(x, kernel, padding, dilation)
    gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[len(kernel) - 1]
    for row, part, above in zip(rows, x.chunk(len(rows)), dy.chunk(len(rows)), strict=True):
        found = gradient(part, row.shape, above, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
        row.mul_(beta).add_(found) if beta else row.copy_(found)


def add_bias_gradients(rows: Tensor, dy: Tensor, channel: int, *, beta: float = 1.0) -> None:
    """rows <- beta rows + dY summed over all but its `channel` dimension: rows [count, channels]."""
    found = dy.movedim(channel, -1).reshape(len(rows), -1, rows.shape[1]).sum(1)
    rows.mul_(beta).add_(found) if beta else rows.copy_(found)


def _explicit_padding(x: Tensor, kernel: Size, padding: str, dilation: Size) -> tuple[Tensor, list[int]]:
    """Padding by name in numbers; where "same" needs one more on one side, the end of `x` is padded."""
    assert not isinstance(kernel, int)
    steps = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    wanted = [step * (size - 1) if padding == "same" else 0 for step, size in zip(steps, kernel, strict=True)]
    if any(total % 2 for total in wanted):
        x = F.pad(x, [extra for total in reversed(wanted) for extra in (0, total % 2)])
    return x, [total // 2 for total in wanted]


@dataclass(frozen=True)
class Trace:
    """What a forward pass called: torch's functions in order, and the shapes a gradient where a weight was used."""

    functions: list[Any] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _WeightUse:
    """One call of a linear layer or a convolution with tensors whose gradients are wanted."""

    x: Tensor
    edge: GradientEdge  # of the output as it was: an activation in place makes another tensor of it
    weight: int | None  # place of the weight among the tensors asked for
    bias: int | None
    options: dict[str, Any] | None  # of a convolution


class Recorder(TorchFunctionMode):
    """While it is entered: every torch function called, and those that use `tensors` in a way we know.

    `activations` counts the numbers that linear layers and convolutions put out, whichever weights they use.
    """

    def __init__(self, tensors: Sequence[Tensor] = (), count: int = 1) -> None:
        super().__init__()
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self.count = count
        self.trace = Trace()
        self.uses: list[_WeightUse] = []
        self.activations = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.trace.functions.append(func)
        if func is F.linear:
            self._linear(output, *args, **kwargs)
        elif func in _CONVOLUTIONS:
            self._convolution(output, *args, **kwargs)
        return output

    def _linear(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self._used(output, input, weight, bias, None)

    def _convolution(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        named = zip(("stride", "padding", "dilation", "groups"), args, strict=False)
        self._used(output, input, weight, bias, {**dict(named), **kwargs})

    def _used(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any] | None
    ) -> None:
        self.activations += output.numel()
        places = self.places.get(id(weight)), self.places.get(id(bias))
        self.trace.shapes.append((input.shape[0] // self.count, input.shape[0] % self.count, *input.shape[1:]))
        if places != (None, None) and output.requires_grad:
            edge = get_gradient_edge(output)
            self.uses.append(_WeightUse(input.detach(), edge, *places, options))


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def concatenated(batches: Sequence[Any]) -> Any:
    """Nested inputs of several batches as one, tensors laid end to end.

    Raises:
        ValueError: they are not made of tensors alone, or differ in shape or in number of rows.
    """
    flat = [tree_flatten(batch) for batch in batches]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    first = flat[0][0]
    if not first or not all(isinstance(leaf, Tensor) and leaf.ndim for leaves, _ in flat for leaf in leaves):
        raise ValueError("inputs are not made of tensors")
    if any(spec != flat[0][1] for _, spec in flat) or any(leaf.shape[0] != first[0].shape[0] for leaf in first):
        raise ValueError("inputs are not alike")
    if any(leaf.shape != column[0].shape for column in columns for leaf in column):
        raise ValueError("inputs differ in shape")
    return tree_unflatten([torch.cat(column) for column in columns], flat[0][1])


def batch_size_of(inputs: Any) -> int:
    """Return how many images a batch of nested inputs holds.

    Raises:
        ValueError: there is no tensor in it.
    """
    first = next((leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise ValueError("inputs are not made of tensors")
    return first.shape[0]


def split_outputs(outputs: Any, rows: int, count: int) -> list[Any]:
    """Nested outputs of `rows` images as `count` equal parts; what is no tensor is in each.

    Raises:
        ValueError: a tensor that has not a row for each image.
    """
    leaves, spec = tree_flatten(outputs)
    if any(isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != rows) for leaf in leaves):
        raise ValueError("an output has not a row for each image")
    parts = [leaf.chunk(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [tree_unflatten([part[i] for part in parts], spec) for i in range(count)]


def record(model: Callable[[Any], Any], inputs: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[list[Any], Recorder]:
    """Run `model` once on all of `inputs`: the outputs of each, and where `tensors` were used.

    Raises:
        ValueError: inputs that can't be concatenated, outputs that can't be split_outputs.
    """
    count, whole = len(inputs), concatenated(inputs)
    recorder = Recorder(tensors, count)
    with recorder:
        outputs = model(whole)
    return split_outputs(outputs, batch_size_of(whole), count), recorder


def batched_gradients(losses: Sequence[Tensor], recorder: Recorder, rows: Sequence[Tensor]) -> bool:
    """Write the gradient of each loss to `rows`, one [count, *shape] for each tensor of the recorder.

    Args:
        losses: scalars, one for each part of what `record` gave.
        recorder: of the same forward pass.
        rows: of the tensors' type; overwritten.

    Returns:
        Whether a use of every tensor was seen.

    Raises:
        ValueError: a layer whose rows can't be shared out among the losses.
    """
    edges = [use.edge for use in recorder.uses]
    above: Sequence[Tensor | None] = torch.autograd.grad(losses, edges, allow_unused=True) if edges else ()
    filled: set[int] = set()
    for use, dy in zip(recorder.uses, above, strict=True):
        if dy is None:
            continue
        if dy.shape[0] % recorder.count:
            raise ValueError("the rows of a layer can't be shared out")
        if use.weight is not None:
            beta = float(use.weight in filled)
            if use.options is None:
                add_linear_gradients(rows[use.weight], use.x, dy, beta=beta)
            else:
                add_conv_gradients(rows[use.weight], use.x, dy, beta=beta, **use.options)
            filled.add(use.weight)
        if use.bias is not None:
            channel = dy.ndim - 1 if use.options is None else 1
            add_bias_gradients(rows[use.bias], dy, channel, beta=float(use.bias in filled))
            filled.add(use.bias)
    return len(filled) == len(rows)
