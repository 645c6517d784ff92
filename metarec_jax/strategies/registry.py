"""Registry: strategies by name, and the default network of each."""

from collections.abc import Callable

from metarec_jax.strategies.alpaca import alpaca
from metarec_jax.strategies.als import als
from metarec_jax.strategies.cavia import cavia
from metarec_jax.strategies.cold_items import gme, metaemb
from metarec_jax.strategies.content import content
from metarec_jax.strategies.ease import ease
from metarec_jax.strategies.gradient import anil, fomaml, maml, melu
from metarec_jax.strategies.ials import ials
from metarec_jax.strategies.imaml import imaml
from metarec_jax.strategies.in_context import in_context
from metarec_jax.strategies.item_knn import item_knn
from metarec_jax.strategies.limaml import limaml
from metarec_jax.strategies.mamlpp import mamlpp
from metarec_jax.strategies.mamo import mamo
from metarec_jax.strategies.metasgd import meta_sgd
from metarec_jax.strategies.metric import lwa, nlba, prototypes
from metarec_jax.strategies.mwuf import mwuf
from metarec_jax.strategies.process import anp, cnp
from metarec_jax.strategies.reptile import reptile
from metarec_jax.strategies.ridge import ridge
from metarec_jax.strategies.softmax_ridge import softmax_ridge
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.structure import gated, meta_reg, sparse_maml
from metarec_jax.strategies.tanp import tanp
from metarec_jax.strategies.transfer import finetune, finetune_head, lora, pretrain
from metarec_jax.strategies.transitions import transitions
from metarec_jax.strategies.wrappers.ensemble import ensemble, fit_weights, given, mixture
from metarec_jax.strategies.wrappers.history import with_history
from metarec_jax.strategies.wrappers.labels import with_labels
from metarec_jax.strategies.wrappers.ranked import ranked
from metarec_jax.strategies.wrappers.reweight import reweighted
from metarec_jax.strategies.wrappers.stack import stack
from metarec_jax.tasks.objective import Ranking

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    # lead a table of benchmarks/RESULTS.md, or are level with its leader
    "alpaca": alpaca,
    "prototypes": prototypes,
    "ensemble": mixture,
    "ridge": ridge,
    "cavia": cavia,
    "maml": maml,
    "anil": anil,
    "melu": melu,
    "lora": lora,
    "metaemb": metaemb,
    "gme": gme,
    "mwuf": mwuf,
    # lead no table of benchmarks/RESULTS.md; kept for comparison and research
    "fomaml": fomaml,
    "reptile": reptile,
    "meta_sgd": meta_sgd,
    "mamlpp": mamlpp,
    "imaml": imaml,
    "limaml": limaml,
    "lwa": lwa,
    "nlba": nlba,
    "cnp": cnp,
    "anp": anp,
    "tanp": tanp,
    "mamo": mamo,
    "in_context": in_context,
    "pretrain": pretrain,
    "finetune": finetune,
    "finetune_head": finetune_head,
    "gated": gated,
    "sparse_maml": sparse_maml,
    "meta_reg": meta_reg,
}

RANKING: dict[str, Callable[..., Strategy]] = {  # strategies that can only rank
    "ials": ials,
    "ease": ease,
    "item_knn": item_knn,
    "content": content,
    "softmax_ridge": softmax_ridge,
    "stack": stack,
    "transitions": transitions,
}

RATING: dict[str, Callable[..., Strategy]] = {"als": als}  # strategies that can only predict ratings

DEFAULT_MODEL = {  # name in `metarec_jax.models.MODELS`; strategies not listed use "mlp"
    "ridge": "linear",
    "cnp": "linear",
    "anp": "linear",
    "tanp": "linear",
    "alpaca": "linear",
    "lwa": "linear",
    "nlba": "linear",
    "in_context": "transformer",
    "als": "design",
    "ials": "design",
    "ease": "design",
    "item_knn": "design",
    "content": "design",
    "softmax_ridge": "linear",
    "stack": "design",
    "transitions": "design",
}

__all__ = [
    "DEFAULT_MODEL",
    "RANKING",
    "RATING",
    "STRATEGIES",
    "Ranking",
    "Strategy",
    "alpaca",
    "als",
    "anil",
    "anp",
    "cavia",
    "cnp",
    "content",
    "ease",
    "ensemble",
    "finetune",
    "finetune_head",
    "fit_weights",
    "fomaml",
    "gated",
    "given",
    "gme",
    "ials",
    "imaml",
    "in_context",
    "item_knn",
    "limaml",
    "lora",
    "lwa",
    "maml",
    "mamlpp",
    "mamo",
    "melu",
    "meta_reg",
    "meta_sgd",
    "metaemb",
    "mixture",
    "mwuf",
    "nlba",
    "pretrain",
    "prototypes",
    "ranked",
    "reptile",
    "reweighted",
    "ridge",
    "softmax_ridge",
    "sparse_maml",
    "stack",
    "tanp",
    "transitions",
    "with_history",
    "with_labels",
]
