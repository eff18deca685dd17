"""The form of the committed notebooks, and which of their outputs are compared.

nbval runs the cells and compares what they show with what is committed: text and
tables, but neither pictures nor cells with the tag "nbval-ignore-output".
"""

import ast
import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

import gemma_lora as gl
from notebooks import NOTEBOOKS, README_PICTURE, ROOT, picture

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
ACCOUNT = REPOSITORY.removeprefix("https://github.com/")

# Why the output of a cell cannot be compared. Everything else is compared, rounded so
# that all processors and supported versions agree.
REASONS = {
    "time": "shows seconds, or a rate, or a bar that moves",
    "machine": "shows the memory, disk, versions or credentials of this machine",
    "program": "shows what Transformers, PEFT or a server does, or that it is not installed",
    "digits": "shows counts after so many steps that the last digits of a sum decide some",
    "size": "shows bytes of files whose headers depend on the version of a library",
}
# Each cell whose output is not compared, by notebook and id, with its reason.
NOT_COMPARED = {
    "00 cell-18": "time",
    "01 check": "machine",
    "01 check-goal": "machine",
    "01 budget-compiled": "machine",
    "01 budget-more": "machine",
    "01 find": "machine",
    "01 login": "machine",
    "04 train": "time",
    "04 second": "digits",
    "04 cost": "time",
    "05 load": "time",
    "05 switch": "time",
    "10 tools": "program",
    "10 load": "time",
    "10 exported": "program",
    "10 same-logits": "program",
    "10 same-answers": "program",
    "10 peft-read": "program",
    "10 upload": "size",
    "10 upload-preset": "size",
    "10 serve-command": "program",
    "10 serve": "program",
    "10 served": "program",
    "10 gguf": "program",
    "10 llama-said": "program",
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param, nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_one_title_and_the_badge_right_under_it(notebook):
    path, content = notebook
    titles = [
        line
        for c in content.cells
        if c.cell_type == "markdown"
        for line in c.source.splitlines()
        if line[:2] == "# "
    ]
    assert len(titles) == 1
    badge = content.cells[0].source.splitlines()[2]
    assert f"colab.research.google.com/github/{ACCOUNT}/blob/main/notebooks/{path.name}" in badge


def test_the_parameters_are_literals_with_form_fields_that_can_be_overridden(notebook):
    parameters = [cell for cell in code_cells(notebook[1]) if "parameters" in tags(cell)]
    assert parameters == [code_cells(notebook[1])[1]]
    *lines, last = parameters[0].source.splitlines()
    assert last == "gl.override_parameters(globals())"
    assert all(re.match(r"[A-Z_]+ = .+# @param", line) for line in lines)
    for line in lines:
        ast.literal_eval(line.split(" = ", 1)[1].split("  #")[0])


def test_every_parameter_is_overridden_by_the_environment(notebook, monkeypatch):
    (cell,) = [cell for cell in code_cells(notebook[1]) if "parameters" in tags(cell)]
    values = {}
    # As locals its names are no globals, so nothing is overridden here.
    exec(cell.source, {"gl": gl}, values)
    expected = {
        name: type(value)({str: "another", int: 7}.get(type(value), not value))
        for name, value in values.items()
    }
    for name, value in expected.items():
        monkeypatch.setenv(f"GEMMA_LORA_{name}", str(value))
    namespace = {"gl": gl}
    exec(cell.source, namespace)
    assert {name: namespace[name] for name in values} == expected
    assert values.keys() >= {"PRESET"}


def test_cells_are_short_define_nothing_and_were_run_in_order(notebook):
    for number, cell in enumerate(code_cells(notebook[1]), start=1):
        assert len(cell.source.splitlines()) <= 25
        assert "exercise" in tags(cell) or not re.search(
            r"^\s*(def|class) ", cell.source, re.MULTILINE
        )
        assert cell.execution_count == number
        assert not [output for output in cell.outputs if output.output_type == "error"]


def test_some_outputs_are_compared_and_some_cells_assert(notebook):
    compared = [
        cell
        for cell in code_cells(notebook[1])
        if cell.outputs and "nbval-ignore-output" not in tags(cell)
    ]
    assert len(compared) >= 3
    assert sum("assert " in cell.source for cell in code_cells(notebook[1])) >= 3


def test_every_output_is_compared_but_those_in_the_table():
    cells = {
        f"{path.name[:2]} {cell.id}": cell
        for path in NOTEBOOKS
        for cell in code_cells(nbformat.read(path, as_version=4))
    }
    ignored = {name for name, cell in cells.items() if "nbval-ignore-output" in tags(cell)}
    assert ignored == NOT_COMPARED.keys()
    assert set(NOT_COMPARED.values()) == REASONS.keys()
    assert len(ignored) <= len(cells) / 4


def test_times_and_bars_are_not_compared(notebook):
    for cell in code_cells(notebook[1]):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        text = json.dumps(cell.outputs)
        if "application/vnd.jupyter.widget-view+json" in kinds or "tokens/s" in text:
            assert "nbval-ignore-output" in tags(cell), cell.id
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.id


def test_all_notebooks_set_up_alike_and_install_the_version_that_they_were_written_for(notebook):
    set_up = code_cells(notebook[1])[0].source
    assert set_up == code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
    assert f'"gemma-lora @ git+https://github.com/{ACCOUNT}@v{gl.__version__}"' in set_up
    assert len([line for line in set_up.splitlines() if line]) <= 6


def test_each_notebook_says_what_it_takes_and_leads_on(notebook):
    first, last = notebook[1].cells[0].source, notebook[1].cells[-1].source
    assert all(f"**What you {word}.**" in first for word in ("will do", "will learn", "need"))
    assert all(
        part in last
        for part in ("## What you saw, and what it does not show", "**On your own.**", "**Next")
    )


def test_relative_links_lead_somewhere(notebook):
    path, content = notebook
    for text in [cell.source for cell in content.cells if cell.cell_type == "markdown"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), target


def test_nothing_committed_holds_a_path_of_a_machine_or_a_token(notebook):
    text = json.dumps(notebook[1])
    assert not re.search(r"(?<![\w.])/(?:home|root|work|Users)/|KGAT_\w{16}|hf_\w{30}", text)


def test_the_picture_of_the_readme_is_the_one_that_the_quickstart_made():
    assert README_PICTURE.read_bytes() == picture(nbformat.read(NOTEBOOKS[0], as_version=4))
    assert "notebooks/images/before_after.png" in Path(ROOT / "README.md").read_text()


def test_the_repository_is_the_same_everywhere(notebook):
    text = "\n".join(cell.source for cell in notebook[1].cells)
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w.-]+)", text)) == {ACCOUNT}
