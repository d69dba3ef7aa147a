"""What is solved: equations, their discretisations, steppers, forcings and initial states.

The tables map the short names of YAML to `module:name`; nothing is imported until it is asked for.
"""

if not __name__.startswith("hybridsim."):
    # a second copy of every class would be made, and no isinstance would hold
    raise ImportError("import hybridsim.solvers, not solvers: this folder is installed as a part of hybridsim")

EQUATIONS: dict[str, str] = {}
"""`equation.use`: the physics."""

SOLVERS: dict[str, dict[str, str]] = {}
"""`solver`, then `equation.use`: the discretisation of that equation."""

STEPPERS: dict[str, str] = {}
"""`stepper`: the time integrators."""

FORCINGS: dict[str, str] = {}
"""`equation.forcing.use`: the body forces."""

INITIAL: dict[str, str] = {}
"""`initial.use`: the initial states."""
