"""The Drive tier against a Drive that lies: training never stops, and a fresh machine continues exactly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_drive import FakeDrive, MachineDied

from smollm2 import drive, drive_folder, drive_restore, lease
from smollm2.checkpoint import FINAL_NAMES, candidates, commit, step_name, verify
from smollm2.drive import DriveMirror, newest_on_drive
from smollm2.errors import BusyError, ConfigError, DataError, NoUsableCheckpoint
from smollm2.files import dump_json
from smollm2.progress import Reporter, TerminalReporter
from smollm2.retention import prune
from smollm2.settings import load_config
from smollm2.state import TrainState

RUN_ID = "0123456789abcdef"
ROOT = Path(__file__).parents[1]


# --- a run without a network: checkpoints whose bytes are a pure function of the step


def files_of(step: int, best: int = 0) -> dict[str, bytes]:
    weights = hashlib.shake_256(b"%d" % step).digest(4000)
    state = TrainState(step=step, best={"step": best, "bits_per_byte": 1.0} if best else {}).to_json() | {
        "python_rng": PYTHON_RNG
    }
    files = {"config.json": b"{}\n", "model.safetensors": weights, "optim.safetensors": weights[::-1] * 2}
    return files | {"state.json": dump_json(state), "tokenizer.json": b'{"a": 1}'}


PYTHON_RNG = [3, [*range(1, 625), 624], None]


def save(output: Path, step: int, best: int = 0, name: str | None = None):
    folder = output / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (output / "logs").mkdir(exist_ok=True)
    lines = "".join(f"2026-01-01T00:00:00Z step={n} train_loss=1.0\n" for n in range(10, step + 1, 10))
    (output / "logs" / "training_loss.txt").write_text(lines)
    return commit(folder, name or step_name(step), files_of(step, best), RUN_ID, step, {})


def restore(fake: FakeDrive, output: Path, said: list[str]):
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    return newest_on_drive(
        fake.root,
        output / "checkpoints",
        candidates(output / "checkpoints"),
        said.append,
        sleep=fake.advance,
        take_over=True,
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def whole_steps_on_server(fake: FakeDrive) -> dict[int, str]:
    """{step: folder} of the checkpoints that a download of the whole Drive would find intact. Independent of the code under test."""
    found = {}
    for name, files in fake.server_folders().items():
        raw = files.get("manifest.json", b"")
        table = json.loads(raw) if raw.endswith(b"}\n") else None  # else it was cut off
        if table and all(
            name in files and hashlib.sha256(files[name]).hexdigest() == facts["sha256"]
            for name, facts in table["files"].items()
        ):
            found[table["step"]] = name
    return found


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Thousands of tiny checkpoints: that fsync is called is other tests' business."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    drive_ = FakeDrive(tmp_path / "drive")
    drive_.install(monkeypatch, tmp_path)
    return drive_


def mirror_of(fake: FakeDrive, said: list[str], copied: list[int] | None = None) -> DriveMirror:
    return DriveMirror(
        fake.root, said.append, (copied if copied is not None else []).append, pause=fake.advance, start=False
    )


def copy(mirror: DriveMirror, manifest, turns: int = 1) -> None:
    mirror.submit(manifest)
    for _ in range(turns):
        mirror.turn()


# --- a hundred seeds of bad luck


def bytes_on_drive(step: int) -> int:
    """Of a checkpoint with its manifest and logs; and a quarter of the lease."""
    return sum(map(len, files_of(step, step).values())) + 1000 + 50 * (step // 10) + 200


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow) if seed >= 8 else seed for seed in range(100)]
)
def test_a_lying_drive_never_stops_training_and_loses_nothing_confirmed(seed, tmp_path, monkeypatch):
    fake = FakeDrive(
        tmp_path / "drive",
        seed,
        in_order=seed % 2 == 0,
        tells_uploads=seed % 2 == 1 or seed % 4 == 0,
        fault_rate=0.01,
        stale_rate=0.1,
        duplicate_rate=0.15,
        upload_seconds=(0.0, 40.0),
        quota=None if seed % 3 else 5 * bytes_on_drive(1200),
    )
    fake.install(monkeypatch, tmp_path)
    chance, said = fake.random, []
    confirmed, reached, machines = 0, 0, 0
    for machine in range(4):
        output = tmp_path / f"machine-{machine}"
        whole = whole_steps_on_server(fake)
        assert not confirmed or max(whole, default=0) >= confirmed, (
            "a confirmed checkpoint was deleted before a newer one arrived"
        )
        try:
            newest = restore(fake, output, said)
        except NoUsableCheckpoint:
            assert not whole, f"step {max(whole)} lay whole on Drive and was not found: {said[-3:]}"
            break  # only torn copies: said so, and did not start from zero
        start = newest.step if newest else 0
        assert start == max(whole, default=0), said[-5:]
        if newest:
            assert bytes_of(newest.folder) == files_of(start, start - start % 30)
            logs = output / "logs" / "training_loss.txt"
            assert logs.exists() or "logs" in said[-1]  # their copy may be lost; then that is said
            assert not logs.exists() or logs.read_text().count("\n") >= start // 10
        mirror = mirror_of(fake, said)
        fake.fault_rate = 0.01
        fake.die_at = fake.ops + chance.randrange(20, 900)
        machines += 1
        try:
            if newest:
                mirror.submit(newest)
            for step in range(start + 10, start + 300, 10):
                manifest = save(output, step, step - step % 30)
                prune(output / "checkpoints", 2, step - step % 30, manifest)
                mirror.submit(manifest)  # what training sees of Drive: this call, and it came back
                reached = max(reached, step)
                for _ in range(chance.choice((0, 1, 1, 3))):
                    fake.advance(mirror.turn() or 1.0)
                whole = whole_steps_on_server(fake)
                confirmed = max([confirmed, *whole]) if whole else confirmed
        except MachineDied:
            pass
        # what reached the server before the end counts, whatever follows
        confirmed = max([confirmed, *whole_steps_on_server(fake)])
        fake.fault_rate = 0.0
        fake.next_machine()
        fake.advance(400)  # the old lease dies, bursts end
        fake.stale_until = {path: fake.now + until % 9 for path, until in fake.stale_until.items()}
    assert machines and reached
    # 3 kept + 1 in flight; leases and empty folders besides. Out of order, deletions may lag behind an upload.
    one = bytes_on_drive(reached)
    assert fake.most_tree_bytes <= 4 * one, fake.most_tree_bytes / one
    assert fake.most_server_bytes <= (4 if fake.in_order else 6) * one, fake.most_server_bytes / one


def test_the_hundred_seeds_met_every_kind_of_trouble(tmp_path, monkeypatch):
    """The fake is no use if its faults never happen."""
    fake = FakeDrive(
        tmp_path / "drive", 3, fault_rate=0.01, stale_rate=0.3, duplicate_rate=0.3, upload_seconds=(0, 40)
    )
    fake.install(monkeypatch, tmp_path)
    said, late = [], 0
    mirror = mirror_of(fake, said)
    for step in range(10, 400, 10):
        copy(mirror, save(tmp_path / "out", step), 3)
        late += bool(fake.queue)
        fake.advance(50)
    text = "\n".join(said)
    assert {errno.EIO, errno.ENOTCONN} <= fake.errors_raised
    assert (
        "no longer connected" in text
        and "Input/output error" in text
        and "vanished" in text
        and "came back" in text
    )
    assert "copying works again" in text
    assert any(" (1)" in path for path in fake.server) or "vanished" in text
    assert late > 10, "uploads lag behind, so that a death loses some"


# --- one kind of trouble at a time


def test_a_copy_is_whole_verified_and_found_again(fake, tmp_path):
    copied = []
    mirror = mirror_of(fake, [], copied)
    manifest = save(tmp_path / "one", 30)
    copy(mirror, manifest)
    assert copied == [30]
    ((name, files),) = fake.server_folders().items()
    assert name.startswith(f"step-00000030-{RUN_ID}-")
    assert {file: files[file] for file in manifest.files} == files_of(30)
    assert files["manifest.json"] == (manifest.folder / "manifest.json").read_bytes()
    newest = restore(fake, tmp_path / "two", [])
    assert newest.folder == tmp_path / "two" / "checkpoints" / step_name(30)
    assert verify(newest.folder).files == manifest.files and bytes_of(newest.folder) == files_of(30)
    assert (tmp_path / "two" / "logs" / "training_loss.txt").read_bytes() == (
        tmp_path / "one" / "logs" / "training_loss.txt"
    ).read_bytes()


def test_manifest_is_written_last(fake, tmp_path):
    order = []
    wrote = fake._wrote
    fake._wrote = lambda name, content: (order.append(Path(name).name), wrote(name, content))
    copy(mirror_of(fake, []), save(tmp_path, 10))
    assert order[-1] == "manifest.json" and order.count("manifest.json") == 1
    assert set(order) == {f"{n}" for n in files_of(10)} | {
        "training_loss.txt",
        "logs.json",
        "manifest.json",
    } | {n for n in order if n.startswith("lease-")}


def test_a_copy_that_does_not_read_back_is_not_called_copied(fake, tmp_path):
    copied, said = [], []
    mirror = mirror_of(fake, said, copied)
    wrote = fake._wrote
    fake._wrote = lambda name, content: wrote(
        name, content[:-1] + b"?" if name.endswith("model.safetensors") else content
    )
    copy(mirror, save(tmp_path, 10), 2)
    assert (
        copied == []
        and "other bytes came back than were written: model.safetensors: sha256 differs" in said[0]
    )
    fake._wrote = wrote
    mirror.turn()
    assert copied == [10] and "works again" in said[-1]
    assert whole_steps_on_server(fake) == {10: mirror.copied.path.name} and len(fake.server_folders()) == 1, (
        "the bad copy is gone"
    )


def test_a_damaged_local_checkpoint_is_not_spread(fake, tmp_path):
    copied, said = [], []
    manifest = save(tmp_path, 10)
    (manifest.folder / "model.safetensors").write_bytes(b"x" * manifest.files["model.safetensors"]["bytes"])
    mirror = mirror_of(fake, said, copied)
    copy(mirror, manifest)
    assert copied == [] and "damaged on this machine" in said[-1] and not whole_steps_on_server(fake)
    copy(mirror, save(tmp_path, 20))
    assert copied == [20]


def test_copies_that_fall_behind_skip_to_the_newest(fake, tmp_path):
    copied = []
    mirror = mirror_of(fake, [], copied)
    for step in (10, 20, 30, 40):
        mirror.submit(save(tmp_path, step))
    mirror.turn()
    assert copied == [40] and mirror.turn() is None


def test_retention_on_this_machine_does_not_break_a_copy_in_flight(fake, tmp_path):
    """A slow upload outlives the checkpoints of this machine: its files stay readable while it lasts."""
    copied, said = [], []
    mirror = mirror_of(fake, said, copied)
    first = save(tmp_path, 10)
    make = fake.mkdir

    def mkdir_and_prune(path, *rest):
        make(path, *rest)
        for step in (20, 30) if path != fake.root else ():
            prune(tmp_path / "checkpoints", 1, None, save(tmp_path, step))

    fake.mkdir = mkdir_and_prune
    copy(mirror, first)
    assert not first.folder.exists() and copied == [10] and said == []
    assert list(whole_steps_on_server(fake)) == [10]


def test_a_checkpoint_that_is_gone_before_its_turn_is_told_only_if_nothing_newer_waits(fake, tmp_path):
    said = []
    mirror = mirror_of(fake, said)
    first = save(tmp_path, 10)
    prune(tmp_path / "checkpoints", 1, None, save(tmp_path, 20))
    copy(mirror, first)
    assert "removed here before" in said[0]


def test_errors_are_told_once_and_tried_again_after_5_seconds_up_to_5_minutes(fake, tmp_path):
    said, copied = [], []
    mirror = mirror_of(fake, said, copied)
    fake.bad_until, fake.bad_errno = float("inf"), errno.ENOTCONN
    mirror.submit(save(tmp_path, 10))
    delays = [mirror.turn() for _ in range(9)]
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert len(said) == 1 and "errno 107" in said[0] and "step 10 is safe on this machine" in said[0]
    fake.bad_errno = errno.EIO
    mirror.turn()
    mirror.turn()
    assert len(said) == 2 and "Input/output error" in said[1]
    fake.bad_until = 0.0
    assert mirror.turn() == 0.0 and copied == [10] and said[2:] == ["Drive: copying works again"]
    fake.bad_until = float("inf")
    copy(mirror, save(tmp_path, 20))
    assert mirror._delay == 5 and len(said) == 4, "a new trouble is told again, and waits 5 seconds first"


@pytest.mark.parametrize(
    "number",
    [errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT],
)
def test_no_errno_reaches_training(number, fake, tmp_path):
    said = []
    mirror = DriveMirror(fake.root, said.append, lambda step: None, pause=lambda s: None)
    fake.bad_until, fake.bad_errno = float("inf"), number
    began = time.monotonic()
    for step in (10, 20, 30):
        mirror.submit(save(tmp_path, step))
    assert time.monotonic() - began < 2
    mirror.close(0.3)
    assert "NOT on Drive: step 30" in said[-1]


def test_a_full_drive_is_told_and_copied_to_once_there_is_room(fake, tmp_path):
    said, copied = [], []
    mirror = mirror_of(fake, said, copied)
    fake.quota = 1000
    copy(mirror, save(tmp_path, 10), 3)
    assert copied == [] and len(said) == 1 and "full" in said[0] and "trash" in said[0]
    fake.quota = None
    mirror.turn()
    assert copied == [10]


def test_nothing_is_made_under_a_mount_point_without_its_mount(fake, tmp_path):
    said = []
    mirror = mirror_of(fake, said)
    fake.set_mounted(False)
    before = dict(fake.tree)
    copy(mirror, save(tmp_path, 10), 2)
    assert fake.tree == before and not fake.queue
    assert len(said) == 1 and "not mounted" in said[0] and "drive.mount" in said[0]
    fake.set_mounted(True)
    mirror.turn()
    assert 10 in whole_steps_on_server(fake)


def test_a_mount_table_of_another_file_system_is_not_drive(monkeypatch, tmp_path):
    table = tmp_path / "mounts"
    monkeypatch.setattr(drive_folder, "MOUNTS_TABLE", table)
    for line, expected in (
        ("drive /content/drive fuse.drive rw 0 0", True),
        ("overlay /content/drive overlay rw 0 0", False),
        ("drive /content/drive2 fuse.drive rw 0 0", False),
        ("", False),
    ):
        table.write_text(line + "\n")
        assert drive_folder.is_drive_mounted() is expected, line
    table.unlink()
    assert not drive_folder.is_drive_mounted()


def test_a_missing_parent_is_never_made(tmp_path):
    with pytest.raises(drive_folder.NotThere):
        drive_folder.open_place(tmp_path / "gone" / "run")
    assert not (tmp_path / "gone").exists()


def test_three_stay_and_the_best_is_among_them(fake, tmp_path):
    mirror = mirror_of(fake, [])
    for step in range(10, 90, 10):
        copy(mirror, save(tmp_path, step, best=20))
    assert sorted(whole_steps_on_server(fake)) == [
        20,
        60,
        70,
        80,
    ]  # three before the last copy began, and that
    assert fake.trash_bytes == 0, "files are emptied before they are deleted"


def test_a_checkpoint_that_drive_has_not_uploaded_is_no_reason_to_delete_an_uploaded_one(
    tmp_path, monkeypatch
):
    fake = FakeDrive(tmp_path / "drive", in_order=False)
    fake.install(monkeypatch, tmp_path)
    mirror = mirror_of(fake, [])
    copy(mirror, save(tmp_path, 10))
    enqueue = fake._enqueue

    def hang(what, path, content=None):  # from now on uploads hang, while deletions go through
        fake.upload_seconds = (1e6, 1e6) if content or "step-00000010" not in path else (0, 0)
        enqueue(what, path, content)

    fake._enqueue = hang
    for step in range(20, 90, 10):
        copy(mirror, save(tmp_path, step))
    assert mirror.copied.step == 80
    fake.queue.clear()  # the machine dies before anything more arrives
    fake.next_machine(renames=False)
    assert restore(fake, tmp_path / "other", []).step == 10


def test_folders_of_people_and_of_other_runs_are_never_touched(fake, tmp_path):
    mirror = mirror_of(fake, [])
    fake.mkdir(fake.root)
    for name in ("photos", "step-00000001.ckpt", "my best.ckpt", f"step-00000001-{'f' * 16}-01234567.ckpt"):
        fake.mkdir(fake.root / name)
        fake._wrote(str(fake.root / name / "a.txt"), b"mine")
    for step in range(10, 100, 10):
        copy(mirror, save(tmp_path, step))
    kept = fake.server_folders()
    assert all(
        kept[name] == {"a.txt": b"mine"}
        for name in (
            "photos",
            "step-00000001.ckpt",
            "my best.ckpt",
            f"step-00000001-{'f' * 16}-01234567.ckpt",
        )
    )


def test_resuming_from_drive_copies_nothing_twice(fake, tmp_path):
    copy(mirror_of(fake, []), save(tmp_path / "one", 10))
    before = set(fake.server_folders())
    newest, copied = restore(fake, tmp_path / "two", []), []
    copy(mirror_of(fake, [], copied), newest)
    assert copied == [10] and set(fake.server_folders()) == before


def test_a_final_folder_is_recognisable_by_people(fake, tmp_path):
    copy(mirror_of(fake, []), save(tmp_path, 50, name=FINAL_NAMES[0]))
    assert next(iter(fake.server_folders())).startswith("final_model-step-00000050-")
    assert restore(fake, tmp_path / "two", []).step == 50


def test_copies_need_no_system_call_that_macos_or_windows_lack(tmp_path, monkeypatch):
    """On a plain folder, far enough that old copies are erased; a person's folder inside one stays."""
    monkeypatch.delattr(os, "getxattr")
    monkeypatch.delattr(os, "statvfs")
    monkeypatch.setattr(drive_folder, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    monkeypatch.setattr(drive_folder, "MOUNTS_TABLE", tmp_path / "no-such-table")
    said, copied = [], []
    mirror = DriveMirror(tmp_path / "far", said.append, copied.append, start=False)
    for step in range(10, 70, 10):
        copy(mirror, save(tmp_path, step))
        (mirror.copied.path / "mine").mkdir()
    assert copied == list(range(10, 70, 10)) and said == []
    assert [entry.step for entry in drive_folder.entries(tmp_path / "far") if entry.manifest] == [
        60,
        50,
        40,
        30,
    ]
    assert len(list((tmp_path / "far").glob("*/mine"))) == 6


# --- where a run continues


def put(fake: FakeDrive, name: str, step: int, **changed: bytes) -> None:
    """A checkpoint on Drive under any name, with some files other than they should be (None: missing)."""
    manifest = save(Path(fake.mount.parent) / "made", step)
    files = (
        {path.name: path.read_bytes() for path in manifest.folder.iterdir()}
        | drive_folder.with_table({})
        | changed
    )
    fake.tree.setdefault(str(fake.root), None)
    fake.tree[str(fake.root / name)] = None
    fake.tree |= {
        str(fake.root / name / file): content for file, content in files.items() if content is not None
    }


@pytest.mark.parametrize(
    "name",
    [
        "step-00000040-x (1).ckpt",
        "step-00000001.ckpt",
        "keep this one",
        "final_model.ckpt (1)",
        "Kopie von step-00000002.ckpt",
    ],
)
def test_identity_comes_from_the_manifest_never_from_the_name(name, fake, tmp_path):
    put(fake, "step-00000099-a.ckpt", 10)
    put(fake, name, 40)
    said = []
    assert restore(fake, tmp_path / "new", said).step == 40 and len(said) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"model.safetensors": b""},
        {"model.safetensors": None},
        {"model.safetensors": files_of(30)["model.safetensors"]},
        {"optim.safetensors": files_of(40)["optim.safetensors"][:-1]},
        {"state.json": files_of(30)["state.json"]},
        {"manifest.json": None},
        {"manifest.json": b""},
        {"manifest.json": b"{}"},
        {"manifest.json": b"x" * 2**21},
    ],
)
def test_damage_on_drive_falls_back_loudly_to_the_one_before(damage, fake, tmp_path):
    put(fake, "step-00000030-a.ckpt", 30)
    put(fake, "step-00000040-a.ckpt", 40, **damage)
    said = []
    newest = restore(fake, tmp_path / "new", said)
    assert newest.step == 30 and bytes_of(newest.folder) == files_of(30)
    assert (
        len(said) == 2 and "step-00000040-a.ckpt on Drive is not usable" in said[0] and "step 30" in said[1]
    )
    assert [path.name for path in (tmp_path / "new" / "checkpoints").iterdir()] == [step_name(30)], (
        "nothing of the damaged one stays"
    )


