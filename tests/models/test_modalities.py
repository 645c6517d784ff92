"""The gate over modalities: its equation, what it learns, and what a missing modality does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.data.fields import Field
from metarec_jax.models import MODELS
from metarec_jax.models.profile import vectors

FIELDS = {
    "item_id": Field("item_id", "categorical", 9, 1),
    "item/image": Field("image", "multimodal", 1, 5),
    "item/text": Field("text", "multimodal", 1, 3),
    "user/voice": Field("voice", "multimodal", 1, 4),
}


def features(users=2, examples=6, seed=0, missing=0.4):
    r = np.random.default_rng(seed)
    found = {"item_id": r.integers(9, size=(users, examples)).astype(np.int32)}
    for name in list(FIELDS)[1:]:
        x = r.normal(size=(users, examples, FIELDS[name].width))
        x[..., -1] = 1
        found[name] = np.where(r.random((users, examples, 1)) < missing, 0, x).astype(np.float32)
    return found


def test_modalities_are_mixed_by_a_softmax_over_those_that_are_there():
    r, x = np.random.default_rng(1), features()
    kernels = {name: r.normal(size=(f.width, 4)) for name, f in FIELDS.items() if f.kind == "multimodal"}
    kinds = {name: f.kind for name, f in FIELDS.items() if name in kernels}
    got = vectors({n: lambda v, k=k: v @ k for n, k in kernels.items()}, x, kinds)
    assert list(got) == ["item/*", "user/*"]
    for u in range(2):
        for e in range(6):
            there = [n for n in ("item/image", "item/text") if x[n][u, e, -1]]
            out = [x[n][u, e] @ kernels[n] for n in there]
            weight = np.exp([o[-1] for o in out])
            expected = sum((w / weight.sum() * o[:-1] for w, o in zip(weight, out, strict=True)), np.zeros(3))
            np.testing.assert_allclose(got["item/*"][u, e], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "design"])  # it has no parameters
def test_every_model_takes_them_and_all_missing_is_finite_with_its_gradient(name):
    model, x = MODELS[name](FIELDS, width=4), features()
    params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1), jax.jit(model.init)(jax.random.key(0)))
    assert model.profile.width == 4
    assert jax.eval_shape(model.embed, params, x).shape == (2, 6, model.width)
    step = jax.jit(jax.value_and_grad(lambda params, given: model.apply(params, given).sum()))
    for given in (x, jax.tree.map(np.zeros_like, x)):
        value, gradient = step(params, given)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "name", ["melu", "anp", "in_context", *(pytest.param(n, marks=pytest.mark.grid) for n in ("alpaca", "lwa", "gme"))]
)
def test_strategies_of_every_family_train_with_them(name):
    model = MODELS["gru" if name == "in_context" else "mlp"](FIELDS, width=4, hidden=(4,))
    strategy = mr.STRATEGIES[name](model, loss=optax.losses.sigmoid_binary_cross_entropy)
    x, rng = features(users=3), np.random.default_rng(0)
    x["order"] = np.broadcast_to(np.arange(6, dtype=np.int32), (3, 6))
    voice = x["user/voice"]
    x["user/voice"] = np.broadcast_to(voice[:, :1], voice.shape)
    mask = (np.arange(6) < np.array([[6], [3], [0]])).astype(np.float32)
    task = mr.Task(*[mr.Examples(x, rng.integers(2, size=(3, 6)).astype(np.float32), mask)] * 2)
    params = jax.jit(strategy.init)(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(lambda p: strategy.loss(p, task, jax.random.key(1))[0]))
    value, gradient = loss(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def fitted(fields, x, target, steps=400):
    """The linear model trained on items `[n]`: score of `item_id` 0 and these vectors."""
    model = MODELS["linear"](fields, width=4)
    params, optimizer = model.init(jax.random.key(0)), optax.adam(0.03)

    def loss(params):
        return jnp.mean((model.apply(params, x) - target) ** 2)

    @jax.jit
    def step(params, state):
        change, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, lambda x: np.asarray(model.apply(params, x))


def two_views(kind, noise, n=600, seed=0):
    """Items whose quality is the first number of `image`, and of `text` too with this much noise."""
    r = np.random.default_rng(seed)
    quality = r.normal(size=n)
    image, text = r.normal(size=(2, n, 3))
    image[:, 0] = quality + 0.3 * r.normal(size=n)
    text[:, 0] = quality + noise * r.normal(size=n) if noise is not None else text[:, 0]
    raw = {"item/image": image, "item/text": text}
    fields = {name: Field.fit(name, v[:400], kind=kind) for name, v in raw.items()}
    x = {name: fields[name].encode(v) for name, v in raw.items()}
    x["item_id"] = np.zeros(n, np.int32)
    return {"item_id": FIELDS["item_id"]} | fields, x, quality.astype(np.float32)


def test_the_gate_learns_to_ignore_noise():
    fields, x, quality = two_views("multimodal", None)
    train, test = ({k: v[s] for k, v in x.items()} for s in (slice(400), slice(400, None)))
    params, score = fitted(fields, train, quality[:400])
    for part in ("embedding", "embedding_bias"):  # gates of one half at the start
        logits = [test[n] @ params[part][n]["kernel"][:, -1] for n in ("item/image", "item/text")]
        assert np.mean(jax.nn.softmax(np.stack(logits), 0)[0]) > 0.65
    moved = {n: np.std(score({**test, n: test[n][::-1]}) - score(test)) for n in ("item/image", "item/text")}
    assert moved["item/text"] < 0.15 * moved["item/image"]
    assert np.corrcoef(score(test), quality[400:])[0, 1] > 0.9


def test_a_modality_missing_at_test_time_costs_less_than_its_mean_in_its_place():
    error, whole = {}, {}
    for kind in ("multimodal", "dense"):
        fields, x, quality = two_views(kind, 0.3)
        train, test = ({k: v[s].copy() for k, v in x.items()} for s in (slice(400), slice(400, None)))
        rng = np.random.default_rng(9)
        for name in ("item/image", "item/text"):
            train[name][rng.random(400) < 0.2] = fields[name].unknown()
        _, score = fitted(fields, train, quality[:400])
        whole[kind] = np.mean((score(test) - quality[400:]) ** 2)
        test["item/image"] = fields["item/image"].encode([None] * 200)
        error[kind] = np.mean((score(test) - quality[400:]) ** 2)
    assert whole["multimodal"] < 1.05 * whole["dense"]
    assert error["multimodal"] < 0.5 * error["dense"]
    assert error["multimodal"] < 1.2 * 0.3**2 / (1 + 0.3**2)  # the least that `text` alone allows
