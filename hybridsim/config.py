"""YAML → objects: every message names the key path, what was found, what is possible and the nearest match.

Three passes: `yaml_reader` turns text into plain values, `sections` checks the keys that are fixed, and here the classes that
`use:` names check the rest against their own annotations. Then every object of every run is built once, as shapes, so that nothing
is compiled before all is known to fit. No code stands in strings; a `use: file.py:Class` imports that file.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, create_model

from hybridsim.sections import Correction, Flag, Number, Reference, Run, Spec, Structure, Sweep, Train, Use, argument_names, explain
from hybridsim.storage import GIB, config_digest
from hybridsim.yaml_reader import (
    MOST_BYTES,
    ConfigError,
    KeyPath,
    first_line,
    key_path,
    nearest,
    one_of,
    parse_yaml,
    show_value,
    suggestion,
)

if TYPE_CHECKING:
    from hybridsim.contract import AbstractClosure, AbstractSolver, AbstractStepper
    from hybridsim.grid import Grid
    from hybridsim.model import Model

# --- constructors ----------------------------------------------------------------------------------------------------------------

_HIDDEN = object()
FROM_RUN = ("dims", "free_weights", "grid", "key", "variables")
"""Arguments of closures that the run supplies: they are not written in YAML."""
_TABLES = {
    "forcing": ("hybridsim.solvers", "FORCINGS"),
    "boundary_state": ("hybridsim.solvers", "BOUNDARY_STATES"),
    "boundary_velocity": ("hybridsim.solvers", "BOUNDARY_VELOCITIES"),
    "cooling": ("hybridsim.solvers", "COOLING"),
    "network": ("hybridsim.corrections", "NETWORKS"),
}
"""Arguments that are objects themselves, where YAML could not write them otherwise: their table of short names."""

_MAPPINGS = ("boundary_state", "boundary_velocity")
"""Those of them that map names to such objects."""

FROM_CLOSURE = ("channels_in", "channels_out", "dims", "key")
"""Arguments of networks that the closure supplies."""

_FACTORIES = {"network": FROM_CLOSURE}
"""Those of them that whoever takes them makes: it gets a function of these arguments, not the object."""


def _yaml_annotation(annotation: Any) -> Any:
    """What YAML can write for a constructor's annotation, strictly; `_HIDDEN` if nothing."""
    import jax

    strict = {float: Number, int: Annotated[int, Strict()], bool: Flag, str: Annotated[str, Strict()], None: None, type(None): None}
    if annotation is inspect.Parameter.empty or annotation is Any:
        return Any
    try:
        if annotation in strict:
            return strict[annotation]
    except TypeError:
        return _HIDDEN
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _yaml_annotation(args[0])
    if origin is Literal:
        return annotation
    if origin in (typing.Union, types.UnionType):
        members = [m for a in args if (m := _yaml_annotation(a)) is not _HIDDEN]
        real = [m for m in members if m is not None]
        return typing.Union[tuple(members)] if real else _HIDDEN  # noqa: UP007
    if origin in (dict, Mapping) and args[0] is str:
        inner = _yaml_annotation(args[1])
        return _HIDDEN if inner is _HIDDEN else dict[str, inner]
    if origin in (list, tuple, Sequence):
        inner = [_yaml_annotation(a) for a in args if a is not Ellipsis]
        if _HIDDEN in inner or not inner:
            return _HIDDEN
        return tuple[tuple(inner)] if origin is tuple and Ellipsis not in args else tuple[inner[0], ...]  # pyright: ignore
    dtypes = getattr(annotation, "dtypes", None)
    if dtypes is not None and getattr(annotation, "dim_str", None) == "" and isinstance(dtypes, tuple | list):
        # a jaxtyping scalar is a number
        return Number if any("float" in str(d) for d in dtypes) else Annotated[int, Strict()]
    if annotation is jax.Array:
        return _HIDDEN
    return _HIDDEN


class Constructor(NamedTuple):
    """What a class takes: the arguments YAML may write, and those that the configuration supplies itself."""

    cls: type
    model: type[BaseModel]
    supplied: frozenset[str]
    nested: frozenset[str]
    unwritable: frozenset[str]

    @property
    def names(self) -> list[str]:
        return [*argument_names(self.model), *sorted(self.nested)]


