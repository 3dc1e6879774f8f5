"""The README's pictures are what the notebooks draw today."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)


def test_pictures_are_fresh():
    assert pictures.problems() == [], f"pictures are stale; {pictures.REMEDY}"


def test_what_is_stale_is_named_with_the_command_that_helps(tmp_path):
    shutil.copytree(pictures.PICTURES, tmp_path / "pictures")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(pictures.README, tmp_path / "README.md")
    places = [tmp_path / "pictures", tmp_path / "notebooks", tmp_path / "README.md"]
    notebook, picture = places[1] / "02_count_every_parameter.ipynb", places[0] / "04_train.png"
    text, png = notebook.read_text(encoding="utf-8"), picture.read_bytes()
    notebook.write_text(text.replace("Count every parameter", "Count all"), encoding="utf-8")
    assert pictures.problems(*places) == [], "another cell than the picture's"
    notebook.write_text(
        text.replace("Equal area, equal number of parameters", "Equal area"), encoding="utf-8"
    )
    picture.write_bytes(png[:-1])
    edited = "cell map-figure of notebook 02_count_every_parameter was edited since its picture was made"
    lost = "docs/pictures/04_train.png is not the picture that was made"
    helps = "; run: python docs/pictures.py build "
    assert pictures.problems(*places) == [f"{edited}{helps}02", f"{lost}{helps}04"]
    (places[0] / "sources.json").unlink()
    assert "sources.json names []" in pictures.problems(*places)[0]


def test_the_readme_shows_each_with_its_alternative_text():
    sources, text = pictures.read_sources(), pictures.README.read_text(encoding="utf-8")
    for stem, of in sources.items():
        assert (
            len(of["alt"]) >= 20 and f'src="docs/pictures/{stem}.png" width="720" alt="{of["alt"]}"' in text
        )
    spoilt = text.replace(sources["04_train"]["alt"], "a curve")
    assert spoilt != text and pictures.with_gallery(spoilt, sources) == text
    with pytest.raises(ValueError, match="the gallery goes between them"):
        pictures.with_gallery("# no marks", sources)
