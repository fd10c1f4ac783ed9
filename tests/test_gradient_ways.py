"""Which way gradients are taken, and that both ways give the same: real models, and all that must be refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ovit_engine import Calibration, Slot, calibration, gradient_pass
from ovit_engine.quant import prepare_quantization, set_enabled, set_observing
from ovit_engine.targets import find_slots, parameter_slots

COUNT = 18


def images(*shape: int, count: int = 80, classes: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def collect(model: nn.Module, slots: list[Slot], data: Any, loss: Any, **options: Any) -> list[Tensor]:
    """All gradients of each slot, [count, *shape]."""
    settings = {"count": COUNT, "images_per_gradient": 3, "chunk": 7, **options}
    chunks = [[part.clone() for part in chunk] for chunk in Calibration(data, loss).gradients(model, slots, **settings)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def way(caplog: pytest.LogCaptureFixture) -> str:
    """The line that says which way was taken."""
    return next(m for m in reversed(caplog.messages) if "a backward pass" in m)


def compare(
    model: nn.Module,
    targets: list[str],
    data: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    loss: Any = F.cross_entropy,
    **options: Any,
) -> str:
    """Assert that gradients equal those of one backward pass each to 1e-5; return which way they were taken."""
    torch.manual_seed(1)
    slots = find_slots(model, targets)
    caplog.set_level(logging.DEBUG, logger=gradient_pass.__name__)
    caplog.clear()
    found = collect(model, slots, data, loss, **options)
    chosen = way(caplog)
    with monkeypatch.context() as patch:
        patch.setattr(gradient_pass, "ACTIVATIONS", 0)
        expected = collect(model, slots, data, loss, **options)
        assert "one gradient a backward pass" in way(caplog)
    for slot, rows, singles in zip(slots, found, expected, strict=True):
        for row, single in zip(rows, singles, strict=True):
            largest = float(single.abs().max())
            assert largest > 0, slot.name
            assert float((row - single).abs().max()) <= 1e-5 * largest, slot.name
    return chosen


def vit(**options: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=5,
        embed_dim=32,
        depth=2,
        num_heads=2,
        **options,
    )


def quantized(observed: bool) -> nn.Module:
    model = vit()
    prepare_quantization(model, ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"])
    if observed:
        set_observing(model, True)
        model(torch.randn(8, 1, 8, 8))
        set_observing(model, False)
        set_enabled(model, True)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))


BLOCKS = [r"re:.*(qkv|proj|fc1|fc2)\.weight"]
MATRICES = [r"re:.*weight"]
REAL: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "mlp": (mlp, ["1.weight", "1.bias", "3.weight", "3.bias"], (1, 8, 8)),
    "vit": (vit, [*BLOCKS, "patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.bias"], (1, 8, 8)),
    "convnext": (
        lambda: timm.create_model("test_convnext", num_classes=5),
        [r"re:.*(conv_dw|fc1|fc2|stem.0|head\.fc)\.weight", r"re:stages.*downsample.1.weight"],
        (3, 32, 32),
    ),
    "resnet": (
        lambda: timm.create_model("test_resnet", num_classes=5, zero_init_last=False),
        [r"re:conv1\.[036]\.weight", r"re:layer.*conv\d\.weight", "fc.weight", "fc.bias"],
        (3, 32, 32),
    ),
    "grouped and depthwise": (
        lambda: timm.create_model("test_efficientnet", num_classes=5),
        [r"re:blocks.*conv.*weight", "conv_stem.weight"],
        (3, 32, 32),
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            num_classes=5,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
        ),
        [*BLOCKS, r"re:.*reduction.weight"],
        (3, 32, 32),
    ),
    "prepared for quantization, not yet on": (lambda: quantized(False), BLOCKS, (1, 8, 8)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_batched_and_agree(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, targets, shape = REAL[name]
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 2**24)
    assert compare(make(), targets, images(*shape), caplog, monkeypatch).startswith("up to")


class Forward(nn.Module):
    """Two layers in a way that each test writes."""

    def __init__(self, forward: Callable[..., Tensor], width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x.flatten(1))


def twice(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.second(m.first(x)).tanh()).tanh())


def linear_function(m: Forward, x: Tensor) -> Tensor:
    return m.head(F.linear(m.first(x), m.second.weight).tanh())


def padded(m: Forward, x: Tensor) -> Tensor:
    x = F.conv2d(x.view(-1, 1, 8, 8), m.first.weight.view(12, 1, 8, 8), padding="same")  # not the parameter itself
    return m.head(m.second(x.flatten(2).mean(2)))


@pytest.mark.parametrize("forward", [twice, linear_function])
def test_what_can_be_followed_is(
    forward: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert compare(Forward(forward), MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")


def test_tied_weights_are_followed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Forward(lambda m, x: m.head(m.second(m.third(m.first(x)).tanh())))
    model.third = nn.Linear(12, 12)
    model.third.weight = model.second.weight
    assert compare(model, MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")


class Doubled(torch.autograd.Function):
    """A linear layer with a gradient of its own making."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return dy @ weight, 2 * dy.T @ x


