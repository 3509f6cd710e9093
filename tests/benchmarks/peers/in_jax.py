"""Log-densities of libraries on JAX, compiled, differentiated by JAX."""

import jax

jax.config.update("jax_enable_x64", True)


def prepare(logp):
    """Prepare a function of ``covs, sigma, mu, x``, as `measure.Prepare` says."""

    def prepare_logp(work, *arguments):
        arguments = jax.tree.map(jax.numpy.asarray, arguments)
        if not work.with_gradient:
            function = jax.jit(logp)
            return lambda: function(*arguments).block_until_ready()
        argnums = (0, 1, 2, 3) if work.noisy else (0, 2, 3)
        function = jax.jit(jax.value_and_grad(logp, argnums))
        return lambda: jax.tree.leaves(jax.block_until_ready(function(*arguments)))

    return prepare_logp
