"""What `explain` says about models, graphs and compiled functions."""

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
import pytest
from pytensor.compile.builders import OpFromGraph
from pytensor.graph.basic import equal_computations
from pytensor.graph.fg import FunctionGraph
from pytensor.graph.traversal import graph_inputs

import pymc_kron as pk
from pymc_kron.diagnostics.costs import DECOMPOSITIONS
from tests.helpers import PY, WITHOUT_KRON, random_spd

kron = pt.linalg.kron

rng = np.random.default_rng(3)
SPACE, TIME = random_spd(rng, 3), random_spd(rng, 4)
Y = rng.normal(size=12)
N_BYTES = 12 * 12 * 8

A, B = pt.tensor("A", shape=(3, 3)), pt.tensor("B", shape=(4, 4))
x = pt.tensor("x", shape=(12,))
X = pt.tensor("X", shape=(12, 5))
K = kron(A, B)
RECTANGULAR = kron(pt.tensor("R", shape=(3, 2)), pt.tensor("S", shape=(2, 3)))

GRAPHS = {
    "graph": lambda outputs: outputs,
    "fgraph": lambda outputs: FunctionGraph(outputs=outputs, clone=True),
    "function": lambda outputs: pytensor.function(
        [A, B, x], outputs, mode=PY, on_unused_input="ignore"
    ),
}


def space():
    scale = pm.HalfNormal("scale")
    K_space = scale * SPACE
    K_space.name = "K_space"
    return K_space


def factorwise_model(kind):
    with pm.Model() as model:
        if kind == "KroneckerMvNormal":
            pk.KroneckerMvNormal("y", covs=[space(), TIME], observed=Y)
        else:
            pm.MvNormal("y", np.zeros(12), kron(space(), TIME), observed=Y)
    return model


def dense_model():
    with pm.Model() as model:
        K = kron(space(), TIME)
        pm.MvNormal("y", np.zeros(12), K, observed=Y)
        pm.Potential("roughness", -pt.exp(K).sum())
        pm.Deterministic("K", K)
    return model


@pytest.mark.parametrize("kind", ["KroneckerMvNormal", "MvNormal"])
def test_a_model_that_is_factorwise(kind):
    explanation = pk.explain(factorwise_model(kind))
    assert explanation.is_factorwise
    assert explanation.dense == ()
    rewrites = {row.rewrite for row in explanation.fired}
    assert {"whitened_norm_of_kron_solve", "det_of_kron"} <= rewrites
    assert ("mvnormal_of_kron_logp" in rewrites) == (kind == "MvNormal")
    assert all(row.count == 1 for row in explanation.fired)
    logp = [row for row in explanation.fired if row.program == "logp"]
    assert {tuple(factor.shape for factor in row.factors) for row in logp} == {((3, 3), (4, 4))}
    if kind == "MvNormal":
        assert [str(factor) for factor in logp[0].factors] == ["K_space[3x3]", "?[4x4]"]
    # One Cholesky factor and one triangular solution in both directions, dense and factorwise:
    # 12^3 / 3 - (3^3 + 4^3) / 3 + 2 (12^2 - 12 (3 + 4))
    assert sum(row.flops_saved for row in logp) == pytest.approx(1637 / 3 + 120)
    n_programs = len({row.program for row in explanation.fired})
    assert n_programs == (2 if kind == "MvNormal" else 1)
    assert explanation.bytes_saved == n_programs * N_BYTES
    assert "No Kronecker product stays dense" in str(explanation)
    pk.assert_no_dense_kron(factorwise_model(kind))


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_distributions_that_are_factorwise_as_written(sigma):
    with pm.Model() as model:
        pk.TensorNormal("y", covs=[space(), TIME], sigma=sigma, observed=Y.reshape(3, 4))
    explanation = pk.explain(model)
    assert explanation.is_factorwise
    [distribution] = explanation.distributions
    assert (distribution.variable, distribution.name) == ("y", "TensorNormal")
    assert [str(factor) for factor in distribution.factors] == ["K_space[3x3]", "?[4x4]"]
    assert distribution.has_noise == (sigma is not None)
    # Its log-density with noise is a closed form, in which nothing is left to rewrite
    assert bool(explanation.fired) == (sigma is None)
    text, html = str(explanation), explanation._repr_html_()
    for part in ("Factorwise as written", "TensorNormal", "No Kronecker product stays dense."):
        assert part in text
        assert part in html
    assert ("K_space[3x3] (x) ?[4x4] + noise" in text) == (sigma is not None)


