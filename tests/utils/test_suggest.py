"""The valid names closest to an unknown one."""

import pytest

from ovit_engine.utils.suggest import did_you_mean, suggest

NAMES = ["ovit_prune", "magnitude_prune", "quantize"]
MANY = [f"name{number}" for number in range(40)]


@pytest.mark.parametrize(
    ("word", "known", "options", "text"),
    [
        ("quantise", NAMES, {}, "; did you mean 'quantize'?"),
        ("prune", NAMES, {}, "; did you mean 'ovit_prune'?"),
        ("prune", NAMES, {"count": 3}, "; did you mean 'ovit_prune' or 'magnitude_prune'?"),
        ("ovit_prnue", NAMES, {"count": 3}, "; did you mean 'ovit_prune' or 'magnitude_prune'?"),
        ("xyz", NAMES, {}, "; there are ovit_prune, magnitude_prune, quantize"),
        ("", NAMES, {}, "; there are ovit_prune, magnitude_prune, quantize"),
        ("xyz", [], {}, "; there are none"),
        ("xyz", MANY, {}, "; there are name0, name1, name2 and 37 more"),
        ("name3", MANY, {"count": 3}, "; did you mean 'name3', 'name30' or 'name31'?"),
        ("xxquanxxx", NAMES, {}, "; there are ovit_prune, magnitude_prune, quantize"),
        ("xxquanxxx", NAMES, {"cutoff": 0.3}, "; did you mean 'quantize'?"),
    ],
)
def test_suggest(word: str, known: list[str], options: dict[str, int], text: str) -> None:
    assert suggest(word, known, **options) == text  # type: ignore[arg-type]
    assert did_you_mean(word, known, **options) == (text if text.startswith("; did") else "")  # type: ignore[arg-type]
