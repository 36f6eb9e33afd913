"""Tables of questions: what separates, what is quoted, what is no row, and where it stands."""

from pathlib import Path

import pytest
from PIL import Image

from engine.data.questions import load_questions
from engine.data.tables import read_csv
from engine.errors import InputError

HEADER = ["image", "question", "A", "B", "answer"]
ROWS = [["a.png", "Which?", "CT", "MRI", "A"], ["a.png", "Why, then?", "CT; old", "M|RI", "B"]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 6)).save("a.png")


def table(separator: str) -> str:
    quoted = [[f'"{cell}"' if set(cell) & set(",;|") else cell for cell in row] for row in (HEADER, *ROWS)]
    return "".join(separator.join(row) + "\n" for row in quoted)


@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "q.tab", "q.CSV"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_says_what_separates(name, separator):
    Path(name).write_text(table(separator))
    records = load_questions(name).records
    assert [record["answer"] for record in records] == ["A", "B"] and records[1]["options"] == {"A": "CT; old", "B": "M|RI"}


def test_excels_line_about_the_separator_is_no_header():
    Path("q.csv").write_text("sep=;\n" + table(";"))
    assert len(load_questions("q.csv")) == 2
    Path("q.csv").write_text("sep=;\n" + table(";") + "a.png;What;CT;MRI;E\n")
    with pytest.raises(InputError, match="^q.csv: row 2, line 5: answer 'E'"):
        load_questions("q.csv")


def test_cells_hold_line_breaks_quotes_and_white_space():
    Path("q.csv").write_text('" Image ",QUESTION,A,b, Answer \n a.png ,"One\nor ""two""?", CT,MRI , b \n\na.png,?,CT,MRI,E\n')
    questions = load_questions("q.csv", on_bad_row="skip")
    assert questions.record(0)["problem"] == 'One\nor "two"?\nA) CT\nB) MRI' and questions.record(0)["answer"] == "B"
    assert questions.skipped[0].startswith("q.csv: row 1, line 5: answer 'E' is not an option")


def test_a_column_without_a_name_and_blank_cells_at_the_end_do_not_matter():
    Path("q.csv").write_text(",image,question,A,B,answer,\n0,a.png,Which?,CT,MRI,A,,,\n")
    assert load_questions("q.csv").record(0)["answer"] == "A"


@pytest.mark.parametrize(
    "row, reason",
    [
        (
            "a.png,Which, then?,CT,MRI,A",
            "6 cells (expected 5, as the header has: text with a separator in it stands in double quotes",
        ),
        ("a.png,Which?,CT", "3 cells (expected 5"),
        ('a.png,"Halo" sign?,CT,MRI,A', "',' expected after '\"' (expected a cell with quotes in it between quotes"),
        ("a.png,,CT,MRI,A", "empty question (expected question to be text"),
        ("a.png,Which?,CT,MRI,", "empty answer (expected answer to be text"),
        ("a.png,Which?,,MRI,B", "option B without A"),
        (",Which?,CT,MRI,B", "unusable image"),
        (f"a.png,{'x' * 200_000},CT,MRI,B", "field larger than field limit (131072)"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_row_and_line(row, reason):
    Path("q.csv").write_text(",".join(HEADER) + "\n" + ",".join(ROWS[0]) + f"\n{row}\n" + ",".join(ROWS[0]) + "\n")
    with pytest.raises(InputError) as error:
        load_questions("q.csv")
    assert str(error.value).startswith(f"q.csv: row 1, line 3: {reason}")
    kept = load_questions("q.csv", on_bad_row="skip")
    assert len(kept) == 2 and kept.skipped == [str(error.value)]


@pytest.mark.parametrize(
    "content, line",
    [
        (
            "",
            "q.csv: no column image (expected the columns image, question, answer, and options or A, B, ...; its",
        ),
        ("image,question,A,B\n", "q.csv: no column answer or solution (expected the columns image"),
        ("a.png,Which?,CT,MRI,A\n", "q.csv: no column image (expected the columns image"),
        (",".join(HEADER) + "\n", "q.csv: no rows in it"),
        ("image,question,answer,answer\n", "q.csv: two columns 'answer' (expected each once)"),
        (",".join(HEADER) + '\na.png,"Which?,CT,MRI,A\n' * 3, "q.csv: "),
        (
            ",".join(HEADER) + '\na.png,Which?,CT,MRI,"A\na.png,Which?,CT,MRI,A\n',
            "q.csv: line 2: a quote opens in this row and is never",
        ),
    ],
)
def test_a_table_that_is_none_of_questions_is_one_line(content, line):
    Path("q.csv").write_text(content)
    with pytest.raises(InputError) as error:
        load_questions("q.csv")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_columns_asked_for_by_name_are_found_in_any_case():
    Path("m.tab").write_text("IMAGE_ID\tDx\nI\tnv\n")
    (row,) = read_csv("m.tab", ("image_id", "dx"), ("image_id", "dx"))
    assert row == (0, 2, {"image_id": "I", "dx": "nv"})
