"""Run notebook 10 with every program that it names: no cell is skipped."""

import pytest

pytest.importorskip("peft", reason="needs the extra `peers`")
pytest.importorskip("xllamacpp", reason="needs the extra `peers`")
pytestmark = pytest.mark.peers


def test_with_the_peers_installed_no_cell_is_skipped():
    from notebooks import NOTEBOOKS, execute

    (path,) = (path for path in NOTEBOOKS if path.name.startswith("10_"))
    outputs = {cell.id: str(cell.get("outputs")) for cell in execute(path).cells}
    assert not [name for name, text in outputs.items() if "skipped" in text.lower()]
    assert "of 20 questions" in outputs["peft-read"]
    assert "curl" in outputs["served"]
    assert outputs["llama-said"].count("see the Eiffel Tower in France, try") == 2
