"""The little of a Kubernetes API that Helm asks for before it installs: what kinds there are, and a few Secrets."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from tests.chart.chart import NAMESPACE, RELEASE, Object

Secrets = dict[str, dict[str, str]]


@contextmanager
def api_server(kinds: set[tuple[str, str]], secrets: Secrets) -> Iterator[str]:
    """Serve kinds (apiVersion, kind) and Secrets, on loopback, and give a kubeconfig for it."""
    answers = discovery(kinds) | {
        f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}": secret(name, values) for name, values in secrets.items()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answer = answers.get(path)
            # An empty description of all kinds is one in which nothing can be wrong.
            body = b"" if path == "/openapi/v2" else json.dumps(answer or {"kind": "Status", "code": 404}).encode()
            self.send_response(200 if answer or not body else 404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield kubeconfig(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def discovery(kinds: set[tuple[str, str]]) -> dict[str, Object]:
    """Return the answers that say which kinds there are."""
    versions = sorted({version for version, _ in kinds} - {"v1"})
    groups = [
        {
            "name": version.partition("/")[0],
            "versions": [{"groupVersion": version, "version": version.partition("/")[2]}],
        }
        for version in versions
    ]
    return {
        "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        **{f"/{'api' if v == 'v1' else 'apis'}/{v}": resources(v, kinds) for v in ("v1", *versions)},
    }


def resources(version: str, kinds: set[tuple[str, str]]) -> Object:
    names = [kind for of, kind in sorted(kinds) if of == version]
    return {
        "kind": "APIResourceList",
        "groupVersion": version,
        "resources": [
            {"name": plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get"]}
            for kind in names
        ],
    }


def plural(kind: str) -> str:
    word = kind.lower()
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def secret(name: str, values: dict[str, str]) -> Object:
    """Return a Secret as an installation of the release has left it."""
    metadata = {
        "name": name,
        "namespace": NAMESPACE,
        "labels": {"app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE},
    }
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}


def kubeconfig(url: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "here",
        }
    )