def test_none_usable_is_an_error_never_a_start_from_zero(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40, **{"model.safetensors": b""})
    local = save(tmp_path / "new", 30)
    (local.folder / "state.json").write_bytes(b"{}")
    said = []
    with pytest.raises(NoUsableCheckpoint, match=r"2 checkpoint.*none usable"):
        restore(fake, tmp_path / "new", said)
    assert len(said) == 2


def test_this_machine_wins_on_an_equal_step_and_the_newer_tier_otherwise(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40)
    save(tmp_path / "equal", 40)
    ops = fake.ops
    said = []
    assert restore(fake, tmp_path / "equal", said).step == 40 and said == [], (
        f"nothing was copied ({fake.ops - ops} operations)"
    )
    save(tmp_path / "newer", 50)
    assert restore(fake, tmp_path / "newer", []).step == 50
    save(tmp_path / "older", 30)
    assert restore(fake, tmp_path / "older", []).step == 40
    damaged = save(tmp_path / "damaged", 40)
    (damaged.folder / "model.safetensors").write_bytes(b"")
    said = []
    assert (
        bytes_of(restore(fake, tmp_path / "damaged", said).folder) == files_of(40)
        and "on this machine is not usable" in said[0]
    )


def test_a_drive_that_needs_a_moment_is_given_one(fake, tmp_path):
    put(fake, "step-00000030-a.ckpt", 30)
    put(fake, "step-00000040-a.ckpt", 40)
    fake.stale_until = {path: 9.0 for path in fake.tree if "00000040" in path}
    fake.bad_until, fake.bad_errno = 1.5, errno.EIO
    assert restore(fake, tmp_path / "new", []).step == 40


