"""constriction's range decoder in whole numbers of Python, written from the description of the algorithm alone.

It shows that a file can be read without the library, and that the library works with the very frequencies it is meant
to. State and range have 64 bits, words 32, frequencies 24.
"""

import numpy as np

WHOLE = 1 << 64


class ReferenceDecoder:
    def __init__(self, words):
        self.words = list(np.frombuffer(words, "<u4").tolist())
        self.lower, self.range = 0, WHOLE - 1
        self.point = self.next_word() << 32 | self.next_word()

    def next_word(self):
        return self.words.pop(0) if self.words else 0

    def take(self, frequencies):
        ends = np.cumsum(frequencies)
        step = self.range >> 24
        quantile = ((self.point - self.lower) % WHOLE) // step
        symbol = int(np.searchsorted(ends, quantile, side="right"))
        before = int(ends[symbol - 1]) if symbol else 0
        self.lower = (self.lower + step * before) % WHOLE
        self.range = step * int(frequencies[symbol])
        if self.range < 1 << 32:
            self.lower = (self.lower << 32) % WHOLE
            self.range <<= 32
            self.point = (self.point << 32 | self.next_word()) % WHOLE
        return symbol
