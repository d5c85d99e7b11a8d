"""Memory of a pass: what is kept for backward, and the peak."""

import torch


def kept_bytes(run, parameters) -> int:
    """Bytes of the unique storages that ``run()`` saves for backward, without parameters and casts of parameters."""
    parameters = list(parameters)
    saved, sizes = [], {p.untyped_storage().data_ptr(): 0 for p in parameters}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in sizes:
            saved.append(t)  # alive until the end: an address must not be used twice
            sizes[storage.data_ptr()] = 0 if _is_cast(t, parameters) else storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(sizes.values())


def _is_cast(t, parameters):
    """Whether ``t`` holds the values of a parameter, maybe transposed, in another dtype."""
    t = t.detach()
    views = (v.detach() for p in parameters for v in ((p, p.t()) if p.dim() == 2 else (p,)) if v.shape == t.shape)
    return any(torch.equal(t, v.to(t.dtype)) for v in views)


def peak_bytes(run, device: str) -> int | None:
    """The most memory that ``run()`` allocates on the GPU beyond what is there before; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
