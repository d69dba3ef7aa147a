"""Which network stands at which place in which solver, as data: what the tests go through and what docs/closures.md shows."""

PLACES = ("flux", "source", "interpolation", "post_step", "replacement")

WAVES = ("ks_spectral", "ks_finite_volume")
FLOWS = ("spectral_2d", "finite_volume_2d", "spectral_3d", "finite_volume_3d")
WALLS = ("walls_2d",)
GASES = ("gas_1d", "gas_2d", "gas_3d")
SPECTRAL_GASES = ("gas_spectral_2d", "gas_spectral_3d")
HOSTED = ("jax_cfd_spectral_2d", "jax_cfd_finite_volume_2d")

OWN = (*WAVES, *FLOWS, *WALLS, *GASES, *SPECTRAL_GASES)
SOLVERS = {
    "ks_spectral": "Kuramoto–Sivashinsky, spectral",
    "ks_finite_volume": "Kuramoto–Sivashinsky, finite volume",
    "spectral_2d": "Navier–Stokes 2D, spectral",
    "spectral_3d": "Navier–Stokes 3D, spectral",
    "finite_volume_2d": "Navier–Stokes 2D, finite volume",
    "finite_volume_3d": "Navier–Stokes 3D, finite volume",
    "walls_2d": "Navier–Stokes 2D, finite volume between walls",
    "gas_1d": "gas 1D, finite volume",
    "gas_2d": "gas 2D, finite volume",
    "gas_3d": "gas 3D, finite volume",
    "gas_spectral_2d": "gas 2D, spectral",
    "gas_spectral_3d": "gas 3D, spectral",
    "jax_cfd_spectral_2d": "jax-cfd 2D, spectral",
    "jax_cfd_finite_volume_2d": "jax-cfd 2D, finite volume",
}

FACES = ("finite_volume_2d", "finite_volume_3d", *WALLS, *GASES)
_EVERYWHERE = {"flux": OWN, "source": OWN, "interpolation": FACES, "post_step": OWN, "replacement": OWN}

SUPPORTED: dict[str, dict[str, tuple[str, ...]]] = {
    "cnn": {
        "flux": (*OWN, *HOSTED),
        "source": (*OWN, *HOSTED),
        "interpolation": FACES,
        "post_step": (*OWN, *HOSTED),
        "replacement": OWN,
    },
    "dilated_resnet": _EVERYWHERE,
    "unet": _EVERYWHERE,
    "fno": _EVERYWHERE,
    "graph_network": _EVERYWHERE,
    "graph_flux": {"flux": (*OWN, *HOSTED)},
    "tensor_basis_flux": {"flux": (*FLOWS, *WALLS, *HOSTED)},
}
"""Network → place → solvers where a training step runs and the adjoint test passes."""

DEFAULT = {
    ("cnn", "source", "jax_cfd_finite_volume_2d"),
    ("cnn", "post_step", "jax_cfd_spectral_2d"),
    ("dilated_resnet", "flux", "ks_finite_volume"),
    ("cnn", "source", "finite_volume_2d"),
    ("unet", "interpolation", "gas_1d"),
    ("fno", "flux", "ks_spectral"),
    ("fno", "flux", "walls_2d"),
    ("fno", "replacement", "gas_3d"),
    ("graph_network", "source", "spectral_2d"),
    ("graph_network", "replacement", "finite_volume_3d"),
    ("graph_flux", "flux", "gas_2d"),
    ("cnn", "flux", "gas_spectral_3d"),
    ("dilated_resnet", "source", "gas_spectral_2d"),
    ("tensor_basis_flux", "flux", "spectral_3d"),
}
"""The cells that every run of the tests goes through; the others are marked slow."""

CELLS = [
    (network, place, solver) for network, places in SUPPORTED.items() for place, solvers in places.items() for solver in solvers
]

TOGETHER = [
    (network, solver, places)
    for network, solver in dict.fromkeys((n, s) for n, _, s in CELLS)
    for alone in (False, True)
    if (places := tuple(p for n, p, s in CELLS if (n, s) == (network, solver) and (p == "replacement") == alone))
]
"""(network, solver, places): every cell once, closures of one network in one solver at once; a replacement stands alone."""


def table() -> str:
    """The table of docs/closures.md: one row per network and place, one column per solver."""
    names = {
        "cnn": "`cnn`",
        "graph_flux": "closure `graph_flux`",
        "tensor_basis_flux": "closure `tensor_basis_flux`",
        **{name: f"`{name}`" for name in ("dilated_resnet", "unet", "fno", "graph_network")},
    }
    head = ["network", "place", *(title.replace(", ", ",<br>") for title in SOLVERS.values())]
    lines = [head, ["---"] * 2 + [":-:"] * len(SOLVERS)]
    for network, places in SUPPORTED.items():
        for place, solvers in places.items():
            marks = ["●" if (network, place, s) in DEFAULT else "○" if s in solvers else "" for s in SOLVERS]
            lines.append([names[network], f"`{place}`", *marks])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
