"""Names in messages: the valid ones closest to an unknown one, and lists too long to print."""

import difflib
from collections.abc import Iterable

_LISTED = 30  # names; of a longer list only the first few are shown
_FIRST = 3
_LONGEST = 100  # characters of the unknown name that are compared; difflib takes seconds for a long one


def suggest(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.5) -> str:
    """Return "; did you mean 'x'?", or "; there are a, b" if no known name is close.

    Names that contain the word come before names that look like it.

    Args:
        count: how many close names are shown at most.
        cutoff: how similar a name must be, from 0 to 1.
    """
    known = list(known)
    near = did_you_mean(word, known, count=count, cutoff=cutoff)
    if near:
        return near
    shown = known if len(known) <= _LISTED else known[:_FIRST]
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"; there are {', '.join(shown) or 'none'}{more}"


def listed(names: Iterable[str], *, shown: int = 3) -> str:
    """Return "'a', 'b' and 5 more"."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def did_you_mean(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.5) -> str:
    """Return "; did you mean 'x'?", or "" if no known name is close; the arguments are those of `suggest`."""
    known = list(known)
    word = word[:_LONGEST]
    near = [name for name in known if word and word in name] or difflib.get_close_matches(word, known, count, cutoff)
    if not near:
        return ""
    *others, last = map(repr, near[:count])
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
