"""Every kind of loop, each written as its user would: a generator that yields once attached and after each step.

It yields whether the step was applied (a gradient scaler skips some). No loop has a line for us but prepare and attach.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from timm.optim.lookahead import Lookahead
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ovit_engine import Calibration, Engine, Recipe

RATE = 2e-3
STEPS, WATCH, QUANTIZE, FREEZE = 24, 13, 15, 20
PRUNED = {6: 0.3, 9: 0.45, 12: 0.6}  # sparsity from each step on
TARGETS = r"targets: ['re:(blocks|stage)\..*(qkv|proj|fc1|fc2|conv)\.weight']"
RECIPE = Recipe.parse(f"""
name: matrix
modifiers:
  - ovit_prune: {{start: 6st, end: 12st, every: 3st, sparsity: {{from: 0.3, to: 0.6}}, {TARGETS},
                 block: 16, gradients: 8, images_per_gradient: 4, damp: 1.0e-4}}
  - cyclic_lr: {{max: 4.0e-3, min: 1.0e-3, period: 6st}}
  - quantize: {{start_observers: {WATCH}st, start: {QUANTIZE}st, freeze_observers: {FREEZE}st}}
""")

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.flatten(1) @ torch.randn(64, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
CALIBRATION = Calibration(torch.utils.data.TensorDataset(IMAGES, LABELS), nn.functional.cross_entropy)

# on a CPU inductor compiles C++ for a minute: in a slow test only
BACKENDS = {"cpu": "aot_eager", "sim": "aot_eager", "cuda": "inductor"}

Loop = Callable[[Any, Engine], Iterator[bool]]


def formula(step: int) -> float:
    """The learning rate of the step that makes the clock `step`: eq. 8 of the paper, in the figures of RECIPE."""
    return 4e-3 - 3e-3 * ((step - 1) % 6) / 6


def sparsity_at(step: int) -> float:
    return max((value for time, value in PRUNED.items() if time <= step), default=0.0)


def vit(depth: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": depth, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def small_vit() -> Any:
    """Quick to compile."""
    return vit(depth=1)


def tied_vit() -> Any:
    """One block's MLP used twice, and one weight in two layers."""
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    return model


def vit_with_a_layer_never_called() -> Any:
    model = vit()
    model.spare = nn.Linear(8, 8)
    return model


def half_frozen_vit() -> Any:
    """The first block is pruned and rounded, but not trained."""
    model = vit()
    model.patch_embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model


