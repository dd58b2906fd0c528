"""Philox4x32-10, the counter-based random generator of Salmon et al. (2011), on NumPy arrays and on torch tensors.

This module imports neither, so that the loader can use it without torch.
"""

ROUNDS = 10
MASK_32 = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of the first and the third word of the counter
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # added to the two words of the key after each round


def philox(key, counter):
    """Four random words for a key of two words and a counter of four words.

    A word is an unsigned 32-bit number held in 64 bits: a torch.int64 tensor, or an array of np.uint64 or np.int64. The key may
    also hold Python integers. All words of a call must broadcast together. Returns a tuple of four tensors or arrays of words.
    """
    key_0, key_1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # Torch has no unsigned 64-bit products. The signed product wraps; shift and mask still give its two unsigned halves.
        product_0, product_2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_2 >> 32) & MASK_32) ^ c1 ^ key_0,
            product_2 & MASK_32,
            ((product_0 >> 32) & MASK_32) ^ c3 ^ key_1,
            product_0 & MASK_32,
        )
        key_0 = (key_0 + KEY_STEPS[0]) & MASK_32
        key_1 = (key_1 + KEY_STEPS[1]) & MASK_32
    return c0, c1, c2, c3
