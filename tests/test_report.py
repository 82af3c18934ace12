"""tools/report.py in a real browser: figures, charts, sorting and filtering, hostile names, and files that do not belong together."""
import http.server
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image
from browser import Browser
from helpers import check_error, script, started

import report
from report import between, percent
from lib import costs
from lib.labels import PETA
from lib.results import probabilities

TOOL, RESULTS = "tools/report.py", "result/dumpOutput_device0"
HEADER = ",".join(report.COLUMNS) + "\n"
PERF = """[e2e] throughputRate: 202.23, latency: 37580.9
[infer] throughputRate: 208.333, Interface throughputRate: 326.049, moduleLatency: 4.45783
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
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
    write_results(folder / RESULTS, names, logits)
    (folder / "image.txt").write_text("".join(name + "\n" for name in names), encoding="utf-8")
    (folder / "label.json").write_text(json.dumps({name: row.astype(int).tolist() for name, row in zip(names, true)}))
    return score(folder, *options)


def score(folder, *options):
    """Runs stage 7; returns what it writes."""
    script("postprocess_deepmar_pytorch.py", RESULTS, "label.json", *options, cwd=folder)
    return json.loads((folder / "fusion_result.json").read_text())


def write_images(folder, names, size=(60, 150)):
    """Ten different pictures of noise, which compress worst, under all the names."""
    folder.mkdir()
    for i, name in enumerate(names[:10]):
        noise = np.random.RandomState(i).randint(0, 256, (size[1], size[0], 3))
        Image.fromarray(noise.astype("u1")).save(str(folder / name))
    for i, name in enumerate(names[10:]):
        os.link(str(folder / names[i % 10]), str(folder / name))


def make(folder, *options, run=script):
    return run(TOOL, "--images", "images", *options, cwd=folder)


def made(folder, *options):
    done = make(folder, *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def texts(browser, selector):
    """The text of each element, with single spaces."""
    return browser.run("[...document.querySelectorAll(%s)].map(e => e.textContent.replace(/[ \\n]+/g, ' ').trim())" % json.dumps(selector))


def rows(browser, table):
    """The cells' texts of each row in the body of a table."""
    return browser.run("[...document.querySelector(%s).tBodies[0].rows].map(row => [...row.cells].map(c => c.textContent.trim()))"
                       % json.dumps(table))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 400 images of PETA's largest size, with all that a report can hold: its folder, names, labels, logits, scores."""
    folder = tmp_path_factory.mktemp("run")
    names = ["%05d.png" % i for i in range(1, 401)]
    true, logits = random_run(len(names))
    fusion = write_run(folder, names, true, logits, "--published", "99", "--intervals")
    write_images(folder / "images", names, (169, 365))
    write_results(folder / "other", names, logits + np.float32(0.01))
    script("tools/compare.py", RESULTS, "other", "--labels", "label.json", "--json", "compare.json", "--max-flips", 9999, cwd=folder)
    row = '%d,%s,"ONNX Runtime 9.9, CPUExecutionProvider",deepmar_bs%d.onnx,400,%s,' + "%r\n" % fusion["instance_acc"]
    (folder / "throughput.csv").write_text(HEADER + row % (16, "0 1", 16, "40.25,80,,90.5,123.5,124,987.25")
                                           + row % (1, "0", 1, "20.5,51.75,207,,,,") + row % (8, "0 1", 8, ",70,,,,,"))
    assert made(folder, "--throughput", "throughput.csv", "--compare", "compare.json").startswith(
        "report.html: 400 images, 300 pictures, ")
    assert (folder / "report.html").stat().st_size < 10e6
    return folder, names, true, logits, fusion


@pytest.fixture
def page(browser, run):
    """The browser with the run's page open. Nothing may be fetched, and the console must stay empty."""
    browser.screen()
    browser.open(run[0] / "report.html")
    yield browser
    assert browser.problems() == [] and browser.requests() == ["file://" + str(run[0] / "report.html")]


