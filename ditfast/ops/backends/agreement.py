"""One answer for all ranks of a job: rank 0's.

Ranks ask when they first need an answer: not necessarily at the same time, and some never do. So answers go through
the job's key-value store, where ranks only ever wait for rank 0, and not through a collective. A rank keeps answers
from before the job started.
"""

import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(minutes=5)  # how long to wait for rank 0's answer
BRIEF = timedelta(seconds=1)  # after a first timeout
_is_patient = True
_is_alone = False  # while this rank finds an answer itself, it does not wait for the answers that it depends on


def from_rank_zero(name: str, find: Callable) -> Any:
    """Return rank 0's ``find()``, a JSON value, on every rank; outside a job, this process's own.

    Rank 0 never waits. If it does not answer within `PATIENCE`, a rank warns, finds the answer itself and waits only
    briefly from then on.
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
    except dist.DistNetworkError:  # the store is gone, and the job with it
        raise
    except RuntimeError:  # timed out
        answer = {"error": "timed out"}
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
        f"ditfast: rank {dist.get_rank()} decides {name} on its own: no answer from rank 0 ({why})",
        RuntimeWarning,
        stacklevel=2,
    )
    _is_alone = True
    try:
        return find()
    finally:
        _is_alone = False
