"""What is asked: the shipped experiments, one YAML file each; `hybridsim list experiments` names them."""

if not __name__.startswith("hybridsim."):
    raise ImportError("import hybridsim.experiments, not experiments: this folder is installed as a part of hybridsim")