def custom(m: Forward, x: Tensor) -> Tensor:
    return m.head(Doubled.apply(m.first(x), m.second.weight))


def custom_besides(m: Forward, x: Tensor) -> Tensor:
    return m.head(Doubled.apply(m.second(m.first(x)), m.second.weight))


def product(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.first(x) @ m.second.weight)


def penalised(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x))) + m.second.weight.square().sum() * torch.arange(5)


def standardised(m: Forward, x: Tensor) -> Tensor:
    weight = m.second.weight
    return m.head(F.linear(m.first(x), weight / weight.std()) + m.second(x[:, :12]))


def normed_over_images(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x).view(-1, 3, 4)
    return m.head(m.second(F.batch_norm(x, None, None, training=True).flatten(1)))


def centred(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(m.second((x - x.mean(0)).relu()))


def recurrent_over_images(m: Forward, x: Tensor) -> Tensor:
    """The well-known slip: time first and images first are mixed up, so each image sees those before it."""
    return m.head(m.second(m.first(x).cumsum(0).tanh()))


def images_second(m: Forward, x: Tensor) -> Tensor:
    x = x.view(-1, 4, 16).transpose(0, 1)  # [4, images, 16]
    return m.head(m.second(F.linear(x, m.first.weight[:, :16].contiguous())).tanh().mean(0))


def images_second_direct(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)[:, None].repeat(1, 4, 1).mul(torch.arange(4)[:, None]).transpose(0, 1)
    return m.head(m.second(x).tanh().mean(0))


def shuffled(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).flip(0).tanh()).flip(0))


def noisy(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(m.second(x + torch.rand_like(x)))


def three_images_only(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).view(3, 12)))


