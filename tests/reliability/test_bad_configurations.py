"""R8 and R4: whatever is written in a configuration, it is refused in one sentence before anything is computed, or it is right."""

import copy
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import RUN, TRAIN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import PLAIN, WALLS, _paths
from test_resumed_exactly import case

from hybridsim import config
from hybridsim.config import Experiment, apply_override, experiment_from, load_experiment
from hybridsim.yaml_reader import ConfigError, key_path, parse_yaml

GAS = parse_yaml(
    """\
equation:
  {use: compressible, gamma: 1.4, viscosity: 1e-3, prandtl: 0.7, scalars: {dye: 1e-3}, forcing: {use: ornstein_uhlenbeck}}
domain: {lengths: [1, 1.5]}
initial: {use: compressible_turbulence, mach: 0.3, pressure: 0.6, exponent: 2, highest_mode: 4, solenoidal_share: 0.5}
samples: {count: 1, seed: 2}
time: {end: 0.2, frames: 4}
reference: {solver: {use: finite_volume, reconstruction: weno5z}, shape: [16, 24], precision: float32}
runs:
  ppm: {solver: {use: finite_volume, reconstruction: ppm, riemann: hlle}, shape: [8, 12], cfl: 0.4, adaptive: true}
  fixed: {solver: {use: finite_volume, positivity: true}, shape: [8, 12], dt: 0.01, stepper: vl2, substeps: 2}
compare: {at: 0.1}
checks: {all: {drift: 1e-6, floors: {events: 0}}, ppm: {error: 0.5}}
"""
)
BASES: dict[str, dict[str, Any]] = {
    "plane": PLAIN,
    "walls": WALLS,
    "gas": GAS,
    "line": parse_yaml(RUN),
    "training": parse_yaml(TRAIN),
}
BASES["plane"] = copy.deepcopy(PLAIN)
BASES["plane"]["runs"].pop("mine")  # its file belongs to another test

pytestmark = pytest.mark.usefixtures("x64", "bounded")


