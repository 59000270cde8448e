"""The rules of the layout, over the syntax trees: imports go one way, no Namespace below main, short functions."""

import ast
import os

import pytest
from conftest import ROOT

# From the lowest: a module imports what stands below it, and of its own package what makes no circle.
RANKS = [
    {"utility", "transforms"},
    {"files"},
    {"runtime"},
    {"sampler", "models", "losses"},
    {"reader", "weights"},
    {"retrieval", "training"},
    {"train", "eval", "infer"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# Whose parameter may be a Namespace.
TAKE_ARGS = {("utility.py", "fill")}


def sources():
    """Paths of the project's own Python files below the root, tests and benchmarks aside."""
    found = []
    for top, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("tests", "benchmarks")]
        found += [os.path.relpath(os.path.join(top, name), ROOT) for name in names if name.endswith(".py")]
    return sorted(found)


def tree(path):
    with open(os.path.join(ROOT, path)) as file:
        return ast.parse(file.read())


def imported(path):
    """Names of the modules that a file imports, dotted, also inside functions."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names


def module(path):
    return path[: -len(".py")].replace(os.sep, ".").removesuffix(".__init__")


MODULES = {module(path) for path in sources()}


@pytest.mark.parametrize("path", [path for path in sources() if module(path).split(".")[0] in RANK])
def test_imports_go_one_way(path):
    own = module(path).split(".")[0]
    tops = {name.split(".")[0] for name in imported(path)} - {own}
    upwards = sorted(name for name in tops if name in RANK and RANK[name] >= RANK[own])
    assert not upwards
    if RANK[own] == 0:
        assert not tops & (set(RANK) | {"data"})


def test_imports_have_no_circle():
    modules = {module(path): imported(path) for path in sources()}
    graph = {name: {other for other in names if other in modules and other != name} for name, names in modules.items()}
    while leaves := [name for name, needs in graph.items() if not needs]:
        graph = {name: needs - set(leaves) for name, needs in graph.items() if name not in leaves}
    assert not graph


def functions():
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_a_namespace_stops_in_main():
    takers = {(path, f.name) for path, f in functions() if any(a.arg == "args" for a in f.args.args)}
    assert takers == TAKE_ARGS


def test_functions_are_short():
    long = {f"{path}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1 for path, f in functions()}
    assert not {name: lines for name, lines in long.items() if lines > 60}
