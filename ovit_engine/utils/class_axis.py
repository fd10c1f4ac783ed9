"""Where an output holds its classes."""


def class_axis(dimensions: int) -> int:
    """Return the axis of the classes: 1 of a map [N, C, H, W] (or with more axes), otherwise the last.

    [N, C] and [N, L, C] are class scores and sequences of them. [N, C, L] can't be told from [N, L, C].
    """
    return 1 if dimensions >= 4 else -1
