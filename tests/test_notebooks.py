"""The notebooks: always fresh, short cells, visible checks; and all of them run as a badge user runs them (slow)."""

import ast
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
import tomllib
import warnings
from io import StringIO
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupytext", reason="notebook tests need the dev extra")
import run_notebooks as runner

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def program(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


builder, pictures = program(NOTEBOOKS / "build.py"), program(ROOT / "docs" / "pictures.py")
SOURCES = builder.sources()
STEMS = [source.stem for source in SOURCES]
each = pytest.mark.parametrize("stem", STEMS)
FORBIDDEN = {
    r"^\s*[%!]": "a magic or shell line: the file must also be plain Python",
    r"autoreload|get_ipython\(": "IPython 7 with Python 3.13 breaks on it, plain Python has none",
    r"\bimport (imp|distutils|pkg_resources|fcntl|resource)\b": "gone by Python 3.13, or not on every system",
    r"SIGKILL|SIGHUP|os\.kill\(|getloadavg": "not on Windows",
    r"enable_custom_widget_manager": "loads a widget manager from a CDN",
    r"is_bf16_supported": "says yes on a T4, which only emulates it; use smollm2.device",
    r"/content/|/root/|MyDrive": "a machine's path; use smollm2.colab.storage",
    r"pyplot": "shows figures twice in a notebook; use smollm2.plots",
    r"pickle|weights_only=False|trust_remote_code": "runs code from a file",  # a pattern to search for
    r"pip install": "only the set-up cell installs",
    r"TagsInput|TimePicker|DatetimePicker|widgets\.Stack\b|titles=|tooltip=": "ipywidgets 8 only",
    r"except Exception:\s*(pass|\.\.\.)|except:": "swallows errors",
}
DRILLS = {  # what the fake Drive does (tests/fakecolab; test_colab.py has more), and what notebook 04 must then say
    "timeout": "KEPT ON THIS MACHINE ONLY.*Drive did not answer in time",
    "refused": "KEPT ON THIS MACHINE ONLY.*Google did not get permission",
    "vanish:20": "KEPT ON DRIVE.*NOT on Drive: step 45 is only on this machine.*a mount that went away",
    "quota:300000": "KEPT ON DRIVE.*NOT on Drive: step 45 is only on this machine.*your Drive is full",
}


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    return runner.snapshot(tmp_path_factory.mktemp("clone") / "source")


def cells(stem, kind=None):
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in notebook["cells"] if kind in (None, c["cell_type"])}


def own_code(stem):
    return "\n".join(text for name, text in cells(stem, "code").items() if name != "setup")


def numbered(number):
    return next(stem for stem in STEMS if stem.startswith(number))


@pytest.mark.parametrize("path", SOURCES, ids=STEMS)
def test_notebook_is_byte_for_byte_what_its_source_builds(path):
    assert builder.check(path) == []


def test_an_edited_notebook_or_setup_cell_is_noticed_and_an_id_that_repeats_is_named(tmp_path):
    path, text = tmp_path / SOURCES[0].name, SOURCES[0].read_text(encoding="utf-8")
    path.write_text(text.replace("colab.doctor()", "colab.doctor() or None"), encoding="utf-8")
    built = SOURCES[0].with_suffix(".ipynb").read_bytes()
    path.with_suffix(".ipynb").write_bytes(built.replace(b"Build the model", b"Build a model"))
    setup, notebook = builder.check(path)
    assert "set-up cell differs" in setup and f"{path.stem}.ipynb is not what {path.name} builds" in notebook
    assert builder.build(path) == [path.name, f"{path.stem}.ipynb"] and builder.check(path) == []
    with pytest.raises(builder.NotebookError, match="repeats an id"):
        builder.to_notebook(text.replace(' id="title"', ' id="imports"'), path.stem)


def run_setup(folder, address):
    folder.mkdir(exist_ok=True)
    code = builder.SETUP_CELL.format(address=address).split("\n\ncolab.install_missing")[0] + "\nprint(REPO)"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SMOLLM2_REPO")}
    env["GIT_TERMINAL_PROMPT"] = "0"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_the_setup_cell_fetches_the_project_once_and_finds_it_again_or_says_what_failed(tmp_path, repository):
    folder = tmp_path / "empty"
    failed = run_setup(folder, tmp_path / "no-such-repository")
    assert "RuntimeError: Could not fetch" in failed.stderr and "Is the network there?" in failed.stderr
    assert list(folder.iterdir()) == [], "no half-finished clone is left"
    first = run_setup(folder, repository)
    assert first.stdout.strip() == str(folder / "smollm2-from-scratch"), first.stderr
    for again in (folder, folder / "smollm2-from-scratch" / "notebooks"):  # a second Run all needs no network
        assert run_setup(again, "nowhere").stdout == first.stdout


