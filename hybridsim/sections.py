"""The fixed sections of an experiment's YAML, with units and ranges: the reference of all keys.

Read `Spec` first: it is the whole file. What stands beside `use:` is not listed here; it goes to the constructor that `use:` names
and is checked against that constructor's own annotations (`config.py`).
"""

import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator

from hybridsim.yaml_reader import NUMBER, WORDS, KeyPath, key_path, nearest, show_value, suggestion

_PI = re.compile(r"(?P<factor>[-+]?(?:\d+\.?\d*|\.\d+)?(?:[eE][-+]?\d+)?)\s*\*?\s*(?:pi|π)\s*(?:/\s*(?P<divisor>\d+\.?\d*))?\Z")


def parse_length(value: Any) -> Any:
    """`2pi`, `2*pi`, `pi/2` as the number that they mean; anything else as it is."""
    if isinstance(value, str) and (match := _PI.match(value.strip())) and match["factor"][:1] not in ("e", "E"):
        factor = match["factor"]
        number = float(factor + "1" if factor in ("", "+", "-") else factor) * math.pi
        divisor = float(match["divisor"] or 1)
        return number / divisor if divisor else value
    return value


Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=1000)]
Courant = Annotated[float, Strict(), Field(gt=0, le=10, allow_inf_nan=False)]
Length = Annotated[float, BeforeValidator(parse_length), Strict(), Field(gt=0, allow_inf_nan=False)]
Shape = Annotated[list[Annotated[int, Strict(), Field(ge=2, le=2**31 - 1)]], Field(min_length=1, max_length=3)]
Label = Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
Precision = Literal["float32", "float64"]
Boundary = Literal["periodic", "no_slip", "free_slip", "reflecting", "fixed", "outflow"]


class Section(BaseModel):
    """A fixed part of an experiment: its keys are known, others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    says: ClassVar[str] = "this section"


class Use(BaseModel):
    """A name from a table, `package.module:Class` or `file.py:Class`, with the arguments of its constructor beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: Text = Field(description="a short name (see `hybridsim list`), package.module:Class or file.py:Class")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Structure(Section):
    """How a flux is kept dissipative, whatever its weights."""

    says: ClassVar[str] = "structure"
    form: Literal["pointwise", "average"] = Field(
        default="pointwise", description="where it may not add energy: at every point, or on average over the box"
    )
    c: Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.5, description="share of the diffusive limit that its coefficient may reach"
    )


class Correction(Use):
    """One closure of a run."""

    evaluate: Literal["stage", "step"] | Count = Field(
        "step", description="when it is evaluated: every stage, every solver step, or every n solver steps (n divides substeps)"
    )
    weights: Text | None = Field(default=None, description="trained weights: a shipped name, or a path relative to the YAML")
    seed: Whole = Field(default=0, description="seeds the untrained weights of the closure")
    structure: Literal["pointwise", "average"] | Structure | None = Field(
        default=None, description="keeps a Flux closure from adding energy in a step: pointwise, average, or a mapping"
    )


class Domain(Section):
    """The box."""

    says: ClassVar[str] = "domain"
    lengths: Annotated[list[Length], Field(min_length=1, max_length=3)] = Field(
        description="box length per axis; 2pi is understood"
    )
    boundaries: Annotated[list[Boundary | Annotated[list[Boundary], Field(min_length=2, max_length=2)]], Field(max_length=3)] = (
        Field(
            default_factory=list,
            description="per axis one kind, or [lower, upper]: periodic (default), no_slip, free_slip, reflecting, fixed, outflow",
        )
    )

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """(lower, upper) kind of boundary per axis."""
        given = self.boundaries or ["periodic"] * len(self.lengths)
        return tuple((b, b) if isinstance(b, str) else (b[0], b[1]) for b in given)


class Samples(Section):
    """The starts."""

    says: ClassVar[str] = "samples"
    count: Count = Field(default=4, description="how many random starts")
    seed: Whole = Field(default=1, description="seeds the starts")


