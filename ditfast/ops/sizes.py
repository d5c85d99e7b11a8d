"""What a registered operation checks when called by its registered name, as compiled graphs do.

Kernels receive addresses and trust the sizes that come with them. The public functions check their arguments with
better messages and skip this.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

_MANY = 1024  # signatures to remember


class Rule(NamedTuple):
    """The rule for one argument."""

    position: int
    name: str
    sizes: tuple[tuple[int, str], ...]  # per dimension: a number times letters
    is_dense: bool
    dtype: str | None  # a dtype's name, or the argument to share it with


class Sizes:
    """The rules of one operation.

    Args:
        schema: of the operation.
        rules: argument -> its sizes, separated by commas. Each is a product of letters with at most one number in
            front, as in "B,N,3E"; a letter is bound where it first stands alone. "dense" (contiguous) and a dtype, or
            an argument to share it with, may follow: "B,N,E dense qkv".
    """

    def __init__(self, schema: str, rules: dict[str, str]):
        self.op, arguments = schema.split(" -> ")[0].rstrip(")").split("(")
        names = [argument.split()[-1] for argument in arguments.split(", ")]
        self.rules = [_parse(names.index(name), name, *rule.split()) for name, rule in rules.items()]
        self.dense = [rule.name for rule in self.rules if rule.is_dense]
        self.positions = {name: names.index(name) for name in rules}
        self._right: set[tuple] = set()  # signatures that passed

    def check(self, args: Sequence) -> None:
        """Raise a ValueError or TypeError if an argument breaks a rule."""
        signature = tuple(
            None if args[i] is None else (args[i].shape, args[i].dtype, args[i].is_contiguous())
            for i in self.positions.values()
        )
        if signature in self._right:
            return
        sizes: dict[str, int] = {}
        for rule in self.rules:
            t = args[rule.position]
            if t is not None and (t.dim() != 1 or t.numel()):  # an empty vector stands for something not saved
                self._check_one(rule, args, sizes)
        if len(self._right) >= _MANY:
            self._right.clear()
        self._right.add(signature)

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
        other = self.positions.get(rule.dtype)
        dtype = rule.dtype if other is None else str(args[other].dtype).removeprefix("torch.")
        if dtype is not None and str(t.dtype) != f"torch.{dtype}":
            raise TypeError(f"{what} be {dtype}, got {t.dtype}")


def _parse(position: int, name: str, dimensions: str, *words: str) -> Rule:
    sizes = []
    for size in dimensions.split(","):
        letters = size.lstrip("0123456789")
        sizes.append((int(size.removesuffix(letters) or 1), letters))
    dtype = next((word for word in words if word != "dense"), None)
    return Rule(position, name, tuple(sizes), "dense" in words, dtype)