def test_a_model_that_is_not():
    model = dense_model()
    explanation = pk.explain(model)
    assert not explanation.is_factorwise
    product, gradient, draw = explanation.dense
    assert product.programs == ("logp", "gradient")
    assert [factor.name for factor in product.factors] == ["K_space", "?"]
    assert [factor.shape for factor in product.factors] == [(3, 3), (4, 4)]
    assert (product.shape, product.dtype, product.nbytes) == ((12, 12), "float64", N_BYTES)
    assert product.consumers == ("Exp", "gradient of kron")
    [reason] = product.reasons
    assert reason.reason == "no rewrite knows this `Exp` of a Kronecker product"
    assert not product.is_gradient
    assert gradient.is_gradient
    assert gradient.programs == ("gradient",)
    assert gradient.shape == (12, 12)
    assert gradient.reasons
    assert draw.programs == ("draws",)
    assert draw.consumers == ("output",)
    # What was rewritten is listed, but no memory is saved where the product is formed
    assert "whitened_norm_of_kron_solve" in {row.rewrite for row in explanation.fired}
    assert explanation.bytes_saved == 0
    with pytest.raises(AssertionError, match=r"K_space\[3x3\] \(x\) \?\[4x4\]") as info:
        pk.assert_no_dense_kron(model)
    assert "1.1 KiB" in str(info.value)
    assert "no rewrite knows this `Exp` of a Kronecker product: write it with" in str(info.value)


def test_compiled_functions_of_a_model():
    model = dense_model()
    for function in (
        model.compile_logp(mode=PY),
        model.logp_dlogp_function(ravel_inputs=True, mode=PY),
    ):
        product, *_ = pk.explain(function).dense
        assert product.shape == (12, 12)
        assert product.programs == ("function",)
        assert any("Exp" in consumer for consumer in product.consumers)


@pytest.mark.parametrize("kind", GRAPHS)
def test_operations_and_memory_of_a_solve(kind):
    [row] = pk.explain(GRAPHS[kind]([pt.linalg.solve(K, x)])).fired
    assert (row.rewrite, row.op, row.count) == ("solve_of_kron", "Solve", 1)
    assert [str(factor) for factor in row.factors] == ["A[3x3]", "B[4x4]"]
    dense = 2 / 3 * 12**3 + 2 * 12**2
    factorwise = 2 / 3 * (3**3 + 4**3) + 2 * 12 * (3 + 4)
    assert row.flops_saved == pytest.approx(dense - factorwise)
    assert row.bytes_saved == N_BYTES


@pytest.mark.parametrize(
    ("output", "dense", "factorwise"),
    [
        (K @ X, 2 * 12 * 12 * 5, 2 * 12 * (3 + 4) * 5),
        (X.T @ K, 2 * 12 * 12 * 5, 2 * 12 * (3 + 4) * 5),
        # The last axis first: 3 columns of size 5, then 4 of size 3
        (
            kron(pt.tensor("C", shape=(2, 3)), pt.tensor("D", shape=(4, 5)))
            @ pt.tensor("v", shape=(15,)),
            2 * 8 * 15,
            2 * (4 * 5 * 3 + 2 * 3 * 4),
        ),
    ],
    ids=["left", "right", "rectangular"],
)
def test_operations_of_a_product_with_a_matrix(output, dense, factorwise):
    [row] = pk.explain(output).fired
    assert row.rewrite == "matmul_of_kron"
    assert row.flops_saved == pytest.approx(dense - factorwise)