def test_the_page_shows_stage_7s_figures(page, run):
    fusion = run[4]
    for name in report.METRICS:
        assert texts(page, "[data-metric=%s]" % name) == [str(fusion[name])] and percent(fusion[name]) in texts(page, ".metrics dd")
        assert texts(page, "[data-interval=%s]" % name) == ["95 %: " + between(fusion["intervals"][name])]
    assert texts(page, "header .verdict") == [
        "✗ FAIL instance_acc %s, published %s: a drop of %.2f percentage points, at most 1.00 allowed"
        % (percent(fusion["instance_acc"]), "99.00\u00a0%", 100 * fusion["drop"])]
    weakest = sorted(fusion["attributes"], key=lambda row: 2 if row["label_acc"] is None else row["label_acc"])
    expected = [[row["name"]] + [percent(row[key]) for key in ("label_acc", "label_pos_acc", "label_neg_acc")]
                + [str(row["positives"]), str(row["negatives"]),
                   between(row["label_acc_interval"]) if row["label_acc_interval"] else "–"] for row in weakest]
    for row in expected[:5]:
        row[0] += "▼ weakest"
    assert rows(page, ".sortable") == expected and expected[-1][:2] == [PETA[3], "–"]
    assert "PETA's names are assumed (--attributes FILE gives others)" in texts(page, "[aria-labelledby=attributes] p.soft")[0]
    facts = dict(zip(texts(page, "header dt"), texts(page, "header dd")))
    del facts["Scored"]
    assert facts == {"Model": "deepmar_bs1.onnx, deepmar_bs8.onnx, deepmar_bs16.onnx", "Device": "0, 0 1", "Images scored": "400",
                     "Backend": "ONNX Runtime 9.9, CPUExecutionProvider", "Results": "result/dumpOutput_device0"}


def test_the_charts_and_the_table_show_the_throughput(page, run):
    acc = percent(run[4]["instance_acc"])
    assert [row[:11] for row in rows(page, "[aria-labelledby=throughput] table")] == [
        ["1", "0", "20.50", "51.75", "207.00", "–", "–", "–", "–", acc, "deepmar_bs1.onnx"],
        ["8", "0 1", "–", "70.00", "–", "–", "–", "–", "–", acc, "deepmar_bs8.onnx"],
        ["16", "0 1", "40.25", "80.00", "–", "90.50", "123.50", "124.00", "987.25", acc, "deepmar_bs16.onnx"]]
    assert texts(page, ".chart figcaption") == ["images per second: ■ end to end ■ in the model (Interface)",
                                                "milliseconds of a batch in the model: ■ p50 ■ p99"]
    assert texts(page, ".chart .group") == [
        "batch size 1device 0 20.50 51.75", "batch size 8device 0 1 – 70.00", "batch size 16device 0 1 40.25 80.00",
        "batch size 1device 0 – –", "batch size 8device 0 1 – –", "batch size 16device 0 1 123.50 987.25"]
    bars = np.array(page.run("[...document.querySelectorAll('.chart rect')].map(bar => bar.getBoundingClientRect().width)"))
    assert np.allclose(bars[:6] / bars[5], np.array([20.5, 51.75, 0, 70, 40.25, 80]) / 80, atol=0.01) and bars[5] > 100
    assert np.allclose(bars[6:] / bars[11], [0, 0, 0, 0, 123.5 / 987.25, 1], atol=0.01)
    labels = page.run("[...document.querySelectorAll('.chart[role=img]')].map(e => e.getAttribute('aria-label'))")
    assert labels == ["Bar chart of the %s by batch size; the table below has its numbers" % unit
                      for unit in ("images per second", "milliseconds of a batch in the model")]


