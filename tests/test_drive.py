"""The Drive tier against a Drive that lies: training never stops, and a fresh machine continues exactly."""

import errno
import hashlib
import json
import os
import re
import socket
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Heard
from fake_drive import FakeDrive, MachineDied

from smollm2 import drive, drive_folder
from smollm2.checkpoint import FINAL_NAMES, commit, prune, step_name, verify
from smollm2.drive import DriveMirror, newest_on_drive
from smollm2.errors import ConfigError, DataError, NoUsableCheckpoint
from smollm2.files import dump_json
from smollm2.progress import Reporter
from smollm2.training import train
from tests.soak import outcome, small_config

RUN_ID = "0123456789abcdef"
LOG = "training_loss.txt"
FOREVER = float("inf")


# --- a run without a network: checkpoints whose bytes are a pure function of the step


def files_of(step: int, best: int = 0) -> dict[str, bytes]:
    weights = hashlib.shake_256(b"%d" % step).digest(4000)
    state = dump_json({"step": step, "best": {"step": best} if best else {}, "rng": list(range(600))})
    files = {"config.json": b"{}\n", "model.safetensors": weights, "optim.safetensors": weights[::-1] * 2}
    return files | {"state.json": state, "tokenizer.json": b'{"a": 1}'}


def save(output: Path, step: int, best: int = 0, name: str | None = None, run_id: str = RUN_ID):
    for folder in ("checkpoints", "logs"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    lines = "".join(f"2026-01-01T00:00:00Z step={n} train_loss=1.0\n" for n in range(10, step + 1, 10))
    (output / "logs" / LOG).write_text(lines)
    return commit(output / "checkpoints", name or step_name(step), files_of(step, best), run_id, step, {})


def restore(fake: FakeDrive, output: Path, said: list[str]):
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return newest_on_drive(fake.root, folder, said.append, sleep=fake.advance)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def whole_steps_on_server(fake: FakeDrive) -> list[int]:
    """Steps that a download of the whole Drive would find intact, newest first. Independent of the code under
    test."""
    found = []
    for files in fake.server_folders().values():
        raw = files.get("manifest.json", b"")
        table = json.loads(raw) if raw.endswith(b"}\n") else {"files": {"?": {}}}  # else it was cut off
        facts = table["files"].items()
        if all(hashlib.sha256(files.get(n, b"?")).hexdigest() == fact.get("sha256") for n, fact in facts):
            found.append(table["step"])
    return sorted(found, reverse=True)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Thousands of tiny checkpoints: that fsync is called is other tests' business."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a Drive of the given habits in place."""

    def make(seed: int = 0, **habits) -> FakeDrive:
        fake = FakeDrive(tmp_path / "drive", seed, **habits)
        fake.install(monkeypatch, tmp_path)
        return fake

    return make


@pytest.fixture
def fake(install):
    return install()


class Copies:
    """A mirror whose turns the test takes itself, and what it said and copied."""

    def __init__(self, fake: FakeDrive):
        self.said = []
        self.mirror = DriveMirror(fake.root, self.said.append, pause=fake.advance)
        self.turn = self.mirror.turn

    @property
    def copied(self) -> list[int]:
        return [step for step, _ in self.mirror.events]

    def copy(self, manifest, turns: int = 1) -> None:
        self.mirror.submit(manifest)
        for _ in range(turns):
            self.turn()


# --- a hundred seeds of bad luck


def seeds(count: int, fast: int) -> list:
    return [pytest.param(seed, marks=pytest.mark.slow if seed >= fast else ()) for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(100, fast=8))
def test_a_lying_drive_never_stops_training_and_loses_nothing_confirmed(seed, tmp_path, install):
    def bytes_on_drive(step: int) -> int:  # of a checkpoint with its manifest and logs, and of the heartbeat
        return sum(map(len, files_of(step, step).values())) + 1200 + 50 * (step // 10)

    fake = install(
        seed, in_order=seed % 2 == 0, tells_uploads=seed % 4 != 2, fault_rate=0.01, stale_rate=0.1,
        duplicate_rate=0.15, upload_seconds=(0.0, 40.0), quota=None if seed % 3 else 5 * bytes_on_drive(1200),
    )  # fmt: skip
    said, confirmed, reached = [], 0, 0
    for machine in range(4):
        output = tmp_path / f"machine-{machine}"
        newest_there = max(whole_steps_on_server(fake), default=0)
        assert newest_there >= confirmed, "a confirmed checkpoint was deleted before a newer one arrived"
        try:
            newest = restore(fake, output, said)
        except NoUsableCheckpoint:
            assert not newest_there, f"step {newest_there} lay whole on Drive and was not found: {said[-3:]}"
            break  # only torn copies: said so, and did not start from zero
        start = newest.step if newest else 0
        assert start == newest_there, said[-5:]
        if newest:
            assert bytes_of(newest.folder) == files_of(start, start - start % 30)
            assert (output / "logs" / LOG).read_text().count("\n") >= start // 10
        copies = Copies(fake)
        fake.fault_rate, fake.die_at = 0.01, fake.ops + fake.random.randrange(20, 900)
        try:
            if newest:
                copies.mirror.submit(newest)
            for step in range(start + 10, start + 300, 10):
                manifest = save(output, step, step - step % 30)
                prune(output / "checkpoints", 2, step - step % 30, manifest)
                copies.mirror.submit(manifest)  # what training sees of Drive: this call, and it came back
                reached = max(reached, step)
                for _ in range(fake.random.choice((0, 1, 1, 3))):
                    fake.advance(copies.turn() or 1.0)
                confirmed = max(confirmed, *whole_steps_on_server(fake), 0)
        except MachineDied:
            pass
        confirmed = max(confirmed, *whole_steps_on_server(fake), 0)  # what arrived counts, whatever follows
        fake.fault_rate = 0.0
        fake.next_machine()
        fake.advance(400)  # bursts end
        fake.stale_until = {path: fake.now + until % 9 for path, until in fake.stale_until.items()}
    # 3 kept + 1 in flight; heartbeat and empty folders besides. Out of order, deletions lag behind uploads.
    one = bytes_on_drive(reached)
    assert reached and fake.most_tree_bytes <= 4 * one, fake.most_tree_bytes / one
    assert fake.most_server_bytes <= (4 if fake.in_order else 6) * one, fake.most_server_bytes / one


# --- one kind of trouble at a time


def test_a_copy_is_whole_and_durable_with_its_manifest_last_and_found_again(fake, tmp_path, monkeypatch):
    order, wrote = [], fake._wrote
    fake._wrote = lambda name, content: (order.append(Path(name).name), wrote(name, content))
    monkeypatch.setattr(drive_folder.os, "fsync", lambda descriptor: order.append("fsync"))
    copies, manifest = Copies(fake), save(tmp_path / "one", 30)
    copies.copy(manifest)
    assert copies.copied == [30] and copies.said == []
    assert order[0::2] == ["fsync"] * 8 and order[1] == "heartbeat.txt" and order[-1] == "manifest.json"
    ((name, files),) = fake.server_folders().items()
    assert name.startswith(f"step-00000030-{RUN_ID}-")
    assert {file: files[file] for file in files_of(30)} == files_of(30)
    assert json.loads(files["manifest.json"])["files"].keys() == files_of(30).keys() | {LOG}
    newest = restore(fake, tmp_path / "two", [])
    assert newest.folder == tmp_path / "two" / "checkpoints" / step_name(30)
    assert verify(newest.folder).to_bytes() == manifest.to_bytes() and bytes_of(newest.folder) == files_of(30)
    assert (tmp_path / "two" / "logs" / LOG).read_bytes() == (tmp_path / "one" / "logs" / LOG).read_bytes()
    copies.copy(newest)
    assert copies.copied == [30, 30] and set(fake.server_folders()) == {name}, "a resume copies nothing twice"
    copies.copy(save(tmp_path / "one", 50, name=FINAL_NAMES[0]))
    assert any(name.startswith("final_model-step-00000050-") for name in fake.server_folders())
    # what ended a phase ends it on the next machine, too
    assert restore(fake, tmp_path / "three", []).folder.name == FINAL_NAMES[0]


def trouble(fake: FakeDrive, kind: int | str) -> None:
    """An error number, or the row of the mount table that should be Drive's, or a word."""
    wrote = fake._wrote
    if kind == "full":
        fake.quota = 1000
    elif kind == "wrong bytes":
        fake._wrote = lambda name, data: wrote(name, data[:-1] + b"?" if "model.safe" in name else data)
    elif isinstance(kind, str):
        fake.table.write_text(f"proc /proc proc rw 0 0\n{kind.format(fake.mount)}\n")
    else:
        fake.bad_until, fake.bad_errno = FOREVER, kind


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("full", "full; empty its trash"),
        ("wrong bytes", "model.safetensors: 4,000 bytes that differ"),
        ("", "not mounted.*drive.mount"),
        ("overlay {} overlay rw 0 0", "not mounted"),
        ("drive {}2 fuse.drive rw 0 0", "not mounted"),
        (errno.ENOTCONN, "errno 107"),
        (errno.EDQUOT, "full; empty its trash"),
        (errno.ETIMEDOUT, "did not answer in time"),
    ],
)
def test_a_trouble_is_told_once_harms_nothing_and_copying_works_again_after_it(kind, words, fake, tmp_path):
    copies, before, wrote = Copies(fake), dict(fake.tree), fake._wrote
    trouble(fake, kind)
    copies.copy(save(tmp_path, 10), turns=3)
    assert copies.copied == [] and len(copies.said) == 1
    assert re.search(f"^Drive: .*{words}.*Training goes on", copies.said[0])
    assert fake.tree == before or kind in ("full", "wrong bytes"), "nothing is made in the place of a mount"
    fake.bad_until, fake.quota, fake._wrote = 0.0, None, wrote
    fake.set_mounted(True)
    copies.turn()
    assert copies.copied == [10] and copies.said[1:] == ["Drive: copying works again"]
    assert whole_steps_on_server(fake) == [10] and len(fake.server_folders()) == 1, "a bad copy is gone"


