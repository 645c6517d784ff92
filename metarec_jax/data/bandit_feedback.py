"""Open Bandit: logged clicks of a fashion shop with the propensities of the displayed items."""

import io
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from metarec_jax.data.fetch import cache_folder, from_wheel
from metarec_jax.errors import DataError

logger = logging.getLogger(__name__)

OBP = "obp==0.4.1"  # its wheel holds a sample of 10,000 rows a file; only the members below are read
SHA256 = {
    "bts/all/all.csv": "0ad874e4dbf6902f0845dd478ad8dde5ef6903583d3ffaace78411bdad064106",
    "bts/men/men.csv": "db6d1f7ed2d591ba521533e45286d4c1fba7fe57a8ad2e80342210335f43c527",
    "bts/women/women.csv": "e5d1b49a39b608585a2f3014a3f54970430cd37a495c1b73fceb85cdf428a5b8",
    "random/all/all.csv": "7168295b6e0a9eabcf3392320a5dd434e542b68e705d5cd9491499af589812f1",
    "random/men/men.csv": "ede6d08c6877f99cd3770f7d09e26c738e6aa6de4445ccccfb1356ba5d06b1eb",
    "random/women/women.csv": "e65f3bd3beb17664fa69cc129bf7bf852a775f8ffa630506e505fc905315bb34",
}
LICENCE = "Open Bandit data: ZOZO, CC BY 4.0; cite Saito et al., NeurIPS Datasets and Benchmarks 2021"


@dataclass(frozen=True, eq=False)
class LoggedFeedback:
    """Actions of a logging policy, their propensities and rewards.

    Attributes:
      action: `[n]` int32 displayed item.
      position: `[n]` int32 display position; 0, 1, 2 from the left.
      reward: `[n]` float64, 1 for a click, else 0.
      propensity: `[n]` float64 probability with which the logging policy shows this action at this position.
      user: `[n, 4]` int32 codes of four hashed user attributes.
      affinity: `[n, actions]` float32 number of the user's earlier clicks on each item.
      timestamp: `[n]` int64 seconds, ascending.
      actions: number of actions.

    Example:
      Three rounds of your own uniform policy over two items, and the rate of a policy that always shows item 1:

      >>> zeros, ones = np.zeros(3, np.int32), np.ones(3)
      >>> log = mr.data.LoggedFeedback(
      ...     action=np.array([0, 1, 1]), position=zeros, reward=np.array([0.0, 1.0, 0.0]), propensity=ones / 2,
      ...     user=np.zeros((3, 4), np.int32), affinity=np.zeros((3, 2)), timestamp=np.arange(3), actions=2)
      >>> mr.evaluation.counterfactual.snips(log.reward, log.propensity, target=(log.action == 1) * 1.0).value
      0.5
    """

    action: np.ndarray
    position: np.ndarray
    reward: np.ndarray
    propensity: np.ndarray
    user: np.ndarray
    affinity: np.ndarray
    timestamp: np.ndarray
    actions: int


def open_bandit(
    policy: Literal["random", "bts"] = "random",
    campaign: Literal["all", "men", "women"] = "all",
    *,
    cache: str | Path | None = None,
) -> LoggedFeedback:
    """Load the small sample of the Open Bandit dataset: 10,000 impressions of one policy in one campaign.

    The sample comes from the wheel of the PyPI package obp 0.4.1. Only its data files are read; no code of it runs. The
    sample is kept in the cache.

    Args:
      policy: "random", or "bts" (Bernoulli Thompson sampling).
      campaign: "all" items, "men" or "women".
      cache: download folder (default as in `load`).

    Raises:
      DataError: unknown `policy` or `campaign`, or the sample is neither in the cache nor can be downloaded.

    References:
      Saito et al., Open Bandit Dataset and Pipeline, NeurIPS Datasets and Benchmarks 2021.
    """
    import polars as pl

    if policy not in ("random", "bts") or campaign not in ("all", "men", "women"):
        raise DataError(
            f'policy must be "random" or "bts", campaign "all", "men" or "women"; got {policy!r}, {campaign!r}'
        )
    archive = cache_folder(cache) / "open-bandit.zip"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        from_wheel(OBP, "obp/dataset/obd/", SHA256, archive)
        logger.warning(LICENCE)
    try:
        with zipfile.ZipFile(archive) as file:
            table = pl.read_csv(io.BytesIO(file.read(f"{policy}/{campaign}/{campaign}.csv")))
    except (KeyError, zipfile.BadZipFile, zlib.error, pl.exceptions.PolarsError) as error:
        raise DataError(f"{archive} is damaged ({error}); delete it and call again to download it") from error
    affinity = sorted((c for c in table.columns if c.startswith("user-item_affinity_")), key=lambda c: int(c[19:]))
    codes = [np.unique(table[f"user_feature_{i}"].to_numpy(), return_inverse=True)[1] for i in range(4)]
    return LoggedFeedback(
        action=table["item_id"].to_numpy().astype(np.int32),
        position=table["position"].to_numpy().astype(np.int32) - 1,
        reward=table["click"].to_numpy().astype(np.float64),
        propensity=table["propensity_score"].to_numpy().astype(np.float64),
        user=np.stack(codes, -1).astype(np.int32),
        affinity=table.select(affinity).to_numpy().astype(np.float32),
        timestamp=table["timestamp"].str.to_datetime().dt.epoch("s").to_numpy(),
        actions=len(affinity),
    )
