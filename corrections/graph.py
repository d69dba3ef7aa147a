"""m_ij = −m_ji: message passing on the graph of the grid, whose cells are nodes and whose faces are edges; messages are fluxes."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from hybridsim.contract import Flux, Place, Variable, View
from hybridsim.convolution import pointwise
from hybridsim.corrections.learned import Inputs, Scaling
from hybridsim.corrections.networks import ACTIVATIONS, Activation, Convolution, activated_channels, check_positive


def _above(q: Float[Array, "c *grid"], axis: int, periodic: bool) -> Float[Array, "c *grid"]:
    """q_{i+1} at i; beyond the last cell of an axis that is not periodic, that cell again."""
    if periodic:
        return jnp.roll(q, -1, axis)
    n = q.shape[axis]
    return jnp.concatenate([jax.lax.slice_in_dim(q, 1, n, axis=axis), jax.lax.slice_in_dim(q, n - 1, n, axis=axis)], axis=axis)


def _below(m: Float[Array, "c *grid"], axis: int, periodic: bool) -> Float[Array, "c *grid"]:
    """m_{i−½} at i; zero below the first cell of an axis that is not periodic."""
    if periodic:
        return jnp.roll(m, 1, axis)
    n = m.shape[axis]
    first = jax.lax.slice_in_dim(m, 0, 1, axis=axis)
    return jnp.concatenate([jnp.zeros_like(first), jax.lax.slice_in_dim(m, 0, n - 1, axis=axis)], axis=axis)


class Messages(eqx.Module):
    """m_{i+½} = φ(h_i, h_{i+1}, e_a) − φ(h_{i+1}, h_i, −e_a),  φ(x, y, e) = C σ(A x + B y + E e + b): antisymmetric, whatever φ is.

    e_a is the unit vector along axis a. Sides of the box that are not periodic are no edges: their messages are zero.

    **Arguments:** `dims`, `width` of the nodes and messages, `activation`, a random `key`.
    """

    own: Convolution
    other: Float[Array, "hidden width"]
    direction: Float[Array, "hidden axis"]
    out: Float[Array, "width inner"]
    activation: str = eqx.field(static=True)

    def __init__(self, dims: int, width: int, activation: Activation, *, key: PRNGKeyArray):
        hidden = activated_channels(width, activation)
        keys = jax.random.split(key, 4)
        draw = lambda key, shape, scale: scale * jax.random.normal(key, shape, jnp.float32)  # noqa: E731
        self.own = Convolution(dims, width, hidden, 1, key=keys[0])
        self.other = draw(keys[1], (hidden, width), (2 / width) ** 0.5)
        self.direction = draw(keys[2], (hidden, dims), 1.0)
        self.out = draw(keys[3], (width, width), (1 / width) ** 0.5)
        self.activation = activation

    def __call__(self, h: Float[Array, "w *grid"], periodic: tuple[bool, ...]) -> list[Float[Array, "w *grid"]]:
        """One array per axis, stored at i for the face i + ½."""
        sigma, ones = ACTIVATIONS[self.activation], (1,) * (h.ndim - 1)
        x, y = self.own(h), pointwise(h, self.other.astype(h.dtype))
        messages = []
        for a, wraps in enumerate(periodic):
            e = self.direction[:, a].astype(h.dtype).reshape(-1, *ones)
            there = sigma(x + _above(y, a + 1, wraps) + e)
            back = sigma(_above(x, a + 1, wraps) + y - e)
            m = pointwise(there - back, self.out.astype(h.dtype))
            if not wraps:
                n = m.shape[a + 1]
                inner = jax.lax.slice_in_dim(m, 0, n - 1, axis=a + 1)
                m = jnp.concatenate([inner, jnp.zeros_like(jax.lax.slice_in_dim(m, 0, 1, axis=a + 1))], axis=a + 1)
            messages.append(m)
        return messages


def _received(messages: list[Array], periodic: tuple[bool, ...]) -> Array:
    """Σ_j m_ij = Σ_a (m_{i+½} − m_{i−½}): all messages of a cell."""
    total = jnp.zeros_like(messages[0])
    for a, (m, wraps) in enumerate(zip(messages, periodic, strict=True)):
        total = total + (m - _below(m, a + 1, wraps))
    return total


class GraphNetwork(eqx.Module):
    """y_i = D (h_i + Σ_j m_ij),  h_i ← h_i + σ(U [h_i, Σ_j m_ij]),  m_ij = φ(h_i, h_j, e_ij) − φ(h_j, h_i, e_ji) = −m_ji.

    Message passing (Gilmer et al. 2017, arXiv:1704.01212; on meshes Pfaff et al. 2021, arXiv:2010.03409) with antisymmetric
    messages, on the graph of the grid: cells are nodes, faces are edges. `messages` gives D m of the last round at the faces,
    which are fluxes: what leaves a cell enters its neighbour.

    **Arguments:**

    - `dims`, `channels_in`, `channels_out`.
    - `width`: channels of nodes and messages; `rounds`: of messages, the last one included.
    - `activation`: σ, as in `CNN`.

    Reach: `rounds` cells along each axis (neighbours of neighbours, not corners at once).
    """

    encoder: Convolution
    rounds: tuple[tuple[Messages, Convolution], ...]
    last: Messages
    decoder: Float[Array, "o w"]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        dims: int,
        channels_in: int,
        channels_out: int,
        width: int = 16,
        rounds: int = 3,
        activation: Activation = "gelu",
        *,
        key: PRNGKeyArray,
    ):
        check_positive(width=width, rounds=rounds)
        hidden = activated_channels(width, activation)
        first, last, *keys = jax.random.split(key, 2 * rounds)
        self.encoder = Convolution(dims, channels_in, hidden, 1, key=first)
        self.rounds = tuple(
            (Messages(dims, width, activation, key=a), Convolution(dims, 2 * width, hidden, 1, key=b))
            for a, b in zip(keys[::2], keys[1::2], strict=True)
        )
        self.last = Messages(dims, width, activation, key=last)
        self.decoder = jnp.zeros((channels_out, width), jnp.float32)
        self.activation = activation

    def _last_round(self, u: Array, periodic: tuple[bool, ...]) -> tuple[Array, list[Array]]:
        """(h, m) at the end: nodes and messages before they are decoded."""
        sigma = ACTIVATIONS[self.activation]
        h = sigma(self.encoder(u))
        for messages, update in self.rounds:
            h = h + sigma(update(jnp.concatenate([h, _received(messages(h, periodic), periodic)])))
        return h, self.last(h, periodic)

    def __call__(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "o *grid"]:
        wraps = (True,) * (u.ndim - 1) if periodic is None else periodic
        h, messages = self._last_round(u, wraps)
        return pointwise(h + _received(messages, wraps), self.decoder.astype(u.dtype))

    def messages(self, u: Float[Array, "i *grid"], periodic: tuple[bool, ...] | None = None) -> Float[Array, "axis o *grid"]:
        """D m_{i+½} along each axis, stored at i."""
        _, messages = self._last_round(u, (True,) * (u.ndim - 1) if periodic is None else periodic)
        return jnp.stack([pointwise(m, self.decoder.astype(u.dtype)) for m in messages])


class GraphFlux(Flux):
    """F[a, c] = U² m_{i+½}[c], m_ij = −m_ji: the messages of a `GraphNetwork` are the fluxes through the faces, U C m for scalars.

    A flux belongs to a face and not to a cell, and it changes its sign where the two cells of the face change places; here so by
    construction, for any weights. The network sees the flow at the cell centres as `LearnedFlux` does; messages move from faces to
    the flux points by averages.

    **In a gas** fluxes are those to an observer who moves with the gas at the face, as in `LearnedFlux`.

    **Arguments:**

    - `dims`, `variables`: given by the experiment.
    - `width`, `rounds`, `activation`: of the `GraphNetwork`.
    - `velocity_scale`, `inputs`, `scalar_scale`, `density_scale`, `temperature_scale`, `mass_flux`: as in `LearnedFlux`.

    Sums of every channel are conserved to rounding for any weights, the total energy of a gas among them. The stress need not be
    symmetric, so that local torques can arise; nothing bounds the kinetic energy that it may add.
    """

    network: GraphNetwork
    scaling: Scaling
    mass_flux: bool = eqx.field(static=True)

    def __init__(
        self,
        dims: int = 2,
        width: int = 16,
        rounds: int = 3,
        activation: Activation = "gelu",
        velocity_scale: float = 1.0,
        inputs: Inputs = "velocity",
        scalar_scale: float = 1.0,
        density_scale: float = 1.0,
        temperature_scale: float = 1.0,
        mass_flux: bool = True,
        *,
        variables: tuple[Variable, ...] | None = None,
        key: PRNGKeyArray,
    ):
        self.scaling = Scaling(
            "GraphFlux",
            dims,
            variables,
            inputs,
            velocity=velocity_scale,
            scalar=scalar_scale,
            density=density_scale,
            temperature=temperature_scale,
        )
        self.mass_flux = mass_flux
        self.network = GraphNetwork(dims, self.scaling.inputs_count, len(self._given), width, rounds, activation, key=key)

    @property
    def _given(self) -> tuple[int, ...]:
        """The channels that get a flux: all, or all but the mass of a gas."""
        without = self.scaling.gas and not self.mass_flux
        return tuple(c for c in range(len(self.scaling.names)) if c or not without)

    def __call__(self, view: View, memory=None, key=None) -> Float[Array, "axis c *grid"]:
        grid, scaling = view.grid, self.scaling
        rows = []
        for a, messages in enumerate(self.network.messages(scaling.features(view), grid.periodic)):
            face = grid.flux_place(grid.centre, a)
            zero = jnp.zeros(grid.shape, view.u.dtype)
            parts = dict(zip(self._given, messages, strict=True))
            change = jnp.stack([parts.get(c, zero) for c in range(len(scaling.names))])
            row = scaling.velocity * scaling.change(view, change, face)
            rows.append(jnp.stack([_to_flux_point(view, q, a, face, view.flux_place(a, c)) for c, q in enumerate(row)]))
        return jnp.stack(rows)


def _to_flux_point(view: View, q: Float[Array, "*grid"], axis: int, face: Place, to: Place) -> Float[Array, "*grid"]:
    """q at the faces along `axis`, moved to the flux point of a channel.

    Solvers with all values in one place do not move them, so half a cell along `axis` is taken here. The sides of the box have no
    message: cells there take that of their inner face.
    """
    if to[axis] == face[axis]:
        return view.to(q, face, to)
    if view.grid.periodic[axis]:
        lower, upper = jnp.roll(q, 1, axis), q
    else:
        n = q.shape[axis]
        inner = jax.lax.slice_in_dim(q, 0, n - 1, axis=axis)
        lower = jnp.concatenate([jax.lax.slice_in_dim(q, 0, 1, axis=axis), inner], axis=axis)
        upper = jnp.concatenate([inner, jax.lax.slice_in_dim(q, n - 2, n - 1, axis=axis)], axis=axis)
    return view.to(0.5 * (lower + upper), (*face[:axis], to[axis], *face[axis + 1 :]), to)
