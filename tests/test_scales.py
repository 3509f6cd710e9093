"""What `explain` says about the scales of factors."""

import numpy as np
import pymc as pm
import pymc.dims as pmd
import pytensor
import pytensor.tensor as pt
import pytest

import pymc_kron as pk
import pymc_kron.dims as pkd
from pymc_kron.diagnostics.scales import shared_scales
from pymc_kron.transforms import whiten
from tests.helpers import random_spd

kron = pt.linalg.kron

rng = np.random.default_rng(4)
SPACE, TIME, THIRD = random_spd(rng, 3), random_spd(rng, 4), random_spd(rng, 2)
NOISE_SPACE = random_spd(rng, 3)
X_SPACE, X_TIME = np.arange(3.0)[:, None], np.arange(4.0)[:, None]
LAG = np.abs(X_TIME - X_TIME.T)
Y = rng.normal(size=12)


def amplitude(name):
    return pm.HalfNormal(name)


def kernel(name):
    """A covariance of times that has a length scale, and no amplitude."""
    return pt.exp(-LAG / pm.LogNormal(name))


def correlation(name, n):
    chol = pm.LKJCorr(name, n=n, eta=2)
    return chol @ chol.T


def covariance(name, n):
    chol, _, _ = pm.LKJCholeskyCov(name, n=n, eta=2, sd_dist=pm.HalfNormal.dist(1))
    return chol @ chol.T


def gp(name, amplitude_name):
    cov = pm.HalfNormal(amplitude_name) ** 2 * pm.gp.cov.Matern52(1, pm.LogNormal(name))
    return cov(X_TIME)


def softplus_of_normal():
    return pt.softplus(pm.Normal("raw", sigma=2)) * TIME


def kernel_with_nugget():
    return amplitude("eta") ** 2 * kernel("length_scale") + amplitude("nugget") ** 2 * pt.eye(4)


FREE = {
    "amplitude": (lambda: amplitude("eta") ** 2 * kernel("length_scale"), {"eta"}),
    "entry": (lambda: pm.HalfNormal("eta", shape=2)[0] * TIME, {"eta"}),
    "quotient": (lambda: TIME / pm.Gamma("precision", 2, 1), {"precision"}),
    "softplus": (softplus_of_normal, {"raw"}),
    "interval": (lambda: pm.Uniform("eta", 0, 3) * TIME, {"eta"}),
    "untransformed": (lambda: pm.HalfNormal("eta", default_transform=None) * TIME, {"eta"}),
    "nugget": (kernel_with_nugget, {"eta", "nugget"}),
    "gp": (lambda: gp("length_scale", "eta"), {"eta"}),
    "LKJCholeskyCov": (lambda: covariance("task", 4), {"task"}),
    "Wishart": (lambda: pm.Wishart("K_time", nu=6, V=np.eye(4) / 6), {"K_time"}),
    "diagonal": (lambda: pt.diag(pm.HalfNormal("sds", shape=4) ** 2), {"sds"}),
}
FIXED = {
    "constant": lambda: TIME,
    "length scale": lambda: kernel("length_scale"),
    "LKJCorr": lambda: correlation("corr", 4),
    "simplex": lambda: pt.diag(pm.Dirichlet("weights", np.ones(4))),
    "ratio": lambda: (K := kernel_with_nugget()) / K[0, 0],
    "nugget": lambda: kernel("length_scale") + amplitude("nugget") ** 2 * pt.eye(4),
    "data": lambda: pm.Data("K_time", TIME),
}


def scaled_space():
    K_space = amplitude("sigma") ** 2 * SPACE
    K_space.name = "K_space"
    return K_space


@pytest.mark.parametrize("kind", FREE)
def test_a_factor_with_a_free_amplitude(kind):
    build, names = FREE[kind]
    with pm.Model() as model:
        pk.KroneckerMvNormal("y", covs=[scaled_space(), build()], observed=Y)
    [shared] = shared_scales(model)
    first, second = shared.factors
    assert shared.variable == "y"
    assert shared.n_unidentified == 1
    assert (first.position, first.factor.name, first.factor.shape) == (1, "K_space", (3, 3))
    assert first.variables == ("sigma",)
    assert (second.position, second.factor.shape) == (2, (4, 4))
    assert set(second.variables) == names


