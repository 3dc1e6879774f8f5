"""Run notebooks as the person behind the badge has them: an empty folder, the .ipynb alone, a fresh kernel, no network.

    python tests/run_notebooks.py [01 05 ...] [--figures DIR] [--keep DIR] [--script] [--colab] [--drive DRILL] [--online]

The set-up cell's clone is redirected to a snapshot of this working tree by SMOLLM2_REPO. Output rules (no error, no
warning, no long output, checks and pictures present) are asserted on the executed copy. `--script` runs the .py with
plain python; `--colab` adds the fake google.colab package, `--drive` one of its drills.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FAKE_COLAB = ROOT / "tests" / "fakecolab"
CLONE = "smollm2-from-scratch"
MAX_OUTPUT_LINES = 25
NOWHERE = "http://127.0.0.1:9"  # the discard port: whatever tries the network fails at once
WHERE_CELL = "import smollm2\nprint('package from', smollm2.__file__)"
# Moves every control of every live panel to its ends, one at a time and all together; an exception fails the cell.
DRIVE_CELL = """
from smollm2 import widgets
def ends(control):
    return control.options if hasattr(control, "options") else [control.min, control.max] if hasattr(control, "min") else [True, False]
moved = 0
for panel in widgets.live:
    *controls, picture = panel.children
    controls = [c for c in controls if hasattr(c, "options") or hasattr(c, "min") or isinstance(c.value, bool)]
    for last in (False, True):
        for control in controls:
            for value in (ends(control) if not last else [ends(control)[-1]]):
                control.value = value
                moved += 1
                assert picture.value.startswith("<img alt="), picture.value[:100]
print(moved, "settings drawn")
"""
IMAGE = re.compile(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"')


def snapshot(target: Path) -> Path:
    """A git repository at `target` holding the working tree as it is now (tracked and new files, nothing ignored)."""
    target.mkdir(parents=True)
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    else:
        shutil.copytree(
            ROOT, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "output", ".*")
        )
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "snapshot"]):
        subprocess.run(["git", *identity, *words], cwd=target, check=True, capture_output=True)
    return target


def environment(
    repo: Path, home: Path, online: bool = False, colab: bool = False, drive: str = "ok"
) -> dict[str, str]:
    """Variables of the kernel: no network, a home of its own, nothing of this checkout importable but the fake Colab."""
    dropped = ("PYTHONPATH", "COLAB_", "FAKECOLAB_", "SMOLLM2_TEST_DATA")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env |= {
        "SMOLLM2_REPO": str(repo),
        "SMOLLM2_SMOKE": "1",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    env |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
    }
    env["JUPYTER_PLATFORM_DIRS"] = "1"
    if not online:
        env |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
        env |= {f"{scheme}_PROXY": NOWHERE for scheme in ("HTTP", "HTTPS", "ALL")} | {
            f"{s}_proxy": NOWHERE for s in ("http", "https", "all")
        }
        env |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    if colab:
        env |= {
            "COLAB_RELEASE_TAG": "release-colab-fake",
            "PYTHONPATH": str(FAKE_COLAB),
            "FAKECOLAB_DRIVE": drive,
        }
        env["FAKECOLAB_MOUNT_POINT"] = str(home / "content" / "drive")
    return env


def text_of(output) -> str:
    """Plain text of an output as a reader sees it."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return output.data.get("text/plain", "")


