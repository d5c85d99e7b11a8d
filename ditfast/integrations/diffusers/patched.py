"""The base of the classes that stand in for diffusers classes."""

import warnings
from typing import Any

from torch import nn

from ditfast.integrations.diffusers.known import remember, why_changed
from ditfast.ops.backends.choice import names_in_force


class Patched:
    """A subclass of a diffusers class, with its name and another forward.

    Patching changes a module's class and nothing else: parameters, hooks, configuration and state dict stay.
    Calls that the new forward does not cover go to diffusers' forward.

    Attributes:
        theirs: the diffusers class.
        ditfast_backend: backend of the operations, as in `ditfast.models.DiT`.
    """

    theirs: type[nn.Module]
    ditfast_backend: str | None = None

    def __init_subclass__(cls) -> None:
        if "theirs" in cls.__dict__:
            remember(cls.theirs)

    def why_not(self) -> str | None:
        """Why calls go to diffusers' forward; None if they do not."""
        return why_changed(self.theirs) or self.why_not_parts()

    def why_not_parts(self) -> str | None:
        """`why_not`, judged by the parts of this module."""
        raise NotImplementedError

    def left_parts(self) -> dict[str, str]:
        """Parts called as modules although this package has an operation for them: name -> why."""
        return {}

    def backends(self) -> tuple[str, ...]:
        return names_in_force(self.ditfast_backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep copies and pickles patched, unless diffusers' code has changed."""
        super().__setstate__(state)  # type: ignore[misc]  # nn.Module's, of the other base
        reason = why_changed(self.theirs)
        if reason is not None:
            warnings.warn(f"ditfast: a patched {self.theirs.__name__} runs as diffusers': {reason}", stacklevel=2)
            self.__class__ = self.theirs  # type: ignore[assignment]  # its base