@pytest.mark.parametrize("kind", FIXED)
def test_a_factor_without_one(kind):
    with pm.Model() as model:
        pk.KroneckerMvNormal("y", covs=[scaled_space(), FIXED[kind]()], observed=Y)
    assert shared_scales(model) == ()


def test_two_factors_with_length_scales():
    with pm.Model() as model:
        K_space = pm.gp.cov.ExpQuad(1, pm.LogNormal("length_scale"))(X_SPACE)
        pk.KroneckerMvNormal("y", covs=[K_space, kernel("l")], observed=Y)
    assert shared_scales(model) == ()


def test_one_amplitude_in_both_factors():
    with pm.Model() as model:
        sigma = amplitude("sigma")
        pk.KroneckerMvNormal("y", covs=[sigma * SPACE, sigma * TIME], observed=Y)
    assert shared_scales(model) == ()
    # It is in neither, if one factor is divided by it
    with pm.Model() as model:
        sigma = amplitude("sigma")
        pk.KroneckerMvNormal("y", covs=[sigma * SPACE, TIME / sigma], observed=Y)
    [shared] = shared_scales(model)
    assert [factor.variables for factor in shared.factors] == [("sigma",), ("sigma",)]


def described(form, matrix):
    """Return a factor of the covariance, or what describes it."""
    match form:
        case "chols":
            return pt.linalg.cholesky(matrix)
        case "taus":
            return pt.linalg.inv(matrix)
        case "evds":
            return pt.linalg.eigh(matrix)
    return matrix


@pytest.mark.parametrize("form", ["covs", "chols", "taus", "evds"])
@pytest.mark.parametrize("sigma", [None, 0.3])
def test_forms(form, sigma):
    for is_free in (True, False):
        with pm.Model() as model:
            s, t = amplitude("s"), amplitude("t")
            factors = [s * SPACE, t * TIME if is_free else TIME + t * np.eye(4)]
            given = {form: [described(form, factor) for factor in factors]}
            pk.KroneckerMvNormal("y", **given, sigma=sigma, observed=Y)
        found = [[f.variables for f in shared.factors] for shared in shared_scales(model)]
        assert found == ([[("s",), ("t",)]] if is_free else [])


def plain(K_space, K_time, **kwargs):
    pm.MvNormal("y", np.zeros(12), cov=kron(K_space, K_time), **kwargs)


def plain_root(K_space, K_time, **kwargs):
    chol = kron(pt.linalg.cholesky(K_space), pt.linalg.cholesky(K_time))
    pm.MvNormal("y", np.zeros(12), chol=chol, **kwargs)


def plain_precision(K_space, K_time, **kwargs):
    tau = kron(pt.linalg.inv(K_space), pt.linalg.inv(K_time))
    pm.MvNormal("y", np.zeros(12), tau=tau, **kwargs)


def plain_noise(K_space, K_time, **kwargs):
    cov = kron(K_space, K_time) + amplitude("noise") ** 2 * pt.eye(12)
    pm.MvNormal("y", np.zeros(12), cov=cov, **kwargs)


def outside(K_space, K_time, **kwargs):
    pm.MvStudentT("y", nu=5, scale=2 * kron(K_space, K_time) + pt.eye(12), **kwargs)


def potential(K_space, K_time, **kwargs):
    pm.Potential("y", -(Y @ kron(K_space, K_time) @ Y))


def noisy(K_space, K_time, **kwargs):
    pk.KroneckerMvNormal("y", covs=[K_space, K_time], sigma=amplitude("noise"), **kwargs)


def grid(K_space, K_time, observed):
    pk.TensorNormal("y", covs=[K_space, K_time], observed=observed.reshape(3, 4))


def latent(K_space, K_time, observed):
    field = pk.KroneckerMvNormal("y", covs=[K_space, K_time], transform=whiten)
    pm.Poisson("n", pt.exp(field), observed=np.ones(12, dtype=int))


def upstream(K_space, K_time, **kwargs):
    pm.KroneckerNormal("y", np.zeros(12), covs=[K_space, K_time], sigma=0.1, **kwargs)


