"""What a trained model costs to use."""

from tl_modules.evaluation.cost import macs, peak_memory, speed

__all__ = ["macs", "peak_memory", "speed"]
