"""Train a DiT, from a single CPU to GPUs on many machines.

    python -m ditfast.train --out runs/digits --steps 1000
    torchrun --nproc-per-node 8 -m ditfast.train --data imagenet-latents --out runs/xl2 --resume auto
    python -m ditfast.train --data my-latents --init DiT-XL-2-256x256.pt --out runs/mine

The output folder gets config.yaml, checkpoints, metrics.jsonl, TensorBoard files, sample grids and, at the end, a
model with the averaged weights for `ditfast.sample`. --config reads a YAML file with the same option names; flags
override it. --dry-run prints the plan and exits.
"""

from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import argparse
from contextlib import ExitStack

import torch

from ditfast.command import by_option, words
from ditfast.data import DataError, Source, Unreadable, open_data
from ditfast.data.classes import print_classes
from ditfast.data.sources import BUILT_IN
from ditfast.export import export
from ditfast.failure import explain
from ditfast.heap import keep_freed_memory
from ditfast.optional import import_optional
from ditfast.ranks import exit_rank, joined_ranks
from ditfast.run_lock import FolderError, run_lock
from ditfast.signals import exit_status
from ditfast.training import TrainError
from ditfast.training.backends import check_backend
from ditfast.training.config import Config, check_config, check_paths, fill_defaults
from ditfast.training.config_file import flags_from_yaml
from ditfast.training.encoder import Encoder
from ditfast.training.init import check_init, read_init
from ditfast.training.loop import Run
from ditfast.training.parallel import TIMEOUT
from ditfast.training.plan import describe_run
from ditfast.training.stopper import Stopped


@command()
def main(arguments: list[str] | None = None) -> None:
    try:
        config, dry = parse_config(arguments)
        with ExitStack() as held:
            with joined_ranks(TIMEOUT, nccl=True) as ranks:
                if ranks.device == "cpu":
                    keep_freed_memory()
                else:
                    torch.set_float32_matmul_precision("high")  # TF32, as in the original
                init = read_init(config)
                config = fill_defaults(config, ranks.device, init)
                check_init(config, init)
                check_config(config, ranks.world)
                check_backend(config.backend, ranks.device)
                if not dry:
                    held.enter_context(run_lock(config.out, ranks, config.take_over))
                source = open_source(config)
                if ranks.is_first:
                    print_classes(source)
                encoder = Encoder(config.vae, source, config.seed, config.batch, ranks)
                if dry:
                    if ranks.is_first:
                        print(describe_run(config, source, encoder, ranks, init))
                    return
                run = Run(config, source, encoder, ranks, init)
                run.train()
            if ranks.is_first and run.saved:  # without the others: the checkpoint holds all shards
                export(run.saved, run.folder / "model", overwrite=True)
    except FolderError as error:
        exit_rank(f"error: {error}", 2)
    except (TrainError, DataError, Unreadable, ImportError, OSError) as error:
        exit_rank(f"error: {error}")
    except Stopped as stop:
        exit_rank(str(stop), 128 + stop.number)
    except KeyboardInterrupt as error:
        exit_rank("interrupted; --resume auto resumes from the last checkpoint, if any", exit_status(error))
    except Exception as error:
        exit_rank(explain(error))


def parse_config(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """The config, and whether to only print the plan."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    early, rest = first.parse_known_args(words(arguments))
    given = flags_from_yaml(early.config) if early.config is not None else []
    config = import_optional("tyro").cli(
        Config, prog="python -m ditfast.train", description=__doc__, args=[*given, *rest]
    )
    check_paths(config)
    return config, early.dry_run


def open_source(config: Config) -> Source:
    """Open the data of a config."""
    options = {} if config.data in BUILT_IN else {"flip": config.flip}
    with by_option(DataError, TrainError, "data", "image_size"):
        source = open_data(config.data, config.image_size, **options)
    if config.num_classes not in (None, source.num_classes):
        raise TrainError(f"--num-classes is {config.num_classes}, but --data {config.data} has {source.num_classes}")
    return source


if __name__ == "__main__":
    main()
