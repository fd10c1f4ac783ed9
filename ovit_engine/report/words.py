"""Numbers as people read them."""


def percent(share: float) -> str:
    """0.8 as 80 %, with a decimal where it says something."""
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')} %"


def points(difference: float) -> str:
    """A difference of two shares: percentage points."""
    return f"{100 * abs(difference):.1f} points"


def megabytes(count: float) -> str:
    """A size on an axis."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
