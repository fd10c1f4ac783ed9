"""One training in several processes, in every way in which torch does that; run by test_scale_out*.py."""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ovit_engine import Calibration, Engine
from ovit_engine.core.state import whole_state_dict
from tests.loops import X, Y, mlp, recipe
from tests.tokens.models import RowVit

TARGETS = "targets: ['re:.*weight']"
STEPS = 8
RECIPES = {
    "magnitude": [f"magnitude_prune: {{{TARGETS}, sparsity: {{0st: 0.3, 3st: 0.6}}}}"],
    "ovit": [f"ovit_prune: {{{TARGETS}, sparsity: {{0st: 0.3, 3st: 0.6}}, block: 16, damp: 1.0e-4, gradients: 70}}"],
    "of training": [f"ovit_prune: {{{TARGETS}, sparsity: 0.6, start: 5st, block: 4, damp: 1.0e-4, gradients: 16}}"],
    "in parts": [f"mfac_prune: {{{TARGETS}, sparsity: {{0st: 0.3, 3st: 0.6}}, gradients: 40, recomputations: 2}}"],
    "2:4": [f"obert_prune: {{{TARGETS}, start: 0st, pattern: '2:4', block: 16, gradients: 40}}"],
    "movement": [f"movement_prune: {{{TARGETS}, start: 3st, end: 5st, every: 2st, sparsity: {{from: 0.2, to: 0.5}}}}"],
    "acdc": [f"acdc: {{every: 2st, start: 1st, last_sparse: 2st, sparsity: 0.5, {TARGETS}}}"],
    "gates": ["s2vite: {head_sparsity: 0.5, unit_sparsity: 0.4, every: 2st, gradients: 2}"],
    "structured": [
        "structured_prune: {start: 2st, end: 6st, every: 2st, gradients: 2, head_sparsity: {from: 0.25, to: 0.5}, "
        "unit_sparsity: {from: 0.25, to: 0.5}}"
    ],
    "structured of weights": ["structured_prune: {score: l1, parameter_sparsity: {0st: 0.1, 4st: 0.3}}"],
    "in groups": [
        "structured_prune: {start: 2st, gradients: 2, unit_sparsity: 0.33}",
        "magnitude_prune: {start: 4st, pattern: '2:4', targets: [0.mlp.fc2.weight]}",
    ],
    "dead": ["magnitude_prune: {start: 2st, sparsity: 0.95, targets: ['re:.*mlp.*weight']}", "shrink: {}"],
    "svite": [f"svite: {{every: 2st, sparsity: 0.5, gradients: 2, {TARGETS}}}"],
    "soft": ["gohsp: {head_sparsity: 0.5, unit_sparsity: 0.4, start: 1st, end: 7st, every: 2st, rank: {images: 64}}"],
    "soft of training": ["gohsp: {head_sparsity: 0.5, unit_sparsity: 0.4, end: 7st, every: 2st, rank: {steps: 2}}"],
    "rate": ["cyclic_lr: {max: 0.1, min: 0.01, period: 3st}"],
    "held": ["constant_mask: {targets: [2.weight]}"],
    "int8": ["quantize: {start: 1st, freeze_observers: 6st}"],
    "stacked": [
        f"ovit_prune: {{{TARGETS}, sparsity: {{0st: 0.3, 3st: 0.6}}, block: 16, damp: 1.0e-4, gradients: 40}}",
        "cyclic_lr: {max: 0.1, min: 0.01, period: 3st}",
        "quantize: {start_observers: 3st, start: 4st, freeze_observers: 6st}",
    ],
    "predicted": ["dynamic_vit: {keep: 0.6, blocks: [0, 1]}"],
    "selected": ["svite_tokens: {keep: 0.6}"],
    "attended": ["evit: {keep: 0.6, blocks: [0, 1], start: 1st, end: 6st}"],
    "merged": ["tome: {r: 2}"],
}
TOKENS = ["predicted", "selected", "attended", "merged"]
DRAWN = ["predicted", "selected"]  # noise is another on each rank
WITH_BLOCK = ["gates", "soft", "soft of training", "structured", "structured of weights", "in groups"]
AT_ATTACH = [
    "magnitude",
    "ovit",
    "in parts",
    "2:4",
    "structured of weights",
    "stacked",
    "svite",
]  # they prune from equal weights
# (kind, recipe)
CASES = [(kind, name) for kind in ("ddp", "fsdp2") for name in RECIPES] + [
    *(("ddp, own buffers", name) for name in ("int8", "stacked")),
    ("ddp, compiled", "gates"),
    ("fsdp2, fp16", "gates"),
    ("fsdp2, fp16", "svite"),
    *(("ddp, fp16", name) for name in TOKENS[1:3]),
    *(("fsdp2, fp16", name) for name in (TOKENS[0], TOKENS[3])),
    *((kind, "stacked") for kind in ("ddp, compiled", "fsdp2, compiled", "ddp, fp16", "fsdp2, fp16", "ddp, no_sync")),
    *(("zero", name) for name in ("stacked", "acdc", "of training", "svite")),
]


