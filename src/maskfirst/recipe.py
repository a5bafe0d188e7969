"""Recipes: YAML trees whose keys are constructor arguments.

`load` reads a tree, with what it inherits and is overridden by; `construct` builds an object from one. Every mistake is a
RecipeError of one line that names the file, the place and the nearest right word.
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from maskfirst.errors import UserError, nearest

Finish = Callable[[Any, Mapping[str, Any], str], None]
"""Told a part that has just been built, the reserved keys that its node says, and its place in the recipe."""
RESERVED: Mapping[str, Any] = {"weights": str, "freeze": bool | list[str]}
"""Keys that any network part may say, with their types; its constructor is not given them."""
OWN = ("published", "measured")
"""Sections that are not inherited: the figures of one recipe are not those of another."""
_BUNDLED = Path(__file__).with_name("recipes")
_ENDINGS = (".yaml", ".yml")


class RecipeError(UserError):
    """A recipe that cannot be read or built, in one line: `camvid.yaml: proposer: unknown key ...`."""


@dataclass(frozen=True)
class Recipe:
    """A resolved tree, without `base`, of plain JSON values. `source` is what its errors call it.

    `trusted`: it may name classes of its own, `my_pkg.heads:MyHead`, and weights to fetch. Recipes that come with weights
    are not.
    """

    tree: dict[str, Any]
    source: str
    trusted: bool = True

    @property
    def name(self) -> str:
        return Path(self.source).stem


def names() -> tuple[str, ...]:
    """The recipes in the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.yaml")))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file or of a bundled name, on top of its `base`, with `overrides` such as `proposer.queries=100`.

    The value of an override is YAML; numbers in its path index lists. Raises RecipeError.
    """
    path, shown = _locate(source)
    return override(Recipe(_inherited(path, shown, ()), shown), overrides)


def own(name: str) -> Recipe:
    """What no recipe inherits from a bundled one, alone: its sections `published` and `measured`. Takes a moment."""
    path, shown = _locate(name)
    tree = _read(path, shown)
    return Recipe({key: tree[key] for key in OWN if key in tree}, shown)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `overrides`, see `load`. Raises RecipeError."""
    tree = recipe.tree
    for each in overrides:
        tree = _overridden(tree, each, recipe.source)
    return replace(recipe, tree=tree)


def construct(
    node: Any,
    wanted: Any,
    *,
    menus: Mapping[type, Mapping[str, str]],
    given: Mapping[type, Mapping[str, Any]] | None = None,
    where: str,
    source: str,
    trusted: bool = True,
    finish: Mapping[type, Finish] | None = None,
) -> Any:
    """The object of type `wanted` that `node` describes, by the annotations of its constructor's parameters.

    Contracts in `menus` (contract -> kind -> "module:Class") let `kind` choose; other classes and dataclasses are built as
    they are, also inside list, tuple, dict and unions; all else is a leaf, checked strictly as JSON by pydantic. `given`
    (class -> name -> value) fills the parameters of that class and its heirs by name where the node is silent. Parts that
    are instances of a class in `finish` may say RESERVED keys, which go there. Kinds outside of the menus are imported only
    if `trusted`. `where` is the node's place in the recipe, "" at its top. Raises RecipeError.
    """
    return _Builder(menus, given or {}, source, trusted, finish or {}).value(node, wanted, where)


def check(
    node: Any,
    wanted: type,
    *,
    menus: Mapping[type, Mapping[str, str]],
    given: Mapping[type, Mapping[str, Any]] | None = None,
    where: str,
    source: str,
    trusted: bool = True,
) -> None:
    """Raises RecipeError for what `construct` would find wrong with the keys and types of a node, but builds nothing."""
    _Checker(menus, given or {}, source, trusted, {}).prepare(node, wanted, where)


def check_keys(node: Any, known: Sequence[str], where: str, source: str) -> None:
    """Raises RecipeError unless `node` is a mapping with no keys but `known`."""
    if not isinstance(node, Mapping):
        raise RecipeError(f"{_place(source, where)}should be a mapping, got {_told(node)}.")
    for key in node:
        if key not in known:
            raise RecipeError(_unknown("key", key, known, known, where, source))


