"""What a recipe may get wrong: the error says where it stands, what it is, and the nearest right name."""
# ruff: noqa: E501

import re
from pathlib import Path
from typing import Any

import pytest

from ovit_engine import Recipe, RecipeError

PRUNE = "modifiers:\n  - magnitude_prune: {sparsity: 0.5, targets: [a], %s}\n"


def parse(text: str, **variables: Any) -> Recipe:
    return Recipe.parse(text, file="r.yaml", **variables)


BAD = {
    # no recipe at all
    "modifiers: [\n": "r.yaml:2:1: not YAML:",
    "a: b: c\n": "r.yaml:1:5: not YAML: mapping values are not allowed here",
    "a:\n\t- b\n": "r.yaml:2:1: not YAML: found character '.t' that cannot start any token",
    "name: 'half\n": "r.yaml:2:1: not YAML: found unexpected end of stream",
    "a: \x00\n": "r.yaml: not YAML:",
    "modifiers: *x\n": "r.yaml:1:12: not YAML: found undefined alias 'x'",
    "modifiers: &x [*x]\n": "r.yaml:1:12: an anchor that holds itself",
    "modifiers: []\n---\na: b\n": "r.yaml:2:1: not YAML:",
    "": "r.yaml:1:1: the recipe is empty",
    "# only this\n": "r.yaml:1:1: the recipe is empty",
    "- a\n": "r.yaml:1:1: a recipe is a mapping with name, description, vars, training, modifiers, not a list",
    "hello\n": "r.yaml:1:1: a recipe is a mapping with",
    "? [a]\n: b\n": "r.yaml:1:3: a key must be a word or a number",
    "modifiers: !foo []\n": "r.yaml:1:12:",
    "modifiers: !!python/object/apply:os.system ['ls']\n": "r.yaml:1:12:",
    "name: !!python/name:os.system ''\nmodifiers: []\n": "r.yaml:1:7:",
    # the top level
    "name: x\n": "r.yaml:1:1: the recipe has no 'modifiers'",
    "modifiers:\n": "r.yaml:1:11: modifiers must be a list, not nothing",
    "modifiers: {a: b}\n": "r.yaml:1:12: modifiers must be a list, not a mapping",
    "modifier: []\n": "r.yaml:1:1: recipe has no option 'modifier'; did you mean 'modifiers'?",
    "name: 3\nmodifiers: []\n": "r.yaml:1:7: name must be text, not ",
    "name: a\nname: b\nmodifiers: []\n": "r.yaml:2:1: duplicate key 'name', first at line 1",
    # the trainer's section
    "training: {optimiser: sgd}\nmodifiers: []\n": "r.yaml:1:12: training has no option 'optimiser'; did you mean 'optimizer'?",
    "training: {epochs: 0}\nmodifiers: []\n": "r.yaml:1:20: training.epochs: input should be greater than 0: 0",
    "training: {optimizer: adam}\nmodifiers: []\n": "r.yaml:1:23: training.optimizer: input should be 'adamw' or 'sgd': 'adam'",
    "training: [a]\nmodifiers: []\n": "r.yaml:1:11: the options of training are a mapping, not a list",
    # modifiers
    "modifiers:\n  - magnitude_prune\n": "r.yaml:2:5: a modifier has options, if none of its own: write '- magnitude_prune: {}'",
    "modifiers:\n  - magnitude_prune:\n    sparsity: 0.5\n": "r.yaml:2:5: one modifier has the keys magnitude_prune, sparsity: indent the options below the name",
    "modifiers:\n  - magnitud_prune: {}\n": "r.yaml:2:5: no modifier 'magnitud_prune'; did you mean 'magnitude_prune'?",
    "modifiers:\n  - zzz: {}\n": "r.yaml:2:5: no modifier 'zzz'; there are .*cyclic_lr, .*magnitude_prune",
    "modifiers:\n  - magnitude_prune: [a]\n": "r.yaml:2:22: the options of magnitude_prune are a mapping, not a list",
    "modifiers:\n  - magnitude_prune: {sparsity: 0.5}\n": "r.yaml:2:22: magnitude_prune.targets is missing",
    # options
    "modifiers:\n  - svite: {density: 0.5, every: 1ep, targets: [a]}\n": "r.yaml:2:13: svite has no option 'density'; write 'sparsity', which is 1 - density",
    "modifiers:\n  - s2vite: {head_density: 0.5, every: 1ep}\n": "r.yaml:2:14: s2vite has no option 'head_density'; write 'head_sparsity', which is 1 - density",
    "modifiers:\n  - quantize: {density: 0.5}\n": "r.yaml:2:16: quantize has no option 'density'; there are",
    PRUNE % "target: [b]": "r.yaml:2:52: magnitude_prune has no option 'target'; did you mean 'targets'?",
    PRUNE % "sparsity: 0.6": "r.yaml:2:52: duplicate key 'sparsity', first at line 2",
    PRUNE % "pattern: 2:4": 'r.yaml:2:61: an unquoted 2:4 is a number in base 60 to YAML: write it in quotes, "2:4"',
    PRUNE % 'pattern: "4:2"': "r.yaml:2:61: magnitude_prune.pattern: .*4:2: write keep:group",
    PRUNE % "pattern: 124": "r.yaml:2:61: magnitude_prune.pattern: .*2:4",
    PRUNE % "pattern: {block: [1]}": "r.yaml:2:61: magnitude_prune.pattern",
    PRUNE % 'pattern: "1:4"': "r.yaml:2:22: magnitude_prune: pattern 1:4 is a sparsity of 0.75: sparsity 0.5 contradicts it",
    PRUNE % "start: 3epochs": "r.yaml:2:59: magnitude_prune.start: '3epochs' is no time: write steps '300st'",
    PRUNE % "start: 3": "r.yaml:2:59: magnitude_prune.start: 3 is no time",
    PRUNE % "start: 120%": "r.yaml:2:59: magnitude_prune.start: '120%' is no time",
    PRUNE % "scope: row": "r.yaml:2:59: magnitude_prune.scope: input should be 'global', 'layer' or 'erk': 'row'",
    PRUNE % "end: 3ep": "r.yaml:2:22: magnitude_prune: 'end' and 'every' go with a sparsity range",
    "modifiers: [{magnitude_prune: {targets: [a]}}]": "r.yaml:1:31: magnitude_prune: pattern unstructured needs a sparsity",
    "modifiers: [{magnitude_prune: {sparsity: 1.2, targets: [a]}}]": "r.yaml:1:42: magnitude_prune.sparsity: sparsity 1.2 is not in",
    "modifiers: [{magnitude_prune: {sparsity: 75, targets: [a]}}]": "r.yaml:1:42: .*did you mean 0.75?",
    "modifiers: [{magnitude_prune: {sparsity: -0.1, targets: [a]}}]": "r.yaml:1:42: magnitude_prune.sparsity: sparsity -0.1 is not in",
    "modifiers: [{magnitude_prune: {sparsity: .nan, targets: [a]}}]": "r.yaml:1:42: magnitude_prune.sparsity: sparsity nan is not in",
    "modifiers: [{magnitude_prune: {sparsity: yes, targets: [a]}}]": "r.yaml:1:42: .*is no sparsity",
    "modifiers: [{magnitude_prune: {sparsity: 75%, targets: [a]}}]": "r.yaml:1:42: magnitude_prune.sparsity: '75%' is no sparsity",
    "modifiers: [{magnitude_prune: {sparsity: {}, targets: [a]}}]": "r.yaml:1:42: magnitude_prune.sparsity",
    "modifiers: [{magnitude_prune: {sparsity: {from: 0.5, to: 0.4}, targets: [a], end: 2ep, every: 1ep}}]": "r.yaml:1:42: magnitude_prune.sparsity: sparsity falls from 0.5 to 0.4",
    "modifiers: [{magnitude_prune: {sparsity: {from: 0.5, to: 1.5}, targets: [a], end: 2ep, every: 1ep}}]": "r.yaml:1:58: magnitude_prune.sparsity.to: sparsity 1.5",
    "modifiers: [{magnitude_prune: {sparsity: {from: 0.3, to: 0.5}, targets: [a]}}]": "r.yaml:1:31: magnitude_prune: a sparsity range needs 'end' and 'every'",
    "modifiers: [{magnitude_prune: {sparsity: {from: 0.3, to: 0.5, curv: cubic}, targets: [a], end: 2ep, every: 1ep}}]": "r.yaml:1:63: magnitude_prune.sparsity has no option 'curv'",
    "modifiers: [{magnitude_prune: {sparsity: {1ep: 0.3, 2epp: 0.5}, targets: [a]}}]": "r.yaml:1:5.: magnitude_prune.sparsity.2epp: '2epp' is no time",
    "modifiers: [{magnitude_prune: {sparsity: {10: 0.3}, targets: [a]}}]": "r.yaml:1:4.: magnitude_prune.sparsity.10: 10 is no time",
    "modifiers: [{magnitude_prune: {sparsity: {1ep: 0.3, 2ep: 1.5}, targets: [a]}}]": "r.yaml:1:58: magnitude_prune.sparsity.2ep: sparsity 1.5",
    "modifiers: [{magnitude_prune: {sparsity: {1ep: 0.3}, start: 1ep, targets: [a]}}]": "r.yaml:1:31: magnitude_prune: 'start' does not go with a sparsity for each time",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: [3]}}]": "r.yaml:1:57: magnitude_prune.targets.0: input should be a valid string: 3",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: {a: b}}}]": "r.yaml:1:56: magnitude_prune.targets: input should be a valid list: {'a': 'b'}",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: preset:vti}}]": "r.yaml:1:56: magnitude_prune.targets: no preset 'vti'; did you mean 'vit'?",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: []}}]": "r.yaml:1:56: magnitude_prune.targets: list should have at least 1 item",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: ['re:(']}}]": "r.yaml:1:57: magnitude_prune.targets.0: target 're:(' is no regular expression",
    "modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], damp: 0}}]": "r.yaml:1:62: ovit_prune.damp: input should be greater than 0: 0",
    "modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], damp: .inf}}]": "r.yaml:1:62: ovit_prune.damp: .*finite",
    "modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], gradients: 1.5}}]": "r.yaml:1:67: ovit_prune.gradients: ",
    "modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], gradients: many}}]": "r.yaml:1:67: ovit_prune.gradients: .*: 'many'",
    "modifiers: [{cyclic_lr: {max: 1e-5, min: 1e-3}}]": "r.yaml:1:25: cyclic_lr: min 0.001 is above max 1e-05",
    "modifiers: [{cyclic_lr: {max: 1e-5, min: 0}}]": "r.yaml:1:42: cyclic_lr.min: input should be greater than 0: 0",
    "modifiers: [{cyclic_lr: {max: .inf, min: 1e-5}}]": "r.yaml:1:31: cyclic_lr.max: .*finite",
    "modifiers: [{cyclic_lr: {max: 1e-5, min: 1e-6, period: 1h}}]": "r.yaml:1:56: cyclic_lr.period: '1h' is no time",
    "modifiers: [{cyclic_lr: {max: 1e-5, min: 1e-6, curve: cosin}}]": "r.yaml:1:55: cyclic_lr.curve: input should be .*: 'cosin'",
    # variables
    'name: "${y}"\nmodifiers: []\n': "r.yaml:1:7: no variable 'y' in vars; there are none",
    'vars: {x: 1}\nname: "a ${y} b"\nmodifiers: []\n': "r.yaml:2:7: no variable 'y' in vars; there are x",
    "modifiers:\n  - ovit_prune: {sparsity: 0.5, targets: [a], block: 40000}\n": (
        "r.yaml:2:54: ovit_prune.block: input should be less than or equal to 32767: 40000"
    ),
    'modifiers:\n  - ovit_prune: {pattern: "2:4", targets: [a], block: 3}\n': (
        "r.yaml:2:17: ovit_prune: a Fisher block of 3 can't hold the 4 weights of 2:4"
    ),
    "vars: [x]\nmodifiers: []\n": "r.yaml:1:7: vars must be a mapping of names to values",
    "vars: {x: [1]}\nmodifiers: []\n": "r.yaml:1:11: variable 'x' must be one word or number",
    'vars: {1: 2}\nname: "${y}"\nmodifiers: []\n': "r.yaml:1:8: the name of a variable must be a word, not 1",
    'vars: {a: 1, b: "${a}"}\nname: "${b}"\nmodifiers: []\n': "r.yaml:1:17: ",
    # more than a recipe needs, or what no option can hold: files come from strangers
    "modifiers: " + "[" * 1000 + "]" * 1000: "r.yaml:.*nested more than 50 levels deep",
    "vars:\n" + "".join(f"  v{i}: &v{i} {'[' * 29}{f'*v{i - 1}' if i else 1}{']' * 29}\n" for i in range(60)): "r.yaml:2:30: nested more than 50 levels deep",
    "a: &v0 1\n" + "".join(f"b{i}: &v{i} [{','.join([f'*v{i - 1}'] * 30)}]\n" for i in range(1, 61)): "r.yaml:1:4: more than 100,000 values, or anchors that multiply",
    "description: " + "x" * 2**18: "r.yaml: 262,157 characters; a recipe has 262,144 at most",
    f"vars: {{a: {'x' * 1000}}}\ndescription: {'${a}' * 500}\nmodifiers: []\n": "r.yaml:2:14: variables stand for more than 262,144 characters",
    "training: {epochs: 1000000000000}\nmodifiers: []\n": "r.yaml:1:20: training.epochs: input should be less than or equal to 100000",
    f"training: {{seed: {'9' * 400}}}\nmodifiers: []\n": "r.yaml:1:18: a number of 1329 bits; whole numbers have 63 at most",
    f"training: {{seed: 0x{'F' * 5000}}}\nmodifiers: []\n": "r.yaml:1:18: a number of 20000 bits; whole numbers have 63 at most",
    "training: {seed: !!timestamp x}\nmodifiers: []\n": "r.yaml:1:18: unknown tag 'tag:yaml.org,2002:timestamp'",
    "? !!set x\n: 1\nmodifiers: []\n": "r.yaml:1:3: unknown tag 'tag:yaml.org,2002:set'",
    "training: {seed: 2026-01-01}\nmodifiers: []\n": "r.yaml:1:18: an unquoted 2026-01-01 is a date to YAML: write it in quotes",
    "training: {seed: !!int ''}\nmodifiers: []\n": "r.yaml:1:18: not a valid int: ''",
    "training: {seed: !!float ''}\nmodifiers: []\n": "r.yaml:1:18: not a valid float: ''",
    "training: {seed: !!bool x}\nmodifiers: []\n": "r.yaml:1:18: not a valid bool: 'x'",
    'name: "\\ud800"\nmodifiers: []\n': "r.yaml:1:7: text holds the control character U+D800",
    'description: "\\e[31m"\nmodifiers: []\n': "r.yaml:1:14: text holds the control character U+001B",
    "name: ../../../x\nmodifiers: []\n": "r.yaml:1:7: name '../../../x' can't name a folder in runs/",
    "name: /tmp/x\nmodifiers: []\n": "r.yaml:1:7: name '/tmp/x' can't name a folder in runs/",
    "name: ..\nmodifiers: []\n": "r.yaml:1:7: name '..' can't name a folder in runs/",
    PRUNE % f"start: {'9' * 400}st": "r.yaml:2:59: magnitude_prune.start: '999",
    f"modifiers: [{{magnitude_prune: {{sparsity: 0.5, targets: ['re:{'(' * 2000}']}}}}]\n": "r.yaml:1:57: magnitude_prune.targets.0: a target has 2,000 characters: 1,000 at most",
    f"modifiers: [{{magnitude_prune: {{sparsity: 0.5, targets: ['re:{'(' * 400}{')' * 400}']}}}}]\n": "r.yaml:1:57: magnitude_prune.targets.0: target 're:",
    "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: ['re:a{99999999999999999999}']}}]\n": "r.yaml:1:57: magnitude_prune.targets.0: target .* is no regular expression: repeat count too big",
}  # fmt: skip


