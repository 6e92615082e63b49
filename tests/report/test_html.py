from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from stillhouse import report
from stillhouse.errors import RunFolderError
from stillhouse.report.html import render
from stillhouse.report.sections import make_report

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"
VOID = {"meta", "img", "br", "hr", "input", "link", "line", "rect", "path", "circle"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data + " "

    def headings(self) -> list[str]:
        return re.findall(r"\S.*", self.text)


@pytest.fixture
def whole(run_folder):
    return run_folder(
        run=run_folder.summary(), log=run_folder.log_lines(), recipe=run_folder.recipe, alone=True
    )


def test_every_section_is_there(whole):
    path = report.write(whole)
    assert path == whole / "report.html"
    text = Page(path.read_text()).text
    for expected in (
        "Result", "Pictures", "Cost", "How the student answers", "Curves: teacher",
        "Curves: student", "What was done", "The complete recipe", "Warnings",
        "Agreement with the teacher", "Confusion", "Calibration, student", "Heads",
        "A compressed prompt", "gradient cosine", "learning rate", "digits (scikit-learn)",
        "asking the teacher", "62 %", "58 %", "rows a second", "612 MiB",
    ):  # fmt: skip
        assert expected in text, expected
    assert "0.9550" in text
    assert "± 0.0099" in text


def test_one_file_that_asks_nothing_of_the_network_and_runs_nothing(whole):
    source = render(whole)
    page = Page(source)
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href"}:
                assert value.startswith("data:image/png;base64,")
    assert "http://" not in source.replace("http-equiv", "")
    assert "https://" not in source
    assert "@import" not in source
    assert "url(" not in source
    for scheme in ("prefers-color-scheme: dark", 'name="viewport"'):
        assert scheme in source


def hostile(value):
    """The same document with every string made hostile."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(v) for v in value]
    if isinstance(value, dict):
        kept = {"event", "step", "state", "metric", "png_base64", "kind"}
        return {k: v if k in kept else hostile(v) for k, v in value.items()}
    return value


def test_hostile_strings_are_only_text(run_folder):
    run = hostile(run_folder.summary())
    run["sides"] = {
        HOSTILE: {"0": {"accuracy": 0.5, HOSTILE: 1.0}},
        **run_folder.summary()["sides"],
    }
    run["sizes"][HOSTILE] = {"parameters": 3}
    run["versions"] = {HOSTILE: HOSTILE}
    run["details"]["agreement"] = {HOSTILE: 0.5}
    log = [hostile(event) for event in run_folder.log_lines()]
    for event in log:
        if "terms" in event:
            event["terms"] = {HOSTILE: 1.0, "b": 2.0}
            event["notes"] = {HOSTILE: 0.5}
        if "scores" in event:
            event["scores"] = {HOSTILE: 0.5}
    recipe = f"method: kd\n# {HOSTILE} </pre><img src=x onerror=alert(1)>\n"
    source = render(run_folder(run=run, log=log, recipe=recipe))
    page = Page(source)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert all(a.get("src", "data:").startswith("data:") for t, a in page.tags if t == "img")
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count("<script>alert('x')</script>\"'&{{ 7 * 7 }}") > 20
    assert "onerror=alert(1)" in page.text


def test_a_run_that_was_stopped_has_a_report(run_folder):
    torn = "".join(json.dumps(e) + "\n" for e in run_folder.log_lines()[:20]) + '{"event": "st'
    page = Page(render(run_folder(log=torn, recipe=run_folder.recipe)))
    assert "not finished; last seen in stage teacher, step 300" in page.text
    assert "loss terms" in page.text
    for absent in ("Result", "Pictures", "Cost", "Confusion", "Warnings", "nan"):
        assert absent not in page.text


@pytest.mark.parametrize("log", [None, "", "\n\n", '{"event": "st'])
def test_empty_logs(run_folder, log):
    page = Page(render(run_folder(log=log, recipe=run_folder.recipe)))
    assert "no stage has begun" in page.text
    assert "Curves" not in page.text


def test_one_seed_has_no_interval(run_folder):
    page = Page(render(run_folder(run=run_folder.summary(seeds=1), recipe=run_folder.recipe)))
    assert "One seed, so there is no interval." in page.text
    assert "±" not in page.text
    assert "one seed, which says nothing about other seeds" in page.text
    assert "better" not in page.text


def test_nothing_but_a_recipe(run_folder):
    page = Page(render(run_folder(recipe=run_folder.recipe)))
    assert "kd" in page.text
    assert "stillhouse:small_cnn_teacher; trained as a stage" in page.text


def test_missing_parts_leave_their_section_out(run_folder):
    sections = {
        "teacher_share": "The teacher took",
        "store_saving": "A store of its outputs",
        "sizes": "Size and speed",
        "stages": "Time by stage",
    }
    details = {
        "confusion": "Most often confused",
        "calibration": "Calibration",
        "agreement": "Agreement with the teacher",
        "images": "Pictures",
        "tables": "Heads",
        "texts": "A compressed prompt",
    }
    for number, (key, sign) in enumerate({**sections, **details}.items()):
        whole, lacking = run_folder.summary(), run_folder.summary()
        del (lacking if key in sections else lacking["details"])[key]
        there = render(run_folder(f"whole-{number}", run=whole))
        absent = render(run_folder(f"lacking-{number}", run=lacking))
        assert sign in there
        assert sign not in absent
    bare = Page(render(run_folder("bare", run={"schema": 1, "method": "kd"})))
    assert "What was done" in bare.text
    for word in ("None", "nan", "null"):
        assert word not in bare.text


@pytest.mark.parametrize(
    "nonsense",
    [
        {"sides": []}, {"sides": {"alone": 3}}, {"sides": {"alone": {"x": {"accuracy": 1}}}},
        {"sides": {"distilled": {"0": {"accuracy": None}}}}, {"sizes": {"student": "small"}},
        {"sizes": {"student": {"latency_ms": 3, "parameters": "x"}}}, {"stages": {"a": 1}},
        {"stages": [{"name": None, "seconds": "x"}]}, {"details": []},
        {"details": {"confusion": {"matrix": 3}}}, {"details": {"confusion": {"matrix": [[-1]]}}},
        {"details": {"confusion": {"labels": 3, "matrix": [[1, "x"], [1, 1]]}}},
        {"details": {"calibration": {"bins": 3}}}, {"details": {"calibration": {"bins": [3]}}},
        {"details": {"images": [3, {"title": "x"}]}}, {"details": {"tables": [{"rows": 3}]}},
        {"details": {"tables": [{"title": "t", "rows": [3, {"a": 1}, [None]]}]}},
        {"details": {"texts": [3, {}, "plain"]}}, {"details": {"agreement": [1]}},
        {"versions": 3, "data": "digits", "peak_mb": "x", "seconds": None},
        {"higher_is_better": "no", "metric": 7}, {"teacher_share": "half"},
    ],
)  # fmt: skip
def test_nonsense_never_breaks_the_page(run_folder, nonsense):
    Page(
        render(
            run_folder(
                run=run_folder.summary(**nonsense),
                log=run_folder.log_lines(),
                recipe=run_folder.recipe,
            )
        )
    )


def test_nan_in_figures_is_left_out(run_folder):
    run = run_folder.summary()
    run["sides"]["distilled"]["1"]["accuracy"] = math.nan
    found = make_report(run_folder(run=run))
    assert "nan" not in str(found.results)
    assert any("paired over 2 seeds" in text for text in found.findings)


def test_pictures_come_from_the_run_folder_only(run_folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(run_folder.png())
    images = [
        {"title": "inside", "path": "sheet.png"},
        {"title": "outside", "path": "../secret.png"},
        {"title": "absolute", "path": str(tmp_path / "secret.png")},
        {"title": "no picture", "path": "notes.png"},
        {"title": "gone", "path": "gone.png"},
        {"title": "bad text", "png_base64": "not base64!"},
        {"title": "svg", "png_base64": "PHN2Zz48L3N2Zz4="},
    ]
    run = run_folder.summary()
    run["details"]["images"] = images
    folder = run_folder(run=run)
    (folder / "sheet.png").write_bytes(run_folder.png())
    (folder / "notes.png").write_text("<svg onload=alert(1)>")
    found = make_report(folder)
    assert [picture.title for picture in found.pictures] == ["inside"]
    assert sum("is no PNG inside the run folder" in w for w in found.warnings) == 6


def test_findings_say_what_the_figures_bear_out(run_folder):
    better = make_report(
        run_folder(
            "better", run=run_folder.summary(), log=run_folder.log_lines(), recipe=run_folder.recipe
        )
    )
    assert any("better on this data" in text for text in better.findings)
    assert any("more training" in text and "per extra second" in text for text in better.findings)
    run = run_folder.summary()
    run["sides"]["alone"], run["sides"]["distilled"] = (
        run["sides"]["distilled"],
        run["sides"]["alone"],
    )
    worse = make_report(run_folder("worse", run=run))
    assert any("worse on this data" in text for text in worse.findings)
    assert any("took no longer" in text for text in worse.findings)
    run = run_folder.summary(higher_is_better=False)
    lower = make_report(run_folder("lower", run=run))
    assert any("worse on this data" in text for text in lower.findings)
    run = run_folder.summary()
    for seed, value in enumerate((0.9, 0.99, 0.91)):
        run["sides"]["distilled"][str(seed)]["accuracy"] = value
    unclear = make_report(run_folder("unclear", run=run))
    assert any("no difference is shown" in text for text in unclear.findings)


def test_time_to_what_the_student_alone_reached(whole, run_folder):
    found = make_report(whole)
    assert (
        "The distilled student reached the validation accuracy that the student alone had at "
        "its end (0.8883) by step 300 of 460." in found.findings
    )
    (chart,) = [
        c for g in found.curves if g.title == "student" for c in g.charts
        if c.title == "validation: accuracy"
    ]  # fmt: skip
    assert [line.name for line in chart.lines] == ["distilled", "alone"]


def test_names_fit_what_the_method_yields(run_folder):
    sides = {"distilled": {"0": {"accuracy": 0.6}}, "random-real": {"0": {"accuracy": 0.5}}}
    found = make_report(run_folder(run=run_folder.summary(sides=sides, method="datadam")))
    assert [column.name for column in found.columns] == ["random-real", "datadam"]
    assert found.findings == []


def test_many_terms_and_classes(run_folder):
    log = [
        {"event": "step", "stage": "s", "step": i, "terms": {f"t{n}": n + i for n in range(11)},
         "loss": i}
        for i in range(1000)
    ]  # fmt: skip
    run = run_folder.summary()
    matrix = [[5 if r == c else 1 for c in range(100)] for r in range(100)]
    run["details"]["confusion"] = {"labels": [f"class {i}" for i in range(100)], "matrix": matrix}
    source = render(run_folder(run=run, log=log))
    Page(source)
    assert "dashed" in source
    longest = max(re.findall(r' d="([^"]+)"', source), key=len)
    assert longest.count("L") + longest.count("M") <= 400


def test_many_stages_are_gathered(run_folder):
    stages = [{"name": "match", "kind": "synthesis", "seconds": 20.0, "steps": 100}]
    stages += [
        {"name": f"own/net-{n}/phase-{p}", "kind": "judge", "seconds": 1.5}
        for n in range(10) for p in range(2)
    ]  # fmt: skip
    log = [
        {"event": "step", "stage": stage["name"], "step": i, "terms": {"task": 1.0}}
        for stage in reversed(stages) for i in range(2)
    ]  # fmt: skip
    found = make_report(run_folder(run=run_folder.summary(stages=stages), log=log))
    assert [(t.name, t.seconds) for t in found.times] == [("match", 20.0), ("own", 30.0)]
    assert found.times[1].detail == "30 s; 20 stages"
    assert len(found.curves) == 10
    assert "match" in [group.title for group in found.curves]
    assert found.curves_left == 11


def test_small_pictures_are_enlarged_with_their_pixels(run_folder):
    import base64

    run = run_folder.summary()
    run["details"]["images"] = [
        {"title": str(width), "png_base64": base64.b64encode(run_folder.png(width)).decode()}
        for width in (20, 160, 640)
    ]
    found = make_report(run_folder(run=run)).pictures
    assert [(p.width, p.small) for p in found] == [(160, True), (320, True), (640, False)]


def test_no_such_folder(tmp_path):
    with pytest.raises(RunFolderError):
        report.write(tmp_path / "gone")
