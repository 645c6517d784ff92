"""The layout: each room of the package imports from those below it alone, and no two modules import each other."""

import ast
from pathlib import Path

import metarec_jax

ROOT = Path(metarec_jax.__file__).parent
ROOMS = [  # from the bottom to the top
    "errors types _files _moved _progress",
    "core",
    "collaborative",
    "data",
    "tasks",
    "models",
    "strategies",
    "metrics",
    "training",
    "evaluation",
    "inference",
    "state",
    "batch",
    "recommender",
    "api",
    "distributed",
    "__init__",
    "serving",
    "cli",
]
LINES = 400  # of a file
BODY = 60  # lines of a function, with its signature
FACADE = 250  # lines of `recommender` without docstrings, which are the public documentation
FACTORIES = ("Strategy", "Members")  # return annotations of strategy factories


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            inside = name.removeprefix("metarec_jax").lstrip(".") if name.split(".")[0] == "metarec_jax" else None
            if inside is not None:
                parent = inside.rpartition(".")[0]
                found.add(inside if inside in MODULES else parent if parent in MODULES else "__init__")
    return found


def test_no_room_imports_from_one_above_it():
    height = {room: i for i, level in enumerate(ROOMS) for room in level.split()}
    wrong = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in _imports(path)
        if height[other.split(".")[0]] > height[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    """By removing modules that import nothing which is left; a package's `__init__` is apart from what it gathers."""
    left = {name: _imports(path) - {name} for name, path in MODULES.items() if path.name != "__init__.py"}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle: {', '.join(sorted(left))}"


def test_no_file_is_long():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > LINES}
    assert not long, f"longer than {LINES} lines: {long}"


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines, from `def`, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


def test_the_facade_is_short():
    source = MODULES["recommender"].read_text()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [n.body[0] for n in nodes if ast.get_docstring(n) is not None]
    assert len(source.splitlines()) - sum(d.end_lineno - d.lineno + 1 for d in docstrings) <= FACADE


def test_no_function_is_long():
    """Strategy factories hold their pure functions as closures, so each inner function is counted in their place."""
    long = [
        f"{name}.{node.name}: {_lines(node)}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node.returns, ast.Name) and node.returns.id in FACTORIES)
        and _lines(node) > BODY
    ]
    assert not long, f"longer than {BODY} lines: {', '.join(long)}"


def test_no_function_hides_its_module():
    import importlib
    import types

    for name in MODULES:
        if name.endswith("__main__"):
            continue
        full = "metarec_jax" if name == "__init__" else f"metarec_jax.{name}"
        module: object = metarec_jax
        for part in full.split(".")[1:]:
            importlib.import_module(full)
            module = getattr(module, part)
        assert isinstance(module, types.ModuleType), f"{full} is hidden by {module!r}"
