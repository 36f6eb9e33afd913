"""Heat maps show each number in its cell, and its size or sign by a colour."""

from engine.report.charts import as_png
from engine.report.heatmap import HeatMap, heat_figure

PARTS = ["CT", "Lesion Grading"]


def test_cells_have_their_numbers_in_percent_and_gaps_are_gaps():
    shares = HeatMap("shares", PARTS, PARTS, {("CT", "CT"): 97.5, ("Lesion Grading", "CT"): 4.0})
    points = HeatMap("points", PARTS, PARTS, {("CT", "CT"): -3.25, ("CT", "Lesion Grading"): 6.5}, signed=True)
    figure = heat_figure([shares, points])
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["97.5", "–", "4.0", "–"]  # row by row
    assert [text.get_text() for text in right.texts] == ["-3.2", "+6.5", "–", "–"]
    assert left.texts[0].get_color() == "white" != left.texts[2].get_color()  # on dark, on pale
    assert left.images[0].get_clim() == (0, 100) and right.images[0].get_clim() == (-6.5, 6.5)
    assert [label.get_text() for label in left.get_yticklabels()] == ["CT", "Lesion\nGrading"]
    assert len(left.patches) == 1  # the diagonal, framed where there is a number
    assert as_png(figure).startswith(b"\x89PNG")