def _regex(message: str) -> str:
    """The written message, in which only "." and ".*" are more than themselves."""
    for special in "()?+${}[]":
        message = message.replace(special, "\\" + special)
    return message


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:60]))
def test_bad_input_is_explained_at_its_place(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 600
    assert re.match(_regex(BAD[text]), message), message


@pytest.mark.parametrize(
    ("given_vars", "words"),
    [
        ({"y": 3}, "r.yaml:1:1: the recipe has no variable 'y'; there are x"),
        ({"x": ["a"]}, "variable 'x' must be one word or number"),
        ({"x": {"a": 1}}, "variable 'x' must be one word or number"),
    ],
)
def test_given_variables_are_checked(given_vars: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse("vars: {x: 1}\nmodifiers: []\n", **given_vars)


def test_an_error_in_a_variable_stands_where_the_variable_is_used() -> None:
    text = "vars: {s: 1.5}\nmodifiers:\n  - magnitude_prune: {targets: [a],\n      sparsity: '${s}'}\n"
    with pytest.raises(RecipeError, match=r"r.yaml:4:17: magnitude_prune.sparsity: sparsity 1.5"):
        parse(text)


def test_a_nested_key_named_vars_is_left_alone() -> None:
    read = parse(
        "vars: {depth: 12}\ntraining: {model_args: {vars: {depth: 2}, depth: '${depth}'}}\nmodifiers: []\n", depth=6
    )
    assert read.vars == {"depth": 6}
    assert read.training.model_args == {"vars": {"depth": 2}, "depth": 6}


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(RecipeError, match="no recipe file"):
        Recipe.load(path)


def test_a_file_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RecipeError, match="274,877,906,944 characters; a recipe has 262,144 at most"):
        Recipe.load(path)