def test_a_decomposition_that_dense_code_could_share_is_counted_once():
    solve = [pt.linalg.solve(K, x), pt.linalg.solve(K, x**2)]
    logdet = pt.linalg.slogdet(K)[1]
    one, both = (pk.explain([*solve[:n], logdet]) for n in (1, 2))
    # One more solution costs 2 N^2, or 2 N sum n_i
    assert both.flops_saved - one.flops_saved == pytest.approx(2 * 144 - 2 * 12 * 7)
    [row] = [row for row in both.fired if row.rewrite == "solve_of_kron"]
    assert row.count == 2
    assert both.bytes_saved == N_BYTES


def test_counts_of_square_matrices_are_those_of_the_tables():
    n = 6
    assert {kind: count(n, n) / n**3 for kind, count in DECOMPOSITIONS.items()} == pytest.approx(
        {
            "Cholesky": 1 / 3,
            "LU": 2 / 3,
            "MatrixInverse": 2,
            "Eigh": 9,
            "Eigvalsh": 4 / 3,
            "Eig": 25,
            "SVD": 21,
            "singular values": 8 / 3,
            "QR": 8 / 3,
            "R of QR": 4 / 3,
        }
    )


def test_sizes_that_are_not_known():
    K = kron(pt.dmatrix("A"), pt.dmatrix("B"))
    explanation = pk.explain([pt.linalg.solve(K, x), pt.exp(K).sum()])
    [row], [product] = explanation.fired, explanation.dense
    assert row.flops_saved is None
    assert explanation.flops_saved is None
    assert product.shape == (None, None)
    assert product.nbytes is None
    assert "?x? float64" in str(explanation)


def test_sizes_of_shared_variables():
    shared = pytensor.shared(np.eye(5), "shared", shape=(None, None))
    for explained in (
        pt.exp(kron(shared, B)).sum(),
        pytensor.function([B], pt.exp(kron(shared, B)).sum(), mode=PY),
    ):
        [product] = pk.explain(explained).dense
        assert product.shape == (20, 20)
        assert product.nbytes == 20 * 20 * 8


@pytest.mark.parametrize("kind", GRAPHS)
def test_refusals_are_the_reasons(kind):
    # Solved twice, what is compiled is an LU decomposition
    outputs = [pt.linalg.solve(RECTANGULAR, x[:6]), pt.linalg.solve(RECTANGULAR, x[6:])]
    if kind == "function":
        explained = pytensor.function([*RECTANGULAR.owner.inputs, x], outputs, mode=PY)
    else:
        explained = GRAPHS[kind](outputs)
    [product] = pk.explain(explained).dense
    [reason] = product.reasons
    assert reason.reason == "factor 1 is 3 x 2, not square"
    assert reason.advice
    assert str(reason) == f"{reason.reason}: {reason.advice}"
    assert product.shape == (6, 6)


def test_reasons():
    inner = kron(pt.tensor("T", shape=(2, 3, 3)), B)
    cases = {
        "it is an output of the graph": K.T,
        "no rewrite knows this `Exp` of a Kronecker product": pt.exp(2 * K.T),
        "`kron` of arrays with 3 and 2 dimensions isn't a product of matrices": inner.sum(),
        "`solve_of_kron` didn't run": pytensor.function(
            [A, B, x], pt.linalg.solve(K, x), mode=WITHOUT_KRON
        ),
    }
    for reason, explained in cases.items():
        [product] = pk.explain(explained).dense
        assert [found.reason for found in product.reasons] == [reason]
        assert all(found.advice for found in product.reasons)


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_sum_whose_symmetry_is_not_known(kind):
    M = K + 2 * pt.eye(12)
    for use in (pt.linalg.solve(M, x), pt.linalg.slogdet(M)[1]):
        [product] = pk.explain(GRAPHS[kind]([use])).dense
        [reason] = product.reasons
        assert reason.reason == "factor 1 isn't known to be symmetric"
        assert "pytensor.assumptions.assume(A, symmetric=True)" in reason.advice


# Constant, and not known to be before PyTensor specializes operations
LATE = pt.diag(pt.concatenate([pt.ones(5), pt.ones(7)]) / pt.dscalar("s"))


