"""Ranks of training runs that start instantly: they are forked from a process that has imported everything."""

import importlib
import multiprocessing
import os
import socket

import torch

from ditfast import train

for name in ("torch._dynamo", "torch.utils.tensorboard", "tensorboard.summary", "sklearn.datasets", "tyro", "yaml"):
    importlib.import_module(name)  # a run would import these on demand


def start_ranks(flags, world: int, log) -> list:
    """Start the processes of a run, which append their output to the file ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    shared["DITFAST_RENDEZVOUS_SECONDS"] = "4"  # within which a rank exits if its peer was killed before they met
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    processes = [context.Process(target=_run, args=(each, [*map(str, flags)], str(log))) for each in ranks]
    for process in processes:
        process.start()
    return processes


def _run(environment, flags, log):
    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    train.main(flags)
