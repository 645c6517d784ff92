"""The engine gives what the plain form gives, in value and meta-gradient, and forms no per-user weights."""

import warnings
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec_jax.core import _loop, fastweights, inner, outer
from metarec_jax.core._loop import Explicit, Factored
from metarec_jax.core._plan import PlainFormWarning
from metarec_jax.types import Examples, Task

USERS, SUPPORT, QUERY, INPUTS, ITEMS = 3, 5, 3, 6, 9
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def examples(seed: int, rows: int, tokens: int | None = None, users: int = USERS) -> Examples:
    r = np.random.default_rng(seed)
    shape = (users, rows) if tokens is None else (users, rows, tokens)
    features = {
        "x": jnp.asarray(r.standard_normal((*shape, INPUTS)), jnp.float32),
        "item": jnp.asarray(r.integers(0, ITEMS, (users, rows)), jnp.int32),
    }
    mask = (r.random((users, rows)) < 0.8).astype(np.float32)
    mask[:, 0] = 1
    target = jnp.asarray(r.standard_normal((users, rows)), jnp.float32)
    return Examples(features, target, jnp.asarray(mask))


def task(seed: int = 0, tokens: int | None = None, users: int = USERS) -> Task:
    return Task(examples(seed, SUPPORT, tokens, users), examples(seed + 1, QUERY, tokens, users))


def tower(sizes: tuple[int, ...], seed: int = 0) -> dict[str, jax.Array]:
    r = np.random.default_rng(seed)
    params = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        params[f"w{i}"] = jnp.asarray(r.standard_normal((a, b)) / np.sqrt(a), jnp.float32)
        params[f"b{i}"] = jnp.asarray(r.standard_normal(b) * 0.1, jnp.float32)
    params["head"] = jnp.asarray(r.standard_normal(sizes[-1]) / np.sqrt(sizes[-1]), jnp.float32)
    return params


def run_tower(params: Any, features: Any, activation: Any = jnp.tanh) -> jax.Array:
    h = features["x"]
    for i in range(sum(name.startswith("w") for name in params)):
        h = activation(h @ params[f"w{i}"] + params[f"b{i}"])
    h = h @ params["head"]
    return h.mean(-1) if h.ndim > 1 else h


def with_table(params: Any, features: Any) -> jax.Array:
    embedded = jnp.take(params["table"], features["item"], axis=0) + params["table"][features["item"] // 2]
    return run_tower(params["tower"], {"x": features["x"] + embedded}) + params["bias"][features["item"]]


class Case(NamedTuple):
    apply: Any
    params: Any
    step_size: Any
    options: dict[str, Any]


def meta_loss(engine: Any, case: Case, params: Any, step_size: Any, task: Task, **only: Any) -> jax.Array:
    adapted = engine.adapt(case.apply, params, task.support, step_size=step_size, **case.options, **only)
    scores = engine.predict(case.apply, params, adapted, task.query.features)
    return outer.query_loss(scores, task.query, optax.losses.squared_error)


def meta_gradient(engine: Any, case: Case, task: Task, **only: Any) -> Any:
    loss = partial(meta_loss, engine, case, **only)
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(case.params, case.step_size, task)


def distance(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def agree(case: Case, task: Task, **only: Any) -> None:
    assert distance(meta_gradient(fastweights, case, task, **only), meta_gradient(inner, case, task)) < 1e-5


def noted_agree(case: Case, task: Task, match: str, bound: float = 1e-5) -> None:
    """The same result, and a note that says why weights were formed."""
    with pytest.warns(PlainFormWarning, match=match):
        found = meta_gradient(fastweights, case, task)
    assert distance(found, meta_gradient(inner, case, task)) < bound


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "schedule": lambda: optax.sgd(optax.linear_schedule(0.1, 0.02, 3)),
}


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    steps=st.integers(1, 5),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    form=st.sampled_from(["dual", "auto"]),
    first_order=st.booleans(),
    remat=st.booleans(),
    size=st.sampled_from(["leaf", "column", "row"]),
    count=st.sampled_from([0.0, 2.5]),
    seed=st.integers(0, 9),
)
def test_value_and_meta_gradient_are_the_plain_forms(
    widths, steps, optimizer, activation, form, first_order, remat, size, count, seed
):
    params = tower((INPUTS, *widths), seed)
    shape = {"leaf": lambda w: (), "column": lambda w: w.shape[-1:], "row": lambda w: (w.shape[0], 1)}[size]
    step_size = {
        name: jnp.full(shape(w) if w.ndim == 2 else (), 0.5 + 0.1 * i) for i, (name, w) in enumerate(params.items())
    }
    options = {"steps": steps, "optimizer": OPTIMIZERS[optimizer](), "first_order": first_order, "count": count}
    apply = partial(run_tower, activation=ACTIVATIONS[activation])
    agree(Case(apply, params, step_size, options), task(seed), form=form, remat=remat)