def test_an_unreachable_drive_stops_a_machine_that_has_nothing_and_no_other(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40)
    fake.bad_until, fake.bad_errno = float("inf"), errno.ENOTCONN
    with pytest.raises(NoUsableCheckpoint, match=r"errno 107.*starting from zero could hide"):
        restore(fake, tmp_path / "new", [])
    save(tmp_path / "has", 20)
    said = []
    assert (
        restore(fake, tmp_path / "has", said).step == 20
        and "continuing with what is on this machine" in said[0]
    )
    fake.set_mounted(False)
    with pytest.raises(ConfigError, match="not mounted"):
        restore(fake, tmp_path / "new", [])


def test_an_empty_drive_is_a_first_start(fake, tmp_path):
    said = []
    assert restore(fake, tmp_path / "new", said) is None and said == []


def test_another_runs_drive_folder_is_refused(fake, tmp_path):
    put(fake, "step-00000040-a.ckpt", 40)
    folder = tmp_path / "mine" / "checkpoints"
    folder.mkdir(parents=True)
    commit(folder, step_name(10), files_of(10), "another-run", 10, {})
    with pytest.raises(ConfigError, match="another run"):
        restore(fake, tmp_path / "mine", [])


def test_shorter_logs_on_this_machine_give_way_longer_ones_stay(fake, tmp_path):
    copy(mirror_of(fake, []), save(tmp_path / "one", 40))
    whole = (tmp_path / "one" / "logs" / "training_loss.txt").read_bytes()
    for already, expected in ((whole[:50], whole), (whole + b"more\n", whole + b"more\n")):
        output = tmp_path / f"with-{len(already)}"
        (output / "logs").mkdir(parents=True)
        (output / "logs" / "training_loss.txt").write_bytes(already)
        restore(fake, output, [])
        assert (output / "logs" / "training_loss.txt").read_bytes() == expected