def matrix_normal(K_space, K_time, observed):
    observed = observed.reshape(3, 4)
    pm.MatrixNormal("y", 0, rowcov=K_space, colcov=K_time, observed=observed)


def two_likelihoods(K_space, K_time, observed):
    for name in ("y", "z"):
        pk.KroneckerMvNormal(name, covs=[K_space, K_time], observed=observed)


def marginalized(K_space, K_time, observed):
    observed = np.where(np.arange(12) == 5, np.nan, observed)
    kwargs = {"marginalize_missing": True, "observed": observed}
    pk.KroneckerMvNormal("y", covs=[K_space, K_time], **kwargs)


def imputed(K_space, K_time, observed):
    observed = np.where(np.arange(12) == 5, np.nan, observed)
    with pytest.warns(pm.exceptions.ImputationWarning):
        pk.KroneckerMvNormal("y", covs=[K_space, K_time], observed=observed)


def mixture(K_space, K_time, **kwargs):
    components = [
        pk.KroneckerMvNormal.dist(covs=[K_space, K_time]),
        pm.MvNormal.dist(np.zeros(12), np.eye(12)),
    ]
    pm.Mixture("y", [0.3, 0.7], components, **kwargs)


@pytest.mark.parametrize(
    ("distribution", "variable"),
    [
        (plain, "y"),
        (plain_root, "y"),
        (plain_precision, "y"),
        (plain_noise, "y"),
        (outside, "y"),
        (potential, "y"),
        (noisy, "y"),
        (grid, "y"),
        (latent, "y"),
        (upstream, "y"),
        (matrix_normal, "y"),
        (two_likelihoods, "y, z"),
        (marginalized, "y"),
        (imputed, "y_unobserved, y_observed"),
        (mixture, "y"),
    ],
)
def test_where_a_product_is(distribution, variable):
    for is_free in (True, False):
        with pm.Model() as model:
            K_time = amplitude("t") * kernel("length_scale") if is_free else kernel("length_scale")
            distribution(scaled_space(), K_time, observed=Y)
        found = shared_scales(model)
        assert [shared.variable for shared in found] == ([variable] if is_free else [])
        for shared in found:
            assert [f.variables for f in shared.factors] == [("sigma",), ("t",)]


def found_in(model):
    return [[(f.position, f.variables) for f in s.factors] for s in shared_scales(model)]


def test_three_factors_share_two_scales():
    with pm.Model() as model:
        factors = [amplitude(name) * K for name, K in zip("abc", (SPACE, TIME, THIRD), strict=True)]
        pk.TensorNormal("y", covs=factors, observed=np.zeros((3, 4, 2)))
    [shared] = shared_scales(model)
    assert shared.n_unidentified == 2
    assert [factor.variables for factor in shared.factors] == [("a",), ("b",), ("c",)]
    # The two that are left
    with pm.Model() as model:
        factors = [amplitude("a") * SPACE, TIME, amplitude("c") * THIRD]
        pk.TensorNormal("y", covs=factors, observed=np.zeros((3, 4, 2)))
    [shared] = shared_scales(model)
    assert shared.n_unidentified == 1
    assert [factor.position for factor in shared.factors] == [1, 3]


def test_noise_has_factors_too():
    def fit(noise_space, noise_time):
        covs = [noise_space, noise_time]
        pk.KroneckerMvNormal("y", covs=[scaled_space(), TIME], noise_covs=covs, observed=Y)

    with pm.Model() as model:
        fit(correlation("corr", 3), amplitude("t") ** 2 * TIME)
    assert shared_scales(model) == ()
    with pm.Model() as model:
        fit(covariance("noise", 3), amplitude("t") ** 2 * TIME)
    assert found_in(model) == [[(1, ("noise",)), (2, ("t",))]]
    # Signal and noise have a scale in common, and both of them move
    with pm.Model() as model:
        a, b, c = map(amplitude, "abc")
        covs, noise_covs = [a * SPACE, b * TIME], [a * NOISE_SPACE, c * TIME]
        pk.KroneckerMvNormal("y", covs=covs, noise_covs=noise_covs, observed=Y)
    assert found_in(model) == [[(1, ("a",)), (2, ("b",))], [(1, ("a",)), (2, ("c",))]]
    # The noise has no scale to make up for that of the first factor
    with pm.Model() as model:
        a, b = map(amplitude, "ab")
        covs, noise_covs = [a * SPACE, b * TIME], [a * NOISE_SPACE, TIME]
        pk.KroneckerMvNormal("y", covs=covs, noise_covs=noise_covs, observed=Y)
    assert shared_scales(model) == ()


