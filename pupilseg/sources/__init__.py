"""Sources of samples: the Hub, folders of parquet files or OpenEDS frames, rendered eyes.

`download` fetches a source if needed and records it; `open_dataset` reads it by range, with a few
frames in memory at a time. `registry.SOURCE_TYPES` lists the types of sources.
"""

from __future__ import annotations

from pupilseg.sample import SPLITS, Dataset, Sample
from pupilseg.sources.options import SourceOptions
from pupilseg.sources.record import RECORD, download, open_dataset
from pupilseg.sources.registry import FORMS, parse_source
from pupilseg.sources.spec import Source

__all__ = [
    "FORMS",
    "RECORD",
    "SPLITS",
    "Dataset",
    "Sample",
    "Source",
    "SourceOptions",
    "download",
    "open_dataset",
    "parse_source",
]