def test_lost_logs_are_told_and_do_not_stop_a_resume(fake, tmp_path):
    copy(mirror_of(fake, []), save(tmp_path / "one", 40))
    for path in [path for path in fake.tree if path.endswith("training_loss.txt")]:
        fake.tree[path] = b""
    said = []
    assert restore(fake, tmp_path / "two", said).step == 40 and "logs beside" in said[-1]


# --- two runtimes


def other_lease(fake: FakeDrive, **changes) -> None:
    facts = {
        "host": "elsewhere",
        "pid": 7,
        "boot": "b",
        "began": "1",
        "since": time.time() - 900,
        "heartbeat": time.time() - 20,
    } | changes
    fake.tree |= {str(fake.root): None, str(fake.root / "lease-other.json"): json.dumps(facts).encode()}


def test_a_second_runtime_is_refused_with_a_way_out(fake, tmp_path):
    other_lease(fake)
    (tmp_path / "c").mkdir()
    said = []
    with pytest.raises(
        BusyError, match=r"pid 7 on elsewhere.*last seen 2\d s ago.*run.take_over=true"
    ) as error:
        newest_on_drive(fake.root, tmp_path / "c", [], said.append, sleep=fake.advance)
    assert error.value.exit_code == 3
    assert (
        newest_on_drive(fake.root, tmp_path / "c", [], said.append, sleep=fake.advance, take_over=True)
        is None
        and "taking over" in said[0]
    )


