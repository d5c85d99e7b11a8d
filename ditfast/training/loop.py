"""The training loop."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ditfast.atomic import atomic_write
from ditfast.data import Source
from ditfast.data.stream import stream_batches
from ditfast.failure import in_brief
from ditfast.models import DiT, cost
from ditfast.ops.backends.log import record
from ditfast.optional import import_optional
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.average import decay_at, wants_warmup
from ditfast.training.backends import chosen_backends, compare_cpu, describe_cpu, repeat_backends
from ditfast.training.checkpoint import CONFIG, FOLDER, Checkpoints, step_name
from ditfast.training.config import NEW, Config, Init, model_arguments
from ditfast.training.config_file import to_yaml
from ditfast.training.encoder import Encoder
from ditfast.training.init import make_model
from ditfast.training.loss_step import LossStep
from ditfast.training.monitor import Log, Meter, append_line, matmul_rate, memory_gib
from ditfast.training.objective import make_objective
from ditfast.training.parallel import gradient_sync, parallelize, unwrap
from ditfast.training.plan import describe_average, summarize
from ditfast.training.preview import Preview
from ditfast.training.resume import check_same_run, describe_sampling, find_checkpoint
from ditfast.training.step_draws import draw_step
from ditfast.training.stopper import Stopped, Stopper
from ditfast.training.weights import Weights, norm_of


class Run:
    """A training run. The constructor sets up everything before the first step.

    Args:
        config: with defaults filled in, and checked.
        source: the data.
        encoder: makes model inputs of it.
        ranks: this process among all.
        init: description of the model ``config.init``.

    Attributes:
        step, seen: optimizer steps taken, and samples read by all ranks.
        saved: path of the last checkpoint; None before the first.
        about: description of the run that checkpoints record.

    Raises:
        TrainError: a user error.
    """

    def __init__(self, config: Config, source: Source, encoder: Encoder, ranks: Ranks, init: Init = NEW):
        self.config, self.source, self.encoder, self.ranks = config, source, encoder, ranks
        self.folder = Path(config.out)
        self.checkpoints = Checkpoints(self.folder / FOLDER, config.keep, ranks)
        start = find_checkpoint(config, self.checkpoints)
        torch.manual_seed(config.seed)
        arguments = model_arguments(config, encoder.shape, source.num_classes, init)
        model, said = (DiT(**arguments), "") if start else make_model(config, arguments, encoder.vae, init)
        model.eval().to(ranks.device)  # training mode would only drop labels, which is done in _step
        lines = summarize(config, source, encoder, ranks, model)
        self.macs = sum(cost.macs(model).values())
        self.objective = make_objective(config, source.num_classes)
        masters = None
        if config.precision == "pure_bf16" and config.parallel == "ddp":
            masters = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.to(torch.bfloat16)
        dtype = torch.bfloat16 if config.precision == "pure_bf16" else None
        self.loss_step = parallelize(LossStep(model, self.objective, dtype), config, ranks)
        self.weights = Weights(model, config.lr, config.weight_decay, masters, config.betas)
        self.about: dict[str, Any] = {"model": model.config, "data": source.identity, "seed": config.seed}
        self.about |= {"backends": {}, "cpu": describe_cpu(ranks.device)}
        self.about["sampling"] = describe_sampling(config, source, encoder)
        self.about["ema_warmup"] = wants_warmup(config.ema_warmup, config.ema, config.steps)
        self.step = self.seen = self.skipped = self.unreadable = 0
        self.saved: Path | None = None
        begun = self._resume(start) if start else [said or "starting at step 0"]
        self.rate = matmul_rate(ranks.device, torch.float32 if config.precision == "fp32" else torch.bfloat16)
        lines.append(f"peak     {self.rate / 1e12:.3g} TFLOP/s in a matrix product, measured now: the 100% of MFU")
        if ranks.is_first:
            print("\n".join([*lines, *describe_average(config, self.about["ema_warmup"]), *begun]))
        self.preview = Preview(config, encoder, source.num_classes, ranks)

    def _resume(self, path):
        """Read a checkpoint; returns lines that say so, and what differs here."""
        found = self.checkpoints.read_about(path)
        check_same_run(path, found, self.about)
        self.about["ema_warmup"] = found.get("ema_warmup", False)  # as the average was computed so far
        self.checkpoints.read_tensors(path, self.weights.state())
        self.weights.copy_masters()
        self.step, self.seen, self.saved = found["step"], found["samples"], path
        self.skipped, self.unreadable = found["nonfinite"], found["unreadable"]
        missing = repeat_backends(found.get("backends", {}), self.ranks.device.split(":")[0])
        changed = compare_cpu(found.get("cpu"), self.about["cpu"])
        return [f"resuming from {path} (step {self.step})", *missing, *changed]

    def train(self) -> None:
        """Train to the last step, or until a signal or an error; in each case write a checkpoint at the end."""
        c, ranks = self.config, self.ranks
        if ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.set_aside_after(self.step)
            with atomic_write(self.folder / CONFIG) as part:
                part.write_text(to_yaml(c), encoding="utf-8")
        log = Log(self.folder, self.step) if ranks.is_first else None
        order = {"seed": c.seed, "start": self.seen, "batch": c.batch, "rank": ranks.rank, "world": ranks.world}
        batches = stream_batches(self.source, **order, workers=c.workers or 0, unreadable=c.unreadable)
        with Stopper(ranks.is_first) as stopper:
            try:
                with self._progress_bar() as bar:
                    failure = self._run_steps(batches, log, bar, stopper)
            finally:
                if log:
                    log.close()
            if self.step and (self.saved is None or self.saved.name != step_name(self.step)):
                self._save_after(failure)
        failed = failure is not None and not isinstance(failure, Stopped)
        ends = ranks.gather((failed, stopper.requested))
        if failure:
            raise failure
        if any(failed for failed, _ in ends):
            raise TrainError(f"{self._how_far()}, as another rank failed: use --resume auto to continue")
        if self.step < c.steps:
            raise self._stopped(max(number or 0 for _, number in ends))

    def _run_steps(self, batches, log, bar, stopper):
        """Train until the last step or until a rank must stop; returns this rank's error, if any.

        With several ranks an error inside a step is raised immediately: the others are waiting for gradients.
        """
        c, meter, since, failure = self.config, Meter(self.ranks), time.perf_counter(), None
        while self.step < c.steps:
            batch, failure = _attempt(lambda: next(batches), failure)
            failure = self._unless_stopped(failure, stopper)
            if self.ranks.any(stopper.requested is not None or failure is not None):
                break
            with record() as ran:
                found, failure = _attempt(lambda batch=batch: self._step(batch))
            if failure := self._unless_stopped(failure, stopper):
                if self.ranks.world > 1 or self.weights.torn:
                    raise failure
                break
            meter.add(*found, batch)
            self.about["backends"] = self.about["backends"] or chosen_backends(ran)
            self.step, self.seen = self.step + 1, self.seen + c.batch
            bar.update()
            save = self.step % c.save_every == 0
            # report before a checkpoint too: then a resumed run logs the same lines as an uninterrupted one
            if self.step % c.log_every == 0 or save or self.step in (1, c.steps):
                self._report(meter, log, bar, time.perf_counter() - since)
                meter.clear()
                if save:
                    self._save_or_warn()
                since = time.perf_counter()
            if c.sample_every and self.step % c.sample_every == 0:
                seconds, failure = _attempt(self._write_preview)
                since += seconds or 0
        if len(meter):
            self._report(meter, log, bar, time.perf_counter() - since)
        return failure

    def _unless_stopped(self, failure, stopper):
        """The error, if any; after a signal, which may have ended a compiler or a reader of data, `Stopped`."""
        if failure is None or stopper.requested is None:
            return failure
        self._print(f"after the signal, step {self.step + 1} ended in an error: {in_brief(failure)}")
        return self._stopped(stopper.requested)

    def _stopped(self, number):
        return Stopped(f"{self._how_far()}; resume with --resume auto", number)

    def _how_far(self):
        return f"stopped after step {self.step} of {self.config.steps}"

    def _write_preview(self):
        """Write a grid of samples; returns the seconds it took."""
        begin = time.perf_counter()
        with self.weights.averaged():
            self.preview.write(unwrap(self.loss_step), self.folder / "samples" / f"{step_name(self.step)}.png")
        return time.perf_counter() - begin

    def _step(self, batch):
        """One optimizer step; returns mean loss and gradient norm, () each, on the device."""
        c, ranks = self.config, self.ranks
        share, device = c.batch // ranks.world, ranks.device
        drawn = draw_step(
            c.seed, self.step, c.batch, self.encoder.shape, self.objective.draw_times, c.label_drop, device
        )
        drawn = drawn.part(slice(ranks.rank * share, (ranks.rank + 1) * share))
        x, y = batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)
        x = self.encoder.encode(x, self.step)
        y = torch.where(drawn.dropped, self.source.num_classes, y)
        size, total = share // c.accumulate, torch.zeros((), device=device)
        for first in range(0, share, size):
            part = slice(first, first + size)
            with gradient_sync(self.loss_step, last=first + size == share):
                loss, shown = self._losses(x[part], y[part], drawn.part(part))
                (loss.mean() / c.accumulate).backward()
            total += shown.detach().mean() / c.accumulate
        return total, self._apply_gradients()

    def _losses(self, x, y, drawn):
        c, device = self.config, self.ranks.device.split(":")[0]
        with torch.autocast(device, torch.bfloat16, enabled=c.precision == "bf16"):
            return self.loss_step(x, y, drawn.times, drawn.noise)

    def _apply_gradients(self):
        """Clip and step, unless a gradient is not finite; returns the gradient norm. Never waits for the device."""
        c, norm = self.config, norm_of(self.weights.take_gradients())
        if c.parallel == "fsdp":  # each rank has a shard of every gradient
            squares = norm.square()
            self.ranks.sum(squares)
            norm = squares.sqrt()
        scale = None if c.clip is None else (norm / c.clip).clamp(min=1)
        lr = c.lr * min(1, (self.step + 1) / c.warmup) if c.warmup else c.lr
        decay = decay_at(self.step, c.ema, self.about["ema_warmup"])
        self.weights.update(lr, decay, skip=(~norm.isfinite()).float(), scale=scale)
        return norm

    def _report(self, meter, log, bar, seconds):
        c, first = self.config, self.step - len(meter)
        found = meter.read()
        for bad in found.pop("bad"):
            self.skipped += 1
            self._record_nonfinite(first + bad + 1, meter.samples(bad))
        self.unreadable += sum(self.ranks.gather(meter.unreadable))
        images = c.batch * len(meter) / seconds
        flops = images * self.objective.forwards * 2 * self.macs / self.ranks.world
        values = {**found, "samples": self.seen, "images_per_second": images, "mfu": flops / self.rate}
        values["peak_tflops"] = self.rate / 1e12
        values |= {"gib": memory_gib(self.ranks.device), "nonfinite": self.skipped, "unreadable": self.unreadable}
        if log:
            log.write(self.step, values)
            shown = {"loss": f"{found['loss'] or float('nan'):.4f}", "images/s": f"{images:.3g}"}
            shown |= {"MFU": f"{values['mfu']:.0%}", "GiB": f"{values['gib']:.3g}"}
            bar.set_postfix(shown)
            if bar.disable:  # no terminal: a line of the log
                text = ", ".join(f"{name} {value}" for name, value in shown.items())
                print(f"step {self.step:,} of {c.steps:,}: {text}", file=sys.stderr)

    def _record_nonfinite(self, step, samples):
        """Record the samples of a step whose gradient was not finite; raise unless such steps are to be skipped."""
        about = {"step": step, "samples": samples, "checkpoint": self.saved and str(self.saved)}
        if self.ranks.is_first:
            append_line(self.folder / "nonfinite.jsonl", about)
        if self.config.on_nonfinite == "stop":
            raise TrainError(
                f"the gradient of step {step} is not finite; its samples are in {self.folder / 'nonfinite.jsonl'}, "
                + (f"the last checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet")
            )

    def _save(self):
        about = {**self.about, "samples": self.seen, "config": asdict(self.config)}
        about |= {"nonfinite": self.skipped, "unreadable": self.unreadable}
        self.saved = self.checkpoints.save(self.step, self.weights.state(), about)

    def _save_or_warn(self):
        try:
            self._save()
        except TrainError as error:
            self._print(f"warning: {error}; training continues and will try again at the next checkpoint")

    def _save_after(self, failure):
        """Write the last checkpoint; if that fails, first print the error that ended the run."""
        try:
            self._save()
        except TrainError:
            if failure:
                self._print(f"error: {failure}")
            raise

    def _print(self, text):
        if self.ranks.is_first:
            import_optional("tqdm").tqdm.write(text, file=sys.stderr)

    def _progress_bar(self):
        options = {"initial": self.step, "total": self.config.steps, "unit": "step"}
        return import_optional("tqdm").tqdm(disable=None if self.ranks.is_first else True, **options)


def _attempt(work, failure=None):
    """Returns (result, None) or (None, error); does nothing if there is a failure already."""
    if failure:
        return None, failure
    try:
        return work(), None
    except Exception as error:
        return None, error
