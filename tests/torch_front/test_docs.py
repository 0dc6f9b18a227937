"""The examples of docs/torch.md train as they do with torch's own optimizer."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed
from helpers.torch_clients import WARNINGS, assert_close, weights_of

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"
EXAMPLES = dict(re.findall(r"^### (.+?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
OURS, THEIRS = "from adamw_numba.torch import AdamW", "from torch.optim import AdamW"
PACKAGES = {
    "DistributedDataParallel": "torch",
    "ZeroRedundancyOptimizer": "torch",
    "FSDP2": "torch",
    "Lightning": "pytorch_lightning",
    "Accelerate": "accelerate",
    "transformers": "transformers",
    "skorch": "skorch",
}

pytestmark = [
    *(pytest.mark.usefixtures("one_thread", "group_of_one"), *WARNINGS),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),  # each example runs twice
]


@pytest.fixture
def group_of_one(monkeypatch):
    """What torchrun puts into the environment."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def weights_after(code):
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return weights_of(namespace["net"].module_ if "net" in namespace else namespace["model"])


@pytest.mark.parametrize("heading", PACKAGES)
def test_example(heading, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[heading])
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[heading]
    assert code.count(OURS) == 1
    assert_close(weights_after(code), weights_after(code.replace(OURS, THEIRS)))


def test_every_example_is_run():
    assert EXAMPLES.keys() == PACKAGES.keys()
    assert PAGE.read_text().partition("### ")[2].count("```python") == len(EXAMPLES)