@pytest.mark.parametrize("mode", ["FAST_RUN", "NUMBA", PY], ids=["fast_run", "numba", "py"])
@pytest.mark.parametrize(
    "noise", [pt.diag(pt.ones(12) / pt.dscalar("s")), LATE], ids=["now", "late"]
)
def test_a_graph_is_what_is_compiled(noise, mode):
    """Each phase runs once, in which the bundle sees what it sees in a compiled function."""
    out = pt.linalg.solve(K + noise, x, assume_a="pos")
    [s] = [var for var in graph_inputs([noise]) if var.name == "s"]
    function = pytensor.function([A, B, x, s], out, mode=mode)
    of_graph, of_function = pk.explain(out), pk.explain(function)
    assert of_graph.is_factorwise == of_function.is_factorwise == (noise is not LATE)
    if noise is LATE:
        for explanation in (of_graph, of_function):
            [product] = explanation.dense
            [reason] = product.reasons
            assert "isn't known to be a multiple of the identity" in reason.reason
            assert "sigma**2 * pt.eye(N)" in reason.advice
    a, b, y = random_spd(np.random.default_rng(3), 3), np.eye(4), np.arange(12.0)
    expected = np.linalg.solve(np.kron(a, b) + np.eye(12) / 2, y)
    np.testing.assert_allclose(function(a, b, y, 2.0), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", GRAPHS)
def test_einsum(kind):
    assert pk.explain(GRAPHS[kind]([pt.einsum("ij,j->i", K, x)])).is_factorwise
    [product] = pk.explain(GRAPHS[kind]([pt.einsum("ii->", K)])).dense
    [reason] = product.reasons
    assert reason.reason == "this einsum isn't made of products of matrices"
    assert "pt.trace(K)" in reason.advice


def test_an_operation_that_is_made_after_the_rewrites():
    mode = PY.excluding("einsum_of_kron")
    [product] = pk.explain(
        pytensor.function([A, B, x], pt.einsum("ij,j->i", K, x), mode=mode)
    ).dense
    [reason] = product.reasons
    assert reason.reason == (
        "PyTensor made this `Dot` of another operation when `matmul_of_kron` had run already"
    )
    assert "`K @ x`" in reason.advice


def test_the_longest_product_is_reported():
    C = pt.tensor("C", shape=(2, 2))
    [product] = pk.explain(pt.exp(kron(kron(A, B), C))).dense
    assert [factor.name for factor in product.factors] == ["A", "B", "C"]
    assert product.shape == (24, 24)


def test_a_batch():
    batch = pt.tensor("A", shape=(5, 3, 3))
    K = pt.vectorize(kron, "(i,j),(k,l)->(m,n)")(batch, B)
    [product] = pk.explain(pt.exp(K)).dense
    assert product.shape == (5, 12, 12)
    assert product.nbytes == 5 * N_BYTES
    [row] = pk.explain(pt.linalg.solve(K, x, b_ndim=1)).fired
    # The second factor is decomposed once
    dense = 5 * (2 / 3 * 12**3 + 2 * 12**2)
    factorwise = 2 / 3 * (5 * 3**3 + 4**3) + 5 * 2 * 12 * (3 + 4)
    assert row.flops_saved == pytest.approx(dense - factorwise)


def test_constants_that_are_folded():
    K = kron(pt.as_tensor(SPACE), TIME)
    [product] = pk.explain(pt.exp(K + pt.dscalar("s"))).dense
    assert product.shape == (12, 12)
    assert product.consumers == ("Add",)


def test_inner_graphs():
    a, b, v = A.type(), B.type(), x.type()
    inner = kron(a, b)
    op = OpFromGraph([a, b, v], [inner @ v + pt.exp(inner).sum()])
    explanation = pk.explain(op(A, B, x))
    [product], [row] = explanation.dense, explanation.fired
    assert product.inside == "OpFromGraph"
    assert product.consumers == ("Exp",)
    assert row.rewrite == "matmul_of_kron"
    # Formed all the same
    assert explanation.bytes_saved == 0
    function = pytensor.function([A, B, x], op(A, B, x), mode=PY)
    [product] = pk.explain(function).dense
    assert product.inside == "OpFromGraph"


def test_the_journal_keeps_no_graph_alive():
    function = pytensor.function(
        [*RECTANGULAR.owner.inputs, x], pt.linalg.solve(RECTANGULAR, x), mode=PY
    )
    entries = function.maker.fgraph.kron_journal.entries
    assert entries
    assert all(entry.refusal.__traceback__ is None for entry in entries)


def test_models_without_a_density_or_a_gradient():
    with pm.Model() as model:
        pm.Poisson("n", 3)
    assert str(pk.explain(model)) == "no Kronecker product found"
    with pm.Model() as model:
        pm.Deterministic("K", kron(pt.as_tensor(SPACE), B))
    [product] = pk.explain(model).dense
    assert product.programs == ("draws",)
    assert pk.explain(pm.Model()).is_factorwise


def test_scan():
    def step(v, matrix):
        return pt.exp(kron(matrix, B)) @ v

    states = pytensor.scan(
        step,
        sequences=[],
        outputs_info=[pt.ones(12)],
        non_sequences=[A],
        n_steps=3,
        return_updates=False,
    )
    for explained in (states, pytensor.function([A, B], states, mode=PY)):
        [product] = pk.explain(explained).dense
        assert product.shape == (12, 12)

    # A different product in each step
    matrices = pt.tensor("matrices", shape=(3, 3, 3))
    states = pytensor.scan(
        lambda matrix, v: pt.exp(kron(matrix, B) * v[0]) @ v,
        sequences=[matrices],
        outputs_info=[pt.ones(12)],
        return_updates=False,
    )
    for explained in (states, pytensor.function([matrices, B], states, mode=PY)):
        [product] = pk.explain(explained).dense
        assert product.inside == "Scan"
        assert "Scan in" in str(pk.explain(explained))


@pytest.mark.parametrize("kind", GRAPHS)
def test_nothing_to_explain(kind):
    explanation = pk.explain(GRAPHS[kind]([A.sum() + x.sum()]))
    assert explanation.is_factorwise
    assert str(explanation) == "no Kronecker product found"
    assert "no Kronecker product found" in explanation._repr_html_()
    assert explanation.flops_saved == explanation.bytes_saved == 0


def test_what_is_given_is_not_changed():
    def build():
        K = kron(A, B)
        return [pt.linalg.solve(K, x), pt.exp(K).sum()]

    outputs, copy = build(), build()
    fgraph = FunctionGraph(outputs=build(), clone=True)
    before = fgraph.clone()
    function = pytensor.function([A, B, x], build(), mode=PY)
    compiled = function.maker.fgraph.clone()
    for explained in (outputs, fgraph, function):
        pk.explain(explained)
    assert equal_computations(outputs, copy)
    assert equal_computations(fgraph.outputs, before.outputs, fgraph.inputs, before.inputs)
    now = function.maker.fgraph
    assert equal_computations(now.outputs, compiled.outputs, now.inputs, compiled.inputs)


def test_text_and_html():
    C = pt.tensor("a_factor_with_quite_a_long_name", shape=(300, 300))
    D = pt.tensor("another <factor> & more", shape=(40, 40))
    product = kron(C, D)
    explanation = pk.explain(
        [pt.exp(product).sum(), pt.linalg.solve(product, pt.dvector()), K @ x, K]
    )
    text = str(explanation)
    assert repr(explanation) == text
    assert max(map(len, text.split("\n"))) <= 100
    words = " ".join(text.split())
    for part in (
        "Stays dense",
        "12000x12000 float64",
        "1.1 GiB",
        "because no rewrite knows this `Exp` of a Kronecker product: write it with the factors",
        "Rewritten factorwise",
        "solve_of_kron",
        "2 arrays of the size of a product are formed.",
    ):
        assert part in words
    html = explanation._repr_html_()
    assert html.count("<table>") == 2
    assert "another &lt;factor&gt; &amp; more[40x40]" in html
    assert "<factor>" not in html
    assert "1.1 GiB" in html


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (3, "int"),
        ([], "list of nothing"),
        ([K, 3], "list of TensorVariable, int"),
        (None, "NoneType"),
    ],
)
def test_other_types_are_errors(given, named):
    with pytest.raises(TypeError, match=rf"Got an? .*{named.split()[0]}.*Pass a pymc.Model"):
        pk.explain(given)
    with pytest.raises(TypeError):
        pk.assert_no_dense_kron(given)
