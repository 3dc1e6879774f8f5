"""Colab: what the set-up cell installs, Drive that fails in every known way; and the lesson helpers and widgets."""

import errno
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from smollm2 import colab, plots, widgets
from smollm2.errors import UserError
from smollm2.notebook import lesson

ROOT = Path(__file__).resolve().parents[1]
FAKE = ROOT / "tests" / "fakecolab"


@pytest.fixture
def fake_colab(tmp_path, monkeypatch):
    """A Colab runtime with an unmounted Drive; returns its mount point."""
    mount_point = tmp_path / "content" / "drive"
    mount_point.parent.mkdir()
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-fake")
    monkeypatch.setenv("FAKECOLAB_MOUNT_POINT", str(mount_point))
    monkeypatch.setattr(colab, "MOUNT_POINT", mount_point)
    monkeypatch.setattr(os.path, "ismount", os.path.ismount)  # the fake replaces it: back afterwards
    monkeypatch.setattr(colab, "PAUSES_SECONDS", (0, 0, 0))
    for name in [name for name in sys.modules if name.split(".")[0] == "google"]:
        monkeypatch.delitem(sys.modules, name)
    yield mount_point
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


def test_only_absent_packages_are_installed_and_present_ones_stay(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    absent = ["no-such-package-zz>=1,<2"]
    lines = ["# run time", "torch>=2.11  # here", "pyyaml>=6", *absent, "other>=1; sys_platform == 'beos'"]
    requirements.write_text("\n".join(lines))
    commands, failure = [], ""

    def pip(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, bool(failure), "", failure)

    monkeypatch.setattr(colab.subprocess, "run", pip)
    assert colab.install_missing(requirements) == absent
    assert absent[0] in commands[0] and "--upgrade" not in commands[0]
    assert f"torch=={torch.__version__}" in commands[0], "named as it is, so pip may not replace it"
    failure = "Looking ...\nERROR: no network\n"
    with pytest.raises(UserError, match="could not install no-such-package-zz>=1,<2: ERROR: no network"):
        colab.install_missing(requirements)
    requirements.write_text("torch\n")
    assert colab.install_missing(requirements) == [] and len(commands) == 2, "nothing absent: no pip"
    failure = ""
    as_on_colab = {"pytorch-lightning": None}
    monkeypatch.setattr(colab, "installed", lambda name: as_on_colab.get(name, "1.0"))
    missing = colab.install_missing(ROOT / "requirements.txt")
    assert [line.split(">")[0] for line in missing] == ["pytorch-lightning"]


def test_colab_module_starts_before_anything_is_installed_and_without_what_only_linux_has():
    absent = ("torch", "numpy", "psutil", "yaml", "transformers", "pydantic", "fcntl")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\nimport smollm2.colab"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_drive_is_mounted_proven_and_chosen(fake_colab, monkeypatch, tmp_path, capsys):
    chosen = colab.storage(output_dir=tmp_path / "output")
    assert chosen.drive_dir == fake_colab / "MyDrive" / "smollm2" and chosen.output_dir == tmp_path / "output"
    assert list(chosen.drive_dir.iterdir()) == [] and "KEPT ON DRIVE" in capsys.readouterr().out
    monkeypatch.setenv("FAKECOLAB_DRIVE", "refused")
    assert colab.storage().drive_dir == chosen.drive_dir, "a second Run all asks for nothing"


REFUSALS = {"refused": ("allow pop-ups", 3), "timeout": ("in time", 3), "enterprise": ("cannot mount", 1)}


@pytest.mark.parametrize("drill", REFUSALS)
def test_a_mount_that_fails_is_told_and_the_lesson_goes_on(drill, fake_colab, monkeypatch, capsys):
    monkeypatch.setenv("FAKECOLAB_DRIVE", drill)
    words, tries = REFUSALS[drill]
    assert colab.storage().drive_dir is None
    out = capsys.readouterr().out
    assert out.count("Drive: ") == tries and out.count(words) == tries + 1
    assert "KEPT ON THIS MACHINE ONLY" in out and "the files are gone" in out
    assert not fake_colab.exists(), "nothing may be made under a mount point that is not mounted"


def test_without_drive_or_colab_the_folder_is_local_and_says_so(fake_colab, monkeypatch, capsys):
    assert colab.storage(use_drive=False).drive_dir is None and not fake_colab.exists()
    trap = fake_colab / "MyDrive"  # a plain folder at the mount point
    trap.mkdir(parents=True)
    assert colab.storage().drive_dir is None and list(trap.iterdir()) == []
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert colab.storage().drive_dir is None
    assert re.search("chose not to.*plain folder.*not Colab", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("drill", ["errno107:0", "errno107:2", "quota:0", "errno107:8", "vanish:8"])
def test_drive_that_dies_after_mounting_is_noticed_at_once_or_raises_an_oserror_later(drill, tmp_path):
    """In a process of its own: the fake's audit hook cannot be taken off again."""
    code = """if True:
        from smollm2 import colab
        colab.PAUSES_SECONDS = (0, 0, 0)
        place = colab.storage()
        try:
            [(place.drive_dir / f"{n}").write_bytes(b"x") for n in range(9)] if place.drive_dir else None
        except OSError as error:
            print("LATER", error.errno, colab.explain(error))
    """
    (tmp_path / "content").mkdir()
    env = os.environ | {"COLAB_RELEASE_TAG": "x", "FAKECOLAB_DRIVE": drill}
    env["FAKECOLAB_MOUNT_POINT"] = str(tmp_path / "content" / "drive")
    env["PYTHONPATH"] = os.pathsep.join([str(FAKE), str(ROOT)])
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    later = {"errno107:8": errno.ENOTCONN, "vanish:8": errno.ENOENT}.get(drill)
    expected = f"KEPT ON DRIVE.*LATER {later}" if later else "KEPT ON THIS MACHINE ONLY"
    assert re.search(expected, result.stdout, re.S) and "Errno" not in result.stdout


def test_a_check_prints_difference_and_tolerance_and_fails_with_the_likely_mistake(capsys):
    lesson.check("norms", torch.tensor([1e-7, -3e-6]), 1e-5)
    lesson.check("no file is missing", np.int64(0))
    said = "✔ norms: max|difference| = 3e-06 (tolerance 1e-05)\n✔ no file is missing\n"
    assert capsys.readouterr().out == said
    with pytest.raises(lesson.CheckFailed, match=r"norms: .* = 0.5 \(tolerance 1e-05\). Likely: eps outside"):
        lesson.check("norms", -0.5, 1e-5, likely="eps outside")
    for bad in (math.nan, torch.tensor([0.0, math.nan]), math.inf):
        lesson.check_fails("a planted bug", lambda bad=bad: lesson.check("finite", bad, 1e9))
    assert capsys.readouterr().out.startswith("✔ a planted bug: found. ✘ finite")
    with pytest.raises(lesson.CheckFailed, match="proves nothing"):
        lesson.check_fails("bug", lambda: lesson.check("x", 0.0))


GUESSES = [(100, 105, 1), (60, 100, 0.5), (300, 100, 0), ("Gate ", "gate", 1), ("up", "gate", 0), (0, 0, 1)]


@pytest.mark.parametrize(("guess", "answer", "points"), GUESSES)
def test_predictions_are_scored(guess, answer, points, capsys):
    lesson._scores.clear()
    lesson.predict("how many?", guess, answer, why="because")
    lesson.score()
    out = capsys.readouterr().out
    assert f"({points} of 1 point)" in out and f": {points} of 1 points" in out and "because" in out


def test_an_open_prediction_gives_nothing_away_and_can_be_answered_later(capsys):
    for guess, words in ((None, "No guess yet"), ("a lot", "no number")):
        lesson.predict("how many tokens?", guess, 47117.3, why="secret reason")
        out = capsys.readouterr().out
        assert words in out and not re.search("47,?117|secret", out)


def line(height, style="-"):
    fig, axis = plots.figure(3, 2)
    axis.plot([0, height], style)
    return fig, f"A line from zero up to {height} & back <again>"


def test_a_live_panel_and_its_figure_are_one_output_so_that_nobody_sees_both(monkeypatch):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    widgets.explore(line, height=widgets.slider("height", 0, 9, 4))
    assert [set(bundle) for bundle in shown] == [{plots.WIDGET_VIEW, "text/html", "text/plain"}]
    assert shown[0][plots.WIDGET_VIEW]["model_id"] == widgets.live.pop().model_id
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explore(...)")])
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", shown[0])]
    body = nbconvert.HTMLExporter().from_notebook_node(notebook)[0].split("<body")[1]  # no widget lives there
    assert body.count('<img alt="A line from zero up to 4') == 1 and "widget-view" not in body