def test_lookups_and_extra_token_axes_agree_with_the_plain_form():
    steps = 2
    params = {"tower": tower((INPUTS, 4)), "table": 0.3 * jnp.ones((ITEMS, INPUTS)), "bias": jnp.zeros(ITEMS)}
    case = Case(with_table, params, 0.7, {"steps": steps})
    agree(case, task(), form="dual")
    adapted = fastweights.adapt(with_table, params, task().support, steps=steps, form="dual")
    assert all(isinstance(entry, Factored) for entry in adapted.leaves if entry.__class__ is not Explicit)
    table = adapted.leaves[1]
    assert isinstance(table, Factored)
    assert table.inputs.shape == (USERS, 2 * SUPPORT)
    agree(Case(run_tower, tower((INPUTS, 4, 3)), 0.7, {"steps": steps}), task(tokens=2), form="dual")


def test_a_weight_on_the_left_or_with_several_axes_stays_factored():
    def apply(p, f):
        h = jax.vmap(lambda x: jnp.tanh(p["left"] @ x))(f["x"])
        heads = jnp.einsum("ni,ihd->nhd", h, p["heads"])
        return jnp.einsum("nhd,hdo->no", jnp.tanh(heads), p["out"])[:, 0]

    r = np.random.default_rng(0)
    shapes = {"left": (4, INPUTS), "heads": (4, 2, 3), "out": (2, 3, 1)}
    params = {name: jnp.asarray(r.standard_normal(s) / 2, jnp.float32) for name, s in shapes.items()}
    agree(Case(apply, params, 1.0, {"steps": 2}), task(), form="dual")
    adapted = fastweights.adapt(apply, params, task().support, steps=2, form="dual")
    assert all(isinstance(entry, Factored) for entry in adapted.leaves)
    plain = inner.adapt(apply, params, task().support, steps=2)
    assert distance(fastweights.weights(params, adapted), plain) < 1e-5


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(ITEMS, INPUTS, rngs=rngs)
        self.norm = nnx.LayerNorm(INPUTS, rngs=rngs)
        self.hidden = nnx.Linear(INPUTS, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, features):
        h = self.norm(features["x"] + self.embed(features["item"]))
        return self.head(nnx.relu(self.hidden(h)))[:, 0]


def test_a_flax_model_needs_no_change_and_raises_no_note():
    graph, params = nnx.split(Net(nnx.Rngs(0)))
    apply = lambda p, f: nnx.merge(graph, p)(f)  # noqa: E731
    agree(Case(apply, params, 1.0, {"steps": 2}), task(), form="dual")


def shared_weight(p, f):
    return jnp.tanh(jnp.tanh(f["x"] @ p["w"]) @ p["w"]).sum(-1)


def in_a_loop(p, f):
    return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["w"]), f["x"]).sum(-1)


FALLBACKS = {
    "transposed": (lambda p, f: jnp.tanh(f["x"] @ p["w"].T).sum(-1), "transpose"),
    "sliced": (lambda p, f: jnp.tanh(f["x"][:, :3] @ p["w"][:3]).sum(-1), "slice"),
    "cast": (
        lambda p, f: jnp.tanh(f["x"] @ p["w"].astype(jnp.float16).astype(jnp.float32)).sum(-1),
        "convert",
    ),
    "outside": (lambda p, f: jnp.tanh(f["x"] @ p["w"]).sum(-1) + (p["w"] ** 2).sum(), "not as the weight"),
    "loop": (in_a_loop, "scan|while"),
    "tied": (lambda p, f: (p["w"][f["item"] % INPUTS] @ p["w"]).sum(-1), "two ways"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_rewritten_runs_in_the_plain_form_and_says_so(name):
    apply, reason = FALLBACKS[name]
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((INPUTS, INPUTS)) / 3, jnp.float32)}
    noted_agree(Case(apply, params, 1.0, {"steps": 2}), task(), reason, 1e-2 if name == "cast" else 1e-5)


