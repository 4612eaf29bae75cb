"""A stand-in for the hub: as much of its HTTP as making a repository, committing to it and fetching from it takes.

`python -m tests.unit.hub_server` serves on a free port, prints its address, and keeps everything in memory.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORIES: dict[str, list[dict[str, bytes]]] = {}  # every commit's files


def commit_of(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def told(self, values: Any) -> None:
        self.answer(200, json.dumps(values).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = "/".join(filter(None, (values.get("organization"), values["name"])))
            REPOSITORIES.setdefault(name, [{}])
            self.told({"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.told({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.told({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            commits = REPOSITORIES[found[1]]
            lines = [json.loads(line) for line in body.splitlines()]
            new = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
            files = {path: base64.b64decode(value["content"]) for path, value in new.items()}
            commits.append({**commits[-1], **files})
            commit = commit_of(found[1], len(commits))
            self.told(
                {
                    "success": True,
                    "commitOid": commit,
                    "commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{commit}",
                }
            )
        else:
            self.answer(404)

    def do_GET(self) -> None:
        name = next((name for name in REPOSITORIES if f"/{name}/" in f"{self.path}/"), None)
        if name is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        commits = REPOSITORIES[name]
        commit = commit_of(name, len(commits))
        if self.path.startswith("/api/models/"):
            self.told({"id": name, "sha": commit, "siblings": []})
            return
        file = commits[-1].get(self.path.split("/resolve/")[-1].partition("/")[2])
        if file is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
        else:
            self.answer(200, file, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(file).hexdigest()}"')

    do_HEAD = do_GET

    def log_message(self, *_arguments: Any) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
