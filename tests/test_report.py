"""tools/report.py in a real browser: the figures, sorting and filtering, hostile names, looks, size, errors."""
import http.server
import json
import os
import threading

import jinja2  # noqa: F401 - once for script()
import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
from PIL import Image

from lib.results import probabilities
import report
from browser import Browser
from helpers import check_error, script, started
from lib.labels import PETA

TOOL = "tools/report.py"
METRICS = ["instance_acc", "instance_precision", "instance_recall", "instance_F1", "mA"]
HEADER = ",".join(report.COLUMNS) + "\n"
PERF = """[e2e] throughputRate: 202.23, latency: 37580.9
[data read] throughputRate: 244.002, moduleLatency: 4.00367
[preprocess] throughputRate: 217.543, moduleLatency: 4.50029
[infer] throughputRate: 208.333, Interface throughputRate: 326.049, moduleLatency: 4.45783
[post] throughputRate: 208.332, moduleLatency: 4.196
"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


def random_run(images, attributes=35, seed=0):
    """Labels bool and logits float32 [images, attributes], a fifth of them wrong; no image has attribute 3."""
    random = np.random.RandomState(seed)
    true = random.random_sample((images, attributes)) < 0.3
    true[:, 3] = False
    return true, ((true * 4 - 2) + random.normal(0, 2.4, true.shape)).astype("<f4")


def write_results(folder, names, logits):
    folder.mkdir(parents=True)
    for name, row in zip(names, logits):
        (folder / (name.split(".")[0] + "_1.bin")).write_bytes(row.tobytes())


def write_run(folder, names, true, logits, *options):
    """What the stages leave, but for the images' folder; runs stage 7."""
    write_results(folder / "result" / "dumpOutput_device0", names, logits)
    (folder / "image.txt").write_text("".join(name + "\n" for name in names), encoding="utf-8")
    (folder / "label.json").write_text(json.dumps({name: row.astype(int).tolist() for name, row in zip(names, true)}))
    script("postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "label.json", *options, cwd=folder)
    return json.loads((folder / "fusion_result.json").read_text())


def write_images(folder, names, size=(60, 150)):
    """Twenty different pictures of noise, which compress worst, under all the names."""
    folder.mkdir()
    random = np.random.RandomState(1)
    for i, name in enumerate(names):
        if i < 20:
            Image.fromarray(random.randint(0, 256, (size[1], size[0], 3)).astype("u1")).save(str(folder / name))
        else:
            os.link(str(folder / names[i % 20]), str(folder / name))


def make(folder, *options, run=script):
    return run(TOOL, "--images", "images", *options, cwd=folder)


def made(folder, *options):
    done = make(folder, *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def texts(browser, selector):
    return browser.run("[...document.querySelectorAll(%s)].map(e => e.textContent.trim())" % json.dumps(selector))


def tables(browser, section):
    """The cells' texts of each row of each table in a section."""
    return browser.run("[...document.querySelectorAll('[aria-labelledby=%s] tbody')].map(body => [...body.rows].map("
                       "row => [...row.cells].map(cell => cell.textContent)))" % section)


def percent(value):
    return "–" if value is None else "%.2f\u00a0%%" % (100 * value)


def between(interval):
    return "%s to %s" % tuple(map(percent, interval))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 400 images with all that a report can hold: its folder, names, labels, logits, fusion_result.json."""
    folder = tmp_path_factory.mktemp("run")
    names = ["%05d.png" % i for i in range(1, 401)]
    true, logits = random_run(len(names))
    fusion = write_run(folder, names, true, logits, "--published", "99", "--intervals")
    write_images(folder / "images", names)
    write_results(folder / "other", names, logits + np.float32(0.01))
    script("tools/compare.py", "result/dumpOutput_device0", "other", "--labels", "label.json", "--json", "compare.json",
           "--max-flips", 9999, cwd=folder)
    (folder / "throughput.csv").write_text(HEADER + "".join(
        '%d,%s,"ONNX Runtime 9.9, CPUExecutionProvider",deepmar_bs%d.onnx,400,%s,%r\n' % (
            size, devices, size, speeds, fusion["instance_acc"])
        for size, devices, speeds in ((16, "0 1", "75.125,80,,90.5,123.5,124,987.25"), (1, "0", "50.5,51.75,207,,,,"),
                                      (8, "0 1", ",70,,,,,"))))
    output = made(folder, "--throughput", "throughput.csv", "--compare", "compare.json")
    assert output.startswith("report.html: 400 images, 300 pictures, ") and output.count("\n") == 1
    return folder, names, true, logits, fusion


def test_figures(browser, run):
    folder, names, _, _, fusion = run
    browser.screen()
    browser.open(folder / "report.html")
    for name in METRICS:
        assert texts(browser, "[data-metric=%s]" % name) == [str(fusion[name])]
        assert percent(fusion[name]) in texts(browser, ".metrics dd")
        assert texts(browser, "[data-interval=%s]" % name) == ["95 %: " + between(fusion["intervals"][name])]
    verdict, = texts(browser, "header .verdict")
    assert verdict.split("\n")[0] == "✗" and "FAIL" in verdict and percent(fusion["instance_acc"]) in verdict
    assert "published 99.00\u00a0%%: a drop of %.2f percentage points, at most 1.00" % (100 * fusion["drop"]) in verdict
    rows = browser.run("[...document.querySelectorAll('.sortable tbody tr')].map(row => [...row.cells].slice(0, 6).map("
                       "cell => cell.dataset.value))")
    assert sorted(rows) == sorted([row["name"]] + ["" if row[key] is None else str(row[key]) for key in (
        "label_acc", "label_pos_acc", "label_neg_acc", "positives", "negatives")] for row in fusion["attributes"])
    weakest = sorted((row for row in fusion["attributes"] if row["label_acc"] is not None),
                     key=lambda row: row["label_acc"])
    assert [row[0] for row in rows] == [row["name"] for row in weakest] + [PETA[3]]
    assert texts(browser, ".weak th") == [row["name"] + "▼ weakest" for row in weakest[:5]]
    assert texts(browser, ".sortable tbody tr:first-child td") == [
        percent(weakest[0]["label_acc"]), percent(weakest[0]["label_pos_acc"]), percent(weakest[0]["label_neg_acc"]),
        str(weakest[0]["positives"]), str(weakest[0]["negatives"]), between(weakest[0]["label_acc_interval"])]
    assert "PETA's names are assumed (--attributes FILE gives others)" in " ".join(
        texts(browser, "[aria-labelledby=attributes] p.soft")[0].split())
    facts = dict(zip(texts(browser, "header dt"), texts(browser, "header dd")))
    assert facts["Model"] == "deepmar_bs1.onnx, deepmar_bs8.onnx, deepmar_bs16.onnx"
    assert (facts["Backend"], facts["Device"], facts["Images scored"], facts["Results"]) == (
        "ONNX Runtime 9.9, CPUExecutionProvider", "0, 0 1", "400", "result/dumpOutput_device0")


def test_throughput_and_comparison(browser, run):
    folder, _, _, _, fusion = run
    browser.open(folder / "report.html")
    acc = percent(fusion["instance_acc"])
    assert [row[:11] for row in tables(browser, "throughput")[0]] == [
        ["1", "0", "50.50", "51.75", "207.00", "–", "–", "–", "–", acc, "deepmar_bs1.onnx"],
        ["8", "0 1", "–", "70.00", "–", "–", "–", "–", "–", acc, "deepmar_bs8.onnx"],
        ["16", "0 1", "75.12", "80.00", "–", "90.50", "123.50", "124.00", "987.25", acc, "deepmar_bs16.onnx"]]
    chart = texts(browser, ".chart text")
    assert {"batch size", "images per second", "end to end", "in the model (Interface)"} <= set(chart)
    rates = ["50.5", "75.1", "51.8", "70.0", "80.0"]  # end to end, then in the model
    assert [text for text in chart if text in rates] == rates
    assert {"milliseconds of a batch in the model", "p50", "p99", "124", "987"} <= set(chart)  # 123.5 and 987.25
    assert browser.run("document.querySelector('.chart svg').getAttribute('role')") == "img"
    comparison = json.loads((folder / "compare.json").read_text())
    section, = texts(browser, "[aria-labelledby=comparison]")
    assert comparison["flips"] > 0 and "%d of 14000, in " % comparison["flips"] in section and "WITHIN" in section
    metrics, flipped, worst = tables(browser, "comparison")
    acc = comparison["metrics"]["instance_acc"]
    assert metrics[0] == ["instance_acc", percent(acc["a"]), percent(acc["b"]), percent(acc["change"]), between(acc["interval"])]
    assert flipped == [[row["name"]] + [str(row[key]) for key in ("flips", "gained", "lost")]
                       for row in comparison["flipped_attributes"]]
    assert [row[0] for row in worst] == [row["name"] for row in comparison["worst_images"]]


def test_sorting(browser, run):
    folder, _, _, _, fusion = run
    browser.open(folder / "report.html")
    keys = ["name", "label_acc", "label_pos_acc", "label_neg_acc", "positives", "negatives", "width"]
    for row in fusion["attributes"]:
        row["width"] = row["label_acc_interval"] and row["label_acc_interval"][1] - row["label_acc_interval"][0]

    def check(column, direction):
        values = browser.run("[...document.querySelectorAll('.sortable tbody tr')].map("
                             "row => row.cells[%d].dataset.value)" % column)
        defined = sorted((row[keys[column]] for row in fusion["attributes"] if row[keys[column]] is not None),
                         key=lambda value: value.lower() if column == 0 else value, reverse=direction == "descending")
        if column == 6:  # the width of an interval
            values, defined = [value and round(float(value), 6) for value in values], [round(value, 6) for value in defined]
        assert [str(value) for value in values] == [str(value) for value in defined] + [""] * (35 - len(defined))
        states = browser.run("[...document.querySelectorAll('.sortable thead th')].map("
                             "header => header.getAttribute('aria-sort'))")
        assert states == ["none"] * column + [direction] + ["none"] * (6 - column)

    check(1, "ascending")
    for column in (0, 2, 3, 4, 5, 6, 1):
        button = ".sortable th:nth-child(%d) button" % (column + 1)
        browser.click(button)
        check(column, "ascending")
        browser.click(button)
        check(column, "descending")
    browser.run("document.querySelector('.sortable th:nth-child(1) button').focus()")  # and by keyboard
    browser.key("Tab")
    browser.key("Enter", "\r")
    check(1, "ascending")
    assert not browser.problems()


def kinds(true, logits):
    said = logits >= 0
    return {"missed": true & ~said, "wrong": said & ~true, "right": said & true}


def test_pictures(browser, run):
    folder, names, true, logits, _ = run
    browser.open(folder / "report.html")
    shown = texts(browser, ".card h3")
    indexes = [names.index(name) for name in shown]
    which = kinds(true, logits)
    accuracy = which["right"].sum(1) / np.maximum(1, sum(array.sum(1) for array in which.values()))
    assert len(set(shown)) == 300 and (np.diff(accuracy[indexes]) >= 0).all()
    assert set(np.argsort(accuracy, kind="stable")[:100]) <= set(indexes)
    for column in range(35):  # the surest mistakes of each attribute are among them
        for kind in ("missed", "wrong"):
            images = np.flatnonzero(which[kind][:, column])
            if len(images):
                assert images[np.abs(logits[images, column]).argmax()] in indexes
    for i in (0, 150, 299):
        image = indexes[i]
        for kind, word in (("missed", "Missed"), ("wrong", "Wrongly said"), ("right", "Right")):
            items = browser.run("[...document.querySelectorAll('.card')[%d].querySelectorAll('[data-kind=%s]')].map("
                                "e => [Number(e.dataset.attribute), e.textContent])" % (i, kind))
            assert [item[0] for item in items] == np.flatnonzero(which[kind][image]).tolist()
            chances = ["" if kind == "right" else " %.0f\u00a0%%" % (100 / (1 + np.exp(-float(logits[image, item[0]]))))
                       for item in items]
            assert [item[1] for item in items] == [PETA[item[0]] + chance for item, chance in zip(items, chances)]
            if items:
                assert word in texts(browser, ".card:nth-child(%d) .%s dt" % (i + 1, kind))[0]
    assert browser.run("[...document.images].every(i => i.naturalWidth == 60 && i.naturalHeight == 150 && i.alt)")


def test_filter(browser, run):
    folder, names, true, logits, _ = run
    browser.open(folder / "report.html")
    indexes = [names.index(name) for name in texts(browser, ".card h3")]
    which = kinds(true, logits)

    def choose(name, value):
        browser.run("(e => { e.value = %s; e.dispatchEvent(new Event('change', {bubbles: true})); })("
                    "document.querySelector('select[name=%s]'))" % (json.dumps(value), name))

    for attribute, kind in ((16, "missed"), (16, "wrong"), (3, "missed"), (3, ""), ("", "right"), (7, ""), ("", "")):
        choose("attribute", str(attribute))
        choose("kind", kind)
        wanted = np.zeros(len(names), bool)
        for name, array in which.items():
            if kind in ("", name):
                wanted |= array.any(1) if attribute == "" else array[:, attribute]
        expected = [names[i] for i in indexes if wanted[i]]
        visible = browser.run("[...document.querySelectorAll('.card')].filter(c => c.offsetHeight).map("
                              "c => c.querySelector('h3').textContent)")
        assert visible == expected, (attribute, kind)
        assert texts(browser, "output") == ["%d of 300 pictures shown" % len(expected)]
        assert len(texts(browser, ".match")) == (0 if attribute == "" else len(expected))
    assert len(expected) == 300 and not browser.problems()


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_looks(browser, run, tmp_path, width, scheme):
    browser.screen(width, 2000, scheme)
    browser.open(run[0] / "report.html")
    assert browser.problems() == [] and browser.requests() == ["file://" + str(run[0] / "report.html")]
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing hangs out at the side
    browser.screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(str(tmp_path / "page.png")).convert("L"))
    page = np.median(pixels)
    assert pixels.shape == (2000, width) and (page > 240 if scheme == "light" else page < 40)
    ink = np.abs(pixels.astype(int) - page) > 100  # text and bars, in every part of the page
    assert 0.01 < ink.mean() < 0.4 and all(part.any() for part in np.array_split(ink, 10))
    # The chart's letters follow the scheme as well.
    colours = browser.run("['.chart text', 'body'].map(s => getComputedStyle(document.querySelector(s))).map("
                          "(s, i) => i ? s.color : s.fill)")
    assert colours[0] == colours[1]


def test_paper(browser, run):
    browser.screen(scheme="dark")
    browser.open(run[0] / "report.html")
    browser.call("Emulation.setEmulatedMedia", media="print",
                 features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run("[getComputedStyle(document.body).backgroundColor, document.querySelector('nav').offsetHeight,"
                       "document.querySelector('form').offsetHeight]") == ["rgb(255, 255, 255)", 0, 0]
    browser.call("Emulation.setEmulatedMedia", media="")


def test_hostile_names(browser, tmp_path):
    evil = ["<img src=x onerror=alert(1)>.png", "</script><script>hacked = 1<!--.png", '" onerror="hacked = 1".png',
            "{{ 7 * 7 }}{% raw %}&amp;.png", "$\\frac.png"]
    evil = [name.replace("/", "\u2215") for name in evil]  # a file name has no slash
    attributes = ["</script><script>hacked = 1</script>", '"><img src=x onerror="hacked = 1">', "a&lt;b", "]\"'`"]
    true, logits = random_run(len(evil), 4)
    true[:, 0] = True
    logits[0] = 1  # all of them are said of one image
    (tmp_path / "names.txt").write_text("\n".join(attributes))
    write_run(tmp_path, evil, true, logits, "--attributes", "names.txt")
    write_images(tmp_path / "images", evil)
    model = "<script>hacked = 1</script>"
    fusion = json.loads((tmp_path / "fusion_result.json").read_text())
    (tmp_path / "t.csv").write_text(HEADER + "1,0,%s,%s,5,1,1,,,,,,%r\n" % (model, model, fusion["instance_acc"]))
    script("tools/compare.py", "result/dumpOutput_device0", "result/dumpOutput_device0", "--json", "c.json",
           cwd=tmp_path)
    comparison = json.loads((tmp_path / "c.json").read_text())
    comparison.update(a=model + "\ud800", worst_images=[{"name": evil[0].split(".")[0], "max_difference": 1,
                                                         "attribute": attributes[0], "flipped": attributes}])
    (tmp_path / "c.json").write_text(json.dumps(comparison))
    made(tmp_path, "--throughput", "t.csv", "--compare", "c.json")
    browser.screen()
    browser.open(tmp_path / "report.html")
    assert sorted(texts(browser, ".card h3")) == sorted(evil)
    assert sorted(texts(browser, ".sortable tbody th")) == sorted(
        name + "▼ weakest" if row["label_acc"] is not None else name
        for name, row in zip(attributes, fusion["attributes"]))
    assert texts(browser, "select[name=attribute] option") == ["all"] + attributes
    assert texts(browser, "header dd")[:2] == [model, model]
    assert texts(browser, "[aria-labelledby=comparison] dd")[0] == model + "?"
    assert texts(browser, "[aria-labelledby=comparison] .long") == [", ".join(attributes)]
    assert browser.run("[typeof hacked, document.scripts.length, document.images.length]") == ["undefined", 1, 5]
    assert browser.problems() == [] and browser.happened("Page.javascriptDialogOpening") == []
    assert browser.requests() == ["file://" + str(tmp_path / "report.html")]


def test_nothing_is_fetched_or_run(browser, run):
    # The page's own policy holds even if some markup did get in.
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = "http://127.0.0.1:%d" % server.server_port
    inject = """new Promise(done => {
        const host = document.createElement('div');
        host.innerHTML = `<img src="HERE/image" onerror="hacked = 1"><link rel=stylesheet href="HERE/style">
            <iframe src="HERE/frame"></iframe><p style="background: url(HERE/back)">x</p>`;
        const script = document.createElement('script');
        script.textContent = 'hacked = 1';
        document.body.append(host, script);
        fetch("HERE/fetch").catch(() => 0).then(() => setTimeout(() => done(typeof hacked), 300));
    })""".replace("HERE", here)
    try:
        page = run[0] / "report.html"
        browser.open(page)
        assert browser.run(inject) == "undefined" and asked == []
        # Without the policy all of this does happen, so the lines above can fail.
        open_page = run[0] / "open.html"
        open_page.write_text("<p>a page without a policy")
        browser.open(open_page)
        assert browser.run(inject) == "number"
        assert {"/image", "/style", "/frame", "/back", "/fetch"} <= set(asked)
    finally:
        server.shutdown()
        server.server_close()


def test_a_large_run(browser, tmp_path):
    names = ["%05d.png" % i for i in range(1, 7601)]
    true, logits = random_run(len(names))
    fusion = write_run(tmp_path, names, true, logits)
    write_images(tmp_path / "images", names, (169, 365))  # PETA's largest
    assert "7600 images, 300 pictures" in made(tmp_path, "--perf", write_perf(tmp_path, 1, 0))
    assert (tmp_path / "report.html").stat().st_size < 10e6
    browser.open(tmp_path / "report.html")
    assert texts(browser, "output") == ["300 of 300 pictures shown"] and browser.problems() == []
    assert texts(browser, "[data-metric=mA]") == [str(fusion["mA"])]


def write_perf(folder, batch_size, device):
    name = "perf_vision_batchsize_%d_device_%d.txt" % (batch_size, device)
    (folder / name).write_text(PERF)
    return name


@pytest.fixture
def small(tmp_path):
    """A run of six images."""
    names = ["%d.png" % i for i in range(6)]
    true, logits = random_run(6)
    write_run(tmp_path, names, true, logits)
    write_images(tmp_path / "images", names)
    return tmp_path


def test_the_guides_files(browser, small):
    made(small, "--perf", write_perf(small, 16, 1), write_perf(small, 4, 0))
    browser.open(small / "report.html")
    rows, = tables(browser, "throughput")
    assert [row[:4] for row in rows] == [["4", "0", "202.23", "326.05"], ["16", "1", "202.23", "326.05"]]
    assert texts(browser, "header dd")[:3] == ["not recorded", "not recorded", "0, 1"]
    assert "No published accuracy" in texts(browser, "header .verdict")[0] and len(texts(browser, ".card")) == 6
    made(small, "--output", "bare.html")
    browser.open(small / "bare.html")
    assert texts(browser, "nav a") == ["Accuracy", "Attributes", "Pictures"] and browser.problems() == []


def test_verdict(browser, small):
    acc = json.loads((small / "fusion_result.json").read_text())["instance_acc"]
    for published, word in ((acc, "PASS"), (acc + 0.0099, "PASS"), (acc + 0.0101, "FAIL"), (acc - 0.2, "PASS")):
        script("postprocess_deepmar_pytorch.py", "result/dumpOutput_device0", "label.json", "--published", published,
               cwd=small)
        made(small)
        browser.open(small / "report.html")
        verdict, = texts(browser, "header .verdict")
        assert word in verdict and "a drop of %.2f perc" % (round(100 * (published - acc), 2) + 0.0) in verdict


def test_results_of_probabilities(browser, small):
    folder = small / "result" / "dumpOutput_device0"
    logits = {path: np.fromfile(str(path), "<f4") for path in folder.iterdir()}
    made(small)
    browser.open(small / "report.html")
    expected = texts(browser, ".card")
    for path, row in logits.items():
        path.write_bytes(probabilities(row).astype("<f4").tobytes())
    for values, doubted in (("probabilities", False), ("logits", True)):
        script("postprocess_deepmar_pytorch.py", folder, "label.json", "--values", values, cwd=small)
        done = make(small)
        assert done.returncode == 0 and ("all values lie between 0 and 1" in done.stderr) == doubted, done.stderr
        browser.open(small / "report.html")
        assert ("they look like probabilities" in browser.run("document.body.innerText")) == doubted
        assert len(expected) == 6 and (texts(browser, ".card") == expected) != doubted


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_files_that_do_not_belong_together(small):
    (small / "report.html").write_text("the earlier page")
    fusion, label, results = small / "fusion_result.json", small / "label.json", small / "result" / "dumpOutput_device0"
    kept = fusion.read_text()
    for key, value, text in (("instance_acc", 0.5, "its instance_acc is 0.5, but the results and labels give 0."),
                             ("mA", None, "its mA is None"), ("instance_F1", float("nan"), "is not what postprocess"),
                             ("images", 7, "is of 7 images, but the results are of 6"), ("images", "6", "is not what"),
                             ("images", 10 ** 400, "is not what"), ("published_acc", 78.9, "published_acc 78.9"),
                             ("attributes", [], "its number of attributes is 0"), ("attributes", [{}], "is not what")):
        edit(fusion, lambda report: report.update({key: value}))
        check_error(make(small), "report.py: error: fusion_result.json: ", text)
        fusion.write_text(kept)
    edit(fusion, lambda report: report["attributes"][2].update(label_acc=0.25))
    check_error(make(small), "fusion_result.json: its label_acc of personalLess60 is 0.25")
    for text in ("[" * 100000, "{", ""):
        fusion.write_text(text)
        check_error(make(small), "fusion_result.json: is not JSON")
    fusion.write_text(kept)

    (small / "image.txt").write_text("0.png\n1.png\n2.png\n3.png\n4.png\n")
    check_error(make(small), "image.txt: has nothing for 1 images of the run: 5;")
    (small / "image.txt").write_text("".join("%d.png\n" % i for i in range(7)))
    check_error(make(small), "result/dumpOutput_device0: has nothing for 1 images of the run: 6;")
    (results / "6_1.bin").write_bytes(bytes(140))
    check_error(make(small), "label.json: has nothing for 1 images of the run: 6;")
    (results / "6_1.bin").unlink()
    (small / "image.txt").write_text("".join("%d.png\n" % i for i in range(6)))
    edit(label, lambda labels: labels.update({"0.png": [1] * 35}))
    check_error(make(small), "fusion_result.json: its instance_acc is ", "run postprocess_deepmar_pytorch.py on these")
    assert (small / "report.html").read_text() == "the earlier page" and not list(small.glob("*.partial"))


def test_bad_pictures(small):
    (small / "images" / "2.png").write_bytes(b"<html>")
    (small / "images" / "4.png").unlink()
    check_error(make(small), "1 of the 6 images in image.txt are not in images: 4.png")
    os.mkfifo(str(small / "images" / "4.png"))
    check_error(make(small), "2 of 6 pictures cannot be read: ", "images/2.png (", "images/4.png (not a regular file)")
    (small / "images" / "2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    check_error(make(small), "images/2.png (PostScript is a program; save it as a picture)")
    assert not (small / "report.html").exists()


def test_bad_speeds(small):
    acc = json.loads((small / "fusion_result.json").read_text())["instance_acc"]
    good = "1,0,b,m,6,1,2,,,,,,%r\n" % acc
    file = small / "t.csv"
    for text, message in (
            (HEADER + good + "8,0,b,m,7,1,2,,,,,,%r\n" % acc, "line 3 is of a run over 7 images, but the results are of 6"),
            (HEADER + "1,0,b,m,6,1,2,,,,,,0.5\n", "no line has the results' instance_acc"), (HEADER, "no line has"),
            (good, "its first line is not batch_size,devices"), ("", "its first line is not"),
            (HEADER + "1,0,b,m,6,1,2\n", "line 2 is not of the form"), (HEADER + good[:-1] + ",1\n", "line 2 is not"),
            (HEADER + good.replace(",2,", ",nan,"), "line 2 is"), (HEADER + good.replace(",2,", ",-2,"), "line 2 is"),
            (HEADER + good.replace("1,0,", "1,$\\frac,"), "line 2 is not"), (HEADER + '1,"0', "is not a CSV file")):
        file.write_text(text)
        check_error(make(small, "--throughput", "t.csv"), "report.py: error: t.csv: ", message)
    file.write_bytes(b"\xff")
    check_error(make(small, "--throughput", "t.csv"), "t.csv: is not a CSV file")
    check_error(make(small, "--throughput", "absent.csv"), "absent.csv")
    perf = write_perf(small, 1, 0)
    for text in ("", PERF.replace("202.23", "fast"), PERF.replace("326.049", "inf"), PERF.replace("Interface", "")):
        (small / perf).write_text(text)
        check_error(make(small, "--perf", perf), "%s: is not a perf_vision" % perf)
    (small / "perf.txt").write_text(PERF)
    check_error(make(small, "--perf", "perf.txt"), "perf.txt: is not a perf_vision")
    check_error(make(small, "--perf", perf, "--throughput", "t.csv"), "not allowed with", code=2)


def test_bad_comparison(small):
    script("tools/compare.py", "result/dumpOutput_device0", "result/dumpOutput_device0", "--labels", "label.json",
           "--json", "good.json", cwd=small)
    made(small, "--compare", "good.json")
    for change, text in (
            (lambda c: c.update(images=7), "does not compare these"), (lambda c: c.update(attributes=26), "does not"),
            (lambda c: c["worst_images"].append(
                {"name": "x", "max_difference": 1, "attribute": "a", "flipped": []}), "does not"),
            (lambda c: [c["metrics"]["instance_acc"].update({side: 0.5}) for side in "ab"], "does not compare these"),
            (lambda c: c.update(flips="many"), "is not what tools/compare.py"), (lambda c: c.pop("a"), "is not what"),
            (lambda c: c["metrics"].update(mA=3), "is not what"), (lambda c: c.update(metrics=[]), "is not what")):
        (small / "c.json").write_text((small / "good.json").read_text())
        edit(small / "c.json", change)
        check_error(make(small, "--compare", "c.json"), "report.py: error: c.json: ", text)


def test_other_names(browser, small):
    (small / "names.txt").write_text("\n".join("trait %d" % i for i in range(35)))
    made(small, "--attributes", "names.txt")
    browser.open(small / "report.html")
    assert "PETA's names are assumed" not in browser.run("document.body.innerText")
    assert texts(browser, "select[name=attribute] option")[1:] == ["trait %d" % i for i in range(35)]
    (small / "names.txt").write_text("one\n")
    check_error(make(small, "--attributes", "names.txt"), "names.txt: holds 1 names, but there are 35")


def test_same_input_same_page(small, monkeypatch):
    made(small, "--perf", write_perf(small, 1, 0))
    monkeypatch.setenv("MPLCONFIGDIR", str(small / "image.txt"))  # matplotlib can keep no list of fonts
    again = make(small, "--perf", write_perf(small, 1, 0), "--output", "again.html", run=started)
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert (small / "report.html").read_bytes() == (small / "again.html").read_bytes()


@pytest.mark.parametrize("package", ["jinja2", "PIL"])
def test_a_missing_package(small, monkeypatch, package):
    (small / "path").mkdir()
    (small / "path" / (package + ".py")).write_text("raise ImportError(\"No module named '%s'\")" % package)
    monkeypatch.setenv("PYTHONPATH", str(small / "path"))
    check_error(make(small, run=started), "report.py: error: No module named '%s'; install the packages in" % package)


def test_odd_pictures(small):
    palette = Image.open(str(small / "images" / "0.png")).quantize(16)
    palette.save(str(small / "images" / "0.png"), transparency=bytes(range(16)))  # Pillow warns of it
    Image.new("L", (3000, 20)).save(str(small / "images" / "3.png"))
    Image.new("LA", (1, 1000)).save(str(small / "images" / "1.png"))
    Image.new("CMYK", (50, 50)).save(str(small / "images" / "2.png"), "JPEG")
    assert "6 images, 6 pictures" in made(small)


def test_pictures_carry_nothing_else(tmp_path):
    picture = Image.new("RGB", (300, 100), "red")
    picture.save(str(tmp_path / "a.jpg"), exif=b"Exif\0\0" + b"E" * 999, comment=b"C" * 999, icc_profile=b"I" * 999)
    source, width, height = report.thumbnail(str(tmp_path / "a.jpg"))
    assert (width, height) == (128, 43) and len(source) < 1500 and source.startswith("data:image/jpeg;base64,")
