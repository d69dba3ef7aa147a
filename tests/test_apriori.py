"""What a coarse solver lacks: exact stresses, scores of closures, and a run with a closure that is perfect."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressible_flows import gas
from flows import TWO_PI, Push, cube, kolmogorov, random_flow, relative, sample, solver_of, square

from hybridsim.apriori import (
    PerfectlyClosed,
    correlation,
    filtered_state,
    perfect_run,
    relative_error,
    score,
    subgrid_flux,
    subgrid_force,
    subgrid_tendency,
)
from hybridsim.check import random_state, uniform_state
from hybridsim.contract import Flux, PostStep, Source
from hybridsim.corrections.eddy import Smagorinsky
from hybridsim.corrections.gradient_model import GradientModel
from hybridsim.grid import Grid
from hybridsim.model import Model, State, rollout
from hybridsim.solvers.kuramoto_sivashinsky import FiniteVolumeKS, KuramotoSivashinsky, SpectralKS
from hybridsim.solvers.steppers import ETDRK2, ETDRK4, SSPRK3, CrankNicolsonRK4, ForwardEuler
from hybridsim.statistics import Labels, filtered, subgrid_dissipation, subgrid_stress

pytestmark = pytest.mark.usefixtures("x64")

FINE, COARSE = square(24), square(12)


def _line(n, make=SpectralKS, **options):
    return make(Grid((n,), (22.0,)), KuramotoSivashinsky(), **options)


def _wave(solver, modes=(1, 3, 9)):
    x = solver.grid.mesh()[0]
    return sum(np.cos(TWO_PI * n * x / 22 + n) / n for n in modes)[None]


class Given(Flux):
    """F = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.value


class GivenSource(Source):
    """s = what it is given."""

    value: jax.Array

    def __call__(self, view, memory=None, key=None):
        return self.value


# --- stresses --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sharp", "box", "gaussian"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_at_cell_centres_it_is_the_subgrid_stress_of_the_statistics(kind, dims):
    if dims == 1:
        fine, coarse = _line(32), _line(16)
        u = _wave(fine)
    else:
        grids = (FINE, COARSE) if dims == 2 else (Grid((8, 6, 7), (TWO_PI, 3.0, 5.0)), Grid((4, 4, 4), (TWO_PI, 3.0, 5.0)))
        fine, coarse = (solver_of("spectral", grid) for grid in grids)
        u = random_flow(fine, 3, modes=2 if dims == 3 else 8)
    found = subgrid_flux(u[None], fine, coarse, kind)[0]
    exact = subgrid_stress(u, fine.grid, fine.variables, kind, onto=coarse.grid).values
    assert found.shape == exact.shape
    assert relative(found, 0.5 * exact if dims == 1 else exact) < 1e-12
    state = filtered_state(u, fine, coarse, kind)
    smooth = filtered(u, fine.grid, fine.variables, kind, onto=coarse.grid)
    projected = np.asarray(jax.jit(lambda q: coarse.project(q))(jnp.asarray(smooth)))
    assert relative(state, projected) < 1e-12


