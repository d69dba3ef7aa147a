"""What is solved: equations, their discretisations, steppers, forcings and initial states.

The tables map the short names of YAML to `module:name`; nothing is imported until it is asked for.
"""

if not __name__.startswith("hybridsim."):
    # a second copy of every class would be made, and no isinstance would hold
    raise ImportError("import hybridsim.solvers, not solvers: this folder is installed as a part of hybridsim")

EQUATIONS: dict[str, str] = {
    "compressible": "hybridsim.solvers.compressible:CompressibleNavierStokes",
    "kuramoto_sivashinsky": "hybridsim.solvers.kuramoto_sivashinsky:KuramotoSivashinsky",
    "navier_stokes": "hybridsim.solvers.incompressible:NavierStokes",
}
"""`equation.use`: the physics."""

SOLVERS: dict[str, dict[str, dict[int, str]]] = {
    "compressible": {
        "finite_volume": {
            1: "hybridsim.solvers.godunov:CompressibleFiniteVolume",
            2: "hybridsim.solvers.godunov:CompressibleFiniteVolume",
            3: "hybridsim.solvers.godunov:CompressibleFiniteVolume",
        },
        "spectral": {
            1: "hybridsim.solvers.spectral_gas:CompressibleSpectral",
            2: "hybridsim.solvers.spectral_gas:CompressibleSpectral",
            3: "hybridsim.solvers.spectral_gas:CompressibleSpectral",
        },
    },
    "kuramoto_sivashinsky": {
        "finite_volume": {1: "hybridsim.solvers.kuramoto_sivashinsky:FiniteVolumeKS"},
        "spectral": {1: "hybridsim.solvers.kuramoto_sivashinsky:SpectralKS"},
    },
    "navier_stokes": {
        "finite_volume": {
            2: "hybridsim.solvers.finite_volume:StaggeredFiniteVolume",
            3: "hybridsim.solvers.finite_volume:StaggeredFiniteVolume",
        },
        "jax_cfd_finite_volume": {
            2: "hybridsim.solvers.hosted:JaxCFDFiniteVolume",
            3: "hybridsim.solvers.hosted:JaxCFDFiniteVolume",
        },
        "jax_cfd_spectral": {2: "hybridsim.solvers.hosted:JaxCFDSpectral"},
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
    "exponax": "hybridsim.solvers.hosted:ExponaxStepper",
    "forward_euler": "hybridsim.solvers.steppers:ForwardEuler",
    "jax_cfd": "hybridsim.solvers.hosted:JaxCFDStepper",
    "ssprk2": "hybridsim.solvers.steppers:SSPRK2",
    "ssprk3": "hybridsim.solvers.steppers:SSPRK3",
    "vl2": "hybridsim.solvers.steppers:VL2",
}
"""`stepper`: the time integrators."""

COOLING: dict[str, str] = {
    "log_normal": "hybridsim.solvers.cooling:LogNormalCooling",
    "mixing_layer": "hybridsim.solvers.cooling:MixingLayerCooling",
    "piecewise_power_law": "hybridsim.solvers.cooling:PiecewisePowerLaw",
    "power_law": "hybridsim.solvers.cooling:PowerLawCooling",
}
"""`equation.cooling.use`: radiative losses."""

FORCINGS: dict[str, str] = {
    "isotropic": "hybridsim.solvers.incompressible:Isotropic",
    "kolmogorov": "hybridsim.solvers.incompressible:Kolmogorov",
    "linear": "hybridsim.solvers.incompressible:Linear",
    "linear_drag": "hybridsim.solvers.incompressible:LinearDrag",
    "ornstein_uhlenbeck": "hybridsim.solvers.stirring:OrnsteinUhlenbeck",
    "uniform": "hybridsim.solvers.incompressible:UniformForce",
}
"""`equation.forcing.use`: the body forces."""

BOUNDARY_STATES: dict[str, str] = {
    "shear": "hybridsim.solvers.compressible:ShearInflow",
    "uniform": "hybridsim.solvers.compressible:UniformInflow",
}
"""`equation.boundary_state.<side>.use`: the gas beyond sides that are fixed."""

BOUNDARY_VELOCITIES: dict[str, str] = {
    "moving": "hybridsim.solvers.incompressible:Moving",
    "parabola": "hybridsim.solvers.incompressible:Parabola",
}
"""`equation.boundary_velocity.<side>.use`: velocities of walls and inflows."""

INITIAL: dict[str, str] = {
    "blast": "hybridsim.solvers.compressible_initial:Blast",
    "compressible_turbulence": "hybridsim.solvers.compressible_initial:CompressibleTurbulence",
    "gresho": "hybridsim.solvers.compressible_initial:Gresho",
    "isentropic_vortex": "hybridsim.solvers.compressible_initial:IsentropicVortex",
    "kelvin_helmholtz": "hybridsim.solvers.compressible_initial:KelvinHelmholtz",
    "linear_wave": "hybridsim.solvers.compressible_initial:LinearWave",
    "mixing_layer": "hybridsim.solvers.compressible_initial:MixingLayer",
    "random_velocity": "hybridsim.solvers.initial:RandomVelocity",
    "random_waves": "hybridsim.solvers.initial:RandomWaves",
    "shock_tube": "hybridsim.solvers.compressible_initial:ShockTube",
    "shu_osher": "hybridsim.solvers.compressible_initial:ShuOsher",
    "taylor_green": "hybridsim.solvers.initial:TaylorGreen",
    "taylor_green_gas": "hybridsim.solvers.compressible_initial:TaylorGreenGas",
    "uniform": "hybridsim.solvers.initial:Uniform",
    "uniform_gas": "hybridsim.solvers.compressible_initial:UniformGas",
}
"""`initial.use`: the initial states."""
