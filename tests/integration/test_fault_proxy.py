"""The proxy that makes the faults: it changes nothing but what it is told to, here or in a process of its own."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.storage import Bucket, Timeouts
from tests.faults.proxy import fault_proxy
from tests.faults.waiting import wait_until
from tests.servers import S3
from workers.patience import PatientBucket

TIMEOUTS = Timeouts(connect=5.0, read=10.0, attempts=2)
MIB = 2**20


def test_a_proxy_without_faults_changes_nothing(s3_server: S3, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        bucket, body = Bucket(storage), random.Random(0).randbytes(2 * MIB)
        for key in ("ünïcode/–/ключ", "a+b&c=d%20e"):
            bucket.put(key, body)
            assert bucket.get(key) == body
            assert bucket.get_range(key, MIB, 100) == body[MIB : MIB + 100]
            assert bucket.size(key) == len(body)
        assert [item.key for item in bucket.objects("")] == ["a+b&c=d%20e", "ünïcode/–/ключ"]
        bucket.delete(["a+b&c=d%20e", "ünïcode/–/ключ"])
        assert bucket.objects("") == []
        assert not proxy.counts


def test_a_proxy_of_its_own_does_what_its_file_says(
    s3_server: S3, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, counts = tmp_path / "control", tmp_path / "control.counts"

    def say(**wish: Any) -> None:
        (tmp_path / "partial").write_text(json.dumps(wish))
        (tmp_path / "partial").rename(control)

    say(faults=[{"kind": "error", "times": 1}])
    command = [sys.executable, "-m", "tests.faults.proxy", "--upstream", s3_server.endpoint, "--control", str(control)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", process.stdout.readline().strip())
            bucket = PatientBucket(storage, timeouts=TIMEOUTS)
            bucket.put("a", b"here")
            wait_until(lambda: json.loads(counts.read_text())["faults"] == {"error": 1})
            say(away=True)
            wait_until(lambda: not bucket.answers())
            say()
            wait_until(bucket.answers)
            assert bucket.get("a") == b"here"
        finally:
            process.kill()
