"""Numbers for readers."""


def percent(share: float) -> str:
    """Return 0.8 as 80 %, with a decimal if it is not 0."""
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')} %"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points."""
    return f"{100 * abs(difference):.1f} points"


def megabytes(count: float) -> str:
    """Return a size as an axis shows it."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
