"""Run notebooks as the person behind the badge has them: an empty folder, the .ipynb alone, a fresh kernel, no network.

    python tests/run_notebooks.py [01 05 ...] [--figures DIR]
    python tests/run_notebooks.py [01 05 ...] --pages DIR     # nothing shrunk, with the network; as web pages

The set-up cell's clone is redirected to a snapshot of this working tree by SMOLLM2_REPO. Output rules (no error, no
warning, no long output, checks and pictures present) are asserted on the executed copy.
"""

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FAKE_COLAB = ROOT / "tests" / "fakecolab"
CLONE = "smollm2-from-scratch"
MAX_OUTPUT_LINES = 25
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
IMAGE = re.compile(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"')
PAGE = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"form"}})
# Moves every control of every live panel to its ends, one at a time and all together; an exception fails the cell.
DRIVE_CELL = """
from smollm2 import widgets
def ends(control):
    if hasattr(control, "options"):
        return control.options
    return [control.min, control.max] if hasattr(control, "min") else [True, False]
for panel in widgets.live:
    *controls, picture = panel.children
    controls = [c for c in controls if not isinstance(c.value, str) or hasattr(c, "options")]
    for control, value in [(c, v) for c in controls for v in ends(c)] + [(c, ends(c)[-1]) for c in controls]:
        control.value = value
        assert picture.value.startswith("<img alt="), picture.value[:100]
print(len(widgets.live), "panels moved; package from", widgets.__file__)
"""


def git(folder: Path, *words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True).stdout


def snapshot(target: Path) -> Path:
    """A git repository at `target` holding the working tree as it is now (tracked and new files, nothing ignored)."""
    for name in git(ROOT, "ls-files", "-coz", "--exclude-standard").decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    git(target, "init", "-q", "-b", "main")
    git(target, "add", "-A")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    git(target, *identity, "commit", "-q", "-m", "snapshot")
    return target


def environment(repo: Path, home: Path, drive: str | None = None) -> dict[str, str]:
    """Variables of the kernel: no network, a home of its own, nothing of this checkout importable but the fake Colab."""
    dropped = ("PYTHONPATH", "COLAB_", "FAKECOLAB_", "SMOLLM2_TEST_DATA")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    (home / "content").mkdir(parents=True, exist_ok=True)
    env |= {"SMOLLM2_REPO": str(repo), "SMOLLM2_SMOKE": "1", "HOME": str(home), "HF_HOME": str(home / "hf")}
    env |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONDONTWRITEBYTECODE": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    env |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "NO_PROXY": "127.0.0.1,localhost"}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        env[name] = "http://127.0.0.1:9"  # the discard port: whatever tries the network fails at once
    if drive:
        env |= {"COLAB_RELEASE_TAG": "release-colab-fake", "PYTHONPATH": str(FAKE_COLAB)}
        env |= {"FAKECOLAB_DRIVE": drive, "FAKECOLAB_MOUNT_POINT": str(home / "content" / "drive")}
    return env


def text_of(output) -> str:
    """Plain text of an output as a reader sees it."""
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def outputs(notebook) -> list[tuple[str, dict]]:
    return [(cell.id, output) for cell in notebook.cells for output in cell.get("outputs", [])]


def images(notebook) -> list[tuple[str, str, bytes]]:
    """(cell id, alternative text, PNG) of every figure shown, those in a live panel's place included."""
    shown = [(cell_id, output.get("data", {}).get("text/html", "")) for cell_id, output in outputs(notebook)]
    return [(name, alt, base64.b64decode(png)) for name, html in shown for alt, png in IMAGE.findall(html)]


