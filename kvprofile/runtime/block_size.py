"""How many slots a block holds, and how many tokens none does: known without torch, for plans."""

RECENT = 32  # newest tokens that are never merged or packed, where no policy says otherwise
SMALLEST, LARGEST = 16, 128  # slots of a block


def block_size(tokens: int) -> int:
    """Slots of a block for a text of so many tokens: large ones are faster to read, and half a block per head is empty.

    A power of two, so that on average the empty room of a head is less than 1% of the tokens.
    """
    return 1 << (min(max(tokens // 64, SMALLEST), LARGEST).bit_length() - 1)
