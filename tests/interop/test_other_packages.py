"""The examples of docs/other_packages.md, each next to what its package's own optimizer finds.

`python tests/interop/test_other_packages.py` prints the table of that page.
"""

import functools
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
    own = n["logit"].fit(method="bfgs", disp=0)
    newton = n["logit"].fit(disp=0)
    assert own.llf == pytest.approx(newton.llf, rel=1e-6)
    return (-n["fit"].llf, n["fit"].mle_retvals["fcalls"]), (-own.llf, own.mle_retvals["fcalls"])


def of_scikit_learn(n):
    class Counted(n["GaussianProcessRegressor"]):
        calls = 0

        def log_marginal_likelihood(self, theta=None, eval_gradient=False, clone_kernel=True):
            self.calls += eval_gradient  # as it is called by optimizers
            return super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)

    both = [Counted(n["kernel"], optimizer=o).fit(n["inputs"], n["outputs"]) for o in (n["optimizer"], "fmin_l_bfgs_b")]
    ours, own = ((-process.log_marginal_likelihood_value_, process.calls) for process in both)
    assert ours[0] == -n["process"].log_marginal_likelihood_value_
    return ours, own


def of_pymc(n):
    with n["model"]:
        _, own = n["pymc"].find_MAP(progressbar=False, return_raw=True)
    return (n["result"].fun, n["result"].nfev), (own.fun, own.nfev)


def of_iminuit(n):
    own = n["iminuit"].Minuit(n["cost"], a=0, b=0)
    own.migrad()
    assert list(n["minuit"].values) == pytest.approx([3, -10], abs=1e-4)
    return (n["minuit"].fval, n["minuit"].nfcn), (own.fval, own.nfcn)


def of_qiskit(n):
    from qiskit_algorithms import optimizers

    def by(optimizer):
        vqe = n["VQE"](n["StatevectorEstimator"](), n["ansatz"], optimizer=optimizer, initial_point=n["start"])
        result = vqe.compute_minimum_eigenvalue(n["hamiltonian"])
        return result.eigenvalue.real, result.cost_function_evals

    exact = np.linalg.eigvalsh(n["hamiltonian"].to_matrix())[0]
    ours = n["ground"].eigenvalue.real, n["ground"].cost_function_evals
    assert ours[0] == pytest.approx(exact, abs=1e-8)
    assert by(functools.partial(n["minimize"], maxiter=60)) == (pytest.approx(exact, abs=1e-3), 305)
    return ours, by(optimizers.SLSQP())


def of_pennylane(n):
    descent, p = n["qml"].GradientDescentOptimizer(0.4), n["qml"].numpy.array([0.3, 0.2], requires_grad=True)
    for _ in range(100):
        p = descent.step(n["circuit"], p)
    return (n["angles"].fun, n["angles"].nfev), (float(n["circuit"](p)), 100)


def of_pylops(n):
    operators, data = [n["blur"], 0.1**0.5 * n["rough"]], np.append(n["measured"], np.zeros(n["n"]))
    stack = n["pylops"].VStack(operators)
    x, _, steps, *_ = n["pylops"].optimization.basic.cgls(stack, data, np.zeros(n["n"]), niter=1000, tol=1e-12)
    return (n["sharp"].fun, n["sharp"].nfev), (n["misfit"](x)[0], steps)


def of_scikit_fem(n):
    bounds = list(zip(n["lower"], n["upper"], strict=True))
    assert (n["membrane"].x <= 0.05).all()
    assert (n["membrane"].x[n["edge"]] == 0).all()
    assert (n["membrane"].x == 0.05).sum() > 10
    return (n["membrane"].fun, n["membrane"].nfev), by_scipy(
        n["energy"], np.zeros(len(bounds)), jac=True, bounds=bounds
    )


def of_sympy(n):
    assert n["bottom"].x == pytest.approx([1, 1], abs=1e-4)
    return (n["bottom"].fun, n["bottom"].nfev), by_scipy(n["valley"], [-1.2, 1.0], jac=True)


def of_jax(n):
    basis = np.vander(n["points"], 3, increasing=True)
    _, residual, *_ = np.linalg.lstsq(basis, np.cos(2 * n["points"]))
    return (n["curve"].fun, n["curve"].nfev), (residual[0], 1)


def of_quimb(n):
    own = n["qtn"].TNOptimizer(
        n["product"], n["distance"], loss_constants=n["constants"], autodiff_backend="autograd", progbar=False
    )
    own.optimize(1000)
    exact = 1 - (3 / 4) ** 3  # of n qubits, each is then 1 with probability 1 / n: 1 - ((n - 1) / n)**(n - 1)
    assert n["network"].res.fun == pytest.approx(exact, abs=1e-6)
    return (n["network"].res.fun, n["network"].nevals), (own.res.fun, own.nevals)


# Heading: the package that it needs, what gives value and evaluations (ours and its own), and the name of its own
PACKAGES = {
    "lmfit": ("lmfit", of_lmfit, "leastsq"),
    "statsmodels": ("statsmodels", of_statsmodels, "BFGS"),
    "scikit-learn": ("sklearn", of_scikit_learn, "L-BFGS-B"),
    "PyMC": ("pymc", of_pymc, "L-BFGS-B"),
    "iminuit": ("iminuit", of_iminuit, "MIGRAD"),
    "Qiskit": ("qiskit_algorithms", of_qiskit, "SLSQP"),
    "PennyLane": ("pennylane", of_pennylane, "gradient descent"),
    "PyLops": ("pylops", of_pylops, "CGLS"),
    "scikit-fem": ("skfem", of_scikit_fem, "SciPy's L-BFGS-B"),
    "SymPy": ("sympy", of_sympy, "SciPy's L-BFGS-B"),
    "JAX": ("jax", of_jax, "NumPy's linear least squares"),
    "quimb": ("quimb", of_quimb, "L-BFGS-B"),
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
    """The examples assert themselves that they have converged."""
    if importlib.util.find_spec(PACKAGES[heading][0]) is None:
        pytest.skip(f"{heading} is not installed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Method AdamW does not use Hessian", RuntimeWarning)  # statsmodels
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # PyMC's; once a day
        (value, _), (theirs, _) = found(heading)
    assert value == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_every_example_is_run():
    assert {heading for heading, blocks in code_of().items() if blocks} == {"In other packages", *PACKAGES}


def main():
    print("| package | its own optimizer: value, evaluations | `minimize`: value, evaluations |\n|---|---|---|")
    for heading in PACKAGES:
        ours, theirs = found(heading)
        cells = [f"{value:.6g}, {calls:,}" for value, calls in (theirs, ours)]
        print(f"| {heading} | {PACKAGES[heading][2]}: {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
