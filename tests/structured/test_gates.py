"""Gates on heads and units: what they compute, what they survive, where they are refused."""

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention, GlobalResponseNormMlp, GluMlp, Mlp
from torch import Tensor, nn

from ovit_engine.structured import gates
from ovit_engine.structured.gates import (
    GateSite,
    copy_gates,
    find_sites,
    install,
    installed,
    live_mask,
    set_gate,
    uninstall,
)

DEPTH, HEADS, DIM = 2, 3, 48
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def vit(**options: Any) -> nn.Module:
    """A tiny ViT whose biases, norms and LayerScale all count."""
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, **options}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gated(*keeps: list[int], **options: Any) -> nn.Module:
    """`vit` with only the named heads (or units) of the first sites on."""
    model = vit(**options)
    sites = find_sites(model)
    install(sites)
    for site, keep in zip(sites, keeps, strict=False):
        set_gate(site, torch.isin(torch.arange(site.count), torch.tensor(keep)))
    return model


def by_hand(x: Tensor, attn: Any, keep: list[int]) -> Tensor:
    """Attention of the kept heads alone in float64, head by head."""
    d = attn.head_dim
    w, b = attn.qkv.weight.double(), attn.qkv.bias.double()
    out = torch.zeros_like(x) + attn.proj.bias.double()
    for head in keep:
        q, k, v = (
            x @ w[part * attn.num_heads * d + head * d :][:d].T + b[part * attn.num_heads * d + head * d :][:d]
            for part in range(3)
        )
        weights = (q @ k.transpose(-1, -2) * d**-0.5).softmax(-1)
        out = out + weights @ v @ attn.proj.weight[:, head * d : head * d + d].double().T
    return out


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 3), st.sampled_from([8, 4]), st.booleans())
def test_gated_attention_is_attention_of_the_kept_heads(keep: set[int], batch: int, width: int, fused: bool) -> None:
    torch.manual_seed(len(keep))
    attn = Attention(32, num_heads=4, attn_head_dim=width, qkv_bias=True).eval()
    attn.fused_attn = fused
    (site,) = find_sites(attn, ["heads"])
    assert (site.name, site.owner_name, site.count, site.width) == ("proj", "", 4, width)
    install([site])
    set_gate(site, torch.isin(torch.arange(4), torch.tensor(sorted(keep))))
    x = torch.randn(batch, 7, 32)
    with torch.no_grad():
        assert torch.allclose(attn(x).double(), by_hand(x.double(), attn, sorted(keep)), atol=1e-5)


def test_gated_units_are_an_mlp_without_them() -> None:
    mlp = Mlp(16, 24).eval()
    (site,) = find_sites(mlp, ["units"])
    install([site])
    keep = torch.arange(24) % 3 > 0
    set_gate(site, keep)
    x = torch.randn(4, 16)
    hidden = nn.functional.gelu(x @ mlp.fc1.weight[keep].T + mlp.fc1.bias[keep])
    assert torch.allclose(mlp(x), hidden @ mlp.fc2.weight[:, keep].T + mlp.fc2.bias, atol=1e-6)


def test_gates_that_keep_all_change_nothing() -> None:
    assert torch.equal(gated()(IMAGES), vit()(IMAGES))


def test_sites_in_the_order_of_the_model() -> None:
    sites = find_sites(vit())
    assert [(site.name, site.kind, site.count, site.width) for site in sites] == [
        ("blocks.0.attn.proj", "heads", 3, 16),
        ("blocks.0.mlp.fc2", "units", 192, 1),
        ("blocks.1.attn.proj", "heads", 3, 16),
        ("blocks.1.mlp.fc2", "units", 192, 1),
    ]
    assert [site.source_name for site in sites[:2]] == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]
    assert [site.kind for site in find_sites(vit(), ["units"])] == ["units", "units"]


