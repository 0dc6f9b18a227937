"""The examples of docs/other_packages.md, each next to what its package's own optimizer finds.

`python tests/interop/test_other_packages.py` prints the table of that page.
"""

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

PAGE = Path(__file__).parents[2] / "docs" / "other_packages.md"


def code_of():
    """The code under each heading."""
    sections = re.split(r"^#+ (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, text in pairs}


def by_scipy(fun, x0, **options):
    result = scipy.optimize.minimize(fun, x0, method="L-BFGS-B", **options)
    return result.fun, result.nfev


def of_lmfit(n):
    own = n["lmfit"].Minimizer(n["residual"], n["params"]).minimize(method="leastsq")
    return (n["fit"].chisqr, n["fit"].nfev), (own.chisqr, own.nfev)


def of_statsmodels(n):
    own = n["logit"].fit(disp=0)
    return (-n["fit"].llf, n["fit"].mle_retvals["fcalls"]), (-own.llf, own.mle_retvals["iterations"])


def of_scikit_learn(n):
    own = n["GaussianProcessRegressor"](n["kernel"]).fit(n["inputs"], n["outputs"])
    return tuple((-process.log_marginal_likelihood_value_, None) for process in (n["process"], own))


def of_pymc(n):
    with n["model"]:
        _, own = n["pymc"].find_MAP(progressbar=False, return_raw=True)
    return (n["result"].fun, n["result"].nfev), (own.fun, own.nfev)


def of_iminuit(n):
    own = n["iminuit"].Minuit(n["cost"], a=0, b=0)
    own.migrad()
    return (n["minuit"].fval, n["minuit"].nfcn), (own.fval, own.nfcn)


def of_qiskit(n):
    from qiskit_algorithms import NumPyMinimumEigensolver, optimizers

    own = n["VQE"](
        n["StatevectorEstimator"](), n["ansatz"], optimizer=optimizers.SLSQP(), initial_point=n["start"]
    ).compute_minimum_eigenvalue(n["hamiltonian"])
    exact = NumPyMinimumEigensolver().compute_minimum_eigenvalue(n["hamiltonian"]).eigenvalue.real
    assert own.eigenvalue.real == pytest.approx(exact, abs=1e-3)
    return (n["energy"], 61 * (1 + len(n["start"]))), (own.eigenvalue.real, own.cost_function_evals)


def of_pennylane(n):
    descent, p = n["qml"].GradientDescentOptimizer(0.4), n["pnp"].array([0.3, 0.2], requires_grad=True)
    for _ in range(100):
        p = descent.step(n["circuit"], p)
    return (n["angles"].fun, n["angles"].nfev), (float(n["circuit"](p)), 100)


def of_pylops(n):
    return (n["sharp"].fun, n["sharp"].nfev), by_scipy(n["misfit"], np.zeros(n["n"]), jac=True)


def of_scikit_fem(n):
    bounds = list(zip(n["lower"], n["upper"], strict=True))
    own = by_scipy(n["energy"], np.zeros(len(bounds)), jac=True, bounds=bounds)
    assert (n["membrane"].x <= 0.05).all()
    return (n["membrane"].fun, n["membrane"].nfev), own


def of_sympy(n):
    return (n["bottom"].fun, n["bottom"].nfev), by_scipy(n["valley"], [-1.2, 1.0], jac=True)


def of_jax(n):
    points = np.linspace(-1, 1, 50)
    basis = np.vander(points, 3, increasing=True)
    _, residual, *_ = np.linalg.lstsq(basis, np.cos(2 * points))
    return (n["curve"].fun, n["curve"].nfev), (residual[0], 1)


# Heading: the package that it needs, and what gives value and evaluations, ours and its own
PACKAGES = {
    "lmfit": ("lmfit", of_lmfit),
    "statsmodels": ("statsmodels", of_statsmodels),
    "scikit-learn": ("sklearn", of_scikit_learn),
    "PyMC": ("pymc", of_pymc),
    "iminuit": ("iminuit", of_iminuit),
    "Qiskit": ("qiskit_algorithms", of_qiskit),
    "PennyLane": ("pennylane", of_pennylane),
    "PyLops": ("pylops", of_pylops),
    "scikit-fem": ("skfem", of_scikit_fem),
    "SymPy": ("sympy", of_sympy),
    "JAX": ("jax", of_jax),
}
OWN = {
    "lmfit": "leastsq",
    "statsmodels": "Newton",
    "scikit-learn": "L-BFGS-B",
    "PyMC": "L-BFGS-B",
    "iminuit": "MIGRAD",
    "Qiskit": "SLSQP",
    "PennyLane": "gradient descent",
    "PyLops": "SciPy's L-BFGS-B",
    "scikit-fem": "SciPy's L-BFGS-B",
    "SymPy": "SciPy's L-BFGS-B",
    "JAX": "linear least squares",
}


def found(heading):
    """Value and evaluations: ours, and those of the package's own optimizer."""
    code = code_of()
    namespace = {}
    for block in (*code["In other packages"], *code[heading]):
        exec(compile(block, str(PAGE), "exec"), namespace)
    return PACKAGES[heading][1](namespace)


@pytest.mark.slow
@pytest.mark.parametrize("heading", PACKAGES)
def test_as_good_as_its_own_optimizer(heading):
    if importlib.util.find_spec(PACKAGES[heading][0]) is None:
        pytest.skip(f"{heading} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the packages, and the one that a Hessian is not used
        (value, _), (theirs, _) = found(heading)
    # A circuit is given 60 iterations only.
    tolerance = 2e-2 if heading == "Qiskit" else 2e-3 if heading == "PennyLane" else 1e-4
    assert value <= theirs + tolerance * max(1, abs(theirs))


def test_every_example_is_run():
    assert {heading for heading, blocks in code_of().items() if blocks} == {"In other packages", *PACKAGES}


def main():
    print("| package | its own optimizer: value, evaluations | `minimize`: value, evaluations |\n|---|---|---|")
    for heading in PACKAGES:
        ours, theirs = found(heading)
        cells = [f"{value:.6g}" + (f", {calls:,}" if calls else "") for value, calls in (theirs, ours)]
        print(f"| {heading} | {OWN[heading]}: {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
