"""Memory of a pass: bytes kept for backward, and the peak."""

import torch


def kept_bytes(run, parameters) -> int:
    """Bytes of the unique storages ``run()`` saves for backward, excluding parameters and their casts."""
    parameters = list(parameters)
    saved, sizes = [], {p.untyped_storage().data_ptr(): 0 for p in parameters}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in sizes:
            saved.append(t)  # kept alive, so no address is reused
            sizes[storage.data_ptr()] = 0 if _is_cast(t, parameters) else storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(sizes.values())


def _is_cast(t, parameters):
    """Whether ``t`` is a cast of a parameter, possibly transposed."""
    t = t.detach()
    views = (v.detach() for p in parameters for v in ((p, p.t()) if p.dim() == 2 else (p,)) if v.shape == t.shape)
    return any(torch.equal(t, v.to(t.dtype)) for v in views)


def peak_bytes(run, device: str) -> int | None:
    """Peak GPU memory of ``run()`` in bytes, relative to the start; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
