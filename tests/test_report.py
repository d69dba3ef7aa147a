"""The report of made-up experiments: two solvers, five runs, one of which diverges half way; and one of every other family."""

import base64
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import xarray as xr
import yaml

from hybridsim import diagnostics, drawing, figures, gas, report, results, storage, words
from hybridsim.contract import Variable
from hybridsim.experiment import _pdf
from hybridsim.grid import Grid
from hybridsim.solvers.compressible import CompressibleNavierStokes
from hybridsim.solvers.cooling import PowerLawCooling
from hybridsim.solvers.finite_volume import StaggeredFiniteVolume
from hybridsim.solvers.godunov import CompressibleFiniteVolume
from hybridsim.solvers.incompressible import NavierStokes
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.spectral import Spectral2D, Spectral3D

TWO_PI = 2 * np.pi
FINE = Grid((64, 64), (TWO_PI, TWO_PI))
TIMES = np.linspace(0, 5, 26)
MODES = 15
CONFIG = """\
name: coarse_turbulence
equation: {use: navier_stokes, viscosity: 1.0e-3, forcing: {use: kolmogorov, wavenumber: 4, amplitude: 1.0, drag: 0.1}}
domain: {lengths: [6.283185307179586, 6.283185307179586]}
time: {end: 5.0, frames: 25, statistics_from: 2.0}
reference: {solver: spectral, shape: [256, 256], precision: float64}
runs:
  bare_32: {solver: spectral, shape: [32, 32], dt: 0.02, stepper: etdrk4}
  learned_32: {solver: spectral, shape: [32, 32], dt: 0.02, corrections: [{use: learned_flux, weights: kolmogorov_32}]}
  bare_64: {solver: finite_volume, shape: [64, 64], dt: 0.014, stepper: ssprk3}
  smagorinsky_64: {solver: finite_volume, shape: [64, 64], dt: 0.014, corrections: [{use: smagorinsky, cs: 0.17}]}
  learned_64: {solver: finite_volume, shape: [64, 64], dt: 0.014, corrections: [{use: "my_closure.py:Flux", width: 8}]}
compare: {modes: 15}
"""
HOSTILE = "<script>alert('$x_1$')</script>"


def stored(ds, file, mode="w", group=None):
    """Written as `storage.save_groups` does, one group at a time."""
    ds.to_netcdf(file, mode=mode, group=group, engine="netcdf4", encoding=storage._encoding(ds, 2))


def velocity_on(grid, variables, modes, hat):
    """Velocity of the streamfunction Σ ψ̂ exp(i n · x) on a grid, by exact sampling at each variable's place."""
    kx, ky = modes
    out = []
    rows, columns = np.nonzero((2 * np.abs(kx) < grid.shape[0]) & (2 * np.abs(ky) < grid.shape[1]))
    nx, ny = kx[rows, columns].astype(int), ky[rows, columns].astype(int)
    for variable, factor in zip(variables, (1j * ny, -1j * nx), strict=True):
        phase = np.exp(1j * sum(n * a * h for n, a, h in zip((nx, ny), variable.at, grid.spacing, strict=True)))
        placed = np.zeros((*hat.shape[:-2], *grid.shape), dtype=complex)
        placed[..., nx, ny] = hat[..., rows, columns] * factor * phase
        out.append(np.fft.ifft2(placed).real * grid.cells)
    return np.stack(out, axis=-3)


def random_flow(rng, samples, modes):
    """ψ̂(sample, time, kx, ky) of a field with E ~ k³ … k⁻³ whose phases turn with the eddy rate."""
    n = np.arange(-modes, modes + 1.0)
    kx, ky = np.meshgrid(n, n, indexing="ij")
    k = np.hypot(kx, ky)
    size = np.where(k > 0, np.maximum(k, 1e-9) ** -1.5 * np.sqrt(k**3 / (1 + (k / 4) ** 6)) / np.maximum(k, 1), 0)
    start = size * np.exp(1j * rng.uniform(0, TWO_PI, (samples, 1, *k.shape)))
    turn = rng.standard_normal((samples, 1, *k.shape)) * 0.5 * np.maximum(k, 1e-9) ** (2 / 3)
    return (kx, ky), start * np.exp(1j * turn * TIMES[:, None, None])


