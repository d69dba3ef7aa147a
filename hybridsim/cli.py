"""The commands: run, train, bench, show, check, verify, doctor, new, card, list, peers, schema.

Exit codes: 0 done and all checks passed · 1 a check failed · 2 bad input, before any compilation · 3 a run without `may_diverge`
diverged · 130, 143 and 129 interrupted (Ctrl-C, SIGTERM, a closed terminal), state saved.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hybridsim.config import Experiment

app = typer.Typer(
    name="hybridsim",
    help="Coarse simulations with learned closures that behave like fine ones.",
    epilog="EXPERIMENT is a YAML file or the name of a shipped experiment: see `hybridsim list experiments`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ExperimentName = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A YAML file, or the name of a shipped experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override any key, for example runs.bare.shape=[32,32].")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the results (default: runs/NAME).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Force = Annotated[
    bool, typer.Option("--force", help="With --resume: in spite of differences that change no state, or the last bits only.")
]
SaveEvery = Annotated[
    float, typer.Option("--save-every", metavar="SECONDS", min=0.0, help="How often the state is saved; 0: after every chunk.")
]


def _console() -> "Console":
    from rich.console import Console

    # what reads a pipe or a file does not want lines folded at 80
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def _start_jax(double: bool = True, keep: bool = True) -> None:
    """Double precision (or not) and all cores before anything is traced; no warning about GPUs that are not there.

    `keep`: what is compiled is kept in the cache folder, so that a second process starts warm. A process in which JAX is already
    there keeps its own settings.
    """
    fresh = "jax" not in sys.modules
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("jax._src.xla_bridge", "jax._src.hardware_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import jax

    from hybridsim.samples import use_all_cores

    jax.config.update("jax_enable_x64", double)
    use_all_cores()
    if keep and fresh and jax.config.values["jax_compilation_cache_dir"] is None:
        from hybridsim.storage import compiled_folder

        jax.config.update("jax_compilation_cache_dir", str(compiled_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _leave(action: Callable[[], int], saves: bool = False) -> NoReturn:
    """Run the action and exit with its code; every refusal is one line on stderr and exit code 2.

    An action that `saves` its state is told of signals and stops by itself; any other just ends.
    """
    from hybridsim.signals import STOP, Interrupted
    from hybridsim.yaml_reader import ConfigError

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be closed
            typer.echo(f"hybridsim: {text}", err=True)

    def refuse(error: BaseException | str) -> int:
        tell(_one_line(error))
        return 2

    try:
        with STOP.listening() if saves else contextlib.nullcontext():
            code = action()
    except ConfigError as error:
        code = refuse(error)
    except Interrupted as error:
        tell(f"stopped by {error}; what was finished is saved, go on with --resume")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except PermissionError as error:
        code = refuse(f"{error.filename}: {error.strerror}; choose another folder with --out")
    except BrokenPipeError:
        # the reader of a pipe has gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        storage = sys.modules.get("hybridsim.storage")
        if storage is None or not isinstance(error, storage.StorageError):
            raise
        code = refuse(error)
    raise typer.Exit(code)


def _load(name: str, overrides: list[str] | None, for_training: bool = False) -> "Experiment":
    from hybridsim.config import load_experiment

    return load_experiment(name, overrides or (), for_training=for_training)


def _folder(experiment: "Experiment", out: Path | None) -> Path:
    from hybridsim.yaml_reader import ConfigError

    folder = Path("runs") / experiment.name if out is None else out
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"--out: {parent} is a file; choose another folder")
    return folder


@app.command()
def run(
    experiment: ExperimentName,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    save_every: SaveEvery = 10.0,
) -> None:
    """Run an experiment: reference, runs, checks, report."""

    def action() -> int:
        _start_jax()
        loaded = _load(experiment, overrides)
        folder = _folder(loaded, out)
        if loaded.cases:
            from hybridsim.ablation import sweep_experiment

            return sweep_experiment(loaded, folder, resume, _console(), training=False, force=force, save_every=save_every)
        from hybridsim.experiment import run_experiment

        return run_experiment(loaded, folder, resume, _console(), force=force, save_every=save_every)

    _leave(action, saves=True)


@app.command()
def train(
    experiment: ExperimentName,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    save_every: SaveEvery = 10.0,
) -> None:
    """Train the closure that the experiment's `train:` names, with the solver in the loop."""

    def action() -> int:
        _start_jax()
        loaded = _load(experiment, overrides, for_training=True)
        if loaded.spec.train is None:
            from hybridsim.yaml_reader import ConfigError

            raise ConfigError(f"train: {loaded.name} has no section 'train', so there is nothing to train; add one")
        folder = _folder(loaded, out)
        if loaded.cases:
            from hybridsim.ablation import sweep_experiment

            return sweep_experiment(loaded, folder, resume, _console(), training=True, force=force, save_every=save_every)
        from hybridsim.training import train_experiment

        return train_experiment(loaded, folder, resume, _console(), force=force, save_every=save_every)

    _leave(action, saves=True)


