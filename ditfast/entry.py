"""How the process of a command begins and ends: imports, output streams, interrupts."""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ditfast.failure import explain
from ditfast.signals import exit_status
from ditfast.streams import lasting_streams

_undo = ExitStack()  # of `before_imports`


def before_imports() -> None:
    """Prepare the process of a command for its imports, until `command` begins.

    Ctrl-C ends it without a traceback. The garbage collector, which would go through all modules again and again and
    find nothing, waits: that is a fifth of the time.
    """
    gc.disable()
    _undo.callback(gc.enable)
    _undo.callback(gc.freeze)  # nor does it look at them later
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _undo.callback(signal.signal, signal.SIGINT, signal.default_int_handler)


@contextmanager
def command() -> Iterator[None]:
    """Context of a command's ``main``, as a decorator.

    Output streams never fail (`lasting_streams`). Ctrl-C that is not caught ends the process with one line and the
    status that shells give it; any other error, with a traceback of bounded length, one line and status 1.
    """
    _undo.close()
    with lasting_streams():
        try:
            yield
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            sys.exit(exit_status(error))
        except Exception as error:
            sys.exit(explain(error))
