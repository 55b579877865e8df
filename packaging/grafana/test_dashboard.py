"""Checks the dashboard against Grafana's dashboard schema (kinds/dashboard in grafana/grafana,
schemaVersion 39, which Grafana 10.4 and later load), and its queries against metrics.txt."""

import json
import pathlib
import re
import unittest

HERE = pathlib.Path(__file__).resolve().parent
DASHBOARD = json.loads((HERE / "supernode.json").read_text())
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

TEXT, NUMBER, INTEGER, BOOLEAN = str, (int, float), int, bool
# The keys of each object: type, and whether the key is required.
SCHEMA = {
    "dashboard": {
        "uid": (TEXT, True), "title": (TEXT, True), "description": (TEXT, False),
        "tags": (list, False),
        "timezone": (TEXT, False), "editable": (BOOLEAN, True), "graphTooltip": (INTEGER, True),
        "schemaVersion": (INTEGER, True),
        "version": (INTEGER, False), "refresh": (TEXT, False), "time": (dict, True),
        "links": (list, False),
        "annotations": (dict, False), "templating": (dict, True), "panels": (list, True),
    },
    "row": {
        "id": (INTEGER, True), "type": (TEXT, True), "title": (TEXT, True),
        "gridPos": (dict, True), "collapsed": (BOOLEAN, True),
        "panels": (list, True),
    },
    "panel": {
        "id": (INTEGER, True), "type": (TEXT, True), "title": (TEXT, True),
        "description": (TEXT, False),
        "gridPos": (dict, True), "datasource": (dict, True), "targets": (list, True),
        "fieldConfig": (dict, True),
        "options": (dict, True), "transformations": (list, False),
    },
    "target": {
        "refId": (TEXT, True), "datasource": (dict, True), "expr": (TEXT, True),
        "legendFormat": (TEXT, True),
        "instant": (BOOLEAN, True), "range": (BOOLEAN, True), "format": (TEXT, False),
    },
    "gridPos": {key: (INTEGER, True) for key in "xywh"},
    "fieldConfig": {"defaults": (dict, True), "overrides": (list, True)},
    "defaults": {
        "unit": (TEXT, False), "decimals": (NUMBER, False), "min": (NUMBER, False),
        "max": (NUMBER, False),
        "noValue": (TEXT, False), "color": (dict, False), "thresholds": (dict, False),
        "mappings": (list, False),
        "custom": (dict, False),
    },
    "thresholds": {"mode": (TEXT, True), "steps": (list, True)},
    "variable": {
        "type": (TEXT, True), "name": (TEXT, True), "label": (TEXT, False),
        "query": ((str, dict), True),
        "datasource": (dict, False), "hide": (INTEGER, False), "refresh": (INTEGER, False),
        "sort": (INTEGER, False),
        "regex": (TEXT, False), "multi": (BOOLEAN, False), "includeAll": (BOOLEAN, False),
        "allValue": (TEXT, False),
        "options": (list, False), "current": (dict, False), "skipUrlSync": (BOOLEAN, False),
    },
}
VALUES = {
    "panel": {"stat", "table", "timeseries", "state-timeline"},
    "variable": {
        "query", "adhoc", "constant", "datasource", "interval", "textbox", "custom", "system",
    },
    "color": {"thresholds", "palette-classic", "fixed"},
    "unit": {"none", "s", "percentunit", "celsius", "watt"},
}