class Time(Section):
    """The window."""

    says: ClassVar[str] = "time"
    end: Positive = Field(description="end of the runs, a time")
    frames: Count = Field(description="frames stored after the start, equally spaced")
    statistics_from: NotNegative | None = Field(
        default=None, description="spectra are averaged from here to the end (default: half)"
    )


class Reference(Section):
    """The fine run that all others are compared with."""

    says: ClassVar[str] = "reference"
    solver: Use = Field(default=Use(use="spectral"), description="the discretisation")
    shape: Shape = Field(description="cells per axis")
    dt: Positive | None = Field(default=None, description="time step; it is shortened to land on the frames")
    cfl: Courant | None = Field(default=None, description="time step as a fraction of the stable one at the starts (default 0.5)")
    stepper: Use | None = Field(
        default=None, description="time integrator (default: etdrk4 where there is a linear part, else ssprk3)"
    )
    precision: Precision = "float64"


class Run(Section):
    """One coarse run."""

    says: ClassVar[str] = "a run"
    title: Text | None = Field(default=None, description="how the report calls it")
    solver: Use = Field(description="the discretisation")
    shape: Shape = Field(description="cells per axis")
    dt: Positive | None = Field(default=None, description="time step; it is shortened to land on the frames")
    cfl: Courant | None = Field(default=None, description="time step as a fraction of the stable one at the starts (default 0.5)")
    stepper: Use | None = Field(
        default=None, description="time integrator (default: etdrk4 where there is a linear part, else ssprk3)"
    )
    adaptive: Flag = Field(
        default=False,
        description="choose the time step anew as the flow changes, by cfl and at most dt; it lands on the frames all the same",
    )
    substeps: Count = Field(default=1, description="solver steps per model step")
    precision: Precision = "float32"
    corrections: list[Correction] = Field(default_factory=list, description="closures, added up in this order")
    may_diverge: Flag = Field(default=False, description="a blow-up of this run is no failure")


class Compare(Section):
    """How runs are compared with the reference."""

    says: ClassVar[str] = "compare"
    modes: Count | None = Field(
        default=None, description="modes |k_i| ≤ K that are compared (default: half the coarsest N, minus 1)"
    )
    at: Positive | None = Field(
        default=None, description="time at which errors are quoted (default: of a gas time.end; of other flows no error is)"
    )


class Floors(Section):
    """Limits on what the floors under density and pressure did."""

    says: ClassVar[str] = "checks.floors"
    events: NotNegative | None = Field(default=None, description="how often a floor stood in, over all starts")
    mass: NotNegative | None = Field(default=None, description="the mass that it stood for, relative to the box's at the start")
    energy: NotNegative | None = Field(default=None, description="the energy that it stood for, relative to the box's at the start")


class Checks(Section):
    """Limits on the keys of summary.json: t95 and t80 must reach theirs, everything else must stay below."""

    says: ClassVar[str] = "checks"
    drift: NotNegative | None = Field(default=None, description="largest relative change of a conserved sum")
    divergence_max: NotNegative | None = Field(default=None, description="largest |∇·u|, in U_max/Δx")
    spectrum_error: NotNegative | None = Field(
        default=None, description="mean |ln E/E_ref| up to ⅔ of the run's own Nyquist wavenumber"
    )
    spectrum_error_common: NotNegative | None = Field(
        default=None, description="the same up to ⅔ of the Nyquist wavenumber of the coarsest run: on shells that all runs hold"
    )
    spectrum_worst: NotNegative | None = Field(default=None, description="largest |ln E/E_ref| up to ⅔ of the Nyquist wavenumber")
    frozen: NotNegative | None = Field(
        default=None, description="samples that end as a steady state or a travelling wave where the reference is chaotic"
    )
    statistics_error: NotNegative | None = Field(
        default=None, description="largest relative difference of a long-run mean from the reference's"
    )
    velocity_error: NotNegative | None = Field(
        default=None,
        description="relative L2 error of the velocity (of u in 1D) on |k_i| ≤ compare.modes at compare.at; not of a gas",
    )
    error: NotNegative | None = Field(
        default=None, description="gas: the larger of the relative L2 errors of ρ and √ρ v at compare.at"
    )
    density_error: NotNegative | None = Field(default=None, description="gas: relative L2 error of ρ at compare.at")
    weighted_velocity_error: NotNegative | None = Field(default=None, description="gas: relative L2 error of √ρ v at compare.at")
    pressure_error: NotNegative | None = Field(default=None, description="gas: relative L2 error of the pressure at compare.at")
    temperature_error: NotNegative | None = Field(
        default=None, description="cooling gas: L1 distance of the mass per temperature bin, over the mass"
    )
    floors: Floors | None = Field(default=None, description="gas: limits on events, mass and energy of floors")
    limited_faces: NotNegative | None = Field(default=None, description="gas: how often a flux was limited for positivity")
    bound_violations: NotNegative | None = Field(
        default=None, description="gas: stages with a time step beyond the bound of the positivity limiter"
    )
    t95: NotNegative | None = Field(default=None, description="least time at which the correlation falls below .95")
    t80: NotNegative | None = Field(default=None, description="least time at which the correlation falls below .80")
    seconds_per_unit_time: NotNegative | None = Field(default=None, description="largest cost")


