"""Small ONNX models in the format of pupilseg: a threshold on the gray level, a fixed ellipse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pupilseg.geometry import HEIGHT, WIDTH

if TYPE_CHECKING:
    from pathlib import Path

METADATA = {
    "model": "efficientvit_tiny",
    "task": "segmentation",
    "version": "0.1.0",
    "preprocessing": "none",
    "data": "synthetic:8@0",
    "metrics": json.dumps({"valid_iou": 0.5}),
    "license": "MIT",
}


def write(path, nodes, output, constants, metadata, input_type=TensorProto.UINT8) -> Path:
    """Writes a graph from `image` to one output, with metadata."""
    image = helper.make_tensor_value_info("image", input_type, ["batch", 1, HEIGHT, WIDTH])
    initializers = [
        numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        for name, (value, dtype) in constants.items()
    ]
    graph = helper.make_graph(nodes, "test", [image], [output], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def threshold_onnx(path, threshold=60.5, slope=0.5, *, drop=(), **changes) -> Path:
    """Writes a model with pupil logit slope * (threshold - gray) and background logit 0."""
    metadata = {k: v for k, v in (METADATA | changes).items() if k not in drop}
    nodes = [
        helper.make_node("Cast", ["image"], ["gray"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["threshold", "gray"], ["depth"]),
        helper.make_node("Mul", ["depth", "slope"], ["pupil"]),
        helper.make_node("Mul", ["depth", "zero"], ["background"]),
        helper.make_node("Concat", ["background", "pupil"], ["logits"], axis=1),
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, HEIGHT, WIDTH])
    constants = {
        "threshold": (threshold, np.float32),
        "slope": (slope, np.float32),
        "zero": (0, np.float32),
    }
    return write(path, nodes, output, constants, metadata)


def ellipse_onnx(path, vector, **changes) -> Path:
    """Writes a model that returns the same normalized ellipse for each frame."""
    nodes = [
        helper.make_node("Cast", ["image"], ["gray"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["gray", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "vector"], ["ellipse"]),
    ]
    output = helper.make_tensor_value_info("ellipse", TensorProto.FLOAT, ["batch", 4])
    constants = {
        "axes": ([2, 3], np.int64),
        "zero": (0, np.float32),
        "vector": (vector, np.float32),
    }
    metadata = METADATA | {"model": "ellipse", "task": "ellipse"} | changes
    return write(path, nodes, output, constants, metadata)
