"""DeiT-Small without half of its heads and 40 % of its MLP units against dense, both exported by us: paired latency.

Weights are random (no download): latency and operations do not depend on them. The ratio of latencies stands beside
that of multiply-adds (MACs): what is removed is gone from the file, so the two should be close. Run as
`python benchmarks/shrink_speed.py`; `--batch-sizes 8` or `--repeats 40` for other settings. A few minutes.
"""

import copy
import tempfile
from pathlib import Path

import timm
import torch
from paired import arguments, compare

from ovit_engine.export.writer import write_onnx
from ovit_engine.flops import count_flops
from ovit_engine.structured.gates import find_sites, install, installed, set_gate
from ovit_engine.structured.shrink_model import shrink

IMAGE = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
KEEP = {"heads": 0.5, "units": 0.6}


def main() -> None:
    settings = arguments(__doc__)
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    small = copy.deepcopy(model)
    install(find_sites(small))
    for site in installed(small):
        chosen = torch.randperm(site.count)[: int(site.count * KEEP[site.kind])]
        set_gate(site, torch.zeros(site.count, dtype=torch.bool).index_fill_(0, chosen, True))
    manifest = shrink(small)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, small)]
    macs = [count_flops(each, IMAGE).dense / 2 for each in (model, small)]
    print(f"left of the dense model: {manifest}")
    print(f"parameters: {sizes[0] / 1e6:.2f} M dense, {sizes[1] / 1e6:.2f} M, {sizes[0] / sizes[1]:.2f}x fewer")
    print(f"MACs: {macs[0] / 1e9:.3f} G dense, {macs[1] / 1e9:.3f} G, {macs[0] / macs[1]:.2f}x fewer")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("dense.onnx", "shrunk.onnx")]
        for each, file in zip((model, small), files, strict=True):
            write_onnx(each, IMAGE, file)
        print(f"file: {files[0].stat().st_size / files[1].stat().st_size:.2f}x smaller")
        compare(dict(zip(files, macs, strict=True)), settings)


if __name__ == "__main__":
    main()
