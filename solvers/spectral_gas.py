"""∂t U = −∇·(F(U) − F_v(U)) − ∇·F_closure + S: a pseudo-spectral solver for compressible flow in periodic boxes.

All channels are values at the cell centres; every derivative is that of the trigonometric polynomial through them.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from hybridsim.contract import AbstractSolver, Flux, PostStep, Replacement, Source, Variable
from hybridsim.grid import Grid, resample
from hybridsim.solvers.compressible import CompressibleNavierStokes, cooled, kicked, wave_rate
from hybridsim.solvers.spectral import Dealiasing, dealiasing_mask, same_box


class CompressibleSpectral(AbstractSolver):
    """∂t ρ = −P ∇·m,  ∂t (ρv) = −P (C(v) + ∇p − ∇·τ),  ∂t E = −P (C(h) − ∇·(τ·v + λ∇T)),  ∂t (ρc) = −P (C(c) − ∇·(ρκ∇c)).

    C(φ) = ½ [∇·(mφ) + m·∇φ + φ ∇·m], m = ρv, h = (E + p)/ρ, P the mask of `dealias`: compressible Navier–Stokes equations with
    passive scalars in one to three dimensions, all sides periodic. C is the mean of the divergence and the advective form
    (Feiereisen, Reynolds & Ferziger 1981; the quadratic split form of Kennedy & Gruber 2008, doi:10.1016/j.jcp.2007.09.020), which
    aliasing errors disturb less than the divergence form: without a mask, on a grid without Nyquist's waves, C(v) and ∇·m leave
    Σ ρ|v|² as it is, whatever is aliased.

    **Arguments:**

    - `grid`: a periodic `Grid` of at least 4 cells per axis.
    - `equation`: `CompressibleNavierStokes`; viscous, or run for a short time: nothing else damps the shortest waves.
    - `dealias`: `hou_li` (default), `two_thirds` or `none`; see `dealiasing_mask`. P multiplies every tendency, viscous
      ones too; waves with P < 0.1 are not in the state at all.

    Spectral accuracy in space while the flow is resolved; for smooth turbulence much less error per cell than finite volumes. Not
    for shocks, which ring, and not for cold or dilute gas: nothing keeps density and pressure positive. Mass, momentum, energy and
    scalars are conserved to rounding for any Flux closure. One evaluation in three dimensions takes 45 real transforms.
    """

    grid: Grid
    equation: CompressibleNavierStokes
    dealias: Dealiasing = eqx.field(static=True, default="hou_li")
    arrays: dict[str, Array] | None = None

    places: ClassVar = (Flux, Source, PostStep, Replacement)

    def __check_init__(self):
        if not all(self.grid.periodic):
            raise ValueError("grid: a spectral solver needs periodic boundaries")
        if min(self.grid.shape) < 4:
            raise ValueError(f"grid: a spectral solver needs at least 4 cells per axis, found {self.grid.shape}")
        if self.dealias not in ("hou_li", "two_thirds", "none"):
            raise ValueError(f"dealias: possible are hou_li, two_thirds, none; found {self.dealias!r}")
        self.equation.check_grid(self.grid)

    # -- what the state is ------------------------------------------------------------------------------------------------------

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.equation.variables(self.grid.centre)

    @property
    def ledger_rows(self) -> tuple[str, ...]:
        return (*(v.name for v in self.variables), "radiated")

    @property
    def conserved(self) -> tuple[str, ...]:
        """All channels: what forces and cooling do to their sums is in the ledger."""
        return tuple(v.name for v in self.variables)

    @property
    def serial_kernels(self) -> bool:
        return True

    @property
    def large_program(self) -> bool:
        return self.grid.ndim == 3

    def _mask(self) -> np.ndarray:
        """P(k), and zero where P < 0.1: such waves would hardly be damped, by no viscosity either, and go on being aliased."""
        mask = dealiasing_mask(self.grid, self.dealias)
        return np.where(mask < 0.1, 0.0, mask)

    def prepare(self, dtype) -> "CompressibleSpectral":
        k = self.grid.wavenumbers()
        # one vector per axis, without Nyquist's wave, whose derivative is not on the grid
        real = {
            f"k{a}": np.where(np.isclose(2 * np.abs(q) * length, 2 * np.pi * n), 0.0, q)
            for a, (q, n, length) in enumerate(zip(k, self.grid.shape, self.grid.lengths, strict=True))
        }
        mask = self._mask()
        real |= {"mask": mask, "moving": np.where(sum(q**2 for q in k) > 0, mask, 0.0), "keep": np.where(mask > 0, 1.0, 0.0)}
        arrays = {name: jnp.asarray(a, dtype) for name, a in real.items()}
        return eqx.tree_at(lambda s: s.arrays, self, arrays, is_leaf=lambda a: a is None)

    def _arrays(self, dtype) -> dict[str, Array]:
        arrays = self.arrays if self.arrays is not None else self.prepare(dtype).arrays
        assert arrays is not None
        return arrays

    def _forward(self, q: Array) -> Array:
        return jnp.fft.rfftn(q, axes=tuple(range(-self.grid.ndim, 0)))

    def _inverse(self, hat: Array) -> Array:
        return jnp.fft.irfftn(hat, s=self.grid.shape, axes=tuple(range(-self.grid.ndim, 0)))

    def _times(self, factor: Float[Array, " *k"], hat: Array) -> Array:
        """The same factor for each of the channels, which come first."""
        return factor.reshape((1,) * (hat.ndim - factor.ndim) + factor.shape) * hat

    def _slopes(self, arrays: dict[str, Array], hat: Array) -> Float[Array, "axis *rest"]:
        return self._inverse(1j * jnp.stack([self._times(arrays[f"k{a}"], hat) for a in range(self.grid.ndim)]))

    def _outflow(self, arrays: dict[str, Array], flux: Array) -> Array:
        """∇·F of the transforms F[axis, …]."""
        terms = [self._times(arrays[f"k{a}"], flux[a]) for a in range(self.grid.ndim)]
        return 1j * sum(terms[1:], terms[0])

    def encode(self, u: Float[Array, "c *grid"]) -> PyTree:
        z = {"u": self.project(u), "injected": jnp.zeros((u.shape[0] + 1,), u.dtype)}
        if self.equation.forcing is not None:
            z["memory"] = self.equation.forcing.init_memory(self.grid)
        return z

    def decode(self, z: PyTree) -> Float[Array, "c *grid"]:
        return z["u"]

    def constrain(self, z: PyTree) -> PyTree:
        return z

    def project(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        """u without the waves that P removes, Nyquist's among them."""
        return self._inverse(self._times(self._arrays(u.dtype)["keep"], self._forward(u)))

    def divergence(self, u: Float[Array, "c *grid"]) -> None:
        return None

    def centred(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        return u

    def collect(self, z: PyTree) -> tuple[PyTree, Float[Array, " row"]]:
        return {**z, "injected": jnp.zeros_like(z["injected"])}, z["injected"]

    def restrict(self, u: Float[Array, "c *fine"], grid: Grid, variables: tuple[Variable, ...]) -> Float[Array, "c *grid"]:
        """Sharp spectral cut of ρ, ρv, E, ρc at this grid's Nyquist wavenumber: sums are kept, positivity need not be."""
        same_box(grid, self.grid)
        cut = [resample(q, self.grid.shape, v.at, self.grid.centre) for q, v in zip(u, variables, strict=True)]
        return self.project(jnp.stack(cut))

    @property
    def filter_option(self) -> str:
        return "" if self.dealias == "hou_li" else self.dealias

    # -- what closures see ------------------------------------------------------------------------------------------------------

    def flux_place(self, axis: int, channel: int):
        return self.grid.centre

    def move(self, array, from_, to):
        return array

    def derivative(self, array, at, axis):
        return self._inverse(1j * self._times(self._arrays(array.dtype)[f"k{axis}"], self._forward(array))), at

    def gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        return self._slopes(self._arrays(u.dtype), self._forward(u))

    def adjoint_gradient(self, u: Float[Array, "c *grid"]) -> Float[Array, "axis c *grid"]:
        """∂_a P u_c: the mask of the tendencies is its own adjoint."""
        arrays = self._arrays(u.dtype)
        return self._slopes(arrays, self._times(arrays["mask"], self._forward(u)))

    @property
    def flux_response(self) -> float:
        """max P(k)² k²."""
        mask = self._mask()
        return float(np.max(mask**2 * sum(k**2 for k in self.grid.wavenumbers())))

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def linear(self) -> PyTree | None:
        return None

    def explicit(self, z, t, tendency):
        rate = self._rate(z["u"])
        extra = tendency(z, t)
        if extra is not None:
            rate = rate + extra["u"]
        return {"u": rate, "injected": jnp.zeros_like(z["injected"])}

    def euler(self, z, t, dt, tendency, at=None, rough=False):
        from_ = z if at is None else at
        return {**from_, "u": z["u"] + dt * self.explicit(from_, t, tendency)["u"], "injected": z["injected"]}

    def _rate(self, u: Float[Array, "c *grid"]) -> Float[Array, "c *grid"]:
        d, equation, arrays = self.grid.ndim, self.equation, self._arrays(u.dtype)
        w = equation.primitive(u)
        rho, v, p, m = w[0], w[1 : d + 1], w[d + 1], u[1 : d + 1]
        carried = jnp.concatenate([v, ((u[d + 1] + p) / rho)[None], w[d + 2 :]])
        temperature = (p / rho)[None]
        viscous = not equation.ideal
        wanted = jnp.concatenate([carried, temperature]) if viscous else carried
        slopes = self._slopes(arrays, self._forward(wanted))
        outflow = self._outflow(arrays, self._forward(m))
        divergence = self._inverse(outflow)
        # the fluxes of ρv, E, ρc along each axis: half of what is carried, pressure, viscosity
        rows = [[0.5 * m[a] * q + p if b == a else 0.5 * m[a] * q for b, q in enumerate(carried)] for a in range(d)]
        fluxes = jnp.stack([jnp.stack(row) for row in rows])
        if viscous:
            fluxes = fluxes - self._viscous(w, slopes)
        # no jnp.sum, which XLA on CPU (JAX 0.10.2) gets wrong here: tests/test_compiled.py
        along = [m[a][None] * slopes[a, : carried.shape[0]] for a in range(d)]
        advected = 0.5 * (sum(along[1:], along[0]) + carried * divergence[None])
        change = self._outflow(arrays, self._forward(fluxes)) + self._forward(advected)
        # "moving": sums are not touched, not even by rounding
        return self._inverse(-self._times(arrays["moving"], jnp.concatenate([outflow[None], change])))

    def _viscous(self, w: Float[Array, "c *grid"], slopes: Float[Array, "axis q *grid"]) -> Float[Array, "axis p *grid"]:
        """(τ, τ·v + λ∇T, ρκ∇c) along each axis; `slopes` of v, h, c, T."""
        d, equation = self.grid.ndim, self.equation
        rho, v = w[0], w[1 : d + 1]
        mu = equation.dynamic_viscosity(w[d + 1] / rho)
        gamma = jnp.asarray(equation.gamma, w.dtype)
        heat = gamma / (gamma - 1) / jnp.asarray(equation.prandtl, w.dtype) * mu
        dilatation = sum(slopes[a, a] for a in range(d))
        rows = []
        for a in range(d):
            stress = [mu * (slopes[a, b] + slopes[b, a] - (2 / 3 * dilatation if a == b else 0)) for b in range(d)]
            energy = heat * slopes[a, -1] + sum(q * v[b] for b, q in enumerate(stress))
            kappas = equation.scalars.values()
            scalars = [jnp.asarray(kappa, w.dtype) * rho * slopes[a, d + 1 + i] for i, kappa in enumerate(kappas)]
            rows.append(jnp.stack([*stress, energy, *scalars]))
        return jnp.stack(rows)

    def receive(self, flux, source) -> PyTree:
        reference = flux if flux is not None else source
        assert reference is not None
        arrays = self._arrays(reference.dtype)
        hat = jnp.zeros((), arrays["mask"].dtype)
        if flux is not None:
            hat = hat - self._times(arrays["moving"], self._outflow(arrays, self._forward(flux)))
        if source is not None:
            hat = hat + self._times(arrays["mask"], self._forward(source))
        return {"u": self._inverse(hat)}

    def enter(self, z, t, dt):
        forcing = self.equation.forcing
        if forcing is not None:
            # Half of the work with the force before the step, half with that after it.
            z = kicked(self.equation, self.grid, z, 0.5 * dt)
            z = {**z, "memory": forcing.advance(z["memory"], t, dt)}
        return self._cut(self._cooled(z, dt))

    def leave(self, z, t, dt):
        z = self._cooled(z, dt)
        return self._cut(z if self.equation.forcing is None else kicked(self.equation, self.grid, z, 0.5 * dt))

    def _cooled(self, z: PyTree, dt) -> PyTree:
        return z if self.equation.cooling is None else cooled(self.equation, self.equation.primitive(z["u"]), z, 0.5 * dt)

    def _cut(self, z: PyTree) -> PyTree:
        """Products with forces and cooling rates have waves of all lengths."""
        untouched = self.equation.forcing is None and self.equation.cooling is None
        return z if untouched else {**z, "u": self.project(z["u"])}

    def stable_dt(self, u):
        """1 / max Σ_a ((|v_a| + a)/Δx_a + π D/Δx_a²): waves and diffusion at Courant number 1, where |λ| Δt = π at the cut-off.

        SSP-RK3 takes about 0.55. a is the sound speed, D the largest of 4μ/(3ρ), γμ/(ρ Pr) and the scalars' κ.
        """
        rate = wave_rate(self.equation, self.grid, self.equation.primitive(u), np.pi)
        return 1 / jnp.maximum(jnp.max(rate), jnp.finfo(u.dtype).tiny)
