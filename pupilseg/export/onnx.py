"""Model file -> ONNX: uint8 in, normalisation inside, nothing in the file that is not needed.

The exporter leaves a stack trace and its own names on every node, more than these networks' weights
weigh: 495 KB for 25,785 parameters, where the same graph stripped of them is 137 KB.
"""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pupilseg import __version__
from pupilseg.errors import CheckpointError, UsageError
from pupilseg.files import atomic_path
from pupilseg.geometry import HEIGHT, WIDTH
from pupilseg.model_files.checkpoint import load_model
from pupilseg.models import model_entry

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

MAX_BYTES = 300_000
OPSET = 18
"""Oldest opset with all that is needed; every ONNX Runtime since 1.14 (2023) reads it."""
PARITY_BATCHES = (1, 2, 7)
PARITY_TOLERANCE = 1e-3
"""Largest difference from torch that is accepted, relative to the largest output magnitude."""
INPUT_NAME = "image"
OUTPUT_NAMES = {"segmentation": "logits", "ellipse": "ellipse"}


class Normalised(nn.Module):
    """A network with its input contract: uint8 (N, 1, 400, 640) becomes (x / 255 - 0.5) / 0.5."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Maps uint8 images to the network's output."""
        out: Tensor = self.model(image.float() * (2 / 255) - 1)
        return out


def export_onnx(model_file: Path, out: Path, *, calibrate_on: Path | None = None) -> dict[str, Any]:
    """Writes a model file as ONNX, after comparing it with torch in ONNX Runtime.

    Args:
        model_file: written by `pupilseg.model_files.checkpoint.save_model`.
        out: the `*.onnx` to write; appears only once size and parity hold.
        calibrate_on: shards of the validation split, on which the confidence is fitted; None for a
            raw score.

    Returns:
        bytes, parity (largest relative difference), and the metadata stored in the file.

    Raises:
        CheckpointError: the model file is damaged or foreign, or parity fails.
        DataError: the shards are missing or damaged.
        UsageError: the package onnx or onnxscript is not installed, the file is too large, or the
            shards' images went through another preprocessing than the model's.
        OutputError: `out` cannot be written.
    """
    model = load_model(model_file)
    card: dict[str, Any] = model.card  # type: ignore[assignment]  # set by load_model
    task = model_entry(card["model"]).task
    if calibrate_on is not None:
        from pupilseg.evaluate.confidence import calibrate, check_preprocessing
        from pupilseg.model_files.onnx import OnnxNetwork
        from pupilseg.shards import open_shards

        with open_shards(calibrate_on) as shards:  # before the seconds that tracing takes
            check_preprocessing(shards, card.get("preprocessing", "none"), str(model_file))
    proto = to_onnx(model, OUTPUT_NAMES[task])
    parameters = sum(p.numel() for p in model.parameters())
    metadata = {**metadata_of(card, task, str(model_file)), "parameters": str(parameters)}
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    encoded = proto.SerializeToString(deterministic=True)
    if calibrate_on is not None:
        calibration = calibrate(OnnxNetwork(encoded), str(model_file), calibrate_on)
        metadata["calibration"] = calibration.to_json()
        proto.metadata_props.add(key="calibration", value=metadata["calibration"])
        encoded = proto.SerializeToString(deterministic=True)
    if len(encoded) >= MAX_BYTES:
        raise UsageError(
            f"{out} would take {len(encoded):,} bytes, the limit is {MAX_BYTES:,}; train a network "
            "with smaller embed_dims"
        )
    parity = check_parity(encoded, model, str(model_file))
    with atomic_path(out) as temporary:
        temporary.write_bytes(encoded)
    return {"bytes": len(encoded), "parity": parity, "metadata": metadata}


def to_onnx(model: nn.Module, output_name: str) -> onnx.ModelProto:
    """Traces a network in evaluation mode into a checked and stripped ONNX graph.

    Raises:
        UsageError: the package onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise UsageError(
            f"exporting needs the package {error.name}; run `pip install 'pupilseg[export]'`"
        ) from error
    example = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own internals (copyreg, pytree) on every call.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Normalised(model).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT_NAME],
                output_names=[output_name],
                external_data=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None  # None only without dynamo
    proto: onnx.ModelProto = program.model_proto
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def strip(proto: onnx.ModelProto) -> None:
    """Removes what no runtime reads: traces, documentation, inferred shapes; shortens names."""
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    proto.producer_name, proto.producer_version = "pupilseg", __version__
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    fixed = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {name: name for name in fixed} | {"": ""}

    def rename(name: str) -> str:
        return short.setdefault(name, f"t{len(short)}")

    for tensor in graph.initializer:
        tensor.name, tensor.doc_string = rename(tensor.name), ""
        del tensor.metadata_props[:]
    for node in graph.node:
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]


def metadata_of(card: dict[str, Any], task: str, name: str) -> dict[str, str]:
    """Returns what an ONNX file says of itself, as text by key.

    Raises:
        CheckpointError: the model file does not say what it was trained on.
    """
    for key in ("preprocessing", "data", "licence"):
        if not isinstance(card.get(key), str):
            raise CheckpointError(
                f"{name} does not say its {key!r}, which its ONNX form must carry; give a file "
                "that `python -m pipeline.train` wrote"
            )
    before = card.get("init_data")
    return {
        "model": card["model"],
        "task": task,
        "version": __version__,
        "preprocessing": card["preprocessing"],
        "data": f"{before}, then {card['data']}" if before else card["data"],
        "metrics": json.dumps(card.get("metrics", {})),
        "licence": card["licence"],
        "input": f"uint8 (N, 1, {HEIGHT}, {WIDTH}), near infrared, normalised inside",
        "classes": json.dumps(["background", "pupil"]),
    }


@torch.no_grad()
def check_parity(encoded: bytes, model: nn.Module, name: str) -> float:
    """Compares an ONNX file with torch on batches of 1, 2 and 7 random frames.

    Returns:
        The largest absolute difference over the largest output magnitude.

    Raises:
        CheckpointError: it exceeds `PARITY_TOLERANCE`.
    """
    from pupilseg.model_files.onnx import onnx_session

    session = onnx_session(encoded, threads=1)
    random = np.random.default_rng(0)
    worst = 0.0
    for frames in PARITY_BATCHES:
        # Smooth patches, not white noise: activations then have the range of real frames.
        coarse = random.integers(0, 256, (frames, 1, HEIGHT // 40, WIDTH // 40), dtype=np.uint8)
        image = coarse.repeat(40, axis=2).repeat(40, axis=3)
        expected = Normalised(model)(torch.from_numpy(image)).numpy()
        (found,) = session.run(None, {INPUT_NAME: image})
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst <= PARITY_TOLERANCE:
        raise CheckpointError(
            f"the ONNX form of {name} differs from torch by {worst:.2e} of the largest output, "
            f"at most {PARITY_TOLERANCE:g} is accepted; please report this with the model file"
        )
    return worst
