"""A Google Drive that lies as the real one does, for the tests of the Drive tier.

It stands in for `os` and `open` inside `smollm2.drive_folder`, the one module that touches the remote folder. There are
two views: what the mounted folder shows (the virtual machine's cache) and what the server has. Writes reach the server
later, in order or not, and never when the machine dies first. On top of that come bursts of errno 107 and 5, files that
read as 0 bytes for a while, folders that turn up as "name (1)", renames taken back, a quota, and a trash that counts.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from smollm2 import drive_folder


class MachineDied(BaseException):
    """The virtual machine is gone. No handler of errors may survive it."""


class FakeDrive:
    """`tree` is what the mount shows and `server` what Google has: {path: bytes, or None for a folder}."""

    def __init__(
        self,
        root: Path,
        seed: int = 0,
        *,
        in_order=True,
        tells_uploads=True,
        fault_rate=0.0,
        stale_rate=0.0,
        duplicate_rate=0.0,
        upload_seconds=(0.0, 0.0),
        quota=None,
        real_time=False,
    ):
        self.mount, self.root = root, root / "MyDrive" / "run"
        self.random = random.Random(seed)
        self.in_order, self.tells_uploads, self.quota, self.real_time = (
            in_order,
            tells_uploads,
            quota,
            real_time,
        )
        self.fault_rate, self.stale_rate, self.duplicate_rate, self.upload_seconds = (
            fault_rate,
            stale_rate,
            duplicate_rate,
            upload_seconds,
        )
        self.tree: dict[str, bytes | None] = {str(self.root.parent): None}
        self.server: dict[str, bytes | None] = {}
        self.queue: list[tuple[float, str, str, bytes | None]] = []  # (not before, what, path, content)
        self.trash_bytes = self.most_server_bytes = self.most_tree_bytes = 0
        self.ops, self.die_at, self.clock = 0, None, 0.0
        self.bad_until, self.bad_errno, self.stale_until = 0.0, 0, {}
        self.is_mounted = True
        self.errors_raised: set[int] = set()
        self.lock = threading.RLock()

    # --- time and faults

    @property
    def now(self) -> float:
        return time.monotonic() if self.real_time else self.clock

    def advance(self, seconds: float) -> None:
        if self.real_time:
            time.sleep(min(seconds, 0.01))
        self.clock += seconds
        self._upload()

    def _op(self) -> None:
        self.ops += 1
        self.clock += 0.01
        self._upload()
        if self.die_at is not None and self.ops >= self.die_at:
            raise MachineDied
        if self.now >= self.bad_until and self.random.random() < self.fault_rate:
            self.bad_errno = self.random.choice((errno.ENOTCONN, errno.EIO))
            self.bad_until = self.now + (0.02 if self.real_time else self.random.uniform(1, 90))
        if self.now < self.bad_until:
            self._fail(self.bad_errno)

    def _fail(self, number: int, path: str = "") -> None:
        self.errors_raised.add(number)
        raise OSError(number, os.strerror(number), path)

    # --- uploads

    def _enqueue(self, what: str, path: str, content: bytes | None = None) -> None:
        self.queue.append((self.now + self.random.uniform(*self.upload_seconds), what, path, content))
        self._upload()

    def _upload(self) -> None:
        blocked: set[str] = set()
        for job in list(self.queue):
            not_before, _, path, _ = job
            if not_before > self.now or path in blocked:
                if self.in_order:
                    return
                blocked.add(path)
            elif not self._apply(job):
                return  # the quota is full: uploads stop, and nobody is told
            else:
                self.queue.remove(job)

    def _apply(self, job) -> bool:
        _, what, path, content = job
        if what == "write":
            if (
                self.quota is not None
                and self.server_bytes() + len(content) - len(self.server.get(path) or b"") > self.quota
            ):
                return False
            self.server[path] = content
            for parent in list(Path(path).parents)[:2]:
                self.server.setdefault(str(parent), None)
        elif what == "mkdir":
            self.server[path] = None
        elif what == "unlink" or not any(other.startswith(path + "/") for other in self.server):
            self.trash_bytes += len(self.server.pop(path, None) or b"")  # Drive's trash counts
        self.most_server_bytes = max(self.most_server_bytes, self.server_bytes())
        return True

    def server_bytes(self) -> int:
        return self.trash_bytes + sum(len(content) for content in self.server.values() if content)

    def server_folders(self) -> dict[str, dict[str, bytes]]:
        """What the server has, as {folder name: {file name: bytes}}."""
        folders: dict[str, dict[str, bytes]] = {}
        for path, content in self.server.items():
            relative = Path(path).relative_to(self.root).parts if Path(path).is_relative_to(self.root) else ()
            if len(relative) == 2 and content is not None:
                folders.setdefault(relative[0], {})[relative[1]] = content
        return folders

    # --- the machine dies, another one mounts the same Drive

    def next_machine(self, renames: bool = True) -> None:
        """Uploads in flight are lost (out of order: some of them), the cache is gone, names come back changed."""
        if not self.in_order:
            blocked: set[str] = set()
            for job in list(self.queue):
                if job[2] in blocked or self.random.random() < 0.5:
                    blocked.add(job[2])
                else:
                    self._apply(job)
        self.queue.clear()
        self.bad_until, self.die_at = 0.0, None
        if renames:
            for name in sorted(self.server_folders()):
                if self.random.random() < 0.25:
                    self._rename_on_server(
                        name, self.random.choice((f"{name} (1)", f"{name.removesuffix('.ckpt')} (1).ckpt"))
                    )
        self.tree = {str(self.root.parent): None} | dict(self.server)
        files = [path for path, content in self.tree.items() if content]
        self.stale_until = {
            path: self.now + self.random.uniform(0, 0.05 if self.real_time else 9)
            for path in files
            if self.random.random() < self.stale_rate
        }

    def _rename_on_server(self, name: str, other: str) -> None:
        old, new = str(self.root / name), str(self.root / other)
        self.server = {
            new + path[len(old) :] if path == old or path.startswith(old + "/") else path: c
            for path, c in self.server.items()
        }
        if self.random.random() < 0.5:
            self.server[old] = None  # the old name stays behind, empty

    # --- what drive_folder calls

    def _inside(self, path) -> str | None:
        text = str(path)
        return text if text == str(self.mount) or text.startswith(str(self.mount) + "/") else None

    def open(self, path, mode="r", **_):
        with self.lock:
            self._op()
            name = str(path)
            if "r" in mode:
                content = self.tree.get(name)
                if content is None:
                    self._fail(errno.EISDIR if name in self.tree else errno.ENOENT, name)
                return io.BytesIO(b"" if self._is_stale(name) else content)
            if str(path.parent) not in self.tree:
                self._fail(errno.ENOENT, name)
            if "x" in mode and name in self.tree:
                self._fail(errno.EEXIST, name)
            if self.tree.get(name, b"") is None:
                self._fail(errno.EISDIR, name)
            return _Writer(self, name)

    def _is_stale(self, name: str) -> bool:
        return self.now < self.stale_until.get(name, 0.0)

    def _wrote(self, name: str, content: bytes) -> None:
        with self.lock:
            self.tree[name] = content
            self.most_tree_bytes = max(self.most_tree_bytes, sum(len(c) for c in self.tree.values() if c))
            if content and self.random.random() < self.stale_rate:
                self.stale_until[name] = self.now + (0.02 if self.real_time else self.random.uniform(0.5, 12))
            self._enqueue("write", name, content)

    def mkdir(self, path, mode=0o777):
        with self.lock:
            self._op()
            name = str(path)
            if name in self.tree:
                self._fail(errno.EEXIST, name)
            if str(Path(name).parent) not in self.tree:
                self._fail(errno.ENOENT, name)
            if path != self.root and self.random.random() < self.duplicate_rate:
                name += " (1)"  # the folder is made, under another name
            self.tree[name] = None
            self._enqueue("mkdir", name)

    def listdir(self, path):
        with self.lock:
            self._op()
            name = str(path)
            if name not in self.tree:
                self._fail(errno.ENOENT, name)
            if self.tree[name] is not None:
                self._fail(errno.ENOTDIR, name)
            return [Path(other).name for other in self.tree if str(Path(other).parent) == name]

    def stat(self, path):
        with self.lock:
            self._op()
            name = str(path)
            if name not in self.tree:
                self._fail(errno.ENOENT, name)
            return SimpleNamespace(st_size=0 if self._is_stale(name) else len(self.tree[name] or b""))

    def unlink(self, path):
        with self.lock:
            self._op()
            if self.tree.get(str(path)) is None:
                self._fail(errno.EISDIR if str(path) in self.tree else errno.ENOENT, str(path))
            del self.tree[str(path)]
            self._enqueue("unlink", str(path))

    def rmdir(self, path):
        with self.lock:
            if self.listdir(path):
                self._fail(errno.ENOTEMPTY, str(path))
            del self.tree[str(path)]
            self._enqueue("rmdir", str(path))

    def getxattr(self, path, name):
        with self.lock:
            self._op()
            if not self.tells_uploads:
                self._fail(errno.ENOTSUP)
            return b"local-123" if any(job[2] == str(path) for job in self.queue) else b"1AbC"

    def disk_usage(self, path):
        free = 2**60 if self.quota is None else max(0, self.quota - self.server_bytes())
        return SimpleNamespace(total=2**60, free=free)

    def fsync(self, descriptor):
        self._op()

    # --- putting it in place

    def install(self, monkeypatch, tmp_path: Path) -> None:
        """Make `smollm2.drive_folder` see this Drive under its mount point, and the real disk everywhere else."""
        table = tmp_path / "mounts"

        class Os:
            def __getattr__(_, name):
                if name not in ("mkdir", "listdir", "stat", "unlink", "rmdir", "getxattr"):
                    return getattr(os, name)
                return lambda path, *rest: getattr(self if self._inside(path) else os, name)(path, *rest)

            fsync = staticmethod(lambda descriptor: self._op())
            path = SimpleNamespace(
                isdir=lambda path: (
                    self.tree.get(str(path), b"") is None if self._inside(path) else os.path.isdir(path)
                ),
                abspath=os.path.abspath,
            )

        monkeypatch.setattr(drive_folder, "os", Os())
        monkeypatch.setattr(
            drive_folder,
            "open",
            lambda path, *rest, **more: (
                self.open(path, *rest) if self._inside(path) else open(path, *rest, **more)  # noqa: SIM115
            ),
            raising=False,
        )
        monkeypatch.setattr(
            drive_folder,
            "disk_usage",
            lambda path: (self.disk_usage if self._inside(path) else shutil.disk_usage)(path),
        )
        monkeypatch.setattr(drive_folder, "MOUNT_POINT", self.mount)
        monkeypatch.setattr(drive_folder, "MOUNTS_TABLE", table)
        self.set_mounted(True, table)

    def set_mounted(self, mounted: bool, table: Path | None = None) -> None:
        self._table = table or self._table
        self._table.write_text(
            f"proc /proc proc rw 0 0\n{f'drive {self.mount} fuse.drive rw,nosuid 0 0' if mounted else ''}\n"
        )


class _Writer:
    """A file being written: what was written before a failure stays, as on a real disk."""

    def __init__(self, drive: FakeDrive, name: str):
        self.drive, self.name, self.content = drive, name, b""

    def __enter__(self):
        return self

    def write(self, data: bytes) -> int:
        with self.drive.lock:
            self.drive._op()
            self.content += data
        return len(data)

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return -1

    def __exit__(self, kind, *_):
        with contextlib.suppress(OSError):
            self.drive._wrote(
                self.name, self.content if kind is None else self.content[: len(self.content) // 2]
            )
