"""What is solved: equations, their discretisations, steppers, forcings and initial states.

The tables map the short names of YAML to `module:name`; nothing is imported until it is asked for.
"""

if not __name__.startswith("hybridsim."):
    # a second copy of every class would be made, and no isinstance would hold
    raise ImportError("import hybridsim.solvers, not solvers: this folder is installed as a part of hybridsim")

EQUATIONS: dict[str, str] = {
    "kuramoto_sivashinsky": "hybridsim.solvers.kuramoto_sivashinsky:KuramotoSivashinsky",
    "navier_stokes": "hybridsim.solvers.incompressible:NavierStokes",
}
"""`equation.use`: the physics."""

SOLVERS: dict[str, dict[str, dict[int, str]]] = {
    "kuramoto_sivashinsky": {
        "finite_volume": {1: "hybridsim.solvers.kuramoto_sivashinsky:FiniteVolumeKS"},
        "spectral": {1: "hybridsim.solvers.kuramoto_sivashinsky:SpectralKS"},
    },
    "navier_stokes": {
        "finite_volume": {
            2: "hybridsim.solvers.finite_volume:StaggeredFiniteVolume",
            3: "hybridsim.solvers.finite_volume:StaggeredFiniteVolume",
        },
        "spectral": {
            2: "hybridsim.solvers.spectral:Spectral2D",
            3: "hybridsim.solvers.spectral:Spectral3D",
        },
    },
}
"""`equation.use`, then `solver`, then the number of space dimensions: the discretisations of that equation."""

STEPPERS: dict[str, str] = {
    "crank_nicolson_rk4": "hybridsim.solvers.steppers:CrankNicolsonRK4",
    "etdrk2": "hybridsim.solvers.steppers:ETDRK2",
    "etdrk4": "hybridsim.solvers.steppers:ETDRK4",
    "forward_euler": "hybridsim.solvers.steppers:ForwardEuler",
    "ssprk2": "hybridsim.solvers.steppers:SSPRK2",
    "ssprk3": "hybridsim.solvers.steppers:SSPRK3",
}
"""`stepper`: the time integrators."""

FORCINGS: dict[str, str] = {
    "isotropic": "hybridsim.solvers.incompressible:Isotropic",
    "kolmogorov": "hybridsim.solvers.incompressible:Kolmogorov",
    "linear": "hybridsim.solvers.incompressible:Linear",
    "linear_drag": "hybridsim.solvers.incompressible:LinearDrag",
    "uniform": "hybridsim.solvers.incompressible:UniformForce",
}
"""`equation.forcing.use`: the body forces."""

BOUNDARY_VELOCITIES: dict[str, str] = {
    "moving": "hybridsim.solvers.incompressible:Moving",
    "parabola": "hybridsim.solvers.incompressible:Parabola",
}
"""`equation.boundary_velocity.<side>.use`: velocities of walls and inflows."""

INITIAL: dict[str, str] = {
    "random_velocity": "hybridsim.solvers.initial:RandomVelocity",
    "random_waves": "hybridsim.solvers.initial:RandomWaves",
    "taylor_green": "hybridsim.solvers.initial:TaylorGreen",
    "uniform": "hybridsim.solvers.initial:Uniform",
}
"""`initial.use`: the initial states."""
