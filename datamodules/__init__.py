"""Datamodules: source and target domains, split, few-shot, augmented."""

from datamodules.base import DataError, TransferDataModule
from datamodules.digits import Digits
from datamodules.image import ImageArrays, ImageFolders

__all__ = ["DataError", "Digits", "ImageArrays", "ImageFolders", "TransferDataModule"]
