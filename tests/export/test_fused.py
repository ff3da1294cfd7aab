"""The fused form has the same output as the network, and keeps ONNX Runtime's blocked layout."""

from collections import Counter

import pytest
import torch

from pupilseg import create_model
from pupilseg.export.fused import BLOCK, FusedNetwork, is_fusible
from pupilseg.export.onnx import IR_VERSION, to_onnx

TOLERANCE = 5e-6
"""Float32 rounding; up to 3.4e-6 of the largest output was measured with the released weights."""


def trained(name, **overrides):
    """Returns a network in evaluation mode with non-default batch norms and biases."""
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(-0.3, 0.3)
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 2.0)
        if hasattr(part, "rows") and hasattr(part, "columns") and hasattr(part, "window_size"):
            part.rows.data.normal_()
            part.columns.data.normal_()
    return model.eval()


def images(frames=2):
    """Returns images of gray patches, uint8, because white noise would average out."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (frames, 1, 10, 16), generator=random, dtype=torch.uint8)
    return coarse.repeat_interleave(40, 2).repeat_interleave(40, 3)


@pytest.mark.parametrize("name", ["efficientvit", "efficientvit_tiny", "efficientvit_base"])
@torch.no_grad()
def test_the_fused_network_gives_the_same_logits(name):
    model, frames = trained(name), images()
    expected = model((frames.float() / 255 - 0.5) / 0.5)
    found = FusedNetwork(model).eval()(frames)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_the_fused_network_gives_the_same_ellipse():
    model, frames = trained("ellipse"), images()
    expected = model((frames.float() / 255 - 0.5) / 0.5)
    assert (FusedNetwork(model).eval()(frames) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_every_pixel_of_the_border_is_the_same():
    """Column pairs and the folded scale in the stem change how borders are padded."""
    model = trained("efficientvit")
    frames = torch.full((1, 1, 400, 640), 255, dtype=torch.uint8)
    expected = model(torch.ones(1, 1, 400, 640))
    difference = (FusedNetwork(model).eval()(frames) - expected).abs()
    worst = TOLERANCE * expected.abs().max()
    for edge in (
        difference[..., 0, :],
        difference[..., -1, :],
        difference[..., 0],
        difference[..., -1],
    ):
        assert edge.max() <= worst


@torch.no_grad()
def test_a_wide_stem_is_not_paired():
    model, frames = trained("efficientvit_tiny", stem_dim=12), images(1)
    expected = model((frames.float() / 255 - 0.5) / 0.5)
    fused = FusedNetwork(model).eval()
    assert fused.encoder.stem[0].stride == (2, 2)
    assert (fused(frames) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_no_convolution_leaves_the_blocked_layout():
    """Channel counts below 16, or not a multiple of 4 above it, are copied between layouts."""
    fused = FusedNetwork(trained("efficientvit_tiny"))
    for name, part in fused.named_modules():
        kernel = getattr(part, "kernel", None)
        if kernel is None or name.startswith("head"):
            continue
        chans = kernel.shape[1] * part.groups
        assert chans == 1 or (chans >= BLOCK and chans % 4 == 0) or ".project" in name, name


def test_additions_and_relus_are_merged_into_convolutions(tmp_path):
    """Fails if ONNX Runtime cannot prove that both inputs of a sum have the same batch size."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    proto = to_onnx(trained("efficientvit"), "logits")
    assert proto.ir_version == IR_VERSION
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    if not any(node.domain == "com.microsoft.nchwc" for node in nodes):
        pytest.skip("ONNX Runtime has no blocked layout on this processor")
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["BatchNormalization"] == 0
    assert kinds["Relu"] == 3  # inside the attention of each stage
    assert kinds["Add"] == 7  # 4 attention biases, 1 cascaded head, 2 upsampled residuals


def test_an_unknown_network_is_not_fusible():
    assert not is_fusible(torch.nn.Conv2d(1, 2, 1))
    assert is_fusible(trained("ellipse"))
