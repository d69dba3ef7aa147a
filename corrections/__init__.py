"""What is added to a solver: classical closures, networks, and networks at a place.

The table maps the short names of YAML to `module:name`; nothing is imported until it is asked for.
"""

if not __name__.startswith("hybridsim."):
    # a second copy of every class would be made, and no isinstance would hold
    raise ImportError("import hybridsim.corrections, not corrections: this folder is installed as a part of hybridsim")

CLOSURES: dict[str, str] = {
    "dynamic_smagorinsky": "hybridsim.corrections.dynamic:DynamicSmagorinsky",
    "gradient_model": "hybridsim.corrections.gradient_model:GradientModel",
    "graph_flux": "hybridsim.corrections.graph:GraphFlux",
    "hyperviscosity": "hybridsim.corrections.eddy:Hyperviscosity",
    "learned_correction": "hybridsim.corrections.learned:LearnedCorrection",
    "learned_flux": "hybridsim.corrections.learned:LearnedFlux",
    "learned_interpolation": "hybridsim.corrections.learned:LearnedInterpolation",
    "learned_source": "hybridsim.corrections.learned:LearnedSource",
    "learned_step": "hybridsim.corrections.learned:LearnedStep",
    "leith": "hybridsim.corrections.eddy:Leith",
    "smagorinsky": "hybridsim.corrections.eddy:Smagorinsky",
    "spectral_eddy_viscosity": "hybridsim.corrections.spectral_eddy:SpectralEddyViscosity",
    "tensor_basis_flux": "hybridsim.corrections.tensor_basis:TensorBasisFlux",
}
"""`corrections[].use`: the closures."""

STRUCTURE = "hybridsim.corrections.structure:Structured"
"""`corrections[].structure`: what is put around a Flux closure to keep it dissipative."""

NETWORKS: dict[str, str] = {
    "cnn": "hybridsim.corrections.networks:CNN",
    "dilated_resnet": "hybridsim.corrections.networks:DilatedResNet",
    "fno": "hybridsim.corrections.fourier:FNO",
    "graph_network": "hybridsim.corrections.graph:GraphNetwork",
    "unet": "hybridsim.corrections.networks:UNet",
}
"""`corrections[].network.use`: the networks of the learned closures."""
