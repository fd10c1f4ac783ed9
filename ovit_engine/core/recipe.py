"""Recipes: YAML to modifiers and back, with errors that say where."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from ovit_engine.core.errors import Origin, RecipeError
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.registry import GROUP, broken_plugins, modifiers
from ovit_engine.core.training_options import Training
from ovit_engine.core.yaml_reader import Located, check_length, read_yaml
from ovit_engine.utils.suggest import did_you_mean, suggest
from ovit_engine.utils.validation import reason

T = TypeVar("T", bound=BaseModel)

_MAX_BYTES_EACH = 4  # of a character in UTF-8

KEYS = ("name", "description", "vars", "training", "modifiers")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of modifiers, and what the bundled trainer needs beside them."""

    name: str
    modifiers: tuple[Modifier, ...]
    vars: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    description: str = ""

    @classmethod
    def load(cls, source: str | Path, /, **variables: Any) -> "Recipe":
        """Read a recipe file, or one that ships with us by its name (`ovit recipes` lists them).

        `variables` replace those of the recipe's `vars`.

        Raises:
            RecipeError: no such file or name, or anything in it that can't be followed.
        """
        if "\n" in str(source):
            raise RecipeError("a recipe's text stands where its path or name goes: Recipe.parse(text) reads text")
        path = Path(source)
        try:
            found = path.is_file()
        except (OSError, ValueError) as error:  # a name too long, or with a null byte in it
            raise RecipeError(f"no recipe file {str(source)[:200]!r}: {error}") from None
        if found:
            check_length(path.stat().st_size // _MAX_BYTES_EACH, str(path))
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{path}: not a text file: {error}") from None
            return cls._parse(text, str(path), variables)
        shipped = shipped_recipes()
        if str(source) in shipped:
            return cls._parse(shipped[str(source)], f"{source}.yaml", variables)
        beside = [file.name for file in sorted(path.parent.glob("*.y*ml"))]
        near = did_you_mean(path.name, beside, cutoff=0.8) or suggest(str(source), shipped, count=3)
        raise RecipeError(f"no recipe file {str(source)!r} nor a shipped recipe (`ovit recipes`){near}")

    @classmethod
    def parse(cls, text: str, /, *, file: str = "<recipe>", **variables: Any) -> "Recipe":
        """Read a recipe from YAML text.

        Raises:
            RecipeError: the first thing that can't be followed, as "file:line:column: what".
        """
        return cls._parse(text, file, variables)

    @classmethod
    def _parse(cls, text: str, file: str, variables: Mapping[str, Any]) -> "Recipe":
        root = read_yaml(text, file, variables)
        if not isinstance(root.value, dict):
            raise RecipeError(f"{root.origin}: a recipe is a mapping with {', '.join(KEYS)}, not {_named(root.value)}")
        _known(root, KEYS, "recipe")
        section = root.get("training")
        training = _validated(Training, section, "training")
        if section is not None and training is not None:
            training.set_origins({"": section.origin, **_option_origins(section)})
        entries = root.get("modifiers")
        if entries is None:
            raise RecipeError(f"{root.origin}: the recipe has no 'modifiers' (write 'modifiers: []' for none)")
        if not isinstance(entries.value, list):
            raise RecipeError(f"{entries.origin}: modifiers must be a list, not {_named(entries.value)}")
        built = tuple(_build(entry) for entry in entries.value)
        return cls(
            name=_name(root, file),
            modifiers=built,
            vars=plain(root.get("vars")) or {},
            training=training or Training(),
            description=_text(root, "description", ""),
        )

    def dump(self) -> str:
        """The recipe as YAML, variables resolved; parsing it gives an equal recipe."""
        document: dict[str, Any] = {"name": self.name}
        if self.description:
            document["description"] = self.description
        if self.vars:
            document["vars"] = dict(self.vars)
        training = self.training.model_dump(exclude_unset=True)
        if training:
            document["training"] = training
        document["modifiers"] = [
            {m.name: m.model_dump(mode="json", by_alias=True, exclude_unset=True)} for m in self.modifiers
        ]
        return yaml.safe_dump(document, sort_keys=False)  # escapes all but ASCII: some characters don't come back else

    @property
    def hash(self) -> str:
        """SHA-256 of the dumped text: comments, order of keys and layout do not count, values and variables do."""
        return hashlib.sha256(self.dump().encode()).hexdigest()


def shipped_recipes() -> dict[str, str]:
    """The text of our own recipes by name ("folder/name" below the top)."""
    found: dict[str, str] = {}

    def walk(folder: Any, prefix: str) -> None:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir():
                walk(item, f"{prefix}{item.name}/")
            elif item.name.endswith(".yaml"):
                found[f"{prefix}{item.name.removesuffix('.yaml')}"] = item.read_text(encoding="utf-8")

    walk(files("ovit_engine.recipes"), "")
    return found


def plain(node: Located | None) -> Any:
    """The bare Python value of a located one."""
    if node is None:
        return None
    if isinstance(node.value, dict):
        return {key: plain(value) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [plain(value) for value in node.value]
    return node.value


def _build(entry: Located) -> Modifier:
    if isinstance(entry.value, dict) and len(entry.value) > 1:
        keys = ", ".join(map(str, entry.value))
        raise RecipeError(f"{entry.origin}: one modifier has the keys {keys}: indent the options below the name")
    if isinstance(entry.value, str) and entry.value in modifiers():
        raise RecipeError(f"{entry.origin}: a modifier has options, if none of its own: write '- {entry.value}: {{}}'")
    if not isinstance(entry.value, dict) or not entry.value:
        raise RecipeError(f"{entry.origin}: each modifier is written '- name: {{options}}', not {_named(entry.value)}")
    ((name, options),) = entry.value.items()
    known = modifiers()
    if name not in known:
        raise RecipeError(f"{entry.key_origin(name)}: no modifier {name!r}{_known_modifiers(str(name))}")
    modifier = _validated(known[name], options, str(name)) or known[name]()
    return modifier.set_origins({"": entry.key_origin(name), **_option_origins(options)})


def _known_modifiers(name: str) -> str:
    """The nearest name, and what a plugin may have to do with it."""
    near = suggest(name, list(modifiers()))
    plugins = "; ".join(broken_plugins()) or f"a plugin's modifiers come with its package (entry points {GROUP!r})"
    return f"{near}{'' if near.endswith('?') else '.'} {plugins[0].upper()}{plugins[1:]}"


def _option_origins(options: Located) -> dict[str, Origin]:
    """Where the value of each option stands, and each key of one that is a mapping."""
    if not isinstance(options.value, dict):
        return {}
    inner = {
        f"{key}.{name}": value.key_origin(name)
        for key, value in options.value.items()
        if isinstance(value.value, dict)
        for name in value.value
    }
    return {**{key: value.origin for key, value in options.value.items()}, **inner}


def _validated(kind: type[T], node: Located | None, what: str) -> T | None:
    if node is None:
        return None
    if node.value is None:
        node = Located({}, node.origin, {})
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.origin}: the options of {what} are a mapping, not {_named(node.value)}")
    _known(node, [f.alias or n for n, f in kind.model_fields.items()], what)
    try:
        return kind.model_validate(plain(node))
    except ValidationError as error:
        raise _explained(error, node, what) from None


def _explained(error: ValidationError, node: Located, what: str) -> RecipeError:
    """The first problem that pydantic found, at its place in the file."""
    first = error.errors()[0]
    path, here = [what], node
    *outer, last = first["loc"] or ("",)
    if first["type"] not in ("extra_forbidden", "missing"):
        outer.append(last)
    for part in outer:
        inner = here.find(part)
        if inner is not None:  # pydantic's path also names union members and keys
            path.append(str(part))
            here = inner
    if first["type"] == "extra_forbidden":
        return RecipeError(f"{here.key_origin(last)}: {'.'.join(path)} has no option {last!r}")
    if first["type"] == "missing":
        path.append(str(last))
        return RecipeError(f"{here.origin}: {'.'.join(path)} is missing")
    value = "" if first["type"] == "value_error" else f": {plain(here)!r}"
    return RecipeError(f"{here.origin}: {'.'.join(path)}: {reason(first)}{value}")


def _known(node: Located, allowed: Any, what: str) -> None:
    for key in node.value:
        if key not in allowed:
            sparsity = str(key).replace("density", "sparsity")
            is_density = sparsity != key and sparsity in allowed  # the papers' word
            hint = f"; write {sparsity!r}, which is 1 - density" if is_density else suggest(str(key), list(allowed))
            raise RecipeError(f"{node.key_origin(key)}: {what} has no option {key!r}{hint}")


def _text(root: Located, key: str, default: str) -> str:
    node = root.get(key)
    if node is None:
        return default
    if not isinstance(node.value, str):
        raise RecipeError(f"{node.origin}: {key} must be text, not {_named(node.value)}")
    return node.value


def _name(root: Located, file: str) -> str:
    """The recipe's name, which is also that of its folder in runs/."""
    name = _text(root, "name", Path(file).stem if file != "<recipe>" else "recipe")
    node = root.get("name")
    if node is not None and (not name.strip() or name.startswith(".") or set(name) & set("/\\\n") or len(name) > 100):
        raise RecipeError(
            f"{node.origin}: name {name!r} can't name a folder in runs/: write 1 to 100 characters without '/', '\\' "
            "or line breaks, not beginning with '.'"
        )
    return name


def _named(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value)) or f"{value}"