@pytest.mark.parametrize("fine_kind", ["spectral", "finite_volume"])
def test_stress_and_scalar_flux_stand_at_the_flux_points_of_the_coarse_solver(fine_kind):
    """Two waves under a Gaussian: their product has the waves m ± n, each damped by its own G."""
    fine, coarse = (solver_of(kind, grid, scalars={"c": 0.0}) for kind, grid in ((fine_kind, FINE), ("finite_volume", COARSE)))
    width = 2 * COARSE.spacing[0]
    damping = lambda k: np.exp(-((k * width) ** 2) / 24)  # noqa: E731
    u = sample(fine, lambda x, y: np.cos(2 * y + 0.1) + 0 * x, lambda x, y: 0.7 + 0 * x, lambda x, y: np.cos(5 * y + 0.4) + 0 * x)
    flux = subgrid_flux(u, fine, coarse, "gaussian", width)

    def exact(axis, channel, m, n, a, b):
        y = COARSE.mesh(coarse.flux_place(axis, channel))[1]
        both = 0.5 * (damping(m + n) * np.cos((m + n) * y + a + b) + damping(m - n) * np.cos((m - n) * y + a - b))
        return both - damping(m) * damping(n) * np.cos(m * y + a) * np.cos(n * y + b)

    np.testing.assert_allclose(flux[0, 0], exact(0, 0, 2, 2, 0.1, 0.1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(flux[0, 2], exact(0, 2, 2, 5, 0.1, 0.4), rtol=0, atol=1e-13)
    assert np.abs(flux[0, 2]).max() > 0.05
    assert np.abs(flux[1]).max() < 1e-13  # v is uniform: it carries everything along


def test_the_tendency_of_a_clean_cut_is_the_divergence_of_the_stress():
    """Modes up to 2 and from 7 to 8 on a grid that has 5: no product aliases there, and only the stress is missing."""
    fine = solver_of("spectral", FINE, scalars={"c": 1e-3})
    coarse = solver_of("spectral", COARSE, scalars={"c": 1e-3}, dealias="none")
    hat = np.fft.fftn(random_flow(fine, 5, modes=8), axes=(1, 2))
    n = np.abs(np.fft.fftfreq(24, 1 / 24))
    index = np.maximum(n[:, None], n[None])
    u = np.fft.ifftn(np.where((index <= 2) | (index >= 7), hat, 0), axes=(1, 2)).real
    lacking = np.asarray(jax.jit(lambda q: subgrid_tendency(q, fine, coarse))(jnp.asarray(u)))
    assert np.abs(lacking).max() > 0.01
    assert relative(subgrid_force(u[None], fine, coarse, "sharp")[0], lacking) < 1e-12


@pytest.mark.slow
def test_a_tendency_of_a_gas():
    """In uniform flow nothing is missing; elsewhere mass, momentum and energy are only moved. Given as a source it is exact."""
    fine, coarse = gas(Grid((16, 12), (1.0, 0.9))), gas(Grid((8, 6), (1.0, 0.9)))
    lacking = jax.jit(lambda q: subgrid_tendency(q, fine, coarse))
    assert np.abs(lacking(jnp.asarray(uniform_state(fine, 0.7, np.float64)))).max() < 1e-13
    u = random_state(fine, np.float64)
    found = np.asarray(lacking(u))
    assert np.abs(found).max() > 0.1
    assert np.abs(found.sum(axis=(1, 2))).max() < 1e-12 * np.abs(found).sum()
    scores = score({"exact": GivenSource(jnp.asarray(found)), "eddy": Smagorinsky(0.1)}, coarse, fine, u, "restrict")
    assert scores["tendency_error"].sel(closure="exact").max() < 1e-12
    assert np.abs(scores["tendency_correlation"].sel(closure="eddy", component="energy")) < 1
    with pytest.raises(ValueError, match=r"fine: a gas has fluxes of mass and energy too, .* see subgrid_tendency"):
        subgrid_flux(u, fine, coarse)
    with pytest.raises(ValueError, match="fine: CompressibleFiniteVolume steps by itself, not by rates"):
        PerfectlyClosed(fine, coarse)


def test_what_does_not_fit_is_refused():
    fine, coarse = solver_of("spectral", FINE), solver_of("spectral", COARSE)
    u = random_flow(fine, 1)
    with pytest.raises(ValueError, match=r"kind: a stress needs a filter, one of sharp, box, gaussian; under 'restrict' see"):
        subgrid_flux(u, fine, coarse, "restrict")
    with pytest.raises(ValueError, match="coarse: the channels u, v, c are not those of the fine solver, u, v"):
        subgrid_flux(u, fine, solver_of("spectral", COARSE, scalars={"c": 0.0}))
    with pytest.raises(ValueError, match=r"coarse: the box \(1.0, 1.0\) is not that of the fine solver"):
        filtered_state(u, fine, solver_of("spectral", square(12, 1.0)))

    class Late(PostStep):
        def __call__(self, view, memory=None, key=None):
            return view.u

    with pytest.raises(ValueError, match=r"closures\['late'\]: Late has no tendency; possible are Flux and Source closures"):
        score({"late": Late()}, coarse, fine, u)


# --- scores ----------------------------------------------------------------------------------------------------------------------


def test_correlation_and_error_of_known_numbers():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 50))
    np.testing.assert_allclose(correlation(a, b, 1), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)], rtol=1e-12)
    assert np.isnan(correlation(np.ones(5), np.arange(5), 1))
    np.testing.assert_allclose(
        relative_error(a, b, 1), [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    )
    assert np.isnan(relative_error(np.ones(5), np.zeros(5), 1))


@pytest.mark.parametrize("kind", ["finite_volume", pytest.param("spectral", marks=pytest.mark.slow)])
def test_the_exact_flux_has_the_best_score(kind):
    fine, coarse = solver_of("spectral", FINE, scalars={"c": 0.0}), solver_of(kind, COARSE, scalars={"c": 0.0})
    u = random_flow(fine, 4, modes=3)
    exact = jnp.asarray(subgrid_flux(u, fine, coarse))
    closures = {
        "exact": Given(exact),
        "against": Given(-exact),
        "pushed": (Given(exact), Push(0.3)),
        "gradient": GradientModel(),
        "eddy": Smagorinsky(0.2),
        "source": Push(1.0),
    }
    found = score(closures, coarse, fine, u)
    assert found["stress_correlation"].dims == ("closure", "axis", "component")
    assert list(found["component"].values) == ["u", "v", "c"]
    one = {"stress_correlation": 1, "stress_error": 0, "tendency_correlation": 1, "tendency_error": 0, "transfer_correlation": 1}
    for name, value in one.items():
        np.testing.assert_allclose(found[name].sel(closure="exact"), value, rtol=0, atol=1e-7)
        np.testing.assert_allclose(found[name].sel(closure="against"), 2 if name.endswith("error") else -1, rtol=1e-12)
    for name in ("transfer_mean", "backscatter"):
        np.testing.assert_allclose(found[name].sel(closure="exact"), found[f"exact_{name}"], rtol=1e-12)
    np.testing.assert_allclose(found["backscatter"].sel(closure="against"), 1 - found["exact_backscatter"], rtol=1e-12)
    # a uniform push moves no structure: correlations are the same, and u's error is not zero
    assert found["tendency_error"].sel(closure="pushed", component="u") > 1e-3
    np.testing.assert_allclose(found["stress_error"].sel(closure="pushed"), 0, atol=1e-12)
    assert (found["stress_correlation"].sel(closure="gradient") > 0.6).all()
    assert (found["stress_correlation"].sel(closure="gradient") > found["stress_correlation"].sel(closure="eddy")).all()
    assert found["transfer_mean"].sel(closure="eddy") > 0
    assert found["backscatter"].sel(closure="eddy") < 1e-12
    assert 0.1 < found["exact_backscatter"] < 0.9
    assert np.isnan(found["stress_correlation"].sel(closure="source")).all()


def test_scores_of_samples_have_times_units_and_standard_errors():
    fine, coarse = solver_of("spectral", FINE), solver_of("spectral", COARSE)
    u = np.stack([[random_flow(fine, 2 * s + t, modes=5) for t in range(2)] for s in range(3)])
    closures = {"gradient": GradientModel(), "eddy": Smagorinsky()}
    found = score(closures, coarse, fine, u, labels=Labels([0.5, 1.0], "m", "s"))
    assert found["stress_correlation"].dims == ("closure", "sample", "time", "axis", "component")
    assert list(found["time"].values) == [0.5, 1.0]
    assert found["time"].attrs["units"] == "s"
    assert found["transfer_mean"].attrs["units"] == "(length/time)^3 / m"
    means = found["transfer_mean"].mean("time")
    np.testing.assert_allclose(found["transfer_mean_standard_error"], means.std("sample", ddof=1) / np.sqrt(3), rtol=1e-12)
    assert found["stress_error_standard_error"].dims == ("closure", "axis", "component")
    # beside the statistics: filtered flow and stress there know nothing of a coarse solver
    other = subgrid_dissipation(u, fine.grid, fine.variables, "gaussian", onto=coarse.grid)
    np.testing.assert_allclose(found["exact_transfer_mean"], other["mean"], rtol=1e-9)
    np.testing.assert_allclose(found["exact_backscatter"], other["backscatter_share"], rtol=1e-9)
    alone = score(closures, coarse, fine, u[1, 0])
    np.testing.assert_allclose(alone["tendency_error"], found["tendency_error"][:, 1, 0], rtol=1e-12)


def test_a_source_is_scored_on_the_line():
    """Under the coarse solver's own filter, discretisation error included; the exact source has error 0."""
    fine, coarse = _line(64), _line(16, FiniteVolumeKS)
    u = _wave(fine)
    lacking = subgrid_tendency(jnp.asarray(u), fine, coarse)
    closures = {"exact": GivenSource(lacking), "none": GradientModel(0.0)}
    found = score(closures, coarse, fine, u, "restrict")
    np.testing.assert_allclose(found["tendency_error"][:, 0], [0, 1], atol=1e-10)
    assert np.isnan(found["exact_transfer_mean"])
    assert np.isnan(found["tendency_correlation"].sel(closure="none")).all()
    stress = score({"gradient": GradientModel(), "fourth": GradientModel(order=4)}, _line(16), fine, _wave(fine, (1, 2)))
    assert stress["stress_error"].values.ravel()[1] < 0.3 * stress["stress_error"].values.ravel()[0] < 0.1


# --- a perfect closure -----------------------------------------------------------------------------------------------------------


def _pairs(name):
    """(fine, coarse, fine state, Δt)."""
    force = kolmogorov()
    if name == "spectral":
        fine, coarse = solver_of(name, FINE, 1e-2, force), solver_of(name, COARSE, 1e-2, force, dealias="none")
    elif name == "finite_volume":
        fine, coarse = (solver_of(name, grid, 1e-2, force, scalars={"c": 1e-2}) for grid in (FINE, COARSE))
    elif name == "spectral to finite_volume":
        fine, coarse = solver_of("spectral", FINE, 1e-2, force), solver_of("finite_volume", COARSE, 1e-2, force)
    elif name == "ks":
        fine, coarse = _line(64), _line(16, dealias="two_thirds")
        return fine, coarse, _wave(fine), 0.05
    elif name == "ks finite_volume":
        fine, coarse = _line(64, FiniteVolumeKS), _line(32, FiniteVolumeKS)
        return fine, coarse, _wave(fine), 1e-3
    else:
        fine, coarse = solver_of("spectral", cube(8), 1e-2), solver_of("spectral", cube(6), 1e-2, dealias="none")
        return fine, coarse, random_flow(fine, 3, modes=3), 0.05
    return fine, coarse, random_flow(fine, 3, modes=8, mean=(0.3, -0.2)), 0.02


@pytest.mark.parametrize(("name", "stepper"), [
    pytest.param("spectral", ForwardEuler(), marks=pytest.mark.slow),
    pytest.param("spectral", ETDRK4(), marks=pytest.mark.slow),
    pytest.param("spectral", SSPRK3(), marks=pytest.mark.slow),
    pytest.param("spectral", CrankNicolsonRK4(), marks=pytest.mark.slow),
    pytest.param("finite_volume", ForwardEuler(), marks=pytest.mark.slow),
    ("finite_volume", SSPRK3()),
    pytest.param("spectral to finite_volume", SSPRK3(), marks=pytest.mark.slow),
    pytest.param("ks", ETDRK2(), marks=pytest.mark.slow),
    ("ks", CrankNicolsonRK4()),
    ("ks finite_volume", SSPRK3()),
    pytest.param("3d", SSPRK3(), marks=pytest.mark.slow),
    pytest.param("3d", ETDRK4(), marks=pytest.mark.slow),
])  # fmt: skip
def test_with_a_perfect_closure_the_coarse_run_is_the_filtered_fine_run(name, stepper):
    fine, coarse, u, dt = _pairs(name)
    run = perfect_run(fine, coarse, stepper, dt, jnp.asarray(u), 10)
    print(name, type(stepper).__name__, float(run.gap.max()))
    assert run.gap.max() <= 1e-12
    assert relative(run.coarse[-1], run.coarse[0]) > 0.01
    # negative control: without its source the coarse run leaves at once
    start = jax.jit(lambda q: coarse.restrict(q, fine.grid, fine.variables))(jnp.asarray(u))
    bare = rollout(Model(coarse, stepper, dt), State(start), 10).u
    assert relative(bare[-1], run.filtered[-1]) > 1e-3


@pytest.mark.parametrize(("name", "stepper"), [("spectral", ETDRK4()), ("finite_volume", SSPRK3()), ("ks", ETDRK2())])
def test_it_is_so_after_every_stage(name, stepper, monkeypatch):
    fine, coarse, u, dt = _pairs(name)
    states, wanted, own = [], [], PerfectlyClosed.explicit

    def watched(self, z, t, tendency):
        states.append(self.decode(z))
        wanted.append(self.filtered(z))
        return own(self, z, t, tendency)

    monkeypatch.setattr(PerfectlyClosed, "explicit", watched)

    @jax.jit
    def step(u):
        pair = PerfectlyClosed(fine, coarse).prepare(u.dtype)
        z, coefficients = pair.encode(u), stepper.prepare(pair, dt, u.dtype)
        z = stepper(pair, coefficients, z, jnp.zeros(()), jnp.asarray(dt), lambda _z, _t: None)
        return jnp.stack([*states, pair.decode(z)]), jnp.stack([*wanted, pair.filtered(z)])

    found, exact = step(jnp.asarray(u))
    assert len(found) == stepper.stages + 1
    assert max(relative(a, b) for a, b in zip(found, exact, strict=True)) <= 1e-12
    assert min(relative(b, a) for a, b in pairwise(found)) > 1e-7


def test_a_source_from_another_filter_is_not_perfect():
    """s under a Gaussian makes a run that starts from the Gaussian's state perfect, and one that starts from the cut's nothing."""
    fine, coarse, u, dt = _pairs("spectral")
    transfer = np.exp(-sum(k**2 for k in COARSE.wavenumbers()) * COARSE.spacing[0] ** 2 / 6)

    def smooth(q):
        sharp = coarse.restrict(q, fine.grid, fine.variables)
        return jnp.fft.irfftn(jnp.asarray(transfer)[None] * jnp.fft.rfftn(sharp, axes=(1, 2)), s=COARSE.shape, axes=(1, 2))

    other = perfect_run(fine, coarse, ForwardEuler(), dt, jnp.asarray(u), 10, smooth)
    assert other.gap.max() <= 1e-12

    @eqx.filter_jit
    def mixed(u):
        pair = PerfectlyClosed(fine, coarse, smooth).prepare(u.dtype)
        z = {**pair.encode(u), "coarse": coarse.prepare(u.dtype).encode(coarse.restrict(u, fine.grid, fine.variables))}
        stepper = ForwardEuler()
        coefficients = stepper.prepare(pair, dt, u.dtype)
        advance = lambda n, z: stepper(pair, coefficients, z, n * dt, jnp.asarray(dt), lambda _z, _t: None)  # noqa: E731
        z = jax.lax.fori_loop(0, 10, advance, z)
        return pair.decode(z), pair.filtered(z), coarse.restrict(fine.decode(z["fine"]), fine.grid, fine.variables)

    found, gaussian, cut = mixed(jnp.asarray(u))
    assert relative(gaussian, other.filtered[-1]) <= 1e-12
    assert relative(found, cut) > 1e-3
    assert relative(found, gaussian) > 1e-3


def test_a_mask_on_sources_leaves_something_out():
    """As the docstring says: what Hou & Li's mask damps of a source is missing."""
    fine, _, u, dt = _pairs("spectral")
    coarse = solver_of("spectral", COARSE, 1e-2, kolmogorov())
    gap = perfect_run(fine, coarse, ForwardEuler(), dt, jnp.asarray(u), 10).gap
    assert gap[-1] > 1e-4


def test_a_perfect_pair_rolls_out_and_refuses_what_it_cannot_close():
    fine, coarse, u, dt = _pairs("ks")
    run = perfect_run(fine, coarse, ETDRK2(), dt, jnp.asarray(u), 3)
    frames = rollout(Model(PerfectlyClosed(fine, coarse), ETDRK2(), dt), State(jnp.asarray(u)), 3).u
    assert relative(frames, run.coarse) < 1e-13
    with pytest.raises(ValueError, match="is a Flux closure, which PerfectlyClosed does not take"):
        Model(PerfectlyClosed(fine, coarse), ETDRK2(), dt, (GradientModel(),))
    with pytest.raises(TypeError, match="PerfectlyClosed takes no closures"):
        PerfectlyClosed(fine, coarse).receive(None, jnp.zeros((1, 32)))