def test_the_page_shows_the_comparison(page, run):
    comparison = json.loads((run[0] / "compare.json").read_text())
    section, = texts(page, "[aria-labelledby=comparison]")
    assert comparison["flips"] > 0 and "%d of 14000, in " % comparison["flips"] in section and "WITHIN" in section
    acc, table = comparison["metrics"]["instance_acc"], "[aria-label='Table of the %s'] table"
    assert rows(page, table % "metrics of both")[0] == [
        "instance_acc", percent(acc["a"]), percent(acc["b"]), percent(acc["change"]), between(acc["interval"])]
    assert rows(page, table % "attributes that flipped") == [
        [row["name"]] + [str(row[key]) for key in ("flips", "gained", "lost")] for row in comparison["flipped_attributes"]]
    assert [row[0] for row in rows(page, table % "images that differ most")] == [row["name"] for row in comparison["worst_images"]]


def write_costs(path, names, true, logits, **changes):
    """A file of rehearse.py costs whose rows move the logits ever further. Returns the rows."""
    rows = [costs.figures(row, logits + np.float32(shift), logits, true, None, (224, 224))
            for row, shift in zip(costs.rows("709", "calibrated on 32 images"), (0, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9))]
    path.write_text(json.dumps(dict({"model": "m.onnx", "checkpoint_sha256": None, "scored": costs.identity(names, true),
                                     "images": len(names), "decisions": true.size, "rows": rows}, **changes)))
    return rows


def test_the_page_shows_what_deployment_costs(browser, run):
    folder, names, true, logits, _ = run
    found = write_costs(folder / "costs.json", names, true, logits)
    made(folder, "--costs", "costs.json", "--output", "costs.html")
    for width, scheme in ((390, "dark"), (1200, "light")):
        browser.screen(width, scheme)
        browser.open(folder / "costs.html")
        assert browser.run("document.documentElement.scrollWidth") <= width and browser.problems() == []
    assert "What deployment costs" in texts(browser, "nav a")
    assert rows(browser, "[aria-labelledby=costs] table") == [
        ["float32", "602112", "–", "–", "–", percent(found[0]["instance_acc"]), "–", "–", "reference"]] + [
        [row["name"], str(row["bytes"]), "%.4f" % row["max_difference"], "%.5f" % row["rms_difference"], str(row["flips"]),
         percent(row["instance_acc"]), percent(row["drop"]), between(row["interval"]), row["trust"]] for row in found[1:]]
    section, = texts(browser, "[aria-labelledby=costs]")
    assert "bound: each node's result is rounded once" in section and "calibrated on 32 images" in section
    places = np.array(browser.run("""[...document.querySelectorAll('.drops .group')].map(group =>
        [...group.querySelectorAll('rect, line')].map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]))"""))
    assert places.shape == (7, 5, 2) and min(row["drop"] for row in found) < 0  # the bar, 0, the interval and its two ends
    zero = places[0, 1, 0]
    unit = (places[-1, 0, 1] - zero) / found[-1]["drop"]
    assert found[-1]["drop"] * unit > 100
    for bar, row in zip(places - zero, found[1:]):
        low, high = row["interval"]
        expected = [sorted([0, row["drop"]]), [0, 0], [low, high], [low, low], [high, high]]
        assert np.allclose(bar, unit * np.array(expected), atol=1.1), row["name"]


def test_the_buttons_sort_the_table(page):
    def check(column, direction):
        values = page.run("[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[%d].dataset.value)" % column)
        defined = [value for value in values if value != ""]
        assert len(values) == 35 and values[len(defined):] == [""] * (35 - len(defined))  # undefined figures stay last
        assert defined == sorted(defined, key=str.lower if column == 0 else float, reverse=direction == "descending")
        assert page.run("[...document.querySelectorAll('.sortable thead th')].map(header => header.getAttribute('aria-sort'))") == (
            ["none"] * column + [direction] + ["none"] * (6 - column))

    check(1, "ascending")
    for column in (0, 2, 3, 4, 5, 6, 1):
        for direction in ("ascending", "descending"):
            page.run("document.querySelector('.sortable th:nth-child(%d) button').click()" % (column + 1))
            check(column, direction)


def kinds(true, logits):
    return {"missed": true & (logits < 0), "wrong": (logits >= 0) & ~true, "right": (logits >= 0) & true}


