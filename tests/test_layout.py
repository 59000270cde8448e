"""The rules of the layout, over the syntax trees: imports go one way, no Namespace below main, short functions."""

import ast
import os

import pytest
from conftest import ROOT

# From the lowest: a module imports what stands below it, and of its own package what makes no circle.
RANKS = [
    {"utility", "jpeg"},
    {"files", "spelling"},
    {"transforms", "pictures"},
    {"runtime"},
    {"sampler", "models", "losses", "data"},
    {"reader", "weights"},
    {"lists"},
    {"retrieval", "training"},
    {"train", "eval", "infer", "quickstart"},
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
    """The name under which a file is imported; scripts in data/ and docs/ import their siblings by name alone."""
    name = path[: -len(".py")].replace(os.sep, ".")
    for folder in ("data.", "docs."):
        if name.startswith(folder):
            return name[len(folder) :]
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


def package(name):
    """What has a rank: a module at the top, or the folder that a module is in."""
    return "data" if os.path.exists(os.path.join(ROOT, "data", f"{name}.py")) else name.split(".")[0]


MODULES = {module(path) for path in sources()}


@pytest.mark.parametrize("path", [path for path in sources() if package(module(path)) in RANK])
def test_imports_go_one_way(path):
    own = package(module(path))
    tops = {package(name) for name in imported(path)} - {own}
    upwards = sorted(name for name in tops if name in RANK and RANK[name] >= RANK[own])
    assert not upwards
    if RANK[own] == 0:
        assert not tops & set(RANK)


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
    takers = set()
    for path, f in functions():
        arguments = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
        if any(a.arg == "args" or "Namespace" in ast.dump(a) for a in arguments):
            takers.add((path, f.name))
    assert takers == TAKE_ARGS


def test_functions_are_short():
    long = {f"{path}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1 for path, f in functions()}
    assert not {name: lines for name, lines in long.items() if lines > 60}


def test_files_of_tests_are_short():
    for top, _, names in os.walk(os.path.join(ROOT, "tests")):
        for name in names:
            if name.endswith(".py"):
                with open(os.path.join(top, name)) as file:
                    assert sum(1 for _ in file) < 500, name