@pytest.fixture
def bounded():
    """What is allocated in spite of everything fails here instead of filling the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


EXTREMES = [
    *(0, -1, 1, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.0, 5e-324, 1e-320, 1e-30, 1e30, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf, True, False, None, "", "1e-3", "nan", ".inf", "no", "2pi", "../x", "a" * 2000, "\0", "ä\n"),
    *([], [[]], {}, [math.nan], [0], [1e400], {"use": ""}, {"use": "os:system"}, {"": 1}, [None], ["periodic"]),
]
JUNK = st.one_of(
    st.sampled_from(EXTREMES),
    st.integers(-3, 70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-3, 40), st.floats(), st.text(max_size=3)), max_size=3),
)


def number(low=-math.inf, high=math.inf, *, strictly=False, none=False):
    def fits(v):
        if v is None:
            return none
        ok = isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high
        return ok and (v > low or not strictly)

    return fits


def whole(low, high=2**31 - 1, none=False):
    return lambda v: (v is None and none) or (isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


POSITIVE, NOT_NEGATIVE, FLAG = number(0, strictly=True), number(0), lambda v: isinstance(v, bool)
MAY_BE = {
    "equation.viscosity": NOT_NEGATIVE,
    "equation.gamma": number(1, strictly=True),
    "equation.prandtl": POSITIVE,
    "equation.scalars.dye": NOT_NEGATIVE,
    "equation.forcing.drag": NOT_NEGATIVE,
    "equation.forcing.wavenumber": whole(1),
    "domain.lengths[*]": lambda v: POSITIVE(v) or v == "2pi",
    "initial.max_speed": POSITIVE,
    "initial.warm_up": NOT_NEGATIVE,
    "initial.mach": POSITIVE,
    "initial.pressure": POSITIVE,
    "initial.highest_mode": whole(1),
    "initial.solenoidal_share": number(0, 1),
    "samples.count": whole(1),
    "samples.seed": whole(0),
    "time.end": POSITIVE,
    "time.frames": whole(1),
    "time.statistics_from": number(0, none=True),
    "reference.shape[*]": whole(2),
    "reference.precision": lambda v: v in ("float32", "float64"),
    "runs.*.shape[*]": whole(2),
    "runs.*.dt": number(0, strictly=True, none=True),
    "runs.*.cfl": number(0, 10, strictly=True, none=True),
    "runs.*.substeps": whole(1),
    "runs.*.adaptive": FLAG,
    "runs.*.may_diverge": FLAG,
    "runs.*.precision": lambda v: v in ("float32", "float64"),
    "runs.*.corrections[*].cs": NOT_NEGATIVE,
    "runs.*.corrections[*].width": whole(1),
    "runs.*.corrections[*].depth": whole(0),
    "runs.*.solver.positivity": FLAG,
    "compare.modes": whole(1, none=True),
    "compare.at": number(0, strictly=True, none=True),
    "checks.*.drift": number(0, none=True),
    "checks.*.error": number(0, none=True),
    "checks.*.floors.events": number(0, none=True),
    "train.batch": whole(1),
    "train.validate_every": whole(1),
    "train.average": lambda v: number(0, 1)(v) and v < 1,
    "train.noise": NOT_NEGATIVE,
    "train.seeds[*]": whole(0),
    "train.unroll[*]": whole(1),
    "train.updates[*]": whole(1),
    "train.data.time": POSITIVE,
    "train.data.validation_time": POSITIVE,
    "train.data.interval": POSITIVE,
    "train.data.trajectories": whole(1),
    "train.data.validation": whole(1),
    "train.data.shape[*]": whole(2),
}


def rule_of(path):
    """What a key may be, whatever the configuration thinks; None where nothing is known."""
    text = key_path(path)
    return next((rule for name, rule in MAY_BE.items() if re.fullmatch(re.escape(name).replace(r"\*", r"[^.\]]+"), text)), None)


def changed(data, path, how, junk):
    data = copy.deepcopy(data)
    here = data
    for part in path[:-1]:
        here = here[part]
    if how == "replace":
        here[path[-1]] = junk
    else:
        value = here.pop(path[-1])
        if how == "rename" and isinstance(here, dict):
            here[str(path[-1])[:-1] + "_"] = value
        elif how == "unknown" and isinstance(here, dict):
            here |= {path[-1]: value, "unheard_of": junk}
    return data


def complaints(base, path, how, junk, folder):
    """What is wrong with how a changed configuration was taken or refused."""
    data = changed(BASES[base], path, how, junk)
    begin = time.process_time()
    try:
        found = experiment_from(data, folder / "case.yaml", for_training="train" in data)
    except ConfigError as error:
        sentence = str(error)
        if time.process_time() - begin > 2:
            yield "it took longer than 2 s"
        if "\n" in sentence or len(sentence) > 700:
            yield f"not a short line: {sentence[:900]!r}"
        if not re.match(r"[A-Za-z_][\w.\-\[\]]*( line \d+)?: ", sentence.replace("case.yaml", "case")) and ": " not in sentence:
            yield f"no key path: {sentence!r}"
        rule = rule_of(path)
        if how == "replace" and rule is not None and not rule(junk) and not sentence.startswith(path[0]):
            yield f"names another key than {key_path(path)}: {sentence!r}"
        if how == "rename" and isinstance(path[-1], str) and not any(str(path[-1]) in s for s in (sentence,)):
            yield f"does not name the nearest key: {sentence!r}"
        return
    except Exception as error:
        yield f"{key_path(path)} = {junk!r}: {type(error).__name__}: {error}"
        return
    rule = rule_of(path)
    if how == "replace" and rule is not None and not rule(junk):
        yield f"accepted {key_path(path)} = {junk!r}"
    if how == "rename" and isinstance(path[-1], str) and path[0] not in ("runs", "checks") and "scalars" not in path:
        yield f"accepted another name for {key_path(path)}"
    again = experiment_from(parse_yaml(yaml.safe_dump(found.resolved)), folder / "case.yaml", for_training="train" in data)
    if again.config_hash != found.config_hash:
        yield f"{key_path(path)} = {junk!r} does not load to itself"


def test_the_configurations_that_are_changed_are_valid(tmp_path: Path):
    for base in BASES:
        _whole(BASES[base], tmp_path)


PLACES = [(base, path) for base, data in BASES.items() for path in _paths(data)]


@pytest.mark.reliability("R8")
@pytest.mark.parametrize("count", [150, pytest.param(4_000, marks=pytest.mark.slow)])
def test_one_changed_key(tmp_path: Path, reliability, count: int):
    wrong: list[str] = []
    tried = [0]

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.sampled_from(PLACES), JUNK, st.sampled_from(["replace"] * 6 + ["delete", "rename", "unknown"]))
    def one(place: tuple[str, tuple], junk: Any, how: str):
        tried[0] += 1
        wrong.extend(f"{place[0]}: {how} {text}" for text in complaints(*place, how, junk, tmp_path))

    one()
    reliability("R8", not wrong, "; ".join(dict.fromkeys(wrong)), cases=tried[0], failed=len(wrong))
    assert not wrong, "\n".join(dict.fromkeys(wrong))


@pytest.mark.reliability("R8")
@pytest.mark.parametrize("base", BASES)
def test_every_key_with_a_known_range_refuses_what_lies_outside(tmp_path: Path, reliability, base: str):
    """All of the extremes for all keys of the table that this configuration has."""
    wrong, tried = [], 0
    for path in _paths(BASES[base]):
        rule = rule_of(path)
        for junk in EXTREMES if rule is not None else ():
            if not rule(junk):
                tried += 1
                wrong += [f"{base}: {text}" for text in complaints(base, path, "replace", junk, tmp_path)]
    reliability("R8", not wrong, "; ".join(wrong), cases=tried, failed=len(wrong))
    assert not wrong, "\n".join(wrong)


@pytest.mark.reliability("R8")
@pytest.mark.parametrize(("family", "dims"), [("kuramoto_sivashinsky", 1), ("navier_stokes", 2), ("compressible", 2)])
def test_a_stepper_goes_with_its_solver_or_is_refused(tmp_path: Path, reliability, family: str, dims: int):
    wrong, tried = [], 0
    for solver in config.solver_tables()[family]:
        for stepper in config.catalogue("steppers"):
            try:
                found = experiment_from(case(family, solver, dims, stepper=stepper), tmp_path / "case.yaml")
            except ConfigError:
                continue
            tried += 1
            try:
                found.model_for("one").prepare(np.float32)
            except Exception as error:
                wrong.append(f"accepted {stepper} for {family} {solver}, then: {error}")
    reliability("R8", not wrong, "; ".join(wrong), cases=tried, failed=len(wrong))
    assert not wrong


TEXT = yaml.safe_dump(BASES["training"], default_flow_style=None, sort_keys=False)


@pytest.mark.reliability("R8")
def test_every_key_twice_is_refused(tmp_path: Path, reliability):
    wrong, lines = [], TEXT.splitlines()
    keys = [(i, m.group(1)) for i, line in enumerate(lines) for m in re.finditer(r"(?:^|[{,] ?)\s*(\w+):", line)]
    for i, key in keys:
        text = "\n".join([*lines[:i], lines[i].replace(f"{key}: ", f"{key}: 1, {key}: ", 1), *lines[i + 1 :]])
        text = text if "{" in lines[i] else "\n".join([*lines[:i], lines[i], lines[i], *lines[i + 1 :]])
        (tmp_path / "case.yaml").write_text(text)
        try:
            load_experiment(tmp_path / "case.yaml")
            wrong.append(f"accepted twice: {key}")
        except ConfigError as error:
            if "twice" not in str(error) and "not valid YAML" not in str(error):
                wrong.append(f"{key}: {error}")
    reliability("R8", not wrong, "; ".join(wrong), cases=len(keys), failed=len(wrong))
    assert not wrong, "\n".join(wrong)


BAD = ["runs.bare.dt=-1", "runs.bare.shpe=[8]", "equation=navier", "time.frames=1e3", "samples.count=99999999", "compare.at=.nan"]


@pytest.mark.reliability("R8")
def test_the_command_refuses_with_exit_code_2(server, tmp_path, reliability):
    (tmp_path / "case.yaml").write_text(RUN)
    wrong = []
    for override in BAD:
        done = server.run(["run", "case.yaml", override, "--out", "out"], tmp_path, cache=tmp_path / "cache")
        said = done.err.strip().splitlines()
        ok = done.code == 2 and len(said) == 1 and override.partition("=")[0].split(".")[0] in said[0]
        ok = ok and done.notes[-1]["cpu"] - done.notes[0]["cpu"] < 2 and not (tmp_path / "out").exists()
        wrong += [] if ok else [f"{override}: {done.code} {done.err}"]
    reliability("R8", not wrong, "; ".join(wrong), cases=len(BAD), failed=len(wrong))
    assert not wrong


@pytest.mark.slow
@pytest.mark.reliability("R8")
def test_a_refusal_takes_less_than_two_seconds_from_the_shell(tmp_path):
    (tmp_path / "case.yaml").write_text(RUN)
    spent = []
    for override in BAD[:3]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "hybridsim.cli", "run", "case.yaml", override]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 2


# --- R4 --------------------------------------------------------------------------------------------------------------------------

HUGE = [
    ("line", "reference.shape=[2000000000]", "GiB"),
    ("line", "samples.count=2000000000", "GiB"),
    ("line", "time.frames=2000000000", "GiB"),
    ("line", "runs.bare.dt=1e-12", "steps"),
    ("line", "reference.dt=1e-12", "steps"),
    ("line", "initial.warm_up=1e300", "steps"),
    ("line", "time.end=1e300", "steps"),
    ("line", "runs.bare.substeps=2000000000", ""),
    ("plane", "reference.shape=[100000, 100000]", "GiB"),
    ("plane", "reference.shape=[2147483647, 2147483647]", "GiB"),
    ("gas", "reference.shape=[200000, 200000]", "GiB"),
    ("gas", "samples.count=100000000", "GiB"),
    ("gas", "time.frames=1000000000", "GiB"),
    ("training", "train.data.trajectories=2000000000", "GiB"),
    ("training", "train.data.time=1e12", ""),
    ("training", "train.data.shape=[2000000000]", "GiB"),
    ("training", "train.batch=2000000000", ""),
    ("training", "train.unroll=[2000000000]", ""),
    ("line", "runs.learned.corrections[0].width=2000000000", ""),
]


@pytest.mark.reliability("R4")
@pytest.mark.parametrize(("base", "override", "word"), HUGE, ids=[f"{b} {o}" for b, o, _ in HUGE])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path: Path, monkeypatch, base: str, override: str, word: str):
    import tracemalloc

    monkeypatch.setattr(config, "machine_memory", lambda: 16.0 * config.GIB)
    data = copy.deepcopy(BASES[base])
    apply_override(data, override)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ConfigError) as error:
            _whole(data, tmp_path)
        assert time.process_time() - begin < 2
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()
    assert word in str(error.value), str(error.value)
    path = override.partition("=")[0].split(".")
    assert str(error.value).startswith(path[0]) or path[0] in str(error.value) or path[-1] in str(error.value), str(error.value)


def _whole(data: dict[str, Any], folder: Path) -> Experiment:
    """All checks that a command makes before it computes."""
    found = experiment_from(data, folder / "case.yaml", for_training="train" in data)
    if found.spec.train is not None:
        from hybridsim.training import check_fit, recipe_of

        check_fit(found, recipe_of(found.spec.train))
    return found
