"""What the README and the examples say is true: they are run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_first_example():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert re.match(r"AdamW\(.*step=500.*LastStep\(gradient_norm=\d", done.stdout)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_commands_are_one_line_of_sh(heading):
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)\n```", section, re.S)
    assert "\n" not in block
    assert block.startswith("python3 -m venv ")


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_digits():
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "digits.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    accuracies = [float(text) for text in re.findall(r"(?:as trained|moving averages)\s+([\d.]+)%", done.stdout)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 97
