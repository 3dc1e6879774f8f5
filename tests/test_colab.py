"""Colab: what the set-up cell installs, Drive that fails in every known way, secrets; and the lesson helpers and widgets."""

import errno
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import ipywidgets
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
    monkeypatch.setattr(colab, "is_mount", colab.is_mount)
    forget = [name for name in sys.modules if name == "google" or name.startswith("google.colab")]
    for name in forget:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    yield mount_point
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


def choose(drill, monkeypatch, tmp_path, **options):
    monkeypatch.setenv("FAKECOLAB_DRIVE", drill)
    waits = []
    return colab.storage(output_dir=tmp_path / "output", sleep=waits.append, **options), waits


# --- detection and installation -----------------------------------------------------------------------------------


def test_colab_is_recognised_by_tag_and_package_together(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert not colab.is_colab()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-fake")
    assert not colab.is_colab(), "a tag without the package is no Colab"


def test_colab_is_recognised(fake_colab):
    assert colab.is_colab()


def test_only_absent_packages_are_installed_and_present_ones_are_pinned(tmp_path, monkeypatch, capsys):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# run time\ntorch>=2.11  # here\npyyaml>=6\nno-such-package-zz>=1,<2\nnvidia-ml-py>=12\n"
    )
    monkeypatch.setattr(colab.shutil, "which", lambda name: None)
    seen = {}

    def pip(command, **_):
        seen["command"], seen["pins"] = command, Path(command[command.index("-c") + 1]).read_text()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(colab.subprocess, "run", pip)
    assert colab.install_missing(requirements) == ["no-such-package-zz>=1,<2"]
    assert seen["command"][-1] == "no-such-package-zz>=1,<2" and not any(
        "torch" in word for word in seen["command"]
    )
    assert f"torch=={torch.__version__.split('+')[0]}" in seen["pins"]
    assert "--upgrade" not in seen["command"] and "installed no-such-package-zz" in capsys.readouterr().out


def test_on_colab_the_setup_cell_needs_lightning_alone(monkeypatch):
    absent_on_colab = {"pytorch_lightning", "lightning", "torchmetrics"}
    monkeypatch.setattr(colab, "_has", lambda module: module not in absent_on_colab)
    assert [line.split(">")[0] for line in colab.missing_requirements(ROOT / "requirements.txt")] == [
        "pytorch-lightning"
    ]


def test_a_failed_install_says_what_and_why(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-package-zz\n")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="could not install no-such-package-zz: ERROR: no network"):
        colab.install_missing(requirements)


def test_colab_module_starts_before_anything_is_installed():
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'psutil', 'yaml', 'transformers')))\nimport smollm2.colab"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_doctor_says_precision_and_why(capsys):
    rows = colab.doctor()
    assert rows["torch"] == torch.__version__ or rows["torch"] in torch.__version__
    assert (
        rows["precision"].split(":")[0] in ("fp32", "bf16", "fp16")
        and len(rows["precision"].split(":")[1]) > 10
    )
    assert rows["Colab"] == "no" and "not mounted" in rows["Drive"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) <= 25


# --- Drive --------------------------------------------------------------------------------------------------------


def test_drive_is_mounted_proven_and_chosen(fake_colab, monkeypatch, tmp_path, capsys):
    chosen, waits = choose("ok", monkeypatch, tmp_path)
    assert (
        chosen.drive_dir == fake_colab / "MyDrive" / "smollm2" == chosen.folder and chosen.drive_dir.is_dir()
    )
    assert chosen.output_dir == tmp_path / "output" and waits == []
    assert list(chosen.drive_dir.iterdir()) == [], "the probe is removed"
    assert "KEPT ON DRIVE" in capsys.readouterr().out
    again, _ = choose("refused", monkeypatch, tmp_path)  # a second Run all asks for nothing
    assert again.drive_dir == chosen.drive_dir


