"""Arithmetic in GF(2^8) from first principles, written to be read: the root of every oracle.

An element is an int 0..255 whose bits are the coefficients of a polynomial over GF(2). Addition is
XOR. Multiplication is polynomial multiplication modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), the
polynomial of Linux RAID-6, Intel ISA-L and reedsolo (AES uses another one, 0x11b). 2 generates
all 255 non-zero elements. Fast engines use tables or instructions and are tested against this file.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import CodingError

POLYNOMIAL = 0x11D
GENERATOR = 2
ELEMENT_COUNT = 256


def times_generator(element: int) -> int:
    """Multiply by x: shift left, and subtract (XOR) the polynomial if degree 8 was reached."""
    shifted = element << 1
    return shifted ^ POLYNOMIAL if shifted & 0x100 else shifted


def multiply(left: int, right: int) -> int:
    """Product of two elements, by shift and add."""
    product = 0
    while right:
        if right & 1:
            product ^= left
        left = times_generator(left)
        right >>= 1
    return product


def power(base: int, exponent: int) -> int:
    """``base`` multiplied by itself ``exponent`` times; ``exponent`` is not negative."""
    result = 1
    for _ in range(exponent):
        result = multiply(result, base)
    return result


def inverse(element: int) -> int:
    """The element whose product with this one is 1.

    The non-zero elements form a group of order 255, so a^254 = a^-1.

    Raises:
        CodingError: The element is 0, which has no inverse.
    """
    if element == 0:
        raise CodingError("0 has no inverse in GF(2^8); the matrix it came from is singular")
    return power(element, ELEMENT_COUNT - 2)


def add(left: bytes, right: bytes) -> bytes:
    """Sum of two byte strings of one length: XOR, since the field has characteristic 2."""
    total = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return total.to_bytes(len(left), "little")


@cache
def multiples_of(coefficient: int) -> bytes:
    """256 bytes: entry x is ``coefficient * x``. Fits ``bytes.translate``."""
    return bytes(multiply(coefficient, element) for element in range(ELEMENT_COUNT))


@cache
def product_table() -> npt.NDArray[np.uint8]:
    """All products: read-only, shape (256, 256), entry [a, b] = a * b. 64 KiB, made once, in less than a millisecond.

    Shift and add as in ``multiply``, for all pairs at once: whoever decodes first in a process must not wait for it.
    """
    elements = np.arange(ELEMENT_COUNT, dtype=np.uint16)
    table = np.zeros((ELEMENT_COUNT, ELEMENT_COUNT), dtype=np.uint16)
    shifted = elements.copy()  # every element times 2^bit
    for bit in range(8):
        table[(elements >> bit) & 1 == 1] ^= shifted
        shifted <<= 1
        shifted[shifted >= ELEMENT_COUNT] ^= POLYNOMIAL
    products = table.astype(np.uint8)
    products.flags.writeable = False
    return products
