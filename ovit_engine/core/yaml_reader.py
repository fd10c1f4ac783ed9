"""Safe YAML with the place of every value, strict about what YAML lets pass in silence."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ovit_engine.core.errors import Origin, RecipeError
from ovit_engine.utils.suggest import suggest

_SEXAGESIMAL = re.compile(r"[-+]?\d+(:\d+)+")

MAX_CHARACTERS = 2**18  # of a recipe, and of what its variables stand for together; shipped ones have 2,000

_DATE = re.compile(r"\d{4}-")

_MAX_VALUES = 100_000  # nested anchors could stand for any number

_MAX_DEPTH = 50

_MAX_INTEGER = 2**63

_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))

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
        RecipeError: no YAML, a duplicate key, an unquoted "2:4", a tag, an unknown variable, more than a recipe needs.
    """
    check_length(len(text), file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Origin(file, mark.line + 1, mark.column + 1) if mark else file
        raise RecipeError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested more than {_MAX_DEPTH} levels deep") from None
    if node is None:
        raise RecipeError(f"{file}:1:1: the recipe is empty")
    root = _Reader(file).read(node)
    if not isinstance(root.value, dict):
        return root
    return _Substitution(_variables(root, variables)).apply(root)


def check_length(characters: int, file: str) -> None:
    """Raise RecipeError for a text too long to be a recipe."""
    if characters > MAX_CHARACTERS:
        raise RecipeError(f"{file}: {characters:,} characters; a recipe has {MAX_CHARACTERS:,} at most")


class _Reader:
    def __init__(self, file: str) -> None:
        self._file = file
        self._scalars = yaml.SafeLoader("")
        self._read = 0
        self._open: set[int] = set()  # collections being read: an anchor inside itself would never end

    def read(self, node: yaml.Node) -> Located:
        origin = Origin(self._file, node.start_mark.line + 1, node.start_mark.column + 1)
        self._read += 1
        if self._read > _MAX_VALUES:
            raise RecipeError(f"{origin}: more than {_MAX_VALUES:,} values, or anchors that multiply")
        if len(self._open) >= _MAX_DEPTH:
            raise RecipeError(f"{origin}: nested more than {_MAX_DEPTH} levels deep")
        if isinstance(node, yaml.ScalarNode):
            return Located(self._scalar(node, origin), origin, {})
        if id(node) in self._open:
            raise RecipeError(f"{origin}: an anchor that holds itself")
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise _unknown_tag(node, origin)
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
        if _DATE.match(node.value) and node.tag == "tag:yaml.org,2002:timestamp" and node.style is None:
            raise RecipeError(
                f'{origin}: an unquoted {node.value} is a date to YAML: write it in quotes, "{node.value}"'
            )
        if node.tag not in _TAGS:
            raise _unknown_tag(node, origin)
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError) as error:  # the last three: "!!bool x", "!!int ''"
            problem = getattr(error, "problem", None) or f"not a valid {node.tag.rpartition(':')[2]}"
            raise RecipeError(f"{origin}: {problem}: {node.value!r}") from None
        return _checked(value, origin)


def _checked(value: Any, origin: Origin) -> Any:
    """Return a scalar; raise RecipeError for a number or a character that no option can hold."""
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise RecipeError(f"{origin}: a number of {value.bit_length()} bits; whole numbers have 63 at most")
    if isinstance(value, str):
        for character in value:
            if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
                raise RecipeError(f"{origin}: text holds the control character U+{ord(character):04X}")
    return value


def _unknown_tag(node: yaml.Node, origin: Origin) -> RecipeError:
    return RecipeError(f"{origin}: unknown tag {node.tag!r}")


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
        _checked(value, root.origin)
    return {**own, **given}


class _Substitution:
    """Puts the values of variables where a recipe names them."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._variables = variables
        self._left = MAX_CHARACTERS

    def apply(self, root: Located) -> Located:
        """Return the recipe with its variables replaced; `vars` itself gets the values in force, for its dump."""
        values = {key: self._renewed(v) if key == "vars" else self._replaced(v) for key, v in root.value.items()}
        return Located(values, root.origin, root.keys)

    def _replaced(self, node: Located) -> Located:
        if isinstance(node.value, dict):
            return Located({key: self._replaced(v) for key, v in node.value.items()}, node.origin, node.keys)
        if isinstance(node.value, list):
            return Located([self._replaced(item) for item in node.value], node.origin, {})
        if not isinstance(node.value, str):
            return node
        whole = _VARIABLE.fullmatch(node.value)
        if whole:  # the type of the variable is kept
            return Located(self._lookup(whole[1], node), node.origin, {})
        return Located(_VARIABLE.sub(lambda m: str(self._lookup(m[1], node)), node.value), node.origin, {})

    def _renewed(self, node: Located) -> Located:
        if not isinstance(node.value, dict):
            return node
        values = {key: Located(self._variables[key], v.origin, v.keys) for key, v in node.value.items()}
        return Located(values, node.origin, node.keys)

    def _lookup(self, name: str, node: Located) -> Any:
        if name not in self._variables:
            raise RecipeError(f"{node.origin}: no variable {name!r} in vars{suggest(name, self._variables)}")
        value = self._variables[name]
        self._left -= len(str(value))
        if self._left < 0:
            raise RecipeError(f"{node.origin}: variables stand for more than {MAX_CHARACTERS:,} characters")
        return value