@dataclass(frozen=True)
class _Prepared:
    """A class, the arguments for its constructor, and the reserved keys of its node."""

    kind: type
    arguments: dict[str, Any]
    reserved: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Builder:
    menus: Mapping[type, Mapping[str, str]]
    given: Mapping[type, Mapping[str, Any]]
    source: str
    trusted: bool
    finish: Mapping[type, Finish]

    def value(self, node: Any, annotation: Any, where: str) -> Any:
        if not _holds_part(annotation):
            return self._leaf(node, annotation, where)
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is None:
            return self._part(node, annotation, where)
        if origin is Annotated:
            return self.value(node, inner[0], where)
        if origin in (Union, UnionType):
            return self._union(node, inner, where)
        if issubclass(origin, Mapping):
            if not isinstance(node, Mapping):
                raise self._error(where, f"should be a mapping, got {_told(node)}.")
            return {key: self.value(item, inner[1], _join(where, key)) for key, item in node.items()}
        if issubclass(origin, Sequence):
            if not isinstance(node, Sequence) or isinstance(node, str):
                raise self._error(where, f"should be a list, got {_told(node)}.")
            built = (self.value(item, inner[0], _join(where, i)) for i, item in enumerate(node))
            return list(built) if origin is list else tuple(built)
        raise TypeError(f"{annotation} cannot be built from a recipe")

    def prepare(self, node: Any, wanted: type, where: str) -> _Prepared:
        """All that is needed to build a part, its own parts being built."""
        menu = self.menus.get(wanted)
        if not isinstance(node, Mapping):
            remedy = f" Write {{kind: {node}}}." if menu is not None and isinstance(node, str) else ""
            raise self._error(where, f"should be a mapping, got {_told(node)}.{remedy}")
        settings = dict(node)
        kind = wanted if menu is None else self._choose(settings.pop("kind", None), wanted, menu, where)
        reserved: dict[str, Any] = {}
        if any(issubclass(kind, finished) for finished in self.finish):
            said = {key: settings.pop(key) for key in RESERVED if key in settings}
            reserved = {
                key: self._leaf(value, RESERVED[key], _join(where, key))
                for key, value in said.items()
                if value is not None
            }
        given = {name: v for heir, values in self.given.items() if issubclass(kind, heir) for name, v in values.items()}
        parameters = {
            name: parameter.default
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        listed = [name for name in parameters if name not in given]
        for key in settings:
            if key not in parameters:
                hints = [*parameters, *RESERVED]
                raise RecipeError(_unknown("key", key, hints, listed, where, self.source))
        types = get_type_hints(kind.__init__, include_extras=True)
        arguments = {}
        for name, default in parameters.items():
            if name in settings:
                arguments[name] = self.value(settings[name], types.get(name, Any), _join(where, name))
            elif name in given:
                arguments[name] = given[name]
            elif default is inspect.Parameter.empty:
                raise self._error(where, f"'{name}' is missing. {_known(listed)}")
        return _Prepared(kind, arguments, reserved)

    def _part(self, node: Any, wanted: type, where: str) -> Any:
        prepared = self.prepare(node, wanted, where)
        try:
            built = prepared.kind(**prepared.arguments)
        except ValueError as error:
            raise self._error(where, " ".join(str(error).split())) from error
        for finished, finish in self.finish.items():
            if isinstance(built, finished):
                finish(built, prepared.reserved, where)
        return built

    def _choose(self, kind: Any, wanted: type, menu: Mapping[str, str], where: str) -> type:
        if kind is None:
            raise self._error(where, f"'kind' is missing. {_known(sorted(menu))}")
        if not isinstance(kind, str):
            raise self._error(_join(where, "kind"), f"should be a word, got {_told(kind)}. {_known(sorted(menu))}")
        if kind in menu:
            return import_class(menu[kind])
        if ":" in kind:
            return self._private(kind, wanted, where)
        raise RecipeError(_unknown("kind", kind, menu, sorted(menu), where, self.source))

    def _private(self, kind: str, wanted: type, where: str) -> type:
        start = f"kind '{kind}'"
        if not self.trusted:
            raise self._error(where, f"{start} would run code of its own, which weights may only if trusted (--trust).")
        try:
            found = import_class(kind)
        except ModuleNotFoundError as error:
            module = kind.partition(":")[0]
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise self._error(
                where, f"{start}: there is no module '{error.name}'; install it or put its folder on PYTHONPATH."
            ) from error
        except AttributeError as error:
            raise self._error(where, f"{start}: {error}.") from error
        if not (isinstance(found, type) and issubclass(found, wanted)):
            raise self._error(where, f"{start} is no {wanted.__name__}; make it a subclass of {_path(wanted)}.")
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise self._error(where, f"{start} lacks what every {wanted.__name__} has: {', '.join(missing)}.")
        return found

    def _union(self, node: Any, members: tuple[Any, ...], where: str) -> Any:
        if node is None and type(None) in members:
            return None
        parts = [member for member in members if _holds_part(member)]
        leaves = tuple(member for member in members if not _holds_part(member) and member is not type(None))
        if len(parts) > 1:
            raise TypeError(f"a recipe cannot tell which of {parts} is meant")
        if leaves and not isinstance(node, Mapping):
            return self._leaf(node, Union[leaves], where)  # noqa: UP007 (made from a tuple)
        return self.value(node, parts[0], where)

    def _leaf(self, node: Any, annotation: Any, where: str) -> Any:
        try:
            return TypeAdapter(annotation).validate_json(json.dumps(node), strict=True)
        except ValidationError as error:
            place, sentence = _explain(error, node)
            raise self._error(_join(where, *place), sentence) from error

    def _error(self, where: str, message: str) -> RecipeError:
        return RecipeError(f"{_place(self.source, where)}{message}")


class _Checker(_Builder):
    """Looks at parts inside of a part, too, without building them."""

    def _part(self, node: Any, wanted: type, where: str) -> None:
        self.prepare(node, wanted, where)


def import_class(path: str) -> type:
    """The class at "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _holds_part(annotation: Any) -> bool:
    """Whether something in an annotation is to be built: a dataclass, or a class that pydantic cannot check as a leaf."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if is_dataclass(annotation):
            return True
        try:
            TypeAdapter(annotation)
        except PydanticSchemaGenerationError:
            return True
        return False
    return get_origin(annotation) is not Literal and any(_holds_part(inner) for inner in get_args(annotation))


def _explain(error: ValidationError, node: Any) -> tuple[tuple[int | str, ...], str]:
    """The place inside `node` and the sentence for what pydantic found."""
    errors = error.errors(include_url=False, include_context=False)
    # The members of a union each say what they miss; those that came furthest know best.
    depth = max(len(each["loc"]) for each in errors)
    deepest = [each for each in errors if len(each["loc"]) == depth]
    place, got = (deepest[0]["loc"], deepest[0]["input"]) if len(errors) == 1 else ((), node)
    messages = []
    for each in deepest:
        message = each["msg"].removeprefix("Input ").removeprefix("Value error, ").replace("valid array", "list")
        messages.append(message.replace("valid dictionary", "mapping").replace("an object", "a mapping"))
    first, *others = dict.fromkeys(messages)
    sentence = " or ".join([first[0].lower() + first[1:], *(other.removeprefix("should be ") for other in others)])
    # So it marks the key of a mapping, as against its value.
    return tuple(key for key in place if key != "[key]"), f"{sentence}, got {_told(got)}."


def _place(source: str, where: str) -> str:
    return f"{source}: {where}: " if where else f"{source}: "


def _join(where: str, *keys: int | str) -> str:
    return ".".join(str(key) for key in ((where, *keys) if where else keys))


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _known(known: Sequence[str]) -> str:
    return f"Known: {', '.join(known)}." if known else "It has no settings."


def _unknown(what: str, word: str, near: Any, known: Sequence[str], where: str, source: str) -> str:
    return f"{_place(source, where)}unknown {what} '{word}'.{nearest(word, near)} {_known(known)}"


def _told(value: Any) -> str:
    """A value as a recipe has it, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema and `<<`: `1e-4` is a number, `on` and `no` are words. Keys are text; none may occur twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML fills the class's own)
    yaml_constructors: dict[Any, Any] = {None: yaml.SafeLoader.yaml_constructors[None]}  # noqa: RUF012

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        lines: dict[str, int] = {}
        content, inherited = {}, {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key should be a word", key.start_mark)
            if key.value in lines:
                problem = f"key '{key.value}' occurs twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
            built = self.construct_object(value, deep=True)
            if key.value != "<<":
                content[key.value] = built
            elif isinstance(built, dict):
                inherited = built
            else:
                raise yaml.constructor.ConstructorError(None, None, "'<<' should be given a mapping", key.start_mark)
        return inherited | content

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(item, deep=True) for item in node.value]

    def integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)

    def number(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN\0", lambda loader, node: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda loader, node: node.value.lower() == "true"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _Loader.integer),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        _Loader.number,
    ),
)
for _tag, _pattern, _first, _make in _CORE:
    _starts = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _make)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)


def _parse(text: str, shown: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise RecipeError(f"{shown}: {line}{error.problem}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown}: not YAML: {' '.join(str(error).split())}.") from error


def _read(path: Path, shown: str) -> dict[str, Any]:
    """What a file says itself."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{shown}: cannot be read as UTF-8 text: {error}.") from error
    tree = _parse(text, shown)
    if not isinstance(tree, dict):
        raise RecipeError(f"{shown}: should be a mapping, got {_told(tree)}.")
    return tree