@pytest.mark.parametrize("kind", ["both", "one", "shared factor"])
def test_batches(kind):
    with pm.Model() as model:
        K_space = pm.HalfNormal("s", shape=(5, 1, 1)) * SPACE
        if kind == "shared factor":
            K_time = amplitude("t") * TIME
        else:
            K_time = (1.0 if kind == "one" else pm.HalfNormal("t", shape=(5, 1, 1))) * TIME
        pk.KroneckerMvNormal("y", covs=[K_space, K_time], observed=np.zeros((5, 12)))
    assert found_in(model) == ([] if kind == "one" else [[(1, ("s",)), (2, ("t",))]])


@pytest.mark.parametrize("is_free", [True, False])
def test_dims(is_free):
    with pm.Model(coords={"station": range(3), "day": range(4)}) as model:
        K_space = pmd.as_xtensor(SPACE, dims=("station", "other_station"))
        K_time = pmd.as_xtensor(TIME, dims=("day", "other_day"))
        s, t = pmd.HalfNormal("s"), pmd.HalfNormal("t")
        field = pkd.KroneckerMvNormal(
            "field",
            covs=[s * K_space, t * K_time if is_free else K_time**t],
            core_dims=[("station", "other_station"), ("day", "other_day")],
            transform=whiten,
        )
        events = pmd.as_xtensor(np.ones((3, 4)), dims=("station", "day"))
        pmd.Poisson("n", pmd.math.exp(field), observed=events)
    assert found_in(model) == ([[(1, ("s",)), (2, ("t",))]] if is_free else [])


@pytest.mark.parametrize("parametrization", [plain, plain_noise, noisy, latent])
def test_what_else_tells_scales_apart(parametrization):
    def build(extra):
        with pm.Model() as model:
            sigma, t = amplitude("sigma"), amplitude("t")
            parametrization(sigma**2 * SPACE, t * TIME, observed=Y)
            extra(sigma, t)
        return found_in(model)

    shared = [[(1, ("sigma",)), (2, ("t",))]]
    assert build(lambda sigma, t: None) == shared
    # Only of the product of both
    assert build(lambda sigma, t: pm.Normal("z", sigma**2 * t, observed=1.0)) == shared
    assert build(lambda sigma, t: pm.Normal("z", pm.Normal("mean"), observed=1.0)) == shared
    assert build(lambda sigma, t: pm.Normal("z", 0, sigma, observed=1.0)) == []
    assert build(lambda sigma, t: pm.Normal("z", 0, sigma)) == []
    assert build(lambda sigma, t: pm.Potential("z", -((t - 1) ** 2))) == []


def test_a_mean_and_dense_noise_of_the_same_scale():
    for where in ("mean", "noise", "nowhere"):
        with pm.Model() as model:
            s, t = amplitude("s"), amplitude("t")
            cov = kron(s * SPACE, t * TIME) + pt.eye(12) * (s if where == "noise" else 1)
            pm.MvNormal("y", np.ones(12) * (s if where == "mean" else 1), cov, observed=Y)
        assert bool(shared_scales(model)) == (where == "nowhere")


def test_the_same_factor_in_two_products():
    def build(K_other):
        with pm.Model() as model:
            K_space = scaled_space()
            pk.KroneckerMvNormal("y", covs=[K_space, amplitude("t") * TIME], observed=Y)
            pm.MvNormal("z", np.zeros(12), kron(K_space, K_other()), observed=Y)
        return found_in(model)

    assert build(lambda: TIME) == []
    assert build(lambda: amplitude("u") * TIME) == [
        [(1, ("sigma",)), (2, ("t",))],
        [(1, ("sigma",)), (2, ("u",))],
    ]