@app.command()
def bench(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="A YAML file, a shipped benchmark, or an experiment.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the results (default: runs/bench_NAME, with --quick runs/bench_NAME_quick)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer families, runs and starts, as the file says.")] = False,
    resume: Resume = False,
    family: Annotated[list[str] | None, typer.Option("--family", metavar="NAME", help="Only this one; may be repeated.")] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="An earlier bench.json, to see whether its verdicts hold.")
    ] = None,
) -> None:
    """Measure what closures save at equal accuracy, against the best classical runs, all timed in turn."""

    def action() -> int:
        _start_jax()
        from hybridsim.bench import bench_command

        return bench_command(benchmark, out, quick, resume, family or [], against, _console())

    _leave(action, saves=True)


@app.command()
def show(
    experiment: ExperimentName,
    overrides: Overrides = None,
    timing: Annotated[bool, typer.Option("--timing/--no-timing", help="Time a few steps of each run.")] = True,
) -> None:
    """Show what a run computes: every formula with file and line, time step, parameters, memory, time."""

    def action() -> int:
        _start_jax()
        from hybridsim.show import show_experiment

        show_experiment(_load(experiment, overrides), _console(), timing)
        return 0

    _leave(action)


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="my_closure.py:MyClosure, a closure's name, or an experiment.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Arguments of the closure, or overrides of the experiment.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", metavar="WORDS", help="Only solvers with these words, like 'navier_stokes 2D'.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Each solver in the fewest dimensions only.")] = False,
) -> None:
    """Check a closure (conservation, gradients, finiteness, ...) in every solver, or an experiment's YAML."""

    def action() -> int:
        from hybridsim.config import catalogue

        _start_jax()
        if ":" in target or (target in catalogue("closures") and not Path(target).is_file()):
            from hybridsim.check import check_closure

            return check_closure(target, arguments or [], _console(), solver, quick)
        if solver is not None or quick:
            from hybridsim.yaml_reader import ConfigError

            raise ConfigError(f"{'--quick' if solver is None else '--solver'}: {target} is an experiment, and this is for closures")
        loaded = _load(target, arguments)
        runs = f"{len(loaded.labels)} run{'s' if len(loaded.labels) > 1 else ''}"
        typer.echo(f"{loaded.name}: valid; {runs}: {', '.join(loaded.labels)}; config hash {loaded.config_hash[:12]}")
        return 0

    _leave(action)


@app.command()
def verify(
    target: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="A folder of results, or one file: weights, checkpoint, NetCDF.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="The cache folder instead.")] = False,
) -> None:
    """Check that every file is still what was written: digests, checksums, and what each kind promises."""

    def action() -> int:
        from hybridsim.verify import verify_command

        return verify_command(target, cache, _console())

    _leave(action)