def _locate(source: str | Path, beside: Path | None = None) -> tuple[Path, str]:
    """The file of a recipe, and what errors call it. `beside`: the file that names it as its base."""
    text = str(source)
    if isinstance(source, str) and not text.endswith(_ENDINGS) and "/" not in text:
        path = _BUNDLED / f"{text}.yaml"
        if text not in names():
            raise RecipeError(
                f"no recipe '{text}'.{nearest(text, names())} `maskfirst recipes` lists the {len(names())} bundled ones; "
                "or give the path of a .yaml file."
            )
        return path, path.name
    path = Path(text) if beside is None else beside.parent / text
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, near) or nearest(path.stem, names())
        raise RecipeError(f"{path}: no such recipe file.{hint}")
    return path, str(path)


def _inherited(path: Path, shown: str, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """The tree in a file, merged into that of its base. `heirs`: the files that inherit from this one, eldest last."""
    chain = (*heirs, path.resolve())
    if path.resolve() in heirs:
        circle = " -> ".join(file.name for file in chain)
        raise RecipeError(f"{shown}: base: recipes inherit from each other in a circle: {circle}.")
    tree = _read(path, shown)
    base = tree.pop("base", None)
    tree = {key: _with_parts(node, path, shown, key, chain) for key, node in tree.items()}
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{shown}: base: should be a recipe's name or file, got {_told(base)}.")
    try:
        below, name = _locate(base, path)
    except RecipeError as error:
        raise RecipeError(f"{shown}: base: {error}") from error
    inherited = {key: value for key, value in _inherited(below, name, chain).items() if key not in OWN}
    return _merged(inherited, tree)


def _with_parts(node: Any, path: Path, shown: str, where: str, chain: tuple[Path, ...]) -> Any:
    """A node of the file at `path` on top of what its `base`, RECIPE:PLACE, is in another recipe, at any depth."""
    if isinstance(node, list):
        return [_with_parts(item, path, shown, _join(where, index), chain) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    own = {key: _with_parts(item, path, shown, _join(where, key), chain) for key, item in node.items()}
    base = own.pop("base", None)
    if base is None:
        return own
    recipe, sign, place = base.rpartition(":") if isinstance(base, str) else ("", "", "")
    if not (sign and recipe and place):
        raise RecipeError(
            f"{shown}: {where}.base: should be a recipe and a place in it, such as vit-p-b-ade20k:namer, got {_told(base)}."
        )
    try:
        below, name = _locate(recipe, path)
    except RecipeError as error:
        raise RecipeError(f"{shown}: {where}.base: {error}") from error
    found: Any = _inherited(below, name, chain)
    for key in place.split("."):
        if not isinstance(found, dict) or key not in found:
            there = found if isinstance(found, dict) else {}
            raise RecipeError(
                f"{shown}: {where}.base: there is no '{place}' in {name}.{nearest(key, there)} {_known(list(there))}"
            )
        found = found[key]
    return _merged(found, own)


def _merged(base: Any, over: Any) -> Any:
    """`over` on top of `base`, mapping by mapping; one with another `kind` replaces all that was there."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or over.get("kind", base.get("kind")) != base.get(
        "kind"
    ):
        return over
    return base | {key: _merged(base[key], value) if key in base else value for key, value in over.items()}


def _overridden(tree: dict[str, Any], override: str, shown: str) -> dict[str, Any]:
    place = f"{shown}: override '{override}'"
    path, sign, value = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise RecipeError(f"{place}: should look like proposer.queries=100.")
    return cast("dict[str, Any]", _put(tree, keys, _parse(value, place), place))


def _put(node: Any, keys: Sequence[str], value: Any, place: str) -> Any:
    """`node` with `value` merged in at the path `keys`. Sections that are not there are made: `construct` judges them."""
    if not keys:
        return _merged(node, value)
    key, *rest = keys
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise RecipeError(
                f"{place}: '{key}' should be one of 0..{len(node) - 1}, as the list has {len(node)} items."
            )
        index = int(key)
        return [*node[:index], _put(node[index], rest, value, place), *node[index + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"{place}: there is nothing inside of {_told(node)} that '{key}' could name.")
    there = node or {}
    return _merged(there, {key: _put(there.get(key), rest, value, place) if rest else value})