@functools.cache
def constructor_of(cls: type, supplied: frozenset[str]) -> Constructor:
    """The constructor's own signature as a pydantic model with strict types."""
    signature = inspect.signature(cls)
    hints: dict[str, Any] = {}
    # a converter without annotations hides the annotation of its field from the constructor, so both are asked
    for source in (cls, cls.__init__):
        with contextlib.suppress(NameError, TypeError):
            found = typing.get_type_hints(source, include_extras=True)
            hints.update({name: hint for name, hint in found.items() if hint is not Any})
    fields: dict[str, Any] = {}
    taken, nested, unwritable = set(), set(), set()
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in supplied:
            taken.add(name)
            continue
        annotation = _yaml_annotation(hints.get(name, parameter.annotation if not isinstance(parameter.annotation, str) else Any))
        if name in _TABLES and annotation in (_HIDDEN, Any):
            nested.add(name)
            continue
        required = parameter.default is parameter.empty
        if annotation is _HIDDEN:
            if required:
                unwritable.add(name)
            continue
        if _from_factory(parameter):
            info = Field(default_factory=lambda: None, alias=name)
        else:
            info = Field(alias=name) if required else Field(default=parameter.default, alias=name)
        fields[f"argument_{len(fields)}"] = (annotation, info)
    model = create_model(cls.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    return Constructor(cls, model, frozenset(taken), frozenset(nested), frozenset(unwritable))


def _from_factory(parameter: inspect.Parameter) -> bool:
    """Whether the default is made anew for each object (a dict, say): then the constructor is left to make it."""
    return type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"


def _plain(value: Any) -> Any:
    """A value as JSON has it; `_HIDDEN` where JSON has nothing."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _HIDDEN
    if isinstance(value, list | tuple):
        out = [_plain(v) for v in value]
        return _HIDDEN if _HIDDEN in out else out
    if isinstance(value, dict):
        plain = {str(k): _plain(v) for k, v in value.items()}
        return _HIDDEN if _HIDDEN in plain.values() else plain
    return _HIDDEN


class Part:
    """A class chosen by `use:` with checked arguments: `build` makes the object, `resolved` is its YAML.

    `nested` holds the arguments that are such parts themselves; of a network the object gets `build`, to call it with
    `FROM_CLOSURE`.
    """

    def __init__(
        self,
        use: str,
        constructor: Constructor,
        arguments: dict[str, Any],
        nested: "dict[str, Part | dict[str, Part] | None]",
        path: KeyPath,
        origin: "Origin | None" = None,
    ):
        self.use, self.constructor, self.arguments, self.nested, self.path = use, constructor, arguments, nested, path
        self.origin = origin

    @property
    def cls(self) -> type:
        return self.constructor.cls

    @property
    def resolved(self) -> dict[str, Any]:
        plain = {name: v for name, value in self.arguments.items() if (v := _plain(value)) is not _HIDDEN}
        return {"use": self.use, **plain, **{n: _each(part, lambda p: p.resolved) for n, part in self.nested.items()}}

    def parts(self) -> "Iterator[Part]":
        """This part, and those inside it."""
        yield self
        for part in self.nested.values():
            for inner in part.values() if isinstance(part, dict) else () if part is None else (part,):
                yield from inner.parts()

    def build(self, **supplied: Any) -> Any:
        """The object; its own refusals (`field: sentence`) carry the key path."""
        chosen = {name: value for name, value in supplied.items() if name in self.constructor.supplied}
        inner = {n: _each(part, lambda p, n=n: p.build if n in _FACTORIES else p.build()) for n, part in self.nested.items()}
        try:
            return self.cls(**self.arguments, **inner, **chosen)
        except ValueError as error:
            raise ConfigError(prefixed(self.path, error, {"grid": (*self.path[:-1], "shape")})) from error
        except ConfigError:
            raise
        except dataclasses.FrozenInstanceError as error:
            name = first_line(error).split("'")[1:2]
            raise ConfigError(
                f"{key_path(self.path)}: {self.cls.__name__} cannot be built: {first_line(error)}; declare "
                f"{name[0] + ': Array' if name else 'it'} in the body of the class"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"{key_path(self.path)}: {self.cls.__name__} cannot be built: {first_line(error)}{_raised_at(error)}"
            ) from error


def _each(part: "Part | dict[str, Part] | None", of: Callable[[Part], Any]) -> Any:
    """`of` a part, or of every part of a mapping of them."""
    return {name: of(p) for name, p in part.items()} if isinstance(part, dict) else None if part is None else of(part)


def _raised_at(error: BaseException) -> str:
    trace = error.__traceback__
    last = None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return f" ({Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno})" if last is not None else ""


def blank(build: Callable[[], Any], where: Callable[[], str] = lambda: "corrections") -> Any:
    """What `build` makes, with zeros for its floating-point arrays: drawing random ones takes seconds to compile.

    What does not fit into this machine is refused by the key that `where` names.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    try:
        shapes = eqx.filter_eval_shape(build)
    except (ConfigError, jax.errors.JAXTypeError) as error:
        if isinstance(error, ConfigError) and not isinstance(error.__cause__, jax.errors.JAXTypeError):
            raise
        # a constructor that looks at its own random numbers cannot be traced
        return build()
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if isinstance(leaf, jax.ShapeDtypeStruct)]
    needed, memory = sum(float(math.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves), machine_memory()
    if needed > memory:
        raise ConfigError(
            f"{where()} makes {needed / GIB:.3g} GiB of weights, and this machine has {memory / GIB:.3g} GiB; choose less"
        )
    if not all(jnp.issubdtype(leaf.dtype, np.inexact) for leaf in leaves):
        return build()
    fill = lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf  # noqa: E731
    return jax.tree.map(fill, shapes)


_FIELD = re.compile(r"(?P<field>[a-z_][a-z0-9_]*(?:\[\d+\])?(?:\.[a-z_]\w*(?:\[\d+\])?)*): (?P<sentence>.*)\Z", re.DOTALL)


def prefixed(path: KeyPath, error: BaseException, moved: Mapping[str, KeyPath] | None = None) -> str:
    """An object's own sentence, `field: …`, behind the key path of the object."""
    text = first_line(error)
    if match := _FIELD.match(text):
        field = match["field"]
        if field.partition(".")[0] in ("equation", "domain") and "." in field:
            return text
        if moved and field in moved:
            return f"{key_path(moved[field])}: {match['sentence']}"
        return f"{key_path(path)}.{field}: {match['sentence']}"
    return f"{key_path(path)}: {text}"


# --- finding what `use:` names ---------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where a class comes from: the class, and the user's file and its digest if it is one."""

    cls: type
    file: Path | None = None
    digest: str | None = None


def find_file(name: str, folders: Sequence[Path], where: str, what: str) -> Path:
    """`name` below one of the folders; never outside them."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise ConfigError(
            f"{where}: {what} {show_value(name)} lies outside the experiment's folder; copy it there and name it relatively"
        )
    for folder in folders:
        if (folder / relative).is_file():
            return folder / relative
    near = [
        p.relative_to(f).as_posix()
        for f in folders
        for p in sorted((f / relative).parent.glob(f"*{relative.suffix}"))
        if p.is_file()
    ]
    match = nearest(name, near)
    hint = f"did you mean {match!r}?" if match else f"it should lie in {folders[-1]}"
    raise ConfigError(f"{where}: there is no {what} {show_value(name)}; {hint}")


def load_file(path: Path, where: str = "") -> tuple[types.ModuleType, str]:
    """A user's Python file as a module, and its digest; the same content is imported once."""
    where = where and where + ": "
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}{path.name} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()
    mark = hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:12]
    name = "_".join(["hybridsim_user", re.sub(r"\W", "_", path.stem), mark])
    if name in sys.modules:
        return sys.modules[name], digest
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        raise ConfigError(f"{where}{path.name} line {error.lineno}: this is not valid Python: {error.msg}") from None
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{where}{path.name} cannot be imported: {type(error).__name__}: {first_line(error)}{_raised_at(error)}"
        ) from error
    finally:
        sys.dont_write_bytecode = writes
    return module, digest


def _class_in(module: types.ModuleType, name: str, where: str, what: str, kind: str = "") -> type:
    import equinox as eqx

    found = getattr(module, name, None)
    classes = [
        n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, eqx.Module) and v.__module__ == module.__name__
    ]
    if found is None:
        raise ConfigError(f"{where}: {what} has no class {name!r}; {suggestion(name, classes, 'it has')}")
    if not isinstance(found, type) or not issubclass(found, eqx.Module):
        derive = f"a {kind} {_origin(kind)}" if kind in _bases() else suggestion(name, classes, "its modules")
        raise ConfigError(f"{where}: {name!r} in {what} is not an equinox Module; {derive}")
    return found


def _bases() -> dict[str, type]:
    """The kinds that have a base class of their own."""
    from hybridsim import contract

    return {"closure": contract.AbstractClosure, "solver": contract.AbstractSolver, "stepper": contract.AbstractStepper}


def _origin(kind: str) -> str:
    """What a class of a kind with a base of its own derives from."""
    from hybridsim.contract import PLACES

    if kind == "closure":
        return f"derives from one of {', '.join(p.__name__ for p in PLACES)}"
    return f"derives from {_bases()[kind].__name__}"


def find_class(use: str, table: Mapping[str, str], kind: str, where: str, folders: Sequence[Path], tables: str = "") -> Origin:
    """The class that `use` names: a short name of the table, `file.py:Class` or `package.module:Class`."""
    origin = Origin(type)
    if ":" not in use:
        if use not in table:
            raise ConfigError(
                f"{where}: there is no {kind} {show_value(use)}; {suggestion(use, table, 'there are')}"
                + ("" if nearest(use, table) else "; your own is file.py:Class")
            )
        module_name, _, name = table[use].partition(":")
        origin = Origin(_class_in(importlib.import_module(module_name), name, where, module_name))
    else:
        module_name, _, name = use.rpartition(":")
        if not name.isidentifier():
            raise ConfigError(f"{where}: found {show_value(use)}; write file.py:Class or package.module:Class")
        if module_name.endswith(".py"):
            file = find_file(module_name, folders, where, "file")
            module, digest = load_file(file, where)
            origin = Origin(_class_in(module, name, where, file.name, kind), file, digest)
        else:
            if not all(part.isidentifier() for part in module_name.split(".")):
                raise ConfigError(f"{where}: found {show_value(use)}; write file.py:Class or package.module:Class")
            try:
                module = importlib.import_module(module_name)
            except ImportError as error:
                raise ConfigError(f"{where}: the module {module_name!r} cannot be imported: {first_line(error)}") from None
            origin = Origin(_class_in(module, name, where, module_name, kind))
    check_kind(origin.cls, kind, where)
    return origin


def check_kind(cls: type, kind: str, where: str) -> type:
    """The class, if it is of that kind, and complete; `ConfigError` if not."""
    from hybridsim.contract import PLACES

    base = _bases().get(kind)
    if base is not None and not issubclass(cls, base):
        raise ConfigError(f"{where}: {cls.__name__} is no {kind}; a {kind} {_origin(kind)}")
    others = [name for name, other in _bases().items() if name != kind and issubclass(cls, other)]
    if others:
        raise ConfigError(f"{where}: {cls.__name__} is a {others[0]}, not {'an' if kind[0] in 'aeiou' else 'a'} {kind}")
    if inspect.isabstract(cls):
        raise ConfigError(f"{where}: {cls.__name__} is abstract; it does not define {one_of(sorted(cls.__abstractmethods__))}")
    if kind == "closure":
        found = [p.__name__ for p in PLACES if issubclass(cls, p)]
        if len(found) != 1:
            places = ", ".join(p.__name__ for p in PLACES)
            raise ConfigError(f"{where}: {cls.__name__} must derive from exactly one place ({places}), found {one_of(found)}")
    return cls