class TrainingData(Section):
    """The trajectories that a closure learns from."""

    says: ClassVar[str] = "train.data"
    trajectories: Count = Field(default=8, description="for training")
    validation: Count = Field(default=4, description="for choosing, disjoint from training and from the runs' own starts")
    time: Positive = Field(default=20.0, description="length of each, after the warm-up")
    validation_time: Positive = Field(default=6.0, description="length of the validation trajectories")
    interval: Positive = Field(default=0.05, description="time between frames; a whole number of model steps lands on it")
    seed: Whole = Field(default=100, description="seeds their starts")
    shape: Shape | None = Field(default=None, description="cells of the fine run that makes them (default: the reference's)")
    precision: Precision = Field(default="float32", description="of that fine run")
    store: Literal["memory", "zarr"] = Field(default="memory", description="zarr: kept on disk and read piece by piece")
    together: Count | None = Field(
        default=None, description="zarr: trajectories that are made at once, and so have to fit in memory (default: all)"
    )


class Losses(Section):
    """What training minimises: a weight for each term; those that are not named are not computed."""

    says: ClassVar[str] = "train.loss"
    state: NotNegative = Field(default=0.0, description="relative squared error of the fields, weighted by |k|^2p, p = train.power")
    spectrum: NotNegative = Field(default=0.0, description="mean squared ln E/E_ref over the shells")
    dissipation: NotNegative = Field(default=0.0, description="squared ln of the ratio of ⟨|∇v|²⟩")
    transfer: NotNegative = Field(default=0.0, description="relative squared error of the energy flux through scales")
    temperature: NotNegative = Field(default=0.0, description="of a gas: relative squared error of p/ρ, each cell counting alike")
    phases: NotNegative = Field(default=0.0, description="of a gas: how the mass per range of temperature differs")
    residual: NotNegative = Field(default=0.0, description="relative squared distance from a frame of the solver without closures")


class Mesh(Section):
    """How a batch is shared out to devices."""

    says: ClassVar[str] = "train.mesh"
    batch: Count = Field(description="devices that share the windows of a batch; divides train.batch")


