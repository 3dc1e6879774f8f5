"""The notebooks: always fresh, short cells, visible checks; and all of them run as a badge user runs them (slow)."""

import ast
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

jupytext = pytest.importorskip("jupytext", reason="notebook tests need the dev extra")
import run_notebooks as runner  # noqa: E402
from tiny_models import save_folder, tiny_model, tiny_tokenizer  # noqa: E402

from smollm2 import load_config, train  # noqa: E402
from smollm2.errors import UserError  # noqa: E402
from smollm2.evaluate import score_file  # noqa: E402
from smollm2.notebook.panel import LivePanel  # noqa: E402
from smollm2.pretrained import load_model_and_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
_spec = importlib.util.spec_from_file_location("notebook_builder", NOTEBOOKS / "build.py")
builder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(builder)

SOURCES = builder.sources()
STEMS = [source.stem for source in SOURCES]
FORBIDDEN = {
    r"^\s*[%!]": "a magic or shell line: the file must also be plain Python",
    r"autoreload|get_ipython\(": "IPython 7 with Python 3.13 breaks on it, plain Python has none",
    r"\bimport (imp|distutils|pkg_resources)\b": "gone by Python 3.13",
    r"enable_custom_widget_manager": "loads a widget manager from a CDN",
    r"is_bf16_supported": "says yes on a T4, which only emulates it; use smollm2.device",
    r"/content/|/root/|MyDrive": "a machine's path; use smollm2.colab.storage",
    r"pyplot": "shows figures twice in a notebook; use smollm2.plots",
    r"pickle|weights_only=False|trust_remote_code": "runs code from a file",  # reason: a pattern to search for, which no notebook may hold
    r"pip install": "only the set-up cell installs",
    r"TagsInput|TimePicker|DatetimePicker|widgets\.Stack\b|titles=|tooltip=": "ipywidgets 8 only",
    r"except Exception:\s*(pass|\.\.\.)|except:": "swallows errors",
}

