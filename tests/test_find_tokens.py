"""Does `find_tokens` find tokens of each kind in each place, and nothing else?

No token stands in this file: they are put together when it runs.
"""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
HEX = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
WORD = "Ab3dE6gH9jK2mN5pQ8sT1vW4yZ7" + "bC0dF3gH"
TOKENS = {
    "Kaggle's": "KGAT" + "_" + HEX,
    "Kaggle's older": HEX,
    "kaggle.json": '{"username": "ada", ' + '"key": "' + WORD + '"}',
    "in Python": 'os.environ["KAGGLE_' + 'KEY"] = "' + WORD + '"',
    "as a keyword": "KAGGLE_API_" + "TOKEN='" + WORD + "'",
    "in a shell": "export HF_" + "TOKEN=" + WORD,
    "the magic": "%env KAGGLE_" + "KEY=" + WORD,
    "the Hub's": "hf" + "_" + WORD[:30],
    "GitHub's": "ghp" + "_" + WORD,
    "GitHub's finer": "github" + "_pat_" + WORD,
    "Google's": "AI" + "za" + WORD,
    "others'": "sk" + "-proj-" + WORD,
    "a header": "Authorization: " + "Bearer " + WORD,
    "a header in a dict": '{"Authorization": "' + "Basic " + WORD + '=="}',
}
HARMLESS = [
    'os.environ["KAGGLE_API_TOKEN"] = "your token here"', 'KAGGLE_KEY = "..."',
    'HF_TOKEN="your-token-here-please"', "export KAGGLE_API_TOKEN=<your-token>", "KGAT_...",
    "hf_hub_download(repo)", 'KAGGLE_KEY = os.environ["KAGGLE_KEY"]',
    'userdata.get("KAGGLE_API_TOKEN")', "the hf_transfer package", "sk-learn",
    "Authorization: Bearer TOKEN", "name `KAGGLE_API_TOKEN`, value the token", "0" * 32,
    '{"username": "...", "key": "..."}', "3.14159265358979",
    '("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")', "http://127.0.0.1:8888/lab?token=...",
]  # fmt: skip


def run(*paths) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests/find_tokens.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def notebook(text: str, place: str) -> nbformat.NotebookNode:
    """A notebook of two cells, with a text in the second line of some place."""
    v4, text = nbformat.v4, f"first line\n{text} and more"
    code = v4.new_code_cell("1 + 1", id="here")
    made = v4.new_notebook(cells=[v4.new_markdown_cell("nothing", id="above"), code])
    if place == "source":
        code.source = text
    elif place == "markdown":
        made.cells = [v4.new_markdown_cell(text, id="here")]
    elif place == "stream":
        code.outputs = [v4.new_output("stream", text=text)]
    elif place == "error":
        code.outputs = [
            v4.new_output(
                "error", ename="E", evalue="", traceback=["\x1b[31mfirst", f"\x1b[0m{text}"]
            )
        ]
    elif place == "cell metadata":
        code.metadata["note"] = text
    elif place == "metadata":
        made.metadata["note"] = {"deep": [text]}
    elif place == "json":
        code.outputs = [v4.new_output("display_data", {"application/json": {"deep": [text]}})]
    else:
        code.outputs = [v4.new_output("execute_result", {place: text})]
    return made


PLACES = [
    "source",
    "markdown",
    "stream",
    "error",
    "cell metadata",
    "metadata",
    "json",
    "text/plain",
    "text/html",
]


def test_the_repository_holds_none():
    done = run("notebooks", "README.md", "gemma_lora/tiny/tiny_gemma_en/README.md")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("place", PLACES)
def test_each_kind_is_found_in_each_place_and_not_shown(tmp_path, place):
    for number, token in enumerate(TOKENS.values()):
        nbformat.write(notebook(token, place), tmp_path / f"{number:02}.ipynb")
    done = run(tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for number, kind in enumerate(TOKENS):
        about = [line for line in lines if f"{number:02}.ipynb" in line]
        assert about, f"{kind} was not found in {place}"
        if "metadata" not in place:
            assert "cell here" in about[0]
        if place in ("source", "markdown", "stream", "text/plain", "text/html"):
            assert "line 2" in about[0]
    assert HEX[:9] not in done.stdout and WORD[:9] not in done.stdout


def test_each_kind_is_found_in_a_text(tmp_path):
    files = [tmp_path / f"{number:02}.md" for number in range(len(TOKENS))]
    for file, token in zip(files, TOKENS.values(), strict=True):
        file.write_text(f"one\ntwo\nthree {token}\n")
    done = run(*files)
    assert done.returncode == 1
    for file, kind in zip(files, TOKENS, strict=True):
        assert f"{file.name}, line 3: " in done.stdout, kind


@pytest.mark.parametrize("place", [*PLACES, "text"])
def test_what_is_harmless_is_passed(tmp_path, place):
    text = "\n".join(HARMLESS)
    if place == "text":
        (tmp_path / "one.md").write_text(text)
    else:
        nbformat.write(notebook(text, place), tmp_path / "one.ipynb")
    done = run(*tmp_path.iterdir())
    assert done.returncode == 0, done.stdout


def test_pictures_and_ids_are_passed(tmp_path):
    made = notebook("nothing", "text/plain")
    made.cells[1].id = HEX
    made.cells[1].outputs += [
        nbformat.v4.new_output("display_data", {"image/png": TOKENS["Kaggle's"]})
    ]
    page = f'<img src="data:image/png;base64,{HEX}">'
    made.cells[1].outputs += [nbformat.v4.new_output("display_data", {"text/html": page})]
    (tmp_path / "one.ipynb").write_text(json.dumps(made))
    assert run(tmp_path).returncode == 0


def test_without_a_path_it_says_how_it_is_used():
    assert run().returncode == 1 and "python tests/find_tokens.py" in run().stderr