def start(rank: int, ranks: int, store: str, device: str) -> None:
    """Join the process group, on one thread."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))


class Block(nn.Module):
    """Attention of four heads on two tokens of four features, then a hidden layer: rows [8] to rows [16]."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.num_heads, self.attn.head_dim = 4, 2
        self.attn.qkv, self.attn.proj = nn.Linear(4, 24), nn.Linear(8, 4)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(x.view(-1, 2, 4)).view(-1, 2, 3, 4, 2).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 2, 8)
        hidden = nn.functional.gelu(self.mlp.fc1(self.attn.proj(heads).flatten(1)))
        output: Tensor = self.mlp.fc2(hidden)
        return output


def model_for(name: str, device: str) -> nn.Sequential:
    model = sparse_mlp(device)
    if name in (*TOKENS, "dead"):
        torch.manual_seed(0)
        return nn.Sequential(RowVit(16), nn.Linear(16, 1)).to(device)
    if name in WITH_BLOCK:
        model[0] = Block().to(device)
    return model


def sparse_mlp(device: str) -> nn.Sequential:
    """With zeros for `constant_mask`."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, ::4] = 0.0
    return model.to(device)


def spread(kind: str, model: nn.Sequential, device: str) -> nn.Module:
    """What the loop calls: `model` wrapped in this kind of parallel training."""
    loop: Any = model
    if kind.startswith("fsdp2"):
        mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
        # the last layer is the root's own, and stays whole after an evaluation
        for layer in (*getattr(model[0], "blocks", ()), model[0], model):
            fully_shard(layer, mesh=mesh)
    elif kind != "alone":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
            own = {"broadcast_buffers": False} if kind == "ddp, own buffers" else {}
            loop = DistributedDataParallel(model, **own)
    if kind.endswith("compiled"):
        loop = torch.compile(loop, backend="inductor" if device == "cuda" else "eager")
    return loop  # type: ignore[no-any-return]


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "zero":
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)  # type: ignore[no-untyped-call]
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(kind: str, name: str, device: str = "cpu", before: Callable[[Engine, int], None] | None = None) -> Any:
    """Train `STEPS` steps, each rank on its part of the batch; returns states on the CPU.

    `before` is called with the engine and the number of each step before it.
    """
    rank, ranks = (0, 1) if kind == "alone" else (dist.get_rank(), dist.get_world_size())
    model = model_for(name, device)
    engine = Engine(model, recipe(*RECIPES[name]), steps_per_epoch=STEPS, epochs=1).prepare()
    loop = spread(kind, model, device)
    optimizer = optimizer_for(kind, model)
    data = torch.utils.data.TensorDataset(X, Y)
    x, y = X[rank::ranks].to(device), Y[rank::ranks].to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no calibration was given")
        engine.attach(optimizer, calibration=None if name.endswith("of training") else Calibration(data, loss_fn))
    first = {key: tensor.clone() for key, tensor in whole_state_dict(model).items()}
    scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=kind.endswith("fp16"))
    number = -1
    while engine.run.step < STEPS:
        number += 1
        if before is not None:
            before(engine, number)
        optimizer.zero_grad()
        micro = 2 if kind.endswith("no_sync") else 1
        for part in range(micro):
            quiet = isinstance(loop, DistributedDataParallel) and part < micro - 1
            with loop.no_sync() if quiet else nullcontext():
                with torch.autocast(device, torch.float16, enabled=kind.endswith("fp16")):
                    loss = engine.loss(loss_fn(loop(x[part::micro]), y[part::micro])) / micro
                is_overflow = kind.endswith("fp16") and number == 2 and rank == ranks - 1  # on one rank alone
                scaler.scale(loss * (float("inf") if is_overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not kind.endswith("compiled"):  # which would compile twice as often
            loop.eval()
            with torch.no_grad():
                loop(x)
            loop.train()
    engine.detach()
    return {"first": first, "last": whole_state_dict(model), "engine": engine.state_dict(), "passes": number + 1}


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def resumed(cut: int | None) -> Any:
    """Weights and engine state under FSDP2 after `STEPS` steps, stopped and started again after `cut` of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    states: list[Any] | None = None
    done = 0
    for end in (STEPS,) if cut is None else (cut, STEPS):
        model = sparse_mlp("cpu")
        engine = Engine(model, recipe(*RECIPES["stacked"]), steps_per_epoch=STEPS, epochs=1).prepare()
        if states is not None:
            engine.load_state_dict(states[1])
            model.load_state_dict(states[0])
        spread("fsdp2", model, "cpu")
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        engine.attach(optimizer, calibration=Calibration(torch.utils.data.TensorDataset(X, Y), loss_fn))
        for _ in range(done, end):
            optimizer.zero_grad()
            loss_fn(model(X[rank::ranks]), Y[rank::ranks]).backward()
            optimizer.step()
        done, states = end, [whole_state_dict(model), engine.state_dict()]
    return states