DRILLS = {  # what the fake Drive does (tests/fakecolab), and what notebook 04 must then say
    "refused": "KEPT ON THIS MACHINE ONLY.*Google did not get permission",
    "timeout": "KEPT ON THIS MACHINE ONLY.*Drive did not answer in time",
    "enterprise": "KEPT ON THIS MACHINE ONLY.*this kind of runtime cannot mount Drive",
    "errno107:20": "KEPT ON DRIVE.*NOT on Drive: step 45 is only on this machine.*no longer connected .errno 107",
    "vanish:20": "KEPT ON DRIVE.*NOT on Drive: step 45 is only on this machine.*a mount that went away",
    "quota:300000": "KEPT ON DRIVE.*NOT on Drive: step 45 is only on this machine.*your Drive is full",
}


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A clone source: this working tree as it is now."""
    return runner.snapshot(tmp_path_factory.mktemp("clone") / "source")


def cells(stem, kind=None):
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def code_lines(cell):
    return [line for line in source(cell).splitlines() if line.strip()]


def own_code(stem):
    """Text of all code cells but the shared set-up cell."""
    return "\n".join(source(cell) for cell in cells(stem, "code") if cell["id"] != "setup")


def test_there_are_notebooks():
    assert len(SOURCES) >= 2
    assert {p.stem for p in NOTEBOOKS.glob("*.ipynb")} == set(STEMS)


@pytest.mark.parametrize("path", SOURCES, ids=STEMS)
def test_notebook_is_byte_for_byte_what_its_source_builds(path):
    assert builder.check(path) == []


def test_an_edited_notebook_or_setup_cell_is_noticed(tmp_path):
    path = tmp_path / SOURCES[0].name
    path.write_bytes(SOURCES[0].read_bytes())
    path.with_suffix(".ipynb").write_bytes(
        SOURCES[0].with_suffix(".ipynb").read_bytes().replace(b"Build the model", b"Build a model")
    )
    assert builder.check(path) == [f"{path.stem}.ipynb is not what {path.name} builds"]
    path.write_text(path.read_text().replace("colab.doctor()", "colab.doctor() or None"))
    assert any("set-up cell differs" in problem for problem in builder.check(path))
    assert builder.build(path) == [path.name, f"{path.stem}.ipynb"]
    assert builder.check(path) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda text: text.replace(' id="title"', ""), "has no id"),
        (lambda text: text.replace(' id="title"', ' id="imports"'), "repeats an id"),
        (lambda text: text.replace(' id="setup"', ' id="start"'), 'exactly one cell with id="setup"'),
        (lambda text: text.replace('tags=["predict"]', 'tags=["guess"]'), "unknown tags"),
    ],
)
def test_the_builder_names_a_cell_that_breaks_the_rules(broken, message):
    text = broken(SOURCES[0].read_text(encoding="utf-8"))
    with pytest.raises(builder.NotebookError, match=message):
        builder.to_notebook(builder.renew_fixed_cells(text, SOURCES[0].stem), SOURCES[0].stem)


def test_an_edit_made_in_colab_comes_back_into_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "FOLDER", tmp_path)
    path = NOTEBOOKS / f"{STEMS[0]}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["nbformat_minor"] = (
        0  # as "Save a copy to GitHub" writes it: no cell ids, more metadata, outputs
    )
    for cell in notebook["cells"]:
        del cell["id"]
        cell["metadata"]["outputId"] = "x"
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = (
                [{"output_type": "stream", "name": "stdout", "text": ["hi"]}],
                3,
            )
    notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    saved = tmp_path / path.name
    saved.write_text(json.dumps(notebook), encoding="utf-8")
    pulled = builder.pull(saved).read_text(encoding="utf-8")
    assert builder.to_notebook(pulled, STEMS[0]).encode() == path.read_bytes()
    assert pulled.split() == SOURCES[0].read_text(encoding="utf-8").split()  # blank lines apart


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_executed_is_stored_and_ids_are_stable(stem):
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) <= {"accelerator", "colab", "kernelspec", "language_info"}
    assert ("accelerator" in notebook["metadata"]) == stem.startswith(("04", "05"))
    for cell in notebook["cells"]:
        assert cell["metadata"]["id"] == cell["id"]
        assert set(cell["metadata"]) <= {"id", "tags", "cellView"}
        assert not cell.get("outputs") and cell.get("execution_count") is None
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids[:3] == ["view-in-github", "title", "setup"] and "imports" in ids


def test_the_setup_cell_is_the_same_in_all_notebooks():
    found = {source(next(cell for cell in cells(stem) if cell["id"] == "setup")) for stem in STEMS}
    assert len(found) == 1
    ast.parse(found.pop())


def run_setup(folder, address, tail=""):
    folder.mkdir(exist_ok=True)
    code = builder.SETUP_CELL.format(address=address).split("\n\ncolab.install_missing")[0] + tail
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SMOLLM2_REPO")} | {
        "GIT_TERMINAL_PROMPT": "0"
    }
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_the_setup_cell_fetches_the_project_once_and_finds_it_again(tmp_path, repository):
    folder = tmp_path / "empty"
    first = run_setup(folder, repository, "\nprint(REPO)")
    assert first.stdout.strip() == str(folder / "smollm2-from-scratch"), first.stderr
    assert [path.name for path in folder.iterdir()] == ["smollm2-from-scratch"], (
        "no half-finished clone is left"
    )
    assert (
        run_setup(folder, "nowhere", "\nprint(REPO)").stdout == first.stdout
    )  # a second Run all needs no network
    inside = folder / "smollm2-from-scratch" / "notebooks"
    assert run_setup(inside, "nowhere", "\nprint(REPO)").stdout == first.stdout


def test_the_setup_cell_says_what_failed_when_the_address_is_out_of_reach(tmp_path):
    result = run_setup(tmp_path / "empty", tmp_path / "no-such-repository")
    assert "RuntimeError: Could not fetch" in result.stderr and "Is the network there?" in result.stderr
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("stem", STEMS)
def test_badge_and_links_name_the_one_address(stem):
    with (ROOT / "pyproject.toml").open("rb") as file:
        address = tomllib.load(file)["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    text = "\n".join(source(cell) for cell in cells(stem))
    links = re.findall(r"https://colab\.research\.google\.com/github/([^\s)\"]+)", text)
    assert links and links[0] == f"{address}/blob/main/notebooks/{stem}.ipynb"
    for link in links:
        assert (
            link.startswith(f"{address}/blob/main/notebooks/") and (NOTEBOOKS / Path(link).name).is_file()
        ), link
    for name in re.findall(r"\]\(([^):]+\.ipynb)\)", text):
        assert (NOTEBOOKS / name).is_file(), name
    images = re.findall(r"<img[^>]*>|!\[[^\]]*\]\([^)]*\)", text)
    assert len(images) == 1 and 'alt="Open In Colab"' in images[0], (
        "draw figures in code: the badge is the only picture from outside"
    )


@pytest.mark.parametrize("stem", STEMS)
def test_cells_are_short(stem):
    sizes = {cell["id"]: len(code_lines(cell)) for cell in cells(stem, "code")}
    assert len(cells(stem)) <= 60
    assert {name: size for name, size in sizes.items() if size > 30} == {}
    assert statistics.median(sizes.values()) <= 8, sizes


@pytest.mark.parametrize("stem", STEMS)
def test_lesson_has_checks_figures_predictions_a_widget_and_folded_answers(stem):
    code, text = own_code(stem), "\n".join(source(cell) for cell in cells(stem, "markdown"))
    assert code.count("lesson.check(") >= 6
    assert len(re.findall(r"plots\.show\(|widgets\.explore\(", code)) >= 3
    assert code.count("lesson.predict(") >= 3 and "lesson.score()" in code
    assert "widgets." in code
    assert text.count("<details>") == text.count("</details>") >= 2 and "## Exercises" in text
    title = next(source(cell) for cell in cells(stem) if cell["id"] == "title")
    assert "Each `?`" in title and "Each `✔`" in title, (
        "a reader who begins here meets both signs without a word"
    )
    assert "You will be able to" in text and re.search(r"\bminutes?\b.*\b(CPU|GPU|T4)\b", text, re.S)
    assert stem == "06_evaluate_and_share" or "## Next" in text
    assert not re.search(r"^guess = (?!None)", code, re.M), "a guess is the reader's: leave None"


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_forbidden_is_used(stem):
    code = own_code(stem)
    found = {pattern: why for pattern, why in FORBIDDEN.items() if re.search(pattern, code, re.M)}
    assert found == {}


@pytest.mark.parametrize("path", SOURCES, ids=STEMS)
def test_source_is_plain_python_of_the_oldest_version_served(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape is a warning now and an error in a later Python
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))


# --- executed -----------------------------------------------------------------------------------------------------


def prepare(tmp_path, repository, **options):
    home = tmp_path / "home"
    (home / "content").mkdir(parents=True)
    return runner.environment(repository, home, **options)


def printed(notebook):
    """All that a reader sees: streams, plain text, and the HTML beside it (the training panel's notes are only there)."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        runner.text_of(output) + "\n" + output.get("data", {}).get("text/html", "") for output in outputs
    )


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.parametrize("stem", STEMS)
def test_notebook_runs_in_an_empty_folder_without_network(stem, tmp_path, repository):
    notebook = runner.run_notebook(stem, tmp_path / "empty", prepare(tmp_path, repository))
    assert runner.faults(notebook) == []


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.parametrize("stem", STEMS)
def test_source_runs_as_a_plain_script(stem, tmp_path, repository):
    result = runner.run_script(stem, tmp_path / "empty", prepare(tmp_path, repository))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.strip() == ""
    assert len(re.findall(r"^✔ ", result.stdout, re.M)) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("base", ["folder", "nobody/nothing"])
