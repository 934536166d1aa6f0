"""Imports run one way, from the ground up, and no two files import each other."""

import ast
from pathlib import Path

import mutants
import pytest

import solo_ext

ROOT = Path(solo_ext.__file__).parent
GROUND = {"errors", "files", "plugins", "schema", "text"}
# room -> what it may import from this project, besides itself and the ground
CORE = {"losses", "networks", "optim"}
SCIENCE = CORE | {"momentum", "data", "evaluation", "methods"}
TRAINING = SCIENCE | {"runs", "training"}
ROOMS = {
    "losses": set(),
    "networks": set(),
    "optim": set(),
    "data": set(),
    "momentum": CORE,
    "evaluation": CORE,
    "methods": SCIENCE,
    "runs": SCIENCE,
    "training": SCIENCE | {"runs"},
    "planning": TRAINING,
    "compat": TRAINING,
    "analysis": TRAINING,
    "studies": TRAINING | {"planning", "analysis"},
    "zoo": TRAINING,
    "api": TRAINING | {"analysis", "zoo"},
    "cli": TRAINING | {"planning", "compat", "analysis", "studies", "zoo", "api"},
}


def modules() -> dict[str, Path]:
    """Module name -> its file."""
    names = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """The modules of this project that a file imports; `everywhere`: also inside functions and for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from package import module` counts as the module
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= inner or {node.module or ""}
    return names & MODULES.keys()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_is_known():
    assert {room(name) for name in MODULES} - {"", "__main__"} == ROOMS.keys() | GROUND & {room(m) for m in MODULES}


@pytest.mark.parametrize("package", ROOMS)
def test_imports_run_one_way(package):
    files = {name: file for name, file in MODULES.items() if room(name) == package}
    assert files
    for name, file in files.items():
        forbidden = {room(other) for other in imported(file)} - ROOMS[package] - {package, ""} - GROUND
        assert not forbidden, f"{name} imports {sorted(forbidden)}"


def test_the_ground_knows_nobody():
    for name, file in MODULES.items():
        if room(name) in GROUND:
            assert {room(other) for other in imported(file)} <= GROUND, name


def test_no_two_files_import_each_other():
    """Not even inside functions or for type checkers, directly or around a corner."""
    graph = {name: imported(file) - {name} for name, file in MODULES.items()}
    # a package's __init__ gathers what its files hold, and they do not import it
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def calls(path: Path) -> set[str]:
    """Dotted names of the functions that the file calls."""
    return {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }


def test_one_loader_of_pickles_and_one_lightning():
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import pytorch_lightning" not in text, file
        unpickling = calls(file) & {"torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "np.load"}
        assert not unpickling or file.name == "checkpoints.py" or "allow_pickle=False" in text, (file, unpickling)


def test_the_faults_of_the_mutants_have_their_lines():
    """Or the hunt would end at the first that a change of the code has left behind."""
    known = mutants.FAULTS.read_text(encoding="utf-8").splitlines()
    assert [line for line in mutants.EQUIVALENT if line not in known] == []
    lost = [(file, old) for file, old, _ in mutants.faults([]) if old not in (ROOT / file).read_text("utf-8")]
    assert lost == []