def test_a_damaged_local_checkpoint_is_not_spread(fake, tmp_path):
    copies, manifest = Copies(fake), save(tmp_path, 10)
    (manifest.folder / "model.safetensors").write_bytes(b"x" * 4000)
    copies.copy(manifest)
    assert copies.copied == [] and "model.safetensors" in copies.said[-1] and not whole_steps_on_server(fake)
    copies.copy(save(tmp_path, 20))
    assert copies.copied == [20] and whole_steps_on_server(fake) == [20] and len(fake.server_folders()) == 1


def test_tries_are_5_seconds_to_5_minutes_apart_and_only_news_are_told(fake, tmp_path):
    copies = Copies(fake)
    trouble(fake, errno.ENOTCONN)
    copies.mirror.submit(save(tmp_path, 10))
    assert [copies.turn() for _ in range(9)] == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    trouble(fake, errno.EIO)
    assert copies.turn() == copies.turn() == 300
    assert len(copies.said) == 2 and "Input/output" in copies.said[1]
    fake.bad_until = 0.0
    assert copies.turn() == 0.0
    trouble(fake, errno.EIO)
    copies.mirror.submit(save(tmp_path, 20))
    assert copies.turn() == 5 and len(copies.said) == 4, "a new trouble is told and waits 5 seconds"