def test_the_worst_pictures_are_shown(page, run):
    _, names, true, logits, _ = run
    shown = texts(page, ".card h3")
    indexes, which = [names.index(name) for name in shown], kinds(true, logits)
    accuracy = which["right"].sum(1) / np.maximum(1, sum(array.sum(1) for array in which.values()))
    assert len(set(shown)) == 300 and (np.diff(accuracy[indexes]) >= 0).all()
    assert set(np.argsort(accuracy, kind="stable")[:100]) <= set(indexes)
    for kind in ("missed", "wrong"):  # the surest mistakes of each attribute are among them
        surest = np.where(which[kind], np.abs(logits), 0)
        assert set(surest.argmax(axis=0)[surest.any(axis=0)]) <= set(indexes)
    words = {"missed": "○ Missed", "wrong": "✗ Wrongly predicted", "right": "✓ Right"}
    for i in (0, 299):
        expected = []
        for kind, word in words.items():
            found = [PETA[j] + ("" if kind == "right" else " %.0f\u00a0%%" % (100 / (1 + np.exp(-float(logits[indexes[i], j])))))
                     for j in np.flatnonzero(which[kind][indexes[i]])]
            expected += [word, ", ".join(found)] if found else []
        assert texts(page, ".card:nth-child(%d) dt, .card:nth-child(%d) dd" % (i + 1, i + 1)) == expected
    assert page.run("[...document.images].every(i => i.naturalWidth == 119 && i.naturalHeight == 256 && i.alt)")


def test_the_filter_shows_the_wanted_pictures(page, run):
    _, names, true, logits, _ = run
    indexes, which = [names.index(name) for name in texts(page, ".card h3")], kinds(true, logits)
    for attribute, kind in ((16, "missed"), (16, "wrong"), (3, "missed"), ("", "right"), (7, ""), ("", "")):
        for name, value in (("attribute", attribute), ("kind", kind)):
            page.run("(e => { e.value = '%s'; e.dispatchEvent(new Event('change', {bubbles: true})); })("
                     "document.querySelector('select[name=%s]'))" % (value, name))
        wanted = sum(array.any(1) if attribute == "" else array[:, attribute] for name, array in which.items() if kind in ("", name))
        expected = [names[i] for i in indexes if wanted[i]]
        assert page.run("[...document.querySelectorAll('.card')].filter(c => c.offsetHeight).map("
                        "c => c.querySelector('h3').textContent)") == expected, (attribute, kind)
        assert texts(page, "output") == ["%d of 300 pictures shown" % len(expected)]
        assert len(texts(page, ".match")) == (0 if attribute == "" else len(expected))
    assert len(expected) == 300


def test_the_page_suits_a_phone_the_dark_and_paper(page):
    colours = ("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.chart')).color,"
               "document.querySelector('nav').offsetHeight > 0, document.querySelector('form').offsetHeight > 0]")
    light, dark = ["rgb(255, 255, 255)", "rgb(28, 32, 36)"], ["rgb(21, 24, 27)", "rgb(230, 233, 236)"]
    for width, scheme, media, expected in ((1200, "light", "", light + [True, True]), (390, "dark", "", dark + [True, True]),
                                           (700, "dark", "print", light + [False, False])):
        page.screen(width, scheme, media)
        assert page.run(colours) == expected
        assert page.run("document.documentElement.scrollWidth") <= width or media  # nothing hangs out at the side


