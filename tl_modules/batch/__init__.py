"""A batch of domains on its way through the module, and what its parts may ask of the module."""
