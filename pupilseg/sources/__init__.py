"""Where samples come from: the Hub, folders of parquet files or OpenEDS frames, rendered eyes.

`download` puts a source in place once and records it; `open_dataset` reads it, by range, a few
frames in memory at a time.
"""

from __future__ import annotations

from pupilseg.sample import SPLITS, Dataset, Sample
from pupilseg.sources.manifest import MANIFEST, download, open_dataset
from pupilseg.sources.options import SourceOptions
from pupilseg.sources.spec import FORMS, Source, parse_source

__all__ = [
    "FORMS",
    "MANIFEST",
    "SPLITS",
    "Dataset",
    "Sample",
    "Source",
    "SourceOptions",
    "download",
    "open_dataset",
    "parse_source",
]