@pytest.mark.parametrize(
    "dead",
    [
        {"heartbeat": time.time() - 301},
        lease.this_process() | {"pid": 2**22 + 1},  # this machine, and the process is gone
        lease.this_process() | {"began": "1"},  # its number was given to another process
        lease.this_process(),
    ],
)
def test_a_dead_runtime_is_not_in_the_way(dead, fake, tmp_path):
    other_lease(fake, **dead)
    assert newest_on_drive(fake.root, tmp_path, [], print, sleep=fake.advance) is None


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"host": 1}', b"\xff", b'{"heartbeat": "soon"}', b"[" * 5000]
)
def test_an_unreadable_lease_is_passed_over(raw, fake):
    fake.tree |= {str(fake.root): None, str(fake.root / "lease-other.json"): raw}
    assert lease.live_leases(fake.root) == []


def test_a_runtime_that_arrives_later_is_told_once(fake, tmp_path):
    said = []
    mirror = mirror_of(fake, said)
    copy(mirror, save(tmp_path, 10))
    other_lease(fake)
    copy(mirror, save(tmp_path, 20))
    copy(mirror, save(tmp_path, 30))
    assert len(said) == 1 and "another runtime writes" in said[0]


def test_the_lease_is_kept_fresh_and_given_back(fake, tmp_path, monkeypatch):
    mirror = DriveMirror(fake.root, print, lambda step: None)
    mirror.submit(save(tmp_path, 10))
    deadline = time.monotonic() + 10
    while not mirror.copied and time.monotonic() < deadline:
        time.sleep(0.01)
    path = str(mirror._lease.path)
    first = json.loads(fake.tree[path])
    assert {key: first[key] for key in ("host", "pid", "boot")} == {
        key: lease.this_process()[key] for key in ("host", "pid", "boot")
    }
    mirror._lease._next_beat = 0.1
    mirror.submit(save(tmp_path, 20))
    mirror.close()
    assert mirror.copied.step == 20 and path not in fake.tree and not mirror._thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "drive"]


