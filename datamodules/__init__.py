"""Datamodules: source and target domains, with splits, few-shot subsets and augmentation."""

from datamodules.audio import AudioFolders
from datamodules.base import TransferDataModule
from datamodules.class_subsets import ClassSubset
from datamodules.digits import Digits
from datamodules.domain_folders import DomainFolders
from datamodules.errors import DataError
from datamodules.image import ImageArrays, ImageFolders
from datamodules.paired import Paired
from datamodules.shifted import Corruption, NoShift, Rotation, Shift, Shifted, SpuriousColour
from datamodules.tabular import TabularData
from datamodules.text import TextFiles
from datamodules.waveforms import BackgroundNoise, RandomGain, RandomTimeShift

# earlier names, which a saved config may contain
Classes, Colour, Identity, Tables = ClassSubset, SpuriousColour, NoShift, TabularData

__all__ = [
    "AudioFolders",
    "BackgroundNoise",
    "ClassSubset",
    "Classes",
    "Colour",
    "Corruption",
    "DataError",
    "Digits",
    "DomainFolders",
    "Identity",
    "ImageArrays",
    "ImageFolders",
    "NoShift",
    "Paired",
    "RandomGain",
    "RandomTimeShift",
    "Rotation",
    "Shift",
    "Shifted",
    "SpuriousColour",
    "Tables",
    "TabularData",
    "TextFiles",
    "TransferDataModule",
]
