"""Dashboards and alerts can be understood: by Grafana, and by whoever they wake."""

from itertools import combinations

import pytest

from service import links
from tests.monitoring import DEPLOY, EVERY_NAMESPACE, alerts, dashboard, panels, selectors_in

DOCS = (DEPLOY.parent / "docs/monitoring.md").read_text()


@pytest.mark.parametrize("name", ["operators", "job"])
def test_a_dashboard_is_one_that_grafana_lays_out(name: str) -> None:
    board = dashboard(name)
    assert [variable["name"] for variable in board["templating"]["list"]][:1] == ["datasource"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels(board):
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["title"]
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_links_lead_to_the_dashboard_of_a_job() -> None:
    assert dashboard("job")["uid"] == links.DASHBOARD
    assert "job" in {variable["name"] for variable in dashboard("job")["templating"]["list"]}


def test_operators_look_at_all_namespaces_or_at_one() -> None:
    """Releases that one Prometheus watches must not be added up unseen; without Kubernetes there is no such label."""
    board = dashboard("operators")
    (variable,) = (each for each in board["templating"]["list"] if each["name"] == "namespace")
    assert (variable["includeAll"], variable["allValue"]) == (True, EVERY_NAMESPACE)
    for panel in panels(board):
        for target in panel["targets"]:
            for selector in selectors_in(target["expr"].replace("$__rate_interval", "1m")):
                assert '{namespace=~"$namespace"' in selector, panel["title"]


def test_each_alert_says_what_happened_and_the_page_says_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"].keys() == {"summary", "description"}, name
        assert f"| `{name}` |" in DOCS, name


def test_what_a_query_looks_at_is_told_from_its_functions_and_labels() -> None:
    query = 'sum by (le, route) (rate(a_total{b="c", d=~"e.*"}[5m])) / on (x) (max(f) or vector(0)) > bool 1.5'
    assert selectors_in(query) == {'a_total{b="c", d=~"e.*"}', "f"}