def test_a_weight_of_two_layers_stays_factored():
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((INPUTS, INPUTS)) / 3, jnp.float32)}
    agree(Case(shared_weight, params, 1.0, {"steps": 2}), task(), form="dual")


@pytest.mark.parametrize(
    ("optimizer", "step_size", "reason"),
    [
        (optax.adam(0.05, eps_root=1e-4), 1.0, "not linear"),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)), 1.0, "not linear"),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), 1.0, "not linear"),
        (optax.sgd(0.1), {"w0": jnp.full((INPUTS, 4), 0.5), "b0": 1.0, "head": 2.0}, "one per weight"),
    ],
    ids=["adam", "clip", "decay", "elementwise"],
)
def test_updates_that_are_not_of_low_rank_form_the_weights(optimizer, step_size, reason):
    case = Case(run_tower, tower((INPUTS, 4)), step_size, {"steps": 2, "optimizer": optimizer})
    noted_agree(case, task(), reason)


def test_a_learned_rate_inside_the_optimizer_stays_factored_and_gets_its_gradient():
    def loss(engine, rate, **only):
        options = {"steps": 3, "optimizer": optax.sgd(rate, momentum=0.5)}
        return meta_loss(engine, Case(run_tower, params, 1.0, options), params, 1.0, task(), **only)

    params = tower((INPUTS, 4))
    found = jax.jit(jax.grad(lambda r: loss(fastweights, r, form="dual")))(0.1)
    np.testing.assert_allclose(found, jax.jit(jax.grad(lambda r: loss(inner, r)))(0.1), rtol=1e-5)


def test_forms_can_be_forced_by_leaf_and_long_loops_are_scanned():
    form = {"w0": "dual", "b0": "plain", "w1": "plain", "b1": "auto", "head": "auto"}
    case = Case(run_tower, tower((INPUTS, 4, 3)), 1.0, {"steps": _loop.UNROLLED + 2})
    agree(case, task(), form=form)


def test_shared_leaves_stay_shared():
    params = tower((INPUTS, 4, 3))
    mask = {"w0": False, "b0": False, "w1": True, "b1": True, "head": False}
    case = Case(run_tower, params, 1.0, {"steps": 2, "adapted": mask})
    agree(case, task(), form="dual")
    adapted = fastweights.adapt(run_tower, params, task().support, adapted=mask)
    assert [entry is None for entry in adapted.leaves] == [not keep for keep in jax.tree.leaves(mask)]
    same = fastweights.adapt(run_tower, params, task().support, steps=0)
    assert same.leaves == (None,) * 5


def test_first_order_inner_gradients_are_constants_for_the_shared_layers_below_too():
    mask = {"w0": False, "b0": False, "w1": True, "b1": True, "head": True}
    options = {"steps": 2, "adapted": mask, "first_order": True}
    agree(Case(run_tower, tower((INPUTS, 4, 3)), 1.0, options), task(), form="dual")


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(
            optax.sgd(0.3), optax.stateless(lambda u, p: jax.tree.map(lambda g: g / np.sqrt(np.shape(g)[0]), u))
        ),
        optax.sgd(np.arange(1, 5) / 10),
    ],
    ids=["by fan-in", "by column"],
)
def test_an_optimizer_that_reads_shapes_forms_the_weights(optimizer):
    params = {"w0": tower((INPUTS, 4))["w0"]}
    case = Case(lambda p, f: jnp.tanh(f["x"] @ p["w0"]).sum(-1), params, 1.0, {"steps": 2, "optimizer": optimizer})
    noted_agree(case, task(), "not linear")


def test_a_product_of_two_adapted_weights_runs_in_the_plain_form():
    r = np.random.default_rng(0)
    params = {n: jnp.asarray(r.standard_normal(s) / 2, jnp.float32) for n, s in {"a": (INPUTS, 2), "b": (2, 3)}.items()}
    noted_agree(
        Case(lambda p, f: jnp.tanh(f["x"] @ (p["a"] @ p["b"])).sum(-1), params, 1.0, {"steps": 2}), task(), "dot"
    )


