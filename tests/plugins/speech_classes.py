"""A recording in, classes out, by the package's own network, with SpecAugment and dropout."""

from wave_classes import Data  # noqa: F401

from tl_modules import SpeechConvNet


class Small(SpeechConvNet):
    def __init__(self):
        super().__init__(width=4, kernel=3, mels=4)