# --- the end of a run


def test_close_waits_for_the_newest_copy(fake, tmp_path):
    copied = []
    mirror = DriveMirror(fake.root, print, copied.append)
    for step in (10, 20, 30):
        mirror.submit(save(tmp_path, step))
    mirror.close()
    mirror.close()
    assert copied[-1] == 30


def test_close_tells_what_is_not_confirmed(fake, tmp_path):
    said = []
    mirror = DriveMirror(fake.root, said.append, lambda step: None)
    fake.bad_until, fake.bad_errno = float("inf"), errno.ENOTCONN
    mirror.submit(save(tmp_path, 10))
    began = time.monotonic()
    mirror.close(0.5)
    assert time.monotonic() - began < 3
    assert (
        "NOT on Drive: step 10 is only on this machine, Drive has nothing" in said[-1]
        and "errno 107" in said[-1]
    )


def test_a_drive_that_hangs_does_not_hang_the_end(fake, tmp_path):
    said, release = [], threading.Event()
    fake.fsync = lambda descriptor: None
    wrote = fake._wrote
    fake._wrote = lambda name, content: (release.wait(20), wrote(name, content))
    mirror = DriveMirror(fake.root, said.append, lambda step: None)
    mirror.submit(save(tmp_path, 10))
    began = time.monotonic()
    mirror.close(0.5)
    assert time.monotonic() - began < 3 and "copying takes too long" in said[-1]
    release.set()
    mirror._thread.join(10)
    assert not mirror._thread.is_alive() and not whole_steps_on_server(fake), (
        "an abandoned copy is not finished behind a person's back"
    )


def test_an_upload_that_drive_does_not_confirm_is_told(tmp_path, monkeypatch):
    fake = FakeDrive(tmp_path / "drive", upload_seconds=(1e6, 1e6))
    fake.install(monkeypatch, tmp_path)
    monkeypatch.setattr(drive, "UPLOAD_SECONDS", 0.05)
    said = []
    mirror = DriveMirror(fake.root, said.append, lambda step: None, pause=fake.advance)
    mirror.submit(save(tmp_path, 10))
    mirror.close()
    assert "NOT confirmed the upload of step 10" in said[-1]


