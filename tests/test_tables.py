"""Tables and tokens, in a terminal and in a notebook."""

import pytest

from gemma_lora.tables import Table, TokenView


def test_a_table_escapes_html_and_wraps_long_text():
    table = Table([{"text": "<b>& " + "word " * 40, "n": 1000}], width=20)
    assert "&lt;b&gt;&amp;" in table._repr_html_()
    assert max(map(len, str(table).splitlines())) < 40
    assert "1,000" in str(table)


def test_braces_and_blank_cells_are_only_text():
    table = Table([{"a{0}": "{1}", "b": ""}], caption="{2}")
    assert "{1}" in table._repr_html_()
    assert str(table).splitlines()[0] == "{2}"


def test_lines_within_a_cell_stay_lines():
    assert str(Table([{"text": "one\n\ntwo"}])).splitlines() == ["text", "one", "", "two"]


def test_a_column_of_numbers_is_set_to_the_right():
    table = Table(
        [{"name": "a", "n": 5, "size": "1.5 MB"}, {"name": "b", "n": 1000, "size": "0.5 kB"}]
    )
    assert str(table).splitlines()[1] == "a         5  1.5 MB"
    assert table._repr_html_().count("text-align:right") == 6
    assert Table([])._repr_html_()
    assert str(Table([{"rate": 5e-05}, {"rate": 5}])).splitlines()[2] == "    5"
    assert str(Table([{"text": "..."}, {"text": "5"}])).splitlines()[2] == "5"
    assert str(Table([{"n": ""}, {"n": 5}])).splitlines() == ["n", "", "5"]


def test_a_mark_has_its_colour_in_a_notebook_if_it_is_the_whole_cell():
    page = Table([{"": mark, "found": f"{mark} <b>"} for mark in "✓✗–"], caption="✓")._repr_html_()
    for mark, color in {"✓": "#188038", "✗": "#d93025", "–": "#5f6368"}.items():
        assert f'><b style="color:{color}">{mark}</b></td>' in page
        assert f">{mark} &lt;b&gt;</td>" in page
    assert page.count("<b ") == 3 and "<b>" not in page
    assert str(Table([{"ok": "✓"}])).splitlines() == ["ok", "✓"]


def test_tokens_in_colour_are_escaped_and_counted():
    view = TokenView(
        [[("<b>", 5, "read"), ("▁x", 6, "learned")], [("y", 7, "read"), ("<pad>", 0, "padding")]]
    )
    assert view.counts() == {"read": 2, "learned": 1, "padding": 1}
    assert "&lt;b&gt;" in view._repr_html_()
    assert "<b>" not in view._repr_html_()
    assert str(view).splitlines() == ["2 read, 1 learned, 1 padding", "<b> [▁x]", "y ·"]


def test_a_table_is_as_handy_as_a_list_of_rows():
    table = Table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert (len(table), table.columns, table["b"], table[1]) == (
        2,
        ["a", "b"],
        ["x", "y"],
        {"a": 2, "b": "y"},
    )
    assert [row["a"] for row in table] == [1, 2]
    assert table.to_pandas()["a"].sum() == 3
    with pytest.raises(KeyError, match=r"No column is named 'c'. There are: \['a', 'b'\]"):
        table["c"]
