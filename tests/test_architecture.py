"""The rules of the layout that nobody should have to remember, read off the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("data_prep", "pipeline", "launch")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]

# Rooms from the bottom to the top: a room imports from lower floors, and those on one floor know nothing of each other.
FLOORS = (
    ("data_prep.errors",),
    ("data_prep.durable",),
    ("data_prep.manifest", "data_prep.samples"),
    ("data_prep.shards",),
    ("data_prep.readers", "data_prep.tokens"),
    ("data_prep.request",),
    ("data_prep.work",),
    ("data_prep.claim",),
    ("data_prep.prepare", "data_prep.report"),
    ("pipeline.config", "pipeline.data", "pipeline.devices", "pipeline.relations"),
    ("pipeline.recipes", "pipeline.provenance", "pipeline.encoders"),
    ("pipeline.engine", "pipeline.tasks"),
    ("pipeline.training",),
    ("pipeline.shipping",),
    ("pipeline.planning", "pipeline.results"),
    ("pipeline.evaluation",),
    ("launch",),
)

# Which room owns a heavy dependency; a file where the rest of its room has no business with it.
OWNERS = {
    "deepspeed": ("pipeline.engine", "pipeline.training.monitor"),
    "datasets": ("data_prep.readers", "pipeline.tasks.sources"),
    "sentencepiece": ("data_prep.tokens",),
    "tokenizers": ("data_prep.tokens",),
    "tokie": ("data_prep.tokens",),
    "ray": ("data_prep.work.engines",),
    "onnx": ("pipeline.shipping.onnx_files",),
    "onnxruntime": ("pipeline.shipping.onnx_files",),
    "onnxscript": ("pipeline.shipping.onnx_files",),
    "sklearn": ("pipeline.tasks.metrics",),
    "scipy": ("pipeline.tasks.metrics", "pipeline.evaluation.results"),
    "seqeval": ("pipeline.tasks.metrics",),
    "triton": ("pipeline.relations.kernel",),
    "transformers": ("data_prep.tokens", "pipeline"),
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path) -> None:
    """Arrows go from higher floors to lower ones, and inside of a room."""
    name = _module(path)
    floor, room = _room(name)
    for other in _own_modules(path):
        other_floor, other_room = _room(other)
        assert other_room == room or other_floor < floor, f"{name} may not import {other}"


def test_data_prep_never_imports_torch() -> None:
    assert [path.name for path in (ROOT / "data_prep").rglob("*.py") if "torch" in imports(path)] == []


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_dependencies_have_one_owner(library: str) -> None:
    users = [_module(path) for path in FILES if library in imports(path)]
    assert [name for name in users if not _inside(name, OWNERS[library])] == []


def test_launch_shadows_no_library() -> None:
    """DeepSpeed puts launch/ first on sys.path."""
    names = {path.stem for path in (ROOT / "launch").iterdir()} - {"__init__"}
    assert not names & (set(sys.stdlib_module_names) | {"torch", "deepspeed", "transformers", "datasets", "evaluate"})


def test_modules_are_imported_by_their_own_path() -> None:
    assert all(not path.read_text().strip() for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py"))


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {_module(path): _own_modules(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_rooms_stay_small() -> None:
    """A folder is read at a glance; a file that has to be longer says why in ARCHITECTURE.md."""
    folders = {path.parent for path in FILES}
    crowded = {str(f): n for f in folders if (n := sum(p.suffix == ".py" for p in f.iterdir())) > 13}
    assert crowded == {}
    excused = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("Longer than 300 lines")[2]
    long = [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    assert [str(p.relative_to(ROOT)) for p in long if f"`{p.relative_to(ROOT)}`" not in excused] == []


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def _room(name: str) -> tuple[int, str]:
    """The floor and the room of a module."""
    found = [(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if _inside(name, (room,))]
    assert len(found) == 1, f"{name} has no room: give it one in FLOORS"
    return found[0]


def _own_modules(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LAYERS:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).is_file()}
