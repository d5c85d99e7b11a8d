"""What the classes have in common that stand in for classes of diffusers."""

import warnings

from torch import nn

from ditfast.integrations.diffusers.known import remember, why_changed
from ditfast.ops.backends.choice import names_in_force


class Patched:
    """Another forward for a class of diffusers, from which it is derived and whose name it has.

    Patching a module changes its class and nothing else: parameters, hooks, configuration and state dict stay.
    What the other forward does not cover is left to the first one, call by call.

    Attributes:
        theirs: the class of diffusers.
        ditfast_backend: backend of the operations, as in `ditfast.models.DiT`.
    """

    theirs: type[nn.Module]
    ditfast_backend: str | None = None

    def __init_subclass__(cls):
        if "theirs" in cls.__dict__:
            remember(cls.theirs)

    def why_not(self) -> str | None:
        """Why calls are left to diffusers' forward; None if they are not."""
        return why_changed(self.theirs) or self.why_not_parts()

    def why_not_parts(self) -> str | None:
        """The same, as far as the parts of this module are concerned."""
        raise NotImplementedError

    def left_parts(self) -> dict[str, str]:
        """Parts that are called as modules where this package has an operation for them: name -> why."""
        return {}

    def backends(self) -> tuple[str, ...]:
        return names_in_force(self.ditfast_backend)

    def __setstate__(self, state):
        """Copies and pickles are patched as well, unless they meet another diffusers."""
        super().__setstate__(state)
        reason = why_changed(self.theirs)
        if reason is not None:
            warnings.warn(f"ditfast: a patched {self.theirs.__name__} runs as diffusers': {reason}", stacklevel=2)
            self.__class__ = self.theirs
