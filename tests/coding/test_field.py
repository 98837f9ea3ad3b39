"""The axioms of a field, over all elements: what everything else rests on."""

import itertools

import pytest
import reedsolo
from holdfast.coding import CodingError
from holdfast.coding.field import (
    ELEMENT_COUNT,
    GENERATOR,
    add,
    inverse,
    multiples_of,
    multiply,
    power,
    product_table,
    times_generator,
)

ELEMENTS = range(ELEMENT_COUNT)


def test_multiplication_commutes_and_is_what_another_library_computes() -> None:
    for a, b in itertools.product(ELEMENTS, repeat=2):
        assert multiply(a, b) == multiply(b, a) == reedsolo.gf_mult_noLUT(a, b, prim=0x11D)


def test_multiplication_is_associative_and_distributes() -> None:
    some = (0, 1, 2, 3, 29, 128, 142, 255)
    for a, b, c in itertools.product(some, ELEMENTS, some):
        assert multiply(multiply(a, b), c) == multiply(a, multiply(b, c))
        assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)


def test_one_is_neutral_and_every_other_element_has_an_inverse() -> None:
    for a in ELEMENTS:
        assert multiply(a, 1) == a
    for a in ELEMENTS[1:]:
        assert multiply(a, inverse(a)) == 1


def test_zero_has_no_inverse() -> None:
    with pytest.raises(CodingError, match="0 has no inverse"):
        inverse(0)


def test_the_generator_reaches_every_other_element() -> None:
    assert {power(GENERATOR, exponent) for exponent in range(255)} == set(ELEMENTS[1:])
    assert power(GENERATOR, 255) == 1
    assert all(times_generator(a) == multiply(GENERATOR, a) for a in ELEMENTS)


def test_tables_hold_products_and_cannot_be_written() -> None:
    table = product_table()
    assert table.shape == (256, 256)
    assert not table.flags.writeable
    for a, b in itertools.product(ELEMENTS, repeat=2):
        assert table[a, b] == multiples_of(a)[b] == multiply(a, b)


def test_addition_of_byte_strings_is_xor() -> None:
    assert add(b"", b"") == b""
    assert add(b"\x00\xff\x0f", b"\x00\x01\xf0") == b"\x00\xfe\xff"