@pytest.mark.parametrize(
    ("drill", "words", "tries"),
    [
        ("refused", "allow pop-ups", 3),
        ("timeout", "did not answer in time", 3),
        ("enterprise", "cannot mount Drive", 1),
    ],
)
def test_a_mount_that_fails_is_told_in_plain_words_and_the_lesson_goes_on(
    drill, words, tries, fake_colab, monkeypatch, tmp_path, capsys
):
    chosen, waits = choose(drill, monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert chosen.drive_dir is None and chosen.folder == tmp_path / "output" and words in chosen.reason
    assert waits == [2.0, 8.0][: tries - 1] and out.count("Trying again") == tries - 1
    assert "KEPT ON THIS MACHINE ONLY" in out and "Traceback" not in out and "the files are gone" in out
    assert not fake_colab.exists(), "nothing may be made under a mount point that is not mounted"


def test_only_a_mounted_file_system_counts_as_drive(tmp_path):
    (tmp_path / "MyDrive").mkdir()
    assert not colab.is_mount(tmp_path) and not colab.is_mount(tmp_path / "absent")
    assert colab.is_mount(Path("/"))


def test_a_plain_folder_at_the_mount_point_is_not_drive_and_is_left_alone(fake_colab, monkeypatch, tmp_path):
    trap = fake_colab / "MyDrive"
    trap.mkdir(parents=True)
    chosen, waits = choose("ok", monkeypatch, tmp_path)
    assert chosen.drive_dir is None and "plain folder" in chosen.reason and waits == []
    assert list(trap.iterdir()) == []


def test_without_drive_or_colab_the_folder_is_local_and_says_so(fake_colab, monkeypatch, tmp_path, capsys):
    chosen, _ = choose("ok", monkeypatch, tmp_path, use_drive=False)
    assert chosen.drive_dir is None and "chose not to" in chosen.reason and not fake_colab.exists()
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    chosen, _ = choose("ok", monkeypatch, tmp_path)
    assert chosen.drive_dir is None and "not Colab" in chosen.reason
    assert "ordinary folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("drill", "number"),
    [
        ("errno107:0", None),
        ("errno107:3", None),
        ("quota:0", None),
        ("errno107:8", errno.ENOTCONN),
        ("vanish:8", errno.ENOENT),
    ],
)
def test_drive_that_dies_after_mounting_is_noticed_at_once_or_raises_a_plain_oserror_later(
    drill, number, tmp_path
):
    """In a process of its own: the fake's audit hook cannot be taken off again."""
    code = (
        "from smollm2 import colab\n"
        f"place = colab.storage(output_dir={str(tmp_path / 'output')!r}, sleep=lambda s: None)\n"
        "print('DIED' if place.drive_dir is None else 'ALIVE')\n"
        "try:\n"
        "    [(place.drive_dir / f'{n}').write_bytes(b'x') for n in range(9)] if place.drive_dir else None\n"
        "except OSError as error:\n"
        "    print('LATER', error.errno, colab.explain(error))\n"
    )
    (tmp_path / "content").mkdir()
    env = os.environ | {
        "COLAB_RELEASE_TAG": "x",
        "FAKECOLAB_DRIVE": drill,
        "FAKECOLAB_MOUNT_POINT": str(tmp_path / "content" / "drive"),
    }
    env["PYTHONPATH"] = os.pathsep.join([str(FAKE), str(ROOT)])
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    if number is None:  # Drive mounts and lists, but does not take the test file: not chosen
        assert "DIED" in out and "KEPT ON THIS MACHINE ONLY" in out and "Trying again" in out
    else:
        assert "ALIVE" in out and f"LATER {number}" in out and "Errno" not in out


def test_every_drive_error_has_plain_words():
    for number in (errno.ENOTCONN, errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.ENOENT):
        assert "Errno" not in colab.explain(OSError(number, os.strerror(number)))
    assert colab.explain(RuntimeError("odd")) == "RuntimeError: odd"


# --- secrets ------------------------------------------------------------------------------------------------------


def test_a_secret_comes_from_the_panel_or_the_environment(fake_colab, monkeypatch):
    monkeypatch.setenv("FAKECOLAB_SECRET_HF_TOKEN", "from-panel")
    assert colab.secret("HF_TOKEN") == "from-panel"
    monkeypatch.delenv("FAKECOLAB_SECRET_HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert colab.secret("HF_TOKEN") == "from-environment"


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("", "no such secret"),
        ("denied", "switch 'Notebook access' is off"),
        ("timeout", "no Colab screen answered"),
    ],
)
def test_an_absent_secret_is_none_with_a_reason(mode, words, fake_colab, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("FAKECOLAB_SECRETS", mode)
    assert colab.secret("HF_TOKEN") is None
    assert words in capsys.readouterr().out


# --- lesson helpers -----------------------------------------------------------------------------------------------


def test_a_check_prints_difference_and_tolerance_and_fails_with_the_likely_mistake(capsys):
    lesson.check("norms", torch.tensor([1e-7, -3e-6]), 1e-5)
    lesson.check("weights", torch.zeros(3))
    assert (
        capsys.readouterr().out
        == "✔ norms: max|difference| = 3e-06 (tolerance 1e-05)\n✔ weights: max|difference| = 0 (exact)\n"
    )
    with pytest.raises(lesson.CheckFailed, match=r"norms: .* = 0.5, allowed is 1e-05. Likely: eps outside"):
        lesson.check("norms", -0.5, 1e-5, likely="eps outside")
    for bad in (math.nan, torch.tensor([0.0, math.nan]), math.inf):
        with pytest.raises(lesson.CheckFailed):
            lesson.check("finite", bad, 1e9)


@pytest.mark.parametrize(
    "nothing",
    [
        0,
        False,
        np.int64(0),
        np.zeros(3, dtype=np.uint16),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.bool),
    ],
)
def test_a_check_of_counts_or_of_a_yes_or_no_prints_its_name_alone(nothing, capsys):
    lesson.check("no file is missing", nothing)
    assert capsys.readouterr().out == "✔ no file is missing\n"
    with pytest.raises(
        lesson.CheckFailed, match=r"^✘ no file is missing: not so, off by 1\. Likely: a typo$"
    ):
        lesson.check("no file is missing", nothing + 1, likely="a typo")


