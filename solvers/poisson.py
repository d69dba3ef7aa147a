"""Σ_a δ_a² φ = r, directly: the eigenvectors of every axis turn the discrete Laplacian into a product (Lynch, Rice & Thomas 1964,
doi:10.1007/BF01386067)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridsim.grid import Grid

PRECISION = jax.lax.Precision.HIGHEST
"""Full float32 products: with fewer bits the divergence would not vanish."""


def _along(matrix: Array, q: Array, axis: int, transposed: bool) -> Array:
    """Σ_j M_kj q_j, or Σ_j M_jk q_j, along `axis`."""
    product = jax.lax.dot_general(matrix, q, (((0 if transposed else 1,), (axis,)), ((), ())), precision=PRECISION)
    return jnp.moveaxis(product, 0, axis)


class Poisson(eqx.Module):
    """φ̂ = r̂ / Σ_a λ_a: the inverse of the discrete Laplacian Σ_a (φ_{i+1} − 2φ_i + φ_{i−1}) / Δx_a² at the cell centres.

    Per axis, with the step h and n cells:

    - periodic: Fourier modes by fast transforms, λ = −(2/h sin(k h/2))². On CPU even and odd cells of the first such axis make the
      real and the imaginary part of half as many numbers c, and one complex transform of these does for a real one of all: with
      s = 1/Σ_a λ_a at k and at k + n/2, σ and δ half their sum and difference, ĉ ← (σ − δ sin 2πk/n) ĉ(k) + i δ cos 2πk/n ĉ*(−k);
    - walls on both sides (φ mirrored): cos(πk(i + ½)/n), λ = −(2/h sin(πk/2n))²;
    - outflow above (φ = 0 on that face): cos(π(k + ½)(i + ½)/n), λ = −(2/h sin(π(k + ½)/2n))².

    **Arguments:** `grid`, whose `boundaries` choose the modes, and `dtype`. Call it with r. Cosine transforms are products with
    n × n matrices: on CPU faster than by fast transforms up to n = 512 at least. Modes of walls on an even number of cells are even
    or odd about the middle, which halves the products. A constant part of r, which no φ has where nothing fixes its level, is
    dropped.
    """

    inverse: tuple[Float[Array, "..."], ...]
    bases: tuple[tuple[Float[Array, "k i"], ...], ...]
    grid: Grid

    def __init__(self, grid: Grid, dtype: Any):
        self.grid = grid
        fourier = [a for a in range(grid.ndim) if grid.periodic[a]]
        pairs = self._pairs
        last = fourier[-1] if fourier and pairs is None else None
        total, bases = np.zeros(()), []
        for a, (n, h, sides) in enumerate(zip(grid.shape, grid.spacing, grid.boundaries, strict=True)):
            if grid.periodic[a]:
                mode = np.arange(n // 2 + 1) if a == last else np.fft.fftfreq(n, 1 / n)
                angle, matrices = np.pi * mode / n, ()
            else:
                mode = np.arange(n) + (0.5 if sides[1] == "outflow" else 0.0)
                basis = np.sqrt(np.where(mode == 0, 1, 2) / n)[:, None] * np.cos(np.pi / n * np.outer(mode, np.arange(n) + 0.5))
                angle, matrices = np.pi * mode / (2 * n), (basis,)
                if n % 2 == 0 and sides[1] != "outflow":
                    matrices = basis[0::2, : n // 2], basis[1::2, : n // 2]
                    angle = np.concatenate([angle[0::2], angle[1::2]])
            total = total - ((2 / h * np.sin(angle)) ** 2).reshape([-1 if b == a else 1 for b in range(grid.ndim)])
            bases.append(tuple(jnp.asarray(matrix, dtype) for matrix in matrices))
        inverse = np.where(total < 0, 1 / np.where(total < 0, total, 1.0), 0.0)
        if pairs is None:
            symbols = (inverse,)
        else:
            lower, upper = np.split(inverse, 2, pairs)
            angle = 2 * np.pi / grid.shape[pairs] * np.arange(grid.shape[pairs] // 2)
            angle = angle.reshape([-1 if a == pairs else 1 for a in range(grid.ndim)])
            mean, half = 0.5 * (lower + upper), 0.5 * (lower - upper)
            symbols = mean - half * np.sin(angle), half * np.cos(angle)
        self.inverse = tuple(jnp.asarray(q, dtype) for q in symbols)
        self.bases = tuple(bases)

    @property
    def _pairs(self) -> int | None:
        """The axis of which even and odd cells are taken together."""
        first = next((a for a in range(self.grid.ndim) if self.grid.periodic[a]), None)
        return first if first is not None and self.grid.shape[first] % 2 == 0 and jax.default_backend() == "cpu" else None

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        walls = [a for a in range(r.ndim) if self.bases[a]]
        fourier = [a for a in range(r.ndim) if not self.bases[a]]
        for a in walls:
            r = self._transform(r, a)
        if len(self.inverse) == 2:
            r = self._solved_in_pairs(r, fourier)
        elif fourier:
            hat = jnp.fft.rfftn(r, axes=fourier) * self.inverse[0]
            r = jnp.fft.irfftn(hat, s=[self.grid.shape[a] for a in fourier], axes=fourier)
        else:
            r = r * self.inverse[0]
        for a in reversed(walls):
            r = self._back(r, a)
        return r

    def _solved_in_pairs(self, r: Array, fourier: list[int]) -> Array:
        first, (own, other) = fourier[0], self.inverse
        n = r.shape[first]
        pairs = r.reshape(*r.shape[:first], n // 2, 2, *r.shape[first + 1 :])
        even, odd = (jax.lax.index_in_dim(pairs, k, first + 1, keepdims=False) for k in range(2))
        hat = jnp.fft.fftn(jax.lax.complex(even, odd), axes=fourier)
        mirrored = jnp.roll(jnp.flip(hat, fourier), (1,) * len(fourier), fourier)
        hat = jax.lax.complex(own * hat.real + other * mirrored.imag, own * hat.imag + other * mirrored.real)
        pairs = jnp.fft.ifftn(hat, axes=fourier)
        # Unpacked once, not by everything that reads it.
        return jax.lax.optimization_barrier(jnp.stack([pairs.real, pairs.imag], first + 1).reshape(r.shape))

    def _transform(self, q: Array, axis: int) -> Array:
        if len(self.bases[axis]) == 1:
            return _along(self.bases[axis][0], q, axis, transposed=False)
        even, odd = self.bases[axis]
        lower, upper = jnp.split(q, 2, axis)
        upper = jnp.flip(upper, axis)
        halves = _along(even, lower + upper, axis, transposed=False), _along(odd, lower - upper, axis, transposed=False)
        return jnp.concatenate(halves, axis)

    def _back(self, hat: Array, axis: int) -> Array:
        if len(self.bases[axis]) == 1:
            return _along(self.bases[axis][0], hat, axis, transposed=True)
        even, odd = (_along(m, q, axis, transposed=True) for m, q in zip(self.bases[axis], jnp.split(hat, 2, axis), strict=True))
        return jnp.concatenate([even + odd, jnp.flip(even - odd, axis)], axis)
