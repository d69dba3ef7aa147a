"""hybridsim: coarse simulations with learned closures that behave like fine ones, on JAX.

Names are imported when they are first used, so that `import hybridsim` and `hybridsim --help` stay fast.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridsim.grid import Grid as Grid

__version__ = "0.1.0"

_EXPORTS = {"Grid": "hybridsim.grid"}

__all__ = ["Grid", "__version__"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hybridsim' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