def faults(notebook) -> list[str]:
    """What breaks the rules for outputs, in words."""
    found, lines = [], {}
    for cell_id, output in outputs(notebook):
        text, is_stream = text_of(output), output.output_type == "stream"
        if is_stream:
            lines[cell_id] = lines.get(cell_id, 0) + len(text.rstrip("\n").split("\n"))
        if output.output_type == "error" or (is_stream and output.name == "stderr"):
            found.append(f"{cell_id}: {output.output_type}: {text[-600:]}")
        if "\r" in text or "Warning" in text:
            found.append(f"{cell_id}: progress bar or warning: {text[:200]!r}")
        html = output.get("data", {}).get("text/html", "")
        if html.count("<img") != len([alt for alt, _ in IMAGE.findall(html) if len(alt) >= 20]):
            found.append(f"{cell_id}: an image without alternative text")
    found += [f"{name}: {n} lines of output" for name, n in lines.items() if n > MAX_OUTPUT_LINES]
    everything = "\n".join(text_of(output) for _, output in outputs(notebook))
    widgets = [output for _, output in outputs(notebook) if WIDGET_VIEW in output.get("data", {})]
    counts = {"checks": (len(re.findall("^✔ ", everything, re.M)), 6), "figures": (len(images(notebook)), 3)}
    counts |= {"predictions": (len(re.findall(r"^\? ", everything, re.M)), 3), "widgets": (len(widgets), 1)}
    return found + [f"{n} {what}; at least {least}" for what, (n, least) in counts.items() if n < least]


def run_notebook(stem: str, folder: Path, env: dict[str, str], timeout: int = 600):
    """Execute `notebooks/<stem>.ipynb` inside the empty `folder`; returns the executed notebook, errors as outputs."""
    folder.mkdir(parents=True)
    shutil.copy(NOTEBOOKS / f"{stem}.ipynb", folder)
    notebook = nbformat.read(folder / f"{stem}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(DRIVE_CELL, id="drive-widgets"))
    place = {"metadata": {"path": str(folder)}}
    settings = {"timeout": timeout, "kernel_name": "python3", "allow_errors": True, "resources": place}
    # one block for what a cell prints: a page starts a new line at each piece that the kernel happened to send
    client = NotebookClient(notebook, coalesce_streams=True, **settings)
    client.execute(env=env)

    where = "".join(text_of(output) for output in notebook.cells.pop().outputs)
    assert str((folder / CLONE).resolve()) in where, f"a panel broke, or another clone: {where}"

    return notebook


def page(notebook) -> str:
    """An executed notebook as one HTML file, without the code that Colab folds away but for answers."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        is_folded = cell.metadata.get("cellView") == "form" and "solution" not in tags
        cell.metadata.tags = ["form"] if is_folded else []
    notebook.metadata.pop("widgets", None)  # a page has no kernel: the figure stands in the panel's place
    html, _ = HTMLExporter(config=PAGE).from_notebook_node(notebook)
    return re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', html)


def run_script(stem: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`python notebooks/<stem>.py` in another folder, as somebody at a terminal would."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-W", "error::UserWarning:smollm2", str(NOTEBOOKS / f"{stem}.py")]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="01, 02_count, ...; default all")
    parser.add_argument("--figures", type=Path, help="write every figure as a PNG there")
    parser.add_argument("--pages", type=Path, help="run in full and write web pages with outputs there")
    options = parser.parse_args()
    failed, written = False, []
    for stem in sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        if not options.names or stem.startswith(tuple(options.names)):
            with tempfile.TemporaryDirectory() as scratch:
                source = snapshot(Path(scratch, "source"))
                env = environment(source, Path(scratch, "home"))
                if options.pages:
                    env = os.environ | {"SMOLLM2_REPO": str(source)}
                notebook = run_notebook(stem, Path(scratch, "empty"), env, timeout=1800)
            problems = faults(notebook)
            print(f"{stem}: {'FAILED' if problems else 'ok'}", *problems, sep="\n")
            failed |= bool(problems)
            for number, (cell_id, _, png) in enumerate(images(notebook) if options.figures else []):
                options.figures.mkdir(parents=True, exist_ok=True)
                (options.figures / f"{stem[:2]}-{number}-{cell_id}.png").write_bytes(png)
            if options.pages:
                options.pages.mkdir(parents=True, exist_ok=True)
                (options.pages / f"{stem}.html").write_text(page(notebook), encoding="utf-8")
                title = stem[3:].replace("_", " ").capitalize()
                written.append(f'<li><a href="{stem}.html">{title}</a></li>')
    if options.pages:
        index = f'<!DOCTYPE html><meta charset="utf-8"><title>SmolLM2</title><ol>{"".join(written)}</ol>'
        (options.pages / "index.html").write_text(index, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
