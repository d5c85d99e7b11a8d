"""Which backend a call runs on: what was asked for, decided when an operation is called or traced.

A name is taken, in this order, from the call's ``backend=``, the model's, the innermost ``use_backend``, the
environment variable ``DITFAST_BACKEND``; otherwise the choice is automatic. A name that an operation does not
have is an error in its own ``backend=`` and is passed over elsewhere (``use_backend("triton")`` means "wherever
there is a Triton kernel"). A name that the operation has but that cannot run here always raises.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager

from ditfast.ops.backends.availability import BACKENDS, why_not
from ditfast.ops.backends.per_thread import PerThread, in_force, setting
from ditfast.ops.op import PYTORCH, Op

NAMES = ("auto", *BACKENDS)
_AUTO_DEVICES = ("cuda",)  # devices on which the automatic choice considers kernels


def _checked(name, where):
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_environment = os.environ.get("DITFAST_BACKEND", "auto")  # checked where it is used: importing raises nothing
_contexts = PerThread("contexts", ())
_repeated: dict[str, str] = {}  # operation -> what the automatic choice takes, as an earlier run did


@contextmanager
def use_backend(name: str):
    """Run the operations that have the backend ``name`` on it, inside the ``with`` block.

    Holds in the thread that enters it, and for the backward passes which that thread calls. Nests: each operation
    takes the innermost name that it has. ``"auto"`` undoes the outer names.

    Raises:
        ValueError: ``name`` is no backend of any operation.
    """
    with setting(_contexts, (_checked(name, "backend"), *in_force(_contexts))):
        yield


def names_in_force(model_backend: str | None = None) -> tuple[str, ...]:
    """The model's name, those of ``use_backend``, the environment's: the first that an operation has wins."""
    model = () if model_backend is None else (_checked(model_backend, "backend"),)
    return (*model, *in_force(_contexts), _checked(_environment, "DITFAST_BACKEND"))


def repeat_choices(chosen: dict[str, str]) -> None:
    """From now on the automatic choice takes these backends, by operation, wherever they are right."""
    _repeated.clear()
    _repeated.update(chosen)


def is_automatic(names: tuple[str, ...]) -> bool:
    """Whether these `names_in_force` leave all to the automatic choice."""
    return names[:1] == ("auto",)


def repeated_backends(operations) -> set[str]:
    """What an earlier run, which is repeated, took for these operations, given by name; empty if none is."""
    return {_repeated[name] for name in operations if name in _repeated}


def repeated_choice(op: Op) -> str | None:
    """The kernel that the automatic choice tries first, if an earlier run took one."""
    name = _repeated.get(op.name)
    return None if name in PYTORCH else name


def choose(op: Op, requested, device_type: str, unsupported: str | Callable | None = None, takes_host=None) -> str:
    """The backend of one call: a name, or "auto" where only the running operation can tell.

    Args:
        requested: the call's ``backend=``: None, a name (strict), or a tuple of names in order of preference.
        unsupported: why these arguments rule out the operation's kernels (None: they do not); a function of the
            backend's name, if kernels differ.
        takes_host: a function that says whether the automatic choice takes the C++ kernels on the CPU, given one that
            says whether they can run; None for no.

    Raises:
        ValueError: the call names a backend that the operation does not have.
        RuntimeError: the backend asked for by name cannot run here, or not on these arguments.
    """
    for name in _names(op, requested):
        if name == "auto":
            break
        if name in op.backends:
            reason = why_not(op, name, device_type)
            if reason is None and name not in PYTORCH:
                reason = _of_backend(unsupported, name)
            if reason is not None:
                raise RuntimeError(f"{op.name}: backend {name!r} cannot run: {reason}")
            return name
    name = _repeated.get(op.name)
    if name in PYTORCH:
        return name
    is_auto = device_type in _AUTO_DEVICES
    considered = op.kernels if is_auto else () if name is None else (name,)
    for name in considered:
        if _is_able(op, name, device_type, unsupported):
            return "auto" if is_auto else name
    if (
        device_type == "cpu"
        and takes_host is not None
        and takes_host(lambda: _is_able(op, "host", "cpu", unsupported))
    ):
        return "host"
    return op.fallback


def _is_able(op, name, device_type, unsupported):
    return _of_backend(unsupported, name) is None and why_not(op, name, device_type) is None


def _of_backend(unsupported, name):
    return unsupported(name) if callable(unsupported) else unsupported


def _names(op, requested):
    if not isinstance(requested, str):
        if requested is not None and not isinstance(requested, tuple):
            raise TypeError(f"backend of {op.name} must be a name or a tuple of names, got {requested!r}")
        return names_in_force() if requested is None else requested
    if requested != "auto" and requested not in op.backends:
        raise ValueError(f"backend of {op.name} must be one of auto, {', '.join(op.backends)}, got {requested!r}")
    return (requested,)
