from gemma_lora.tables import Table


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
