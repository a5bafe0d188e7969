"""Import direction: every room sees only the rooms below it, so that each can be read, tested and replaced alone."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import maskfirst

ROOT = Path(maskfirst.__file__).parent
FLOORS = (
    {"errors", "files", "ahead", "batching"},
    {"frames"},
    {"types"},
    {"contracts"},
    {
        "rows",
        "tasks",
        "finite",
        "criteria",
        "metrics",
        "draw",
        "ops",
        "backbones",
        "proposers",
        "namers",
        "data",
        "formats",
        "sources",
        "prediction",
    },
    {"optim", "training", "ranks", "loggers", "stream", "memory", "sync_norm"},
    {"segmenter"},
    {"compose", "text_vectors", "answers", "graphs", "parity"},
    {"recipe", "build", "weights"},
    {
        "train",
        "phase",
        "phases",
        "checkpoint",
        "callback",
        "evaluate",
        "score",
        "predict",
        "predict_points",
        "outputs",
        "cost",
        "engine",
        "export",
        "serve",
        "publishing",
        "shards",
    },
    {"convert"},
    {"cli"},
)
"""From the ground up; rooms of one floor may see each other as long as no circle closes."""
LIGHT = {"cli", "errors", "files"}
"""Rooms that `maskfirst --help` imports: nothing heavy at their top level."""
HEAVY = {"torch", "torchvision", "timm", "lightning_fabric", "numpy", "PIL", "pydantic", "safetensors", "jaxtyping"}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its syntax tree."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's own modules that this one imports, at its top or inside a function; not for type checking only."""
    checking = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name lives"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    own = {name.removeprefix("maskfirst.") for name in names if name.startswith("maskfirst.")}
    return {module for module in known if module in own}


MODULES = modules()
GRAPH = {name: imported(tree, set(MODULES)) - {name} for name, tree in MODULES.items()}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES if name} - set().union(*FLOORS) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module: str) -> None:
    height = {name: index for index, floor in enumerate(FLOORS) for name in floor}
    above = {other for other in GRAPH[module] if height[room(other)] > height[room(module)]}
    assert not above, f"{module} imports {sorted(above)}, which lie above it"


def test_there_is_no_circle() -> None:
    # Raises CycleError, which names the circle.
    assert set(TopologicalSorter(GRAPH).static_order()) == set(GRAPH)


def test_only_the_command_line_sees_convert() -> None:
    seers = {room(name) for name, seen in GRAPH.items() if any(room(other) == "convert" for other in seen)}
    assert seers <= {"convert", "cli"}


def test_fabric_is_imported_by_training_alone() -> None:
    users = {name for name, tree in MODULES.items() if any("lightning_fabric" in top for top in outside(tree))}
    assert users <= {"ranks", "phase"}


def outside(tree: ast.AST) -> set[str]:
    """Top-level packages imported anywhere inside `tree`."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_help_imports_nothing_heavy(module: str) -> None:
    tree = MODULES[module]
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    packages = set().union(*(outside(node) for node in top))
    assert not packages & HEAVY
    own = {name for node in top for name in imported(ast.Module([node], []), set(MODULES))}
    assert {room(name) for name in own if name} <= LIGHT


def test_dependencies_are_declared() -> None:
    """What the package imports stands in pyproject.toml: a clean install must not miss anything."""
    providers = packages_distributions()
    declared = {re.split(r"[^\w-]", told)[0].lower() for told in requires("maskfirst") or ()}
    used = set().union(*(outside(tree) for tree in MODULES.values())) - set(sys.stdlib_module_names) - {"maskfirst"}
    # The extras need not be installed here.
    homes = {package: providers.get(package, [{"mlflow": "mlflow-skinny"}.get(package, package)]) for package in used}
    missing = {
        package for package, found in homes.items() if not declared & {name.lower().replace("_", "-") for name in found}
    }
    assert not missing