def test_a_prior_of_scales_is_no_likelihood():
    with pm.Model() as model:
        s = amplitude("s")
        t = pm.HalfNormal("t", sigma=s)
        pk.KroneckerMvNormal("y", covs=[s * SPACE, t * TIME], observed=Y)
    assert found_in(model) == [[(1, ("s",)), (2, ("t",))]]


def test_many_coordinates_and_large_factors():
    with pm.Model() as model:
        large = amplitude("s") * np.exp(-np.abs(np.subtract.outer(np.arange(150), np.arange(150))))
        pk.KroneckerMvNormal("y", covs=[large, covariance("t", 6)], observed=np.zeros(900))
    assert found_in(model) == [[(1, ("s",)), (2, ("t",))]]


def test_of_what_nothing_is_said(monkeypatch):
    def build(K_time):
        with pm.Model() as model:
            s = amplitude("s")
            cov = kron(s * SPACE, K_time()) + s * pt.eye(12)
            pm.MvNormal("y", np.zeros(12), cov, observed=Y)
            # Ties the noise to a scale
            pk.KroneckerMvNormal("z", covs=[s * SPACE, TIME * amplitude("u")], observed=Y)
        return model

    # A discrete amplitude
    assert shared_scales(build(lambda: pm.Poisson("t", 3) * TIME)) == ()
    # A factor that is no number anywhere
    assert shared_scales(build(lambda: pt.log(-amplitude("t")) * TIME)) == ()
    for limit, value in (("MAX_COORDINATES", 2), ("MAX_CELLS", 11)):
        with monkeypatch.context() as context:
            context.setattr(f"pymc_kron.diagnostics.scales.{limit}", value)
            assert shared_scales(build(lambda: amplitude("t") * TIME)) == ()


def test_single_precision():
    with pytensor.config.change_flags(floatX="float32"):
        for build, is_free in ((lambda: gp("l", "eta"), True), (lambda: kernel("l"), False)):
            with pm.Model() as model:
                covs = [scaled_space().astype("float32"), build().astype("float32")]
                pk.KroneckerMvNormal("y", covs=covs, observed=Y.astype("float32"))
            assert found_in(model) == ([[(1, ("sigma",)), (2, ("eta",))]] if is_free else [])


def test_what_is_printed():
    with pm.Model() as model:
        K_time = amplitude("<t>") * TIME
        pk.KroneckerMvNormal("y", covs=[scaled_space(), K_time], sigma=0.1, observed=Y)
    explanation = pk.explain(model)
    assert len(explanation.shared_scales) == 1
    text = str(explanation)
    words = " ".join(text.split())
    assert max(map(len, text.split("\n"))) <= 100
    assert "1: K_space[3x3] by sigma; 2: ?[4x4] by <t>" in words
    assert "because A (x) B = cA (x) (B / c)" in words
    html = explanation._repr_html_()
    assert html.count("<table>") == 2
    assert "2: ?[4x4] by &lt;t&gt;" in html
    pk.assert_no_dense_kron(model)


@pytest.mark.parametrize("seed", range(10))
def test_powers_of_amplitudes(seed):
    """Scales with logarithms ``E v`` are shared where ``E v`` isn't zero, and its sum is."""
    rng = np.random.default_rng(seed)
    n_factors, n_amplitudes = rng.integers(2, 5, size=2)
    exponents = rng.integers(-1, 2, size=(n_factors, n_amplitudes))
    with pm.Model() as model:
        amplitudes = pt.stack([amplitude(f"a{i}") for i in range(n_amplitudes)])
        sizes = range(2, 2 + n_factors)
        covs = [
            pt.prod(amplitudes**powers) * random_spd(rng, n)
            for n, powers in zip(sizes, exponents, strict=True)
        ]
        # Every other mean tells the first amplitude
        mu = amplitudes[0] if seed % 2 else 0
        pk.TensorNormal("y", mu=mu, covs=covs, sigma=0.1, observed=np.ones(tuple(sizes)))
    free = exponents[:, 1:] if seed % 2 else exponents
    expected = np.linalg.matrix_rank(free) - free.sum(axis=0).any()
    assert sum(shared.n_unidentified for shared in shared_scales(model)) == expected