def test_a_planted_bug_must_be_found(capsys):
    lesson.check_fails("bug", lambda: lesson.check("x", 1.0))
    assert capsys.readouterr().out.startswith("✔ bug: found. ✘ x")
    with pytest.raises(lesson.CheckFailed, match="proves nothing"):
        lesson.check_fails("bug", lambda: lesson.check("x", 0.0))


@pytest.mark.parametrize(
    ("guess", "answer", "expected"),
    [
        (100, 105, 1.0),
        (60, 100, 0.5),
        (300, 100, 0.0),
        ("Gate ", "gate", 1.0),
        ("up", "gate", 0.0),
        (0, 0, 1.0),
    ],
)
def test_predictions_are_scored(guess, answer, expected, capsys):
    lesson.forget()
    lesson.predict("how many?", guess, answer, why="because")
    assert lesson.points() == (expected, 1) and "because" in capsys.readouterr().out


def test_an_open_prediction_gives_nothing_away_and_can_be_answered_later(capsys):
    lesson.forget()
    lesson.predict("how many?", None, 4242, why="secret reason")
    out = capsys.readouterr().out
    assert "4,242" not in out and "4242" not in out and "secret" not in out and lesson.points() == (0, 1)
    lesson.predict("how many?", 4242, 4242)
    assert lesson.points() == (1, 1)


def test_a_guess_that_is_no_number_is_answered_in_words(capsys):
    lesson.forget()
    lesson.predict("how many?", "a lot", 4242, why="secret reason")
    out = capsys.readouterr().out
    assert (
        "'a lot' is no number" in out
        and "4,242" not in out
        and "secret" not in out
        and lesson.points() == (0, 1)
    )


def test_large_answers_are_written_with_commas(capsys):
    lesson.predict("how many tokens?", 47000, 47117.3)
    assert "You said 47,000; it is 47,117: right" in capsys.readouterr().out


# --- figures and widgets ------------------------------------------------------------------------------------------


def line(height, style="-"):
    fig, axis = plots.figure(3, 2)
    axis.plot([0, height], style)
    return fig, f"A line from zero up to {height} & back <again>"


def test_a_figure_is_white_deterministic_and_has_its_alternative_text(capsys):
    first, second = plots.png_bytes(line(3)[0]), plots.png_bytes(line(3)[0])
    assert first == second and first.startswith(b"\x89PNG")
    assert 'alt="A line from zero up to 3 &amp; back &lt;again&gt;"' in plots.image_html(*line(3))
    plots.show(*line(3))
    assert capsys.readouterr().out == "[figure] A line from zero up to 3 & back <again>\n"
    with pytest.raises(ValueError, match="alt text"):
        plots.show(line(3)[0], alt="a plot")


def test_a_panel_redraws_at_the_ends_of_every_control_and_hides_no_error():
    height, style = widgets.slider("height", 0, 9, 3), widgets.choice("style", ["-", "--"], "-")
    panel = widgets.panel(line, height=height, style=style)
    picture = panel.children[-1]
    seen = {picture.value}
    for control, ends in ((height, [0, 9]), (style, ["--", "-"])):
        for value in ends:
            control.value = value
            seen.add(picture.value)
    assert len(seen) == 4 and all(value.startswith("<img alt=") for value in seen)
    broken = widgets.panel(lambda n: line(1) if n < 5 else 1 / 0, n=(n := widgets.slider("n", 0, 9, 0)))
    with pytest.raises(ZeroDivisionError):
        n.value = 9
    assert isinstance(broken, ipywidgets.VBox)


def test_a_plain_script_shows_the_default_figure_in_words(capsys):
    widgets.explore(line, height=widgets.slider("height", 0, 9, 4))
    assert "up to 4" in capsys.readouterr().out and widgets.live == []


def test_controls_report_when_released_and_use_only_shared_names():
    made = [widgets.slider("a", 0, 2, 1), widgets.float_slider("b", 0, 1, 0.5), widgets.text("c", "x")]
    assert all(control.continuous_update is False for control in made)
    assert widgets.switch("d", True).value is True and widgets.choice("e", [1, 2], 2).value == 2
