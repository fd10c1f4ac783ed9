"""FLOPs: published counts of known models, shares of masked weights however they are used, nothing left changed."""

import copy
from functools import partial

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.flops import Flops, count_flops

IMAGE = torch.zeros(1, 3, 224, 224)


def empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def every_other(model: nn.Module, keep: str) -> dict[str, Tensor]:
    """Masks of density 1/2 (in columns) on the weights whose name holds `keep`."""
    masks = {}
    for name, weight in model.named_parameters():
        if keep in name and weight.ndim > 1:
            masks[name] = torch.ones(weight.shape, dtype=torch.bool)
            masks[name][:, ::2] = False
    return masks


@pytest.mark.parametrize(
    ("name", "gmacs"),
    # DeiT 1.26, 4.61, 17.58 and ResNet50-D 4.35 in timm's tables, which count norms too
    [
        ("deit_tiny_patch16_224", 1.254),
        ("deit_small_patch16_224", 4.599),
        ("deit_base_patch16_224", 17.564),
        ("resnet50d", 4.329),
    ],
)
def test_known_models(name: str, gmacs: float) -> None:
    assert count_flops(empty(name), IMAGE).dense / 2e9 == pytest.approx(gmacs, abs=5e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_in_full_however_it_is_computed(fused: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    tokens, dim = 5, 192
    layers = tokens * 12 * dim**2
    products = 2 * tokens**2 * dim
    patches = 4 * 3 * 16**2 * dim
    assert count_flops(model, IMAGE[..., :32, :32]).dense == 2 * (patches + 2 * (layers + products) + dim * 1000)


# DeiT: every prunable weight meets 197 tokens, so the reduction does not depend on where the zeros are. The paper's
# Table 2 has 43.9, 65.8 and 79.0 % for DeiT-Tiny, 46.9 (oViT), 70.2 and 84.1 % for Small: more, as if it left out part
# of attention; without the two products of attention at all it would be 48.6, 73.0, 87.6 and 49.3, 74.0, 88.8 %.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("deit_tiny_patch16_224", (0.417, 0.626, 0.751)), ("deit_small_patch16_224", (0.455, 0.682, 0.819))],
)
def test_table_2(name: str, expected: tuple[float, ...]) -> None:
    model = empty(name)
    published = {"deit_tiny_patch16_224": (0.439, 0.658, 0.790), "deit_small_patch16_224": (0.469, 0.702, 0.841)}
    generator = torch.Generator().manual_seed(0)
    for sparsity, reduction, paper in zip((0.5, 0.75, 0.9), expected, published[name], strict=True):
        masks = {
            n: torch.rand(p.shape, generator=generator) >= sparsity
            for n, p in model.named_parameters()
            if n.startswith("blocks") and p.ndim == 2
        }
        found = count_flops(model, IMAGE, masks).reduction
        assert found == pytest.approx(reduction, abs=1e-3)
        assert found < paper < found * 1.17


class Functional(nn.Module):
    """Uses parts of one weight, by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.split([2, 4])
        return F.linear(x, first).sum() + (x[:2] @ second.t()).sum()


@pytest.mark.parametrize("turned", [False, True])
def test_a_slice_of_a_weight_counts_its_own_zeros(turned: bool) -> None:
    model = Functional()
    if turned:  # another layout in memory
        model.weight = nn.Parameter(torch.randn(4, 6).t())
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:2] = False  # all of the first part, nothing of the second
    assert count_flops(model, torch.zeros(3, 4), {"weight": mask}) == Flops(2 * (3 * 8 + 2 * 16), 2 * 2 * 16)


class Derived(nn.Linear):
    """Multiplies by something made from its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


def test_only_the_owner_of_a_masked_weight_is_taken_to_use_it() -> None:
    model = nn.Sequential(Derived(4, 4), nn.Linear(4, 4))
    mask = torch.eye(4, dtype=torch.bool)
    assert count_flops(model, torch.zeros(1, 4), {"0.weight": mask}) == Flops(64, 8 + 32)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_transformer(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first).eval()
    x = torch.zeros(1, 5, 8) if batch_first else torch.zeros(5, 1, 8)
    weights, products = 5 * (4 * 64 + 2 * 128), 2 * 25 * 8
    assert count_flops(layer, x).dense == 2 * (weights + products)
    masks = every_other(layer, "weight")
    assert set(masks) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    assert count_flops(layer, x, masks).sparse == 2 * (weights / 2 + products)


def test_convolutions_in_any_memory_format_and_used_twice() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=2).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[0, :, 0, 0] = False
    found = count_flops(model, torch.zeros(2, 4, 5, 5), {"0.weight": mask})
    assert found.dense == 2 * 2 * (2 * 25 * 4 * 2 * 9)
    assert found.sparse == pytest.approx(found.dense * 70 / 72)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_linear_layers_of_all_shapes(batch: int, tokens: int, inputs: int, outputs: int, seed: int, bias: bool) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias)
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = count_flops(layer, torch.zeros(batch, tokens, inputs), {"weight": mask})
    assert found.dense == 2 * batch * tokens * inputs * outputs
    assert found.sparse == pytest.approx(2 * batch * tokens * int(mask.sum()))


