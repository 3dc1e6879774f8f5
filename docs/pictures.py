"""The README's pictures are figures of the notebooks, made by running them; this makes them again, and tells when they are stale.

    python docs/pictures.py build [01 05 ...]    run those notebooks (default: all), write docs/pictures/ and the README's gallery
    python docs/pictures.py check                run nothing, exit 1 when a figure's cell was edited since its picture was made

`docs/pictures/sources.json` keeps, of each picture, its cell's SHA-256, its own, and the alternative text the cell gave it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
README = ROOT / "README.md"
# One picture of each notebook: its cell, and whether to shrink long work as the tests do. A model trained for seconds says nothing worth showing.
CHOSEN = {
    "01_build_the_model": ("layers-figure", True),
    "02_count_every_parameter": ("map-figure", True),
    "03_data_and_tokens": ("token-figure", True),
    "04_train": ("kill-figure", True),
    "05_sample_and_look_inside": ("lens-figure", False),
    "06_evaluate_and_share": ("all-figure", False),
    "07_make_it_useful": ("mask-figure", True),
}
BEGIN, END = "<!-- gallery: made by docs/pictures.py -->\n", "<!-- end of gallery -->"
LIMIT = 120_000  # bytes of a picture
WIDTH = 720  # pixels on the page
REMEDY = "run: python docs/pictures.py build"


def cell_sha256(stem: str, cell_id: str, folder: Path = ROOT / "notebooks") -> str:
    """SHA-256 of one cell's source in a built notebook, without its form's title, which draws nothing."""
    cells = json.loads((folder / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next(cell for cell in cells if cell["id"] == cell_id)["source"]
    drawn = [line for line in source if not line.startswith("# @title")]
    return hashlib.sha256("".join(drawn).encode()).hexdigest()


def gallery(sources: dict[str, dict[str, str]]) -> str:
    """Markdown of the gallery: the pictures at a size that can be read, one below the other, each with its words above."""
    entries = []
    for stem, of in sorted(sources.items()):
        name = stem[3:].replace("_", " ").capitalize()
        picture = f'<a href="notebooks/{stem}.ipynb"><img src="docs/pictures/{stem}.png" width="{WIDTH}" alt="{of["alt"]}"></a>'
        entries.append(f"**{int(stem[:2])} {name}.** {of['alt']}\n\n{picture}\n\n")
    return BEGIN + "\n" + "".join(entries) + END


def with_gallery(text: str, sources: dict[str, dict[str, str]]) -> str:
    """The README's text with the gallery between its two marks renewed."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(
            f"README.md must hold the two lines {BEGIN!r} and {END!r}: the gallery goes between them"
        )
    return before + gallery(sources) + after


def read_sources(pictures: Path = PICTURES) -> dict[str, dict[str, str]]:
    path = pictures / "sources.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def problems(
    pictures: Path = PICTURES, notebooks: Path = ROOT / "notebooks", readme: Path = README
) -> list[str]:
    """What is stale or broken, in words; empty when the pictures are fresh."""
    sources, found = read_sources(pictures), []
    if sorted(sources) != sorted(CHOSEN):
        return [f"sources.json names {sorted(sources)}, not {sorted(CHOSEN)}; {REMEDY}"]
    for stem, (cell_id, _) in CHOSEN.items():
        path, of = pictures / f"{stem}.png", sources[stem]
        if of["cell"] != cell_id or of["cell_sha256"] != cell_sha256(stem, cell_id, notebooks):
            found.append(
                f"cell {cell_id} of notebook {stem} was edited since its picture was made; {REMEDY} {stem[:2]}"
            )
        elif not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != of["png_sha256"]:
            found.append(f"docs/pictures/{path.name} is not the picture that was made; {REMEDY} {stem[:2]}")
        elif path.stat().st_size > LIMIT:
            found.append(f"docs/pictures/{path.name} has {path.stat().st_size:,} bytes; {LIMIT:,} allowed")
    if gallery(sources) not in readme.read_text(encoding="utf-8"):
        found.append(f"the README's gallery is not what docs/pictures/sources.json says; {REMEDY} none")
    return found


def make_picture(stem: str) -> tuple[str, bytes]:
    """(alternative text, PNG) of the chosen figure, from a run of the notebook in an empty folder, offline."""
    sys.path.insert(0, str(ROOT / "tests"))
    import run_notebooks as runner

    cell_id, shrink = CHOSEN[stem]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "home").mkdir()
        env = runner.environment(runner.snapshot(place / "source"), place / "home") | {
            "SMOLLM2_SMOKE": str(int(shrink))
        }
        notebook = runner.run_notebook(stem, place / "empty", env, timeout=1800)
        if faults := runner.faults(notebook):
            raise SystemExit(f"{stem} does not run as it should: {faults}")
        alt, png = next((alt, png) for name, alt, png in runner.images(notebook) if name == cell_id)
        return alt, png


def build(stems: list[str]) -> None:
    sources = {stem: of for stem, of in read_sources().items() if stem in CHOSEN}
    PICTURES.mkdir(exist_ok=True)
    for stem in stems:
        cell_id = CHOSEN[stem][0]
        before = cell_sha256(stem, cell_id)  # read first: an edit made while it runs must show as stale
        alt, png = make_picture(stem)
        (PICTURES / f"{stem}.png").write_bytes(png)
        sources[stem] = {
            "cell": cell_id,
            "cell_sha256": before,
            "png_sha256": hashlib.sha256(png).hexdigest(),
            "alt": alt,
        }
        print(f"{stem}: {len(png):,} bytes: {alt}", flush=True)
    (PICTURES / "sources.json").write_text(
        json.dumps(sources, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    README.write_text(with_gallery(README.read_text(encoding="utf-8"), sources), encoding="utf-8")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["build", *names]:
            build([stem for stem in CHOSEN if not names or stem[:2] in names or stem in names])
        case ["check"]:
            pass
        case _:
            print(__doc__)
            return 2
    found = problems()
    print("\n".join(found) or "pictures are fresh")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
