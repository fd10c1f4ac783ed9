"""Scores of gates against gradients of explicit gates, sample by sample, in every kind of backward pass."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from ovit_engine.structured.gates import GateSite, find_sites, install, set_gate
from ovit_engine.structured.recording import (
    GateScores,
    check_sums,
    is_recording,
    start_recording,
    stop_recording,
    take_sums,
)
from tests.structured.test_gates import IMAGES, vit

LABELS = torch.tensor([1, 7, 3, 3, 0])


def read_scores(sites: list[GateSite]) -> dict[str, GateScores]:
    sums = take_sums(sites)
    return {site.name: GateScores.of(site, sums[site.name]) for site in sites}


def pair(heads: int = 3, width: int = 4, fused: bool = True) -> tuple[nn.Module, list[GateSite]]:
    """Attention and an MLP in a row, with gates of which some are off."""
    torch.manual_seed(heads)
    model = nn.Sequential(Attention(12, heads, attn_head_dim=width, qkv_bias=True), Mlp(12, 10))
    model[0].fused_attn = fused
    sites = find_sites(model)
    install(sites)
    for site in sites:
        set_gate(site, torch.arange(site.count) % 3 != 1)
    return model, sites


def loss_of(output: Tensor) -> Tensor:
    return (output.square().sum((1, 2)) + output.sum((1, 2))).mean()


def explicit(model: Any, sites: list[GateSite], x: Tensor) -> dict[str, Tensor]:
    """Mean over samples of |dL/dgate| from float gates in the forward, in float64 and one sample at a time."""
    attn, mlp = copy.deepcopy(model).double()
    gates = [site.gate.double().requires_grad_(True) for site in sites]
    totals = [torch.zeros(site.count, dtype=torch.float64) for site in sites]
    for sample in x.double():
        qkv = (sample @ attn.qkv.weight.T + attn.qkv.bias).view(len(sample), 3, attn.num_heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        out = (q @ k.transpose(-1, -2) * attn.head_dim**-0.5).softmax(-1) @ v * gates[0].view(-1, 1, 1)
        y = out.permute(1, 0, 2).flatten(1) @ attn.proj.weight.T + attn.proj.bias
        z = nn.functional.gelu(y @ mlp.fc1.weight.T + mlp.fc1.bias) * gates[1] @ mlp.fc2.weight.T + mlp.fc2.bias
        for total, grad in zip(totals, torch.autograd.grad((z.square() + z).sum() / len(x), gates), strict=True):
            total += grad.abs()
    return {site.name: total / len(x) for site, total in zip(sites, totals, strict=True)}


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 4, 5]), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_importance_is_the_gradient_of_an_explicit_gate(
    heads: int, width: int, batch: int, tokens: int, fused: bool
) -> None:
    model, sites = pair(heads, width, fused)
    x = torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(batch))
    start_recording(sites)
    loss_of(model(x)).backward()
    scores = read_scores(sites)
    for name, expected in explicit(model, sites, x).items():
        assert scores[name].samples == batch
        assert torch.allclose(scores[name].importance.double(), expected, rtol=1e-4, atol=1e-6)


def test_growth_and_salience_by_hand() -> None:
    model, sites = pair()
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            args[0].retain_grad()
            kept[name] = [*kept.get(name, []), args[0]]

        return hook

    handles = [site.linear.register_forward_pre_hook(keep(site.name), prepend=True) for site in sites]
    x = torch.randn(4, 3, 12)
    start_recording(sites)
    loss_of(model(x)).backward()
    for handle in handles:
        handle.remove()
    scores = read_scores(sites)
    for site in sites:
        (features,) = kept[site.name]
        # the layer that reads the gated features gives their gradient, also of what is off
        assert features.grad is not None
        on = site.gate.repeat_interleave(site.width)
        shape = (4, 3, site.count, site.width)
        gradient, values = features.grad.view(shape), features.detach().view(shape)
        expected = gradient.abs().sum((1, 3)).mean(0)
        assert torch.allclose(scores[site.name].growth[site.gate], expected[site.gate], rtol=1e-5)
        products = (gradient * values).abs().sum((1, 3)).mean(0)
        assert torch.allclose(scores[site.name].salience[site.gate], products[site.gate], rtol=1e-5)
        assert not features.grad[..., ~on].any()


def test_off_units_have_scores_of_the_size_of_the_others() -> None:
    model, sites = pair()
    start_recording(sites)
    loss_of(model(torch.randn(16, 5, 12))).backward()
    scores = read_scores(sites)
    for site in sites:
        found = scores[site.name]
        for score in (found.importance, found.growth, found.salience):
            assert (score[~site.gate] > score[site.gate].mean() / 50).all()


# --- kinds of backward passes


def scores_of(model: nn.Module, *losses: Any) -> dict[str, GateScores]:
    sites = find_sites(model)
    start_recording(sites)
    for loss in losses:
        loss().backward()
    found = read_scores(sites)
    stop_recording(sites)
    return found


def ready() -> Any:
    model = vit(depth=1).train()
    sites = find_sites(model)
    install(sites)
    set_gate(sites[0], torch.tensor([True, False, True]))
    return model


def forward(model: Any, part: slice = slice(None), scale: float = 1.0) -> Any:
    return lambda: scale * nn.functional.cross_entropy(model(IMAGES[part]), LABELS[part])


def check_same(found: dict[str, GateScores], expected: dict[str, GateScores], rtol: float = 1e-4) -> None:
    for name, scores in expected.items():
        assert found[name].samples == scores.samples
        for part in ("importance", "growth", "salience"):
            torch.testing.assert_close(getattr(found[name], part), getattr(scores, part), rtol=rtol, atol=1e-7)


def test_accumulation_sees_every_part() -> None:
    model = ready()
    whole = scores_of(model, forward(model))
    parts = [forward(model, slice(0, 2), 2 / 5), forward(model, slice(2, 5), 3 / 5)]
    check_same(scores_of(model, *parts), whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_counted_once(reentrant: bool) -> None:
    model = ready()

    def loss() -> Tensor:
        tokens = model._pos_embed(model.patch_embed(IMAGES))
        tokens = torch.utils.checkpoint.checkpoint(model.blocks[0], tokens, use_reentrant=reentrant)
        return nn.functional.cross_entropy(model.forward_head(model.norm(tokens)), LABELS)

    check_same(scores_of(model, loss), scores_of(model, forward(model)))


def test_a_compiled_model_records_too() -> None:
    model = ready()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    forward(compiled)().backward()
    expected = scores_of(model, forward(model), forward(model))
    check_same(scores_of(model, forward(compiled), forward(compiled)), expected)
    assert not any(map(is_recording, find_sites(model)))


def test_autocast_and_a_scaled_loss() -> None:
    model = ready()
    plain = scores_of(model, forward(model))
    with torch.autocast("cpu", torch.bfloat16):
        check_same(scores_of(model, forward(model)), plain, rtol=0.3)
    scaled = scores_of(model, forward(model, scale=1024.0))
    for name, scores in plain.items():
        assert torch.allclose(scaled[name].importance, 1024 * scores.importance, rtol=1e-4)


def test_what_overflows_is_not_counted() -> None:
    model = ready()
    check_same(scores_of(model, forward(model), forward(model, scale=float("inf"))), scores_of(model, forward(model)))
    with pytest.raises(ValueError, match=r"no finite gradient came to the gate of 'blocks.0.attn.proj': is its layer"):
        scores_of(model, forward(model, scale=float("inf")))


def test_evaluation_and_passes_without_gradient_are_not_counted() -> None:
    model = ready()
    sites = find_sites(model)
    start_recording(sites)
    forward(model)().detach()
    forward(model.eval())().backward()  # as calibration does
    with torch.no_grad():
        forward(model.train())()
    assert not any(sums.any() for sums in take_sums(sites).values())


def test_copies_record_nothing() -> None:
    model = ready()
    start_recording(find_sites(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        forward(other)().backward()
        assert not any(map(is_recording, find_sites(other)))
    assert all(map(is_recording, find_sites(model)))
    assert not any(sums.any() for sums in take_sums(find_sites(model)).values())


def test_sums_add_up() -> None:
    model = ready()
    sites = find_sites(model)
    start_recording(sites)
    losses = [forward(model, part) for part in (slice(0, 2), slice(2, 5))]
    found = []
    for loss in losses:
        loss().backward()
        found.append(take_sums(sites))
    expected = scores_of(model, *losses)
    check_same({site.name: GateScores.of(site, found[0][site.name] + found[1][site.name]) for site in sites}, expected)
    check_sums(sites[0], found[0][sites[0].name])
    with pytest.raises(ValueError, match=r"of 'blocks.0.attn.proj' must be of shape \[4, 3\], not \[4, 2\]"):
        check_sums(sites[0], torch.zeros(4, 2))


def test_no_tensor_is_kept_outside_windows() -> None:
    """What autograd saves with idle gates: what it saves without them, and a few booleans."""

    def saved(model: nn.Module) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.bool:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(model)()
        return sum(sizes)

    model, bare = ready(), vit(depth=1).train()
    assert saved(model) == saved(bare)
    sites = find_sites(model)
    start_recording(sites)
    assert saved(model) > saved(bare)
    stop_recording(sites)
    assert saved(model) == saved(bare)