def test_hostile_names_are_text(browser, tmp_path):
    evil = ["<img src=x onerror=hacked=1>.png", "<\u2215script><script>hacked = 1<!--.png", '" onerror="hacked = 1".png',
            "{{ 7 * 7 }}{% raw %}&amp;.png", "$\\frac.png"]
    attributes = ["</script><script>hacked = 1</script>", '"><img src=x onerror="hacked = 1">', "a&lt;b", "]\"'`"]
    true, logits = random_run(len(evil), 4)
    true[:, 0] = True
    logits[0] = 1  # the first image has all of them
    (tmp_path / "names.txt").write_text("\n".join(attributes))
    fusion = write_run(tmp_path, evil, true, logits, "--attributes", "names.txt")
    write_images(tmp_path / "images", evil)
    model = "<script>hacked = 1</script>"
    (tmp_path / "t.csv").write_text(HEADER + "1,0,%s,%s,5,1,1,,,,,,%r\n" % (model, model, fusion["instance_acc"]))
    script("tools/compare.py", RESULTS, RESULTS, "--json", "c.json", cwd=tmp_path)
    edit(tmp_path / "c.json", lambda comparison: comparison.update(a=model + "\ud800", worst_images=[
        {"name": evil[0].split(".")[0], "max_difference": 1, "attribute": attributes[0], "flipped": attributes}]))
    made(tmp_path, "--throughput", "t.csv", "--compare", "c.json")
    browser.screen()
    browser.open(tmp_path / "report.html")
    assert sorted(texts(browser, ".card h3")) == sorted(evil)
    assert sorted(name.replace("▼ weakest", "") for name in texts(browser, ".sortable tbody th")) == sorted(attributes)
    assert texts(browser, "select[name=attribute] option") == ["all"] + attributes
    assert texts(browser, "header dd")[:2] == [model, model]
    assert texts(browser, "[aria-labelledby=comparison] dd")[0] == model + "?"
    assert texts(browser, "[aria-labelledby=comparison] .long") == [", ".join(attributes)]
    assert browser.run("[typeof hacked, document.scripts.length, document.images.length]") == ["undefined", 1, 5]
    assert browser.problems() == [] and browser.requests() == ["file://" + str(tmp_path / "report.html")]


def test_nothing_is_fetched_or_run(browser, run):
    """The page's own policy holds even if some markup did get in."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    inject = """new Promise(done => {
        const host = document.createElement('div'), script = document.createElement('script');
        host.innerHTML = `<img src="HERE/image" onerror="hacked = 1"><iframe src="HERE/frame"></iframe>`;
        script.textContent = 'hacked = 1';
        document.body.append(host, script);
        fetch("HERE/fetch").catch(() => 0).then(() => setTimeout(() => done(typeof hacked), 300));
    })"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inject = inject.replace("HERE", "http://127.0.0.1:%d" % server.server_port)
        browser.open(run[0] / "report.html")
        assert browser.run(inject) == "undefined" and asked == []
        (run[0] / "open.html").write_text("<p>a page without a policy")  # here all of this does happen
        browser.open(run[0] / "open.html")
        assert browser.run(inject) == "number" and {"/image", "/frame", "/fetch"} <= set(asked)
        server.shutdown()


def write_perf(folder, batch_size, device):
    name = "perf_vision_batchsize_%d_device_%d.txt" % (batch_size, device)
    (folder / name).write_text(PERF)
    return name


@pytest.fixture
def small(tmp_path):
    """A run of six images."""
    names = ["%d.png" % i for i in range(6)]
    write_run(tmp_path, names, *random_run(6))
    write_images(tmp_path / "images", names)
    return tmp_path


def test_the_guides_files_are_enough(browser, small):
    made(small, "--perf", write_perf(small, 16, 1), write_perf(small, 4, 0))
    browser.open(small / "report.html")
    assert [row[:4] for row in rows(browser, "[aria-labelledby=throughput] table")] == [
        ["4", "0", "202.23", "326.05"], ["16", "1", "202.23", "326.05"]]
    assert len(texts(browser, ".chart")) == 1  # nothing is known of the latency
    assert texts(browser, "header dd")[:3] == ["not recorded", "not recorded", "0, 1"]
    assert "No published accuracy" in texts(browser, "header .verdict")[0] and len(texts(browser, ".card")) == 6
    (small / "names.txt").write_text("\n".join("trait %d" % i for i in range(35)))
    made(small, "--output", "bare.html", "--attributes", "names.txt")
    browser.open(small / "bare.html")
    assert texts(browser, "select[name=attribute] option")[1:] == ["trait %d" % i for i in range(35)]
    assert "names are assumed" not in browser.run("document.body.innerText")
    assert texts(browser, "nav a") == ["Accuracy", "Attributes", "Pictures"] and browser.problems() == []