def test_rows_beyond_the_table_read_as_the_fill_value_and_never_learn():
    def apply(p, f):
        ids = jnp.where(f["item"] % 3 == 0, ITEMS, f["item"])  # ITEMS: the padding id
        return jnp.take(p["table"], ids, axis=0, mode="fill", fill_value=0.0).sum(-1)

    params = {"table": jnp.asarray(np.random.default_rng(0).standard_normal((ITEMS, 2)), jnp.float32)}
    agree(Case(apply, params, 1.0, {"steps": 2}), task(), form="dual")


def test_boolean_features_survive_a_user_who_fails():
    def apply(p, f):
        return jnp.where((~f["flag"])[:, None], 0.3, jnp.tanh(f["x"] @ p["w0"])).sum(-1)

    data, params = task(5), {"w0": tower((INPUTS, 4))["w0"]}
    flagged = Task(*(e._replace(features={**e.features, "flag": e.features["item"] % 2 == 0}) for e in data))
    bad = flagged.support._replace(target=flagged.support.target.at[1, 0].set(jnp.nan))
    without = flagged.support._replace(mask=flagged.support.mask.at[1].set(0))
    case = Case(apply, params, 1.0, {"steps": 2})
    found = meta_gradient(fastweights, case, flagged._replace(support=bad), form="dual")
    assert distance(found, meta_gradient(inner, case, flagged._replace(support=without))) < 1e-5


def test_half_precision_parameters_and_prints_run_and_no_adapted_leaf_means_none():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tower((INPUTS, 4)))

    def apply(p, f):
        jax.debug.callback(lambda _: None, f["x"])
        return run_tower(p, {"x": f["x"].astype(jnp.bfloat16)})

    adapted = fastweights.adapt(apply, params, task().support, steps=2, step_size=jnp.float32(0.5), form="dual")
    scores = fastweights.predict(run_tower, params, adapted, {"x": task().query.features["x"].astype(jnp.bfloat16)})
    assert scores.dtype == jnp.bfloat16
    assert np.isfinite(scores.astype(jnp.float32)).all()
    assert fastweights.adapt(run_tower, params, task().support, adapted=False).leaves == (None,) * 3
    with pytest.raises(ValueError, match="bools"):
        fastweights.adapt(run_tower, params, task().support, adapted="head")
    with pytest.raises(ValueError, match="chunk must be 1 or more"):
        fastweights.adapt(run_tower, params, task().support, chunk=0)


def test_what_was_adapted_is_read_with_its_own_parameters():
    adapted = fastweights.adapt(run_tower, tower((INPUTS, 4)), task().support)
    other = tower((INPUTS, 4, 3))
    for read in (
        lambda: fastweights.predict(run_tower, other, adapted, task().query.features),
        lambda: fastweights.weights(other, adapted),
        lambda: fastweights.mean_change(other, adapted, jnp.ones(USERS)),
    ):
        with pytest.raises(ValueError, match="params have 5 leaves"):
            read()
    with pytest.raises(ValueError, match="one weight a user"):
        fastweights.mean_change(tower((INPUTS, 4)), adapted, jnp.ones(USERS + 1))


def test_scores_of_another_shape_than_the_targets_are_refused():
    with pytest.raises(ValueError, match="one score an example"):
        fastweights.adapt(lambda p, f: f["x"] @ p["w0"], {"w0": jnp.ones((INPUTS, 1))}, task().support)


CASE = Case(run_tower, tower((INPUTS, 4, 3)), jnp.array(1.0), {"steps": 2})
ENGINE = jax.jit(jax.value_and_grad(partial(meta_loss, fastweights, CASE, form="dual"), (0, 1)))
ADAPT = jax.jit(partial(fastweights.adapt, run_tower, steps=2, form="dual"))


def test_padding_never_changes_the_meta_gradient():
    data = task(3)

    def garbage(part: Examples) -> Examples:
        hidden = part.mask == 0
        x = jnp.where(hidden[..., None], 1e3, part.features["x"])
        return Examples({**part.features, "x": x}, jnp.where(hidden, 1e3, part.target), part.mask)

    padded = Task(*map(garbage, data))
    nan = jnp.where(data.support.mask == 0, jnp.nan, data.support.target)
    padded = padded._replace(support=padded.support._replace(target=nan))
    found = ENGINE(CASE.params, CASE.step_size, padded)
    assert distance(found, ENGINE(CASE.params, CASE.step_size, data)) < 1e-6


