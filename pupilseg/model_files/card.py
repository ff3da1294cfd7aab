"""What a model file records about its weights: the network, its training data and its scores."""

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
"""Names in files of earlier versions -> today's, of keys and of architecture arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where weights come from; None where a file does not say.

    Attributes:
        data: source of the training data, such as `synthetic:7200@100`.
        split_rule: how the source was split into train and validation.
        data_digest: sha256 over the digests of the training shards.
        train_frames: frames trained on.
        preprocessing: name in `preprocess.PREPROCESSINGS`, applied before the network.
        license: of the weights.
        init: file name and sha256 of the weights that training started from.
        init_data: what those weights had been trained on.
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
        """Returns the recorded values, JSON-able."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def all_data(self) -> str:
        """Everything that the weights were trained on, in order."""
        data = self.data or "data that its file does not name"
        return f"{self.init_data}, then {data}" if self.init_data else data

    def starting_from(self, file: Path, before: ModelCard) -> Self:
        """Returns this provenance for a run that starts from trained weights.

        Weights that were once trained on data with a restrictive license keep the restriction.

        Args:
            file: the model file of those weights.
            before: its card.
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
    """Description stored in a model file, sufficient to rebuild the network.

    Attributes:
        model: name in `pupilseg.models`.
        architecture: overrides of the network's keyword arguments.
        epoch: that the weights are from, counted from 1.
        metrics: validation scores of that epoch.
        config: training configuration, as `train.TrainConfig` holds it.
        extra: keys that this version does not know; written back unchanged.
    """

    model: str
    architecture: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a file stores, JSON-able."""
        stored = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        extra = stored.pop("extra", {})
        first = {"format": FORMAT_VERSION, "model": self.model, "architecture": {}}
        return {**first, **stored, **extra}

    @classmethod
    def from_dict(cls, stored: object, name: str) -> Self:
        """Reads a description as `to_dict` wrote it, or an earlier version.

        Args:
            stored: parsed JSON, from a file that anybody may have written.
            name: of the file, for messages.

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
                f"{name} has format {stored.get('format')!r}, this version of pupilseg reads "
                f"{FORMAT_VERSION}; upgrade pupilseg"
            )
        given: dict[str, Any] = stored
        values = {_OLD_KEYS.get(key, key): value for key, value in given.items()}
        del values["format"]
        known = {key: values.pop(key, None) for key in _TYPES}
        for key, value in known.items():
            if not isinstance(value, _TYPES[key]) and (value is not None or key == "model"):
                raise CheckpointError(
                    f"{name} records {key} = {value!r}, expected {_TYPES[key].__name__}; give a "
                    "file written by pupilseg"
                )
        known = {key: value for key, value in known.items() if value is not None}
        wrong = [v for v in known.get("metrics", {}).values() if not isinstance(v, int | float)]
        if wrong:
            raise CheckpointError(
                f"{name} records {wrong[0]!r} as a metric, expected a number; give a file written "
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
"""Type of each key of a stored description."""


def _architecture(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a network's arguments under today's names; JSON's lists become tuples again."""
    return {
        _OLD_ARGUMENTS.get(key, key): tuple(value) if isinstance(value, list) else value
        for key, value in stored.items()
    }
