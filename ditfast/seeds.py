"""Seeds of independent random streams, from one seed and what each stream is for."""

ORDER, SAMPLE, STEP, ENCODE = range(4)  # an epoch's order, a sample's chance, a step's draws, a step's latents


def derive_seed(*numbers: int) -> int:
    """A hash of whole numbers in [0, 2^64): close ones have nothing in common.

    SplitMix64, its output function applied to the sum of each number, the hash of those before it, and its increment
    (Steele et al. 2014, "Fast splittable pseudorandom number generators"). PyTorch's generator on the CPU takes 32
    bits of a seed, so that two samples share their noise with a probability of 2^-32.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state
