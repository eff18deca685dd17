"""The README's code runs, in its order, in a folder of its own."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, compiled_well):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    # In this process: another one would import Keras once more, for ten seconds.
    exec("\n".join(blocks), {})
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"my-adapter", "for-peft", "for-transformers", "for-ollama", "mine"}
