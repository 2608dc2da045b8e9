"""The batch of domains that travels through the module, and the interface of the module for its parts."""

from lightning_utilities.core.imports import RequirementCache


def _import_torchmetrics() -> None:
    """Imports torchmetrics as if transformers were missing: importing it at every start, for unused metrics, is slow.

    https://github.com/Lightning-AI/torchmetrics/issues/2242. `torchmetrics.text.bert` and similar modules, imported
    explicitly, still find transformers.
    """
    ask = RequirementCache.__bool__
    RequirementCache.__bool__ = lambda self: "transformers" not in str(self.requirement) and ask(self)  # type: ignore[method-assign]
    try:
        import torchmetrics  # noqa: F401
    finally:
        RequirementCache.__bool__ = ask  # type: ignore[method-assign]


_import_torchmetrics()
