"""The plot of the algorithms: every panel shows its own line over all the others."""

from xml.etree import ElementTree

from benchmarks.small_multiples import HEIGHT, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


def test_each_panel_has_its_own_line_in_front_and_the_others_behind():
    panels = [Panel(title=f"a<{k}", points=[(0, 0.5), (10, 0.5 + k / 10)]) for k in range(5)]
    root = ElementTree.fromstring(draw(panels, x_label="step", y_label="accuracy", y_range=(0.5, 1.0)))
    groups = root.findall(f"{SVG}g")
    assert [group.get("transform") for group in groups][4] == f"translate(0,{HEIGHT})"  # the second row
    for k, group in enumerate(groups):
        assert group.find(f"{SVG}text").text == f"a<{k}"
        assert f"{0.5 + k / 10:.3f}" in [text.text for text in group.findall(f"{SVG}text")]
        lines = group.findall(f"{SVG}polyline")
        assert len(lines) == 5 and [line.get("stroke-width") for line in lines] == ["1"] * 4 + ["2"]
    # 24 px above, 20 below: y 0.5 is at 130, 0.9 four fifths of 106 px higher; x from 34 to 200
    assert groups[4].findall(f"{SVG}polyline")[-1].get("points") == "34.0,130.0 200.0,45.2"