def metrics():
    """The labels of each metric in metrics.txt, by name."""
    table = {}
    for line in (HERE / "metrics.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, kind, labels, _help = line.split(None, 3)
            assert name not in table and (kind == "counter") == name.endswith("_total"), name
            table[name] = set(labels.split(",")) - {"-"}
    return table


class Dashboard(unittest.TestCase):
    def assert_schema(self, name, thing):
        schema = SCHEMA[name]
        where = f"{name} {thing.get('title', thing.get('name', ''))}".strip()
        self.assertLessEqual(thing.keys(), schema.keys(), where)
        for key, (kind, required) in schema.items():
            self.assertTrue(key in thing or not required, f"{where}: no {key}")
            if key in thing:
                self.assertIsInstance(thing[key], kind, f"{where}: {key}")
                # In Python a bool is an int; in the schema it is not.
                self.assertEqual(isinstance(thing[key], bool), kind is BOOLEAN, f"{where}: {key}")

    def panels(self):
        return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

    def test_dashboard_matches_the_schema(self):
        self.assert_schema("dashboard", DASHBOARD)
        self.assertEqual(DASHBOARD["schemaVersion"], 39)
        self.assertRegex(DASHBOARD["uid"], r"^[a-z-]{8,40}$")
        self.assertIn(DASHBOARD["graphTooltip"], (0, 1, 2))
        self.assertEqual(DASHBOARD["time"].keys(), {"from", "to"})
        for variable in DASHBOARD["templating"]["list"]:
            self.assert_schema("variable", variable)
            self.assertIn(variable["type"], VALUES["variable"])

    def test_panels_match_the_schema(self):
        for panel in DASHBOARD["panels"]:
            self.assert_schema("row" if panel["type"] == "row" else "panel", panel)
            self.assert_schema("gridPos", panel["gridPos"])
        for panel in self.panels():
            self.assertIn(panel["type"], VALUES["panel"])
            self.assert_schema("fieldConfig", panel["fieldConfig"])
            defaults = panel["fieldConfig"]["defaults"]
            self.assert_schema("defaults", defaults)
            self.assertIn(defaults.get("unit", "none"), VALUES["unit"])
            self.assertIn(defaults.get("color", {"mode": "fixed"})["mode"], VALUES["color"])
            if "thresholds" in defaults:
                self.assert_schema("thresholds", defaults["thresholds"])
                # The first step starts at minus infinity (null in JSON); the others ascend.
                first, *others = [step["value"] for step in defaults["thresholds"]["steps"]]
                self.assertEqual((first, others), (None, sorted(others)))
            for mapping in defaults.get("mappings", []):
                self.assertEqual((mapping["type"], mapping.keys()), ("value", {"type", "options"}))
            for target in panel["targets"]:
                self.assert_schema("target", target)

    def test_ids_are_unique_and_panels_do_not_overlap(self):
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        self.assertEqual(len(ids), len(set(ids)))
        taken = {}
        for panel in DASHBOARD["panels"]:
            place = panel["gridPos"]
            self.assertTrue(0 <= place["x"] and place["x"] + place["w"] <= 24)
            self.assertTrue(place["w"] > 0 and place["h"] > 0)
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    self.assertNotIn((x, y), taken, panel["title"])
                    taken[x, y] = panel["title"]

    def test_every_query_uses_the_selected_datasource(self):
        datasource, instance = DASHBOARD["templating"]["list"]
        self.assertEqual(
            (datasource["type"], datasource["name"], datasource["query"]),
            ("datasource", "datasource", "prometheus"),
        )
        self.assertEqual((instance["name"], instance["datasource"]), ("instance", DATASOURCE))
        for panel in self.panels():
            self.assertEqual(panel["datasource"], DATASOURCE)
            for target in panel["targets"]:
                self.assertEqual(target["datasource"], DATASOURCE)

    def test_queries_use_every_metric_with_its_labels(self):
        table, queried = metrics(), set()
        variable = DASHBOARD["templating"]["list"][1]["query"]["query"]
        for where, query, legend in [("variable", variable, "")] + [
            (panel["title"], target["expr"], target["legendFormat"])
            for panel in self.panels()
            for target in panel["targets"]
        ]:
            names = set(re.findall(r"\bsupernode_\w+", query))
            self.assertTrue(names and names <= table.keys(), f"{where}: {names - table.keys()}")
            labels = set().union(*(table[name] for name in names)) | {"instance", "job"}
            used = re.findall(r"\b(\w+)\s*(?:=~|!=|!~|=)\s*\"", query)
            used += re.findall(r"{{(\w+)}}", legend)
            for group in re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", query):
                used += group.split(", ")
            self.assertLessEqual(set(used), labels, where)
            queried |= names
        self.assertEqual(queried, table.keys())


if __name__ == "__main__":
    unittest.main()