def test_the_form_that_fine_tunes_scores_before_and_after_or_says_why_not(
    base, tmp_path, monkeypatch, capsys
):
    """The cell itself, with a small trained folder as its base and the CPU taken for a GPU: CI has neither the weights nor a GPU."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    stem = next(stem for stem in STEMS if stem.startswith("06"))
    code = source(next(cell for cell in cells(stem, "code") if cell["id"] == "fine-tune"))
    if base == "folder":
        base = str(save_folder(tmp_path / "base", tiny_model(vocab_size=tiny_tokenizer().vocab_size)))
    for before, after in (
        ("FINE_TUNE = False", "FINE_TUNE = True"),
        ("HuggingFaceTB/SmolLM2-135M", base),
        ("100,", "20,"),
        ("1e-4", "1e-2"),
    ):
        assert before in code
        code = code.replace(before, after, 1)
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "input.txt").read_bytes()[:60_000])
    names = {
        "SMOKE": False,
        "TEXT": text,
        "Path": Path,
        "place": SimpleNamespace(output_dir="output"),
        "load_config": load_config,
        "train": train,
    }
    names |= {
        "model": SimpleNamespace(device=SimpleNamespace(type="cuda")),
        "UserError": UserError,
        "score_file": score_file,
        "LivePanel": LivePanel,
    }
    exec(code, names | {"load_model_and_tokenizer": lambda name, device: load_model_and_tokenizer(name)})
    said = capsys.readouterr().out
    if base == "nobody/nothing":
        assert "out of reach" in said and said.rstrip().endswith("So: nothing is fine-tuned.")
    else:
        before, after = map(
            float,
            re.search(r"held out: ([\d.]+) bits per byte before, ([\d.]+) after 20 steps", said).groups(),
        )
        assert after < before - 0.3 and (tmp_path / "output/fine-tuned/checkpoints/final_model.ckpt").is_dir()


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("stem", STEMS)
def test_notebook_runs_on_a_colab_with_drive(stem, tmp_path, repository):
    notebook = runner.run_notebook(stem, tmp_path / "empty", prepare(tmp_path, repository, colab=True))
    assert runner.faults(notebook) == []
    assert "Colab  yes" in printed(notebook)
    assert ("KEPT ON DRIVE" in printed(notebook)) == stem.startswith("04"), (
        "notebook 04 asks for Drive; no other does"
    )
    assert stem[:2] != "04" or "copied to Drive: step 45" in printed(notebook)


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("drill", DRILLS)
def test_training_notebook_survives_what_drive_does(drill, tmp_path, repository):
    stem = next(stem for stem in STEMS if stem.startswith("04"))
    notebook = runner.run_notebook(
        stem, tmp_path / "empty", prepare(tmp_path, repository, colab=True, drive=drill)
    )
    assert runner.faults(notebook) == []
    assert re.search(DRILLS[drill], printed(notebook), re.S), "the drill did not happen, or nobody was told"