def first_left_out(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(torch.cat([x[:1], m.second(x[1:])]))


def checkpointed(m: Forward, x: Tensor) -> Tensor:
    return m.head(torch.utils.checkpoint.checkpoint(m.second, m.first(x), use_reentrant=False))  # type: ignore[no-any-return]


def scalar_besides(m: Forward, x: Tensor) -> Any:
    y = m.head(m.second(m.first(x)))
    return y, y.square().mean()


def pair_loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets) + outputs[1]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "custom autograd function": (custom, "no other way"),
    "custom autograd function besides": (custom_besides, "second.weight would be"),
    "matrix product": (product, "no other way"),
    "penalty": (penalised, "second.weight would be"),
    "standardised weight besides": (standardised, "second.weight would be"),
    "batch-norm over images": (normed_over_images, "would be"),
    "mean over images": (centred, "would be"),
    "recurrence over images": (recurrent_over_images, "would be"),
    "images in the second dimension": (images_second_direct, "second.weight would be"),
    "part of a weight, images second": (images_second, "no other way"),
    "images in another order": (shuffled, "second.weight would be"),
    "noise": (noisy, "would be"),
    "a number of images written in": (three_images_only, "does not take one image"),
    "a layer that leaves out the first image": (first_left_out, "no other way"),
    "a view of a weight": (padded, "no other way"),
    "a number besides the outputs": (scalar_besides, "no other way"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_all_else_is_taken_one_by_one(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    forward, words = REFUSED[name]
    loss = pair_loss if forward is scalar_besides else F.cross_entropy
    chosen = compare(Forward(forward), MATRICES, images(8, 8), caplog, monkeypatch, loss)
    assert chosen.startswith("one gradient a backward pass")
    assert words in chosen


def test_checkpointing_is_followed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert compare(Forward(checkpointed), MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")


def encoder() -> nn.Module:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))  # type: ignore[no-any-return]

    return Encoder()


def test_multi_head_attention_hides_its_weights(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert "no other way" in compare(
        encoder(), [r"re:.*(proj_weight|linear\d.weight|out_proj.weight)"], images(8, 8), caplog, monkeypatch
    )
    assert compare(encoder(), [r"re:.*linear\d.weight"], images(8, 8), caplog, monkeypatch).startswith("up to")


def test_norms_and_tables_are_taken_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("norm.weight", "pos_embed"):
        chosen = compare(vit(), ["blocks.0.mlp.fc1.weight", name], images(1, 8, 8), caplog, monkeypatch)
        assert "no other way" in chosen


def test_rounded_weights_are_taken_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The straight-through gradient is that of the raw weight, masked where rounding saturates."""
    torch.manual_seed(0)
    model = quantized(True)
    with torch.no_grad():
        model.get_submodule("blocks.0.mlp.fc1").weight[:4] *= 3  # type: ignore[index,operator]
    assert "no other way" in compare(model, BLOCKS, images(1, 8, 8), caplog, monkeypatch)


def test_a_model_that_goes_another_way_later_is_followed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rare image sends its batch through the weight once more; the first batches, which are compared, hold none."""

    def routed(m: Forward, x: Tensor) -> Tensor:
        x = m.second(m.first(x))
        return m.head(m.second(x) if bool((x.detach().abs() > 50).any()) else x)

    def routed_unseen(m: Forward, x: Tensor) -> Tensor:
        x = m.second(m.first(x))
        return m.head(Doubled.apply(x, m.second.weight) if bool((x.detach().abs() > 50).any()) else x)

    torch.manual_seed(0)
    data = images(8, 8)
    data.tensors[0][9] *= 1000
    for forward in (routed, routed_unseen):
        assert compare(Forward(forward), MATRICES, data, caplog, monkeypatch, count=26).startswith("up to")


def test_half_precision_and_compiled_parts_are_taken_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not float32" in compare(mlp().double(), ["1.weight"], images(8, 8), caplog, monkeypatch)
    model = mlp()
    model[1].compile(backend="eager")
    assert "compiled" in compare(model, ["1.weight"], images(8, 8), caplog, monkeypatch)


def test_wrappers_are_taken_off(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DDP the forward pass of one rank alone would wait for the others."""
    model = torch.optim.swa_utils.AveragedModel(mlp())

    def refuse(*_: Any) -> None:
        raise AssertionError("the wrapper was run")

    model.register_forward_pre_hook(refuse)
    assert compare(model, ["1.weight"], images(8, 8), caplog, monkeypatch).startswith("up to")


def test_a_dead_layer_proves_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with torch.no_grad():
        model[1].bias.fill_(-100)
    slots = find_slots(model, ["1.weight"])
    caplog.set_level(logging.DEBUG, logger=gradient_pass.__name__)
    assert not collect(model, slots, images(8, 8), F.cross_entropy)[0].any()
    assert "largest entry is 0" in way(caplog)


def test_too_few_gradients_or_too_much_work_are_taken_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger=gradient_pass.__name__)
    model, data = mlp(), images(8, 8)
    for options in ({"count": 15}, {"chunk": 3}):
        collect(model, find_slots(model, ["1.weight"]), data, F.cross_entropy, **options)
        assert not caplog.messages
    per_gradient = 3 * (16 + 5)
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 4 * per_gradient - 1)
    assert "work enough" in compare(model, ["1.weight"], data, caplog, monkeypatch)
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 4 * per_gradient)
    assert compare(model, ["1.weight"], data, caplog, monkeypatch).startswith("up to 4 ")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward pass sees more images than the rule allows, whatever the chunk."""
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 5 * 3 * (16 + 5))
    collect(model, find_slots(model, ["1.weight"]), images(8, 8), F.cross_entropy, chunk=12)
    # one image and what is tried first, then 12 in 3 parts and 6 in 2
    assert [rows // 3 for rows in seen] == [0, 1, 1, 2, 4, 4, 4, 3, 3]


def test_what_the_loss_raises_is_raised() -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        if len(calls) == 11:
            raise KeyError("mine")
        return F.cross_entropy(outputs, targets)

    model = mlp()
    with pytest.raises(KeyError, match="mine"):
        collect(model, find_slots(model, ["1.weight"]), images(8, 8), loss)
    assert calls == [3] * 11  # every loss sees the images of its gradient alone


def test_a_model_may_write_into_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches that are tried first are needed again."""

    def shifted(m: Forward, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x.sub_(0.5).mul_(2)).tanh()))

    torch.manual_seed(0)
    model = Forward(shifted)
    slots = find_slots(model, MATRICES)
    found = [collect(model, slots, images(8, 8), F.cross_entropy)]
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 0)
    found.append(collect(model, slots, images(8, 8), F.cross_entropy))
    monkeypatch.setattr(calibration, "LEAST_COUNT", 100)
    expected = collect(model, slots, images(8, 8), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected, strict=True))
    for rows, singles in zip(found[0], expected, strict=True):
        torch.testing.assert_close(rows, singles, rtol=0, atol=1e-5 * float(singles.abs().max()))


def test_a_loss_that_draws_at_random_draws_alike(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * (1 + torch.rand(()))

    assert compare(mlp(), ["1.weight"], images(8, 8), caplog, monkeypatch, loss).startswith("up to")


def test_parts_of_the_slots_come_as_all_of_them_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit: a batched part alone, and with `among` a part whose fellows have to be taken one by one."""
    torch.manual_seed(0)
    model, data = vit(), images(1, 8, 8)
    slots = find_slots(model, BLOCKS)
    whole = collect(model, slots, data, F.cross_entropy)
    for part in (slots[:3], slots[3:]):
        for rows, expected in zip(
            collect(model, part, data, F.cross_entropy), whole[:3] if part == slots[:3] else whole[3:], strict=True
        ):
            assert torch.equal(rows, expected)
    mixed = [*slots, *find_slots(model, ["norm.weight"])]
    whole = collect(model, mixed, data, F.cross_entropy)
    for i in (0, len(slots)):
        assert torch.equal(collect(model, [mixed[i]], data, F.cross_entropy, among=mixed)[0], whole[i])


def test_every_parameter_of_a_model_has_right_gradients(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    assert "one gradient" in compare(
        model, [slot.name for slot in parameter_slots(model)], images(1, 8, 8), caplog, monkeypatch
    )
