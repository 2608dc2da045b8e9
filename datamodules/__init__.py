"""Datamodules: source and target domains, with splits, few-shot subsets and augmentation."""

from datamodules.audio import AudioFolders
from datamodules.base import TransferDataModule
from datamodules.class_subsets import ClassSubset
from datamodules.digits import Digits
from datamodules.domain_folders import DomainFolders
from datamodules.errors import DataError
from datamodules.image import ImageArrays, ImageFolders
from datamodules.paired import Paired
from datamodules.synthetic_domains import Corruption, NoShift, Rotation, Shift, SpuriousColour, SyntheticDomains
from datamodules.tabular import TabularData
from datamodules.text import TextFiles
from datamodules.waveforms import BackgroundNoise, RandomGain, RandomTimeShift

__all__ = [
    "AudioFolders",
    "BackgroundNoise",
    "ClassSubset",
    "Corruption",
    "DataError",
    "Digits",
    "DomainFolders",
    "ImageArrays",
    "ImageFolders",
    "NoShift",
    "Paired",
    "RandomGain",
    "RandomTimeShift",
    "Rotation",
    "Shift",
    "SpuriousColour",
    "SyntheticDomains",
    "TabularData",
    "TextFiles",
    "TransferDataModule",
]
