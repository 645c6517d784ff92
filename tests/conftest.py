"""Fixtures that several parts of the suite share, and how hard the compiler tries for tests."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

import metarec_jax as mr
from metarec_jax.types import Examples, History, Task

# Most of what the suite compiles runs a few times only. XLA reads this at its first use, after all imports; what the
# caller set wins.
QUICK = ["--xla_backend_optimization_level=0"]
if Version(version("jaxlib")) < Version("0.11.1"):  # newer ones stop at a flag that they do not know
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    QUICK.append("--xla_llvm_disable_expensive_passes=true")
os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")])

# Many tests compile the same programs, such as a strategy on `tiny_model`: keep them, each process for itself.
COMPILED = tempfile.mkdtemp(prefix="metarec-compiled-")
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes many small objects, and notes where each operation was written.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.fixture(autouse=True)
def few_compiled_programs(request):
    """Forget compiled programs now and then: a process may hold only so many memory maps, and each takes some."""
    yield
    seen = request.config.stash.get(TESTS_SEEN, 0) + 1
    request.config.stash[TESTS_SEEN] = seen
    if seen % 10 == 0 and memory_maps() > 30_000:  # of 65,530 that Linux allows
        jax.clear_caches()


TESTS_SEEN = pytest.StashKey[int]()


def memory_maps():
    """How many this process holds; 0 where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def random_task(seed=0, users=5, support=7, query=4, width=3, mask=True):
    """A task batch with features `[users, examples, width]`, ragged masks and 0 / 1 targets."""
    rng = np.random.default_rng(seed)

    def examples(n):
        lengths = rng.integers(1, n + 1, size=users) if mask else np.full(users, n)
        keep = (np.arange(n) < lengths[:, None]).astype(np.float32)
        features = rng.normal(size=(users, n, width)).astype(np.float32)
        return Examples(features, (rng.random((users, n)) < 0.5).astype(np.float32), keep)

    return Task(examples(support), examples(query))


def tiny_apply(params, x):
    """Two dense layers, `[..., width]` to `[...]`."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def tiny_init(key, width=3, hidden=4):
    a, b = jax.random.split(key)
    return {
        "w1": jax.random.normal(a, (width, hidden)) / width**0.5,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(b, (hidden,)) / hidden**0.5,
        "b2": jnp.zeros(()),
    }


def tiny_reading_apply(params, features):
    """`tiny_apply` on inputs times the mean over the user's other examples of (2 target - 1) * features."""
    if not isinstance(features, History):
        return tiny_apply(params, jnp.zeros_like(features))
    x, past, own = features
    others = (past.mask > 0)[..., None, :] & (own[..., None] != jnp.arange(past.mask.shape[-1]))
    signed = jnp.where(past.mask > 0, 2 * past.target - 1, 0)[..., None] * past.features
    return tiny_apply(params, x * (others @ signed / jnp.maximum(others.sum(-1, keepdims=True), 1)))


@pytest.fixture(scope="session")
def jitted():
    """Compiles the functions of a strategy, each as one program and not operation by operation."""

    def compiled(strategy):
        names = ("init", "adapt", "predict", "loss", "deviation", "sample")
        return strategy._replace(**{n: jax.jit(f) for n in names if (f := getattr(strategy, n))})

    return compiled


@pytest.fixture
def task_batch():
    """The function that makes random task batches."""
    return random_task


@pytest.fixture(scope="session")
def tiny_model():
    """A small model of the caller's own, with every function that some strategy needs."""
    return mr.Model(
        init=tiny_init,
        apply=tiny_apply,
        embed=lambda params, x: jnp.tanh(x @ params["w1"] + params["b1"]),
        groups=lambda params: {"w1": "embedding", "b1": "decision", "w2": "head", "b2": "head"},
        width=4,
    )


@pytest.fixture(scope="session")
def tiny_reading_model(tiny_model):
    """A small model that reads its user's history, whatever the order."""
    return tiny_model._replace(apply=tiny_reading_apply, history=True)


@pytest.fixture(scope="session")
def synthetic():
    """A small synthetic dataset."""
    return mr.data.synthetic(users=120, items=60, seed=3)


@pytest.fixture(scope="session")
def stocked():
    """A trained recommender whose items have a price, a colour, tags and titles, and whose users have a country."""
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 20), np.concatenate([rng.permutation(50)[:20] for _ in range(60)])
    taste = (np.arange(60)[users] % 2 == items % 2).astype(int)
    colours, tags = np.array(["red", "green", "blue"]), ["new", "sale", "eco"]
    data = mr.data.from_tables(
        {"user_id": users, "item_id": 100 + items, "rating": np.clip(2 + 2 * taste + rng.integers(0, 2, 1200), 1, 5)},
        users={"user_id": np.arange(60), "country": np.array(["nl", "de"])[np.arange(60) % 2]},
        items={
            "item_id": 100 + np.arange(50),
            "title": [f"Thing {i}" for i in range(50)],
            "price": rng.lognormal(size=50),
            "colour": colours[np.arange(50) % 3],
            "tags": [[tags[i % 3], tags[(i // 3) % 3]] for i in range(50)],
        },
    )
    return mr.train(data, objective="click", epochs=4, progress=False, buckets=1, seed=0, model_options={"width": 4})


@pytest.fixture
def browser():
    """A real browser without a screen; tests are skipped where none is installed.

    For one test only: while it runs, so does an event loop, beside which other tests could not start theirs.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as p:
        try:
            running = p.chromium.launch(executable_path=found, args=quiet)
        except playwright.Error as error:
            pytest.skip(f"no browser here ({str(error).splitlines()[0]})")
        yield running
        running.close()
