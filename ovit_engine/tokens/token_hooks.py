"""The object behind the hooks that reduce the tokens of one copy of a model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovit_engine.certificate.token_counts import TokenCounts, counts_after
from ovit_engine.masking.parameters import unwrapped
from ovit_engine.tokens.layout import Layout, find_transformer
from ovit_engine.tokens.ops import Survivors
from ovit_engine.tokens.replays import Passes

ATTRIBUTE = "_token_hooks"


class TokenHooks(ABC):
    """Reduces tokens by hooks on a model's blocks. It lies on the model, and is copied with it.

    Hooks are bound methods of this object or of small ones that it holds, and reach parameters through their `module`
    argument: so an EMA copy, or a pickled one, uses what is its own. Whether to train or to infer the transformer says
    for all its blocks: some may be frozen by `eval()`. In eval mode tokens are really gone, by operations of constant
    size.
    """

    within: ClassVar[bool] = False  # whether tokens go between attention and MLP of a block, and not before it

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.made_by = "hooks of its own"  # the modifier, for those who find it here
        self.survivors: Survivors | None = None  # of the last forward pass in training; None where all are left
        self.passes = Passes()
        self._vit: Any = None  # the transformer it lies on
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, starts without what a forward pass left: tensors with a history can't be copied."""
        return {**vars(self), "survivors": None}

    @property
    def is_training(self) -> bool:
        """Whether a forward pass is one of training: the mode of the transformer, whatever its blocks are in."""
        return bool(self._vit.training)

    def install(self, model: nn.Module) -> None:
        """Hang the hooks on the vision transformer in `model`.

        Raises:
            ValueError: its tokens are reduced already.
        """
        vit = find_transformer(model)
        if (hooks := hooks_of(model)) is not None:
            raise ValueError(f"tokens of {type(vit).__name__} are reduced already, by {hooks.made_by}")
        self._vit = vit
        self._handles = list(self.register(vit))
        setattr(vit, ATTRIBUTE, self)

    @abstractmethod
    def register(self, vit: Any) -> list[RemovableHandle]:
        """Hang hooks on `vit.blocks` and return their handles."""

    @abstractmethod
    def patches_left(self) -> list[tuple[int, int]]:
        """Return (block, patch tokens left by it in inference), blocks rising."""

    def token_counts(self) -> TokenCounts:
        """Return the tokens along the blocks in inference, which an exported file must have."""
        left = [(block, self.layout.prefix + count) for block, count in self.patches_left()]
        return counts_after(self.layout.prefix + self.layout.patches, self.layout.depth, left, within=self.within)

    def finish(self, vit: Any) -> None:
        """Take off what only training needs: called on the copy that is exported."""
        self.survivors = None

    def end_step(self, step: int) -> None:
        """`step` optimizer steps are done: let go of what the forward passes before left behind."""
        self.survivors = None
        self.passes.begin_step()

    def check_tokens(self, x: Tensor, patches: int) -> None:
        """Raise ValueError unless x [images, tokens, width] has the prefix and so many patch tokens."""
        if x.shape[1] != self.layout.prefix + patches:
            raise ValueError(
                f"{x.shape[1]} tokens came where {self.layout.prefix} + {patches} were expected: counts are fixed to "
                "the image size that the model had at engine.prepare()"
            )

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def hooks_of(model: nn.Module) -> TokenHooks | None:
    """Return what reduces the tokens of `model`, or of the model inside a wrapper; None where nothing does."""
    for module in unwrapped(model).modules():
        found = vars(module).get(ATTRIBUTE)
        if isinstance(found, TokenHooks):
            return found
    return None


def finish(model: nn.Module) -> None:
    """Make a copy of a model what is deployed: without what only training needs."""
    hooks = hooks_of(model)
    if hooks is not None:
        hooks.finish(find_transformer(model))
