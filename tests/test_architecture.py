"""The rules of the layout that nobody should have to remember, read off the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("data_prep", "pipeline", "launch")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))

OWNERS = {
    "deepspeed": {
        "pipeline/engine/student.py",
        "pipeline/engine/operators.py",
        "pipeline/engine/zero_files.py",
        "pipeline/engine/deepspeed_config.py",
    },
    "datasets": {"data_prep/readers/sources.py", "data_prep/readers/rows.py"},
    "sentencepiece": {"data_prep/tokens/tokenizer.py"},
    "tokenizers": {"data_prep/tokens/tokenizer.py"},
    "tokie": {"data_prep/tokens/tokenizer.py"},
    "ray": {"data_prep/work/engines.py"},
    "triton": {"pipeline/relations/kernel.py"},
}


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file, except for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not imports(path) & later


def test_data_prep_never_imports_torch() -> None:
    assert [path.name for path in (ROOT / "data_prep").rglob("*.py") if "torch" in imports(path)] == []


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_dependencies_have_one_owner(library: str) -> None:
    users = {str(path.relative_to(ROOT)) for path in FILES if library in imports(path)}
    assert users <= OWNERS[library]


def test_launch_shadows_no_library() -> None:
    """DeepSpeed puts launch/ first on sys.path."""
    names = {path.stem for path in (ROOT / "launch").iterdir()} - {"__init__"}
    assert not names & (set(sys.stdlib_module_names) | {"torch", "deepspeed", "transformers", "datasets", "evaluate"})


def test_modules_are_imported_by_their_own_path() -> None:
    assert all(not path.read_text().strip() for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py"))


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): _own_modules(p) for p in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _own_modules(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LAYERS:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).is_file()}
