"""`python -m adamw_numba`: what it prints, what it refuses, and its exit status."""

import json

import numpy as np
import pytest
from helpers.states import STORES, go_on, image, optimizer_of, variables_of

from adamw_numba import LossScaleOptimizer
from adamw_numba.__main__ import main


@pytest.mark.parametrize("source", STORES)
def test_command_line(source, tmp_path, capsys):
    variables, optimizer = variables_of("bfloat16"), optimizer_of("scaled")
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 5)
    optimizer.save(tmp_path / source, extra={"e": 1}, variables=True)
    assert main(["inspect", str(tmp_path / source)]) == 0
    table = capsys.readouterr().out
    assert "LossScaleOptimizer, step 4" in table
    assert "bfloat16" in table
    assert main(["inspect", "--json", str(tmp_path / source)]) == 0
    assert json.loads(capsys.readouterr().out)["extra"] == {"e": 1}
    for target in STORES:
        converted = tmp_path / f"converted-{target}"
        assert main(["convert", str(tmp_path / source), str(converted)]) == 0
        assert main(["verify", str(converted)]) == 0
        copies = {k: np.zeros_like(v) for k, v in variables.items()}
        assert image(LossScaleOptimizer.load(converted, copies), copies) == image(optimizer, variables)
    if source == "s.npz":
        (tmp_path / source).write_bytes(b"PK nonsense")
        capsys.readouterr()
        assert main(["verify", str(tmp_path / source)]) == 1
        assert "s.npz" in capsys.readouterr().err
