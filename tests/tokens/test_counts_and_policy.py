"""Counts of tokens, the masked softmax, gathering: against plain references in float64."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.tokens import floor_counts, gather_tokens, policy_bias, quarter_blocks, top_tokens
from ovit_engine.tokens.ops import EPSILON_HALF, compute_epsilon

# --- counts


@pytest.mark.parametrize(
    ("keep", "counts"), [(0.8, [156, 125, 100]), (0.7, [137, 96, 67]), (0.9, [176, 158, 142]), (1.0, [196] * 3)]
)
def test_counts_are_those_of_dynamic_vit(keep: float, counts: list[int]) -> None:
    assert floor_counts(196, keep, 3) == counts


@given(st.integers(1, 2000), st.integers(1, 100), st.integers(1, 5))
@example(100, 29, 1)  # 28.999999999999996 in floating point
def test_counts_are_the_whole_parts_of_exact_fractions(patches: int, percent: int, stages: int) -> None:
    exact = [math.floor(patches * Fraction(percent, 100) ** stage) for stage in range(1, stages + 1)]
    if exact[-1] < 1:
        with pytest.raises(ValueError, match="at least one must be kept"):
            floor_counts(patches, percent / 100, stages)
    else:
        assert floor_counts(patches, percent / 100, stages) == exact


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3, 6, 9]), (24, [6, 12, 18]), (4, [1, 2, 3]), (2, [1]), (1, [])])
def test_stages_stand_at_the_quarters(depth: int, blocks: list[int]) -> None:
    assert quarter_blocks(depth) == blocks


# --- the masked softmax


def published(scores: Tensor, policy: Tensor, epsilon: float) -> Tensor:
    """exp(s) G over its sum with G = policy of the column but on the diagonal; the published smoothing of both."""
    tokens = scores.shape[-1]
    allowed = policy[:, None, None, :].expand(-1, 1, tokens, tokens)
    allowed = allowed + (1 - allowed) * torch.eye(tokens, dtype=scores.dtype)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * allowed
    return (weights + epsilon / tokens) / (weights.sum(-1, keepdim=True) + epsilon)


def attended(kind: torch.dtype, seed: int, masked: bool) -> list[Tensor]:
    """Output and the gradients of q, k, v and the policy, of SDPA with the bias or of the published form in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, upstream = (torch.randn(2, 3, 9, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    policy = (torch.rand(2, 9, generator=generator) < 0.5).double()
    policy[:, 0] = 1.0
    policy[0, 1], policy[0, 2] = 0.0, 1.0
    if masked:
        q, k, v, upstream, policy = (part.to(kind) for part in (q, k, v, upstream, policy))
    leaves = [part.detach().requires_grad_() for part in (q, k, v, policy)]
    q, k, v, policy = leaves
    if masked:
        bias = policy_bias(policy.float()).to(kind)
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        output = published(q @ k.transpose(-2, -1) / 8**0.5, policy, 1e-6) @ v
    (output * upstream).sum().backward()  # type: ignore[no-untyped-call]
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bias_is_the_published_softmax_in_value_and_gradients(
    kind: torch.dtype, tolerance: float, seed: int
) -> None:
    ours, theirs = attended(kind, seed, masked=True), attended(kind, seed, masked=False)
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm() / other.norm()) < tolerance
    dropped = theirs[4][0, 1]  # the policy's gradient of a token with policy 0
    assert dropped != 0
    assert ours[4][0, 1] * dropped > 0
    if kind == torch.float32:
        assert float(ours[4][0, 1]) == pytest.approx(float(dropped), rel=1e-3)


def test_half_precision_gets_a_larger_epsilon() -> None:
    x = torch.zeros(1)
    assert compute_epsilon(x) == compute_epsilon(x.bfloat16()) == 1e-6
    assert compute_epsilon(x.half()) == EPSILON_HALF
    with torch.autocast("cpu", dtype=torch.float16):
        assert compute_epsilon(x) == EPSILON_HALF


def test_a_dropped_token_sees_itself_and_none_sees_it() -> None:
    bias = policy_bias(torch.tensor([[1.0, 0.0, 1.0]]))[0, 0]
    off = math.log(1e-6)
    assert torch.allclose(bias, torch.tensor([[0.0, off, 0.0], [0.0, 0.0, 0.0], [0.0, off, 0.0]]), atol=1e-5)


# --- gathering


@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 12), st.data())
def test_the_best_tokens_and_the_prefix_are_taken(images: int, prefix: int, patches: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, patches))
    generator = torch.Generator().manual_seed(images + prefix + patches)
    x = torch.randn(images, prefix + patches, 2, generator=generator)
    scores = torch.randn(images, patches, generator=generator)
    kept = gather_tokens(x, top_tokens(scores, keep), prefix)
    for image in range(images):
        places = sorted(range(patches), key=lambda place: -float(scores[image, place]))[:keep]
        expected = [x[image, place] for place in range(prefix)] + [x[image, prefix + place] for place in places]
        assert torch.equal(kept[image], torch.stack(expected))