def test_a_row_that_no_table_has_fails_nobody_under_the_mask():
    params = {"table": jnp.arange(60.0).reshape(20, 3) / 60, "head": jnp.ones(3)}
    support = Examples(jnp.array([[1, 2, 99]]), jnp.array([[1.0, 2.0, 0.0]]), jnp.array([[1.0, 1.0, 0.0]]))
    found = [
        fastweights.adapt(
            lambda p, rows: jnp.take(p["table"], rows, axis=0) @ p["head"],
            params,
            support,
            form=form,
            adapted={"table": True, "head": False},
        )
        for form in ("dual", "plain")
    ]
    assert not any(users.failed.any() for users in found)
    tables = [fastweights.weights(params, users)["table"] for users in found]
    np.testing.assert_allclose(*tables, rtol=1e-6)


def test_a_user_without_support_keeps_the_shared_parameters_exactly():
    data = task(4)
    empty = data._replace(support=data.support._replace(mask=data.support.mask.at[1].set(0)))
    adapted = ADAPT(CASE.params, empty.support)
    assert not adapted.failed.any()
    full = fastweights.weights(CASE.params, adapted)
    jax.tree.map(lambda own, w: np.testing.assert_array_equal(own[1], w), full, CASE.params)
    value = ENGINE(CASE.params, CASE.step_size, empty)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(value))
    assert distance(value, meta_gradient(inner, CASE, empty)) < 1e-5


@pytest.mark.parametrize("fault", ["nan target", "infinite feature", "overflow"])
def test_a_user_who_diverges_is_counted_and_poisons_nobody(fault):
    data = task(5)
    support = data.support
    if fault == "infinite feature":
        x = support.features["x"].at[1, 0, 0].set(jnp.inf)
        support = support._replace(features={**support.features, "x": x})
    else:
        support = support._replace(target=support.target.at[1, 0].set(jnp.nan if fault[0] == "n" else 1e30))
    assert ADAPT(CASE.params, support).failed.tolist() == [False, True, False]
    found = ENGINE(CASE.params, CASE.step_size, data._replace(support=support))
    without = data.support._replace(mask=data.support.mask.at[1].set(0))
    assert distance(found, ENGINE(CASE.params, CASE.step_size, data._replace(support=without))) < 1e-6


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shared", ["w0", "nothing"])
def test_infinite_inputs_that_shared_layers_make_reach_no_shared_layer_through_the_query(steps, shared):
    adapted = {name: name != shared for name in ("w0", "b0", "w1", "b1", "head")}
    case = Case(run_tower, tower((INPUTS, 4, 3)), 1.0, {"steps": steps, "adapted": adapted})
    data = task(5)
    x = data.support.features["x"].at[1].set(jnp.inf)
    broken = data._replace(support=data.support._replace(features={**data.support.features, "x": x}))
    without = data._replace(support=data.support._replace(mask=data.support.mask.at[1].set(0)))
    found = meta_gradient(fastweights, case, broken, form="dual")
    assert distance(found, meta_gradient(inner, case, without)) < 1e-5
    users = fastweights.adapt(run_tower, case.params, broken.support, form="dual", **case.options)
    assert users.failed.tolist() == [False, True, False]
    full = fastweights.weights(case.params, users)
    jax.tree.map(
        lambda own, w: np.testing.assert_array_equal(own[1], w),
        full,
        {**case.params, **({"w0": None} if shared == "w0" else {})},
    )
    of_one = fastweights.mean_change(case.params, users, jnp.array([0.0, 1.0, 0.0]))
    assert all(not np.any(change) for change in jax.tree.leaves(of_one))


