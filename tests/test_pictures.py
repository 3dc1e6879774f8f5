"""The README's pictures are what the notebooks draw today."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)


@pytest.fixture
def copy(tmp_path):
    """Pictures, notebooks and README elsewhere, to be spoiled."""
    shutil.copytree(pictures.PICTURES, tmp_path / "pictures")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(pictures.README, tmp_path / "README.md")
    return {
        "pictures": tmp_path / "pictures",
        "notebooks": tmp_path / "notebooks",
        "readme": tmp_path / "README.md",
    }


def test_pictures_are_fresh():
    assert pictures.problems() == [], f"pictures are stale; {pictures.REMEDY}"


def test_a_figure_that_was_edited_is_noticed_with_the_command_that_helps(copy):
    notebook = copy["notebooks"] / "02_count_every_parameter.ipynb"
    text = notebook.read_text(encoding="utf-8")
    notebook.write_text(
        text.replace("Equal area, equal number of parameters", "Equal area"), encoding="utf-8"
    )
    assert pictures.problems(**copy) == [
        "cell map-figure of notebook 02_count_every_parameter was edited since its picture was made; run: python docs/pictures.py build 02"
    ]
    notebook.write_text(
        text.replace("Count every parameter", "Count all"), encoding="utf-8"
    )  # elsewhere in the notebook
    assert pictures.problems(**copy) == []


def test_a_picture_that_was_replaced_or_lost_is_noticed(copy):
    picture = copy["pictures"] / "04_train.png"
    picture.write_bytes(picture.read_bytes()[:-1])
    assert pictures.problems(**copy) == [
        "docs/pictures/04_train.png is not the picture that was made; run: python docs/pictures.py build 04"
    ]
    picture.unlink()
    assert len(pictures.problems(**copy)) == 1
    (copy["pictures"] / "sources.json").unlink()
    assert "sources.json names []" in pictures.problems(**copy)[0]


def test_the_readme_shows_each_with_its_alternative_text(copy):
    sources = pictures.read_sources()
    text = copy["readme"].read_text(encoding="utf-8")
    for stem, of in sources.items():
        assert (
            len(of["alt"]) >= 20
            and f'src="docs/pictures/{stem}.png" width="{pictures.WIDTH}" alt="{of["alt"]}"' in text
        )
    copy["readme"].write_text(text.replace(sources["04_train"]["alt"], "a curve"), encoding="utf-8")
    assert [problem.split(" is not ")[0] for problem in pictures.problems(**copy)] == ["the README's gallery"]
    again = pictures.with_gallery(copy["readme"].read_text(encoding="utf-8"), sources)
    assert again == text
    with pytest.raises(ValueError, match="the gallery goes between them"):
        pictures.with_gallery("# no marks", sources)
