"""Seeds of independent random streams, derived from one seed and the purpose of each stream."""

ORDER, SAMPLE, STEP, ENCODE = range(4)  # epoch order, per-sample augmentation, per-step draws, per-step latents


def derive_seed(*numbers: int) -> int:
    """Hash integers to [0, 2^64), such that nearby inputs give unrelated seeds.

    SplitMix64: its output function, applied to the sum of each number, the hash of the numbers before it, and the
    increment (Steele et al. 2014, "Fast splittable pseudorandom number generators"). PyTorch's CPU generator uses 32
    bits of a seed, so two samples share their noise with probability 2^-32.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state