def load_class(target: str) -> type:
    """The class behind `module:name`, as the tables write it."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def timings(name: str) -> Any:
    """A module of timings among the experiments: `peers`."""
    return importlib.import_module(f"hybridsim.experiments.{name}")


def catalogue(kind: str) -> dict[str, str]:
    """The literal table of one kind: `steppers`, `equations`, `forcings`, `cooling`, `boundary_states`, `boundary_velocities`,
    `initial`, `closures` or `networks`."""
    if kind in ("closures", "networks"):
        return getattr(importlib.import_module("hybridsim.corrections"), kind.upper())
    return getattr(importlib.import_module("hybridsim.solvers"), kind.upper())


def solver_tables() -> dict[str, dict[str, dict[int, str]]]:
    """Equation → solver → number of space dimensions → class."""
    return importlib.import_module("hybridsim.solvers").SOLVERS


def shipped_experiments() -> dict[str, Path]:
    """Name → file of every experiment that comes with the package."""
    folder = Path(__file__).parent / "experiments"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_benches() -> dict[str, Path]:
    """Name → file of every benchmark that comes with the package."""
    folder = Path(__file__).parent / "experiments" / "benchmarks"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_weights() -> dict[str, Path]:
    """Name → file of all weights that come with the package."""
    folder = Path(__file__).parent / "corrections" / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


# --- memory ----------------------------------------------------------------------------------------------------------------------

WORK_ARRAYS = 8
"""Arrays of the size of one channel that a step keeps beside its stages, roughly."""


def machine_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or the control group's where that is less."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return math.inf
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, float(limit))
    return total


def estimate_memory(shape: Sequence[int], channels: int, precision: str, samples: int, stages: int = 4) -> float:
    """Bytes that stepping takes: state, stages and work arrays per channel, for all samples at once."""
    return float(math.prod(shape)) * channels * (8 if precision == "float64" else 4) * samples * (stages + WORK_ARRAYS)


# --- experiment ------------------------------------------------------------------------------------------------------------------

MOST_STEPS = 10**9
RESERVED = ("all", "reference", "begun.json", "manifest", "summary", "training")
"""Words that no run may be called: the key of `checks`, and files that every folder of results has."""


def _untrained(spec: Spec) -> Spec:
    """The same experiment without weights: training is about to make them."""
    runs = {}
    for label, run in spec.runs.items():
        corrections = [c.model_copy(update={"weights": None}) for c in run.corrections]
        runs[label] = run.model_copy(update={"corrections": corrections})
    return spec.model_copy(update={"runs": runs})


class Steps(NamedTuple):
    """How a run lands on its frames: `steps` model steps of `dt · substeps` per frame."""

    steps: int
    dt: float


class Case(NamedTuple):
    """One case of a sweep: its name (a folder's), the same in words, the run that is ranked, axis -> choice in words, key path ->
    value, and the experiment of that run alone."""

    name: str
    title: str
    run: str
    values: dict[str, str]
    changes: dict[str, Any]
    experiment: "Experiment"


MOST_CASES = 1000
"""No sweep has more cases."""


def _word(value: Any) -> str:
    """A value of a sweep in a few characters."""
    if isinstance(value, Mapping):
        rest = [f"{k} {_word(v)}" for k, v in value.items() if k != "use"]
        return " ".join([*([str(value["use"])] if "use" in value else []), *rest])
    if isinstance(value, list | tuple):
        return "×".join(_word(v) for v in value) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


class Experiment:
    """A checked experiment: what the YAML says, and how to build each of its objects.

    - `name`, `title`: of the folder, of the report.
    - `path`, `folder`: the YAML, and where its relative paths start.
    - `spec`: the fixed sections, as pydantic models.
    - `resolved`: plain values with every default filled in; a YAML of it loads to the same experiment.
    - `plain`: what was given, without defaults; cases of a sweep are changes of this, so that a choice of another class does not
      inherit the defaults of the first. None for an experiment that was not made of plain values.
    - `cases`: those of the sweep.
    - `files`: digest of every file that the experiment uses (closures, weights).
    - `config_hash`: SHA-256 of `resolved` and `files` as canonical JSON.
    """

    def __init__(
        self, spec: Spec, path: Path, shipped: bool = False, for_training: bool = False, data: Mapping[str, Any] | None = None
    ):
        spec = _untrained(spec) if for_training else spec
        self.spec = spec
        self.path = path
        self.folder = path.parent
        self.folders = [self.folder, Path.cwd()] if shipped else [self.folder]
        self.name = spec.name or path.stem
        self.title = spec.title or self.name.replace("_", " ")
        self.files: dict[str, str] = {}
        self.origins: dict[str, Origin] = {}
        self._parts: dict[KeyPath, Part] = {}
        self._structures: dict[KeyPath, Structure] = {}
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", self.name):
            raise ConfigError(f"name: {show_value(self.name)} cannot name a folder; give the experiment a plain `name:`")
        self._check_sections()
        self._find_parts()
        self._check_objects()
        self.resolved = self._resolve()
        self.config_hash = config_digest(self.resolved, self.files)
        self.variants = [] if spec.train is None else self._variants(spec.train, shipped)
        self.plain = None if data is None else copy.deepcopy(dict(data))
        self._shipped = shipped
        self.cases = [] if spec.sweep is None else self._cases(spec.sweep, for_training)

    def _cases(self, sweep: Sweep, for_training: bool) -> "list[Case]":
        """Every combination of the choices of `sweep.over`, reduced to the run that is ranked."""
        label = sweep.run or (self.spec.train.run if self.spec.train is not None else None)
        if label is None:
            raise ConfigError(f"sweep.run: name the run that is ranked; there are {', '.join(self.labels)}")
        if label not in self.labels:
            raise ConfigError(f"sweep.run: there is no run {label!r}; {suggestion(label, self.labels, 'there are')}")
        if for_training and self.spec.train is not None and label != self.spec.train.run:
            raise ConfigError(f"sweep.run: training ranks the run that it trains, {self.spec.train.run!r}; found {label!r}")
        for i, other in enumerate(sweep.beside):
            if other not in self.labels or other == label:
                at = key_path(("sweep", "beside", i))
                raise ConfigError(f"{at}: {other!r} is no other run; {suggestion(other, set(self.labels) - {label}, 'there are')}")
        if self.plain is None:
            raise ConfigError("sweep: an experiment with a sweep has to come from a file or from plain values")
        axes: list[list[tuple[str, str, dict[str, Any]]]] = []
        lasts = [key.rpartition(".")[2] for key in sweep.over]
        for axis, given in sweep.over.items():
            if isinstance(given, list):
                last = axis.rpartition(".")[2]
                shown = last if lasts.count(last) == 1 else axis
                choices = [(shown, _word(value), {axis: value}) for value in given]
            else:
                choices = [(axis, name, changes) for name, changes in given.items()]
            if not choices:
                raise ConfigError(f"{key_path(('sweep', 'over', axis))}: there is nothing to choose from; give at least one value")
            axes.append(choices)
        count = math.prod(len(choices) for choices in axes)
        if count > MOST_CASES:
            raise ConfigError(f"sweep.over: {count} cases are more than {MOST_CASES}; split the sweep")
        found: dict[str, Case] = {}
        for chosen in itertools.product(*axes):
            values = {axis: word for axis, word, _ in chosen}
            changes = {key: value for _, _, several in chosen for key, value in several.items()}
            # a number says little without its key
            words = [
                word if axis in sweep.over and isinstance(sweep.over[axis], dict) else f"{axis} {word}" for axis, word, _ in chosen
            ]
            name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_.") for word in words)
            name = name if 0 < len(name) <= 60 else f"case_{len(found) + 1}"
            if name.lower() in found:
                raise ConfigError(
                    f"sweep.over: two cases are called {name}; write the choices as name: {{key: value}} to tell them apart"
                )
            try:
                experiment = self._changed([label, *sweep.beside], changes, for_training)
            except ConfigError as error:
                raise ConfigError(f"sweep, case {name}: {error}") from None
            found[name.lower()] = Case(name, ", ".join(words), label, values, changes, experiment)
        return list(found.values())

    def _changed(self, labels: Sequence[str], changes: Mapping[str, Any], for_training: bool) -> "Experiment":
        """The experiment with some of its runs and some other values; judged on the modes of the whole one."""
        data = copy.deepcopy(self.plain or {})
        data.pop("sweep", None)
        data["runs"] = {label: data["runs"][label] for label in labels}
        data["checks"], data["name"] = {}, self.name
        if (data.get("train") or {}).get("run") not in labels:
            data.pop("train", None)
        for key, value in changes.items():
            set_key(data, key_path_of(key), copy.deepcopy(value))
        spec = _spec_of(data)
        for run in data["runs"].values():
            run["may_diverge"] = True
        if "compare.modes" not in changes:
            coarsest = min(min(run.shape) for run in spec.runs.values())
            data["compare"] = {**spec.compare.model_dump(), "modes": max(1, min(self.modes, coarsest // 2 - 1))}
        return experiment_from(data, self.path, self._shipped, for_training)

    def without_sweep(self) -> "Experiment | None":
        """The runs that no case holds, as an experiment; None where there are none."""
        others = [label for label in self.labels if self.cases and label not in self.cases[0].experiment.labels]
        return self._changed(others, {}, False) if others else None

    def _variants(self, train: Train, shipped: bool) -> "list[Experiment]":
        """The experiment once for each of `train.variants`, reduced to the run that is trained."""
        found = []
        for i, changes in enumerate(train.variants):
            where = key_path(("train", "variants", i))
            data = copy.deepcopy(self.resolved)
            data["runs"] = {train.run: data["runs"][train.run]}
            data["checks"], data["train"]["variants"] = {}, []
            data["name"] = self.name
            try:
                for key, value in changes.items():
                    set_key(data, key_path_of(key), value)
                if "compare.modes" not in changes:
                    coarsest = min(data["runs"][train.run]["shape"])
                    data["compare"]["modes"] = max(1, min(self.modes, coarsest // 2 - 1))
                found.append(experiment_from(data, self.path, shipped, for_training=True))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        return found

    # -- labels and numbers -------------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.spec.runs)

    def spec_of(self, label: str) -> Run | Reference:
        """The section of a run, or of the reference."""
        if label == "reference":
            return self.spec.reference
        if label not in self.spec.runs:
            raise ConfigError(f"runs: there is no run {label!r}; {suggestion(label, self.spec.runs, 'there are')}")
        return self.spec.runs[label]

    def _path(self, label: str) -> KeyPath:
        return ("reference",) if label == "reference" else ("runs", label)

    @property
    def statistics_from(self) -> float:
        given = self.spec.time.statistics_from
        return 0.5 * self.spec.time.end if given is None else given

    @property
    def modes(self) -> int:
        """compare.modes, or half the coarsest N minus 1."""
        given = self.spec.compare.modes
        return self._most_modes() if given is None else given

    def _most_modes(self) -> int:
        return max(1, min(min(r.shape) for r in self.spec.runs.values()) // 2 - 1)

    def cfl(self, label: str) -> float | None:
        """The fraction of the stable time step where it decides: no dt is given, or the run is adaptive."""
        spec = self.spec_of(label)
        given = spec.dt is not None and not self.adaptive(label)
        return None if given else 0.5 if spec.cfl is None else spec.cfl

    def adaptive(self, label: str) -> bool:
        """Whether the run chooses its time step anew as the flow changes."""
        return bool(getattr(self.spec_of(label), "adaptive", False))

    def dtype(self, label: str) -> str:
        return self.spec_of(label).precision

    def steps_per_frame(self, label: str, dt: float | None = None) -> Steps:
        """Model steps per frame, and the time step at or below `dt` (default: the run's own) that lands on the frames."""
        spec = self.spec_of(label)
        dt = spec.dt if dt is None else dt
        if dt is None:
            raise ConfigError(f"{key_path(self._path(label))}.dt: this run has a cfl, so its time step is known once it starts")
        substeps = getattr(spec, "substeps", 1)
        where, end, frames = key_path(self._path(label)), self.spec.time.end, self.spec.time.frames
        if not 0 < dt <= end:
            raise ConfigError(f"{where}.dt: needs a number > 0 and ≤ time.end = {end:g}, found {dt:g}")
        interval = end / frames
        wanted = interval / (dt * substeps)
        total = max(wanted, 1.0) * substeps * frames
        if not total < MOST_STEPS:
            culprit = "substeps" if wanted < 1 else "dt"
            found = substeps if wanted < 1 else dt
            limit = f"at most {MOST_STEPS:.0e} are possible"
            raise ConfigError(f"{where}.{culprit}: {found:g} makes {total:.3g} steps to reach time.end = {end:g}; {limit}")
        # 0.0333333 means a third of 0.1: what lands within a ten-thousandth is taken as meant.
        steps = max(1, math.ceil(wanted * (1 - 1e-4)))
        return Steps(steps, interval / (steps * substeps))

    def shortened(self, label: str, dt: float) -> str:
        """A clause for the reader where a run steps by less than its YAML says, so that its steps land on the frames; else ""."""
        asked = None if self.adaptive(label) else self.spec_of(label).dt
        # 0.0333333 means a third of 0.1.
        if asked is None or dt > asked * (1 - 1e-3):
            return ""
        interval = self.spec.time.end / self.spec.time.frames
        substeps = getattr(self.spec_of(label), "substeps", 1)
        how = f" in model steps of {substeps} solver steps" if substeps > 1 else ""
        return f"dt {asked:g} shortened to {dt:g}, to land{how} on frames {interval:g} apart (time.end / time.frames)"

    def memory(self, label: str) -> float:
        """Bytes that stepping this run takes, roughly."""
        spec = self.spec_of(label)
        stages = getattr(self.stepper(label), "stages", 4)
        return estimate_memory(spec.shape, len(self.solver(label).variables), spec.precision, self.spec.samples.count, stages)

    # -- checks -------------------------------------------------------------------------------------------------------------------

    def _check_sections(self) -> None:
        """What one section says against what another says; no class is needed for it."""
        spec = self.spec
        lengths, finest = spec.domain.lengths, spec.reference.shape
        if spec.domain.boundaries and len(spec.domain.boundaries) != len(lengths):
            raise ConfigError(
                f"domain.boundaries: found {len(spec.domain.boundaries)} entries, but domain.lengths has {len(lengths)}"
            )
        for axis, sides in enumerate(spec.domain.sides):
            if (sides[0] == "periodic") != (sides[1] == "periodic"):
                raise ConfigError(
                    f"domain.boundaries[{axis}]: an axis is periodic on both sides or on neither, found {show_value(list(sides))}"
                )
        for label in ("reference", *spec.runs):
            run = self.spec_of(label)
            at, shape = key_path(self._path(label)), show_value(run.shape)
            if len(run.shape) != len(lengths):
                raise ConfigError(f"{at}.shape: found {len(run.shape)} entries, but domain.lengths has {len(lengths)}")
            if run.dt is not None and run.cfl is not None and not self.adaptive(label):
                raise ConfigError(f"{at}: found both dt and cfl; remove one, or set adaptive: true, where dt is the largest step")
            self._check_memory(label, len(lengths))
            if any(n > m for n, m in zip(run.shape, finest, strict=False)):
                raise ConfigError(f"{at}.shape: {shape} is finer than reference.shape = {show_value(finest)}")
            if run.dt is not None:
                self.steps_per_frame(label)
        for label in RESERVED:
            if label in spec.runs:
                raise ConfigError(f"runs.{label}: {label!r} has a meaning of its own; choose another label")
        if len({name.lower() for name in spec.runs}) < len(spec.runs):
            raise ConfigError("runs: two labels differ in capitals only, and some file systems cannot tell them apart; rename one")
        start, end = self.statistics_from, spec.time.end
        if not start < end:
            raise ConfigError(f"time.statistics_from: {start:g} leaves nothing to average before time.end = {end:g}")
        for label in spec.checks:
            if label != "all" and label not in spec.runs:
                raise ConfigError(
                    f"checks.{label}: there is no run {label!r}; {suggestion(label, ['all', *spec.runs], 'there are')}"
                )
        if spec.train is not None:
            self._check_train(spec.train)

    def _check_train(self, train: Train) -> None:
        runs, phases = self.spec.runs, len(train.unroll)
        if train.run not in runs:
            raise ConfigError(f"train.run: there is no run {train.run!r}; {suggestion(train.run, runs, 'there are')}")
        if not runs[train.run].corrections:
            raise ConfigError(f"train.run: the run {train.run!r} has no corrections, so there is nothing to train")
        if len(train.updates) != phases:
            raise ConfigError(
                f"train.updates: found {len(train.updates)} phases, but train.unroll has {phases}; give one entry each"
            )
        if train.data.seed == self.spec.samples.seed:
            raise ConfigError(
                f"train.data.seed: {train.data.seed} is samples.seed too, so the closure would be tested on what it learnt from; "
                "choose another"
            )
        if len(set(train.seeds)) < len(train.seeds):
            raise ConfigError(f"train.seeds: found {show_value(train.seeds)}, and a seed given twice trains the same closure twice")
        self._check_training_memory(train)

    def _check_training_memory(self, train: Train) -> None:
        """Refuse data, and windows of them, that this machine cannot hold; their channels are at least as many as dimensions."""
        run, data, channels, memory = self.spec.runs[train.run], train.data, len(self.spec.domain.lengths), machine_memory()
        state = float(math.prod(run.shape)) * channels * (8 if run.precision == "float64" else 4)
        shape, together = data.shape or self.spec.reference.shape, min(data.together or data.trajectories, data.trajectories)
        held = data.trajectories if data.store == "memory" else together
        asked = {
            "data.trajectories": (state * held * (data.time / data.interval + 1), f"{held} trajectories of {data.time:g}"),
            "data.validation": (
                state * data.validation * (data.validation_time / data.interval + 1),
                f"{data.validation} trajectories of {data.validation_time:g}",
            ),
            "data.shape": (
                estimate_memory(shape, channels, data.precision, together),
                f"{together} fine runs of {show_value(shape)} at once",
            ),
            "batch": (
                state * train.batch * (max(train.unroll) + 1),
                f"windows of {max(train.unroll)} frames, {train.batch} of them",
            ),
        }
        for key, (needed, what) in asked.items():
            if needed > memory:
                raise ConfigError(
                    f"train.{key}: {what} take about {needed / GIB:.3g} GiB, and there are {memory / GIB:.3g} GiB; choose less"
                )

    def _check_memory(self, label: str, channels: int, stages: int = 4) -> None:
        """Refuse what this machine cannot hold, before anything is allocated."""
        run, samples, frames = self.spec_of(label), self.spec.samples.count, self.spec.time.frames
        where, memory = key_path(self._path(label)), machine_memory()
        advice = f"and this machine has {memory / GIB:.3g} GiB; choose a smaller shape or fewer"
        needed = estimate_memory(run.shape, channels, run.precision, samples, stages)
        if needed > memory:
            grid = f"{show_value(run.shape)} with {samples} samples in {run.precision}"
            raise ConfigError(f"{where}.shape: {grid} needs about {needed / GIB:.3g} GiB, {advice} samples")
        stored = needed / (stages + WORK_ARRAYS) * (frames + 1)
        if label != "reference" and stored > memory:
            raise ConfigError(f"time.frames: {frames} frames of {where} take about {stored / GIB:.3g} GiB, {advice} frames")

    def _part(
        self,
        use: Use,
        kind: str,
        table: Mapping[str, str],
        path: KeyPath,
        supplied: Iterable[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Part:
        """The class that `use` names, with its arguments checked."""
        origin = find_class(use.use, table, kind, key_path(path), self.folders)
        made = make_part(use.use, origin.cls, use.arguments, path, supplied, self.folders, defaults, origin)
        for part in made.parts():
            if part.origin is not None:
                self.origins[key_path(part.path)] = part.origin
                if (file := part.origin.file) is not None:
                    inside = file.is_relative_to(self.folder)
                    self.files[file.relative_to(self.folder).as_posix() if inside else file.name] = str(part.origin.digest)
        return made

    def _find_parts(self) -> None:
        spec = self.spec
        rooms = importlib.import_module("hybridsim.solvers")
        self._parts["equation",] = self._part(spec.equation, "equation", rooms.EQUATIONS, ("equation",))
        self._parts["initial",] = self._part(spec.initial, "initial state", rooms.INITIAL, ("initial",))
        for label in ("reference", *spec.runs):
            at, run = self._path(label), self.spec_of(label)
            self._parts[*at, "solver"] = self._solver_part(run.solver, (*at, "solver"))
            if run.stepper is not None:
                self._parts[*at, "stepper"] = self._part(run.stepper, "stepper", rooms.STEPPERS, (*at, "stepper"))
            for i, correction in enumerate(getattr(run, "corrections", ())):
                self._parts[*at, "corrections", i] = self._closure_part(correction, (*at, "corrections", i))

    def _solver_part(self, use: Use, path: KeyPath) -> Part:
        dims = len(self.spec.domain.lengths)
        families = self._solver_families()
        if ":" not in use.use:
            offered = {n: sorted(by_dims) for table in families for n, by_dims in table.items()}
            if use.use in offered and dims not in offered[use.use]:
                raise ConfigError(
                    f"{key_path(path)}: {use.use!r} of {self.spec.equation.use} takes {one_of(map(str, offered[use.use]))} space "
                    f"dimensions, but domain.lengths has {dims}"
                )
        table = {name: by_dims[dims] for table in families for name, by_dims in table.items() if dims in by_dims}
        return self._part(use, "solver", table, path, ("grid", "equation"))

    def _solver_families(self) -> list[dict[str, dict[int, str]]]:
        """The solvers of the equation; for one from outside the table, those of the equation that it derives from, or all."""
        tables = solver_tables()
        if self.spec.equation.use in tables:
            return [tables[self.spec.equation.use]]
        cls = self._parts["equation",].cls
        known = catalogue("equations")
        own = [tables[name] for name in tables if issubclass(cls, load_class(known[name]))]
        return own or list(tables.values())

    def _closure_part(self, correction: Correction, path: KeyPath) -> Part:
        table = importlib.import_module("hybridsim.corrections").CLOSURES
        header: dict[str, Any] = {} if correction.weights is None else self._header(correction, path)
        if (structure := self._structure(correction, header, (*path, "structure"))) is not None:
            self._structures[path] = structure
        return self._part(correction, "closure", table, path, FROM_RUN, header.get("arguments", {}))

    def _structure(self, correction: Correction, header: Mapping[str, Any], path: KeyPath) -> Structure | None:
        """What keeps a closure dissipative: as YAML says, or as its weights were trained."""
        given, trained = correction.structure, header.get("structure")
        if isinstance(given, str):
            given = Structure(form=given)
        if trained is None:
            return given
        try:
            known = Structure.model_validate(trained)
        except ValidationError as error:
            raise ConfigError(explain(error, Structure, trained, path)) from None
        if given not in (None, known):
            raise ConfigError(
                f"{key_path(path)}: found {show_value(given.model_dump())}, but the weights {correction.weights} were trained with "
                f"{show_value(known.model_dump())}; remove the key or choose other weights"
            )
        return known

    # -- weights ------------------------------------------------------------------------------------------------------------------

    def weights_file(self, correction: Correction, path: KeyPath) -> Path:
        """The file that `weights:` names: shipped, or relative to the YAML."""
        assert correction.weights is not None
        name, shipped = correction.weights, shipped_weights()
        if name in shipped:
            return shipped[name]
        where = key_path((*path, "weights"))
        if "/" not in name and not name.endswith(".safetensors"):
            hint = suggestion(name[:100], shipped, "there are")
            raise ConfigError(
                f"{where}: there are no shipped weights {show_value(name)}; {hint}; your own are a path to a .safetensors file"
            )
        return find_file(name, self.folders, where, "file")

    def _header(self, correction: Correction, path: KeyPath) -> dict[str, Any]:
        from hybridsim.storage import StorageError, read_header

        file = self.weights_file(correction, path)
        try:
            header = read_header(file)
        except StorageError as error:
            raise ConfigError(f"{key_path((*path, 'weights'))}: {first_line(error)}") from error
        self.files[file.name] = header["sha256"]
        made_for = header.get("closure")
        if made_for is not None and made_for != correction.use:
            where = key_path((*path, "weights"))
            raise ConfigError(f"{where}: the weights {correction.weights} belong to {made_for!r}, not to {correction.use!r}")
        arguments = header.get("arguments", {})
        for name, value in correction.arguments.items():
            if name in arguments and self._in_full(name, value, arguments[name], (*path, name)) != arguments[name]:
                raise ConfigError(
                    f"{key_path((*path, name))}: found {show_value(value)}, but the weights {correction.weights} were trained with "
                    f"{show_value(arguments[name])}; remove the key or choose other weights"
                )
        return header

    def _in_full(self, name: str, value: Any, trained: Any, path: KeyPath) -> Any:
        """An argument as weights files write it: with the defaults of what it names, where it is chosen by `use:`."""
        if name in _TABLES and isinstance(trained, Mapping) and isinstance(value, str | Mapping):
            return _nested_part(name, value, path, self.folders).resolved
        return _plain(value)

    # -- builders -----------------------------------------------------------------------------------------------------------------

    def equation(self) -> Any:
        return self._parts["equation",].build()

    def initial(self) -> Any:
        return self._parts["initial",].build()

    def grid(self, shape: Sequence[int], path: KeyPath = ("grid",)) -> "Grid":
        from hybridsim.grid import Grid

        try:
            return Grid(tuple(shape), tuple(self.spec.domain.lengths), tuple(self.spec.domain.sides))
        except ValueError as error:
            raise ConfigError(f"{key_path(path)}: {first_line(error)}") from error

    def solver_for(self, solver: Use | Mapping[str, Any] | str, shape: Sequence[int]) -> "AbstractSolver":
        """A solver of this experiment's equation that no run names, on a grid of `shape`."""
        use = solver if isinstance(solver, Use) else Use.model_validate(solver)
        return self._solver_part(use, ("solver",)).build(grid=self.grid(shape), equation=self.equation())

    def solver(self, label: str) -> "AbstractSolver":
        at = self._path(label)
        grid = self.grid(self.spec_of(label).shape, (*at, "shape"))
        return self._parts[*at, "solver"].build(grid=grid, equation=self.equation())

    def reference_solver(self) -> "AbstractSolver":
        return self.solver("reference")

    def stepper(self, label: str, solver: "AbstractSolver | None" = None) -> "AbstractStepper":
        """The run's stepper; by default the solver's own choice, else ETDRK4 where it has a linear part, else SSPRK3."""
        at = self._path(label)
        if (*at, "stepper") in self._parts:
            return self._parts[*at, "stepper"].build()
        return self._default_stepper(self.solver(label) if solver is None else solver, (*at, "stepper")).build()

    def _default_stepper(self, solver: "AbstractSolver", path: KeyPath) -> Part:
        name = solver.default_stepper or ("ssprk3" if solver.linear() is None else "etdrk4")
        return self._part(Use(use=name), "stepper", importlib.import_module("hybridsim.solvers").STEPPERS, path)

    def closures_for(
        self,
        label: str,
        solver: "AbstractSolver | None" = None,
        *,
        seed: int | None = None,
        weights: bool = True,
        random: bool = True,
        constants: bool = False,
    ) -> "tuple[AbstractClosure, ...]":
        """The closures of a run, in its precision, trained where `weights:` says so.

        `seed` replaces their own seeds, `weights=False` leaves them untrained; `random=False` puts zeros where the constructor
        would draw random numbers, for those who need their structure only. `constants` makes arrays of the constants of classical
        closures, which are trained then.
        """
        import equinox as eqx
        import jax

        from hybridsim.contract import with_constants
        from hybridsim.storage import StorageError, load_weights

        solver = self.solver(label) if solver is None else solver
        spec, closures = self.spec_of(label), []
        for i, correction in enumerate(getattr(spec, "corrections", ())):
            at = (*self._path(label), "corrections", i)

            def build(at: KeyPath = at, seed: int = correction.seed if seed is None else seed) -> Any:
                key = jax.random.key(seed)
                given = {"dims": solver.grid.ndim, "grid": solver.grid, "variables": solver.variables, "key": key}
                made = self._parts[at].build(**given, free_weights=solver.free_weights())
                return jax.tree.map(lambda a: a.astype(spec.precision) if eqx.is_inexact_array(a) else a, made)

            def largest(at: KeyPath = at) -> str:
                numbers = {k: v for k, v in self._parts[at].resolved.items() if type(v) is int}
                key = max(numbers, key=lambda k: numbers[k], default=None)
                return key_path(at) + ":" if key is None else f"{key_path((*at, key))}: {numbers[key]}"

            def within_structure(made: Any, at: KeyPath = at) -> Any:
                return made if at not in self._structures else self._structured(made, at)

            if weights and correction.weights is not None:
                # A structure may be put around weights that were trained without one.
                header = self._header(correction, at)
                trained = "structure" in header
                try:
                    like = (
                        with_constants(blank(build, largest), spec.precision) if header.get("constants") else blank(build, largest)
                    )
                    loaded = load_weights(self.weights_file(correction, at), within_structure(like) if trained else like)
                except StorageError as error:
                    raise ConfigError(f"{key_path((*at, 'weights'))}: {first_line(error)}") from error
                closures.append(loaded if trained else within_structure(loaded))
            else:
                made = build() if random else blank(build, largest)
                closures.append(within_structure(with_constants(made, spec.precision) if constants else made))
        return tuple(closures)

    def _structured(self, closure: "AbstractClosure", path: KeyPath) -> "AbstractClosure":
        """The closure within its structure."""
        structured = load_class(importlib.import_module("hybridsim.corrections").STRUCTURE)
        try:
            return structured(closure, **self._structures[path].model_dump())
        except ValueError as error:
            raise ConfigError(prefixed(path, error)) from error

    def weights_header(self, label: str, index: int = 0) -> dict[str, Any]:
        """What a weights file must say of the closure it belongs to, so that `weights:` alone is enough in YAML."""
        at = (*self._path(label), "corrections", index)
        resolved = self._parts[at].resolved
        header = {"closure": resolved.pop("use"), "arguments": resolved}
        return header if at not in self._structures else {**header, "structure": self._structures[at].model_dump()}

    def model_for(self, label: str, *, dt: float | None = None, closures: "Sequence[AbstractClosure] | None" = None) -> "Model":
        """The model of a run (or of the reference): solver, stepper, closures, and the dt that lands on the frames.

        A run with a cfl and no dt needs `dt`: take `steps_per_frame(label, cfl · stable_dt).dt`.
        """
        from hybridsim.model import Model

        at, spec = self._path(label), self.spec_of(label)
        solver = self.solver(label)
        stepper = self.stepper(label, solver)
        closures = self.closures_for(label, solver) if closures is None else tuple(closures)
        when = tuple(c.evaluate for c in getattr(spec, "corrections", ()))
        when = when[: len(closures)] if len(when) >= len(closures) else ("step",) * len(closures)
        dt = self.steps_per_frame(label).dt if dt is None else dt
        try:
            courant = self.cfl(label) if self.adaptive(label) else None
            return Model(solver, stepper, dt, closures, when, getattr(spec, "substeps", 1), courant)
        except (ValueError, TypeError) as error:
            raise ConfigError(prefixed(at, error)) from error

    def _check_duration(self, initial: Any) -> None:
        """Refuse what would never end, as far as it can be known where the time step follows from the flow."""
        speed, warm_up = getattr(initial, "max_speed", None), getattr(initial, "warm_up", 0.0)
        if not isinstance(warm_up, float):
            return
        if not isinstance(speed, float):
            if not warm_up < MOST_STEPS:
                raise ConfigError(
                    f"initial.warm_up: {warm_up:g} makes as many steps or more; at most {MOST_STEPS:.0e} are possible"
                )
            return
        for label in ("reference", *self.labels):
            spacing = min(x / n for x, n in zip(self.spec.domain.lengths, self.spec_of(label).shape, strict=True))
            dt = (self.cfl(label) or 0.5) * spacing / speed
            times = {"time.end": self.spec.time.end} if self.cfl(label) else {}
            for key, length in {**times, "initial.warm_up": warm_up if label == "reference" else 0.0}.items():
                if not length < MOST_STEPS * dt:
                    raise ConfigError(
                        f"{key}: {length:g} makes about {length / dt:.3g} steps of {key_path(self._path(label))}; at most "
                        f"{MOST_STEPS:.0e} are possible"
                    )

    def _check_objects(self) -> None:
        """Build every object of every run; nothing is compiled. Numbers that overflow on the way make no experiment."""
        import numpy as np

        self._check_duration(self.initial())
        for label in ("reference", *self.labels):
            try:
                with np.errstate(over="raise"):
                    self._check_run(label)
            except ConfigError:
                raise
            except Exception as error:
                # classes of the user's own that do not fit together
                parts = f"{self._parts['equation',].cls.__name__} and {self._parts[*self._path(label), 'solver'].cls.__name__}"
                where = key_path(self._path(label))
                raise ConfigError(f"{where}: {parts} do not go together: {first_line(error)}{_raised_at(error)}") from error
        self._check_fine_runs()
        most = self._most_modes()
        at = self.spec.compare.at
        if at is not None and at > self.spec.time.end:
            raise ConfigError(f"compare.at: must not lie after time.end = {self.spec.time.end:g}, found {at:g}")
        for owner, limits in self.spec.checks.items():
            if limits.velocity_error is not None and at is None:
                raise ConfigError(f"checks.{owner}.velocity_error: compare.at must say at which time")
        if self.modes > most:
            raise ConfigError(f"compare.modes: the coarsest run carries fewer than {self.modes} modes; at most {most} are possible")

    def _check_fine_runs(self) -> None:
        """The grids of warm-up and training data carry the physics, and the initial state is made for such a box."""
        import jax
        import numpy as np

        initial, solver = self.initial(), self.reference_solver()
        shapes: dict[KeyPath, Any] = {("initial", "warm_up_shape"): getattr(initial, "warm_up_shape", None)}
        if self.spec.train is not None:
            shapes["train", "data", "shape"] = self.spec.train.data.shape
            trained = self.spec.runs[self.spec.train.run].shape
            made = self.spec.train.data.shape or self.spec.reference.shape
            if any(n > m for n, m in zip(trained, made, strict=False)):
                raise ConfigError(
                    f"train.data.shape: {show_value(made)} is coarser than runs.{self.spec.train.run}.shape = {show_value(trained)}"
                )
        for path, shape in shapes.items():
            if shape is not None:
                self.grid(shape, path)
                try:
                    self.solver_for(self.spec.reference.solver, shape)
                except ConfigError as error:
                    raise ConfigError(f"{key_path(path)}: {str(error).removeprefix('solver.')}") from error
        from hybridsim.reference import initial_state

        try:
            with np.errstate(over="raise"):
                jax.eval_shape(lambda key: initial_state(initial, key, solver, "float32"), jax.eval_shape(jax.random.key, 0))
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"initial: {first_line(error)}") from error

    def _check_run(self, label: str) -> None:
        solver, spec = self.solver(label), self.spec_of(label)
        self._check_memory(label, len(solver.variables), self.stepper(label, solver).stages)
        closures = self.closures_for(label, solver, random=False)
        interval = self.spec.time.end / self.spec.time.frames
        model = self.model_for(label, dt=interval if spec.dt is None else None, closures=closures)
        self._check_closures(label, model)

    def _check_closures(self, label: str, model: "Model") -> None:
        """Traces each closure once, without compiling: what it returns must fit its place."""
        import equinox as eqx
        import jax

        if not model.closures:
            return
        shape = jax.ShapeDtypeStruct((len(model.solver.variables), *model.solver.grid.shape), self.dtype(label))
        try:
            eqx.filter_eval_shape(lambda u: model.try_closures(u), shape)
        except Exception as error:
            where = key_path(self._path(label))
            text = first_line(error)
            path = f"{where}." if text.startswith("corrections[") else f"{where}.corrections: "
            raise ConfigError(f"{path}{text}{'' if isinstance(error, ValueError) else _raised_at(error)}") from error

    # -- resolved -----------------------------------------------------------------------------------------------------------------

    def _resolve(self) -> dict[str, Any]:
        def section(model: BaseModel, **replaced: Any) -> dict[str, Any]:
            plain = {k: v for k, v in model.model_dump(mode="json", exclude=set(replaced)).items() if v is not None}
            full = {**plain, **{k: v for k, v in replaced.items() if v is not None}}
            return {k: full[k] for k in type(model).model_fields if k in full}

        def run(label: str) -> dict[str, Any]:
            at, spec = self._path(label), self.spec_of(label)
            stepper = self._parts.get((*at, "stepper")) or self._default_stepper(self.solver(label), (*at, "stepper"))
            parts: dict[str, Any] = {"solver": self._parts[*at, "solver"].resolved, "stepper": stepper.resolved}
            if isinstance(spec, Run):
                parts["corrections"] = [
                    {
                        **self._parts[*at, "corrections", i].resolved,
                        "evaluate": c.evaluate,
                        "seed": c.seed,
                        **({} if c.weights is None else {"weights": c.weights}),
                        **(
                            {}
                            if (*at, "corrections", i) not in self._structures
                            else {"structure": self._structures[*at, "corrections", i].model_dump()}
                        ),
                    }
                    for i, c in enumerate(spec.corrections)
                ]
            return section(spec, cfl=self.cfl(label), **parts)

        spec = self.spec
        return section(
            spec,
            name=self.name,
            title=self.title,
            equation=self._parts["equation",].resolved,
            initial=self._parts["initial",].resolved,
            time=section(spec.time, statistics_from=self.statistics_from),
            reference=run("reference"),
            runs={label: run(label) for label in self.labels},
            compare=section(spec.compare, modes=self.modes),
            checks={label: section(checks) for label, checks in spec.checks.items()},
            train=None if spec.train is None else section(spec.train),
            sweep=None if spec.sweep is None else section(spec.sweep),
        )


def make_part(
    use: str,
    cls: type,
    given: Mapping[str, Any],
    path: KeyPath,
    supplied: Iterable[str] = (),
    folders: Sequence[Path] = (),
    defaults: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Part:
    """Arguments from YAML checked against the constructor of `cls`."""
    constructor = constructor_of(cls, frozenset(supplied))
    if constructor.unwritable:
        raise ConfigError(
            f"{key_path(path)}: {cls.__name__} needs {one_of(constructor.unwritable)}, which YAML cannot write; give it a default"
        )
    given = {**(defaults or {}), **given}
    nested: dict[str, Part | dict[str, Part] | None] = {}
    for name in constructor.nested:
        value = given.pop(name, None)
        at = (*path, name)
        if name not in _MAPPINGS:
            if value is None and inspect.signature(cls).parameters[name].default is inspect.Parameter.empty:
                raise ConfigError(f"{key_path(at)}: {cls.__name__} needs a {name.replace('_', ' ')}, found nothing")
            nested[name] = None if value is None else _nested_part(name, value, at, folders)
            continue
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"{key_path(at)}: needs a mapping (key: value), found {show_value(value)}")
        nested[name] = {str(key): _nested_part(name, v, (*at, str(key)), folders) for key, v in (value or {}).items()}
    for name in given:
        if name in constructor.supplied:
            raise ConfigError(f"{key_path((*path, name))}: {name!r} is supplied by the run and not written in YAML; remove it")
        if name not in constructor.names:
            takes = suggestion(name, constructor.names, "it takes")
            raise ConfigError(f"{key_path((*path, name))}: {cls.__name__} takes no {name!r}; {takes}")
    for field in constructor.model.model_fields.values():
        name = str(field.alias)
        if field.is_required() and name not in given and (match := nearest(name, supplied)):
            raise ConfigError(
                f"{key_path((*path, name))}: {cls.__name__} needs {name!r}; did you mean {match!r}, which the run supplies?"
            )
    try:
        checked = constructor.model.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(explain(error, constructor.model, given, path, cls.__name__)) from None
    arguments = {str(f.alias): getattr(checked, n) for n, f in constructor.model.model_fields.items()}
    signature = inspect.signature(cls)
    factories = [n for n in arguments if n not in given and _from_factory(signature.parameters[n])]
    return Part(use, constructor, {n: v for n, v in arguments.items() if n not in factories}, nested, path, origin)


def _nested_part(name: str, value: Any, at: KeyPath, folders: Sequence[Path]) -> Part:
    """An argument that is itself chosen by `use:`."""
    try:
        use = Use.model_validate(value)
    except ValidationError as error:
        raise ConfigError(explain(error, Use, value, at)) from None
    room, table = _TABLES[name]
    kind = name.replace("_", " ")
    origin = find_class(use.use, getattr(importlib.import_module(room), table), kind, key_path(at), folders)
    supplied = _FACTORIES.get(name, ())
    if missing := [n for n in supplied if n.startswith("channels_") and n not in inspect.signature(origin.cls).parameters]:
        raise ConfigError(f"{key_path(at)}: {origin.cls.__name__} is no {kind}; a {kind} takes {' and '.join(missing)}")
    return make_part(use.use, origin.cls, use.arguments, at, supplied, folders, None, origin)


# --- loading ---------------------------------------------------------------------------------------------------------------------

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_WORDS = ("equation", "forcing", "initial", "network", "solver", "stepper")
_GROWING = ("checks", "compare", "samples", "train")


def key_path_of(text: str) -> KeyPath:
    """`runs.bare.shape[0]` as a path."""
    parts = [m[1] if m[1] is not None else int(m[2]) for m in _STEP.finditer(text)]
    if not parts or key_path(parts) != text:
        raise ConfigError(f"{text[:80]}: this is not a key path; write for example runs.bare.shape=[32,32]")
    return tuple(parts)


def apply_override(data: dict[str, Any], override: str) -> None:
    """`runs.bare.shape=[32, 32]` onto the plain values of a YAML."""
    text, sign, value_text = override.partition("=")
    if not sign:
        raise ConfigError(f"{override[:80]}: an override is key=value, for example runs.bare.shape=[32,32]")
    path = key_path_of(text.strip())
    set_key(data, path, parse_yaml(value_text, text.strip(), path))


def set_key(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Puts `value` at a key path of the plain values of a YAML."""
    here: Any = data
    for i, part in enumerate(path[:-1]):
        at = path[: i + 1]
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise ConfigError(f"{key_path(at)}: the list has {len(here)} entries; write {key_path(path[:i])}[0] for the first")
            here = here[part]
            continue
        if not isinstance(here, dict) or not isinstance(part, str):
            raise ConfigError(f"{key_path(at)}: there is nothing below {key_path(path[:i])}; give {key_path(path[:i])} as a whole")
        if part not in here or here[part] is None:
            known = [*here] if i else [*Spec.model_fields]
            if (i == 0 and part in _GROWING) or (i == 1 and path[0] in _GROWING):
                here[part] = {}
            else:
                raise ConfigError(f"{key_path(at)}: the experiment has no {part!r} here; {suggestion(part, known, 'it has')}")
        if isinstance(here[part], str) and part in _WORDS:
            here[part] = {"use": here[part]}
        here = here[part]
    last = path[-1]
    if isinstance(here, list):
        if not isinstance(last, int) or last > len(here):
            raise ConfigError(f"{key_path(path)}: the list has {len(here)} entries; write {key_path(path[:-1])}[0] for the first")
        here[last : last + 1] = [value]
    elif isinstance(here, dict) and isinstance(last, str):
        if path[0] == "runs" and len(path) == 2 and last not in here and not isinstance(value, dict):
            raise ConfigError(f"{key_path(path)}: there is no run {last!r}; {suggestion(last, here, 'there are')}")
        here[last] = value
        if last in ("dt", "cfl") and value is not None:
            here.pop("cfl" if last == "dt" else "dt", None)
    else:
        raise ConfigError(f"{key_path(path)}: there is nothing below {key_path(path[:-1])}; give {key_path(path[:-1])} as a whole")


def find_experiment(name: str | os.PathLike) -> tuple[Path, bool]:
    """The file of an experiment given as a path, or by the name of a shipped one; and whether it is shipped."""
    text = os.fspath(name)
    path = Path(text)
    shipped = shipped_experiments()
    if "\0" in text or len(text) > 4000:
        raise ConfigError(f"{show_value(text)}: this cannot be the name of a file")
    try:
        if path.is_file():
            return path.resolve(), False
        directory = path.is_dir()
    except OSError as error:
        raise ConfigError(f"{show_value(text)}: this file cannot be read: {error.strerror}") from None
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if path.name == text and stem in shipped:
        return shipped[stem], True
    if directory:
        raise ConfigError(f"{text}: this is a folder; name an experiment's YAML file in it")
    folder = path.parent if path.parent.is_dir() else Path()
    beside = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if os.access(folder, os.R_OK) else []
    match = nearest(path.name, [*shipped, *(f"{n}.yaml" for n in shipped), *beside])
    hint = f"did you mean {match!r}?" if match else f"the shipped ones are {one_of(shipped)}"
    raise ConfigError(f"{text}: there is no such file and no shipped experiment of that name; {hint}")


def read_experiment(name: str | os.PathLike) -> tuple[dict[str, Any], Path, bool]:
    """The plain values of an experiment's YAML, its path, and whether it is shipped."""
    path, shipped = find_experiment(name)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path.name}: longer than {MOST_BYTES // 2**20} MiB; an experiment is a page of text")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: this file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name}: this is not a text file (UTF-8)") from None
    data = parse_yaml(text, path.name)
    if not isinstance(data, dict):
        what = "nothing" if data is None else show_value(data)
        raise ConfigError(f"{path.name}: an experiment is a mapping with the keys {one_of(Spec.model_fields)}; found {what}")
    return data, path, shipped


def load_experiment(name_or_path: str | os.PathLike, overrides: Iterable[str] = (), *, for_training: bool = False) -> Experiment:
    """The checked experiment of a YAML file or of a shipped name, with `key=value` overrides; `ConfigError` where it is wrong.

    `for_training` leaves out all weights: they need not exist yet.
    """
    data, path, shipped = read_experiment(name_or_path)
    for override in overrides:
        apply_override(data, override)
    return experiment_from(data, path, shipped, for_training)


def experiment_from(data: Mapping[str, Any], path: Path, shipped: bool = False, for_training: bool = False) -> Experiment:
    """The checked experiment of plain values, as if they stood in the file `path`."""
    return Experiment(_spec_of(data), path, shipped, for_training, data)


def _spec_of(data: Mapping[str, Any]) -> Spec:
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Spec, data)) from None


# --- for editors -----------------------------------------------------------------------------------------------------------------


def _choices(table: Mapping[str, str], supplied: Iterable[str] = (), extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every short name of a table with the arguments that its constructor takes, or a class of one's own."""
    options: list[dict[str, Any]] = [{"enum": sorted(table)}]
    for name, target in sorted(table.items()):
        constructor = constructor_of(load_class(target), frozenset(supplied))
        schema = constructor.model.model_json_schema()
        properties = {**schema.get("properties", {}), **(extra or {})}
        for inner in constructor.nested:
            room, inner_table = _TABLES[inner]
            choice = _choices(getattr(importlib.import_module(room), inner_table), _FACTORIES.get(inner, ()))
            several = {"type": "object", "additionalProperties": choice}
            properties[inner] = several if inner in _MAPPINGS else {"anyOf": [choice, {"type": "null"}]}
        options.append(
            {
                "type": "object",
                "description": inspect.cleandoc(constructor.cls.__doc__ or "").split("\n\n")[0],
                "properties": {"use": {"const": name}, **properties},
                "required": ["use", *schema.get("required", [])],
                "additionalProperties": False,
            }
        )
    own = {"type": "string", "pattern": "^.+:[A-Za-z_][A-Za-z0-9_]*$"}
    options += [own, {"type": "object", "properties": {"use": own}, "required": ["use"]}]
    return {"anyOf": options}


def json_schema() -> dict[str, Any]:
    """The JSON schema of an experiment's YAML, with the arguments of everything in the tables."""
    schema = Spec.model_json_schema()
    definitions = schema["$defs"]
    families = [
        _choices({name: by_dims[dims] for name, by_dims in table.items() if dims in by_dims}, ("grid", "equation"))
        for table in solver_tables().values()
        for dims in sorted({d for by_dims in table.values() for d in by_dims})
    ]
    solvers, steppers = {"anyOf": families}, _choices(catalogue("steppers"))
    for name in ("Run", "Reference"):
        definitions[name]["properties"]["solver"] = solvers
        definitions[name]["properties"]["stepper"] = steppers
    common = {k: v for k, v in Correction.model_json_schema()["properties"].items() if k != "use"}
    definitions["Run"]["properties"]["corrections"]["items"] = _choices(catalogue("closures"), FROM_RUN, common)
    definitions["Domain"]["properties"]["lengths"]["items"] = {
        "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]
    }
    schema["properties"]["equation"] = _choices(catalogue("equations"))
    schema["properties"]["initial"] = _choices(catalogue("initial"))
    for unused in ("Use", "Correction"):
        definitions.pop(unused, None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hybridsim experiment"}
