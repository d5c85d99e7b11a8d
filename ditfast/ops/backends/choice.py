"""Which backend a call runs on, decided when an operation is called or traced.

A name comes from, in this order, the call's ``backend=``, the model's, the innermost ``use_backend``, the
environment variable ``DITFAST_BACKEND``; otherwise the choice is automatic. A backend that an operation lacks is an
error in the call's own ``backend=`` and ignored elsewhere: ``use_backend("triton")`` means "wherever there is a
Triton kernel". One that it has but that cannot run here always raises.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ditfast.ops.backends.availability import BACKENDS, why_not
from ditfast.ops.backends.per_thread import PerThread, in_force, setting
from ditfast.ops.op import PYTORCH, Backend, Op

NAMES = ("auto", *BACKENDS)
_AUTO_DEVICES = ("cuda",)  # devices on which the automatic choice considers kernels


def _checked(name, where):
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_environment = os.environ.get("DITFAST_BACKEND", "auto")  # checked on use, so that importing never raises
_contexts = PerThread("contexts", ())
_repeated: dict[str, str] = {}  # operation -> the automatic choice of an earlier run, to be repeated


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operations on the backend ``name``, where they have it, inside the ``with`` block.

    Applies to the thread that enters it and to the backward passes it calls. Blocks nest: each operation takes the
    innermost name that it has. ``"auto"`` cancels the outer names.

    Raises:
        ValueError: no operation has a backend ``name``.
    """
    with setting(_contexts, (_checked(name, "backend"), *in_force(_contexts))):
        yield


def names_in_force(model_backend: str | None = None) -> tuple[str, ...]:
    """The names from the model, ``use_backend`` and the environment: the first that an operation has wins."""
    model = () if model_backend is None else (_checked(model_backend, "backend"),)
    return (*model, *in_force(_contexts), _checked(_environment, "DITFAST_BACKEND"))


def repeat_choices(chosen: dict[str, str]) -> None:
    """Make the automatic choice take these backends, {operation: backend}, wherever they are correct."""
    _repeated.clear()
    _repeated.update(chosen)


def is_automatic(names: tuple[str, ...]) -> bool:
    """Whether these `names_in_force` leave everything to the automatic choice."""
    return names[:1] == ("auto",)


def repeated_backends(operations: Iterable[str]) -> set[str]:
    """The backends that an earlier run, now repeated, took for these operations; empty if none is repeated."""
    return {_repeated[name] for name in operations if name in _repeated}


def repeated_choice(op: Op) -> str | None:
    """The kernel that an earlier run took and the automatic choice tries first, if any."""
    name = _repeated.get(op.name)
    return None if name in PYTORCH else name


def choose(
    op: Op,
    requested: Backend,
    device_type: str,
    unsupported: str | Callable | None = None,
    takes_host: Callable[[Callable[[], bool]], bool] | None = None,
) -> str:
    """Choose the backend of one call: a name, or "auto" if only the running operation can tell.

    Args:
        requested: the call's ``backend=``: None, a name (strict), or a tuple of names in order of preference.
        unsupported: why the operation's kernels do not support these arguments (None: they do), or a function from
            a backend's name to that reason, if kernels differ.
        takes_host: whether the automatic choice takes the C++ kernels on the CPU, as a function of a function that
            says whether they can run; None for never.

    Raises:
        ValueError: the call names a backend that the operation lacks.
        RuntimeError: a backend chosen by name cannot run here or does not support these arguments.
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
