"""Attention with rounded products: what it computes, in all the forms that models write it."""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine import quant
from ovit_engine.quant import QuantAttention, attention_modules, bake, calibrate, prepare_quantization, quantizers

OPERANDS = ["query_quantizer", "key_quantizer", "attention_quantizer", "value_quantizer"]


class OwnAttention(nn.Module):
    """Written out, or with torch's fused kernel."""

    def __init__(self, fused: bool, mask: Tensor | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.fused, self.mask, self.scale = nn.Linear(8, 24), fused, mask, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.scale)
        else:
            scores = (q * (self.scale or 0.5)) @ k.transpose(-2, -1)
            if self.mask is not None:
                scores = (
                    scores.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else scores + self.mask
                )
            y = torch.matmul(scores.softmax(-1), v)
        return y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def nearest(x: Tensor, quantizer: nn.Module) -> Tensor:
    """Rounded in float64 by the definition of ONNX."""
    scale, zero = quantizer.scale.double(), quantizer.zero_point.double()
    low, high = (0, 255) if quantizer.grid.dtype == torch.uint8 else (-128, 127)
    return (((x.double() / scale).round() + zero).clamp(low, high) - zero) * scale


MASKS = {"none": None, "bool": torch.rand(5, 5) > -1, "float": torch.randn(2, 5, 5)}
MASKS["bool"][0, 3] = MASKS["bool"][2, 1] = False


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("fused", [True, False])
def test_both_products_take_rounded_operands(fused: bool, scale: float | None, mask: str) -> None:
    torch.manual_seed(0)
    model = Model(OwnAttention(fused, MASKS[mask], scale)).eval()
    x = torch.randn(6, 5, 8)
    q, k, v = model.attn.qkv(x).double().unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    prepare_quantization(model, [], attention=["attn"])
    calibrate(model, [(x,)])
    quantizer = [model.attn.get_submodule(name) for name in OPERANDS]
    scores = nearest(q * (scale or 0.5), quantizer[0]) @ nearest(k, quantizer[1]).transpose(-2, -1)
    if mask == "bool":
        scores[:, :, ~MASKS["bool"]] = -torch.inf
    elif mask == "float":
        scores = scores + MASKS["float"].double()
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    shares = shares / shares.sum(-1, keepdim=True)
    expected = (nearest(shares, quantizer[2]) @ nearest(v, quantizer[3])).transpose(1, 2).flatten(2)
    got = model(x).double()
    # a score that lies between two levels may fall either way in float32: one level in few values
    far = (got - expected).abs() > 1e-5
    assert far.double().mean() < 0.05
    assert (got - expected).abs().max() < 4 * float(quantizer[2].scale) * float(v.detach().abs().max())
    assert [q.grid.dtype for q in quantizer] == [torch.uint8, torch.int8, torch.uint8, torch.int8]
    torch.testing.assert_close(bake(copy.deepcopy(model))(x), model(x))


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options)).eval()


def test_as_installed_not_a_bit_changes_and_names_stay() -> None:
    model, x = vit(), torch.randn(4, 1, 8, 8)
    expected, names, kind = model(x), list(dict(model.named_parameters())), type(model.blocks[0].attn)
    prepare_quantization(model, [], attention=attention_modules(model))
    assert torch.equal(model(x), expected)
    assert list(dict(model.named_parameters())) == names
    assert isinstance(model.blocks[0].attn, kind)  # whoever looks for attention finds it
    assert isinstance(model.blocks[0].attn, QuantAttention)
    baked = bake(copy.deepcopy(model))
    assert type(baked.blocks[0].attn) is kind
    assert not list(quantizers(baked))
    assert torch.equal(baked(x), expected)


def test_it_travels_by_copy_and_by_pickle() -> None:
    model, x = vit(), torch.randn(16, 1, 8, 8)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    prepare_quantization(model, layers, attention=attention_modules(model))
    calibrate(model, [(x,)])
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
    baked = bake(copy.deepcopy(model))
    torch.testing.assert_close(pickle.loads(pickle.dumps(baked))(x), baked(x))
    torch.testing.assert_close(baked(x), expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))


def test_fused_and_written_out_attention_of_timm_round_alike() -> None:
    x, outputs = torch.randn(16, 1, 8, 8), []
    for fused in (True, False):
        model = vit()
        for block in model.blocks:
            block.attn.fused_attn = fused
        prepare_quantization(model, [], attention=attention_modules(model))
        calibrate(model, [(x,)])
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0.01)


def test_gradients_pass_and_a_compiled_graph_does_the_same() -> None:
    model, x = vit(), torch.randn(4, 1, 8, 8)
    prepare_quantization(model, [], attention=attention_modules(model))
    calibrate(model, [(x,)])
    model(x).square().sum().backward()
    assert all(bool(block.attn.qkv.weight.grad.abs().sum() > 0) for block in model.blocks)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1),
         "num_heads": (2, 2)}, ["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"]),
        ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2,
         "cls_attn_layers": 1}, ["blocks.0.attn", "cls_attn_blocks.0.attn"]),
        ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 8, 16)},
         ["stages.3.blocks.2.token_mixer"]),
        ("resnet18", {}, []),
    ],
)  # fmt: skip
def test_attention_is_found(name: str, options: dict[str, object], found: list[str]) -> None:
    assert attention_modules(timm.create_model(name, **options)) == found
    assert attention_modules(nn.TransformerEncoderLayer(8, 2)) == []


class Thrice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT @ x @ x.mT


def test_what_is_no_attention_is_told() -> None:
    model = Model(Thrice())
    prepare_quantization(model, [], attention=["attn"])
    with pytest.raises(ValueError, match="QuantThrice has more products than Q·K and A·V: name it in exclude"):
        calibrate(model, [(torch.randn(2, 3, 4),)])


def test_causal_attention_is_told() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = Model(Causal())
    prepare_quantization(model, [], attention=["attn"])
    with pytest.raises(ValueError, match="QuantCausal is causal"):
        calibrate(model, [(torch.randn(2, 3, 4),)])


def test_the_presets_of_grids() -> None:
    model, x = vit(), torch.randn(16, 1, 8, 8)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    prepare_quantization(model, layers, scheme=quant.GPU, attention=attention_modules(model))
    calibrate(model, [(x,)])
    assert {q.grid.dtype for _, q in quantizers(model)} == {torch.int8}
    assert all(bool((q.zero_point == 0).all()) for _, q in quantizers(model))