def test_quantized_and_half_precision_layers_count_the_same_zeros() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    x = IMAGE[..., :32, :32]
    masks = every_other(model, "blocks")
    plain = count_flops(model, x, masks)
    assert 0.3 < plain.reduction < 0.5
    assert count_flops(copy.deepcopy(model).to(torch.bfloat16), x.bfloat16(), masks) == plain
    engine = Engine(model, Recipe.parse("modifiers: [{quantize: {}}]"), steps_per_epoch=1, epochs=1).prepare()
    engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()  # ranges are seen: the weights are fake-quantized now
    assert count_flops(model, x, masks) == plain


class ModelEmaWithoutForward(nn.Module):
    """A wrapper whose own forward must not run, as that of DistributedDataParallel, which waits for other ranks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_masks_of_an_engine() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recipe = Recipe.parse("modifiers: [{magnitude_prune: {sparsity: 0.75, targets: ['1.weight']}}]")
    engine = Engine(model, recipe, steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.0), calibration=Calibration([(0, 0)], F.mse_loss))  # type: ignore[arg-type]
    assert count_flops(model, torch.zeros(1, 8), engine.run.masks).reduction == 0.375
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled only to be counted"))
    assert count_flops(compiled, torch.zeros(1, 8), engine.run.masks).reduction == 0.375  # type: ignore[arg-type]
    assert count_flops(ModelEmaWithoutForward(model), torch.zeros(1, 8), engine.run.masks).reduction == 0.375


def test_nothing_is_left_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    count_flops(model, torch.ones(2, 4), every_other(model, "0.weight"))
    assert [module.training for module in model] == [True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_fails_leaves_no_hook() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shape"):
        count_flops(model, torch.ones(2, 5), every_other(model, "weight"))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_weights_that_share_their_memory_count_each_their_own() -> None:
    memory = torch.zeros(2, 4, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(memory[0]), nn.Parameter(memory[1])
    mask = torch.eye(4, dtype=torch.bool)
    for name in ("0.weight", "1.weight"):
        assert count_flops(model, torch.zeros(1, 4), {name: mask}) == Flops(64, 32 + 8)


def test_no_products_no_reduction() -> None:
    assert count_flops(nn.ReLU(), torch.ones(1)) == Flops(0, 0.0)
    assert Flops(0, 0.0).reduction == 0.0


def test_masks_that_do_not_fit() -> None:
    count = partial(count_flops, nn.Linear(4, 2), torch.ones(1, 4))
    with pytest.raises(ValueError, match="the model has no weight 'wight' to which the mask belongs"):
        count({"wight": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"the mask of 'weight' is \[4, 2\], the weight \[2, 4\]"):
        count({"weight": torch.ones(4, 2, dtype=torch.bool)})