class Train(Section):
    """How the closure of one run is trained with the solver in the loop."""

    says: ClassVar[str] = "train"
    run: Text = Field(description="label of the run whose closures are trained")
    data: TrainingData = Field(default_factory=TrainingData, description="what it learns from")
    variants: list[dict[Text, Any]] = Field(
        default_factory=list,
        description="further references to learn from at once: each a mapping from key paths of this file to other values",
    )
    constants: Flag | None = Field(
        default=None, description="train the constants of classical closures (default: where the run has nothing else to train)"
    )
    unroll: Annotated[list[Count], Field(min_length=1)] = Field(
        default=[1, 2, 4, 8, 16, 32], description="frames (data.interval apart) unrolled, per phase"
    )
    updates: Annotated[list[Count], Field(min_length=1)] = Field(default=[200] * 6, description="optimiser updates, per phase")
    batch: Count = Field(default=8, description="trajectory pieces per update, shared out to the variants")
    loss: Losses = Field(default_factory=lambda: Losses(state=1.0), description="what is minimised")
    power: NotNegative = Field(
        default=0.5, description="p of the loss weight |k|^2p on the velocity error: 0 velocity, 1 vorticity"
    )
    warm_up: Whole = Field(default=0, description="frames that the model runs before the loss begins, without gradient")
    truncate: Whole = Field(default=0, description="frames after which gradients stop (0: never)")
    noise: NotNegative = Field(default=0.0, description="added to the starts of windows, in units of each channel's fluctuations")
    symmetries: Flag = Field(default=False, description="turn and mirror every window at random, as box and equation allow")
    rate: Positive = Field(default=2e-3, description="peak learning rate")
    rate_warm_up: Whole = Field(default=50, description="updates until it is reached; at most a tenth of all")
    schedule: Literal["cosine", "linear", "exponential", "constant"] = Field(default="cosine", description="how it falls then")
    final_rate: Annotated[Number, Field(ge=0, le=1)] = Field(default=0.02, description="what of it is left at the last update")
    weight_decay: NotNegative = Field(default=0.0, description="of AdamW; 0 is Adam")
    clip: Positive = Field(default=1.0, description="largest norm of the gradient")
    average: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0, description="γ of the moving average of the weights that is validated and kept (0: none)"
    )
    seeds: Annotated[list[Whole], Field(min_length=1)] = Field(default=[0], description="one training per seed")
    validate_every: Count = Field(default=200, description="updates between validations")
    choose: Literal["t95", "correlation", "error", "temperature_error"] = Field(
        default="t95", description="what decides which weights are kept"
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="the best weights by `choose`, or those of the last validation"
    )
    stop_after: Whole = Field(default=0, description="validations in a row without a better one that end the training (0: never)")
    memory: Positive = Field(default=512.0, description="MiB that the values which a gradient keeps of the unrolled steps may take")
    checkpoint_levels: Annotated[int, Strict(), Field(ge=0, le=8)] | None = Field(
        default=None, description="nested checkpointing of the unrolled steps (default: as `memory` allows)"
    )
    mesh: Mesh | None = Field(default=None, description="devices to share the batch (default: as many as divide it)")
    patience: Count = Field(default=20, description="updates in a row that may be skipped because they were not finite")
    rollbacks: Whole = Field(default=3, description="times that training then goes back to the last validated weights")
    log: list[Literal["jsonl", "tensorboard"]] = Field(default=["jsonl"], description="where every update is recorded")


Rank = Literal[
    "t95",
    "t80",
    "correlation",
    "error",
    "velocity_error",
    "spectrum_error",
    "spectrum_error_common",
    "statistics_error",
    "temperature_error",
]


class Sweep(Section):
    """An ablation: cases that differ in some keys, ranked by what they reach."""

    says: ClassVar[str] = "sweep"
    over: Annotated[dict[Text, list[Any] | dict[Text, dict[Text, Any]]], Field(min_length=1)] = Field(
        description="a key path with the list of its values, or a name with the key paths and values of each choice; "
        "every combination is a case"
    )
    run: Text | None = Field(default=None, description="label of the run that is ranked (default: train.run)")
    beside: list[Text] = Field(
        default_factory=list, description="labels of runs that every case of `hybridsim run` holds too, for comparison"
    )
    order: Literal["rank", "file"] = Field(default="rank", description="of the table: best first, or as the choices stand here")
    rank: Rank | None = Field(
        default=None, description="what ranks the cases (default: train.choose; of plain runs t95, of a gas error)"
    )