def test_only_what_is_gated_is_installed() -> None:
    model = vit()
    assert installed(model) == []
    install(find_sites(model, ["heads"]))
    assert [site.name for site in installed(model)] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    set_gate(installed(model)[0], torch.tensor([True, False, True]))
    install(find_sites(model))  # a second time leaves gates as they are
    assert installed(model)[0].gate.tolist() == [True, False, True]
    assert len(installed(model)[0].linear._forward_pre_hooks) == 1


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_distilled_registers_and_layer_scale_have_sites(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(find_sites(model)) == 24


def test_off_weights_get_no_gradient_and_infinity_does_not_spread() -> None:
    model = gated([1])
    site = installed(model)[0]
    model(IMAGES).sum().backward()
    for name, alive in live_mask(model).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert not gradient[~alive].any(), name
        assert name.startswith("blocks.1") or gradient[alive].any()
    with torch.no_grad():
        site.owner.get_parameter("qkv.bias")[2 * DIM :][:16] = torch.inf  # values of head 0, which is off
        assert torch.isfinite(model(IMAGES)).all()


def test_live_weights_by_hand() -> None:
    model = gated([2], [0, 5])
    alive = live_mask(model)
    rows = [c * DIM + 2 * 16 + i for c in range(3) for i in range(16)]
    assert alive["blocks.0.attn.qkv.weight"].any(1).nonzero().flatten().tolist() == rows
    assert alive["blocks.0.attn.qkv.bias"].nonzero().flatten().tolist() == rows
    assert alive["blocks.0.attn.proj.weight"].all(0).nonzero().flatten().tolist() == list(range(32, 48))
    assert alive["blocks.0.mlp.fc1.weight"].all(1).nonzero().flatten().tolist() == [0, 5]
    assert alive["blocks.0.mlp.fc1.bias"].nonzero().flatten().tolist() == [0, 5]
    assert alive["blocks.0.mlp.fc2.weight"].any(0).nonzero().flatten().tolist() == [0, 5]
    assert alive["blocks.1.mlp.fc2.weight"].all()
    assert {name: mask.shape for name, mask in alive.items()} == {
        name: model.get_parameter(name).shape for name in alive
    }
    assert "blocks.0.attn.qkv.bias" not in live_mask(gated([2], qkv_bias=False))


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_of_a_gate_are_those_that_die_with_it(bias: bool) -> None:
    model = gated([0, 2], [i for i in range(192) if i != 7], qkv_bias=bias)
    dead = {name: int((~alive).sum()) for name, alive in live_mask(model).items() if name.startswith("blocks.0")}
    heads, units = installed(model)[:2]
    assert heads.parameters == sum(count for name, count in dead.items() if "attn" in name)
    assert units.parameters == sum(count for name, count in dead.items() if "mlp" in name) == 2 * DIM + 1


def test_copies_and_pickles_have_gates_of_their_own() -> None:
    model = gated([0, 1])
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    before = model(IMAGES)
    set_gate(installed(model)[0], torch.tensor([False, False, True]))
    for other in (twin, thawed):
        assert torch.equal(other(IMAGES), before)
        copy_gates(model, other)
        assert torch.equal(other(IMAGES), model(IMAGES))
    assert not torch.equal(before, model(IMAGES))
    with pytest.raises(RuntimeError, match=r"the EMA copy has no gate of 'blocks.0.attn.proj'"):
        copy_gates(model, vit())


def test_an_average_copies_gates_as_they_are() -> None:
    model = gated([0, 1])
    average = torch.optim.swa_utils.AveragedModel(model)
    timms = timm.utils.ModelEmaV3(model, decay=0.9)
    set_gate(installed(model)[0], torch.tensor([False, True, True]))
    average.update_parameters(model)
    timms.update(model)
    for other in (average, timms):
        assert installed(other)[0].name.endswith("blocks.0.attn.proj")
        assert installed(other.module)[0].gate.dtype == torch.bool
    assert installed(timms.module)[0].gate.tolist() == [False, True, True]


def test_state_dicts_hold_gates_and_those_without_load_too() -> None:
    model = gated([0], [1, 2, 3])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other = gated()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert [site.gate.sum() for site in installed(other)] == [1, 3, 3, 192]
    assert torch.equal(other(IMAGES), model(IMAGES))
    other.load_state_dict(vit().state_dict())  # made before the surgery
    assert [site.gate.sum() for site in installed(other)] == [1, 3, 3, 192]
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.attn.proj.input_gate"):
        other.load_state_dict({**model.state_dict(), "blocks.0.attn.proj.input_gate": torch.ones(2)})


def test_uninstalled_gates_leave_no_trace() -> None:
    model = copy.deepcopy(gated([0], [1, 2]))
    uninstall(model)
    assert installed(model) == []
    assert list(model.state_dict()) == list(vit().state_dict())
    assert not any(m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert torch.equal(model(IMAGES), vit()(IMAGES))


def test_compiled_once_whatever_the_gates() -> None:
    model = gated([0, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        set_gate(installed(model)[0], torch.tensor([False, False, True]))
        assert torch.allclose(compiled(IMAGES), model(IMAGES), atol=1e-6)


def test_quantized_layers_keep_their_gates() -> None:
    from ovit_engine import quant

    model = gated([0, 1])
    before = model(IMAGES)
    quant.prepare_quantization(
        model, [site.name for site in installed(model)], attention=quant.attention_modules(model)
    )
    assert [site.name for site in installed(model)] == [site.name for site in find_sites(model)]
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("keep", [[True, False], [1, 0, 1], [[True, True, True]]])
def test_gates_of_a_wrong_shape_or_type_are_refused(keep: list[Any]) -> None:
    model = gated()
    with pytest.raises(ValueError, match=r"the gate of 'blocks.0.attn.proj' must be boolean of shape \[3\], not torch"):
        set_gate(installed(model)[0], torch.tensor(keep))


def test_a_gate_keeps_at_least_one() -> None:
    site = installed(gated([0]))[0]
    with pytest.raises(ValueError, match=r"'blocks.0.attn.proj' would switch off all 3 heads: keep at least one"):
        set_gate(site, torch.zeros(3, dtype=torch.bool))
    assert site.gate.tolist() == [True, False, False]


class Refused(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


class Biased(Attention):
    """As Swin's and BEiT's: a bias for each head."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class Talking(Attention):
    def __init__(self) -> None:
        super().__init__(16, 4)
        self.proj_l = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("part", "kind", "reason"),
    [
        (Attention(16, 4, scale_norm=True, norm_layer=nn.LayerNorm), "heads", "has a norm over all heads"),
        (Attention(16, 4, gated=True), "heads", "gates its output by a layer of its own"),
        (Biased(), "heads", "has a part that we do not know, 'relative_position_bias_table'"),
        (Talking(), "heads", "has a part that we do not know, 'proj_l'"),
        (Mlp(8, 16, norm_layer=nn.LayerNorm), "units", "has a norm over all units"),
        (GluMlp(8, 16), "units", "computes 16 features for 8 hidden units"),
        (GlobalResponseNormMlp(8, 16), "units", "has a part that we do not know, 'grn'"),
        (Mlp(8, 16, act_layer=nn.PReLU), "units", "has parameters in its activation"),
        (Mlp(8, 16, use_conv=True), "units", "has an fc1 or fc2 that is no Linear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layouts_from_which_removal_is_not_exact_are_refused(part: nn.Module, kind: gates.Kind, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^part .{type(part).__name__}. {reason}: its {kind} can't be taken out"):
        find_sites(Refused(part), [kind])


@pytest.mark.parametrize(("kind", "what"), [("heads", "attention with qkv and proj"), ("units", "MLP with fc1")])
def test_a_model_without_any_is_an_error(kind: gates.Kind, what: str) -> None:
    with pytest.raises(ValueError, match=f"^Sequential has no {kind} to gate: it has no {what}"):
        find_sites(nn.Sequential(nn.Linear(4, 4)), [kind])


def test_swin_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match=r"^layers.0.blocks.0.attn \(WindowAttention\) "):
        find_sites(model)


def test_a_site_is_a_value() -> None:
    model = vit()
    assert find_sites(model) == find_sites(model)
    assert isinstance(find_sites(model)[0], GateSite)
