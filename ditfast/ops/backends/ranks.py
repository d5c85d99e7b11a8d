"""One answer for all ranks of a job: what rank 0 found.

Ranks ask when they first need an answer, which need not be at the same time, and some never ask. So an answer goes
through the job's key-value store, in which nobody waits for a rank that asks nothing, and not through a collective.
"""

import json
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=5)  # for rank 0 to ask as well, and to find out


def agree(name: str, find: Callable):
    """``find()``, a JSON value, of rank 0 on every rank; this rank's own where there is no job.

    Rank 0 does not wait for others. If it does not ask within `PATIENCE`, a rank finds out by itself, with a warning.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return find()
    store, key = dist.distributed_c10d._get_default_store(), f"ditfast/{name}"
    if dist.get_rank() == 0:
        value = find()
        store.set(key, json.dumps(value))
        return value
    try:
        store.wait([key], PATIENCE)
    except RuntimeError:  # DistStoreError, where the time is over
        warnings.warn(
            f"ditfast: rank 0 did not ask about {name} within {PATIENCE}: rank {dist.get_rank()} decides for itself",
            RuntimeWarning,
            stacklevel=2,
        )
        return find()
    return json.loads(store.get(key))
