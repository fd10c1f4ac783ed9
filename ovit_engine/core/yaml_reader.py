"""Safe YAML with the place of every value, strict about what YAML lets pass in silence."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ovit_engine.core.errors import Origin, RecipeError
from ovit_engine.utils.suggest import suggest

_SEXAGESIMAL = re.compile(r"[-+]?\d+(:\d+)+")

_MOST = 100_000  # values in a recipe: nested anchors could stand for any number

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Located:
    """A YAML value and where it stands; mappings and lists hold Located values."""

    value: Any
    origin: Origin
    keys: Mapping[Any, Origin]

    def get(self, key: str) -> "Located | None":
        """The value under `key` of a mapping."""
        found: Located | None = self.value.get(key)
        return found

    def key_origin(self, key: Any) -> Origin:
        """Where `key` of a mapping stands."""
        return self.keys.get(key, self.origin)

    def find(self, part: Any) -> "Located | None":
        """The value under a key or an index, if there is one."""
        if isinstance(self.value, dict):
            found = self.value.get(part)
            return found if isinstance(found, Located) else None
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            item: Located = self.value[part]
            return item
        return None


def read_yaml(text: str, file: str, variables: Mapping[str, Any]) -> Located:
    """Read `text`, with "${name}" replaced from the mapping's own `vars` overridden by `variables`.

    Raises:
        RecipeError: no YAML, a duplicate key, an unquoted "2:4", a tag, an unknown variable.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Origin(file, mark.line + 1, mark.column + 1) if mark else file
        raise RecipeError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply") from None
    if node is None:
        raise RecipeError(f"{file}:1:1: the recipe is empty")
    root = _Reader(file).read(node)
    if not isinstance(root.value, dict):
        return root
    return _substituted(root, _variables(root, variables))


class _Reader:
    def __init__(self, file: str) -> None:
        self._file = file
        self._scalars = yaml.SafeLoader("")
        self._read = 0
        self._open: set[int] = set()  # collections being read: an anchor inside itself would never end

    def read(self, node: yaml.Node) -> Located:
        origin = Origin(self._file, node.start_mark.line + 1, node.start_mark.column + 1)
        self._read += 1
        if self._read > _MOST:
            raise RecipeError(f"{origin}: more than {_MOST} values, or anchors that multiply")
        if isinstance(node, yaml.ScalarNode):
            return Located(self._scalar(node, origin), origin, {})
        if id(node) in self._open:
            raise RecipeError(f"{origin}: an anchor that holds itself")
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise RecipeError(f"{origin}: unknown tag {node.tag!r}")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found = self._mapping(node, origin)
        else:
            found = Located([self.read(item) for item in node.value], origin, {})
        self._open.remove(id(node))
        return found

    def _mapping(self, node: yaml.MappingNode, origin: Origin) -> Located:
        values: dict[Any, Located] = {}
        keys: dict[Any, Origin] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node)
            if isinstance(key.value, (dict, list)):
                raise RecipeError(f"{key.origin}: a key must be a word or a number")
            if key.value in values:
                raise RecipeError(f"{key.origin}: duplicate key {key.value!r}, first at line {keys[key.value].line}")
            values[key.value], keys[key.value] = self.read(value_node), key.origin
        return Located(values, origin, keys)

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Any:
        if node.tag == "tag:yaml.org,2002:merge":
            raise RecipeError(f"{origin}: merge keys (<<) are not supported: write the options out")
        if node.style is None and _SEXAGESIMAL.fullmatch(node.value):
            raise RecipeError(
                f'{origin}: an unquoted {node.value} is a number in base 60 to YAML: write it in quotes, "{node.value}"'
            )
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or str(error)
            raise RecipeError(f"{origin}: {problem}: {node.value!r}") from None


def _variables(root: Located, given: Mapping[str, Any]) -> dict[str, Any]:
    node = root.get("vars")
    if node is not None and node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(f"{node.origin}: vars must be a mapping of names to values")
    own = {key: value.value for key, value in (node.value or {}).items()} if node is not None else {}
    for key, value in own.items():
        assert node is not None
        if not isinstance(key, str):
            raise RecipeError(f"{node.key_origin(key)}: the name of a variable must be a word, not {key!r}")
        if isinstance(value, (dict, list)):
            raise RecipeError(f"{node.value[key].origin}: variable {key!r} must be one word or number")
        if isinstance(value, str) and _VARIABLE.search(value):
            raise RecipeError(f"{node.value[key].origin}: variable {key!r} can't be made of another: {value!r}")
    for name, value in given.items():
        if not isinstance(value, (str, int, float)):
            raise RecipeError(f"{root.origin}: variable {name!r} must be one word or number, not {value!r}")
        if name not in own:
            raise RecipeError(f"{root.origin}: the recipe has no variable {name!r}{suggest(name, own)}")
    return {**own, **given}


def _substituted(node: Located, variables: Mapping[str, Any]) -> Located:
    if isinstance(node.value, dict):
        values = {
            key: _renewed(value, variables) if key == "vars" else _substituted(value, variables)
            for key, value in node.value.items()
        }
        return Located(values, node.origin, node.keys)
    if isinstance(node.value, list):
        return Located([_substituted(item, variables) for item in node.value], node.origin, {})
    if not isinstance(node.value, str):
        return node
    whole = _VARIABLE.fullmatch(node.value)
    if whole:  # the type of the variable is kept
        return Located(_lookup(whole[1], node, variables), node.origin, {})
    return Located(_VARIABLE.sub(lambda m: str(_lookup(m[1], node, variables)), node.value), node.origin, {})


def _renewed(node: Located, variables: Mapping[str, Any]) -> Located:
    """`vars` itself, with the values in force, so that a dump parses to the same recipe."""
    if not isinstance(node.value, dict):
        return node
    values = {key: Located(variables[key], value.origin, value.keys) for key, value in node.value.items()}
    return Located(values, node.origin, node.keys)


def _lookup(name: str, node: Located, variables: Mapping[str, Any]) -> Any:
    if name not in variables:
        raise RecipeError(f"{node.origin}: no variable {name!r} in vars{suggest(name, variables)}")
    return variables[name]
