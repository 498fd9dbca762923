from pathlib import Path

import pytest

from learner.checkpoints.manifest import defect, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_what_was_written_has_no_defect_and_strangers_do_not_matter(folder: Path):
    assert defect(folder) is None
    (folder / "notes").write_text("mine")
    assert defect(folder) is None


@pytest.mark.parametrize("position", range(0, 256, 51))
def test_every_changed_byte_is_found(folder: Path, position: int):
    contents = bytearray((folder / "inner" / "weights").read_bytes())
    contents[position] ^= 0x80
    (folder / "inner" / "weights").write_bytes(contents)
    assert defect(folder) == "inner/weights has other contents than were written"


def test_what_is_missing_or_longer_is_named(folder: Path):
    (folder / "empty").write_text("x")
    assert defect(folder) == "empty has 1 bytes instead of 0"
    (folder / "empty").unlink()
    assert defect(folder) == "empty is missing"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 3}', '{"empty": [1]}', '{"empty": "xy"}', "{"])
def test_a_manifest_of_any_other_shape_is_a_defect(folder: Path, text: str):
    (folder / "manifest.json").write_text(text)
    assert defect(folder) is not None


def test_without_a_manifest_nothing_is_sound(tmp_path: Path):
    assert defect(tmp_path) == "manifest.json is missing"
