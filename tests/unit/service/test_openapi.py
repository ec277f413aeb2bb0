"""The OpenAPI document in the tree is the one that the routes make."""

import json
from pathlib import Path

from service.app import make_api


def test_the_checked_in_document_does_not_drift() -> None:
    checked_in = json.loads((Path(__file__).parents[3] / "api" / "openapi.json").read_text())
    assert checked_in == json.loads(json.dumps(make_api(0).openapi())), "run `make openapi`"
