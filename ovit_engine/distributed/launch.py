"""What torchrun tells a process through its environment. Needs no PyTorch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """This process among all that were started together: `rank` of `count`, and `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and messages."""
        return self.rank == 0


def launched() -> Launch:
    """Return the place of this process; rank 0 of 1 if torchrun did not start it."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count < 2 or "RANK" not in os.environ:
        return Launch()
    return Launch(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", 0)))