class Spec(Section):
    """The whole file."""

    says: ClassVar[str] = "an experiment"
    name: Label | None = Field(default=None, description="names the run's folder (default: the file's name)")
    title: Text | None = Field(default=None, description="headline of the report")
    equation: Use = Field(description="the physics")
    domain: Domain
    initial: Use = Field(description="the initial states")
    samples: Samples = Field(default_factory=Samples)
    time: Time
    reference: Reference
    runs: Annotated[dict[Label, Run], Field(min_length=1)] = Field(description="label: coarse run")
    compare: Compare = Field(default_factory=Compare)
    checks: dict[str, Checks] = Field(default_factory=dict, description="label of a run, or `all`: limits")
    train: Train | None = None
    sweep: Sweep | None = None


class Limit(Section):
    """How long any closure on a coarse grid could follow the fine run: see `hybridsim.predictability`."""

    says: ClassVar[str] = "a predictability limit"
    shape: Shape = Field(description="grid of the fine runs that differ only in what the coarse grids do not hold")
    end: Positive | None = Field(default=None, description="how long they run (default: time.end)")


class Family(Section):
    """One family of a benchmark: an experiment with closures, their rivals and a reference."""

    says: ClassVar[str] = "a family"
    experiment: Text = Field(description="a YAML file, or the name of a shipped experiment")
    runs: list[Text] = Field(default_factory=list, description="labels of its runs that take part; * is any part (default: all)")
    change: dict[Text, Any] = Field(default_factory=dict, description="key paths of the experiment and values for them")
    rivals: dict[Label, dict[Text, Any]] = Field(default_factory=dict, description="label: one more run, as in the experiment")
    peers: dict[Text, dict[Label, dict[Text, Any]]] = Field(
        default_factory=dict, description="package: rivals that need it, as in `rivals`; left out where it is not installed"
    )
    ladders: dict[Text, Annotated[list[Count], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="label of a run: points along the first axis of more runs like it, their time step as their spacing",
    )
    tune: bool = Field(
        default=True,
        description="whether each run takes the largest time step that keeps its accuracy within 2 %",
    )
    long: Positive | None = Field(
        default=None, description="how long a time step must be stable for the second rule of time steps (default: no such rule)"
    )
    limit: Limit | None = Field(default=None, description="measures the predictability limit (default: no)")
    quick: dict[Text, Any] | None = Field(default=None, description="the same for --quick; families without are left out there")
    quick_runs: list[Text] = Field(
        default_factory=list, description="labels of the runs that take part in --quick (default: `runs`)"
    )


class Bench(Section):
    """A whole benchmark."""

    says: ClassVar[str] = "a benchmark"
    title: Text = Field(default="Coarse against fine, at equal accuracy", description="headline of the page")
    families: Annotated[dict[Label, Family], Field(min_length=1)] = Field(description="name: family")
    rounds: Count = Field(default=15, description="how often every run is timed, all of them in turn")
    resamples: Count = Field(default=1000, description="draws of starts, rounds and training seeds behind every interval")


# --- what pydantic found, in one sentence ----------------------------------------------------------------------------------------

_NEEDS = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a word",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "none_required": "null",
    "finite_number": "a finite number",
}


def _needs(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _NEEDS:
        return _NEEDS[kind]
    if kind == "literal_error":
        return "one of " + context["expected"]
    bounds = {
        "greater_than": ("gt", ">"),
        "greater_than_equal": ("ge", "≥"),
        "less_than": ("lt", "<"),
        "less_than_equal": ("le", "≤"),
    }
    if kind in bounds:
        name, sign = bounds[kind]
        return f"a number {sign} {context[name]:g}" if isinstance(context[name], float) else f"a number {sign} {context[name]}"
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        n = context["min_length" if few else "max_length"]
        return f"at {'least' if few else 'most'} {n} {'entry' if n == 1 else 'entries'}"
    if kind == "string_too_short":
        return "a word that is not empty"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind == "string_pattern_mismatch":
        return "a name of letters, digits, '_', '-' and '.' that starts with a letter or a digit (it names files)"
    return re.sub(r"^Input should be |^Value error, ", "", str(error["msg"]))


def _locate(loc: Sequence[Any], data: Any, missing: bool) -> tuple[KeyPath, Any]:
    """The part of pydantic's location that exists in the data (the rest names members of unions)."""
    parts: list[str | int] = []
    for i, part in enumerate(loc):
        known_key = isinstance(data, Mapping) and isinstance(part, str) and part in data
        if known_key or (isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)):
            data = data[part]  # pyright: ignore[reportCallIssue, reportArgumentType]
        elif missing and i == len(loc) - 1:
            pass
        else:
            continue
        parts.append(part)
    return tuple(parts), data


