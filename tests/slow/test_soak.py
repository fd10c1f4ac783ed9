"""2,000 steps under oViT, a cyclic learning rate and int8 training, with 20 kills: nothing lost, nothing grown."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ovit_engine.quant.prepare import dense_state_dict
from ovit_engine.training.verify_resume import verify_resume
from ovit_engine.training.verify_resume.resumable_loop import checkpoints
from ovit_engine.utils.torch_files import load_file
from tests.resumable import TARGETS, build, job

RECIPE = [
    f"ovit_prune: {{start: 200st, end: 1200st, every: 200st, sparsity: {{from: 0.3, to: 0.8}}, {TARGETS}, block: 16, "
    "gradients: 32, images_per_gradient: 4, damp: 1.0e-4}",
    "cyclic_lr: {max: 4.0e-3, min: 1.0e-3, period: 200st}",
    "quantize: {start: 1400st, freeze_observers: 1800st}",
]
PAGE = 4096 / 2**20  # MiB


def sparsity_at(step: int) -> float:
    return 0.0 if step < 200 else 0.3 + 0.1 * min(5, step // 200 - 1)


@pytest.mark.slow
def test_two_thousand_steps_and_twenty_kills(tmp_path: Path) -> None:
    memory = tmp_path / "memory.txt"
    soak = job(*RECIPE, steps=2000, every=50, build=partial(build, memory))
    verdict = verify_resume(soak, tmp_path / "run", kills=20, seed=7)
    assert verdict.identical, verdict.differences[:5]
    assert (len(verdict.restarts), len(verdict.compared)) == (20, 40)

    for name, path in checkpoints(tmp_path / "run" / "killed").items():
        state = load_file(path)
        step, weights = int(name[5:13]), dense_state_dict(state["model"])
        pruned = total = 0
        for slot, packed in state["engine"]["masks"].items():
            count = weights[slot].numel()
            mask = torch.from_numpy(np.unpackbits(packed["bits"].numpy(), count=count).astype(bool)).view(
                packed["shape"]
            )
            assert not weights[slot][~mask].any(), (name, slot)
            pruned, total = pruned + int((~mask).sum()), total + count
        assert pruned == round(sparsity_at(step) * total), name
        assert (total > 0) == (step >= 200)

    # pages of the first training, the unbroken one: those that come after drop to a fresh process's
    pages = [int(line) for line in memory.read_text().split()]
    starts = [0, *(index for index, (one, two) in enumerate(pairwise(pages), 1) if two < one - 2000), len(pages)]
    first = max((pages[a:b] for a, b in pairwise(starts)), key=len)
    settled = [value * PAGE for value in first[len(first) // 4 :]]
    drift = np.polyfit(np.linspace(0, 1, len(settled)), settled, 1)[0]
    print(*(f"{each.where} -> {each.resumed}" for each in verdict.restarts), sep="\n")
    print(f"{len(first)} samples of {first[0] * PAGE:.1f} to {first[-1] * PAGE:.1f} MiB; drift {drift:.2f} MiB")
    assert len(settled) > 20
    assert abs(drift) < 5