def digits_accuracy(kind: str, images: Tensor, labels: Tensor) -> float:
    """Held-out accuracy of a small network that is pruned to 60 % by oViT and rounded to int8."""
    rank, ranks = (0, 1) if kind == "alone" else (dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    text = [
        f"ovit_prune: {{{TARGETS}, sparsity: {{1ep: 0.3, 2ep: 0.6}}, block: 16, damp: 1.0e-4, gradients: 64}}",
        "cyclic_lr: {max: 0.01, min: 0.001, period: 1ep}",
        "quantize: {start: 3ep}",
    ]
    train_x, train_y = images[:1200], labels[:1200]
    engine = Engine(model, recipe(*text), steps_per_epoch=20, epochs=4).prepare()
    loop = spread(kind, model, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    data = torch.utils.data.TensorDataset(train_x, train_y)
    with engine.attach(optimizer, calibration=Calibration(data, nn.functional.cross_entropy)):
        order = torch.Generator().manual_seed(1)
        for _ in range(80):
            chosen = torch.randperm(1200, generator=order)[:64][rank::ranks]
            optimizer.zero_grad()
            nn.functional.cross_entropy(loop(train_x[chosen]), train_y[chosen]).backward()
            optimizer.step()
    assert engine.run.masks.sparsity() > 0.59
    with torch.no_grad():
        return float((loop.eval()(images[1200:]).argmax(1) == labels[1200:]).float().mean())


def taught(kind: str, *, differs: bool = False) -> dict[str, Any]:
    """Weights of a small ViT that learned from a teacher's logits and tokens, each rank on its part of the batch."""
    rank, ranks = (0, 1) if kind == "alone" else (dist.get_rank(), dist.get_world_size())
    teacher, model = small_vit(seed=1 + differs * rank), small_vit(seed=0)
    engine = Engine(model, recipe("distill: {logits: 1, tokens: 1}"), steps_per_epoch=3, epochs=1, teacher=teacher)
    engine.prepare()
    loop: Any = model
    if kind == "fsdp2":
        mesh = dist.init_device_mesh("cpu", (ranks,))
        for layer in (*model.blocks, model):
            fully_shard(layer, mesh=mesh)
    elif kind == "ddp":
        loop = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with engine.attach(optimizer):
        for step in range(3):
            images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
            images, classes = images[rank::ranks], (torch.arange(8) % 4)[rank::ranks]
            optimizer.zero_grad()
            engine.loss(nn.functional.cross_entropy(loop(images), classes)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return whole_state_dict(model)


def small_vit(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
