"""A recording in, classes out, by the package's own network, with SpecAugment and dropout."""

import wave_classes

from tl_modules import SpeechConvNet


class Data(wave_classes.Data):
    pass


class Small(SpeechConvNet):
    def __init__(self):
        super().__init__(width=4, kernel=3, mels=4)
