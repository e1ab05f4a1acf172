"""Which place does item i take in a shuffled order, without writing the order down?

A Feistel network over the smallest even number of bits that holds n, with cycle walking (apply it again while the
result lies outside 0..n-1): a bijection on 0..n-1 for every key, in constant time and memory. Python integers
and numpy's fixed-width ones give the same, so the order never changes with a library's random number generator.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

ROUNDS = 6
_MASK = 0xFFFFFFFF


def permutation_key(*parts: int | str) -> tuple[int, ...]:
    """Round keys, uint32 [ROUNDS], for a permutation named by `parts` (seed, epoch, ...)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4 * ROUNDS).digest()
    return struct.unpack(f"<{ROUNDS}I", digest)


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """The image of `index` (0 <= index < size) under the permutation of 0..size-1 that `key` names."""
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in key:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        index = left << half | right
        if index < size:
            return index


def permute_many(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """`permute` of each of `indices`, int64 [n] -> int64 [n]: from about 20 on faster than one by one."""
    assert indices.size == 0 or 0 <= indices.min() <= indices.max() < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    image = _feistel_many(indices.astype(np.uint64), half, key)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = again = _feistel_many(image[outside], half, key)
        outside = outside[again >= size]
    return image.astype(np.int64)


def _feistel_many(indices: np.ndarray, half: int, key: tuple[int, ...]) -> np.ndarray:
    mask = np.uint32((1 << half) - 1)
    left, right = (indices >> np.uint64(half)).astype(np.uint32), indices.astype(np.uint32) & mask
    for round_key in key:
        value = right * np.uint32(0x9E3779B1) + np.uint32(round_key)
        value ^= value >> np.uint32(16)
        value *= np.uint32(0x85EBCA6B)
        value ^= value >> np.uint32(13)
        value *= np.uint32(0xC2B2AE35)
        value ^= value >> np.uint32(16)
        left, right = right, left ^ (value & mask)
    return left.astype(np.uint64) << np.uint64(half) | right


def _mix(value: int, key: int) -> int:
    """A hash of 32 bits: the multiply-xorshift finaliser of MurmurHash3 over value and key."""
    value = (value * 0x9E3779B1 + key) & _MASK
    value ^= value >> 16
    value = value * 0x85EBCA6B & _MASK
    value ^= value >> 13
    value = value * 0xC2B2AE35 & _MASK
    return value ^ value >> 16
