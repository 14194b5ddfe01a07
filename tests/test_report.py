"""The page of a run: whole in itself, with what the run wrote, and safe against texts of the model."""

import json
import re

import pytest

from launch.charts import bars, curves
from launch.report import main, page
from launch.trace import RunTrace
from launch.tracking import Tracker
from orchestrator.work import Work


@pytest.fixture
def run(tmp_path):
    tracker, trace = Tracker(tmp_path / "metrics.jsonl"), RunTrace(tmp_path / "trace.json")
    log = trace.book.enter("actor rank 0", "0.0", {"update": Work.UPDATE})
    with log.call("update"):
        figures = trace.step("rl", 1, trace.book.clock() - 1, trace.book.clock())
    tracker.log("rl", 1, {"reward": 0.25, "step_s": 1.0, "seconds/update": 0.5, **figures})
    tracker.log("rl", 1, {"heldout_accuracy": 0.75})
    tracker.close()
    trace.close()
    sample = {
        "step": 1,
        "uid": "0/0/0",
        "prompt": "<b>",
        "response": "</script>",
        "label": None,
        "reward": 0.5,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n" + '{"torn')
    (tmp_path / "config.yaml").write_text("name: a<b\n")
    return tmp_path


def test_the_page_holds_everything_and_asks_nobody(run):
    text = page(run)
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "src=" not in text and "<link" not in text and "@import" not in text
    for part in ("0.250", "0.750", "device time by cause", "rl step 1", "&lt;b&gt;", "name: a&lt;b"):
        assert part in text, part
    assert text.count("</script>") == 1  # the page's own
    data = json.loads(re.search(r"const data = (\{.*?\});\n", text).group(1))
    assert data["rows"] == ["steps", "actor rank 0"] and data["events"][-1][3] == "rl step 1"
    assert data["events"][0][3:] == ["wait", "driver"]


def test_a_run_that_only_logged_has_a_page_and_a_folder_without_a_run_none(run, tmp_path_factory):
    for name in ("trace.json", "samples.jsonl", "config.yaml"):
        (run / name).unlink()
    assert main(run) == 0 and "Timeline" not in (run / "report.html").read_text()
    with pytest.raises(ValueError, match=r"no metrics\.jsonl; give the run_dir"):
        main(tmp_path_factory.mktemp("empty"))


def test_a_chart_puts_values_where_they_belong_and_leaves_out_what_is_no_number():
    text = curves("a", {"a": [(0, 0.0), (1, float("nan")), (2, 10.0)]}, size=(300, 170))
    assert re.search(r'points="46.0,140.0 288.0,26.0"', text)  # the corners of the plot
    assert curves("a", {"a": [(0, float("nan"))]}) == ""
    logs = curves("a", {"a": [(1, 1.0), (10, 10.0), (100, 100.0)]}, log=True)
    assert re.search(r'points="46.0,140.0 167.0,83.0 288.0,26.0"', logs)  # the middle one in the middle


def test_bars_are_as_high_as_their_shares():
    text = bars("t", [("1", {"good": 0.75, "bad": 0.25})], {"good": "#0f0", "bad": "#f00"})
    heights = [float(height) for height in re.findall(r'<rect[^>]*height="([\d.]+)"', text)]
    assert heights == [108.0, 36.0]  # of 144 pixels
