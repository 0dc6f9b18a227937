"""What the README and the examples say is true: they are run."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers.libraries import torch

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


@pytest.mark.slow
def test_digits():
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "digits.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    accuracies = [float(text) for text in re.findall(r"(?:as trained|moving averages)\s+([\d.]+)%", done.stdout)]
    assert len(accuracies) == 2
    assert min(accuracies) >= 97


def run_gpu_pipeline(*options):
    command = [sys.executable, "-W", "error", ROOT / "examples" / "gpu_pipeline.py", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gpu_pipeline(library, tmp_path):
    picture = tmp_path / "picture.png"
    done = run_gpu_pipeline("--library", library, "--size", "64", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{library} on c")  # cpu or cuda
    misfits, errors = np.transpose(re.findall(r"^ +\d+ +([\d.]+) +([\d.]+)%", done.stdout, re.M)).astype(float)
    assert errors[0] > 10
    assert errors[-1] < 1
    assert misfits[-1] == pytest.approx(0.75**0.5 / 2, rel=0.05)  # photon counts, less 2 unknowns in 8 of them
    assert f"Picture: {picture}" in done.stdout or "matplotlib is not installed" in done.stdout
    assert picture.exists() == (find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--library", "jax"), ("--size", "15"), ("--steps", "1"), ("--output", "a.txt"), ("--output", "no/such/a.png")],
)
def test_gpu_pipeline_refuses(option, value):
    done = run_gpu_pipeline(option, value)
    assert done.returncode == 2
    assert re.search(rf"argument {option}: .*{re.escape(value)}.*(expected|choose from)", done.stderr)


def test_gpu_pipeline_gradient_is_that_of_autograd():
    example = runpy.run_path(str(ROOT / "examples" / "gpu_pipeline.py"))
    generator = torch.Generator().manual_seed(0)
    estimate = torch.randn(12, 15, dtype=torch.complex128, generator=generator, requires_grad=True)
    masks = torch.randn(3, 12, 15, dtype=torch.complex128, generator=generator)
    measured = torch.rand(3, 12, 15, dtype=torch.float64, generator=generator)
    wave = torch.fft.fft2(masks * estimate, norm="ortho")
    (expected,) = torch.autograd.grad(((wave.abs() - measured) ** 2).sum() / 2, estimate)
    seen = example["gradient"](estimate.detach(), masks, measured)
    np.testing.assert_allclose(seen.numpy(), expected.numpy(), rtol=1e-12, atol=1e-12)
