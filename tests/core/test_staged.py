"""A function in two stages is the function, and the first stage holds all that does not depend on the user."""

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.staged import staged


def network(shared, items, user):
    hidden = jnp.tanh(items["x"] @ shared["w"])  # of items
    bias = jax.nn.softplus(shared["b"])  # of shared
    return hidden @ user["v"] + bias * user["v"].sum(), items["x"].sum(-1)


def case(seed=0):
    rng = np.random.default_rng(seed)
    shared = {"w": rng.normal(size=(3, 4)), "b": rng.normal()}
    return jax.tree.map(jnp.asarray, (shared, {"x": rng.normal(size=(7, 3))}, {"v": rng.normal(size=4)}))


def test_both_stages_together_are_the_function():
    shared, items, user = case()
    stage = staged(network, shared, items, user)
    of_shared, of_items = jax.jit(stage.first)(shared, items)
    for one, other in zip(stage.second(of_shared, of_items, user), network(shared, items, user), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    users = {"v": jnp.stack([case(seed)[2]["v"] for seed in range(3)])}
    several, _ = jax.vmap(lambda u: stage.second(of_shared, of_items, u))(users)
    for i in range(3):
        np.testing.assert_allclose(several[i], network(shared, items, {"v": users["v"][i]})[0], rtol=1e-6, atol=1e-6)


def test_the_second_stage_reads_the_last_values_before_the_user_enters():
    shared, items, user = case()
    stage = staged(network, shared, items, user)
    of_shared, of_items = stage.first(shared, items)
    assert [x.shape for x in of_shared] == [()]
    assert sorted(x.shape for x in of_items) == [(7,), (7, 4)]
    second = str(jax.make_jaxpr(stage.second)(of_shared, of_items, user))
    assert "tanh" not in second
    assert second.count("dot_general") == 1
    assert stage.widest == 7


def test_a_function_that_reads_no_user_is_all_first_stage():
    shared, items, user = case()
    stage = staged(lambda s, i, u: i["x"] @ s["w"], shared, items, user)
    of_shared, of_items = stage.first(shared, items)
    np.testing.assert_array_equal(stage.second(of_shared, of_items, user), items["x"] @ shared["w"])
