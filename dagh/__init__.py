"""Exact second derivatives of neural networks, block by block."""

import lazy_loader

# PyTorch takes seconds to import, which neither ``dagh --version`` nor a typing error should have to wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