def test_the_verdict_allows_a_drop_of_one_point(small):
    acc = score(small)["instance_acc"]
    for drop, verdict in ((0.0099, "PASS</strong>"), (0.0101, "FAIL</strong>"), (-0.2, "PASS</strong>")):
        score(small, "--published", acc + drop)
        made(small)
        page = (small / "report.html").read_text(encoding="utf-8")
        assert verdict in page and "a drop of %.2f percentage points" % (100 * drop) in page


def test_probabilities_are_noticed(small):
    for path in (small / RESULTS).iterdir():
        path.write_bytes(probabilities(np.fromfile(str(path), "<f4")).astype("<f4").tobytes())
    for values, doubted in (("probabilities", False), ("logits", True)):
        score(small, "--values", values)
        done = make(small)
        assert done.returncode == 0 and ("all values lie between 0 and 1" in done.stderr) == doubted, done.stderr
        page = (small / "report.html").read_text(encoding="utf-8")
        assert ("they look like probabilities" in page) == doubted and ('class="missed"' in page) != doubted


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_figures_of_other_results_are_refused(small):
    fusion = small / "fusion_result.json"
    kept = fusion.read_text()
    (small / "report.html").write_text("the earlier page")
    for key, value, text in (("instance_acc", 0.5, "its instance_acc is 0.5, but the results and labels give 0."),
                             ("mA", None, "its mA is None"), ("instance_F1", float("nan"), "is not what postprocess"),
                             ("images", 7, "is of 7 images, but the results are of 6"), ("thresholds", 3, "is not what"),
                             ("published_acc", 78.9, "published_acc 78.9"), ("attributes", [], "its number of attributes is 0")):
        edit(fusion, lambda content: content.update({key: value}))
        check_error(make(small), "report.py: error: fusion_result.json: ", text)
        fusion.write_text(kept)
    edit(fusion, lambda content: content["attributes"][2].update(label_acc=0.25))
    check_error(make(small), "fusion_result.json: its label_acc of personalLess60 is 0.25")
    fusion.write_text("[" * 100000)
    check_error(make(small), "fusion_result.json: is not JSON")
    assert (small / "report.html").read_text() == "the earlier page" and not list(small.glob("*.partial"))


def test_lists_labels_and_results_of_other_images_are_refused(small):
    good = (small / "image.txt").read_text()
    (small / "image.txt").write_text(good.replace("5.png\n", ""))
    check_error(make(small), "image.txt: 1 of 6 results are of other images (5); run stages 4 to 6 again")
    (small / "image.txt").write_text(good + "6.png\n")
    check_error(make(small), "image.txt: 1 of its 7 images have no result (6); run stages 4 to 6 again")
    (small / "image.txt").write_text(good)
    edit(small / "label.json", lambda labels: labels.update({"0.png": [1] * 35}))
    check_error(make(small), "fusion_result.json: its instance_acc is ", "run postprocess_deepmar_pytorch.py on these")


