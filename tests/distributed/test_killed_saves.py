"""A rank is killed in each phase of a save: what was saved before counts, or all of the new, and nothing in between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import killed_saves
from helpers.killed_saves import CASES, PHASES, SIZE

NAMES = [phase.__name__ for phase in PHASES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    roots = [str(Path(__file__).parents[k]) for k in (2, 1)]
    done = subprocess.run(
        [sys.executable, killed_saves.__file__, tmp_path_factory.mktemp("saves")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("phase", "victim"), CASES)
def test_a_rank_that_is_killed(phase, victim, outcomes):
    found = outcomes[f"{phase}-{victim}"]
    assert found["calm"] == [0] * SIZE
    assert found["codes"][victim] == -signal.SIGKILL
    # The others notice by their next message; where rank 0 tidies, they have gone already, and well.
    others = [code for k, code in enumerate(found["codes"]) if k != victim]
    assert others == [0 if phase == "when_tidying" else 3] * (SIZE - 1)
    is_new = NAMES.index(phase) >= NAMES.index("after_the_index")
    assert found["before"]["iterations"] == 2
    assert found["after"]["iterations"] == (3 if is_new else 2)
    assert (found["after"] == found["before"]) != is_new
    assert found["again"] == [0, 0]
    assert found["names"] == ["index.json", "rank-00000", "rank-00001"]