def _model_at(model: Any, path: Sequence[str | int]) -> type[BaseModel] | None:
    """The pydantic model that describes what stands at `path`."""

    def inner(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for a in typing.get_args(annotation) if (found := inner(a))), None)

    here, container = inner(model), False
    for part in path:
        if here is None:
            return None
        if container:
            container = False
            continue
        fields = {f.alias or n: f for n, f in here.model_fields.items()}
        if part not in fields:
            return None
        annotation = fields[part].annotation
        container = any(typing.get_origin(a) in (dict, list) for a in (annotation, *typing.get_args(annotation)))
        here = inner(annotation)
    return None if container else here


def argument_names(model: type[BaseModel]) -> list[str]:
    return [f.alias or n for n, f in model.model_fields.items()]


def explain(error: ValidationError, model: type[BaseModel], data: Any, at: KeyPath = (), who: str | None = None) -> str:
    """One sentence for what pydantic found first; `at` stands before its key paths, `who` takes the arguments."""
    found: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for e in error.errors(include_url=False):
        path, _ = _locate(e["loc"], data, e["type"] == "missing")
        found.setdefault(path, []).append(e)
    rank = {"extra_forbidden": 0, "missing": 1}
    path = min(found, key=lambda p: (min(rank.get(e["type"], 2) for e in found[p]), -len(p)))
    errors = found[path]
    kind, where = errors[0]["type"], key_path((*at, *path))
    if kind in ("extra_forbidden", "missing"):
        owner = _model_at(model, path[:-1]) or model
        name = str(path[-1])[:60]
        says = who or getattr(owner, "says", owner.__name__)
        here = _locate(path[:-1], data, False)[1]
        possible = argument_names(owner)
        if owner is Use or owner is Correction:
            where, says = key_path((*at, *path[:-1])), "a mapping here"
        if kind == "extra_forbidden":
            if not possible:
                return f"{where}: {says} takes no '{name}', and nothing else"
            return f"{where}: {says} takes no '{name}'; {suggestion(name, possible, 'it takes')}"
        others = [k for k in here if k not in possible] if isinstance(here, Mapping) else []
        match = nearest(name, others)
        return f"{where}: {says} needs {name!r}" + (f"; did you mean that by '{match}'?" if match else ", which is missing")
    value = errors[0]["input"]
    for e in errors:
        if len(e["loc"]) and _locate(e["loc"], data, False)[0] == path:
            value = e["input"]
    needs = list(dict.fromkeys(_needs(e) for e in errors))
    deeper = _model_at(model, path)
    if deeper is not None and issubclass(deeper, Use):
        needs = ["a name, or a mapping with 'use'"]
    if len(needs) > 1:
        # "a word" beside the list of words says nothing
        needs = [n for n in needs if n not in ("null", "a word")] or needs
    hint = ""
    if isinstance(value, str):
        literal = [e["ctx"]["expected"] for e in errors if e["type"] == "literal_error"]
        options = re.findall(r"'([^']*)'", " ".join(literal))
        if options and (match := nearest(value, options)):
            hint = f"; did you mean {match!r}?"
        elif NUMBER.match(value) or value in WORDS:
            hint = "; remove the quotes"
    found_text = f"{len(value)}" if kind in ("too_short", "too_long") and hasattr(value, "__len__") else show_value(value)
    return f"{where}: needs {' or '.join(needs)}, found {found_text}{hint}"
