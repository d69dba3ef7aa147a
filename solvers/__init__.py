"""What is solved: equations, their discretisations, steppers, forcings and initial states.

The tables map the short names of YAML to `module:name`; nothing is imported until it is asked for.
"""

if not __name__.startswith("hybridsim."):
    # a second copy of every class would be made, and no isinstance would hold
    raise ImportError("import hybridsim.solvers, not solvers: this folder is installed as a part of hybridsim")

EQUATIONS: dict[str, str] = {
    "navier_stokes": "hybridsim.solvers.incompressible:NavierStokes",
}
"""`equation.use`: the physics."""

SOLVERS: dict[str, dict[str, str]] = {
    "navier_stokes": {
        "finite_volume": "hybridsim.solvers.finite_volume:StaggeredFiniteVolume",
        "spectral": "hybridsim.solvers.spectral:Spectral2D",
    },
}
"""`equation.use`, then `solver`: the discretisations of that equation."""

STEPPERS: dict[str, str] = {
    "crank_nicolson_rk4": "hybridsim.solvers.steppers:CrankNicolsonRK4",
    "etdrk4": "hybridsim.solvers.steppers:ETDRK4",
    "forward_euler": "hybridsim.solvers.steppers:ForwardEuler",
    "ssprk2": "hybridsim.solvers.steppers:SSPRK2",
    "ssprk3": "hybridsim.solvers.steppers:SSPRK3",
}
"""`stepper`: the time integrators."""

FORCINGS: dict[str, str] = {
    "kolmogorov": "hybridsim.solvers.incompressible:Kolmogorov",
    "linear_drag": "hybridsim.solvers.incompressible:LinearDrag",
}
"""`equation.forcing.use`: the body forces."""

INITIAL: dict[str, str] = {
    "random_velocity": "hybridsim.solvers.initial:RandomVelocity",
}
"""`initial.use`: the initial states."""
