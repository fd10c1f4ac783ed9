"""Which way gradients are taken, and that both ways give the same: real models, and all that must be refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine.gradients import backward as gradient_pass
from ovit_engine.gradients import calibration
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.masking.targets import find_slots
from tests.gradients.gradient_ways import (
    BLOCKS,
    MATRICES,
    Doubled,
    Forward,
    collect,
    compare,
    images,
    mlp,
    quantized,
    vit,
    way,
)

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
