"""The commands: exit codes, one line per refusal, start-up time, signals, and what show, list and check print."""

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hybridsim import config
from hybridsim.cli import app
from hybridsim.signals import STOP, Interrupted, Stop
from hybridsim.yaml_reader import ConfigError, parse_yaml

ROOT = Path(__file__).resolve().parent.parent

TEXT = """\
equation: {use: navier_stokes, viscosity: 1e-3, forcing: {use: kolmogorov}}
domain: {lengths: [2pi, 2pi]}
initial: {use: random_velocity, max_speed: 7, warm_up: 1}
time: {end: 1.0, frames: 10}
reference: {solver: spectral, shape: [32, 32]}
runs:
  bare: {solver: finite_volume, shape: [16, 16], dt: 0.014}
  smagorinsky: {solver: spectral, shape: [16, 16], cfl: 0.4, corrections: [{use: smagorinsky, cs: 0.17}]}
train: {run: smagorinsky, unroll: [1], updates: [1]}
"""

CLOSURES = '''
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.contract import Flux, Interpolation, PostStep, Source


class Good(Flux):
    """F = −w ∂_a u_c."""

    weight: Float[Array, ""]

    def __init__(self, *, key):
        self.weight = jax.random.normal(key, ())

    def __call__(self, view, memory=None, key=None):
        return -self.weight * view.gradient()


class Shaped(Flux):
    """F of the wrong shape."""

    def __call__(self, view, memory=None, key=None):
        return view.u


class Broken(Flux):
    """F raises."""

    def __call__(self, view, memory=None, key=None):
        return view.nothing


class Careless(Flux):
    """F = −|S| ∂_a u_c with a root that has no gradient at rest, in double precision always."""

    def __call__(self, view, memory=None, key=None):
        slope = view.gradient()
        return -jnp.sqrt(jnp.sum(slope**2, axis=(0, 1)))[None, None] * slope * jnp.ones((), np.float64)


class Push(Source):
    """s = −u |u|²."""

    def __call__(self, view, memory=None, key=None):
        return -view.u * jnp.sum(view.centred() ** 2, axis=0)[None]


class Nudge(PostStep):
    """d = −u / 100."""

    def __call__(self, view, memory=None, key=None):
        return -0.01 * view.u


class Faces(Interpolation):
    """a = 0 of a wrong shape, in a place that only finite volumes take."""

    def __call__(self, view, memory=None, key=None):
        return 0 * view.u
'''

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "case.yaml").write_text(TEXT)
    (tmp_path / "mine.py").write_text(CLOSURES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- exit codes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "train", "show", "check"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["case.yaml", "runs.smagorinsky.corrections[0].c=1"], "Smagorinsky takes no 'c'; did you mean 'cs'?"),
        (["case.yaml", "equation.viscosity=-1"], "equation.viscosity: must be finite and not negative, found -1.0"),
        (["case.yaml", "reference.shape=[1000000, 1000000]"], "GiB"),
        (["cas.yaml"], "did you mean 'case.yaml'?"),
        (["coarse_turbulance"], "did you mean 'coarse_turbulence'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, command: str, arguments: list[str], sentence: str):
    result = invoke(command, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("hybridsim: ")
    assert sentence in result.stderr
    assert not (folder / "runs").exists()


def test_training_needs_a_section(folder: Path):
    result = invoke("train", "case.yaml", "train=null")
    assert result.exit_code == 2
    assert "train: case has no section 'train'" in result.stderr


def test_the_folder_of_the_results_may_not_be_a_file(folder: Path):
    result = invoke("run", "case.yaml", "--out", "mine.py/here")
    assert result.exit_code == 2
    assert "--out: mine.py is a file; choose another folder" in result.stderr


@pytest.mark.parametrize(("command", "name"), [("run", "hybridsim.experiment"), ("train", "hybridsim.training")])
def test_commands_hand_over_and_return_the_exit_code(folder: Path, monkeypatch, command: str, name: str):
    calls = []

    def work(experiment, place, resume, console, *, force, save_every):
        calls.append((experiment.name, place, resume, force, save_every))
        return 3

    module = types.ModuleType(name)
    setattr(module, f"{command}_experiment", work)
    monkeypatch.setitem(sys.modules, name, module)
    assert invoke(command, "case.yaml").exit_code == 3
    changed = ["runs.bare.dt=0.01", "--out", "there", "--resume", "--force", "--save-every", "0"]
    assert invoke(command, "case.yaml", *changed).exit_code == 3
    assert calls == [("case", Path("runs/case"), False, False, 10.0), ("case", Path("there"), True, True, 0.0)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_between_chunks(folder: Path, monkeypatch, number: int, code: int):
    done = []

    def work(experiment, place, resume, console, **_):
        for chunk in range(5):
            if chunk == 2:
                os.kill(os.getpid(), number)
            done.append(chunk)
            STOP.check()
        return 0

    module = types.ModuleType("hybridsim.experiment")
    module.run_experiment = work
    monkeypatch.setitem(sys.modules, "hybridsim.experiment", module)
    before = signal.getsignal(number)
    result = invoke("run", "case.yaml")
    assert result.exit_code == code
    assert done == [0, 1, 2]
    assert "what was finished is saved, go on with --resume" in result.stderr
    assert signal.getsignal(number) is before


def test_a_command_that_saves_nothing_just_ends(folder: Path, monkeypatch):
    handlers = []
    monkeypatch.setattr("hybridsim.show.list_catalogue", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    assert invoke("list").exit_code == 0
    assert handlers == [before]


def test_a_request_is_answered_where_it_is_asked_for():
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.exit_code == 143


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_a_second_ctrl_c_does_not_wait_for_compiled_code():
    """Code that never returns to Python stands for a long chunk: one SIGINT is kept for its end, a second one does not wait."""
    code = """
        import hashlib
        from hybridsim.signals import STOP

        with STOP.listening():
            print("begins", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(20.0) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_a_terminal_that_is_gone_stops_no_report(tmp_path: Path):
    import pty

    from rich.console import Console

    from hybridsim.progress import Reporter

    mine, theirs = pty.openpty()
    sink = open(theirs, "w")  # noqa: PTH123, SIM115
    with Reporter(Console(file=sink, force_terminal=True), tmp_path / "log.txt") as say:
        say.progress("working", 0.1)
        os.close(mine)
        say.progress("working", 0.6)
        say.progress("other work", 0.1)
        say.line("done")
    sink.close()
    assert "done" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
def test_a_closed_terminal_asks_for_a_stop_unless_it_is_to_be_ignored():
    stop, before = Stop(), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted) as caught:
                stop.check()
        assert caught.value.exit_code == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_storage_error_is_one_line(folder: Path, monkeypatch):
    from hybridsim.storage import StorageError

    def work(*_, **__):
        raise StorageError("runs/case: the disk is full;\nfree some space")

    module = types.ModuleType("hybridsim.experiment")
    module.run_experiment = work
    monkeypatch.setitem(sys.modules, "hybridsim.experiment", module)
    result = invoke("run", "case.yaml")
    assert (result.exit_code, result.stderr) == (2, "hybridsim: runs/case: the disk is full; free some space\n")


# --- processes: start-up, and refusals in time -----------------------------------------------------------------------------------


def process(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess, float]:
    """A real process and the processor time that it took (the machine may be busy with other things)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    as_users = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # compiled as outside of the tests
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False, env=as_users)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_comes_at_once(tmp_path: Path):
    done, seconds = process("-m", "hybridsim.cli", "--help", cwd=ROOT)
    assert done.returncode == 0
    for command in ("run", "train", "bench", "show", "check", "verify", "doctor", "new", "list", "peers", "schema"):
        assert f"│ {command} " in done.stdout
    assert seconds < 1


def test_nothing_heavy_is_imported_for_help():
    code = "import sys, hybridsim.cli; print([m for m in ('jax', 'numpy', 'equinox', 'rich.console', 'yaml') if m in sys.modules])"
    done, _ = process("-c", code, cwd=ROOT)
    assert done.stdout.strip() in ("[]", "['rich.console']"), done.stderr


def test_a_second_process_starts_warm(folder: Path, tmp_path: Path):
    """What the first one compiled lies in the cache folder, in one folder per kind of processor, and is not compiled again."""
    kept = []
    for _ in range(2):
        done, _ = process("-m", "hybridsim.cli", "show", str(folder / "case.yaml"), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        kept.append({path.name for path in (tmp_path / "cache" / "compiled").glob("*/*-cache")})
    assert kept[0]
    # a program near the least time that is worth keeping may come in with the second
    assert kept[0] <= kept[1]
    assert len(kept[1]) <= len(kept[0]) + 2
    assert len(list((tmp_path / "cache" / "compiled").iterdir())) == 1


@pytest.mark.parametrize(
    "override", ["runs.smagorinsky.corrections[0].c=1", "runs.bare.may_diverge=no", "runs.bare.stepper=etdrk4"]
)
def test_bad_input_is_refused_within_two_seconds(folder: Path, override: str):
    """Two seconds, or on a slow machine twice as long as JAX and Equinox alone take to come in."""
    for _ in range(3):  # the machine may be busy
        _, imports = process("-c", "import jax, equinox", cwd=ROOT)
        done, seconds = process("-m", "hybridsim.cli", "run", str(folder / "case.yaml"), override, cwd=ROOT)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("hybridsim: runs.")
        assert done.stderr.count("\n") == 1
        if seconds < max(2, 2 * imports):
            return
    raise AssertionError(f"refused after {seconds:.1f} s, where JAX and Equinox take {imports:.1f} s")


# --- list, schema, show ----------------------------------------------------------------------------------------------------------


def test_list_has_a_formula_for_every_name(folder: Path):
    result = invoke("list")
    assert result.exit_code == 0
    kinds = (
        "equations",
        "steppers",
        "forcings",
        "cooling",
        "boundary_states",
        "boundary_velocities",
        "initial",
        "closures",
        "networks",
    )
    named = [pair for kind in kinds for pair in config.catalogue(kind).items()]
    solvers = [(name, t) for table in config.solver_tables().values() for name, targets in table.items() for t in targets.values()]
    for name, target in named + solvers:
        formula = " ".join((config.load_class(target).__doc__ or "").split("\n\n")[0].split())
        assert any(f"│ {name} " in line and formula in line for line in result.stdout.splitlines()), name
    assert "coarse_turbulence" in result.stdout
    only = invoke("list", "steppers").stdout
    assert "ssprk3" in only
    assert "smagorinsky" not in only
    refused = invoke("list", "stepers")
    assert (refused.exit_code, refused.stderr) == (2, "hybridsim: list: there is no kind 'stepers'; did you mean 'steppers'?\n")


def test_schema_is_json(folder: Path):
    result = invoke("schema")
    assert result.exit_code == 0
    assert parse_yaml(result.stdout[:0] + "a: 1") == {"a": 1}
    assert '"title": "hybridsim experiment"' in result.stdout


def test_show_names_every_formula_with_file_and_line(folder: Path):
    result = invoke("show", "case.yaml", "--no-timing", "runs.smagorinsky.corrections[0].structure=pointwise")
    assert result.exit_code == 0
    out = result.stdout
    for piece in (
        "runs.bare",
        "u [length/time] at (1, 1/2)",
        "∂t u + ∇·(u u) = −∇p + ν ∇²u + f − μ u,  ∇·u = 0".replace("  ", " "),
        "Δt = 0.0125 (0.014 shortened to land on the frames)",
        "place Flux, evaluated at every step",
        "cs = 0.17",
        "form = pointwise, c = 0.5",
        "memory about",
        "Δt = 0.4 of the stable one",
    ):
        assert piece in out
    places = set(re.findall(r"((?:hybridsim|solvers|corrections)/\w+\.py):(\d+)", out))
    assert len(places) >= 8
    for file, line in places:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(r"\s*(class|def|@)", text), f"{file}:{line} is {text!r}"
    line = next(line for line in out.splitlines() if "runs.bare" in line)
    assert "case.yaml:7" in line


def test_show_times_the_steps(folder: Path):
    result = invoke(
        "show", "case.yaml", "runs={bare: {solver: finite_volume, shape: [16, 16], dt: 0.1}}", "train=null", "checks={}"
    )
    assert result.exit_code == 0
    assert len(re.findall(r"(ms|s) per step and sample here", result.stdout)) == 2


# --- check -----------------------------------------------------------------------------------------------------------------------


def lines_of(result: Result) -> dict[tuple[str, str], tuple[str, str]]:
    """(check, solver) -> (found, verdict) of the printed table."""
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in result.stdout.splitlines() if line.startswith("│")]
    return {(row[0], row[1]): (row[2], row[4]) for row in rows}


def test_check_says_that_an_experiment_is_valid(folder: Path):
    result = invoke("check", "case.yaml")
    assert result.exit_code == 0
    assert result.stdout.startswith("case: valid; 2 runs: bare, smagorinsky; config hash ")


@pytest.mark.parametrize("options", [["--solver", "navier_stokes 2D"], pytest.param([], marks=pytest.mark.slow)])
def test_check_passes_a_good_closure_in_both_solvers(folder: Path, options: list[str]):
    result = invoke("check", "mine.py:Good", *options)
    assert result.exit_code == 0, result.stdout
    found = lines_of(result)
    assert len({solver for _, solver in found}) == (2 if options else 9)
    for solver in ("navier_stokes 2D finite_volume", "navier_stokes 2D spectral"):
        assert found["place", solver] == ("Flux", "pass")
        assert float(found["conservation, float64", solver][0]) <= 1e-14
        assert float(found["conservation, float32", solver][0]) <= 1e-7
        assert float(found["adjoint ⟨Jv,w⟩ = ⟨v,Jᵀw⟩", solver][0]) <= 1e-12
        assert float(found["gradient against differences", solver][0]) <= 1e-6
        assert found["gradient against differences", solver][1] == "pass"
        assert float(found["translation", solver][0]) <= 1e-12
    assert "all checks passed" in result.stdout


def test_check_finds_what_is_careless(folder: Path):
    result = invoke("check", "mine.py:Careless", "--solver", "navier_stokes 2D")
    assert result.exit_code == 1
    found = lines_of(result)
    for solver in ("navier_stokes 2D finite_volume", "navier_stokes 2D spectral"):
        assert found["finite, at rest", solver][1] == "FAIL"
        assert found["finite, uniform flow", solver][1] == "FAIL"
        assert found["finite, random flow", solver][1] == "pass"
        assert found["float32 stays float32", solver][1] == "FAIL"
        assert found["conservation, float64", solver][1] == "pass"
    # the table ends with one sentence per violation, wherever it was found
    said = [line for line in result.stdout.splitlines() if line.startswith("- ")]
    assert [line.partition(":")[0] for line in said] == ["- finite", "- float32 stays float32"]
    assert all(line.endswith("(navier_stokes 2D finite_volume and 1 more)") for line in said)


def test_check_names_the_line_that_fails(folder: Path):
    result = invoke("check", "mine.py:Shaped")
    assert result.exit_code == 1
    assert lines_of(result)["shape", "navier_stokes 2D spectral"] == ("(2, 16, 12)", "FAIL")
    result = invoke("check", "mine.py:Broken")
    assert result.exit_code == 1
    line = CLOSURES.splitlines().index("        return view.nothing") + 1
    assert f"(mine.py:{line})" in lines_of(result)["shape", "navier_stokes 2D finite_volume"][0]


def test_check_reports_places_that_solvers_do_not_take_and_wrong_shapes(folder: Path):
    result = invoke("check", "mine.py:Faces")
    assert result.exit_code == 1
    assert lines_of(result)["place", "navier_stokes 2D spectral"] == ("Interpolation is not taken", "note")
    assert lines_of(result)["shape", "compressible 2D finite_volume"] == ("(4, 16, 12)", "FAIL")


@pytest.mark.parametrize("use", ["mine.py:Push", "mine.py:Nudge"])
def test_check_only_reports_what_sources_do_to_the_sums(folder: Path, use: str):
    result = invoke("check", use, "--solver", "spectral 2D")
    assert result.exit_code == 0, result.stdout
    found, verdict = lines_of(result)["conservation, float64", "navier_stokes 2D spectral"]
    assert verdict == "note"
    assert float(found) > 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("use", config.catalogue("closures"))
def test_check_passes_every_closure_of_the_catalogue(folder: Path, use: str):
    result = invoke("check", use)
    assert result.exit_code == 0, result.stdout


def test_check_may_be_restricted(folder: Path):
    result = invoke("check", "mine.py:Good", "--solver", "kuramoto_sivashinsky", "--quick")
    assert result.exit_code == 0
    assert {solver for _, solver in lines_of(result)} == {f"kuramoto_sivashinsky 1D {s}" for s in ("finite_volume", "spectral")}
    # Faces fits nowhere, so no smaller box settles the matter
    result = invoke("check", "mine.py:Faces", "--solver", "compressible", "--quick")
    assert {solver for _, solver in lines_of(result)} == {
        f"compressible {d}D {s}" for d in (1, 2, 3) for s in ("finite_volume", "spectral")
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mine.py:God"], "check: mine.py has no class 'God'; did you mean 'Good'?"),
        (["mien.py:Good"], "check: there is no file 'mien.py'; did you mean 'mine.py'?"),
        (["smagorinsky", "c=1"], "Smagorinsky.c: Smagorinsky takes no 'c'; did you mean 'cs'?"),
        (["smagorinsky", "cs=-1"], "Smagorinsky.cs: must be finite and not negative, found -1.0"),
        (["smagorinsky", "cs"], "cs: an argument of the closure is key=value, for example width=8"),
        (["smagorinsky", "--solver", "spectrl"], "solver: no solver is called 'spectrl'; did you mean 'spectral'?"),
        (["case.yaml", "--quick"], "--quick: case.yaml is an experiment, and this is for closures"),
    ],
)
def test_check_refuses_what_it_cannot_check(folder: Path, arguments: list[str], sentence: str):
    result = invoke("check", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"hybridsim: {sentence}\n")


def test_the_dtype_check_sees_into_loops():
    import jax
    import jax.numpy as jnp

    from hybridsim.check import wide_values

    def hidden(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c.astype(np.float64)).astype(np.float32), None), x, None, 3)[0]

    x = jnp.ones((), np.float32)
    assert any("sin" in value for value in wide_values(jax.make_jaxpr(jax.jit(hidden))(x)))
    assert wide_values(jax.make_jaxpr(jax.jit(jnp.sin))(x)) == set()


def test_errors_know_their_exit_code():
    assert issubclass(ConfigError, Exception)
    assert not issubclass(Interrupted, Exception), "an `except Exception` must not swallow a request to stop"
