"""The alerts as Prometheus itself understands them: which fire, and when."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.chart.chart import Object, named, objects_of

WELL = {
    "lockstep_reconcile_timestamp_seconds": "0+30x400",
    'lockstep_dependency_up{dependency="bucket"}': "1x400",
    'lockstep_dependency_up{dependency="ray"}': "1x400",
    "lockstep_queue_oldest_seconds": "100x400",
    'lockstep_jobs{state="failed"}': "5x400",
    'lockstep_jobs{state="queued"}': "0+1x400",
}
"""Two hours of what a control plane tells each half minute, while nothing is wrong."""

CASES: list[tuple[dict[str, str], list[str]]] = [
    ({}, []),
    ({"lockstep_reconcile_timestamp_seconds": "0+30x190 5700x210"}, ["LockstepReconcileLag"]),
    ({'lockstep_dependency_up{dependency="ray"}': "1x200 0x200"}, ["LockstepDependencyDown"]),
    ({"lockstep_queue_oldest_seconds": "0x100 0+30x300"}, ["LockstepQueueStands"]),
    ({'lockstep_jobs{state="failed"}': "5x190 6x10 8x300"}, ["LockstepJobsFail"]),
    ({'lockstep_jobs{state="failed"}': "5x190 6x10 7x300"}, []),
    (dict.fromkeys(WELL, "stale"), ["LockstepControlPlaneGone"]),
]


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: Debian's package `prometheus` has it")
    return found


@pytest.mark.parametrize(("change", "firing"), CASES, ids=lambda case: str(case)[:60])
def test_alerts_fire_when_and_only_when_something_is_wrong(
    change: dict[str, str], firing: list[str], promtool: str, tmp_path: Path
) -> None:
    (rule,) = named(objects_of("monitoring"), "PrometheusRule").values()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(_case(WELL | change, firing)), encoding="utf-8")
    subprocess.run([promtool, "check", "rules", "rules.yaml"], cwd=tmp_path, check=True)
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _case(series: dict[str, str], firing: list[str]) -> Object:
    """Return what `promtool test rules` reads: series of two replicas, and the alerts after 110 minutes."""
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing]
    expected = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "110m"}
    return {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "30s",
        "tests": [
            {
                "interval": "30s",
                "input_series": [
                    {"series": _of_pod(name, pod), "values": values}
                    for name, values in series.items()
                    for pod in ("lockstep-1", "lockstep-2")
                ],
                "promql_expr_test": [expected | {"exp_samples": samples}],
            }
        ],
    }


def _of_pod(series: str, pod: str) -> str:
    name, _, labels = series.rstrip("}").partition("{")
    return f'{name}{{namespace="ml",pod="{pod}"{"," if labels else ""}{labels}}}'
