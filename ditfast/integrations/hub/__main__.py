"""Write the operations as a kernel repository for the Hugging Face Hub.

    python -m ditfast.integrations.hub OUT [--version 0]

OUT/build/torch-cuda is for GPUs, with the Triton kernels; OUT/build/torch-cpu runs the same names on PyTorch's own
operations. The extension is in neither. `kernels.get_local_kernel(OUT)` loads it; uploading is up to you.
"""

from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import ditfast
from ditfast import ops
from ditfast.command import Parser, words
from ditfast.integrations.hub import modules

HERE = Path(__file__).parent
LAYERS = "ditfast.integrations.hub.layers"
NAMES = tuple(name for name in ops.__all__ if name != "ALL")  # which the repository offers
VARIANTS: dict[str, dict[str, Any]] = {  # folder -> backend
    "torch-cuda": {"type": "cuda", "archs": ["8.0+PTX"]},  # Triton compiles for 8.0 and anything newer
    "torch-cpu": {"type": "cpu"},
}
INIT = '''"""The fused operations of a DiT, forward and backward. Written from ditfast {version}."""

from . import layers
from .ops import {names}

__version__ = "{version}"
__all__ = [{quoted}, "layers"]
'''
FORMER = '''"""The same, where former versions of `kernels` look for it."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_spec = spec_from_file_location("{id}", _path)
_module = sys.modules.get("{id}")
if _module is None:
    _module = sys.modules["{id}"] = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''
CARD = """---
library_name: kernels
license: mit
tags: [kernels, dit, diffusion]
---

# ditfast

The fused operations of a Diffusion Transformer (DiT), forward and backward, in Triton: {names}.
Contract, numerical budget and what was verified where: the documentation of ditfast {version}.

```python
from kernels import get_kernel

ditfast = get_kernel("<owner>/ditfast", version={major})
h = ditfast.layer_norm_modulate(x, shift, scale)  # x (B, N, D); shift, scale (B, D)
```

Layers for `kernelize`, all with backward and torch.compile: {layers}.
"""


def files() -> dict[str, str]:
    """The contents of a variant's files by path, without the files that contain its id."""
    found = {}
    for name, path in modules.needed_by("ditfast.ops", LAYERS).items():
        parts = ("layers",) if name == LAYERS else tuple(name.split(".")[1:])
        if name.startswith("ditfast.integrations") and name != LAYERS:
            continue  # the packages around the layers
        file = "/".join((*parts, "__init__.py") if path.name == "__init__.py" else (*parts[:-1], f"{parts[-1]}.py"))
        found[file] = modules.relative(path.read_text(encoding="utf-8"), file.count("/"))
    quoted = ", ".join(f'"{name}"' for name in NAMES)
    found["__init__.py"] = INIT.format(version=ditfast.__version__, names=", ".join(NAMES), quoted=quoted)
    return dict(sorted(found.items()))


def identifier(contents: dict[str, str], backend: str) -> str:
    """The name of the module and of its operations' namespace, unique to the contents."""
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return f"_ditfast_{backend}_{digest[:8]}"


def write(out: Path, major: int = 0) -> None:
    """Write the repository into a new or empty folder.

    Raises:
        ValueError: the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new or empty folder, got {out}")
    contents = files()
    for variant, backend in VARIANTS.items():
        kernel_id = identifier(contents, backend["type"])
        texts = {**contents, "ditfast/__init__.py": FORMER.format(id=kernel_id)}
        metadata = {
            "id": kernel_id,
            "name": "ditfast",
            "version": major,
            "license": "MIT",
            "python-depends": [],
            "backend": backend,
            "digest": {"algorithm": "sha256", "files": {name: _digest(text) for name, text in texts.items()}},
        }
        texts["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        for name, text in texts.items():
            _write(out / "build" / variant / name, text)
    layers = [
        line.split("(")[0].removeprefix("class ")
        for line in contents["layers.py"].splitlines()
        if line[:5] == "class"
    ]
    card = {
        "names": ", ".join(NAMES[:-1]),
        "layers": ", ".join(layers),
        "version": ditfast.__version__,
        "major": major,
    }
    _write(out / "README.md", CARD.format(**card))
    _write(out / "benchmarks" / "benchmark.py", (HERE / "benchmark.py").read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


@command()
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ditfast.integrations.hub", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    parser.add_argument("--version", type=int, default=0, help="major version of the kernel; 0 promises nothing")
    chosen = parser.parse_args(words(arguments))
    if chosen.version < 0:
        parser.error(f"argument --version: must be at least 0, got {chosen.version}")
    try:
        write(chosen.out, chosen.version)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{chosen.out}: {', '.join(VARIANTS)}, version {chosen.version}")


if __name__ == "__main__":
    main()
