"""What the rewrites did to a model, a graph or a compiled function, and what stayed dense.

And of a model, the scales that the factors of a product share.
"""

from pymc.model import Model

from pymc_kron.diagnostics.programs import (
    Explainable,
    dense_products_in,
    distributions_of,
    fired_in,
    programs_of,
)
from pymc_kron.diagnostics.report import (
    DenseProduct,
    Distribution,
    Explanation,
    Factor,
    Fired,
    Reason,
    ScaledFactor,
    SharedScale,
    dense_table,
    total,
)
from pymc_kron.diagnostics.scales import shared_scales

__all__ = [
    "DenseProduct",
    "Distribution",
    "Explanation",
    "Factor",
    "Fired",
    "Reason",
    "ScaledFactor",
    "SharedScale",
    "assert_no_dense_kron",
    "explain",
]


def explain(x: Explainable) -> Explanation:
    """Say which rewrites fired, which Kronecker products stayed dense, and why.

    Of a model, also which factors of a product share a scale that the data don't identify,
    ``A (x) B = cA (x) (B / c)``, and which of its distributions are factorwise as they are written.
    Nothing is compiled to machine code, and what is given isn't changed.

    Parameters
    ----------
    x : pymc.Model, TensorVariable, sequence of TensorVariable, FunctionGraph or Function
        A model stands for what is compiled from it: its log-density ("logp"), the gradient of
        that ("gradient"), and a prior predictive draw with its deterministics ("draws"). A graph
        is rewritten as PyTensor's default mode would. Of a compiled function, `explain`
        shows what was rewritten while it was compiled; PyMC has rewritten the log-density of a
        model by then, so pass the model to see that too.

    Returns
    -------
    Explanation
        Prints as a table, in a notebook as HTML. What is printed is in its attributes too.

    Raises
    ------
    TypeError
        If `x` is something else.

    See Also
    --------
    assert_no_dense_kron : The same as a test.

    Notes
    -----
    The operations saved are estimates: the leading terms of the counts in [1]_ for the dense
    operation and for those on the factors. A decomposition that a dense program could share is
    counted once. The gradient of what was factorwise before the gradient was taken is factorwise
    too; no rewrite fires there, and what that saves isn't counted.

    Factors share a scale if free variables can move along a direction that scales the factors
    against each other, and changes nothing else that the data depend on. That is decided from
    the Jacobian of the factors, at a point near where a sampler starts [2]_, in whatever way
    an amplitude is written. Priors of the variables that move don't count. Amplitudes that are
    discrete, inside of loops, or twice in one factor aren't seen.

    References
    ----------
    .. [1] Golub, G. H. and Van Loan, C. F. (2013). "Matrix computations", 4th edition. Johns
       Hopkins University Press.
    .. [2] Rothenberg, T. J. (1971). "Identification in parametric models". Econometrica 39(3),
       577-591.

    Examples
    --------
    A graph:

    .. code-block:: python

        import pytensor.tensor as pt
        import pymc_kron as pk

        A = pt.matrix("A", shape=(30, 30))
        B = pt.matrix("B", shape=(40, 40))
        K = pt.linalg.kron(A, B)
        b = pt.vector("b", shape=(1200,))

        explanation = pk.explain([pt.linalg.solve(K, b), pt.exp(K).sum()])
        print(explanation)
        [product] = explanation.dense
        assert product.shape == (1200, 1200)
        assert product.consumers == ("Exp",)

    A model with one amplitude too many:

    .. code-block:: python

        import numpy as np
        import pymc as pm

        with pm.Model() as model:
            s, t = pm.HalfNormal("s"), pm.HalfNormal("t")
            pk.KroneckerMvNormal("y", covs=[s * np.eye(3), t * np.eye(4)], observed=np.ones(12))

        [shared] = pk.explain(model).shared_scales
        assert [factor.variables for factor in shared.factors] == [("s",), ("t",)]
    """
    fired: list[Fired] = []
    dense: list[DenseProduct] = []
    bytes_saved: list[int | None] = []
    for program in programs_of(x):
        # First, since it adds what the rewrites did to inner graphs to the journal
        dense_here = list(dense_products_in(program))
        fired_here, saved = fired_in(program, dense_here)
        dense.extend(dense_here)
        fired.extend(fired_here)
        bytes_saved.append(saved)
    return Explanation(
        tuple(fired),
        tuple(dense),
        total(bytes_saved),
        distributions_of(x) if isinstance(x, Model) else (),
        shared_scales(x) if isinstance(x, Model) else (),
    )


def assert_no_dense_kron(x: Explainable) -> None:
    """Fail if a Kronecker product stays dense, with a table of what does and why.

    Parameters
    ----------
    x : pymc.Model, TensorVariable, sequence of TensorVariable, FunctionGraph or Function
        As for `explain`.

    Raises
    ------
    AssertionError
        If a program forms a Kronecker product, or the gradient in one.
    TypeError
        If `x` is something else.

    See Also
    --------
    explain : The same as a table, with what was rewritten.

    Examples
    --------
    In the test suite of a project that has a model:

    .. code-block:: python

        import numpy as np
        import pymc as pm
        import pytensor.tensor as pt
        import pymc_kron as pk

        with pm.Model() as model:
            scale = pm.HalfNormal("scale")
            cov = pt.linalg.kron(scale * np.eye(3), np.eye(4))
            pm.MvNormal("y", np.zeros(12), cov, observed=np.ones(12))

        pk.assert_no_dense_kron(model)
    """
    dense = explain(x).dense
    if dense:
        raise AssertionError(f"a Kronecker product stays dense\n\n{dense_table(dense).text()}")
