"""A model's weights as the optimizer sees them, and their average."""

from contextlib import contextmanager

import torch

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = ()


class Weights:
    """This rank's part of every parameter: masters in float32, AdamW's moments, the average; updated as lists.

    Args:
        model: its parameters are float32, or bf16 with masters kept here, whole or sharded by FSDP2.
        masters: float32 values by name to start from, where the parameters are bf16.
        lr, weight_decay: of AdamW, whose other settings are PyTorch's.

    Everything is done by one fused or foreach call for all parameters. Optimizer and average never see DTensors:
    dispatching those one by one costs more than the update.
    """

    def __init__(self, model, lr: float, weight_decay: float, masters: dict | None = None):
        self._model = model
        named = {_strip_wrapper_prefix(name): p for name, p in model.named_parameters()}
        fixed = {name: p.detach() for name, p in named.items() if not p.requires_grad}
        self.fixed = fixed if masters is None else {name: masters[name].to(p.device) for name, p in fixed.items()}
        self.params = {name: p for name, p in named.items() if p.requires_grad}
        self.torn = False  # whether an error has ended an update half-way
        self._copies = masters is not None
        local = {name: _local(p.detach()) for name, p in self.params.items()}
        self.masters = {name: masters[name].to(v.device) for name, v in local.items()} if self._copies else local
        self.average = {name: value.clone() for name, value in self.masters.items()}
        self.optimizer = torch.optim.AdamW(list(self.masters.values()), lr, weight_decay=weight_decay, fused=True)
        for value in self.masters.values():  # now, so that a checkpoint has where to go
            step = torch.zeros((), dtype=torch.float32, device=value.device)
            moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            self.optimizer.state[value] = {"step": step, **moments}

    def take_gradients(self) -> list[torch.Tensor]:
        """Hand the parameters' gradients to the masters, in float32, and take them from the parameters."""
        found = [_local(p.grad) for p in self.params.values()]
        masters = list(self.masters.values())
        if self._copies:
            gradients = [torch.empty_like(value) for value in masters]
            torch._foreach_copy_(gradients, found)
            found = gradients
        for p, value, gradient in zip(self.params.values(), masters, found, strict=True):
            p.grad, value.grad = None, gradient
        return found

    def update(self, lr: float, decay: float, skip: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """One step of AdamW and of the average.

        Args:
            skip: () on the device; at 1 AdamW leaves all as it is.
            scale: () on the device; AdamW divides the gradients by it as it reads them.
        """
        self.torn = True
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf, self.optimizer.grad_scale = skip, scale  # the fused kernel reads them
        self.optimizer.step()
        masters = list(self.masters.values())
        torch._foreach_lerp_(list(self.average.values()), masters, 1 - decay)
        if self._copies:
            torch._foreach_copy_([_local(p.detach()) for p in self.params.values()], masters)
        self.optimizer.zero_grad()
        self.torn = False

    @contextmanager
    def averaged(self):
        """The model with the average as its weights."""
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
        """All that a checkpoint has to keep, by name, as tensors that are read or written in place."""
        moments = {name: self.optimizer.state[value] for name, value in self.masters.items()}
        return {
            **{f"model.{name}": value for name, value in self.fixed.items()},
            **{f"model.{name}": self._as_dtensor(name, value) for name, value in self.masters.items()},
            **{f"ema.{name}": self._as_dtensor(name, value) for name, value in self.average.items()},
            **{f"{key}.{name}": self._as_dtensor(name, m[key]) for name, m in moments.items() for key in MOMENTS},
            **{f"step.{name}": m["step"] for name, m in moments.items()},
        }

    def copy_masters(self) -> None:
        """Give the parameters the masters' values: to be called after new ones were written into `state`."""
        if self._copies:
            torch._foreach_copy_([_local(p.detach()) for p in self.params.values()], list(self.masters.values()))

    def _as_dtensor(self, name, value):
        """This rank's part of a tensor, as a part."""
        p = self.params[name]
        if not isinstance(p, DTensor):
            return value
        shape = {"shape": p.shape, "stride": p.stride()}
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, **shape)


def norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of all together, () on the device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


MOMENTS = ("exp_avg", "exp_avg_sq")


def _strip_wrapper_prefix(name):
    """A parameter's name without what checkpointing puts around blocks."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(model):
    """FSDP2 keeps the root's gathered weights after a forward; they must not outlive the values they came from."""
    if hasattr(model, "reshard"):
        model.reshard()