def test_pictures_that_cannot_be_read_are_named(small):
    (small / "images" / "2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    (small / "images" / "4.png").unlink()
    check_error(make(small), "1 of the 6 images in image.txt are not in images: 4.png")
    os.mkfifo(str(small / "images" / "4.png"))
    check_error(make(small), "2 of 6 pictures cannot be read: ", "images/2.png (PostScript is a program; save it as a picture)",
                "images/4.png (not a regular file)")
    assert not (small / "report.html").exists()


def test_throughput_of_another_run_is_refused(small):
    acc = json.loads((small / "fusion_result.json").read_text())["instance_acc"]
    good = "1,0,b,m,6,1,2,,,,,,%r\n" % acc
    for lines, message in ((good + good.replace(",6,", ",7,"), "line 3 is of a run over 7 images, but the results are of 6"),
                           ("1,0,b,m,6,1,2,,,,,,0.5\n", "no line has the results' instance_acc"),
                           ("1,0,b,m,6,1,2\n", "line 2 is not of the form"), ('1,"0', "is not a CSV file"),
                           (good.replace(",2,", ",nan,"), "line 2 is not"), (good.replace("1,0,", "1,x,"), "line 2 is not")):
        (small / "t.csv").write_text(HEADER + lines)
        check_error(make(small, "--throughput", "t.csv"), "report.py: error: t.csv: ", message)
    (small / "t.csv").write_text(good)
    check_error(make(small, "--throughput", "t.csv"), "t.csv: its first line is not batch_size,devices")
    for perf, text in (("perf_vision_batchsize_1_device_0.txt", PERF.replace("326.049", "inf")), ("perf.txt", PERF)):
        (small / perf).write_text(text)
        check_error(make(small, "--perf", perf), "%s: is not a perf_vision" % perf)
    check_error(make(small, "--perf", perf, "--throughput", "t.csv"), "not allowed with", code=2)


def test_a_comparison_of_other_results_is_refused(small):
    script("tools/compare.py", RESULTS, RESULTS, "--labels", "label.json", "--json", "good.json", cwd=small)
    made(small, "--compare", "good.json")
    other = {"name": "x", "max_difference": 1, "attribute": "a", "flipped": []}
    for change, text in ((lambda c: c.update(images=7), "does not compare these"),
                         (lambda c: c["worst_images"].append(other), "does not compare these"),
                         (lambda c: c["metrics"]["instance_acc"].update(a=0.5, b=0.5), "does not compare these"),
                         (lambda c: c.pop("a"), "is not what tools/compare.py"), (lambda c: c["metrics"].update(mA=3), "is not what")):
        (small / "c.json").write_text((small / "good.json").read_text())
        edit(small / "c.json", change)
        check_error(make(small, "--compare", "c.json"), "report.py: error: c.json: ", text)


def test_the_same_input_gives_the_same_page(small):
    made(small, "--perf", write_perf(small, 1, 0))
    assert make(small, "--perf", write_perf(small, 1, 0), "--output", "again.html", run=started).returncode == 0
    assert (small / "report.html").read_bytes() == (small / "again.html").read_bytes()


@pytest.mark.parametrize("package", ["jinja2", "PIL"])
def test_a_missing_package_is_named(small, monkeypatch, package):
    (small / (package + ".py")).write_text("raise ImportError(\"No module named '%s'\")" % package)
    monkeypatch.setenv("PYTHONPATH", str(small))
    check_error(make(small, run=started), "report.py: error: No module named '%s'; install the packages in" % package)


def test_odd_pictures_are_shown(small):
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


def test_costs_of_other_images_or_another_model_are_refused(small):
    names, (true, logits) = (small / "image.txt").read_text().split(), random_run(6)
    for change, text in (({"scored": costs.identity(names, ~true)}, "is of other images or labels than these; run tools/rehearse.py costs"),
                         ({"scored": costs.identity(names[::-1], true)}, "is of other images or labels"),
                         ({"checkpoint_sha256": "b" * 64}, "is of another model, m.onnx, whose checkpoint is not that of d.om"),
                         ({"rows": []}, "is not what tools/rehearse.py costs --json writes"), ({"images": "6"}, "is not what")):
        write_costs(small / "c.json", names, true, logits, **change)
        check_error(make(small, "--costs", "c.json", "--model", describe(small, "a" * 64)), "report.py: error: c.json: ", text)
    write_costs(small / "c.json", names[::-1], true[::-1], logits[::-1], checkpoint_sha256="a" * 64)  # the order does not matter
    made(small, "--costs", "c.json", "--model", describe(small, "a" * 64))


def describe(folder, checkpoint):
    """Writes the description of an OM. Returns the OM's name."""
    (folder / "d.json").write_text(json.dumps({"checkpoint_sha256": checkpoint}))
    return "d.om"