def test_three_stay_the_best_among_them_and_what_others_keep_there_is_never_touched(fake, tmp_path):
    fake.tree[str(fake.root)] = None
    for name in ("photos", "step-00000001.ckpt", "my best.ckpt", f"step-00000001-{'f' * 16}-01234567.ckpt"):
        fake.mkdir(str(fake.root / name))
        fake._wrote(str(fake.root / name / "a.txt"), b"mine")
    copies = Copies(fake)
    for step in range(10, 90, 10):
        copies.copy(save(tmp_path, step, best=20))
    assert whole_steps_on_server(fake) == [80, 70, 60, 20]  # three before the last copy began, and that
    assert list(fake.server_folders().values()).count({"a.txt": b"mine"}) == 4
    assert fake.trash_bytes == 0, "files are emptied before they are deleted"
    stat = fake.stat
    fake.stat = lambda name: fake._fail(errno.EIO) if "00000070" in name else stat(name)
    copies.copy(save(tmp_path, 90, best=20))
    assert whole_steps_on_server(fake) == [80, 70, 60, 20], "on half the knowledge nothing is removed"
    fake.stat = stat
    copies.turn()
    assert whole_steps_on_server(fake) == [90, 80, 70, 20]


def test_what_is_uploaded_or_may_be_seen_too_early_stays_until_it_is_overtaken(install, tmp_path):
    fake = install(in_order=False)
    put(fake, f"step-00000040-{RUN_ID}-01234567.ckpt", 40, "manifest.json")  # by a machine that is gone
    fake.server.clear()
    copies, enqueue = Copies(fake), fake._enqueue
    copies.copy(save(tmp_path, 10))

    def hang(what, path, content=None):  # from now on uploads hang, while deletions go through
        fake.upload_seconds = (1e6, 1e6) if content or "step-00000010" not in path else (0, 0)
        enqueue(what, path, content)

    fake._enqueue = hang
    for step, kept in ((20, True), (30, True), (50, True), (60, False), (70, False)):
        copies.copy(save(tmp_path, step))
        assert any("step-00000040" in path for path in fake.tree) == kept
    fake.queue.clear()  # the machine dies before anything more arrives
    fake.next_machine(renames=False)
    assert restore(fake, tmp_path / "other", []).step == 10


