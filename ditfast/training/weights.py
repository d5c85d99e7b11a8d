"""A model's weights as the optimizer sees them, and their moving average."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ditfast.ops import host
from ditfast.ops.backends import on_cpu

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch built without distributed
    DTensor = ()  # type: ignore[assignment,misc]  # isinstance(x, ()) is False


class Weights:
    """This rank's shard of the parameters' float32 masters, AdamW moments and moving average.

    Every update is one fused or foreach call for all parameters. Optimizer and average never see DTensors, since
    dispatching those one by one would cost more than the update.

    Args:
        model: with float32 parameters, or bf16 with masters kept here; whole or sharded by FSDP2.
        lr, weight_decay, betas: of AdamW; its other settings are PyTorch's defaults.
        masters: initial float32 values by name, if the parameters are bf16.

    Attributes:
        fixed: parameters that are not trained, by name.
        params, masters, average: trained parameters, their float32 masters and their average, by name.
        optimizer: AdamW over the masters.
        torn: whether an error has interrupted an update halfway.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float,
        weight_decay: float,
        masters: dict[str, torch.Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self._model = model
        named = {_strip_wrapper_prefix(name): p for name, p in model.named_parameters()}
        fixed = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        self.fixed = fixed if masters is None else {name: masters[name].to(p.device) for name, p in fixed.items()}
        self.params = {name: p for name, p in named.items() if p.requires_grad}
        self.torn = False
        self._copies = masters is not None
        local = {name: _local(p.detach()) for name, p in self.params.items()}
        self.masters = local if masters is None else {name: masters[name].to(v.device) for name, v in local.items()}
        self.average = {name: value.clone() for name, value in self.masters.items()}
        trained = list(self.masters.values())
        self.optimizer = torch.optim.AdamW(trained, lr, betas=betas, weight_decay=weight_decay, fused=True)
        for value in self.masters.values():  # now, so a checkpoint can be read into them
            step = torch.zeros((), dtype=torch.float32, device=value.device)
            moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            self.optimizer.state[value] = {"step": step, **moments}

    def take_gradients(self) -> list[torch.Tensor]:
        """Move the parameters' gradients to the masters, in float32, and return them as they were."""
        found = [_local(p.grad) for p in self.params.values()]
        gradients, masters = found, list(self.masters.values())
        if self._copies:
            gradients = [torch.empty_like(value) for value in masters]
            torch._foreach_copy_(gradients, found)
        for p, value, gradient in zip(self.params.values(), masters, gradients, strict=True):
            p.grad, value.grad = None, gradient
        return found

    def update(self, lr: float, decay: float, skip: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Update the masters by one AdamW step, then the average and the parameters.

        Args:
            lr: learning rate of this step.
            decay: of the average.
            skip: () float32 on the device; if 1, AdamW changes nothing.
            scale: () float32 on the device; AdamW divides the gradients by it.
        """
        self.torn = True
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # read by the fused kernel
        self.optimizer.found_inf, self.optimizer.grad_scale = skip, scale  # type: ignore[attr-defined]
        self.optimizer.step()
        masters = list(self.masters.values())
        torch._foreach_lerp_(list(self.average.values()), masters, 1 - decay)
        if self._copies:
            torch._foreach_copy_([_local(p.detach()) for p in self.params.values()], masters)
        self.optimizer.zero_grad()
        self.torn = False

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model has the average as its weights."""
        targets = [_local(p.detach()) for p in self.params.values()]
        kept = [value.clone() for value in targets]
        _reshard(self._model)
        torch._foreach_copy_(targets, list(self.average.values()))
        try:
            yield
        finally:
            _reshard(self._model)
            torch._foreach_copy_(targets, kept)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must save, by name; a checkpoint is read into these tensors in place."""
        moments = {name: self.optimizer.state[value] for name, value in self.masters.items()}
        return {
            **{f"model.{name}": value for name, value in self.fixed.items()},
            **{f"model.{name}": self._as_dtensor(name, value) for name, value in self.masters.items()},
            **{f"ema.{name}": self._as_dtensor(name, value) for name, value in self.average.items()},
            **{f"{key}.{name}": self._as_dtensor(name, m[key]) for name, m in moments.items() for key in MOMENTS},
            **{f"step.{name}": m["step"] for name, m in moments.items()},
        }

    def copy_masters(self) -> None:
        """Copy the masters to the parameters; call it after reading a checkpoint into `state`."""
        if self._copies:
            torch._foreach_copy_([_local(p.detach()) for p in self.params.values()], list(self.masters.values()))

    def _as_dtensor(self, name, value):
        """This rank's shard as a DTensor, if the parameter is one."""
        p = self.params[name]
        if not isinstance(p, DTensor):
            return value
        shape = {"shape": p.shape, "stride": p.stride()}
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, **shape)


def norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all gradients, () float32 on the device."""
    if on_cpu.takes_norm() and all(g.is_cpu and g.dtype == gradients[0].dtype for g in gradients):
        return host.norm(gradients)
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


MOMENTS = ("exp_avg", "exp_avg_sq")


def _strip_wrapper_prefix(name):
    """A parameter's name without the prefix that activation checkpointing adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(model):
    """Free the root's gathered weights, which FSDP2 keeps after a forward and which would be stale after a change."""
    if hasattr(model, "reshard"):
        model.reshard()
