"""τ = Σ_n g_n(invariants) T_n(S, Ω): a learned stress that turns with the flow."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.contract import Flux, Variable, View
from hybridsim.corrections.eddy import filter_width, velocity_channels
from hybridsim.corrections.gas import is_gas
from hybridsim.corrections.networks import CNN, Activation

MOST_TENSORS = {2: 2, 3: 10}
"""How many tensors span all that S and Ω can make without a trace, by the number of dimensions."""

CALM = 1e-3
"""Slopes below this part of U/Δ count as small: there the stress goes to zero with them, smoothly."""

Tensor = Float[Array, "i j *grid"]


def _product(*factors: Tensor) -> Tensor:
    """A B ⋯: products of the matrices of each cell."""
    first, *rest = factors
    for other in rest:
        # no jnp.sum over k, which XLA on CPU (JAX 0.10.2) gets wrong: tests/test_compiled.py
        terms = [first[:, k, None] * other[k][None] for k in range(len(other))]
        first = sum(terms[1:], terms[0])
    return first


def _applied(a: Tensor, q: Float[Array, "j *grid"]) -> Float[Array, "i *grid"]:
    """A q in each cell."""
    terms = [a[:, j] * q[j][None] for j in range(len(q))]
    return sum(terms[1:], terms[0])


def _trace(a: Tensor) -> Float[Array, "*grid"]:
    return sum((a[i, i] for i in range(1, len(a))), a[0, 0])


def invariants(s: Tensor, w: Tensor) -> list[Float[Array, "*grid"]]:
    """tr S², tr Ω², and in three dimensions tr S³, tr Ω²S, tr Ω²S²: what no rotation and no reflection changes."""
    ss, ww = _product(s, s), _product(w, w)
    found = [_trace(ss), _trace(ww)]
    if len(s) == 3:
        found += [_trace(_product(ss, s)), _trace(_product(ww, s)), _trace(_product(ww, ss))]
    return found


def tensors(s: Tensor, w: Tensor, count: int) -> list[Tensor]:
    """The first `count` of T_1 … T_10 of Pope (1975); in two dimensions there are T_1 and T_2."""
    one = jnp.eye(len(s), dtype=s.dtype).reshape(len(s), len(s), *(1,) * (s.ndim - 2))
    ss, ww = _product(s, s), _product(w, w)
    less = lambda a: a - _trace(a)[None, None] / len(s) * one  # noqa: E731
    # S is symmetric and Ω is not, so that transposes are the products in reverse order, with a sign for each Ω.
    turned = lambda a: jnp.swapaxes(a, 0, 1)  # noqa: E731
    made = [
        lambda: s,
        lambda: (t := _product(s, w)) + turned(t),
        lambda: less(ss),
        lambda: less(ww),
        lambda: (t := _product(w, ss)) + turned(t),
        lambda: less((t := _product(ww, s)) + turned(t)),
        lambda: (t := _product(w, s, ww)) + turned(t),
        lambda: (t := _product(s, w, ss)) + turned(t),
        lambda: less((t := _product(ww, ss)) + turned(t)),
        lambda: (t := _product(w, ss, ww)) + turned(t),
    ]
    return [make() for make in made[:count]]


class TensorBasisFlux(Flux):
    """F = −U² |G|² Σ_n g_n(λ) T_n(s, w) for the velocity, −U² |G| (h_1 + h_2 s + h_3 w) Δ∇c/U for scalars,  G = Δ ∇u / U.

    A stress that turns with the flow, for any weights: turning the box by 90°, reflecting it or moving it along at any speed does
    the same to the flux. s and w are the symmetric and the antisymmetric part of G/|G| at the cell centres; T_n are the ten tensors
    of Pope (1975, doi:10.1017/S0022112075003382), with coefficients from a network as in Ling, Kurzawski & Templeton (2016,
    doi:10.1017/jfm.2016.615). The network sees the invariants λ of its own cell, all of them bounded: tr s², tr w², in three
    dimensions tr s³, tr w²s, tr w²s², and |G|²/(1 + |G|²). A constant g_1 is an eddy viscosity ½ g_1 Δ² |∇u|; the gradient model is
    a sum of T_2, T_3 and T_4.

    **Arguments:**

    - `dims`, `variables`: space dimensions, two or three, and the channels (given by the experiment; without `variables`, the
      velocity alone).
    - `tensors`: how many, 1–2 in two dimensions and 1–10 in three (None: those up to second degree, 2 and 4).
    - `width`, `depth`, `activation`: of the network, a `CNN` that sees one cell.
    - `velocity_scale`: U, a typical speed; tells strong gradients from weak ones.

    Conserves momentum and scalars for any weights. Where slopes stay below 10⁻³ U/Δ, |G| means √(|G|² + 10⁻⁶), so that gradients
    of the flux exist at rest. Equivariant to rounding where the solver is: on cells that are squares or cubes, between periodic
    sides or walls alike. Pressure takes what an isotropic stress would do, so there is none. Nothing bounds the kinetic energy that
    it may add. Made for incompressible flow: it refuses a gas.
    """

    network: CNN
    names: tuple[str, ...] = eqx.field(static=True)
    tensors: int = eqx.field(static=True)
    velocity_scale: float = eqx.field(static=True)

    def __init__(
        self,
        dims: int = 2,
        tensors: int | None = None,
        width: int = 16,
        depth: int = 2,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        *,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        if dims not in MOST_TENSORS:
            raise ValueError("TensorBasisFlux: in one dimension nothing turns; it needs two or three")
        self.names = tuple("uvw"[:dims]) if variables is None else tuple(v.name for v in variables)
        if is_gas(self.names, dims):
            raise ValueError("TensorBasisFlux: made for incompressible flow, not for a gas; learned_flux and graph_flux serve both")
        if missing := [q for q in "uvw"[:dims] if q not in self.names]:
            raise ValueError(f"TensorBasisFlux: needs velocity channels; this solver has {', '.join(self.names)}, no {missing[0]}")
        if not (np.isfinite(velocity_scale) and velocity_scale > 0):
            raise ValueError(f"velocity_scale: must be positive and finite, found {velocity_scale}")
        most = MOST_TENSORS[dims]
        self.tensors = min(4, most) if tensors is None else tensors
        if not 1 <= self.tensors <= most:
            raise ValueError(f"tensors: in {dims} dimensions 1 to {most} are possible, found {tensors}")
        self.velocity_scale = float(velocity_scale)
        outputs = self.tensors + (3 if len(self.names) > dims else 0)
        self.network = CNN(dims, 3 if dims == 2 else 6, outputs, width, depth, 1, activation, key=key)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        names = tuple(v.name for v in view.variables)
        if names != self.names:
            raise ValueError(f"TensorBasisFlux: made for {', '.join(self.names)}; found {', '.join(names)}")
        velocity = velocity_channels(view, "TensorBasisFlux")
        speed, width = self.velocity_scale, filter_width(view)
        slopes = width / speed * view.to_centre(view.gradient())
        gradient = jnp.stack([slopes[:, c] for c in velocity], axis=1)
        square = jnp.sum(gradient**2, axis=(0, 1))
        size = jnp.sqrt(square + CALM**2)
        # ∂_j u_i stands at [j, i]
        s = 0.5 * (gradient + jnp.swapaxes(gradient, 0, 1)) / size[None, None]
        w = 0.5 * (jnp.swapaxes(gradient, 0, 1) - gradient) / size[None, None]
        out = self.network(jnp.stack([*invariants(s, w), square / (1 + square)]))
        stress = jnp.zeros_like(gradient)
        for g, tensor in zip(out, tensors(s, w, self.tensors), strict=False):
            stress = stress - g[None, None] * tensor
        columns = dict(zip(velocity, jnp.swapaxes((speed * size[None, None]) ** 2 * stress, 0, 1), strict=True))
        for c in range(len(names)):
            if c not in columns:
                h = out[self.tensors :, None]
                slope = slopes[:, c]
                turned = [_applied(a, slope) for a in (s, w)]
                columns[c] = -(speed**2) * size[None] * (h[0] * slope + h[1] * turned[0] + h[2] * turned[1])
        return view.to_flux_points(jnp.stack([columns[c] for c in range(len(names))], axis=1))
