"""remora: kernels for the memory mechanisms of modern sequence models, as PyTorch operators.

`remora.ops` has the operators, `remora.modules` the layers built from them, `remora.models` whole models.
"""

from importlib.metadata import version as _version

from remora._info import Info, info

__version__ = _version("remora")
__all__ = ["Info", "__version__", "info"]
