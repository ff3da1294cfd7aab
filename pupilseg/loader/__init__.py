"""Loads shards as batches of tensors on a device."""

from pupilseg.loader.loader import Batch, Loader, make_loader

__all__ = ["Batch", "Loader", "make_loader"]
