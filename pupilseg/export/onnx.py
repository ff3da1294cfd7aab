"""Exports a network to a small ONNX file with uint8 input and built-in normalization.

Torch's exporter attaches a stack trace and its own names to every node. They take more space than
the weights: 495 KB for 25,785 parameters, compared with 137 KB for the same graph without them.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pupilseg import __version__
from pupilseg.errors import CheckpointError, UsageError
from pupilseg.export import ExportReport
from pupilseg.export.fused import FusedNetwork, is_fusible
from pupilseg.files import atomic_path
from pupilseg.geometry import HEIGHT, NORMALIZED, WIDTH
from pupilseg.model_files.checkpoint import load_model_and_card
from pupilseg.model_files.onnx import INPUT_NAME, OUTPUTS, ModelInfo, OnnxNetwork, onnx_session
from pupilseg.models import model_entry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

    from pupilseg.model_files.card import ModelCard

MAX_BYTES = 300_000
OPSET = 18
"""Oldest opset with all required operators; supported since ONNX Runtime 1.14 (2023)."""
IR_VERSION = 8
"""Version of the file format that was released with the opset."""
PARITY_BATCHES = (1, 2, 7)
PARITY_TOLERANCE = 1e-3
"""Maximum difference from torch, relative to the largest output magnitude."""


class WithNormalization(nn.Module):
    """A network with the normalization of `geometry.NORMALIZED` added, which takes uint8 images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Maps uint8 (N, 1, 400, 640) to the network's output."""
        out: Tensor = self.model(image.float() * (2 / 255) - 1)
        return out


def export_onnx(model_file: Path, out: Path, *, calibrate_on: Path | None = None) -> ExportReport:
    """Exports a model file to ONNX, after comparing the output of ONNX Runtime with torch.

    Args:
        model_file: written by `pupilseg.model_files.checkpoint.save_model`.
        out: path of the `*.onnx` file, written only if its size and parity are within limits.
        calibrate_on: shards of the validation split, on which the confidence is calibrated; None
            keeps the raw score.

    Raises:
        CheckpointError: the model file is damaged or not written by pupilseg, or parity fails.
        DataError: the shards are missing or damaged.
        UsageError: the package onnx or onnxscript is not installed, the file would be too large,
            or the preprocessing of the shards differs from that of the model.
        OutputError: `out` cannot be written.
    """
    model, card = load_model_and_card(model_file)
    parameters = sum(p.numel() for p in model.parameters())
    info = onnx_info(card, parameters, str(model_file))
    if calibrate_on is not None:
        from pupilseg.evaluate.confidence import calibrate, check_preprocessing
        from pupilseg.shards import open_shards

        with open_shards(calibrate_on) as shards:  # before the export, which takes seconds
            check_preprocessing(shards, info.preprocessing, str(model_file))
    proto = to_onnx(model, OUTPUTS[info.task].name)
    encoded = _with_metadata(proto, info.to_metadata())
    if calibrate_on is not None:
        calibration = calibrate(OnnxNetwork(encoded), str(model_file), calibrate_on)
        encoded = _with_metadata(proto, {"calibration": calibration.to_json()})
    if len(encoded) >= MAX_BYTES:
        raise UsageError(
            f"{out} would take {len(encoded):,} bytes, but the limit is {MAX_BYTES:,}; train a "
            "network with smaller embed_dim"
        )
    parity = check_parity(encoded, model, str(model_file))
    with atomic_path(out) as temporary:
        temporary.write_bytes(encoded)
    return ExportReport(len(encoded), parameters, parity)


def onnx_info(card: ModelCard, parameters: int, name: str) -> ModelInfo:
    """Returns the metadata of a checkpoint's ONNX file.

    Args:
        card: card of the checkpoint.
        parameters: number of trainable parameters.
        name: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the card lacks an entry that an ONNX file must record.
    """
    if card.preprocessing is None or card.data is None or card.license is None:
        missing = [key for key in ("preprocessing", "data", "license") if not getattr(card, key)]
        raise CheckpointError(
            f"{name} does not record its {', '.join(missing)}, which an ONNX file must state; pass "
            "a file that `python -m pipeline.train` wrote"
        )
    return ModelInfo(
        model=card.model,
        task=model_entry(card.model).task,
        version=__version__,
        preprocessing=card.preprocessing,
        data=card.all_data,
        license=card.license,
        metrics=card.metrics,
        parameters=parameters,
    )


def _with_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """Adds metadata to a graph and returns the encoded file."""
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    encoded: bytes = proto.SerializeToString(deterministic=True)
    return encoded


def to_onnx(model: nn.Module, output_name: str, *, fuse: bool = True) -> onnx.ModelProto:
    """Exports a network in evaluation mode to an ONNX graph, which is stripped and checked.

    Args:
        model: a network that takes normalized float images.
        output_name: name of the graph's output.
        fuse: export the fused form if the network has one; False is for comparisons.

    Raises:
        UsageError: the package onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it, but its own error is less clear
    except ImportError as error:
        raise UsageError(
            f"exporting needs the package {error.name}; run `pip install 'pupilseg[export]'`"
        ) from error
    fuse = fuse and is_fusible(model)
    network = FusedNetwork(model) if fuse else WithNormalization(model)
    example = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns about its own internals (copyreg, pytree) on every call.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval(),
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
    if fuse:
        name_batch_dimension(proto)
    proto.ir_version = IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    return proto


def strip(proto: onnx.ModelProto) -> None:
    """Removes everything that runtimes do not read (traces, docs, shapes), and shortens names."""
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


def name_batch_dimension(proto: onnx.ModelProto) -> None:
    """Marks the first dimension of upsampled and reshaped images as the batch dimension.

    ONNX's shape inference loses the name of the batch dimension in `Resize` and `Reshape`. ONNX
    Runtime then cannot prove that two tensors have the same shape, and does not merge additions and
    ReLUs into the convolutions before them.
    """
    import onnx

    batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    images = {
        name
        for node in proto.graph.node
        if node.op_type in ("Resize", "Reshape")
        for name in node.output
    }
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        known = all(dim.dim_value for dim in dims[1:])
        if value.name in images and len(dims) == 4 and known and not dims[0].dim_value:
            dims[0].dim_param = batch
            proto.graph.value_info.append(value)


@torch.no_grad()
def check_parity(encoded: bytes, model: nn.Module, name: str) -> float:
    """Compares an ONNX file with torch on batches of 1, 2 and 7 random frames.

    Returns:
        The largest absolute difference divided by the largest output magnitude.

    Raises:
        CheckpointError: the difference exceeds `PARITY_TOLERANCE`.
    """
    session = onnx_session(encoded, threads=1)
    random = np.random.default_rng(0)
    worst = 0.0
    for frames in PARITY_BATCHES:
        # Flat patches, unlike white noise, give activations in the range of real frames.
        coarse = random.integers(0, 256, (frames, 1, HEIGHT // 40, WIDTH // 40), dtype=np.uint8)
        image = coarse.repeat(40, axis=2).repeat(40, axis=3)
        expected = model(torch.from_numpy(NORMALIZED[image])).numpy()
        (found,) = session.run(None, {INPUT_NAME: image})
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst <= PARITY_TOLERANCE:
        raise CheckpointError(
            f"the ONNX form of {name} differs from torch by {worst:.2e} of the largest output, "
            f"accepted is {PARITY_TOLERANCE:g} at most; please report this with the model file"
        )
    return worst