def make_folder(path, *, samples=3, hostile=False):
    rng = np.random.default_rng(7)
    psi, truth = random_flow(rng, samples, 31)
    _, other = random_flow(rng, samples, 31)
    k = np.hypot(*psi)
    groups = {
        "spectral_32x32": (Grid((32, 32), (TWO_PI, TWO_PI)), (0.5, 0.5), (0.5, 0.5), (np.abs(psi[0]) < 16) & (np.abs(psi[1]) < 16)),
        "finite_volume_64x64": (Grid((64, 64), (TWO_PI, TWO_PI)), (1.0, 0.5), (0.5, 1.0), k >= 0),
    }
    reference = path / "reference.nc"
    filtered = {}
    for i, (name, (grid, at_u, at_v, keep)) in enumerate(groups.items()):
        variables = (Variable("u", "1", at_u), Variable("v", "1", at_v))
        ds = diagnostics.field_dataset(velocity_on(grid, variables, psi, truth * keep), TIMES, grid, variables)
        ds = diagnostics.with_diagnostics(ds, grid, variables, statistics_from=2.0)
        stored(ds, reference, mode="w" if i == 0 else "a", group=name)
        filtered[name] = (ds, grid, variables, keep)
    variables = (Variable("u", "1", (0.5, 0.5)), Variable("v", "1", (0.5, 0.5)))
    shots = [5, 10, 15, 20]
    fine = diagnostics.field_dataset(velocity_on(FINE, variables, psi, truth[:1, shots]), TIMES[shots], FINE, variables)
    stored(fine, reference, mode="a", group="fine")
    decay = 1 - 2e-9 * np.exp(3.5 * TIMES) * np.linspace(0.4, 2, samples)[:, None]
    half = xr.Dataset({"correlation": (("sample", "time"), np.clip(decay, 0, 1))}, {"time": TIMES})
    until = diagnostics.crossing_time(TIMES, half["correlation"].mean("sample").values, 0.99)[0]
    half.attrs.update(converged_until=until, shape=[256, 256], half_shape=[128, 128], dt=0.002)
    stored(half, reference, mode="a", group="convergence")

    recipes = {
        "bare_32": ("spectral_32x32", 1.0, 0.04, 0.3),
        "learned_32": ("spectral_32x32", 3.6, 0.09, 0.05),
        "bare_64": ("finite_volume_64x64", 1.5, 0.2, -0.6),
        HOSTILE if hostile else "smagorinsky_64": ("finite_volume_64x64", 1.9, 0.25, -0.9),
        "learned_64": ("finite_volume_64x64", 3.3, 0.5, -0.1),
    }
    runs = {}
    for label, (group, t95, cost, tilt) in recipes.items():
        ds_ref, grid, variables, keep = filtered[group]
        stretch = np.linspace(0.85, 1.15, samples)[:, None]
        angle = np.minimum(np.pi / 2, np.arccos(0.95) * (TIMES / (t95 * stretch)) ** 3)[..., None, None]
        mixed = (np.cos(angle) * truth + np.sin(angle) * other) * keep
        u = velocity_on(grid, variables, psi, mixed * np.exp(tilt * (k / 12) ** 2 * np.minimum(TIMES, 2)[:, None, None] / 2))
        u = u * (1 + 1e-7 * rng.standard_normal(u.shape))
        outcome = "finished"
        if label == "smagorinsky_64":
            outcome = "diverged at t = 2.6"
            u[:, 14:] = np.nan
        u = u.astype(np.float32)
        attrs = {"label": label, "reference_group": group, "outcome": outcome, "version": "0.1.0", "title": "made up"}
        ds = diagnostics.field_dataset(u, TIMES, grid, variables, attrs)
        ds = diagnostics.with_diagnostics(ds, grid, variables, reference=ds_ref, modes=MODES, statistics_from=2.0)
        name = "hostile" if label == HOSTILE else label
        stored(ds, path / f"{name}.nc")
        rho = ds["correlation"].values
        found95, found80 = (diagnostics.t_correlated(TIMES, rho, level) for level in (0.95, 0.8))
        error = diagnostics.spectrum_error(
            ds["spectrum"].mean("sample").values,
            ds_ref["spectrum"].mean("sample").values,
            np.arange(ds.sizes["wavenumber"]),
            grid.shape,
        )
        learned = label.startswith("learned")
        last = ds["drift"].isel(time=10).max("sample")
        runs[label] = {
            "outcome": outcome,
            "accuracy": {"metric": "t95", "value": found95.time},
            "t95": found95.time,
            "t95_at_least": found95.at_least,
            "t80": found80.time,
            "t80_at_least": found80.at_least,
            "spectrum_error": error if np.isfinite(error) else None,
            "drift": {v: float(last.sel(variable=v)) for v in ("u", "v")},
            "divergence_max": float(ds["divergence_max"].isel(time=slice(0, 10)).max()),
            "seconds_per_unit_time": cost,
            "cell_steps_per_second": 1e7,
            "compile_seconds": 1.5,
            "parameters": 4210 if learned else 0,
            "steps": 400,
            "dt": 0.02 if group.startswith("spectral") else 0.014,
        }
    checks = [
        {
            "name": "drift",
            "run": label,
            "value": 3e-8,
            "limit": 1e-6,
            "passed": True,
            "sentence": f"{label}: momentum drift 3.0e-08 ≤ 1.0e-06",
        }
        for label in runs
    ]
    checks.append(
        {
            "name": "spectrum_error",
            "run": "learned_32",
            "value": runs["learned_32"]["spectrum_error"],
            "limit": 0.01,
            "passed": False,
            "sentence": "learned_32: spectrum_error is above 0.01",
        }
    )
    summary = {
        "name": HOSTILE if hostile else "coarse_turbulence",
        "device": "cpu (2 cores)",
        "precision": "float32",
        "versions": {"hybridsim": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6"},
        "config_hash": "3f9a1c07b2",
        "runs": runs,
        "checks": checks,
        "reference": {"converged_until": until, "shape": [256, 256], "dt": 0.002, "seconds": 61.0, "cached": False},
    }
    (path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    updates = np.arange(600)
    unroll = np.array([4, 8, 16, 32])[np.minimum(3, updates // 150)]
    loss = 0.05 * np.exp(-(updates % 150) / 60) / (1 + updates / 80) * np.exp(0.25 * rng.standard_normal(600))
    history = [
        {"update": int(i), "loss": float(x), "unroll": int(h), "rate": 1e-3, "seconds": 0.2 * i}
        for i, x, h in zip(updates, loss, unroll, strict=True)
    ]
    for i in range(49, 600, 50):
        history[i]["validation"] = {"t95": 1.5 + 2 * (1 - np.exp(-i / 200)) + 0.1 * float(rng.standard_normal())}
    (path / "training.json").write_text(json.dumps(history), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_folder(tmp_path_factory.mktemp("run"))
    report.write_report(path)
    return path


class Page(html.parser.HTMLParser):
    """Tags that stay open, what is loaded, and the text."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_page_holds_everything_and_loads_nothing(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert "script" not in page.tags
    assert page.sources
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    names = {"vorticity", "correlation", "spectra", "conservation", "cost", "energy", "convergence", "training"}
    assert {file.stem for file in (folder / "figures").glob("*.png")} == names
    inlined = [base64.b64decode(s.partition(",")[2]) for s in page.sources]
    assert sorted(inlined) == sorted(file.read_bytes() for file in (folder / "figures").glob("*.png"))
    shown = " ".join(page.text).replace("\u00a0", " ")
    for part in (
        "learned_64",
        "bare_32",
        "diverged at t = 2.6",
        "3f9a1c07b2",
        "2 cores",
        "jax 0.10.2",
        "float32",
        "cs 0.17",
        "use: kolmogorov",
    ):
        assert part in shown, part
    assert not list(folder.glob("**/.*"))


def test_figures_are_not_blank(folder):
    from matplotlib.image import imread

    for file in (folder / "figures").glob("*.png"):
        picture = imread(file)[..., :3]
        assert 600 < picture.shape[1] < 2400, file.name
        assert (picture.min(axis=-1) < 0.8).mean() > 0.005, file.name
        # nothing is cut off: the outermost pixels are paper
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge > 0.99).all(), file.name


def words_on(figure):
    """Every text that is drawn, ticks within view included."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        yield from (axes.title, axes._left_title, axes._right_title, *axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    yield from (label for label in (tick.label1, tick.label2) if label.get_visible())


def assert_words_stay_apart(found, *recipes):
    """No text on a figure leaves the paper or lies on another one: on every figure of the page, or on those of some `recipes`."""
    import matplotlib

    with matplotlib.rc_context(drawing.STYLE):
        drawn = ((recipe.__name__, recipe(found)) for recipe in recipes)
        for name, figure in drawn if recipes else ((name, figure) for name, _, _, figure in report._figures(found)):
            if figure is None:
                continue
            figure.draw_without_rendering()
            renderer = figure.canvas.get_renderer()
            shown = [w for w in words_on(figure) if w.get_visible() and w.get_text().strip()]
            boxes = [(w.get_text(), w.get_window_extent(renderer).padded(-1)) for w in shown]
            assert len(boxes) > 6, name
            for i, (first, a) in enumerate(boxes):
                assert figure.bbox.x0 - 1 <= a.x0, (name, first)
                assert a.x1 <= figure.bbox.x1 + 1, (name, first)
                assert figure.bbox.y0 - 1 <= a.y0, (name, first)
                assert a.y1 <= figure.bbox.y1 + 1, (name, first)
                for second, b in boxes[i + 1 :]:
                    assert not a.overlaps(b), (name, first, second)


def test_words_on_figures_do_not_overlap(folder):
    assert_words_stay_apart(results.read_folder(folder))


def test_runs_keep_their_colours(folder):
    found = results.read_folder(folder)
    colours = {r.label: r.colour for r in found.runs}
    assert len(set(colours.values())) == len(colours)
    figure = figures.correlation_figure(found)
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert {k: drawn[k] for k in colours} == colours
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f"background:{c}" in text for c in colours.values())


def test_best_values_are_bold_and_diverged_runs_are_not(folder):
    rows = {r["label"]: r for r in report._rows(results.read_folder(folder))}
    best95 = [label for label, r in rows.items() if r["cells"][1]["best"]]
    assert best95 == ["learned_32"]
    assert not any(c["best"] for c in rows["smagorinsky_64"]["cells"])
    assert rows["bare_32"]["bare"]
    assert not rows["learned_64"]["bare"]
    assert rows["smagorinsky_64"]["closure"] == "smagorinsky (cs 0.17)"
    assert rows["learned_64"]["closure"] == "Flux (width 8)"
    within = {"use": "learned_flux", "width": 8, "weights": "trained", "structure": {"form": "average", "c": 0.5}}
    assert words.show_part(within) == "learned flux (trained, average structure)"


def test_missing_parts_leave_their_figures_out(tmp_path):
    make_folder(tmp_path, samples=1)
    (tmp_path / "reference.nc").unlink()
    (tmp_path / "training.json").unlink()
    (tmp_path / "learned_32.nc").unlink()
    (tmp_path / "config.yaml").unlink()
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "learned_32" in page
    assert {f.stem for f in (tmp_path / "figures").iterdir()} == {"vorticity", "correlation", "conservation", "cost", "energy"}
    with pytest.raises(FileNotFoundError, match=r"no summary\.json"):
        report.write_report(tmp_path / "figures")


def test_hostile_names_stay_text(tmp_path):
    make_folder(tmp_path, samples=1, hostile=True)
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert HOSTILE in "".join(page.text)


SUMMARY = {
    "runs": {
        "bare": {"outcome": "finished", "t95": 1.5},
        "eddy": {"outcome": "finished", "t95": 1.2},
        "learned": {"outcome": "finished", "t95": 3.3},
    },
    "checks": [{"name": "drift", "run": "bare", "passed": True}, {"name": "spectrum_error", "run": "learned", "passed": True}],
}


def test_verdict():
    assert words.verdict(SUMMARY) == "All 2 checks passed. learned keeps ρ ≥ 0.95 to t = 3.30, 2.2 times as long as bare (1.50)."
    failed = SUMMARY | {"checks": [SUMMARY["checks"][0], SUMMARY["checks"][1] | {"passed": False}]}
    assert words.verdict(failed).startswith("1 of 2 checks failed (learned: spectrum_error).")
    runs = SUMMARY["runs"]
    worse = {"runs": {"bare": runs["bare"], "eddy": runs["eddy"]}, "checks": []}
    assert words.verdict(worse) == "eddy keeps ρ ≥ 0.95 to t = 1.20, 0.8 times as long as bare (1.50): no gain."
    never = {"runs": runs | {"learned": {"outcome": "finished", "t95": None, "t95_at_least": 5.0}}, "checks": []}
    assert words.verdict(never).endswith("learned keeps ρ ≥ 0.95 beyond t = 5, at least 3.3 times as long as bare (1.50).")
    blown = {"runs": {"learned": {"outcome": "diverged at t = 2", "t95": 1.0}}, "checks": []}
    assert words.verdict(blown).startswith("learned diverged at t = 2.")
    assert words.verdict({}) == "Finished; nothing was compared or checked."


def test_verdict_compares_within_one_grid(folder):
    found = results.read_folder(folder)
    text = words.verdict(found.summary, found.config)
    assert "smagorinsky_64 diverged at t = 2.6." in text
    assert re.search(r"On 32 × 32 spectral, learned_32 keeps .* as bare_32", text)
    assert re.search(r"On 64 × 64 finite volume, learned_64 keeps .* as bare_64", text)


def test_numbers():
    assert [words.show_number(x) for x in (None, np.nan, np.inf, 0.0, 1.23456, 123456.0, 4.56e-8, 99999.0)] == [
        "–",
        "–",
        "∞",
        "0",
        "1.23",
        "1.2 × 10⁵",
        "4.6 × 10⁻⁸",
        "99999",
    ]


def test_training_figure(tmp_path):
    history = [{"epoch": i, "loss": 1 / (i + 1), "unroll": 4 + i // 2} for i in range(8)]
    assert figures.training_figure(history, tmp_path / "loss.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no record"):
        figures.training_figure([], tmp_path / "none.png")


def test_matplotlib_is_imported_late():
    import subprocess
    import sys

    code = "import sys, hybridsim.report; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Lines, three dimensions, walls, scalars

LINE = KuramotoSivashinsky()
FLOW = NavierStokes(0.01)
DYED = NavierStokes(0.01, None, {"dye": 0.01, "heat": 0.02})
FAMILIES = {
    "line": ((100.0,), (), (128,), {"spectral_48": SpectralKS, "finite_volume_64": FiniteVolumeKS}, LINE),
    "box": ((TWO_PI,) * 3, (), (12, 12, 12), {"spectral_8x8x8": Spectral3D, "finite_volume_6x6x6": StaggeredFiniteVolume}, FLOW),
    "walls": ((4.0, 1.0), ("periodic", "no_slip"), (32, 16), {"finite_volume_16x8": StaggeredFiniteVolume}, FLOW),
    "scalar": ((2.0, 3.0), (), (32, 48), {"spectral_16x24": Spectral2D, "finite_volume_8x12": StaggeredFiniteVolume}, DYED),
}
USUAL = {"correlation", "conservation", "cost", "energy", "convergence"}
FIGURES = {
    "line": USUAL | {"spacetime", "spectra", "distribution", "statistics"},
    "box": USUAL | {"vorticity", "spectra", "distribution", "statistics"},
    "walls": USUAL | {"vorticity", "statistics"},
    "scalar": USUAL | {"vorticity", "scalar", "spectra", "statistics"},
}


def waves(solver, seed, samples, times):
    """Travelling waves, the same on every grid: `(sample, time, c, *grid)`."""
    rng, grid = np.random.default_rng(seed), solver.grid
    reach = 10 if grid.ndim == 1 else 2
    out = np.zeros((samples, times.size, len(solver.variables), *grid.shape))
    for sample in range(samples):
        for c, variable in enumerate(solver.variables):
            for _ in range(8):
                n, phase = rng.integers(1, reach, grid.ndim, endpoint=True), rng.uniform(0, TWO_PI)
                x = sum(TWO_PI * m * q / length for m, q, length in zip(n, grid.mesh(variable.at), grid.lengths, strict=True))
                turn = rng.normal() * 0.1
                out[sample, :, c] += np.cos(x + phase + turn * times.reshape(-1, *(1,) * grid.ndim))
    return out


def make_family(path, family, *, samples=2):
    """A run's folder: per filter a bare run that loses the reference slowly and, in the first, one that diverges."""
    lengths, boundaries, fine_shape, solvers, equation = FAMILIES[family]
    times = np.linspace(0, 200 if family == "line" else 5, 41)
    end, reference, runs, settings = float(times[-1]), path / "reference.nc", {}, {}
    for i, (group, make) in enumerate(solvers.items()):
        shape = [int(n) for n in group.rpartition("_")[2].split("x")]
        solver = make(Grid(shape, lengths, boundaries), equation)
        grid, variables = solver.grid, solver.variables
        truth, other = waves(solver, 1, samples, times), waves(solver, 2, samples, times)
        known = diagnostics.field_dataset(truth, times, grid, variables)
        known = diagnostics.with_diagnostics(known, grid, variables, solver=solver, statistics_from=end / 2)
        values = diagnostics.compared_field(truth, grid, variables, solver)
        known = known.assign(pdf=_pdf(values, solver))
        stored(known, reference, mode="w" if i == 0 else "a", group=group)
        for label in [f"bare_{i}", "wild"] if i == 0 else [f"bare_{i}"]:
            angle = np.minimum(np.pi / 2, (times / end * (4 + 2 * i)) ** 2 / 3).reshape(-1, *(1,) * (grid.ndim + 1))
            u = np.cos(angle) * truth + np.sin(angle) * other
            outcome = "finished"
            if label == "wild":
                u[:, 12:14] *= 1e4
                u[:, 14:] = np.nan
                outcome = "diverged at t = 1.7"
            attrs = {"label": label, "reference_group": group, "outcome": outcome}
            ds = diagnostics.field_dataset(u.astype(np.float32), times, grid, variables, attrs)
            ds = diagnostics.with_diagnostics(ds, grid, variables, solver=solver, reference=known, modes=3, statistics_from=end / 2)
            values = diagnostics.compared_field(u, grid, variables, solver)
            stored(ds.assign(pdf=_pdf(values, solver, known["pdf"])), path / f"{label}.nc")
            found = {level: diagnostics.t_correlated(times, ds["correlation"].values, level) for level in (0.95, 0.8)}
            gone = {
                key: "of a reason"
                for key, name in (("spectrum_error", "spectrum"), ("divergence_max", "divergence_max"), ("drift", "drift"))
                if name not in ds
            }
            good = label != "wild"
            row = {"mean": 1.1, "standard_error": 0.02 * samples if samples > 1 else None, "reference": 1.0, "difference": 0.1}
            row["reference_standard_error"] = row["standard_error"]
            names = [name for name in figures.STATISTICS if name in ds] + [f"scalar_variance:{c}" for c in ("dye",) if c in ds]
            bad = dict.fromkeys(row)
            runs[label] = {
                "outcome": outcome,
                "t95": found[0.95].time,
                "t95_at_least": found[0.95].at_least,
                "t80": found[0.8].time,
                "t80_at_least": found[0.8].at_least,
                "spectrum_error": 0.1 if good and "spectrum" in ds else None,
                "statistics": dict.fromkeys(names, row if good else bad),
                "statistics_error": 0.1 if good else None,
                "wasserstein": 0.05 if good else None,
                "drift": {str(v): 1e-7 for v in ds["variable"].values} if "drift" in ds else {},
                "divergence_max": 1e-6 if "divergence_max" in ds else None,
                "not_defined": gone,
                "seconds_per_unit_time": 0.01 * (1 + i),
                "dt": 0.1,
            }
            settings[label] = {"solver": group.rpartition("_")[0], "shape": shape}
    solver = make(Grid(fine_shape, lengths, boundaries), equation)
    fine = diagnostics.field_dataset(waves(solver, 1, 1, times[::10]), times[::10], solver.grid, solver.variables)
    fine = diagnostics.with_vorticity(fine, solver.grid, solver.variables, solver)
    stored(fine, reference, mode="a", group="fine")
    half = xr.Dataset({"correlation": (("sample", "time"), 1 - 1e-5 * (1 + times[None]) ** 2)}, {"time": times})
    stored(half.assign_attrs(converged_until=0.8 * end), reference, mode="a", group="convergence")
    config = {
        "equation": {"use": "some_equation"} | ({"scalars": dict(equation.scalars)} if family == "scalar" else {}),
        "domain": {"lengths": list(lengths), "boundaries": list(boundaries)},
        "runs": settings,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (path / "summary.json").write_text(json.dumps({"name": family, "runs": runs, "checks": []}), encoding="utf-8")
    return path


@pytest.fixture(
    scope="module", params=[n if n in ("line", "scalar") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def family(request, tmp_path_factory):
    path = make_family(tmp_path_factory.mktemp(request.param), request.param)
    report.write_report(path)
    return request.param, path


def test_every_family_has_its_figures(family):
    from matplotlib.image import imread

    name, path = family
    files = list((path / "figures").glob("*.png"))
    assert {f.stem for f in files} == FIGURES[name]
    for file in files:
        picture = imread(file)[..., :3]
        assert 600 < picture.shape[1] < 2400, file.name
        assert (picture.min(axis=-1) < 0.8).mean() > 0.004, file.name
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge > 0.99).all(), file.name


def test_words_stay_apart_in_every_family(family):
    assert_words_stay_apart(results.read_folder(family[1]))


def test_captions_tell_the_truth(family):
    name, path = family
    text = " ".join(Page((path / "report.html").read_text(encoding="utf-8")).text).replace("\u00a0", " ")
    says = {
        "line": ("Time runs to the right", "u on the modes |n| ≤ 3,", "mean squares of u, uₓ and uₓₓ", "Distribution of u"),
        "box": ("normal to z", "Vorticity on the modes |n| ≤ 3 per axis", "Energy, enstrophy and dissipation", "divergence"),
        "walls": ("one-sided at walls", "Vorticity, each run", "mean energy and enstrophy", "with walls"),
        "scalar": ("Scalar dye of the first start", "passive scalars dye, heat", "scalar variance", "Compensated spectra"),
    }
    says_not = {
        "line": ("vorticity", "Vorticity", "divergence", "Compensated", "per axis", "enstrophy"),
        "box": ("walls", "scalar", "Time runs"),
        "walls": ("|n|", "spectra", "Spectrum error", "dissipation"),
        "scalar": ("walls", "normal to z"),
    }
    for part in says[name]:
        assert part in text, part
    for part in says_not[name]:
        assert part not in text, part
    assert "diverged at t = 1.7" in text
    assert "10 %" in text


def test_columns_are_those_that_say_something(family):
    name, path = family
    found = results.read_folder(path)
    usual = ["dt", "t95", "t80", "spectrum_error", "statistics_error", "drift", "divergence_max", "seconds", "speed"]
    without = {"line": {"divergence_max"}, "walls": {"spectrum_error"}}.get(name, set())
    if name == "walls":
        without = without | ({"drift"} if "drift" in found.runs[0].numbers["not_defined"] else set())
    assert report._columns(found) == [key for key in usual if key not in without]
    assert all(len(row["cells"]) == len(report._columns(found)) for row in report._rows(found))


@pytest.mark.parametrize("name", ["line", "box"])
def test_one_start_is_enough(tmp_path, name):
    """One start has no standard error, and nothing fails for want of it."""
    found = results.read_folder(make_family(tmp_path, name, samples=1))
    assert {figure[0] for figure in report._figures(found)} == FIGURES[name]


def test_a_flat_box_keeps_its_proportions(tmp_path):
    found = results.read_folder(make_family(tmp_path, "walls", samples=1))
    figure = figures.vorticity_figure(found)
    pictures = [axes for axes in figure.axes if axes.images]
    assert pictures
    for axes in pictures:
        box = axes.get_position()
        ratio = box.width * figure.get_figwidth() / (box.height * figure.get_figheight())
        assert ratio == pytest.approx(4.0, rel=0.01)


def test_the_kolmogorov_page_says_nothing_new(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("statistics", "Statistics error", "dissipation", "Distribution"):
        assert part not in text.partition("<pre>")[0], part
    columns = ["dt", "t95", "t80", "spectrum_error", "drift", "divergence_max", "seconds", "speed"]
    assert report._columns(results.read_folder(folder)) == columns


def test_unlike_grids_have_a_column_on_common_shells(folder):
    found = results.read_folder(folder)
    for i, run in enumerate(found.runs):
        run.numbers["spectrum_error_common"] = 0.01 * (i + 1)
    columns = report._columns(found)
    assert columns[columns.index("spectrum_error") + 1] == "spectrum_error_common"
    for run in found.runs:
        run.numbers["spectrum_error_common"] = run.numbers["spectrum_error"]
    assert "spectrum_error_common" not in report._columns(found)


def test_verdict_on_statistics():
    config = {"domain": {"lengths": [22.0]}, "runs": {r: {"solver": "spectral", "shape": [32]} for r in SUMMARY["runs"]}}
    errors = {"bare": 0.25, "eddy": None, "learned": 0.013}
    runs = {label: numbers | {"statistics_error": errors[label]} for label, numbers in SUMMARY["runs"].items()}
    text = words.verdict({"runs": runs, "checks": []}, config)
    assert text.endswith("Largest error of the mean squares of u, uₓ and uₓₓ: learned 1.3 %, bare 25 %.")
    plane = config | {"domain": {"lengths": [1.0, 1.0], "boundaries": ["periodic", "periodic"]}}
    assert "error of" not in words.verdict({"runs": runs, "checks": []}, plane)
    asked = [{"name": "statistics_error", "run": "bare", "passed": True}]
    assert "mean energy and enstrophy: learned" in words.verdict({"runs": runs, "checks": asked}, plane)
    walls = config | {"domain": {"lengths": [1.0, 1.0], "boundaries": ["periodic", ["no_slip", "free_slip"]]}}
    assert "mean energy and enstrophy: learned" in words.verdict({"runs": runs, "checks": []}, walls)


# Gases

COOLING = PowerLawCooling(amplitude=1.0, exponent=0.5, reference_temperature=1.0, floor=0.02)
GASES = {
    "plane": ((1.0, 1.0), (), (24, 24), ((12, 12), (8, 8)), CompressibleNavierStokes(1.4)),
    "layer": (
        (1.0, 0.5, 2.0),
        ("periodic", "periodic", "outflow"),
        (8, 6, 16),
        ((6, 5, 12),),
        CompressibleNavierStokes(1.5, cooling=COOLING),
    ),
    "tube": ((1.0,), ("outflow",), (64,), ((32,),), CompressibleNavierStokes(1.4)),
}
ALWAYS = {"error", "correlation", "distribution", "budget", "statistics", "conservation", "cost", "energy", "convergence"}
GAS_FIGURES = {
    "plane": ALWAYS | {"density", "temperature", "spectra"},
    "layer": ALWAYS | {"density", "temperature", "spectra", "phases"},
    "tube": ALWAYS | {"spacetime"},
}


def gas_waves(solver, seed, samples, times):
    """Travelling waves in density (of high contrast where gas radiates), velocity and pressure: `(sample, time, c, *grid)`."""
    rng, grid = np.random.default_rng(seed), solver.grid
    contrast = 1.5 if solver.equation.cooling is not None else 0.3
    out = []
    for _ in range(samples):
        fields = np.zeros((grid.ndim + 2, times.size, *grid.shape))
        for field in fields:
            for _ in range(4):
                n, phase, turn = rng.integers(1, 3, grid.ndim), rng.uniform(0, TWO_PI), rng.normal()
                x = sum(TWO_PI * m * q / length for m, q, length in zip(n, grid.mesh(), grid.lengths, strict=True))
                field += 0.4 * np.cos(x + phase + turn * times.reshape(-1, *(1,) * grid.ndim))
        rho, p = np.exp(contrast * fields[0]), np.exp(0.2 * fields[-1])
        v = 0.5 * fields[1:-1]
        energy = p / (solver.equation.gamma - 1) + 0.5 * rho * (v**2).sum(axis=0)
        out.append(np.stack([rho, *(rho * v), energy], axis=1))
    return np.stack(out)


def make_gas(path, name, *, samples=2):
    """A run's folder: per grid a bare run and one with a closure that is nearer to the reference, and one that diverges."""
    lengths, boundaries, fine_shape, shapes, equation = GASES[name]
    times = np.linspace(0, 1, 11)
    reference, runs, settings = path / "reference.nc", {}, {}
    for i, shape in enumerate(shapes):
        solver = CompressibleFiniteVolume(Grid(shape, lengths, boundaries), equation)
        grid, variables, medium = solver.grid, solver.variables, gas.gas_of(solver)
        assert medium is not None
        group = f"finite_volume_{'x'.join(map(str, shape))}"
        truth, other = (gas_waves(solver, seed, samples, times) for seed in (1, 2))
        known = diagnostics.field_dataset(truth, times, grid, variables)
        known = gas.with_diagnostics(known, truth, grid, variables, medium, conserved=(), statistics_from=0.5)
        known = known.assign(pdf=_pdf(gas.log_density(truth, grid), solver))
        stored(known, reference, mode="w" if i == 0 else "a", group=group)
        for label, share in ({f"bare_{i}": 0.3, f"learned_{i}": 0.1} | ({"wild": 0.5} if i == 0 else {})).items():
            part = share * times.reshape(-1, *(1,) * (grid.ndim + 1))
            u = (1 - part) * truth + part * other
            outcome = "finished"
            if label == "wild":
                u[:, 6:] = np.nan
                outcome = "diverged at t = 0.6"
            zero = np.zeros((samples, times.size))
            total = np.nan_to_num(u[:, :, -1].reshape(samples, times.size, -1).mean(axis=-1))
            added = total - total[:, :1] + 1e-8 * times
            ledger = {"energy_added": added, "radiated": np.abs(added), "floor_events": zero + 3 * i * times}
            bins = known["temperature"].values if "temperature" in known else None
            attrs = {"label": label, "reference_group": group, "outcome": outcome}
            ds = diagnostics.field_dataset(u.astype(np.float32), times, grid, variables, attrs)
            ds = gas.with_diagnostics(
                ds, u, grid, variables, medium, reference=truth, modes=3, statistics_from=0.5, ledger=ledger, bins=bins
            )
            ds["error"].attrs["at"] = 0.8
            stored(ds.assign(pdf=_pdf(gas.log_density(u, grid), solver, known["pdf"])), path / f"{label}.nc")
            good = label != "wild"
            errors = {f: float(ds["error"].sel(field=f, time=0.8).mean()) for f in gas.FIELDS}
            row = {"mean": 1.1, "standard_error": 0.02, "reference": 1.0, "reference_standard_error": 0.02, "difference": 0.1}
            names = [s for s in figures.STATISTICS if s in ds and s != "energy"]
            found = diagnostics.t_correlated(times, ds["correlation"].values, 0.95)
            error = max(errors[f] for f in gas.JUDGED) if good else None
            runs[label] = {
                "outcome": outcome,
                "accuracy": {"metric": "error", "value": error, "at": 0.8},
                "error": error,
                "error_at": 0.8,
                "error_interval": [error, error],
                **{f"{f}_error": e if good else None for f, e in errors.items()},
                "temperature_error": share if good and medium.rate is not None else None,
                "t95": found.time,
                "t95_at_least": found.at_least,
                "spectrum_error": share if good and "spectrum" in ds else None,
                "statistics": dict.fromkeys(names, row if good else dict.fromkeys(row)),
                "statistics_error": 0.1 if good else None,
                "drift": {str(v): 1e-7 for v in ds["variable"].values},
                "floors": {"events": 3 * i, "mass": 0.0, "energy": 0.0},
                "not_defined": {"divergence_max": "of a reason"}
                | ({} if medium.rate is not None else {"temperature_error": "nothing radiates"})
                | ({} if "spectrum" in ds else {"spectrum_error": "of a reason"}),
                "seconds_per_unit_time": 0.01 * (1 + i) * (2 if label.startswith("learned") else 1),
                "dt": 0.1,
            }
            closures = [{"use": "learned_flux", "weights": "mine"}] if label.startswith("learned") else []
            settings[label] = {"solver": "finite_volume", "shape": list(shape), "corrections": closures}
    solver = CompressibleFiniteVolume(Grid(fine_shape, lengths, boundaries), equation)
    fine = diagnostics.field_dataset(gas_waves(solver, 1, 1, times[::5]), times[::5], solver.grid, solver.variables)
    stored(fine.assign_attrs(gamma=equation.gamma), reference, mode="a", group="fine")
    change = np.stack([np.outer(np.ones(samples), 0.01 * times * k) for k in (2, 7, 1)])
    half = xr.Dataset(
        {"error": (("field", "sample", "time"), change), "correlation": (("sample", "time"), 1 - 0.1 * change[0])},
        {"time": times, "field": list(gas.FIELDS)},
    )
    stored(half.assign_attrs(converged_until=0.7), reference, mode="a", group="convergence")
    config = {
        "equation": {"use": "compressible", "gamma": equation.gamma}
        | ({"cooling": {"use": "power_law"}} if name == "layer" else {}),
        "domain": {"lengths": list(lengths), "boundaries": list(boundaries)},
        "time": {"end": 1.0},
        "runs": settings,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    stated = {
        "converged_until": 0.7,
        "shape": list(fine_shape),
        "seconds_per_unit_time": 0.1,
        "change": dict(zip(gas.FIELDS, (0.016, 0.056, 0.008), strict=True)),
    }
    summary = {"name": name, "runs": runs, "checks": [], "reference": stated}
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[n if n == "plane" else pytest.param(n, marks=pytest.mark.slow) for n in GASES])
def gas_folder(request, tmp_path_factory):
    path = make_gas(tmp_path_factory.mktemp(request.param), request.param)
    report.write_report(path)
    return request.param, path


def test_a_gas_has_its_figures(gas_folder):
    from matplotlib.image import imread

    name, path = gas_folder
    files = list((path / "figures").glob("*.png"))
    assert {f.stem for f in files} == GAS_FIGURES[name]
    for file in files:
        picture = imread(file)[..., :3]
        assert 600 < picture.shape[1] < 2400, file.name
        assert (picture.min(axis=-1) < 0.8).mean() > 0.004, file.name
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge > 0.99).all(), file.name


def test_many_filters_stand_in_bands(gas_folder):
    """A benchmark's family has a dozen grids and thirty runs; its figures grow down, and no words collide."""
    import matplotlib as mpl

    found = results.read_folder(gas_folder[1])
    group, count = found.groups[0], 9
    runs, references = [], {k: v for k, v in found.references.items() if k not in found.groups}
    for i in range(count):
        name = f"finite_volume_copy{i}"
        references[name] = found.references[group]
        for run in found.runs:
            assert run.data is not None
            if run.group == group:
                data = run.data.assign_attrs(reference_group=name)
                runs.append(dataclasses.replace(run, label=f"{run.label}_with_{i}", data=data))
    runs = [dataclasses.replace(r, colour=drawing.PALETTE[i % 7], lap=i // 7) for i, r in enumerate(runs)]
    lines = {(line["color"], str(line["linestyle"]), line["linewidth"]) for line in (run.line for run in runs)}
    assert len(lines) == len(runs) >= 18
    many = dataclasses.replace(found, runs=tuple(runs), references=references)
    assert len(many.groups) == count
    recipes = (figures.energy_figure, figures.distribution_figure, figures.spectrum_figure)
    for recipe in recipes:
        with mpl.rc_context(drawing.STYLE):
            figure, few = recipe(many), recipe(found)
            if figure is None:
                continue
            figure.draw_without_rendering()
        panels = [a.get_position() for a in figure.axes]
        assert len({round(p.x0, 3) for p in panels}) <= drawing.BAND
        assert len(panels) == count * len(few.axes) // len(found.groups)
        assert min(p.width * figure.get_figwidth() for p in panels) > 1.3
        assert min(p.height * figure.get_figheight() for p in panels) > 0.4
    assert_words_stay_apart(many, *recipes, figures.correlation_figure, figures.phase_figure)


def test_words_stay_apart_on_the_page_of_a_gas(gas_folder):
    assert_words_stay_apart(results.read_folder(gas_folder[1]))


def test_the_page_of_a_gas_tells_the_truth(gas_folder):
    name, path = gas_folder
    text = " ".join(Page((path / "report.html").read_text(encoding="utf-8")).text).replace("\u00a0", " ")
    says = {
        "plane": ("share of the compressive part", "γ 1.4", "Floor events", "Floors stood in", "Density of the first start"),
        "layer": (
            "normal to y",
            "outflow across z",
            "Along x, y, the mean over the other axes",
            "per temperature",
            "power law cooling",
        ),
        "tube": ("Density of the first start in space and time", "outflow across x", "Energy budget"),
    }
    says_not = {
        "plane": ("vorticity", "Vorticity", "radiates", "per temperature", "outflow", "divergence"),
        "layer": ("compressive part", "vorticity", "divergence [U"),
        "tube": ("spectra", "Spectrum error", "u of the first", "black line", "vorticity"),
    }
    for part in (*says[name], "at t = 0.8", "diverged at t = 0.6", "ρ and √ρ v stay within 5 % to t = 0.7", "5.6 %"):
        assert part in text, part
    for part in says_not[name]:
        assert part not in text.partition("Resolved configuration")[0], part


def test_verdict_on_a_gas(gas_folder):
    name, path = gas_folder
    found = results.read_folder(path)
    text = words.verdict(found.summary, found.config)
    runs = found.summary["runs"]
    ratio = runs["bare_0"]["error"] / runs["learned_0"]["error"]
    wanted = rf"he error of ρ and √ρ v at t = 0.8 is .* % with learned_0, .* % with bare_0, {ratio:.2g} times as much\."
    assert re.search(wanted, text), text
    assert "The reference itself is not converged then: half its resolution changes it by 5.6 %." in text
    assert ("mass per temperature is 10 % with learned_0, 30 % with bare_0" in text) == (name == "layer")
    worse = json.loads(json.dumps(found.summary))
    worse["runs"]["learned_0"]["error"] = 1.2
    assert "1.2e+02" not in words.verdict(worse, found.config)
    assert ": no gain." in words.verdict(worse, found.config)


def test_columns_of_a_gas(gas_folder):
    name, path = gas_folder
    found = results.read_folder(path)
    columns = report._columns(found)
    assert ("temperature_error" in columns) == (name == "layer")
    assert ("spectrum_error" in columns) == (name != "tube")
    # a column of zeros says nothing
    assert ("floors" in columns) == (name == "plane")
    assert {"error", "t95", "drift"} <= set(columns)
    assert not {"t80", "divergence_max"} & set(columns)
    rows = {row["label"]: row["cells"][columns.index("error")] for row in report._rows(found)}
    best = min((r for r in rows if r != "wild"), key=lambda r: found.summary["runs"][r]["error"])
    assert [label for label, cell in rows.items() if cell["best"]] == [best]
