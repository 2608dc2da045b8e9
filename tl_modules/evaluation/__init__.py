"""What a trained model costs to use."""

from tl_modules.evaluation.cost import machine, macs, peak_memory, speed

__all__ = ["machine", "macs", "peak_memory", "speed"]
