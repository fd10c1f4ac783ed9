"""What a token is worth: small modules that are trained along with the model, and stay in float."""

import torch
from torch import Tensor, nn

from ovit_engine.tokens.ops import is_autocast
from ovit_engine.utils.random_states import mixed, random_state, seed_cpu, set_random_state


class Scorer(nn.Module):
    """A score for each patch token, in the type of its weights whatever autocast says.

    Rounded scores would often be equal, and PyTorch and a runtime break ties differently.
    """

    def forward(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        """Return the scores [images, tokens] of patches [images, tokens, width].

        kept: [images, tokens], 1 for tokens that are still there; None where all are.
        """
        patches = patches.to(next(self.parameters()).dtype)
        if is_autocast(patches):
            with torch.autocast(patches.device.type, enabled=False):
                return self.score(patches, kept)
        return self.score(patches, kept)

    def score(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        """Return the scores, of patches in the type of the weights."""
        raise NotImplementedError


class Predictor(Scorer):
    """DynamicViT's (arXiv 2106.02034, section 3.2): half of a token's features are its own, half those of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.output = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU()
        )
        self.logits = nn.Linear(width // 4, 2)  # keep, drop

    def score(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        """Return the logit of keeping less that of dropping: as log-softmax orders tokens, at less cost."""
        own, common = self.local(patches).chunk(2, dim=-1)
        if kept is None:
            mean = common.mean(1, keepdim=True)
        else:
            kept = kept.unsqueeze(-1).to(common.dtype)
            # counts are whole: half a token keeps 0/0 away, and leaves all others as they are (a clamp at 1 would also
            # take the gradient of images with one token)
            mean = (common * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(0.5)
        logits: Tensor = self.logits(self.output(torch.cat([own, mean.expand_as(own)], dim=-1)))
        return logits[..., 0] - logits[..., 1]


class LinearScorer(Scorer):
    """SViTE+'s (arXiv 2106.04533, section 3.3): one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def score(self, patches: Tensor, kept: Tensor | None) -> Tensor:
        scores: Tensor = self.linear(patches)
        return scores.squeeze(-1)


def make_scorer(kind: type[Predictor] | type[LinearScorer], like: Tensor, width: int, seed: int) -> Scorer:
    """Return a scorer with weights that depend on `seed` alone, on the device and in the type of `like`."""
    state = random_state()
    try:
        seed_cpu(mixed(seed))
        scorer = kind(width)
        for module in scorer.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
    finally:
        set_random_state(state)
    return scorer.to(like.device, like.dtype)
