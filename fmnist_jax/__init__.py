"""Functional training of Fashion-MNIST image classifiers in JAX.

`__init__.pyi` lists the names that most programs need; everything else is in the subpackages. A
name is imported when it is first used, so that the command line starts at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