def test_copies_need_no_system_call_that_macos_or_windows_lack(tmp_path, monkeypatch):
    """On a plain folder, far enough that old copies are erased; a person's folder inside one stays."""
    monkeypatch.delattr(os, "getxattr")
    monkeypatch.delattr(os, "statvfs")
    monkeypatch.setattr(drive_folder.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    monkeypatch.setattr(drive_folder, "MOUNTS_TABLE", tmp_path / "no-such-table")
    copies = Copies(SimpleNamespace(root=tmp_path / "far", advance=lambda seconds: None))
    for step in range(10, 70, 10):
        copies.copy(save(tmp_path, step))
        (copies.mirror.copied.folder / "mine").mkdir()
    assert copies.copied == list(range(10, 70, 10)) and copies.said == []
    assert len(list((tmp_path / "far").glob("*/manifest.json"))) == 4
    assert len(list((tmp_path / "far").glob("*/mine"))) == 6


# --- where a run continues


def put(fake: FakeDrive, name: str, step: int, file: str = "", content: bytes | None = None) -> None:
    """A checkpoint on Drive under any name, with one file other than it should be (None: missing)."""
    copies = Copies(fake)
    copies.copy(save(fake.mount.parent / "made", step))
    fake._rename(str(copies.mirror.copied.folder), str(fake.root / name))
    if file:
        del fake.tree[str(fake.root / name / file)]
    if content is not None:
        fake.tree[str(fake.root / name / file)] = content


OTHER = files_of(30)["model.safetensors"]


@pytest.mark.parametrize("content", [b"", None, b"{}", OTHER, OTHER[1:], b"x" * 2**21])
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json", LOG])
def test_damage_on_drive_falls_back_loudly_to_the_one_before(file, content, fake, tmp_path):
    put(fake, "step-00000030-a.ckpt", 30)
    put(fake, "step-00000040-a.ckpt", 40, file, content)
    said = []
    newest = restore(fake, tmp_path / "new", said)
    assert newest.step == 30 and bytes_of(newest.folder) == files_of(30)
    assert len(said) == 2 and "step-00000040-a.ckpt is not usable" in said[0] and "step 30" in said[1]
    assert [path.name for path in newest.folder.parent.iterdir()] == [step_name(30)], "nothing of it stays"


def test_none_usable_is_an_error_never_a_start_from_zero(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40, "model.safetensors", b"")
    (save(tmp_path, 30).folder / "state.json").write_bytes(b"{}")
    said = []
    with pytest.raises(NoUsableCheckpoint, match=r"2 checkpoint.*checkpoints and .*run, none usable"):
        restore(fake, tmp_path, said)
    assert len(said) == 2


def test_this_machine_wins_on_an_equal_step_and_the_newer_tier_otherwise(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40)
    said = []
    for mine, step in ((40, 40), (50, 50), (30, 40)):
        save(tmp_path / f"has-{mine}", mine)
        assert restore(fake, tmp_path / f"has-{mine}", said).step == step
    assert len(said) == 1 and "copied from Drive: step 40" in said[0]
    damaged = save(tmp_path / "damaged", 40)
    (damaged.folder / "model.safetensors").write_bytes(b"")
    assert bytes_of(restore(fake, tmp_path / "damaged", said).folder) == files_of(40)
    assert "step-00000040.ckpt is not usable" in said[1]


def test_an_unreachable_drive_stops_a_machine_that_has_nothing_and_no_other(fake, tmp_path):
    assert restore(fake, tmp_path / "first", []) is None, "an empty Drive is a first start"
    put(fake, "step-00000040-a.ckpt", 40)
    trouble(fake, errno.ENOTCONN)
    with pytest.raises(NoUsableCheckpoint, match=r"errno 107.*starting from zero could hide"):
        restore(fake, tmp_path / "new", [])
    save(tmp_path / "has", 20)
    said = []
    assert restore(fake, tmp_path / "has", said).step == 20 and "continuing with what is on this" in said[0]
    trouble(fake, "")
    with pytest.raises(ConfigError, match="not mounted"):
        restore(fake, tmp_path / "new", [])
    fake.set_mounted(True)
    fake.bad_until = fake.now + 5
    assert restore(fake, tmp_path / "new", []).step == 40, "a Drive that needs a moment is given one"


def test_another_runs_drive_folder_is_refused(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40)
    save(tmp_path / "mine", 10, run_id="another-run")
    with pytest.raises(ConfigError, match="another run"):
        restore(fake, tmp_path / "mine", [])


# --- two runtimes

HERE, NOW = socket.gethostname(), int(time.time())


@pytest.mark.parametrize(
    ("words", "is_told"),
    [(f"elsewhere {NOW - 20}", True), (f"elsewhere {NOW - 301}", False), (f"{HERE} {NOW}", False)]
    + [(torn, False) for torn in ("", "\xff", "a b c", "{}", f"elsewhere {NOW} more")],
    ids=range(8),  # the times in them differ
)
def test_another_runtime_that_writes_there_is_told_and_nobody_is_held_up(words, is_told, fake, tmp_path):
    fake.tree |= {str(fake.root): None, str(fake.root / drive_folder.HEARTBEAT): words.encode("latin-1")}
    said = []
    assert restore(fake, tmp_path, said) is None
    told = [
        line
        for line in said
        if re.search(r"warning: .*another runtime \(elsewhere\) wrote there \d+ s", line)
    ]
    assert len(told) == len(said) == is_told


def test_every_copy_says_who_wrote_it_and_the_end_waits_for_the_newest(fake, tmp_path):
    mirror = DriveMirror(fake.root, print)
    for step in (10, 20, 30):
        mirror.submit(save(tmp_path, step))
    mirror.close()
    mirror.close()
    assert mirror.copied.step == 30 and not mirror._thread.is_alive()
    host, seconds = fake.tree[str(fake.root / drive_folder.HEARTBEAT)].decode().split()
    assert host == HERE and abs(time.time() - int(seconds)) < 60


# --- the end of a run


def test_a_drive_in_trouble_does_not_hold_up_training_or_the_end_which_tells_what_is_missing(fake, tmp_path):
    said, began = [], time.monotonic()
    mirror = DriveMirror(fake.root, said.append)
    trouble(fake, errno.ENOTCONN)
    for step in (10, 20, 30):
        mirror.submit(save(tmp_path, step))
    mirror.close(0.3)
    assert time.monotonic() - began < 3
    words = r"NOT on Drive: step 30 is only on this machine \(.*errno 107.*run the same command"
    assert re.search(words, said[-1])


def test_a_drive_that_hangs_does_not_hang_the_end(fake, tmp_path, hurry):
    said, release, wrote, began = [], threading.Event(), fake._wrote, time.monotonic()
    fake._wrote = lambda name, data: ("model" in Path(name).name and release.wait(20), wrote(name, data))
    mirror = DriveMirror(fake.root, said.append)
    mirror.submit(save(tmp_path, 10))
    mirror.close(0.5)
    assert time.monotonic() - began < 3 and "copying takes too long" in said[-1]
    release.set()
    mirror._thread.join(10)
    assert not mirror._thread.is_alive() and not whole_steps_on_server(fake), "nothing goes on unseen"


def test_an_upload_that_drive_does_not_confirm_is_told(install, tmp_path):
    fake, said = install(upload_seconds=(1e6, 1e6)), []
    mirror = DriveMirror(fake.root, said.append)
    mirror.submit(save(tmp_path, 10))
    mirror.close()
    assert said == ["Drive has NOT confirmed the upload of step 10 yet: keep this runtime for some minutes"]


# --- with real training


def tiny_run(text: Path, output: Path, drive_dir: Path | None = None, resume: str = "auto", **train):
    often = {"max_steps": 30, "val_every": 10, "log_every": 1, "sample_every": 10, "save_every": 3}
    place = {"drive_dir": drive_dir and str(drive_dir), "resume": resume}
    return small_config(text, output, place=place, **often | train)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("reference") / "output"
    train(tiny_run(text, output), Reporter())
    return outcome(output)


@pytest.fixture
def hurry(monkeypatch):
    times = {"FIRST_RETRY_SECONDS": 0.01, "LAST_RETRY_SECONDS": 0.05, "PAUSES": (0.01, 0.02)}
    for name, value in times.items():
        monkeypatch.setattr(drive, name, value)
    return monkeypatch


@pytest.mark.parametrize("seed", seeds(25, fast=2))
def test_from_drive_a_fresh_machine_gets_the_same_bits(seed, text, uninterrupted, tmp_path, install, hurry):
    habits = {"stale_rate": 0.05, "duplicate_rate": 0.1, "upload_seconds": (0, 0.2), "scale": 0.002}
    fake = install(seed, in_order=seed % 2 == 0, fault_rate=0.01, **habits)
    death, server, op = 40 + 25 * seed % 500, {}, fake._op
    # what Google has when the machine dies at this operation
    fake._op = lambda: (server.update(fake.server) if fake.ops == death else None, op())
    train(tiny_run(text, tmp_path / "first", fake.root), Reporter())
    assert outcome(tmp_path / "first") == uninterrupted, "Drive's troubles changed the training"

    fresh, notes = install(seed, **habits), Heard()
    fresh.server = server
    fresh.next_machine()
    whole, config = whole_steps_on_server(fresh), tiny_run(text, tmp_path / "second", fresh.root)
    if not whole and any("step-" in path for path in fresh.tree):
        with pytest.raises(NoUsableCheckpoint):
            train(config, notes)
        return
    result = train(config, notes)
    begins = f"continuing from step-{whole[0]:08d}" if whole else "starting at step 0 of 30"
    assert any(line.startswith(begins) for line in notes.messages), notes.messages
    assert outcome(tmp_path / "second") == uninterrupted
    assert result.drive_step == 30 and "copied to Drive: step 30" in result.table()


def test_resume_never_does_not_continue_or_hide_what_is_on_drive(text, tmp_path):
    again = partial(tiny_run, text, tmp_path / "output", max_steps=6)
    train(again(tmp_path / "drive"), Reporter())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"--resume never, but --drive_dir .* holds 2 checkpoint"):
        train(again(tmp_path / "drive", resume="never"), Reporter())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    result = train(again(tmp_path / "other", resume="never"), Reporter())
    assert result.drive_step == 6 and (tmp_path / "output" / "previous-1").is_dir()


def test_a_run_that_was_found_on_drive_is_said_to_lie_there_and_the_advice_works(text, tmp_path):
    short = partial(tiny_run, max_steps=6)
    train(short(text, tmp_path / "output", tmp_path / "drive"), Reporter())
    advice = "or choose another --output_dir and another --drive_dir$"
    for name, place in (
        ("fresh", "--output_dir .*fresh and .*drive"),
        ("output", "--output_dir .*output and .*drive"),
    ):
        words = rf"the run in {place} was made with other settings \(train\.seed: .* -> 5\): put .*, {advice}"
        with pytest.raises(ConfigError, match=words):
            train(short(text, tmp_path / name, tmp_path / "drive", seed=5), Reporter())
    assert not (tmp_path / "fresh").exists()
    changed = tmp_path / "other.txt"
    changed.write_text(text.read_text() + "one more line\n")
    with pytest.raises(DataError, match=f"is not the text this run was trained on.*{advice}"):
        train(short(changed, tmp_path / "fresh", tmp_path / "drive"), Reporter())
    config = short(text, tmp_path / "fresh", tmp_path / "second", seed=5)
    assert train(config, Reporter()).drive_step == 6