@each
def test_badge_and_links_name_the_one_address_and_gpus_are_asked_for_where_they_help(stem):
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    assert ("accelerator" in notebook["metadata"]) == stem.startswith(("04", "05", "06", "07"))
    assert list(cells(stem))[:3] == ["view-in-github", "title", "setup"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"].removeprefix("https://github.com/") + "/blob/main/notebooks/"
    text = "\n".join(cells(stem).values())
    links = re.findall(r"https://colab\.research\.google\.com/github/([^\s)\"]+)", text)
    assert links[0] == f"{address}{stem}.ipynb" and all(link.startswith(address) for link in links)
    for name in [Path(link).name for link in links] + re.findall(r"\]\(([^):]+\.ipynb)\)", text):
        assert (NOTEBOOKS / name).is_file(), name
    beside = f"/notebooks/{stem}.ipynb) [read]({builder.page_url(stem)})"
    assert builder.page_url(stem) in cells(stem)["view-in-github"]
    assert beside in (ROOT / "README.md").read_text()
    images = re.findall(r"<img[^>]*>|!\[[^\]]*\]\([^)]*\)", text)
    assert len(images) == 1 and 'alt="Open In Colab"' in images[0], "figures are drawn in code"


def test_a_web_page_shows_outputs_and_code_but_no_folded_code_and_links_to_pages():
    notebook = nbformat.read(NOTEBOOKS / f"{numbered('01')}.ipynb", as_version=4)
    figure = next(cell for cell in notebook.cells if cell.id == "init-figure")
    shown = {"text/html": '<img alt="drawn"/>', "text/plain": "text", runner.WIDGET_VIEW: {"model_id": "x"}}
    figure.outputs = [nbformat.v4.new_output("display_data", shown)]
    html = runner.page(notebook)
    assert '<img alt="drawn"/>' in html and "every matrix alike" not in html and "post_attention" in html
    assert 'href="02_count_every_parameter.html"' in html and "widget-view" not in html


@each
def test_cells_are_short_and_narrow(stem):
    code = cells(stem, "code")
    lines = {name: [line for line in text.splitlines() if line.strip()] for name, text in code.items()}
    shown = re.findall(r"```.*?```", "\n".join(cells(stem, "markdown").values()), re.S)
    assert [line for text in (*code.values(), *shown) for line in text.splitlines() if len(line) > 96] == []
    assert [name for name, each in lines.items() if len(each) > 30] == [] and len(cells(stem)) <= 66
    figures = re.findall(r"^# %% (.*\bfigure\b.*)$", (NOTEBOOKS / f"{stem}.py").read_text("utf-8"), re.M)
    assert [figure for figure in figures if 'cellView="form"' not in figure] == [], "fold a figure's code"
    tokens = [tokenize.generate_tokens(StringIO(text).readline) for text in code.values()]
    statements = [sum(token.type == tokenize.NEWLINE for token in each) for each in tokens]
    assert statistics.median(statements) <= 8, dict(zip(code, statements, strict=True))


@each
def test_lesson_has_checks_figures_predictions_a_widget_and_folded_answers(stem):
    code, text = own_code(stem), "\n".join(cells(stem, "markdown").values())
    title, shown = cells(stem)["title"], re.findall(r"plots\.show\(|widgets\.explore\(", code)
    assert code.count("lesson.check(") + code.count("lesson.true(") >= 6
    assert code.count("lesson.predict(") >= 3 and "lesson.score()" in code
    assert len(shown) >= 3 and "widgets.explore(" in shown
    assert text.count("<details>") == text.count("</details>") >= 2
    assert text.count("**✎ Exercise") >= 3, "beside their sections"
    assert "Each `?`" in title and "Each `✔`" in title, "whoever begins here meets both signs without a word"
    assert "You will be able to" in text and re.search(r"\bminutes?\b.*\b(CPU|GPU|T4)\b", text, re.S)
    assert stem == "06_evaluate_and_share" or "## Next" in text
    needs_gpu = 'device.type != "cuda"' in code
    assert ("needs a GPU" in title) == needs_gpu, "what no CPU can do is said at the top"
    assert not re.search(r"^guess = (?!None)", code, re.M), "a guess is the reader's: leave None"


@each
def test_nothing_forbidden_is_used_and_the_source_is_plain_python_of_the_oldest_version_served(stem):
    code = own_code(stem)
    assert {pattern: why for pattern, why in FORBIDDEN.items() if re.search(pattern, code, re.M)} == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape is a warning now and an error in a later Python
        ast.parse((NOTEBOOKS / f"{stem}.py").read_text(encoding="utf-8"), feature_version=(3, 11))


def names(tree, context, skip=()) -> set[str]:
    """Names that are read, or set, in a piece of code, but for what stands inside `skip` nodes."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, skip)]
        found |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, context) else set()
    return found


INNER = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


BETTER = {"model", "checkpoint"}  # notebook 6: the best takes over, and a question asked again is about that


@each
def test_what_a_widget_or_a_question_reads_is_not_named_anew_further_down(stem):
    """A widget's function runs whenever a slider moves, and a question again with each guess, long after Run all: then a
    global holds what the last cell put there."""
    trees = [ast.parse(code) for code in cells(stem, "code").values()]
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for number, tree in enumerate(trees):
        calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
        drawn = [call.args[0].id for call in calls if getattr(call.func, "attr", "") == "explore"]
        read: set[str] = set()
        if any(getattr(call.func, "attr", "") == "predict" for call in calls):
            read = names(tree, ast.Load) - names(tree, ast.Store) - BETTER
        while drawn:
            function = functions[drawn.pop()]
            arguments = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
            fresh = names(function, ast.Load) - names(function, ast.Store) - arguments - read
            read |= fresh
            drawn += fresh & functions.keys()
        later = set().union(*(names(tree, ast.Store, INNER) for tree in trees[number + 1 :]))
        assert not read & later, f"cell {number} reads {read & later}"


def test_pictures_are_fresh():
    assert pictures.problems() == [], f"pictures are stale; {pictures.REMEDY}"


def printed(notebook):
    """All that a reader sees: streams, plain text, and the HTML beside it (the training panel's notes are only there)."""
    seen = [output for _, output in runner.outputs(notebook)]
    return "\n".join(runner.text_of(o) + "\n" + o.get("data", {}).get("text/html", "") for o in seen)


@pytest.mark.slow
@pytest.mark.notebooks
@each
def test_notebook_runs_in_an_empty_folder_without_network(stem, tmp_path, repository):
    env = runner.environment(repository, tmp_path / "home")
    assert runner.faults(runner.run_notebook(stem, tmp_path / "empty", env)) == []


@pytest.mark.slow
@pytest.mark.notebooks
@each
def test_source_runs_as_a_plain_script(stem, tmp_path, repository):
    result = runner.run_script(stem, tmp_path / "empty", runner.environment(repository, tmp_path / "home"))
    assert result.returncode == 0 and result.stderr.strip() == "", result.stderr[-3000:]
    assert len(re.findall(r"^✔ ", result.stdout, re.M)) >= 6


@pytest.mark.slow
@pytest.mark.colab
@each
def test_notebook_runs_on_a_colab_with_drive(stem, tmp_path, repository):
    env = runner.environment(repository, tmp_path / "home", drive="ok")
    notebook = runner.run_notebook(stem, tmp_path / "empty", env)
    said, trains = printed(notebook), stem == numbered("04")
    assert runner.faults(notebook) == [] and "Colab  yes" in said
    assert ("KEPT ON DRIVE" in said) == trains == ("copied to Drive: step 45" in said)
    assert ("your run in the folder output and on Drive (" in said) == stem.startswith(("05", "06", "07"))


@pytest.mark.slow
@pytest.mark.colab
def test_of_a_lost_machine_nothing_but_drive_is_needed(tmp_path, repository):
    env = runner.environment(repository, tmp_path / "home", drive="ok")
    lost = printed(runner.run_notebook(numbered("04"), tmp_path / "lost", env))
    shutil.rmtree(tmp_path / "lost")
    found = runner.run_notebook(numbered("05"), tmp_path / "fresh", env)
    assert runner.faults(found) == [] and "training a small one" not in printed(found)
    mine = re.search(r"your run: .* to 45, the last saved .* in (.*)", printed(found))[1]
    assert mine == str(tmp_path / "home/content/drive/MyDrive/smollm2/nano")
    again = runner.run_notebook(numbered("04"), tmp_path / "replaced", env)
    assert runner.faults(again) == [] and "Nothing was left to train" in printed(again)
    bits = r"held-out bits per byte +([0-9.]+)"
    assert re.search(bits, printed(again))[1] == re.search(bits, lost)[1]


@pytest.mark.slow
@pytest.mark.colab
@pytest.mark.parametrize("drill", DRILLS)
def test_training_notebook_survives_what_drive_does(drill, tmp_path, repository):
    env = runner.environment(repository, tmp_path / "home", drive=drill)
    notebook = runner.run_notebook(numbered("04"), tmp_path / "empty", env)
    assert runner.faults(notebook) == []
    assert re.search(DRILLS[drill], printed(notebook), re.S), "the drill did not happen, or nobody was told"
