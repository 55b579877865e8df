"""The dashboard against what Grafana's dashboard schema asks for (kinds/dashboard in grafana/grafana, schemaVersion 39, which
Grafana 10.4 and later load), and its queries against metrics.txt."""

import json
import pathlib
import re
import unittest

HERE = pathlib.Path(__file__).resolve().parent
DASHBOARD = json.loads((HERE / "supernode.json").read_text())
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

TEXT, NUMBER, WHOLE, TRUTH = str, (int, float), int, bool
# What each object may have: its type, and whether it must be there.
FORMS = {
    "dashboard": {
        "uid": (TEXT, True), "title": (TEXT, True), "description": (TEXT, False), "tags": (list, False),
        "timezone": (TEXT, False), "editable": (TRUTH, True), "graphTooltip": (WHOLE, True), "schemaVersion": (WHOLE, True),
        "version": (WHOLE, False), "refresh": (TEXT, False), "time": (dict, True), "links": (list, False),
        "annotations": (dict, False), "templating": (dict, True), "panels": (list, True),
    },
    "row": {
        "id": (WHOLE, True), "type": (TEXT, True), "title": (TEXT, True), "gridPos": (dict, True), "collapsed": (TRUTH, True),
        "panels": (list, True),
    },
    "panel": {
        "id": (WHOLE, True), "type": (TEXT, True), "title": (TEXT, True), "description": (TEXT, False),
        "gridPos": (dict, True), "datasource": (dict, True), "targets": (list, True), "fieldConfig": (dict, True),
        "options": (dict, True), "transformations": (list, False),
    },
    "target": {
        "refId": (TEXT, True), "datasource": (dict, True), "expr": (TEXT, True), "legendFormat": (TEXT, True),
        "instant": (TRUTH, True), "range": (TRUTH, True), "format": (TEXT, False),
    },
    "gridPos": {"x": (WHOLE, True), "y": (WHOLE, True), "w": (WHOLE, True), "h": (WHOLE, True)},
    "fieldConfig": {"defaults": (dict, True), "overrides": (list, True)},
    "defaults": {
        "unit": (TEXT, False), "decimals": (NUMBER, False), "min": (NUMBER, False), "max": (NUMBER, False),
        "noValue": (TEXT, False), "color": (dict, False), "thresholds": (dict, False), "mappings": (list, False),
        "custom": (dict, False),
    },
    "thresholds": {"mode": (TEXT, True), "steps": (list, True)},
    "variable": {
        "type": (TEXT, True), "name": (TEXT, True), "label": (TEXT, False), "query": ((str, dict), True),
        "datasource": (dict, False), "hide": (WHOLE, False), "refresh": (WHOLE, False), "sort": (WHOLE, False),
        "regex": (TEXT, False), "multi": (TRUTH, False), "includeAll": (TRUTH, False), "allValue": (TEXT, False),
        "options": (list, False), "current": (dict, False), "skipUrlSync": (TRUTH, False),
    },
}
WORDS = {
    "panel": {"stat", "table", "timeseries", "state-timeline"},
    "variable": {"query", "adhoc", "constant", "datasource", "interval", "textbox", "custom", "system"},
    "color": {"thresholds", "palette-classic", "fixed"},
    "unit": {"none", "s", "percentunit", "celsius", "watt"},
}