def test_chunks_have_the_gradient_of_the_whole_batch():
    data = task(6)
    data = data._replace(query=data.query._replace(mask=data.query.mask.at[2].set(0)))

    def loss(params, task, key):
        adapted = fastweights.adapt(run_tower, params, task.support, steps=2, form="dual")
        scores = fastweights.predict(run_tower, params, adapted, task.query.features)
        value = outer.query_loss(scores, task.query, optax.losses.squared_error)
        counted = (task.query.mask.max(-1) > 0).sum()
        return value, {"mean": value, "users": counted, "scores": scores}

    chunked = outer.chunked(loss, 2)
    (value, aux), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(CASE.params, data, jax.random.key(0))
    whole = ENGINE(CASE.params, CASE.step_size, data)
    assert distance((value, gradient), (whole[0], whole[1][0])) < 1e-5
    assert aux["users"] == 2
    assert aux["scores"].shape == (USERS, QUERY)
    np.testing.assert_allclose(aux["mean"], value, rtol=1e-6)
    assert distance(meta_gradient(fastweights, CASE, data, chunk=2), whole) < 1e-5


def test_bfloat16_is_asked_of_every_product_and_changes_little():
    data = task(7)
    only = partial(meta_loss, fastweights, CASE, form="dual", precision=jnp.bfloat16)
    program = str(jax.make_jaxpr(jax.grad(only))(CASE.params, CASE.step_size, data))
    assert program.count("BF16_BF16_F32") == program.count("dot_general[")
    found = jax.jit(only)(CASE.params, CASE.step_size, data)
    np.testing.assert_allclose(found, ENGINE(CASE.params, CASE.step_size, data)[0], rtol=3e-2)


def arrays(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a jaxpr, those of its sub-jaxprs included."""
    shapes = set()
    for eqn in jaxpr.eqns:
        shapes |= {v.aval.shape for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "shape")}
        for inside in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inside = getattr(inside, "jaxpr", inside)
            if hasattr(inside, "eqns"):
                shapes |= arrays(inside)
    return shapes


@pytest.mark.parametrize("steps", [1, 3])
def test_per_user_weights_never_exist_in_the_dual_form(steps):
    params = {"tower": tower((INPUTS, 13, 11)), "table": jnp.ones((17, INPUTS)), "bias": jnp.zeros(17)}
    case = Case(with_table, params, 1.0, {"steps": steps})
    data = task(8)
    shapes = {}
    for engine, only in ((fastweights, {"form": "dual"}), (inner, {})):
        gradient = jax.value_and_grad(partial(meta_loss, engine, case, **only))
        shapes[engine] = arrays(jax.make_jaxpr(gradient)(params, 1.0, data).jaxpr)
    weights = {(USERS, *w.shape) for w in jax.tree.leaves(params) if w.ndim == 2}
    assert not shapes[fastweights] & weights
    assert shapes[inner] & weights == weights


def test_the_cost_model_takes_the_form_that_measured_faster():
    measured = {  # rows, inputs, outputs, steps: time of the plain form over that of the dual form
        (8, 256, 128, 5): 2.55,
        (20, 64, 64, 1): 1.36,
        (20, 64, 64, 3): 0.83,
        (20, 64, 64, 5): 0.63,
        (50, 64, 64, 5): 0.39,
        (50, 256, 128, 2): 1.30,
        (50, 256, 128, 5): 0.82,
    }
    for layer, ratio in measured.items():
        factored, explicit = fastweights.costs(*layer, merged=False)
        assert (explicit > factored) == (ratio > 1), layer


def test_a_count_may_be_learned():
    def loss(engine: Any, count: jax.Array) -> jax.Array:
        return meta_loss(engine, CASE._replace(options={"steps": 2, "count": count}), CASE.params, 1.0, task(3))

    found, plain = (jax.jit(jax.value_and_grad(partial(loss, engine)))(2.0) for engine in (fastweights, inner))
    assert distance(found, plain) < 1e-5
    assert found[1] != 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="count must be 0 or more"):
        fastweights.adapt(run_tower, CASE.params, task().support, count=-1.0)
    with pytest.raises(ValueError, match="steps must be 0 or more"):
        fastweights.adapt(run_tower, CASE.params, task().support, steps=-1)
    with pytest.raises(ValueError, match="form must be"):
        fastweights.adapt(run_tower, CASE.params, task().support, form="fast")
    with pytest.raises(ValueError, match="chunk must be"):
        outer.chunked(lambda *_: None, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="precision must be"):
            fastweights.adapt(run_tower, CASE.params, task().support, precision=jnp.float16)
