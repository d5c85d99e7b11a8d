"""One answer for all ranks of a job: the first that any of them has.

Ranks that ran different backends would compute slightly different numbers, and at different speeds. They ask when
they first need an answer: not necessarily at the same time, and some never do. So answers go through the job's
key-value store, where the first one stays, and not through a collective. A rank that knows an answer from disk never
waits. One that does not leaves the work to rank 0 for a while. A rank keeps answers from before the job started.
"""

import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

UNNOTICED = timedelta(seconds=2)  # how long to wait for rank 0's answer without a word
PATIENCE = timedelta(seconds=30)  # … and after that
BRIEF = timedelta(seconds=1)  # after a first timeout
_is_patient = True
_is_alone = False  # while this rank finds an answer itself, it does not wait for the answers that it depends on


def agreed(name: str, find: Callable, is_known: Callable[[], bool]) -> Any:
    """Return the job's answer, a JSON value; outside a job, ``find()``.

    Rank 0, and a rank that knows the answer, never waits. If there is none within `PATIENCE`, a rank warns, finds one
    itself and waits only briefly from then on.

    Args:
        is_known: whether ``find`` only has to read the answer.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return find()
    store, key = dist.distributed_c10d._get_default_store(), f"ditfast/{name}"
    found = _read(store, key)
    if not found and dist.get_rank() != 0 and not _is_alone and not is_known():
        found = _wait(store, key, name)
        if "value" not in found:
            find = partial(_find_alone, name, find, found.get("error", "timed out"))
    return found["value"] if "value" in found else _publish(store, key, found, find)


def _read(store, key):
    """{"value": …}, {"error": …} or, if there is none yet, {}."""
    return json.loads(store.get(key)) if store.check([key]) else {}


def _wait(store, key, name):
    """What another rank answers; {} if none does in time."""
    global _is_patient
    for patience in (UNNOTICED, PATIENCE) if _is_patient else (BRIEF,):
        if patience is PATIENCE:
            _say_why(name)
        try:
            store.wait([key], patience)
            return _read(store, key)
        except dist.DistNetworkError:  # the store is gone, and the job with it
            raise
        except RuntimeError:  # timed out
            continue
    _is_patient = False
    return {}


def _say_why(name):
    warnings.warn(
        f"ditfast: rank {dist.get_rank()} waits up to {PATIENCE.total_seconds():g} s for rank 0 to check or time "
        f"{name}; `python -m ditfast.doctor --verify` checks ahead",
        RuntimeWarning,
        stacklevel=4,
    )


def _publish(store, key, before, find):
    """The answer found, unless another came first. An error is published too, so that nobody waits for rank 0."""
    try:
        answer = {"value": find()}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
        store.compare_set(key, json.dumps(before) if before else "", json.dumps(answer))
        raise
    while True:
        first = json.loads(store.compare_set(key, json.dumps(before) if before else "", json.dumps(answer)))
        if "value" in first:
            return first["value"]
        before = first  # an error, to be replaced


def _find_alone(name, find, why):
    global _is_alone
    warnings.warn(
        f"ditfast: rank {dist.get_rank()} decides {name} for all ranks: no answer from rank 0 ({why})",
        RuntimeWarning,
        stacklevel=2,
    )
    _is_alone = True
    try:
        return find()
    finally:
        _is_alone = False
