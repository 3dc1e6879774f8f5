"""The README's pictures are what the notebooks draw today."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)


def test_pictures_are_fresh():
    assert pictures.problems() == [], f"pictures are stale; {pictures.REMEDY}"


def test_the_readme_shows_each_with_its_alternative_text():
    sources, text = pictures.read_sources(), pictures.README.read_text(encoding="utf-8")
    for stem, of in sources.items():
        assert len(of["alt"]) >= 20
        assert f'src="docs/pictures/{stem}.png" width="720" alt="{of["alt"]}"' in text
    spoilt = text.replace(sources["04_train"]["alt"], "a curve")
    assert spoilt != text and pictures.with_gallery(spoilt, sources) == text
    with pytest.raises(ValueError, match="the gallery goes between them"):
        pictures.with_gallery("# no marks", sources)
