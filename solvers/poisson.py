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

    - periodic: Fourier modes by fast transforms, λ = −(2/h sin(k h/2))²;
    - walls on both sides (φ mirrored): cos(πk(i + ½)/n), λ = −(2/h sin(πk/2n))²;
    - outflow above (φ = 0 on that face): cos(π(k + ½)(i + ½)/n), λ = −(2/h sin(π(k + ½)/2n))².

    **Arguments:** `grid`, whose `boundaries` choose the modes, and `dtype`. Call it with r. Cosine transforms are products with
    n × n matrices: on CPU faster than by fast transforms up to n = 512 at least. Modes of walls on an even number of cells are even
    or odd about the middle, which halves the products. A constant part of r, which no φ has where nothing fixes its level, is
    dropped.
    """

    inverse: Float[Array, "..."]
    bases: tuple[tuple[Float[Array, "k i"], ...], ...]
    grid: Grid

    def __init__(self, grid: Grid, dtype: Any):
        self.grid = grid
        last = max((a for a in range(grid.ndim) if grid.periodic[a]), default=None)
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
        self.inverse = jnp.asarray(np.where(total < 0, 1 / np.where(total < 0, total, 1.0), 0.0), dtype)
        self.bases = tuple(bases)

    def __call__(self, r: Float[Array, "*grid"]) -> Float[Array, "*grid"]:
        walls = [a for a in range(r.ndim) if self.bases[a]]
        fourier = [a for a in range(r.ndim) if not self.bases[a]]
        for a in walls:
            r = self._transform(r, a)
        if fourier:
            hat = jnp.fft.rfftn(r, axes=fourier) * self.inverse
            r = jnp.fft.irfftn(hat, s=[self.grid.shape[a] for a in fourier], axes=fourier)
        else:
            r = r * self.inverse
        for a in reversed(walls):
            r = self._back(r, a)
        return r

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
