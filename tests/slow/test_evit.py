"""Tokens that go without anything being learned for it, on a real if small vision transformer."""

import statistics
import time

import pytest

from ovit_engine.flops import count_flops
from tests.slow.digits import accuracy, images, trained_vit
from tests.slow.test_tokens import reduced

LINES = {
    "evit": "evit: {keep: 0.7, end: 8ep}",
    "tome": "tome: {r: 2}",
}


@pytest.mark.slow
def test_fewer_tokens_cost_little_accuracy() -> None:
    begin = time.process_time()
    example = images()[1][:1]
    found: dict[str, list[float]] = {name: [] for name in ("dense", *LINES)}
    for seed in (0, 1, 2):
        dense = trained_vit(seed)
        found["dense"].append(accuracy(dense))
        for name, line in LINES.items():
            model = reduced(dense, line, seed, epochs=20)
            found[name].append(accuracy(model))
            saved = 1 - count_flops(model, example).dense / count_flops(dense, example).dense
            print(f"seed {seed}: {name} {found[name][-1]:.4f}, dense {found['dense'][-1]:.4f}, MACs saved {saved:.1%}")
            assert saved > 0.15
    mean = {name: statistics.mean(values) for name, values in found.items()}
    print(mean, f"{time.process_time() - begin:.0f} s of CPU time")
    assert mean["evit"] >= mean["dense"] - 0.01
    assert mean["tome"] >= mean["dense"] - 0.01
