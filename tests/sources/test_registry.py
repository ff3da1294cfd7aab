"""A new type of source needs one module and one entry in a table."""

from pupilseg.sources import download, open_dataset, parse_source, registry
from pupilseg.sources.spec import Source, SourceType
from tests.helpers.fakes import FakeDataset

TYPE = SourceType(
    kind="fake",
    layout="fake",
    form="fake:N",
    description="N fake frames",
    parse=lambda text: Source("fake", text[5:]) if text.startswith("fake:") else None,
    matches=lambda _source: True,
    inspect=lambda source, *_: {"source": str(source), "counts": {}},
    open=lambda record, _raw_dir: FakeDataset(train=int(record["request"]["location"])),
)


def test_an_entry_is_enough_for_a_new_source(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SOURCE_TYPES", (*registry.SOURCE_TYPES, TYPE))
    assert str(parse_source("fake:3")) == "fake:3"
    download("fake:3", tmp_path)
    assert open_dataset(tmp_path).count("train") == 3


def test_the_help_lists_each_type():
    lines = registry.FORMS.splitlines()[1:]
    assert len(lines) == len(registry.SOURCE_TYPES)
    for line, source_type in zip(lines, registry.SOURCE_TYPES, strict=True):
        assert line.split("  ")[1] == source_type.form
        assert line.endswith(source_type.description)
