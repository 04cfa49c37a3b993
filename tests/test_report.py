"""The report: one page of what runs left, whatever is missing or damaged there."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mmjax import environment, report
from mmjax.evaluators import contact_sheet
from mmjax.report.plot import COLUMNS, thin
from mmjax.report.read import read_runs
from mmjax.report.results import direction
from tests import browser, programs

HOSTILE = """x"><script>alert('1')</script>&amp;<img src=http://a.b/c onerror=alert(2)> ünï 表情 🦊"""
EMPTY = {"meta", "link", "img", "wbr"}


class Page(HTMLParser):
    """A parsed page: its elements, its text, and what the browser would have to mend."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.faults, self.text, self._open = [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"<{name}> is not closed" for name in self._open]
        self.text = " ".join(self.text)

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        if len(found) != len(attributes):
            self.faults.append(f"<{name}> has an attribute twice")
        self.elements.append((name, found))
        if name not in EMPTY:
            self._open.append(name)

    def handle_endtag(self, name):
        if not self._open or self._open.pop() != name:
            self.faults.append(f"</{name}> closes another element")

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for found, attributes in self.elements if found == name]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder, name="test", rate=0.5, ranks=(3.0, 2.0)):
    """A workdir as a finished run with two evaluations and one by mmjax.evaluate leaves it."""
    folder.mkdir(parents=True)
    config = {
        "seed": 0,
        "optimizer": {"learning_rate": rate},
        "train": {"steps": 40, "best_metric": f"eval/{name}/text_to_image_mean_rank", "best_mode": "min"},
        "evaluators": {name: {"kind": "retrieval", "source": "openmoji:en"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": step, "time": 1.8e9 + step, "train/loss": 100 * rate**step, "perf/examples_per_second": 100.0 + step}
        for step in range(1, 41)
    ]
    for step, rank in zip((20, 40), ranks, strict=True):
        metrics = {f"eval/{name}/text_to_image_mean_rank": rank, f"eval/{name}/text_to_image_R@1": 1 / rank}
        lines.append({"step": step, "time": 1.8e9 + step, **metrics})
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(
        folder / "eval/metrics.jsonl", [{"step": 30, "time": 1.8e9, f"eval/{name}/text_to_image_mean_rank": 2.5}]
    )
    (folder / "result.json").write_text(json.dumps({"step": 40, "seconds": 12.5}))
    (folder / "time.json").write_text(json.dumps({"step": 40, "seconds": {"steps": 9.0, "start": 3.0}}))
    tile = np.full((contact_sheet.TILE, contact_sheet.TILE, 3), 200, np.uint8)
    contact_sheet.draw(folder / "pictures" / f"{name}-00000040.png", ["a cat"], [[tile, tile]], [[True, False]])
    table = "".join(f'"class, {number} of {name}",{number + 1},{number / 30}\n' for number in range(30))
    (folder / "eval/pictures").mkdir()
    (folder / "eval/pictures/names-00000040.csv").write_text("class,images,recall\n" + table)
    Image.new("RGB", (30, 20)).save(folder / "eval/pictures/names-00000040.png")
    (folder / "eval/explanations").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "eval/explanations/00000040-0.png")
    tokens = {"title": "a red fox", "tokens": [["red", 0.25], ["fox", 1.0]]}
    (folder / "eval/explanations/00000040-0.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def page_of(*folders):
    text = report.page(read_runs(folders))
    page = Page(text)
    assert not page.faults
    return page, text


def row_of(text, title):
    """The cells of the row with this title, as they are written."""
    rows = [
        each
        for each in re.findall("<tr.*?</tr>", text)
        if re.sub("<.*?>", "", each).replace("\u00a0", " ").startswith(title)
    ]
    assert len(rows) == 1, rows
    return re.findall("<td.*?>(.*?)</td>", rows[0])


def test_the_page_is_whole_and_asks_for_nothing(run):
    page, text = page_of(run)
    keys = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len({*keys}) == len(keys)
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) == 9 and all(link.removeprefix("#") in keys for link in links)
    resources = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert all(address.startswith(("data:", "#")) for address in resources)
    assert "url(" not in text and "@import" not in text and not page.all("script")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy and not any("style" in a for _, a in page.elements)
    assert all(attributes.get("alt") for attributes in page.all("img")) and len(page.all("img")) == 3
    for told in ("finished in 12 s", "40 of 40", "a red fox", "class, 29 of test", "75.0%", "step 40"):
        assert told in page.text


def test_the_same_runs_give_the_same_bytes(run, tmp_path):
    first = report.write(read_runs([run]), tmp_path / "a").read_bytes()
    assert first == report.write(read_runs([run]), tmp_path / "b").read_bytes()


def test_metrics_of_the_trainer_and_of_the_separate_evaluation_are_one_curve(run):
    series = read_runs([run])[0].metrics["eval/test/text_to_image_mean_rank"]
    assert series.steps.tolist() == [20, 30, 40] and series.values.tolist() == [3.0, 2.5, 2.0]
    _, text = page_of(run)
    assert "text_to_image_mean_rank over steps. run: 3 at step 20, 2 at step 40, 3 points." in text
    assert "step 30\nrun: 2.5</title>" in text
    assert "values on a log axis" in text  # of the loss


def test_a_comparison_marks_the_best_and_shows_what_differs(tmp_path):
    better = make_run(tmp_path / "better", ranks=(3.0, 1.5))
    worse = make_run(tmp_path / "worse", rate=0.9)
    diverged = make_run(tmp_path / "diverged", ranks=(3.0, float("nan")))
    _, text = page_of(better, worse, diverged)
    assert row_of(text, "text_to_image_mean_rank ↓") == ["<strong>1.5</strong>", "2", "NaN"]
    assert row_of(text, "text_to_image_R@1 ↑") == ["<strong>0.6667</strong>", "0.5", "NaN"]
    assert row_of(text, "best checkpoint")[2] == "step 20: eval/test/text_to_image_mean_rank 3"
    assert "Settings that differ: 1 of 7." in text
    assert re.findall("<td>(.*?)</td>", text[text.index("Settings that differ") :])[:3] == ["0.5", "0.9", "0.5"]
    assert "diverged: 1 values are not finite, the first at step 40." in text
    _, text = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert row_of(text, "text_to_image_R@1 ↑") == ["0.5", "0.5"]  # no best among equals
    assert "All runs have the same configuration." in text


def test_a_part_that_one_run_lacks_is_one_setting(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    config = json.loads((runs[1] / "config.json").read_text())
    config["model"] = {"decoder": {"depth": 2, "tied": False, "image": "cross"}}
    (runs[1] / "config.json").write_text(json.dumps(config))
    _, text = page_of(*runs)
    first = text[: text.index("The whole configuration")]
    assert row_of(first, "model.decoder") == ["–", "depth 2, image cross"]


def test_nothing_in_a_run_becomes_an_element(tmp_path):
    hostile = HOSTILE.replace("/", "-")
    run = make_run(tmp_path / hostile, name=hostile)
    for file in ("config.json", "eval/explanations/00000040-0.json", "eval/pictures/names-00000040.csv"):
        path = run / file
        path.write_text(path.read_text().replace("openmoji:en", "</td>").replace("red", "<b onclick=x>"))
    (run / "environment.json").write_text(json.dumps({"<i>": HOSTILE, "command": "\ud800"}))
    report.write(read_runs([run]), tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text("utf-8"))
    assert not page.faults and not page.all("script") and not page.all("b") and not page.all("i")
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))
    assert hostile in page.text and HOSTILE in page.text and "<b onclick=x>" in page.text
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def cut(file, kept):
    def do(run):
        content = (run / file).read_bytes()
        (run / file).write_bytes(content[: int(len(content) * kept)])

    return do


def write(file, content):
    return lambda run: (run / file).write_text(content)


def remove(*files):
    return lambda run: [shutil.rmtree(run / file) if (run / file).is_dir() else (run / file).unlink() for file in files]


def interrupt(run):
    remove("result.json", "eval", "pictures", "time.json")(run)
    write("metrics.jsonl", '{"step": 3, "train/loss": 1.5}\n{"step": 4, "train')(run)


TABLE, TOKENS, PICTURE = (
    "eval/pictures/names-00000040.csv",
    "eval/explanations/00000040-0.json",
    "pictures/test-00000040.png",
)
DAMAGES = [  # and what the page says then
    (interrupt, "3 of 40"),
    (interrupt, "not finished: interrupted, or still running"),
    (interrupt, "No evaluator has reported anything."),
    (interrupt, "No evaluator has drawn a picture"),
    (interrupt, "No evaluator has told classes apart."),
    (interrupt, "There is no account of the wall time."),
    (interrupt, "metrics.jsonl: damaged lines left out: 1"),
    (remove("metrics.jsonl", "result.json", "eval"), "without any metrics"),
    (remove("metrics.jsonl", "result.json", "eval"), "No metrics were logged."),
    (write("metrics.jsonl", '[1]\n{"step": "x"}\n\x00\n7\n'), "damaged lines left out: 4"),
    (write("metrics.jsonl", '{"step": 1, "a": "b"}\n'), "values left out that are no numbers: 1"),
    (write("metrics.jsonl", '{"step": 1, "a": 1e999}\n{"step": 2, "a": 1e308}\n'), "2 values are not finite"),
    (write("metrics.jsonl", '{"step": 1, "a": NaN}\n{"step": 2, "a": NaN}\n'), "2 values are not finite"),
    (remove("config.json"), "there is no config.json that can be read"),
    (cut("config.json", 0.5), "config.json is damaged"),
    (write("config.json", "[1]"), "config.json is damaged: it holds no JSON object"),
    (write("config.json", '{"evaluators": 3, "train": [1]}'), "evaluators"),
    (cut("time.json", 0.5), "time.json is damaged"),
    (write("time.json", '{"seconds": {"steps": -1}}'), "There is no account of the wall time."),
    (lambda run: None, "there is no environment.json"),
    (cut(PICTURE, 0.5), "cannot be shown"),
    (write(PICTURE, "x"), "cannot be shown"),
    (write(TABLE, "class,images,recall\na,1,0.5\nb\nc,2,nan"), "damaged rows left out: 2"),
    (write(TABLE, ""), "it has no rows"),
    (write(TOKENS, '{"tokens": [1]}'), "its tokens are no pairs of a text and a weight"),
    (remove(TOKENS), "00000040-0"),
    (write("eval/best.json", '{"step": 20, "x": 0.5}'), "step 20: x 0.5"),
]


@pytest.mark.parametrize("do, told", DAMAGES)
def test_what_is_missing_or_damaged_is_told_in_its_place(run, do, told):
    do(run)
    page, _ = page_of(run)
    assert told in page.text


def test_a_run_without_explanations_has_no_section_of_them(run):
    assert 'id="explanations"' in page_of(run)[1]
    shutil.rmtree(run / "eval/explanations")
    assert 'id="explanations"' not in page_of(run)[1]


@given(
    arrays.arrays(np.float64, st.integers(2, 3000), elements=st.floats(-1e9, 1e9)),
    st.integers(1, 400),
    st.integers(1, 50),
)
def test_thinning_keeps_the_extremes_of_every_column(values, columns, stride):
    steps = np.arange(len(values)) * stride + 7
    kept = thin(steps, values, columns, int(steps[0]), int(steps[-1]))
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == len(values) - 1
    assert len(kept) <= max(2 * columns + 2, 2)
    column = np.minimum((steps - steps[0]) * columns // (steps[-1] - steps[0]), columns - 1)
    for number in np.unique(column):
        own, of_kept = values[column == number], values[kept][column[kept] == number]
        assert own.min() == of_kept.min() and own.max() == of_kept.max()


def test_a_long_run_is_a_small_page_with_its_spike(run):
    lines = [{"step": step, "train/loss": 1 + (step * 7919 % 100) / 1000} for step in range(1, 20001)]
    lines[12345]["train/loss"] = 777.0
    write_lines(run / "metrics.jsonl", lines)
    page, text = page_of(run)
    label = next(a for a in page.all("svg") if a.get("aria-label", "").startswith("train/loss"))
    assert "20,000 points" in label["aria-label"] and len(text) < 300_000
    path = max((a["d"] for a in page.all("path") if a.get("class") == "line c0"), key=len)
    heights = [float(point.split()[1]) for point in re.split("[ML]", path)[1:]]
    assert len(heights) <= 2 * COLUMNS + 2 and min(heights) < 25 and sorted(heights)[1] > 100  # the axis is logarithmic


def test_every_evaluator_metric_has_a_direction():
    found = json.loads((programs.ROOT / "benchmarks/results/evaluators_cpu.json").read_text())
    names = {name.partition("/")[2] for name in found} - {""}
    unknown = {name for name in names if not direction(name)}
    assert {name for name in unknown if not re.search("_std$|_l2$|seconds|_difference", name)} == set()
    assert {name for name in names if direction(name) < 0} >= {"bits_per_byte", "text_to_image_mean_rank"}
    assert direction("eval/x/expected_calibration_error") < 0 < direction("eval/loss/text_to_image_R@1")


def test_the_program_says_where_the_page_is(run, tmp_path):
    other = make_run(tmp_path / "other")
    code, output = programs.run("evaluate", f"--workdir={run},{other}", "--report")
    assert (code, output) == (0, f"report: {run}/eval/report.html\n")
    assert "<h1>run · other</h1>" in (run / "eval/report.html").read_text()
    code, output = programs.run("evaluate", f"--workdir={run}", "--report", f"--out={tmp_path}/new/folder")
    assert (code, output) == (0, f"report: {tmp_path}/new/folder/report.html\n")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--report",), "--workdir is missing"),
        (("--report", "--workdir=,"), "names no folder"),
        (("--report", "--workdir=RUN", "--all"), "--report and --all exclude each other"),
        (("--report", "--workdir=RUN", "--evaluators=x.py"), "--report and --evaluators exclude each other"),
        (("--report", "--init=RUN"), "--report and --init exclude each other"),
        (("--report", "--workdir=RUN,nowhere"), "nowhere holds no run"),
        (("--report", "--workdir=RUN,RUN/../run"), "twice"),
        (("--report", "--workdir=RUN", "--out=RUN/config.json"), "cannot make the folder"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, told):
    code, output = programs.run("evaluate", *(argument.replace("RUN", str(run)) for argument in arguments))
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1 and told in output


def test_the_environment_says_what_runs_where(tmp_path):
    environment.write(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["devices"] == "8 x cpu" and found["processes"] == 1
    assert {"command", "mmjax", "python", "jax", "flax", "optax", "orbax", "grain", "platform", "XLA_FLAGS"} <= {*found}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_page_without_a_word(tmp_path):
    names = ("a", "a-run-with-a-name-that-is-far-too-long-for-a-narrow-window-" * 2, HOSTILE.replace("/", "-"))
    runs = [make_run(tmp_path / name, name) for name in names]
    for run in runs:
        environment.write(run)
    path = report.write(read_runs(runs), tmp_path)
    with browser.Browser(tmp_path / "profile") as shown:
        for width in (1280, 390):
            shown.open(path, width)
            shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert shown.evaluate("innerWidth") == width
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            shown.evaluate("Promise.all([...document.images].map(each => each.decode())).then(() => true)")
            widths = shown.evaluate("[...document.images].map(each => each.naturalWidth)")
            assert len(widths) == 9 and min(widths) > 0
        light = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        shown.open(path, 390, "dark")
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert shown.messages == []
        shown.evaluate("void document.body.setAttribute('style', 'color: red')")  # the policy forbids it, and says so
        assert len(shown.messages) == 1 and "Content Security Policy" in shown.messages[0]
