"""One answer for all ranks of a job: what rank 0 found.

Ranks ask when they first need an answer, which need not be at the same time, and some never ask. So an answer goes
through the job's key-value store, where none waits for any rank but the first, and not through a collective. What a
rank knew before the job began it keeps.
"""

import json
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=5)  # how long to wait for rank 0 to ask and answer
BRIEF = timedelta(seconds=1)  # after a first time in vain
_is_patient = True
_is_alone = False  # while this rank finds an answer by itself, it waits for none of those that it needs for it


def from_rank_zero(name: str, find: Callable):
    """``find()``, a JSON value, of rank 0 on every rank; this rank's own where there is no job.

    Rank 0 does not wait for others. If it gives no answer within `PATIENCE`, a rank finds one by itself, with a
    warning, and waits for the next only briefly.
    """
    if _is_alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return find()
    global _is_patient
    store, key = dist.distributed_c10d._get_default_store(), f"ditfast/{name}"
    if dist.get_rank() == 0:
        return _publish(store, key, find)
    try:
        store.wait([key], PATIENCE if _is_patient else BRIEF)
        answer = json.loads(store.get(key))
    except dist.DistNetworkError:  # the store is gone, and with it the job
        raise
    except RuntimeError:  # the time is over
        answer = {"error": "it did not ask in time"}
        _is_patient = False
    if "error" in answer:
        return _find_alone(name, find, answer["error"])
    return answer["value"]


def _publish(store, key, find):
    try:
        value = find()
    except BaseException as error:
        store.set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    store.set(key, json.dumps({"value": value}))
    return value


def _find_alone(name, find, why):
    global _is_alone
    warnings.warn(
        f"ditfast: rank {dist.get_rank()} decides on {name} for itself, since rank 0 gave no answer ({why})",
        RuntimeWarning,
        stacklevel=2,
    )
    _is_alone = True
    try:
        return find()
    finally:
        _is_alone = False
