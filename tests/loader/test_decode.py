"""Batches decoded with torch equal those of `FrameDecoder`, compiled or not."""

from itertools import product

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from pupilseg.loader.decode import DECODED, DECODERS, BatchDecoder, gather_row, layout_of
from pupilseg.runtime.threads import RowPool
from pupilseg.shards import open_shards, write_shards
from pupilseg.shards.codec import FrameDecoder
from pupilseg.shards.format import RAW, U2
from tests.helpers.fakes import FakeDataset

CPU = torch.device("cpu")
SAMPLES = 5
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_DEVICE = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])


@pytest.fixture(scope="module", params=["packed", "raw"])
def shards(request, tmp_path_factory):
    """Compact encodings as for rendered eyes, and raw columns."""
    raw = frozenset({0}) if request.param == "raw" else frozenset()
    path = tmp_path_factory.mktemp(request.param)
    source = FakeDataset(train=SAMPLES, odd_weights=raw, odd_maps=raw)
    write_shards(source, "train", path, rows_per_shard=16)
    with open_shards(path) as opened:
        yield opened


def gathered(shards, layout, indices):
    """Returns the stored fields of samples as tensors."""
    packed = layout.empty(len(indices), CPU)
    with RowPool(FrameDecoder, 1, "gather") as pool:
        pool.run(
            lambda row, decoder: gather_row(layout, shards, indices, packed, row, decoder),
            len(indices),
        )
    return packed


def check(shards, batch, indices):
    for row, index in enumerate(indices):
        sample = shards.sample(index)
        image = (torch.from_numpy(sample["image"]).float() / 255 - 0.5) / 0.5
        assert torch.equal(batch["image"][row, 0].cpu(), image)
        assert batch["label"].dtype == torch.int64
        np.testing.assert_array_equal(batch["label"][row].cpu(), sample["label"])
        for name in ("spatial_weights", "dist_map", "ellipse"):
            assert batch[name][row].cpu().numpy().tobytes() == sample[name].tobytes(), name
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", ON_DEVICE])
def test_compiled_decoding_gives_the_same_numbers(shards, device):
    """Tests whole batches, as in the stream feed, and selected rows, as in the resident feed."""
    device = torch.device(device)
    layout = layout_of(shards, DECODED)
    chosen = layout.encodings["dist_map"] == U2
    indices = [3, 0, 4, 2] if chosen else list(range(SAMPLES))
    rows = torch.tensor(indices, device=device) if chosen else None
    packed = gathered(shards, layout, range(SAMPLES))
    packed = {name: field.to(device) for name, field in packed.items()}
    check(shards, BatchDecoder(layout, device, torch.int64)(packed, rows), indices)
    torch._dynamo.reset()
    counters.clear()
    decode = BatchDecoder(layout, device, torch.int64, compiled_rows=len(indices))
    check(shards, decode(packed, rows), indices)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    short = {name: field[:2] for name, field in packed.items()}
    check(shards, decode(short), [0, 1])
    assert counters["stats"]["unique_graphs"] == 1, "no compilation for a short batch"


def test_a_batch_has_its_own_memory(shards):
    """The stream feed overwrites its slots with the next batch."""
    layout = layout_of(shards, DECODED)
    packed = gathered(shards, layout, range(2))
    batch = BatchDecoder(layout, CPU, torch.int64)(packed)
    before = {name: column.clone() for name, column in batch.items()}
    for field in packed.values():
        field.zero_()
    for (name, column), kept in zip(batch.items(), before.values(), strict=True):
        assert torch.equal(column, kept), name


def test_damaged_integers_stay_inside_the_table(shards):
    """On CUDA, an index outside the table would corrupt the CUDA context of the process."""
    layout = layout_of(shards, ("dist_map",))
    packed = gathered(shards, layout, range(2))
    for name, value in product(packed, (0, -1, 0x7F)):
        damaged = {field: tensor.clone() for field, tensor in packed.items()}
        damaged[name].view(torch.uint8).fill_(value & 0xFF)
        maps = BatchDecoder(layout, CPU, torch.int64)(damaged)["dist_map"]
        assert maps.shape == (2, 2, 400, 640)


def test_an_encoding_without_a_batch_decoder_is_decoded_row_by_row(shards, monkeypatch):
    monkeypatch.delitem(DECODERS, U2)
    layout = layout_of(shards, DECODED)
    assert layout.encodings["dist_map"] == RAW
    packed = gathered(shards, layout, range(SAMPLES))
    check(shards, BatchDecoder(layout, CPU, torch.int64)(packed), range(SAMPLES))
