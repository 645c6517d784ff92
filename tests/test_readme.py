"""Every Python example of the README runs as written."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[0][:40])
def test_readme_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    if "aux" in names:  # the functional example must learn, not only run
        assert names["aux"]["loss"] < 0.7 * 8  # predicting 0 costs 8 in the mean
        assert len([line for line in code.splitlines() if line.strip()]) <= 25
    if "again" in names:
        assert len(names["several"]) == 2
        assert len(names["several"][0]) == 5
