"""The samplers of flows and the options that each takes: those of `ditfast.flow.Sampler`."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from ditfast.flow import ode, paths, schedulers, sde

FIXED = {"euler": "euler", "heun": "heun2"}  # ditfast.flow's names
ODE, SDE = "ode", "sde"
FLOW_SAMPLERS = (*FIXED, ODE, SDE, *schedulers.NAMES)
MEAN_SAMPLERS = ("one-step", "average")
_SHIFT, _TOLERANCES = ("time_shift",), ("atol", "rtol")
_SDE = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
# sampler -> its options; those of ODE depend on its method
_TAKES = {SDE: ("sampling_method", *_SDE), **dict.fromkeys((*FIXED, *schedulers.NAMES), _SHIFT)}
OPTIONS = (*_SHIFT, "sampling_method", *_TOLERANCES, *_SDE)
NONE = "none"  # for a last_step of None


def add_options(add: Callable[..., Any]) -> None:
    """``add`` is a parser's ``add_argument``. Options that are not given are None."""
    number = {"type": float, "metavar": "X"}
    shift = "flows with a fixed number of steps: above 1 puts more steps near noise (1)"
    add("--time-shift", type=float, metavar="S", help=shift)
    methods = f"{ODE}: {', '.join(ode.METHODS)} (dopri5); {SDE}: {', '.join(sde.METHODS)} (Euler)"
    add("--sampling-method", metavar="NAME", help=methods)
    add("--atol", **number, help=f"{ODE} with an adaptive method: absolute tolerance (1e-6)")
    add("--rtol", **number, help=f"{ODE} with an adaptive method: relative tolerance (1e-3)")
    add("--diffusion-form", choices=paths.DIFFUSION_FORMS, help=f"{SDE}: form of the diffusion (sigma)")
    add("--diffusion-norm", **number, help=f"{SDE}: factor of the diffusion (1)")
    last = [kind or NONE for kind in sde.LAST_STEPS]
    add("--last-step", choices=last, help=f"{SDE}: the final step, without noise (Mean)")
    add("--last-step-size", **number, help=f"{SDE}: time interval of the final step (1 / steps)")


def given_options(o: Namespace) -> dict[str, Any]:
    """Those of these options that were given."""
    return {name: getattr(o, name) for name in OPTIONS if getattr(o, name) is not None}


def is_adaptive(sampler: str, options: Mapping[str, Any]) -> bool:
    """Whether a sampler chooses its own steps. Its steps then depend on the whole batch."""
    return sampler == ODE and options.get("sampling_method", "dopri5") in ode.ADAPTIVE


def why_not_taken(sampler: str, options: Mapping[str, Any]) -> str | None:
    """Why a sampler does not take one of these options; None if it takes all."""
    taken = _TAKES.get(sampler, ())
    if sampler == ODE:
        taken = ("sampling_method", *(_TOLERANCES if is_adaptive(sampler, options) else _SHIFT))
    for name in options:
        if name not in taken:
            method = options.get("sampling_method")
            how = f" with sampling_method {method}" if method and name != "sampling_method" else ""
            return f"{name} does not apply to {sampler}{how}"
    return None
