"""What an import loads, in a fresh interpreter."""

import subprocess
import sys


def loaded_by(statement: str) -> set[str]:
    """The top-level modules loaded in a fresh interpreter after ``statement``."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
