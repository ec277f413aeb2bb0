"""Ray's Jobs API over HTTP: submit, look up, stop; and the nodes of the cluster. The only file that speaks to Ray.

REST instead of Ray's own client: every call has a bounded time, and the control plane needs no Ray installed
(docs/adr/0002).
"""

from pathlib import Path
from typing import Any, TypeVar

import httpx2
from pydantic import AliasPath, BaseModel, Field, ValidationError

from api.errors import LockstepError
from service.admission import Node
from service.lifecycle import RayStatus

_STATUS = {
    "PENDING": RayStatus.PENDING,
    "RUNNING": RayStatus.RUNNING,
    "SUCCEEDED": RayStatus.SUCCEEDED,
    "FAILED": RayStatus.FAILED,
    "STOPPED": RayStatus.STOPPED,
}


AnswerT = TypeVar("AnswerT", bound=BaseModel)


class _Version(BaseModel):
    session_name: str


class _Node(BaseModel):
    node_id: str
    state: str
    resources_total: dict[str, float] | None = None


class _Nodes(BaseModel):
    rows: list[_Node] = Field(validation_alias=AliasPath("data", "result", "result"))


class _Submission(BaseModel):
    status: str
    message: str | None = None


class RayUnreachable(LockstepError):
    """Ray did not answer, or not in a way from which anything follows about a job."""


class RayBackend:
    """One Ray cluster. Every method raises RayUnreachable when no usable answer came."""

    def __init__(
        self,
        address: str,
        token_path: Path | None,
        timeout: float,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._token_path = token_path
        self._address = address.rstrip("/")
        self._client = httpx2.Client(base_url=self._address, timeout=timeout, transport=transport, trust_env=False)

    def session(self) -> str:
        """Return the name of Ray's present session; a Ray that was restarted has another."""
        return self._parsed(self._request("GET", "/api/version"), _Version).session_name

    def nodes(self) -> list[Node]:
        """Return the living nodes and what each has in all."""
        answer = self._parsed(self._request("GET", "/api/v0/nodes?limit=10000"), _Nodes)
        return [
            Node(row.node_id, {k: v for k, v in (row.resources_total or {}).items() if k in ("CPU", "GPU", "memory")})
            for row in answer.rows
            if row.state == "ALIVE"
        ]

    def status(self, submission_id: str) -> tuple[RayStatus, str]:
        """Return what Ray says of a submission, and its message."""
        response = self._request("GET", f"/api/jobs/{submission_id}")
        if response.status_code == 404:
            return RayStatus.ABSENT, "Ray does not know it"
        answer = self._parsed(response, _Submission)
        if answer.status not in _STATUS:
            raise RayUnreachable(
                f"Ray at {self._address} gives {submission_id} a status we do not know: {answer.status}"
            )
        return _STATUS[answer.status], answer.message or ""

    def submit(self, body: dict[str, Any]) -> None:
        """Post a submission. Ray answers a duplicate id with a 500, so no error here proves that it was not taken."""
        self._checked(self._request("POST", "/api/jobs/", json=body))

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end a submission by force."""
        response = self._request("POST", f"/api/jobs/{submission_id}/stop")
        if response.status_code != 404:  # what Ray does not know is stopped
            self._checked(response)

    def close(self) -> None:
        self._client.close()

    def _request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self._token()}"} if self._token_path else {}
        try:
            response = self._client.request(method, path, headers=headers, **options)
        except httpx2.HTTPError as error:
            raise RayUnreachable(f"Ray at {self._address} did not answer ({type(error).__name__})") from error
        if response.status_code in (401, 403):
            raise RayUnreachable(f"Ray at {self._address} refused our token; check LOCKSTEP_RAY_TOKEN_PATH")
        return response

    def _checked(self, response: httpx2.Response) -> None:
        if response.status_code != 200:
            raise RayUnreachable(f"Ray at {self._address} answered {response.status_code}: {response.text[:300]}")

    def _parsed(self, response: httpx2.Response, kind: type[AnswerT]) -> AnswerT:
        self._checked(response)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise RayUnreachable(f"Ray at {self._address} answered with something that makes no sense") from error

    def _token(self) -> str:
        assert self._token_path is not None
        try:
            return self._token_path.read_text().strip()
        except OSError as error:
            raise RayUnreachable(f"Ray's token file cannot be read: {error}") from error
