"""A Google Drive that lies as the real one does, for the tests of the Drive tier.

It stands in for `os`, `open` and `shutil.disk_usage` inside `smollm2.drive_folder`, the one module that
touches the remote folder. There are two views: what the mounted folder shows (the virtual machine's cache)
and what the server has. Writes reach the server later, in order or not, and never when the machine dies
first. On top of that come bursts of errno 107 and 5, files that read as 0 bytes for a while, folders that
turn up as "name (1)", a quota, and a trash that counts. The clock moves with every call, and with `advance`.
"""

import contextlib
import errno
import io
import os
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

from smollm2 import drive_folder

CALLS = ("mkdir", "listdir", "stat", "truncate", "unlink", "rmdir", "getxattr")


class MachineDied(BaseException):
    """The virtual machine is gone. No handler of errors may survive it."""


class FakeDrive:
    """`tree` is what the mount shows and `server` what Google has: {path: bytes, or None for a folder}.
    `scale` shortens its moods for tests in real time, where the clock moves with the calls alone."""

    def __init__(
        self, root: Path, seed=0, in_order=True, tells_uploads=True, fault_rate=0.0, stale_rate=0.0,
        duplicate_rate=0.0, upload_seconds=(0.0, 0.0), quota=None, scale=1.0,
    ):  # fmt: skip
        self.mount, self.root, self.random = root, root / "MyDrive" / "run", random.Random(seed)
        self.in_order, self.tells_uploads, self.fault_rate = in_order, tells_uploads, fault_rate
        self.stale_rate, self.duplicate_rate, self.upload_seconds = stale_rate, duplicate_rate, upload_seconds
        self.quota, self.scale = quota, scale
        self.tree: dict[str, bytes | None] = {str(self.root.parent): None}
        self.server: dict[str, bytes | None] = {}
        self.queue: list[tuple[float, str, str, bytes | None]] = []  # (not before, what, path, content)
        self.trash_bytes = self.most_server_bytes = self.most_tree_bytes = 0
        self.ops, self.die_at, self.now = 0, None, 0.0
        self.bad_until, self.bad_errno = 0.0, 0
        self.stale_until: dict[str, float] = {}
        self.ghosts: set[str] = set()  # deleted by a machine that died before that was uploaded
        self.lock = threading.RLock()

    # --- time and faults

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self._upload()

    def _op(self) -> None:
        self.ops += 1
        self.advance(0.01)
        if self.die_at is not None and self.ops >= self.die_at:
            raise MachineDied
        if self.now >= self.bad_until and self.random.random() < self.fault_rate:
            self.bad_errno = self.random.choice((errno.ENOTCONN, errno.EIO))
            self.bad_until = self.now + self.random.uniform(1, 90) * self.scale
        if self.now < self.bad_until:
            self._fail(self.bad_errno)

    def _fail(self, number: int) -> None:
        raise OSError(number, os.strerror(number))

    # --- uploads

    def _enqueue(self, what: str, path: str, content: bytes | None = None) -> None:
        self.queue.append((self.now + self.random.uniform(*self.upload_seconds), what, path, content))
        self._upload()

    def _upload(self) -> None:
        blocked: set[str] = set()
        for job in list(self.queue):
            if job[0] > self.now or job[2] in blocked:
                if self.in_order:
                    return
                blocked.add(job[2])
            elif not self._apply(job):
                return  # the quota is full: uploads stop, and nobody is told
            else:
                self.queue.remove(job)

    def _apply(self, job) -> bool:
        _, what, path, content = job
        if what == "write":
            grown = self.server_bytes() + len(content) - len(self.server.get(path) or b"")
            if self.quota is not None and grown > self.quota:
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
            if content is not None and Path(path).parent.parent == self.root:
                folders.setdefault(Path(path).parent.name, {})[Path(path).name] = content
        return folders

    # --- the machine dies, another one mounts the same Drive

    def next_machine(self, renames: bool = True) -> None:
        """Uploads in flight are lost (out of order: some), the cache is gone, names come back changed."""
        blocked: set[str] = set()
        for job in [] if self.in_order else list(self.queue):
            if job[2] in blocked or self.random.random() < 0.5:
                blocked.add(job[2])
            else:
                self._apply(job)
        self.queue.clear()
        self.bad_until, self.die_at = 0.0, None
        for name in sorted(self.server_folders()) if renames else ():
            if self.random.random() < 0.25:
                other = self.random.choice((f"{name} (1)", f"{name.removesuffix('.ckpt')} (1).ckpt"))
                self._rename(str(self.root / name), str(self.root / other))
        self.ghosts = {path for path, content in self.server.items() if content and not self.tree.get(path)}
        self.tree = {str(self.root.parent): None} | dict(self.server)
        self.stale_until = {
            path: self.now + self.random.uniform(0, 9) * self.scale
            for path, content in self.tree.items()
            if content and self.random.random() < self.stale_rate
        }

    def _rename(self, old: str, new: str) -> None:
        for view in (self.server, self.tree):
            inside = [path for path in view if path == old or path.startswith(old + "/")]
            view |= {new + path[len(old) :]: view.pop(path) for path in inside}
        if self.random.random() < 0.5:
            self.server[old] = None  # the old name stays behind, empty

    # --- what drive_folder calls

    def open(self, name: str, mode: str = "r"):
        if "r" in mode:
            content = self.tree.get(name)
            if content is None:
                self._fail(errno.ENOENT)
            return io.BytesIO(b"" if self.now < self.stale_until.get(name, 0.0) else content)
        if str(Path(name).parent) not in self.tree or ("x" in mode and name in self.tree):
            self._fail(errno.EEXIST if name in self.tree else errno.ENOENT)
        return _Writer(self, name)

    def _wrote(self, name: str, content: bytes) -> None:
        self.tree[name] = content
        self.ghosts.discard(name)
        shown = sum(len(data) for path, data in self.tree.items() if data and path not in self.ghosts)
        self.most_tree_bytes = max(self.most_tree_bytes, shown)
        if content and self.random.random() < self.stale_rate:
            self.stale_until[name] = self.now + self.random.uniform(0.5, 12) * self.scale
        self._enqueue("write", name, content)

    def mkdir(self, name: str) -> None:
        if name in self.tree or str(Path(name).parent) not in self.tree:
            self._fail(errno.EEXIST if name in self.tree else errno.ENOENT)
        if name != str(self.root) and self.random.random() < self.duplicate_rate:
            name += " (1)"  # the folder is made, under another name
        self.tree[name] = None
        self._enqueue("mkdir", name)

    def listdir(self, name: str) -> list[str]:
        if self.tree.get(name, b"") is not None:
            self._fail(errno.ENOTDIR if name in self.tree else errno.ENOENT)
        return [Path(other).name for other in self.tree if str(Path(other).parent) == name]

    def stat(self, name: str):
        return SimpleNamespace(st_size=len(self.open(name).getvalue()))

    def truncate(self, name: str, length: int) -> None:
        self.open(name)
        self._wrote(name, self.tree[name][:length])

    def unlink(self, name: str) -> None:
        self.open(name)
        del self.tree[name]
        self._enqueue("unlink", name)

    def rmdir(self, name: str) -> None:
        if self.listdir(name):
            self._fail(errno.ENOTEMPTY)
        del self.tree[name]
        self._enqueue("rmdir", name)

    def getxattr(self, name: str, _) -> bytes:
        if not self.tells_uploads:
            self._fail(errno.ENOTSUP)
        return b"local-123" if any(job[2] == name for job in self.queue) else b"1AbC"

    def disk_usage(self, _):
        free = 2**60 if self.quota is None else max(0, self.quota - self.server_bytes())
        return SimpleNamespace(total=2**60, free=free)

    # --- putting it in place

    def install(self, monkeypatch, tmp_path: Path) -> None:
        """Make `smollm2.drive_folder` see this Drive under its mount point, and the real disk elsewhere."""

        def call(name: str, real):
            def either(path, *rest):
                if not Path(path).is_relative_to(self.mount):
                    return real(path, *rest)
                with self.lock:
                    self._op()
                    return getattr(self, name)(str(path), *rest)

            return either

        def is_folder(path) -> bool:
            is_ours = Path(path).is_relative_to(self.mount)
            return self.tree.get(str(path), b"") is None if is_ours else os.path.isdir(path)

        calls = {name: call(name, getattr(os, name, None)) for name in CALLS}
        calls |= {"path": SimpleNamespace(isdir=is_folder, abspath=os.path.abspath), "getpid": os.getpid}
        calls |= {"fsync": lambda descriptor: self._op()}
        monkeypatch.setattr(drive_folder, "os", SimpleNamespace(**calls))
        monkeypatch.setattr(drive_folder, "open", call("open", open), raising=False)
        disk = {"copyfileobj": shutil.copyfileobj, "disk_usage": call("disk_usage", shutil.disk_usage)}
        monkeypatch.setattr(drive_folder, "shutil", SimpleNamespace(**disk))
        monkeypatch.setattr(drive_folder, "MOUNT_POINT", self.mount)
        self.table = tmp_path / "mounts"
        monkeypatch.setattr(drive_folder, "MOUNTS_TABLE", self.table)
        self.set_mounted(True)

    def set_mounted(self, mounted: bool) -> None:
        line = f"drive {self.mount} fuse.drive rw,nosuid 0 0" if mounted else ""
        self.table.write_text(f"proc /proc proc rw 0 0\n{line}\n")


class _Writer(io.BytesIO):
    """A file being written: of what was written before a failure half stays."""

    def __init__(self, drive: FakeDrive, name: str):
        super().__init__()
        self.drive, self.path = drive, name

    def write(self, data: bytes) -> int:
        with self.drive.lock:
            self.drive._op()
        return super().write(data)

    def fileno(self) -> int:
        return -1

    def __exit__(self, kind, *_):
        content = self.getvalue()
        with self.drive.lock, contextlib.suppress(OSError):
            self.drive._wrote(self.path, content if kind is None else content[: len(content) // 2])
