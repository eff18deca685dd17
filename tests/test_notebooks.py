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
    account = REPOSITORY.removeprefix("https://github.com/")
    assert f"colab.research.google.com/github/{account}/blob/main/notebooks/{path.name}" in badge


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
    exec(
        cell.source, {"gl": gl}, values
    )  # its names are globals there, so nothing is overridden here
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


def test_times_bars_and_pictures_are_not_compared(notebook):
    for cell in code_cells(notebook[1]):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        text = "".join(output.get("text", "") for output in cell.outputs)
        if (
            "image/png" in kinds
            or "application/vnd.jupyter.widget-view+json" in kinds
            or "/step" in text
        ):
            assert "nbval-ignore-output" in tags(cell), cell.id
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.id


def test_all_notebooks_set_up_alike_and_install_the_version_that_they_were_written_for(notebook):
    setup = code_cells(notebook[1])[0].source
    assert setup == code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source
    account = REPOSITORY.removeprefix("https://github.com/")
    assert f'REPOSITORY, VERSION = "{account}", "{gl.__version__}"' in setup


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
    account = REPOSITORY.removeprefix("https://github.com/")
    for found in re.findall(
        r"github(?:\.com)?/([\w-]+/[\w.-]+)", "\n".join(c.source for c in notebook[1].cells)
    ):
        assert found == account
