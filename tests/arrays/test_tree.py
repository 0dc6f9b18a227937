"""Containers of arrays: nested, in pairs, from a module, in another order."""

import numpy as np
import torch

from adamw_numba import AdamW


def test_containers_of_every_kind():
    shapes = {"layers": [{"kernel": (2, 3), "bias": (3,)}, {"kernel": (3, 1)}], "scale": ()}
    tree = {"layers": [{k: np.ones(s) for k, s in layer.items()} for layer in shapes["layers"]], "scale": np.ones(())}
    optimizer = AdamW(0.1)
    optimizer.build(tree)
    names = ["layers/0/kernel", "layers/0/bias", "layers/1/kernel", "scale"]
    assert [n.removeprefix("momentum/") for n in optimizer.variable_names if n.startswith("momentum")] == names
    leaves = [tree["layers"][0]["kernel"], tree["layers"][0]["bias"], tree["layers"][1]["kernel"], tree["scale"]]
    reordered = {"scale": np.ones(()), "layers": tree["layers"]}
    copied = {
        "scale": np.ones(()),
        "layers": [{k: v.copy() for k, v in layer.items()} for layer in reordered["layers"]],
    }
    optimizer.apply(copied)
    optimizer.apply([np.ones_like(a) for a in leaves])
    optimizer.apply(np.ones_like(a) for a in leaves)
    assert all(np.allclose(a, 0.7, atol=0.002) for a in leaves)
    single = np.ones(3)
    alone = AdamW(0.1)
    alone.build(single)
    alone.apply(np.ones(3))
    assert np.allclose(single, 0.9, atol=0.001)
    model = torch.nn.Linear(2, 1)
    named = AdamW(0.1)
    named.exclude_from_weight_decay(var_names=["bias"])
    named.build(model.named_parameters())
    assert named.variable_names[2:] == ["momentum/weight", "velocity/weight", "momentum/bias", "velocity/bias"]
    before = model.bias.detach().clone()
    named.apply([(name, torch.zeros_like(p)) for name, p in model.named_parameters()][::-1])
    assert torch.equal(model.bias, before)
