"""Datamodules: source and target domains, split, few-shot, augmented."""

from datamodules.base import TransferDataModule
from datamodules.class_subsets import Classes
from datamodules.digits import Digits
from datamodules.domain_folders import DomainFolders
from datamodules.errors import DataError
from datamodules.image import ImageArrays, ImageFolders
from datamodules.shifted import Colour, Corruption, Identity, Rotation, Shift, Shifted
from datamodules.tabular import Tables

__all__ = [
    "Classes",
    "Colour",
    "Corruption",
    "DataError",
    "Digits",
    "DomainFolders",
    "Identity",
    "ImageArrays",
    "ImageFolders",
    "Rotation",
    "Shift",
    "Shifted",
    "Tables",
    "TransferDataModule",
]
