"""The public API: a name comes and goes only with a change here and in the changelog."""

import ast
from pathlib import Path

import ovit_engine


def test_public_names() -> None:
    tree = ast.parse(Path(ovit_engine.__file__).read_text())
    (types,) = [node for node in tree.body if isinstance(node, ast.If)]
    exported = [str(name.asname) for node in types.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(exported) == sorted(ovit_engine.__all__)
    assert sorted(exported) == [
        "Block",
        "Calibration",
        "Claim",
        "Clock",
        "Coordinated",
        "Deployable",
        "Distillation",
        "Engine",
        "Event",
        "Exclusive",
        "GradientPruner",
        "LearningRate",
        "LossTerm",
        "Masks",
        "Modifier",
        "NM",
        "Pattern",
        "Patterned",
        "Pruner",
        "Recipe",
        "RecipeError",
        "Row",
        "Run",
        "Scheduled",
        "Slot",
        "Surgical",
        "Synchronized",
        "Targets",
        "Time",
        "Unstructured",
        "find_slots",
        "load_point",
        "register",
        "whole_model",
    ]
    assert all(hasattr(ovit_engine, str(name)) for name in exported)
    assert ovit_engine.__version__


def test_public_things_say_what_they_are() -> None:
    for name in set(ovit_engine.__all__) - {"Pattern", "Row", "Targets", "Time"}:  # types
        assert (getattr(ovit_engine, name).__doc__ or "").strip(), name


def test_the_value_of_an_event_is_the_method_it_calls() -> None:
    assert [event.value for event in ovit_engine.Event] == ["prepare", "attach", "step_begin", "step_end", "detach"]
    assert all(callable(getattr(ovit_engine.Modifier, event.value)) for event in ovit_engine.Event)
