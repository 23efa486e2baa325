"""The configurations that come with the trainer can be read, and say what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from training import settings as settings_module
from training.settings import load

CONFIGS = Path(settings_module.__file__).with_name("configs")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_a_configuration_is_sound_and_as_large_as_it_says(file: Path, tmp_path: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.bin").write_bytes(b"\xfe")
    path = tmp_path / file.name
    path.write_text(re.sub(r'"\.\./\.\./data/\w+/', '"', text), encoding="utf-8")
    settings, config = load(path)
    assert settings.name == file.stem
    said = re.search(r"([\d.]+)M parameters", text)
    assert said is not None
    assert float(said.group(1)) == pytest.approx(config.num_parameters / 1e6, abs=0.06)