def metrics():
    """name -> labels, as metrics.txt has them."""
    table = {}
    for line in (HERE / "metrics.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, kind, labels, _help = line.split(None, 3)
            assert name not in table and (kind == "counter") == name.endswith("_total"), name
            table[name] = set(labels.split(",")) - {"-"}
    return table


class Dashboard(unittest.TestCase):
    def has_form(self, name, thing):
        form = FORMS[name]
        where = f"{name} {thing.get('title', thing.get('name', ''))}".strip()
        self.assertLessEqual(thing.keys(), form.keys(), where)
        for key, (kind, needed) in form.items():
            self.assertTrue(key in thing or not needed, f"{where}: no {key}")
            if key in thing:
                self.assertIsInstance(thing[key], kind, f"{where}: {key}")
                # For Python true is a whole number, for the schema it is none.
                self.assertEqual(isinstance(thing[key], bool), kind is TRUTH, f"{where}: {key}")

    def panels(self):
        return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

    def test_the_dashboard_has_the_form_of_the_schema(self):
        self.has_form("dashboard", DASHBOARD)
        self.assertEqual(DASHBOARD["schemaVersion"], 39)
        self.assertRegex(DASHBOARD["uid"], r"^[a-z-]{8,40}$")
        self.assertIn(DASHBOARD["graphTooltip"], (0, 1, 2))
        self.assertEqual(DASHBOARD["time"].keys(), {"from", "to"})
        for variable in DASHBOARD["templating"]["list"]:
            self.has_form("variable", variable)
            self.assertIn(variable["type"], WORDS["variable"])

    def test_the_panels_have_the_form_of_the_schema(self):
        for panel in DASHBOARD["panels"]:
            self.has_form("row" if panel["type"] == "row" else "panel", panel)
            self.has_form("gridPos", panel["gridPos"])
        for panel in self.panels():
            self.assertIn(panel["type"], WORDS["panel"])
            self.has_form("fieldConfig", panel["fieldConfig"])
            defaults = panel["fieldConfig"]["defaults"]
            self.has_form("defaults", defaults)
            self.assertIn(defaults.get("unit", "none"), WORDS["unit"])
            self.assertIn(defaults.get("color", {"mode": "fixed"})["mode"], WORDS["color"])
            if "thresholds" in defaults:
                self.has_form("thresholds", defaults["thresholds"])
                # The first begins at minus infinity, which JSON writes null; the others follow in order.
                first, *others = [step["value"] for step in defaults["thresholds"]["steps"]]
                self.assertEqual((first, others), (None, sorted(others)))
            for mapping in defaults.get("mappings", []):
                self.assertEqual((mapping["type"], mapping.keys()), ("value", {"type", "options"}))
            for target in panel["targets"]:
                self.has_form("target", target)

    def test_ids_are_unique_and_no_panel_lies_on_another(self):
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        self.assertEqual(len(ids), len(set(ids)))
        taken = {}
        for panel in DASHBOARD["panels"]:
            place = panel["gridPos"]
            self.assertTrue(0 <= place["x"] and place["w"] > 0 and place["x"] + place["w"] <= 24 and place["h"] > 0)
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    self.assertNotIn((x, y), taken, panel["title"])
                    taken[x, y] = panel["title"]

    def test_every_query_goes_to_the_chosen_prometheus(self):
        datasource, instance = DASHBOARD["templating"]["list"]
        self.assertEqual((datasource["type"], datasource["name"], datasource["query"]), ("datasource", "datasource", "prometheus"))
        self.assertEqual((instance["name"], instance["datasource"]), ("instance", DATASOURCE))
        for panel in self.panels():
            self.assertEqual(panel["datasource"], DATASOURCE)
            for target in panel["targets"]:
                self.assertEqual(target["datasource"], DATASOURCE)

    def test_queries_have_the_metrics_of_the_table_and_their_labels_and_all_of_them(self):
        table, asked = metrics(), set()
        variable = DASHBOARD["templating"]["list"][1]["query"]["query"]
        for where, query, legend in [("variable", variable, "")] + [
            (panel["title"], target["expr"], target["legendFormat"]) for panel in self.panels() for target in panel["targets"]
        ]:
            names = set(re.findall(r"\bsupernode_\w+", query))
            self.assertTrue(names and names <= table.keys(), f"{where}: {names - table.keys()}")
            labels = set().union(*(table[name] for name in names)) | {"instance", "job"}
            used = re.findall(r"\b(\w+)\s*(?:=~|!=|!~|=)\s*\"", query) + re.findall(r"{{(\w+)}}", legend)
            used += [label for group in re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", query) for label in group.split(", ")]
            self.assertLessEqual(set(used), labels, where)
            asked |= names
        self.assertEqual(asked, table.keys())


if __name__ == "__main__":
    unittest.main()
