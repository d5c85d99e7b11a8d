"""What a registered operation checks when called by its registered name, as compiled graphs do.

Kernels receive addresses and trust the sizes and dtypes that come with them. The public functions check their
arguments with better messages and skip this.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch

from ditfast.ops.backends.availability import KERNEL_DTYPES, why_not_backend
from ditfast.ops.checks import FLOATING
from ditfast.ops.fallback import wide
from ditfast.ops.op import PYTORCH

_MANY = 1024  # signatures to remember


class Rule(NamedTuple):
    """The rule for one argument."""

    position: int
    name: str
    sizes: tuple[tuple[int, str], ...]  # per dimension: a number times letters
    is_dense: bool
    may_be_unsaved: bool
    like: str | None  # the argument to share its dtype with
    is_wide: bool  # … but for statistics, which are float32 at least


class Sizes:
    """The rules of one operation, whose last argument is the backend.

    Args:
        schema: of the operation.
        rules: argument -> its sizes, separated by commas. Each is a product of letters with at most one number in
            front, as in "B,N,3E"; a letter is bound where it first stands alone. These words may follow: "dense"
            (contiguous); "unsaved", if an empty vector may stand for the tensor; an argument whose dtype it has, or
            "wide:" and an argument whose statistics it holds. An example: "B,N dense wide:x".
    """

    def __init__(self, schema: str, rules: dict[str, str]):
        self.op, arguments = schema.split(" -> ")[0].rstrip(")").split("(")
        names = [argument.split()[-1] for argument in arguments.split(", ")]
        self.rules = [_parse(names.index(name), name, *rule.split()) for name, rule in rules.items()]
        self.dense = [rule.name for rule in self.rules if rule.is_dense]
        self.positions = {name: names.index(name) for name in rules}
        self.dtypes = {name: i for i, name in enumerate(names) if arguments.split(", ")[i].startswith("ScalarType")}
        self._right: set[tuple] = set()  # signatures that passed

    def checked(self, function: Callable) -> Callable:
        """``function`` that raises a ValueError, TypeError or RuntimeError if an argument breaks a rule."""

        def call(*args):
            self._check(args)
            return function(*args)

        return call

    def checked_fake(self, fake: Callable) -> Callable:
        """``fake`` that refuses a meta tensor among real ones: PyTorch would return its uninitialized memory."""

        def call(*args):
            self._check_device(args)
            return fake(*args)

        return call

    def _check(self, args):
        tensors = [args[i] for i in self.positions.values()]
        described = (None if t is None else (t.shape, t.dtype, t.is_contiguous(), t.device) for t in tensors)
        signature = args[-1], *(args[i] for i in self.dtypes.values()), *described
        if signature in self._right:
            return
        self._check_backend(args)
        sizes: dict[str, int] = {}
        for rule in self.rules:
            t = args[rule.position]
            if t is not None and not (rule.may_be_unsaved and t.shape == (0,)):
                self._check_one(rule, args, sizes)
        if len(self._right) >= _MANY:
            self._right.clear()
        self._right.add(signature)

    def _check_device(self, args):
        """Require all tensors on the first one's device; return it."""
        given = self._given(args)
        device = next(iter(given.values())).device
        for name, t in given.items():
            if t.device != device:
                where = f"the first argument's device, {device}"
                raise ValueError(f"{self.op}: {name} must be on {where}, got {t.device}")
        return device

    def _given(self, args):
        """The tensors among the arguments, by name."""
        return {name: args[i] for name, i in self.positions.items() if args[i] is not None}

    def _check_backend(self, args):
        backend, device = args[-1], self._check_device(args)
        reason = why_not_backend(backend, device.type)
        if reason is not None:
            raise RuntimeError(f"{self.op}: backend {backend!r} cannot run: {reason}")
        supported = FLOATING if backend in PYTORCH else KERNEL_DTYPES
        dtypes = {name: t.dtype for name, t in self._given(args).items()}
        dtypes |= {name: args[i] for name, i in self.dtypes.items()}
        for name, dtype in dtypes.items():
            if dtype not in supported:
                words = ", ".join(map(_name, supported))
                raise TypeError(f"{self.op}: {name} must be one of {words} on backend {backend!r}, got {dtype}")

    def _check_one(self, rule, args, sizes):
        t, what = args[rule.position], f"{self.op}: {rule.name} must"
        if t.dim() == len(rule.sizes):
            for (factor, letters), size in zip(rule.sizes, t.shape, strict=True):
                if factor == 1 and len(letters) == 1:
                    sizes.setdefault(letters, size)
        spelled = ", ".join("*".join([str(factor)] * (factor != 1) + list(letters)) for factor, letters in rule.sizes)
        if t.dim() != len(rule.sizes):
            raise ValueError(f"{what} have shape ({spelled}), got {tuple(t.shape)}")
        expected = tuple(factor * prod(sizes[letter] for letter in letters) for factor, letters in rule.sizes)
        if t.shape != expected:
            raise ValueError(f"{what} have shape ({spelled}) = {expected}, got {tuple(t.shape)}")
        if rule.is_dense and not t.is_contiguous():
            raise ValueError(f"{what} be contiguous, got strides {t.stride()}")
        if rule.like is not None:
            dtype = args[self.positions[rule.like]].dtype
            dtype = wide(dtype) if rule.is_wide else dtype
            if t.dtype != dtype:
                raise TypeError(f"{what} be {_name(dtype)}, got {t.dtype}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parse(position: int, name: str, dimensions: str, *words: str) -> Rule:
    sizes = []
    for size in dimensions.split(","):
        letters = size.lstrip("0123456789")
        sizes.append((int(size.removesuffix(letters) or 1), letters))
    like = next((word for word in words if word not in ("dense", "unsaved")), None)
    is_wide = like is not None and like.startswith("wide:")
    like = like.removeprefix("wide:") if like is not None else None
    return Rule(position, name, tuple(sizes), "dense" in words, "unsaved" in words, like, is_wide)