def test_both_numbers_are_said_when_they_change_and_not_more_often():
    class Lines:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        flush = isatty = lambda self: False

    lines = Lines()
    reporter = TerminalReporter(lines)
    for local, remote in ((10, 0), (20, 0), (20, 0), (20, 20), (20, 20), (30, 20), (40, 40)):
        reporter.saved(local, remote)
    assert lines.text.splitlines() == [
        "safe on this machine: step 10, copied to Drive: nothing yet",
        "safe on this machine: step 20, copied to Drive: step 20",
        "safe on this machine: step 40, copied to Drive: step 40",
    ]


# --- with real training

TINY = [
    *(
        "vocab_size=300",
        "hidden_size=16",
        "intermediate_size=32",
        "num_hidden_layers=1",
        "num_attention_heads=2",
        "num_key_value_heads=1",
    ),
    *(
        "max_position_embeddings=32",
        "sequence_length=16",
        "data.tokenizer_vocab_size=300",
        "batch_size=4",
        "warmup_steps=3",
        "val_max_tokens=200",
    ),
    *(
        "train.val_every=10",
        "train.sample_every=10",
        "train.sample_tokens=4",
        "train.save_every=3",
        "train.log_every=1",
        "train.precision=fp32",
    ),
]


def tiny_run(text: Path, output: Path, **flags):
    return load_config(
        "nano",
        None,
        TINY,
        **{"data.input_file": str(text), "run.output_dir": str(output), "train.max_steps": 30} | flags,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text(
        "".join(
            f"{n} green bottles hanging on the wall, and {n * 7 % 13} of them fall.\n" for n in range(300)
        )
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory) -> dict:
    from smollm2.training import train

    output = tmp_path_factory.mktemp("reference") / "output"
    train(tiny_run(text, output), Reporter())
    return outcome(output)


def outcome(output: Path) -> dict:
    """All bytes of the final checkpoint, and the loss log without its clock."""
    lines = (output / "logs" / "training_loss.txt").read_text().splitlines()
    return bytes_of(output / "checkpoints" / FINAL_NAMES[0]) | {
        "losses": [line.split(" ", 1)[1] for line in lines]
    }


class Notes(Reporter):
    def __init__(self):
        self.lines, self.safe = [], []

    def message(self, text):
        self.lines.append(text)

    def saved(self, local_step, drive_step):
        self.safe.append((local_step, drive_step))


def hurry(monkeypatch):
    for module, name, value in (
        (drive, "FIRST_RETRY_SECONDS", 0.01), (drive, "LAST_RETRY_SECONDS", 0.05), (drive, "READ_BACK_PAUSES", (0.01, 0.02)),
        (drive_restore, "RETRY_PAUSES", (0.02, 0.05)), (drive, "CLOSE_SECONDS", 5.0), (drive, "CLOSE_SECONDS_IN_TROUBLE", 3.0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow) if seed >= 2 else seed for seed in range(25)]
)
def test_a_fresh_machine_with_only_the_drive_folder_ends_with_the_same_bits(
    seed, text, uninterrupted, tmp_path, monkeypatch
):
    from smollm2.training import train

    hurry(monkeypatch)
    options = {
        "stale_rate": 0.05,
        "duplicate_rate": 0.1,
        "upload_seconds": (0, 0.05),
        "real_time": True,
        "in_order": seed % 2 == 0,
    }
    fake = FakeDrive(tmp_path / "drive", seed, fault_rate=0.01, **options)
    fake.install(monkeypatch, tmp_path)
    death, server = 40 + 25 * seed % 500, {}  # what Google has when the machine dies at this operation
    op = fake._op
    fake._op = lambda: (server.update(fake.server) if fake.ops == death else None, op())
    notes = Notes()
    train(tiny_run(text, tmp_path / "first", **{"run.drive_dir": str(fake.root)}), notes)
    assert outcome(tmp_path / "first") == uninterrupted, "Drive's troubles changed the training"
    assert notes.safe[-1][0] == 30

    fresh = FakeDrive(tmp_path / "drive", seed, **options)
    fresh.install(monkeypatch, tmp_path)
    fresh.server = dict(server)
    fresh.next_machine()
    fresh.tree = {
        path: content for path, content in fresh.tree.items() if "lease-" not in path
    }  # five minutes later
    whole = whole_steps_on_server(fresh)
    notes = Notes()
    config = tiny_run(text, tmp_path / "second", **{"run.drive_dir": str(fresh.root)})
    if not whole and any("step-" in path for path in fresh.tree):
        with pytest.raises(NoUsableCheckpoint):
            train(config, notes)
        return
    result = train(config, notes)
    assert any(
        line.startswith("starting at step 0 of 30" if not whole else f"continuing from step-{max(whole):08d}")
        for line in notes.lines
    ), notes.lines
    ends = outcome(tmp_path / "second")
    if any(
        "logs beside" in line for line in notes.lines
    ):  # the log copies did not reach the server: said; the rest is exact
        ends |= {name: uninterrupted[name] for name in ("losses", "state.json")}  # the state counts log lines
    assert ends == uninterrupted
    assert result.drive_step == 30 and "copied to Drive: step 30" in result.table()


