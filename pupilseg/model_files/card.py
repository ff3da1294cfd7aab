"""Model cards: the network, training data and scores that a model file records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

from pupilseg.errors import CheckpointError
from pupilseg.files import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT_VERSION = 1
RENDERED_LICENSE = "MIT; trained on rendered eyes only"
DATA_LICENSE = "bound by the license of its training data; OpenEDS is for research only"
_OLD_KEYS = {"licence": "license"}
_OLD_ARGUMENTS = {"embed_dims": "embed_dim", "depths": "depth"}
"""Keys and architecture arguments in files of earlier versions -> current names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of weights. A value is None if the file does not record it.

    Attributes:
        data: source of the training data, such as `synthetic:7200@100`.
        split_rule: how the source was split into train and validation.
        data_digest: sha256 over the digests of the training shards.
        train_frames: number of training frames.
        preprocessing: name in `preprocess.PREPROCESSINGS`, applied before the network.
        license: license of the weights.
        init: file name and sha256 of the weights that training started from.
        init_data: training data of those weights.
    """

    data: str | None = None
    split_rule: str | None = None
    data_digest: str | None = None
    train_frames: int | None = None
    preprocessing: str | None = None
    license: str | None = None
    init: str | None = None
    init_data: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the recorded values as JSON types."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def all_data(self) -> str:
        """All training data of the weights, in order."""
        data = self.data or "data that its file does not name"
        return f"{self.init_data}, then {data}" if self.init_data else data

    def starting_from(self, file: Path, before: ModelCard) -> Self:
        """Returns this provenance for a run that starts from trained weights.

        A restrictive license of the initial weights also applies to the result.

        Args:
            file: model file of the initial weights.
            before: card in that file.
        """
        free = before.license == self.license == RENDERED_LICENSE
        return replace(
            self,
            init=f"{file.name} sha256:{file_digest(file)}",
            init_data=before.all_data,
            license=RENDERED_LICENSE if free else DATA_LICENSE,
        )


UNKNOWN = Provenance()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard(Provenance):
    """Description in a model file that is sufficient to rebuild the network.

    Attributes:
        model: name in `pupilseg.models`.
        architecture: overrides of the network's keyword arguments.
        epoch: epoch of the weights, counted from 1.
        metrics: validation scores of that epoch.
        config: fields of the `train.TrainConfig`.
        extra: entries that this version does not know; they are written back unchanged.
    """

    model: str
    architecture: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the description as JSON types."""
        stored = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        extra = stored.pop("extra", {})
        first = {"format": FORMAT_VERSION, "model": self.model, "architecture": {}}
        return {**first, **stored, **extra}

    @classmethod
    def from_dict(cls, stored: object, name: str) -> Self:
        """Reads a description written by `to_dict`, in this or an earlier version.

        Args:
            stored: parsed JSON from an untrusted file.
            name: name of the file, for messages.

        Raises:
            CheckpointError: `stored` is not a description, a value has the wrong type, or the
                format is newer.
        """
        if not isinstance(stored, dict):
            raise CheckpointError(
                f"the description in {name} is a {type(stored).__name__}, expected named values; "
                "train again or copy the file again"
            )
        if stored.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{name} has format {stored.get('format')!r}, but this version of pupilseg reads "
                f"{FORMAT_VERSION}; upgrade pupilseg"
            )
        given: dict[str, Any] = stored
        values = {_OLD_KEYS.get(key, key): value for key, value in given.items()}
        del values["format"]
        known = {key: values.pop(key, None) for key in _TYPES}
        for key, value in known.items():
            if not isinstance(value, _TYPES[key]) and (value is not None or key == "model"):
                raise CheckpointError(
                    f"{name} records {key} = {value!r}, expected {_TYPES[key].__name__}; pass a "
                    "file written by pupilseg"
                )
        known = {key: value for key, value in known.items() if value is not None}
        wrong = [v for v in known.get("metrics", {}).values() if not isinstance(v, int | float)]
        if wrong:
            raise CheckpointError(
                f"{name} records {wrong[0]!r} as a metric, expected a number; pass a file written "
                "by pupilseg"
            )
        known["architecture"] = _architecture(known.get("architecture", {}))
        return cls(**known, extra=values)


_TYPES: dict[str, type] = {
    "model": str,
    "architecture": dict,
    "epoch": int,
    "metrics": dict,
    "config": dict,
    "train_frames": int,
    **{item.name: str for item in fields(Provenance) if item.name != "train_frames"},
}
"""Type of each entry of a stored description."""


def _architecture(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns architecture arguments under their current names, with lists as tuples."""
    return {
        _OLD_ARGUMENTS.get(key, key): tuple(value) if isinstance(value, list) else value
        for key, value in stored.items()
    }
