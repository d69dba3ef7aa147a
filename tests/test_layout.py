"""The house stands: rooms, links, mapping and guards belong together; imports point one way."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("solvers", "corrections", "experiments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENGINE_FILES = sorted((ROOT / "hybridsim").glob("*.py"))
ROOM_FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in ROOMS}
PACKAGE_FILES = [*ENGINE_FILES, *(file for files in ROOM_FILES.values() for file in files)]

SET_UP_AND_RUN = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/hybridsim run coarse_turbulence.yaml"
SET_UP_AND_TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2"


def name_of(file):
    return str(file.relative_to(ROOT))


def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


# --- links, mapping, guards


@pytest.mark.skipif(sys.platform == "win32", reason="Windows may check links out as text files; the installation works without")
@pytest.mark.parametrize("room", ROOMS)
def test_a_relative_link_leads_to_the_room(room):
    link = ROOT / "hybridsim" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room


def test_the_mapping_names_every_room():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"hybridsim": "hybridsim", **{f"hybridsim.{room}": room for room in ROOMS}}
    assert setuptools["packages"] == list(setuptools["package-dir"])
    for room in ROOMS:
        folders = {file.parent.relative_to(ROOT) for file in ROOM_FILES[room]}
        assert folders == {Path(room)}, "a folder with Python files inside a room must be named in pyproject.toml"
    excluded = {f"hybridsim/{room}" for room in ROOMS}
    assert excluded <= set(PROJECT["tool"]["pyright"]["exclude"])
    assert excluded <= set(PROJECT["tool"]["ruff"]["extend-exclude"])
    assert set(ROOMS) <= set(PROJECT["tool"]["pyright"]["include"])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_imported_by_its_full_name_only(room):
    done = python(f"import {room}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import hybridsim.{room}, not {room}" in done.stderr
    done = python(f"import hybridsim.{room} as room; print(room.__file__)", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve().samefile(ROOT / room / "__init__.py")


def test_importing_the_package_and_its_tables_is_light():
    code = "import sys, hybridsim, hybridsim.solvers, hybridsim.corrections; print('jax' in sys.modules, hybridsim.__version__)"
    done = python(code, cwd=ROOT)
    assert done.stdout.split()[0] == "False", done.stderr


# --- direction of imports


def imported(tree):
    """Every module that a file imports, as (line, name); `from hybridsim import solvers` counts as hybridsim.solvers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            if node.module == "hybridsim":
                yield from ((node.lineno, f"hybridsim.{alias.name}") for alias in node.names)


def imported_by_name(tree):
    """Rooms that are reached through a string: `import_module("hybridsim.solvers")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            for constant in ast.walk(node):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield node.lineno, constant.value


def inside(name, rooms):
    return any(name == f"hybridsim.{room}" or name.startswith(f"hybridsim.{room}.") for room in rooms)


def wrong_imports(tree, forbidden, *, by_name=True):
    found = [*imported(tree), *(imported_by_name(tree) if by_name else ())]
    return [(line, name) for line, name in found if inside(name, forbidden) or name.partition(".")[0] in (*ROOMS, "")]


# an experiment stands on top and may use everything; the engine knows no room
FORBIDDEN = {"solvers": ("corrections", "experiments"), "corrections": ("solvers", "experiments"), "experiments": ()}


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=name_of)
def test_imports_point_one_way_and_are_absolute(file):
    room = file.relative_to(ROOT).parts[0]
    assert wrong_imports(tree_of(file), FORBIDDEN.get(room, ROOMS), by_name=file.name != "config.py") == []


@pytest.mark.parametrize(
    "code",
    [
        "import hybridsim.solvers.spectral",
        "from hybridsim.solvers import SOLVERS",
        "from hybridsim import solvers",
        "def f():\n    from hybridsim.solvers.spectral import Spectral",
        "import importlib\nimportlib.import_module('hybridsim.solvers.' + name)",
        "from . import grid",
        "from .grid import Grid",
        "import solvers",
    ],
)
def test_a_wrong_import_is_noticed(code):
    assert wrong_imports(ast.parse(code), ("solvers",))


# --- what stands in the files

TEXTS = [
    *(ROOT / name for name in ("pyproject.toml", "README.md", ".ci/run", ".gitignore", ".pre-commit-config.yaml")),
    *(
        file
        for folder in ("hybridsim", "tests", *ROOMS)
        for suffix in ("*.py", "*.md", "*.yaml", "*.json", "*.toml")
        for file in sorted((ROOT / folder).rglob(suffix))
    ),
]
MACHINE_PATH = re.compile(r"(?<![\w.:/-])(?:/(?:work|home|root|Users|tmp|mnt)/\w|[A-Z]:\\Users)")


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_no_file_names_a_path_of_one_machine(file):
    assert MACHINE_PATH.findall(file.read_text(encoding="utf-8")) == []


def test_a_path_of_one_machine_is_noticed():
    assert MACHINE_PATH.search("open('/" + "home/someone/data.nc')")
    assert not MACHINE_PATH.search("https://example.org/home/page")


def test_the_readme_and_the_continuous_integration_set_up_in_the_same_way():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert SET_UP_AND_RUN in readme
    assert SET_UP_AND_TEST in readme
    assert SET_UP_AND_TEST in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


# --- the built package


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(tmp_path):
    copy = tmp_path / "copy"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            continue  # as on a file system without links
        target.write_bytes(source.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("hybridsim-*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")]
    files = [file.relative_to(copy) for room in ("hybridsim", *ROOMS) for file in (copy / room).rglob("*") if file.is_file()]
    assert sorted(names) == sorted(("" if file.parts[0] == "hybridsim" else "hybridsim/") + file.as_posix() for file in files)