def test_training_ends_well_when_drive_goes_away_for_good(text, uninterrupted, tmp_path, monkeypatch):
    from smollm2.training import train

    hurry(monkeypatch)
    monkeypatch.setattr(drive, "CLOSE_SECONDS_IN_TROUBLE", 0.2)
    fake = FakeDrive(tmp_path / "drive", real_time=True)
    fake.install(monkeypatch, tmp_path)
    notes, op = Notes(), fake._op

    def unplug():
        if fake.ops > 60:
            fake.set_mounted(False)
            fake._fail(errno.ENOTCONN)
        op()

    fake._op = unplug
    result = train(tiny_run(text, tmp_path / "first", **{"run.drive_dir": str(fake.root)}), notes)
    assert outcome(tmp_path / "first") == uninterrupted and result.step == 30 and result.drive_step < 30
    assert (
        sum("training goes on" in line for line in notes.lines) <= 2
        and "NOT on Drive: step 30" in notes.lines[-1]
    )
    assert (
        f"copied to Drive: {'step ' + str(result.drive_step) if result.drive_step else 'nothing yet'}"
        in result.table()
    )


def test_resume_never_does_not_continue_or_hide_what_is_on_drive(text, tmp_path):
    from smollm2.training import train

    drive_dir = tmp_path / "drive"
    settings = {"run.drive_dir": str(drive_dir), "train.max_steps": 6}
    train(tiny_run(text, tmp_path / "output", **settings), Reporter())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"--resume never, but --drive_dir .* holds 3 checkpoint"):
        train(tiny_run(text, tmp_path / "output", **settings, **{"run.resume": "never"}), Reporter())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    result = train(
        tiny_run(
            text,
            tmp_path / "output",
            **settings | {"run.resume": "never", "run.drive_dir": str(tmp_path / "other")},
        ),
        Reporter(),
    )
    assert result.drive_step == 6 and (tmp_path / "output" / "previous-1").is_dir()


def test_a_run_that_was_found_on_drive_is_said_to_lie_there_and_the_advice_works(text, tmp_path):
    from smollm2.training import train

    settings = {"run.drive_dir": str(tmp_path / "drive"), "train.max_steps": 6}
    train(tiny_run(text, tmp_path / "output", **settings), Reporter())
    advice = "or choose another --output_dir and another --drive_dir$"
    for name, place in (("fresh", "--drive_dir .*drive"), ("output", "--output_dir .*output")):
        with pytest.raises(
            ConfigError,
            match=rf"the run in {place} was made with other settings \(train\.seed: .* -> 5\): put them back, {advice}",
        ):
            train(tiny_run(text, tmp_path / name, **settings, **{"train.seed": 5}), Reporter())
    assert not (tmp_path / "fresh").exists()
    changed = tmp_path / "other.txt"
    changed.write_text(text.read_text() + "one more line\n")
    with pytest.raises(DataError, match=f"is not the text this run was trained on.*{advice}"):
        train(tiny_run(changed, tmp_path / "fresh", **settings), Reporter())
    assert (
        train(
            tiny_run(
                text,
                tmp_path / "fresh",
                **settings | {"run.drive_dir": str(tmp_path / "second")},
                **{"train.seed": 5},
            ),
            Reporter(),
        ).drive_step
        == 6
    )


@pytest.mark.parametrize("where", ["checkpoints", ".", "checkpoints/deeper"])
def test_the_runs_own_folder_is_no_second_place(where, text, tmp_path):
    from smollm2.training import train

    with pytest.raises(ConfigError, match="run's own folder"):
        train(
            tiny_run(text, tmp_path / "output", **{"run.drive_dir": str(tmp_path / "output" / where)}),
            Reporter(),
        )
    assert not (tmp_path / "output").exists()


def test_an_output_folder_in_drives_place_is_refused_while_drive_is_not_mounted(text, tmp_path, monkeypatch):
    from smollm2.training import train

    monkeypatch.setattr(drive_folder, "MOUNT_POINT", tmp_path / "content" / "drive")
    with pytest.raises(ConfigError, match="not mounted"):
        train(tiny_run(text, tmp_path / "content" / "drive" / "MyDrive" / "output"), Reporter())
    assert not (tmp_path / "content").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [7.5, 8.5, 9.5])
def test_killed_processes_and_a_lost_machine_end_with_the_same_bits(seconds, text, uninterrupted, tmp_path):
    """kill -9 of a real process, its whole output folder lost, and a rerun with nothing but the Drive folder."""
    command = [
        sys.executable,
        "colab_train.py",
        "--preset",
        "nano",
        "--input_file",
        str(text),
        "--max_steps",
        "30",
        "--drive_dir",
        str(tmp_path / "drive"),
    ]
    for setting in TINY:
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "first")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while (
        not list((tmp_path / "drive").glob("*/manifest.json"))
        and time.monotonic() < deadline
        and first.poll() is None
    ):
        time.sleep(0.02)
    time.sleep(seconds % 1 / 4)
    first.send_signal(signal.SIGKILL)
    first.wait()
    copied = [entry.step for entry in drive_folder.entries(tmp_path / "drive") if entry.manifest]
    if not copied:
        pytest.skip("killed before the first manifest was whole")
    second = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "second")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 0, second.stderr
    assert "copied from Drive" in second.stdout or max(copied) == 30
    assert outcome(tmp_path / "second") == uninterrupted
