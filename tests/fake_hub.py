"""A loopback Hub for models and datasets, whose behaviour a test sets; and a proxy that refuses."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

FIRST, SECOND = "1" * 40, "2" * 40


class FakeHub(ThreadingHTTPServer):
    """`commits` of the one repository `name`: {commit: {file: bytes}}. `behaviour` is "serve", a status as a word,
    or one of the troubles below."""

    daemon_threads = True

    def __init__(self, name: str, commits: dict[str, dict[str, bytes]]):
        self.name, self.commits, self.newest, self.behaviour = name, commits, FIRST, "serve"
        self.stop = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # a client that has gone

    def close(self) -> None:
        self.stop.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body: bytes | list | dict = b"", status: int = 200, length=None, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        size = len(raw) if length is None else length
        own = {"Content_Length": str(size), "X_Repo_Commit": self.server.newest}
        for key, value in (own | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_CONNECT(self):
        self.reply(status=403)

    def do_GET(self):
        hub, path = self.server, unquote(self.path).split("?")[0]
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.behaviour == "stall":
            hub.stop.wait(100)
        elif hub.behaviour.isdigit():
            self.reply(status=int(hub.behaviour))
        elif hub.behaviour == "bad token" and self.headers["Authorization"]:
            self.reply(status=401, X_Error_Message="Invalid credentials in Authorization header")
        elif hub.name not in path:
            self.reply(status=404, X_Error_Code="RepoNotFound")
        elif "/resolve/" in path:
            commit, _, name = path.split("/resolve/")[1].partition("/")
            self.send_file(hub.commits[commit if commit in hub.commits else hub.newest].get(name))
        else:
            self.tell(path, asked)

    do_HEAD = do_POST = do_GET

    def send_file(self, data: bytes | None) -> None:
        if data is None:
            return self.reply(status=404, X_Error_Code="EntryNotFound")
        first, last, status, behaviour = 0, len(data) - 1, 200, self.server.behaviour
        if self.headers["Range"]:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            status = 206
        if behaviour == "nothing after the first part" and first > 0:
            return self.reply(status=status)
        part = data[first : last + 1]
        is_cut = self.command == "GET" and behaviour in ("stall body", "truncate")
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        self.reply(part[:100] if is_cut else part, status, len(part), **about)
        if is_cut and behaviour == "stall body":
            self.server.stop.wait(100)
        self.close_connection |= is_cut

    def tell(self, path: str, asked: bytes) -> None:
        commit = next((c for c in self.server.commits if c in path), self.server.newest)
        files = self.server.commits[commit]
        sha1 = {name: hashlib.sha1(raw).hexdigest() for name, raw in files.items()}
        facts = [{"type": "file", "path": p, "size": len(files[p]), "oid": oid} for p, oid in sha1.items()]
        facts.append({"type": "directory", "path": "data", "oid": "0" * 40})
        if "/paths-info/" in path:
            wanted = json.loads(asked) if asked.startswith(b"{") else parse_qs(asked.decode())
            self.reply([fact for fact in facts if fact["path"] in wanted["paths"]])
        elif "/tree/" in path:
            below = f"{path.split(f'/tree/{commit}')[1].strip('/')}/".lstrip("/")
            is_deep = "recursive=true" in self.path.lower()
            inside = [fact for fact in facts if fact["path"].startswith(below)]
            self.reply([f for f in inside if is_deep or "/" not in f["path"].removeprefix(below)])
        else:
            about = {"id": self.server.name, "sha": commit, "private": False, "tags": [], "downloads": 0}
            self.reply(about | {"siblings": [{"rfilename": name} for name in files]})
