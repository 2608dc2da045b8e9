"""A batch of domains on its way through the module, and what its parts may ask of the module."""

from lightning_utilities.core.imports import RequirementCache


def _import_torchmetrics() -> None:
    """Imports torchmetrics as if transformers were missing: it would load it at each start, for metrics not used here.

    https://github.com/Lightning-AI/torchmetrics/issues/2242. `torchmetrics.text.bert` and the like, imported by their
    module, find it all the same.
    """
    ask = RequirementCache.__bool__
    RequirementCache.__bool__ = lambda self: "transformers" not in str(self.requirement) and ask(self)  # type: ignore[method-assign]
    try:
        import torchmetrics  # noqa: F401
    finally:
        RequirementCache.__bool__ = ask  # type: ignore[method-assign]


_import_torchmetrics()
