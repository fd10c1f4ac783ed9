"""One thread, since the tensors here are tiny and the cores are shared; no deadlines, for the same reason."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")
