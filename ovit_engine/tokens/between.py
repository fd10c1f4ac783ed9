"""Hooks that reduce tokens inside a block: between its attention, which says which, and its MLP."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovit_engine.structured.gates import GATE
from ovit_engine.tokens.layout import Layout
from ovit_engine.tokens.token_hooks import TokenHooks
from ovit_engine.utils.autograd import is_recomputed

# whose forward is known: what a block adds, and what attention makes of its queries and keys
_BLOCKS = {"timm.models.vision_transformer.Block"}
_ATTENTION = {"timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"}


class BetweenHooks(TokenHooks):
    """Reduces tokens after the attention of the blocks at `places`.

    No hook reaches between a block's attention and its MLP: so `forward` of such a block is a bound method of a small
    object, which makes the same calls of the same modules (LayerScale and DropPath among them) with one more between.
    Tokens are really gone, in training as in inference.
    """

    within = True

    def __init__(self, layout: Layout, places: Iterable[int]) -> None:
        super().__init__(layout)
        self.places = list(places)
        self._forwards: list[_ReducingForward] = []

    def register(self, vit: Any) -> list[RemovableHandle]:
        self._forwards = [_ReducingForward(self, number, vit.blocks[place]) for number, place in enumerate(self.places)]
        return [handle for middle in self._forwards for handle in middle.install()]

    def remove(self) -> None:
        super().remove()
        for middle in self._forwards:
            middle.remove()
        self._forwards = []

    def begin(self, x: Tensor, *, training: bool) -> None:
        """The first of the blocks is called with x [images, prefix + patches, width], for the first time.

        Raises:
            ValueError: another number of tokens than the model had at PREPARE.
        """
        self.check_tokens(x, self.layout.patches)
        if training:
            self.survivors = None

    def run_again(self, *, training: bool) -> None:
        """One of the blocks is called again, in backward: gradient checkpointing. RuntimeError where that can't be."""
        self.passes.check_mode(training=training)

    def bias(self, number: int, x: Tensor, *, training: bool) -> Tensor | None:
        """What the attention of the block with this number among `places` gets added to its scores, if anything."""
        return None

    @abstractmethod
    def reduce(
        self, number: int, x: Tensor, queries: Tensor, keys: Tensor, gate: Tensor | None, *, training: bool
    ) -> Tensor:
        """Return the tokens that the MLP of that block gets, and all blocks after it.

        Args:
            x: tokens after attention [images, tokens, width].
            queries: [images, heads, tokens, head width], normed as attention multiplies them; keys as well.
            gate: bool [heads], those that are not switched off; all where there is none.
        """


def check_blocks_open(vit: Any, places: Iterable[int]) -> None:
    """Raise ValueError where a block of `vit` computes something else than timm's, or nobody knows what."""
    for place in places:
        block = vit.blocks[place]
        for what, module, known in (
            (f"block {place}", block, _BLOCKS),
            (f"the attention of block {place}", block.attn, _ATTENTION),
        ):
            if not known & set(_class_names(module)):
                raise ValueError(
                    f"{what} is a {type(module).__name__}, and between attention and MLP tokens can be reduced only in "
                    "timm's Block with its Attention"
                )
        owner = next(kind for kind in type(block).__mro__ if "forward" in vars(kind))
        if "forward" in vars(block) or f"{owner.__module__}.{owner.__qualname__}" not in _BLOCKS:
            raise ValueError(f"block {place} has a forward of its own, into which tokens can't be reduced")


def _class_names(module: nn.Module) -> Iterable[str]:
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)


class _ReducingForward:
    """The forward of one block."""

    def __init__(self, hooks: BetweenHooks, number: int, block: Any) -> None:
        self._hooks, self._number, self._block = hooks, number, block
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_queries": None, "_keys": None}

    def install(self) -> list[RemovableHandle]:
        self._block.forward = self.forward
        attention = self._block.attn
        # the outputs of these two, Identity unless the model norms queries and keys, are what attention multiplies
        return [
            attention.q_norm.register_forward_hook(self.take_queries),
            attention.k_norm.register_forward_hook(self.take_keys),
        ]

    def remove(self) -> None:
        del self._block.forward

    def take_queries(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._queries = output

    def take_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keys = output

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's Block, with fewer tokens after attention."""
        if attn_mask is not None or is_causal:
            raise ValueError("the model was called with an attn_mask of its own, and its tokens are reduced")
        block, hooks, training = self._block, self._hooks, self._hooks.is_training
        if is_recomputed():
            hooks.run_again(training=training)
        elif self._number == 0:
            x = hooks.passes.begin(x, training=training)
            hooks.begin(x, training=training)
        bias = hooks.bias(self._number, x, training=training)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
        queries, keys = self._queries, self._keys
        self._queries = self._keys = None
        assert queries is not None
        assert keys is not None
        x = hooks.reduce(self._number, x, queries, keys, getattr(block.attn.proj, GATE, None), training=training)
        output: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return output