def faults(notebook) -> list[str]:
    """What breaks the rules for outputs, in words."""
    found = []
    printed = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        lines = 0
        for output in cell.outputs:
            text = text_of(output)
            printed.append(text)
            lines += len(text.rstrip("\n").split("\n")) if output.output_type == "stream" else 0
            if output.output_type == "error" or (output.output_type == "stream" and output.name == "stderr"):
                found.append(f"{cell.id}: {output.output_type}: {text[-600:]}")
            if "\r" in text or "Warning" in text:
                found.append(f"{cell.id}: progress bar or warning: {text[:200]!r}")
            html = output.get("data", {}).get("text/html", "")
            if html.count("<img") != len(IMAGE.findall(html)) or any(
                len(alt) < 20 for alt, _ in IMAGE.findall(html)
            ):
                found.append(f"{cell.id}: an image without alternative text")
        if lines > MAX_OUTPUT_LINES:
            found.append(f"{cell.id}: {lines} lines of output; {MAX_OUTPUT_LINES} allowed")
    everything = "\n".join(printed)
    counts = {"visible checks": (len(re.findall(r"^✔ ", everything, re.M)), 6)}
    counts["figures"] = (len(images(notebook)), 3)
    counts["predictions"] = (len(re.findall(r"^\? ", everything, re.M)), 3)
    counts["widgets"] = (
        sum(
            "application/vnd.jupyter.widget-view+json" in o.get("data", {})
            for c in notebook.cells
            for o in c.get("outputs", [])
        ),
        1,
    )
    found += [
        f"{count} {what}; at least {least} expected"
        for what, (count, least) in counts.items()
        if count < least
    ]
    return found


def images(notebook) -> list[tuple[str, str, bytes]]:
    """(cell id, alternative text, PNG) of every figure shown."""
    shown = [
        (cell.id, output.get("data", {}).get("text/html", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    return [
        (cell_id, alt, base64.b64decode(data)) for cell_id, html in shown for alt, data in IMAGE.findall(html)
    ]


def run_notebook(stem: str, folder: Path, env: dict[str, str], timeout: int = 600):
    """Execute `notebooks/<stem>.ipynb` inside the empty `folder`; returns the executed notebook, errors as outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{stem}.ipynb"
    shutil.copy(NOTEBOOKS / source.name, source)
    assert [p.name for p in folder.iterdir()] == [source.name], f"{folder} is not empty"
    notebook = nbformat.read(source, as_version=4)
    notebook.cells += [
        nbformat.v4.new_code_cell(code, id=name)
        for name, code in (("drive-widgets", DRIVE_CELL), ("where", WHERE_CELL))
    ]
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=env)
    where = text_of(notebook.cells.pop().outputs[0])
    assert str((folder / CLONE).resolve()) in where, f"the notebook did not use its own clone: {where}"
    return notebook


def run_script(
    stem: str, folder: Path, env: dict[str, str], timeout: int = 600
) -> subprocess.CompletedProcess:
    """`python notebooks/<stem>.py` in another folder, as somebody at a terminal would."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:smollm2", str(NOTEBOOKS / f"{stem}.py")],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="01, 02_count, ...; default all")
    parser.add_argument("--figures", type=Path, help="write every figure as a PNG there")
    parser.add_argument("--keep", type=Path, help="write the executed notebooks there")
    parser.add_argument("--script", action="store_true", help="run the .py with plain python instead")
    parser.add_argument("--colab", action="store_true", help="with the fake google.colab")
    parser.add_argument("--drive", default="ok", help="drill of the fake Drive")
    parser.add_argument("--online", action="store_true", help="leave the network open")
    options = parser.parse_args()
    stems = [p.stem for p in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
    stems = [s for s in stems if not options.names or any(s.startswith(Path(n).stem) for n in options.names)]
    failed = False
    for stem in stems:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            (place / "home" / "content").mkdir(parents=True)
            repo = snapshot(place / "source")
            env = environment(repo, place / "home", options.online, options.colab, options.drive)
            start = time.perf_counter()
            if options.script:
                result = run_script(stem, place / "empty", env)
                problems = [result.stderr[-2000:]] if result.returncode or result.stderr.strip() else []
                print(result.stdout)
            else:
                notebook = run_notebook(stem, place / "empty", env)
                problems = faults(notebook)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    nbformat.write(notebook, options.keep / f"{stem}.ipynb")
                for number, (cell_id, _, png) in enumerate(images(notebook) if options.figures else []):
                    options.figures.mkdir(parents=True, exist_ok=True)
                    (options.figures / f"{stem[:2]}-{number}-{cell_id}.png").write_bytes(png)
            print(f"{stem}: {'FAILED' if problems else 'ok'} in {time.perf_counter() - start:.0f} s")
            print("\n".join(problems), end="\n" if problems else "")
            failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