class _ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """Convolutions, batch-norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage = nn.Sequential(_ConvBlock(1), _ConvBlock(16), _ConvBlock(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.head(self.stage(x).mean((2, 3)))
        return pooled


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def batches(model: Any, count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    order, device = torch.Generator().manual_seed(2), device_of(model)
    for _ in range(count):
        chosen = torch.randperm(len(IMAGES), generator=order)[:16]
        yield IMAGES[chosen].to(device), LABELS[chosen].to(device)


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, RATE, weight_decay=0.05, **options)


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, RATE, momentum=0.9, weight_decay=0.05, **options)


def plain(model: Any, engine: Engine, make: Callable[..., Any] = adamw) -> Iterator[bool]:
    optimizer = make(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield True


def accumulation(model: Any, engine: Engine) -> Iterator[bool]:
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for index, (x, y) in enumerate(batches(model, 3 * STEPS), 1):
        (nn.functional.cross_entropy(model(x), y) / 3).backward()
        if index % 3 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            yield True


def several_optimizers(model: Any, engine: Engine) -> Iterator[bool]:
    matrices = sgd([p for p in model.parameters() if p.ndim >= 2])
    others = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], 10 * RATE)
    engine.attach(matrices, others, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        others.step()
        matrices.step()
        yield True


def parameter_groups(model: Any, engine: Engine) -> Iterator[bool]:
    groups = [
        {"params": model.blocks[0].parameters(), "lr": RATE / 4},
        {"params": model.blocks[1].parameters(), "lr": RATE / 2, "weight_decay": 0.0},
        {"params": [p for name, p in model.named_parameters() if not name.startswith("blocks")]},
    ]
    yield from plain(model, engine, lambda _: adamw(groups))


def scaler(model: Any, engine: Engine, fused: bool, unscale: bool) -> Iterator[bool]:
    optimizer = adamw(model.parameters(), fused=fused)
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    scale = torch.amp.GradScaler(device_of(model).type, init_scale=256.0, growth_interval=5)
    for index, (x, y) in enumerate(batches(model, STEPS + 5)):
        skip = index in (0, 6, 7, 14, 20)
        optimizer.zero_grad()
        with torch.autocast(device_of(model).type, torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scale.scale(loss * (float("inf") if skip else 1.0)).backward()
        if unscale:
            scale.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
        yield not skip


def bf16_autocast(model: Any, engine: Engine) -> Iterator[bool]:
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        with torch.autocast(device_of(model).type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        yield True


def bf16_weights(model: Any, engine: Engine) -> Iterator[bool]:
    engine.prepare()
    model.to(torch.bfloat16)
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
        optimizer.step()
        yield True


def closure(model: Any, engine: Engine, make: Callable[..., Any] = sgd) -> Iterator[bool]:
    optimizer = make(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        yield True


def compiled_model(model: Any, engine: Engine) -> Iterator[bool]:
    engine.prepare()
    compiled: Any = torch.compile(model, backend=BACKENDS[device_of(model).type], fullgraph=True)
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        yield True


def compiled_step(model: Any, engine: Engine) -> Iterator[bool]:
    engine.prepare()
    optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(RATE))  # a float would compile again with each rate
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False

    @torch.compile(backend="eager", fullgraph=True)
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for x, y in batches(model):
        optimizer.zero_grad()
        loss_of(x, y).backward()
        step()
        yield True


def checkpointing(model: Any, engine: Engine, reentrant: bool) -> Iterator[bool]:
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        tokens = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=reentrant)
        nn.functional.cross_entropy(model.forward_head(model.norm(tokens)), y).backward()
        optimizer.step()
        yield True


def averaged(model: Any, engine: Engine, make: Callable[[Any], Any], update: str, tell: bool) -> Iterator[bool]:
    engine.prepare()
    model.ema = [average := make(model)]  # a list: no module of the model
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION, ema=average if tell else None)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        getattr(average, update)(model)
        yield True


def channels_last(model: Any, engine: Engine) -> Iterator[bool]:
    model.to(memory_format=torch.channels_last)
    optimizer = adamw(model.parameters())
    engine.attach(optimizer, calibration=CALIBRATION)
    yield False
    for x, y in batches(model):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
        yield True


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, RATE, max_iter=3, history_size=4)


def timm_ema(model: nn.Module) -> Any:
    return ModelEmaV3(model, decay=0.9)


def torch_ema(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


# loop, model
LOOPS: dict[str, tuple[Loop, Callable[[], Any]]] = {
    "plain": (plain, vit),
    "sgd": (partial(plain, make=sgd), vit),
    "accumulation": (accumulation, vit),
    "several optimizers": (several_optimizers, vit),
    "parameter groups": (parameter_groups, vit),
    "fp16, scaler": (partial(scaler, fused=False, unscale=False), vit),
    "fp16, scaler, unscale": (partial(scaler, fused=False, unscale=True), vit),
    "fp16, scaler, fused": (partial(scaler, fused=True, unscale=False), vit),
    "fp16, scaler, fused, unscale": (partial(scaler, fused=True, unscale=True), vit),
    "bf16 autocast": (bf16_autocast, vit),
    "bf16 weights": (bf16_weights, vit),
    "fused": (partial(plain, make=partial(adamw, fused=True)), vit),
    "foreach": (partial(plain, make=partial(adamw, foreach=True)), vit),
    "one by one": (partial(plain, make=partial(adamw, foreach=False)), vit),
    "closure": (closure, vit),
    "lbfgs": (partial(closure, make=lbfgs), vit),
    "compiled model": (compiled_model, small_vit),
    "compiled step": (compiled_step, small_vit),
    "checkpointing": (partial(checkpointing, reentrant=False), vit),
    "reentrant checkpointing": (partial(checkpointing, reentrant=True), vit),
    "ema of timm": (partial(averaged, make=timm_ema, update="update", tell=True), vit),
    "ema of torch": (partial(averaged, make=torch_ema, update="update_parameters", tell=True), vit),
    "swa of torch": (partial(averaged, make=AveragedModel, update="update_parameters", tell=True), vit),
    "ema that attach is not told of": (partial(averaged, make=timm_ema, update="update", tell=False), vit),
    "lookahead": (partial(plain, make=lambda p: Lookahead(adamw(p), k=2)), vit),
    "lookahead, closure": (partial(closure, make=lambda p: Lookahead(sgd(p), k=2)), vit),
    "frozen parameters": (plain, half_frozen_vit),
    "tied weights": (plain, tied_vit),
    "parameters without gradient": (plain, vit_with_a_layer_never_called),
    "channels last": (channels_last, ConvNet),
}