@app.command()
def doctor() -> None:
    """Examine this installation: packages, devices, precision, flags, cache, disk, and a small self-test."""

    def action() -> int:
        from hybridsim.doctor import doctor_command

        # before JAX starts, and as the user's environment has it
        return doctor_command(_console(), _start_jax)

    _leave(action)


new = typer.Typer(no_args_is_help=True)
app.add_typer(new, name="new", help="Write files to start from.")


@new.callback()
def _new() -> None:
    """Write files to start from."""


@new.command("closure")
def new_closure(
    name: Annotated[str, typer.Argument(metavar="NAME", help="my_closure or MyClosure.")],
    place: Annotated[str, typer.Option("--place", help="flux, source, interpolation, post_step or replacement.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files are written.")] = Path(),
) -> None:
    """Write a closure of your own: a small network at a place, an experiment that trains it, and a test."""

    def action() -> int:
        from hybridsim.starting import write_closure

        for line in write_closure(name, place, out):
            typer.echo(line)
        return 0

    _leave(action)


@app.command()
def card(
    name: Annotated[str, typer.Argument(metavar="WEIGHTS", help="Shipped weights, or a .safetensors that training wrote.")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Finished runs and sweeps; the first run gives the scores.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the card (default: that of the weights).")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the card's scores; the folders are further long runs and sweeps.")
    ] = False,
) -> None:
    """Write a closure's card: its training, its scores beside its rivals, and where it holds."""

    def action() -> int:
        _start_jax()
        from hybridsim.cards import write_card

        for path in write_card(name, folders, out, add=add):
            typer.echo(f"written: {path}")
        return 0

    _leave(action)


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]", help="equations, solvers, steppers, forcings, initial, closures, networks, weights or experiments."
        ),
    ] = None,
) -> None:
    """List what can be named in YAML, with the formula of each."""

    def action() -> int:
        _start_jax()
        from hybridsim.show import list_catalogue

        list_catalogue(kind, _console())
        return 0

    _leave(action)


@app.command()
def peers(
    family: Annotated[str | None, typer.Argument(metavar="[FAMILY]", help="spectral, ks or finite_volume (default: all).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small grids: about two minutes.")] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="How often the codes of a pair take turns.")] = 5,
    precision: Annotated[str, typer.Option("--precision", help="float32 or float64.")] = "float32",
    same_options: Annotated[bool, typer.Option("--same-options", help="Compile the peers with our compiler options too.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the table is saved.")] = Path("peers.json"),
) -> None:
    """Time our steppers against the installed peers (jax-cfd, exponax), in turn: same scheme, and equal accuracy."""

    def action() -> int:
        from hybridsim.yaml_reader import ConfigError

        known = ("spectral", "ks", "finite_volume")
        for name, value, possible in (("family", family, known), ("--precision", precision, ("float32", "float64"))):
            if value is not None and value not in possible:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(possible)}")
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise ConfigError(
                f"--out: {out} cannot be written: {'it is a folder' if out.is_dir() else 'its folder does not exist'}"
            )
        # Single precision all through: where JAX has double precision, the peers' constants take it.
        _start_jax(double=precision == "float64", keep=False)
        from hybridsim.config import timings

        families = known if family is None else (family,)
        timings("peers").run_peers(families, quick, rounds, precision, str(out), _console(), same_options)
        return 0

    _leave(action)


@app.command()
def schema() -> None:
    """Print the JSON schema of an experiment's YAML, for editors."""

    def action() -> int:
        import json

        _start_jax()
        from hybridsim.config import json_schema

        typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0

    _leave(action)


def _version(value: bool) -> bool:
    if value:
        from hybridsim import __version__

        typer.echo(f"hybridsim {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Coarse simulations with learned closures that behave like fine ones."""


def main() -> None:
    """The entry point of `hybridsim`."""
    app()


if __name__ == "__main__":
    main()
