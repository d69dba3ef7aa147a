"""`hybridsim new closure NAME`: a closure of one's own, an experiment that trains it, and a test, to start from."""

import contextlib
import importlib.util
import keyword
import re
import sys
from pathlib import Path
from typing import NamedTuple

from hybridsim.yaml_reader import ConfigError, parse_yaml, show_value, suggestion


class _Start(NamedTuple):
    """What the files say of a place."""

    base: str
    formula: str
    what: str
    law: str


PLACES: dict[str, _Start] = {
    "flux": _Start(
        "Flux",
        "∂t u_c += −Σ_a ∂_a F[a, c],  F = net(u)",
        "a learned flux of every channel along every axis",
        "The sum of every channel is conserved to rounding, whatever the weights.",
    ),
    "source": _Start(
        "Source",
        "∂t u_c += s[c],  s = net(u)",
        "a learned force on every channel",
        "No sum is conserved.",
    ),
    "interpolation": _Start(
        "Interpolation",
        "w = w_scheme + Z a,  a = ¼ tanh(net(u))",
        "learned weights of the values at the faces",
        "The solver's order and its conserved sums stay, whatever the weights.",
    ),
    "post_step": _Start(
        "PostStep",
        "u ← P(u + Δt net(u))",
        "a learned correction of the state after each step",
        "No sum is conserved.",
    ),
    "replacement": _Start(
        "Replacement",
        "u ← P(u + Δt net(u))",
        "a network that takes the whole step, without a solver",
        "No sum is conserved, and untrained nothing moves.",
    ),
}
"""`--place`: where a closure enters the solver; see `hybridsim.contract`."""

_FILES = {"{}.py": "closure.py.j2", "{}.yaml": "closure.yaml.j2", "test_{}.py": "test_closure.py.j2"}
"""File to write, and its template."""

_HERE = Path(__file__).parent
_TAKEN = ("all", "bare", "reference")
"""Labels of runs with a meaning of their own, here or in every experiment."""


def names_of(name: str) -> tuple[str, str]:
    """(file and label, class) of a name in either spelling; `ConfigError` where it would collide with something.

    >>> names_of("SubgridStress"), names_of("subgrid_stress")
    (('subgrid_stress', 'SubgridStress'), ('subgrid_stress', 'SubgridStress'))
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name):
        raise ConfigError(
            f"NAME: found {show_value(name)}; a name has up to 40 letters, digits and underscores, and starts with a letter"
        )
    module = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name).lower()
    cls = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    taken = {
        "a word of Python": keyword.iskeyword(module) or keyword.iskeyword(cls),
        "a module of Python": module in sys.stdlib_module_names,
        "a module of hybridsim": any(path.stem == module for path in (_HERE, *_HERE.glob("*.py"), *_HERE.glob("*/*.py"))),
        "a name that the closure's file imports": cls in ("CNN", *(start.base for start in PLACES.values())),
        "a label that experiments use otherwise": module in _TAKEN,
        "a name by which pytest finds tests": module.startswith("test_") or module.endswith("_test"),
    }
    for what, clash in taken.items():
        if clash:
            raise ConfigError(f"NAME: {module!r} is {what}; choose another name")
    with contextlib.suppress(ConfigError):
        if parse_yaml(module) == module:
            return module, cls
    raise ConfigError(f"NAME: {module!r} is a word that YAML reads otherwise; choose another name")


def write_closure(name: str, place: str, folder: Path) -> list[str]:
    """Write `name.py`, `name.yaml` and `test_name.py` to the folder, over nothing; what to say of it, line by line."""
    if place not in PLACES:
        raise ConfigError(f"--place: there is no place {show_value(place)}; {suggestion(place, PLACES, 'there are')}")
    module, cls = names_of(name)
    targets = {folder / written.format(module): template for written, template in _FILES.items()}
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"--out: {parent} is a file; choose another folder")
    for target in targets:
        if target.exists() or target.is_symlink():
            raise ConfigError(f"{target}: this file exists, and nothing is written over it; choose another NAME or --out")
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f"NAME: {module!r} is a module that Python finds already; choose another name")
    import jinja2

    from hybridsim.storage import atomic_write

    # the files are Python and YAML, where nothing is to be escaped
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("hybridsim", "templates"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    said = {"name": module, "cls": cls, "place": place, **PLACES[place]._asdict()}
    for target, template in targets.items():
        atomic_write(target, environment.get_template(template).render(said))
    said_of = {
        f"hybridsim check {module}.py:{cls} --quick": "does it keep the contract?",
        f"hybridsim train {module}.yaml": "a minute or two",
        f"python -m pytest test_{module}.py": "the contract as a test, for continuous integration",
        f"hybridsim run {module}.yaml 'runs.{module}.corrections[0].weights=runs/{module}/{module}.safetensors'": "",
    }
    width = max(len(command) for command, why in said_of.items() if why)
    lines = [f"wrote {', '.join(map(str, targets))}", "next:"]
    if folder.resolve() != Path.cwd():
        lines.append(f"  cd {folder}")
    return lines + [f"  {command:<{width}}  # {why}" if why else f"  {command}" for command, why in said_of.items()]
