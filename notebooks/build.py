"""Notebooks are written as `NN_name.py` (jupytext's percent format); this makes `NN_name.ipynb` from them, always the same bytes.

    python notebooks/build.py build [NN_name.py ...]   write the .ipynb; renew the badge and the set-up cell in the .py
    python notebooks/build.py check [NN_name.py ...]   compare bytes, write nothing, exit 1 when something is stale
    jupytext --to py:percent notebooks/NN_name.ipynb   bring an edit made in Colab or Jupyter back into the .py, then build

The badge and the set-up cell are kept here, once. The address in both comes from `[project.urls] Repository` in pyproject.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parent
REF = "main"
REMEDY = "edit the .py, then run: python notebooks/build.py build"
CELL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
CELL_METADATA = ("cellView", "id", "tags")
LINK = re.compile(
    r"https://colab\.research\.google\.com/github/[^\s)\"]+/notebooks/(\d\d_\w+)\.ipynb"
)
TAGS = {"setup", "lesson", "check", "figure", "predict", "widget", "exercise", "solution"}
TAGS |= {"slow", "parameters"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

BADGE_CELL = """\
# %% [markdown] id="view-in-github"
# <a href="{colab}" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs]({page})
"""

SETUP_CELL = """\
# %% cellView="form" id="setup" tags=["setup"]
# @title Set-up (about 20 s on Colab) {{ display-mode: "form" }}
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "{address}"
ADDRESS = os.environ.get("SMOLLM2_REPO") or ADDRESS
here = Path(globals().get("__file__", "notebook")).resolve(), Path.cwd().resolve() / "notebook"
clone = Path.cwd().resolve() / "smollm2-from-scratch"
folders = [*(parent for start in here for parent in start.parents), clone]
REPO = next((path for path in folders if (path / "smollm2" / "colab.py").is_file()), None)
if REPO is None:  # a bare notebook, as the Colab badge opens it: fetch the project beside it
    half = clone.with_name(f"{{clone.name}}.part{{os.getpid()}}")
    command = ["git", "clone", "--quiet", "--depth", "1", ADDRESS, str(half)]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        reason = f"Could not fetch {{ADDRESS}}: {{fetched.stderr.strip()}}"
        raise RuntimeError(f"{{reason}}. Is the network there? Then run this cell again.")
    REPO = half.rename(clone)
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from smollm2 import colab

colab.install_missing(REPO / "requirements.txt")
report = colab.doctor()
"""


class NotebookError(Exception):
    """A notebook that breaks a rule; the message names file and cell."""


def repository_address() -> str:
    with (FOLDER.parent / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def badge_url(stem: str) -> str:
    """Colab's address of a committed notebook."""
    return f"{repository_address().replace('https://github.com', 'https://colab.research.google.com/github')}/blob/{REF}/notebooks/{stem}.ipynb"


def page_url(stem: str) -> str:
    """GitHub Pages' address of an executed notebook (.github/workflows/pages.yml)."""
    owner, name = repository_address().split("/")[-2:]
    return f"https://{owner}.github.io/{name}/{stem}.html"


def sources() -> list[Path]:
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def fixed_cells(stem: str) -> dict[str, str]:
    """Cells that every notebook shares, as they must stand in its .py, by id."""
    return {
        "view-in-github": BADGE_CELL.format(colab=badge_url(stem), page=page_url(stem)),
        "setup": SETUP_CELL.format(address=repository_address()),
    }


def renew_fixed_cells(text: str, stem: str) -> str:
    """The .py text with badge and set-up cell as they must be, links to Colab included; raises `NotebookError` where one has no place."""
    for cell_id, cell in fixed_cells(stem).items():
        pattern = re.compile(
            rf'^# %%[^\n]*\bid="{cell_id}"[^\n]*\n.*?(?=^# %%|\Z)', re.M | re.S
        )
        if len(pattern.findall(text)) != 1:
            raise NotebookError(
                f'{stem}.py: expected exactly one cell with id="{cell_id}" (its text is filled in by build)'
            )
        text = pattern.sub(lambda _, cell=cell: cell + "\n", text)
    return LINK.sub(lambda found: badge_url(found[1]), text)


def to_notebook(text: str, stem: str) -> str:
    """Text of the .ipynb: ids from the cells' own metadata, no outputs, no counts, metadata set here and nowhere else."""
    notebook = jupytext.reads(text, fmt="py:percent")
    seen: set[str] = set()
    for number, cell in enumerate(notebook.cells):
        cell_id = cell.metadata.get("id", "")
        if not CELL_ID.fullmatch(cell_id) or cell_id in seen:
            fault = "repeats an id" if cell_id in seen else "has no id"
            raise NotebookError(
                f'{stem}.py: cell {number} {fault} {cell_id!r}: {cell.source[:60]!r}; write # %% id="short-name"'
            )
        if unknown := set(cell.metadata.get("tags", [])) - TAGS:
            raise NotebookError(
                f"{stem}.py: cell {cell_id}: unknown tags {sorted(unknown)}; known are {sorted(TAGS)}"
            )
        seen.add(cell_id)
        cell.id = cell_id
        cell.metadata = {
            key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata
        }
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    gpu = {"accelerator": "GPU"} if notebook.metadata.get("accelerator") == "GPU" else {}
    colab = {"provenance": [], "toc_visible": True} | ({"gpuType": "T4"} if gpu else {})
    notebook.metadata = {
        **gpu,
        "colab": colab,
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def build(source: Path) -> list[str]:
    """Renew the .py, write the .ipynb; returns the names of the files that changed."""
    wanted = renew_fixed_cells(source.read_text(encoding="utf-8"), source.stem)
    changed = []
    for path, text in (
        (source, wanted),
        (source.with_suffix(".ipynb"), to_notebook(wanted, source.stem)),
    ):
        if not path.exists() or path.read_bytes() != text.encode():
            path.write_bytes(text.encode())
            changed.append(path.name)
    return changed


def check(source: Path) -> list[str]:
    """What is stale, in words; an empty list when .py and .ipynb agree byte for byte."""
    text = source.read_text(encoding="utf-8")
    wanted = renew_fixed_cells(text, source.stem)
    problems = []
    if wanted != text:
        problems.append(f"{source.name}: badge or set-up cell differs from build.py")
    notebook = source.with_suffix(".ipynb")
    if (
        not notebook.exists()
        or notebook.read_bytes() != to_notebook(wanted, source.stem).encode()
    ):
        problems.append(f"{notebook.name} is not what {source.name} builds")
    return problems


def main(arguments: list[str]) -> int:
    verb, *names = arguments or ["help"]
    if verb not in ("build", "check"):
        print(__doc__)
        return 2
    chosen = [FOLDER / Path(name).with_suffix(".py").name for name in names] or sources()
    try:
        found = [
            line for source in chosen for line in (build if verb == "build" else check)(source)
        ]
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if verb == "build":
        print(f"{len(chosen)} notebooks built, changed: {', '.join(found) or 'nothing'}")
        return 0
    print("\n".join([*found, REMEDY] if found else [f"{len(chosen)} notebooks are fresh"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
