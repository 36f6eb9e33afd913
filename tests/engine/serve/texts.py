"""Texts to try a tokenizer with."""

import random
import unicodedata

SPECIAL = "<|im_start|> <|im_end|> <|image_pad|> <|vision_start|> <|im_start |> <| <tool_call> </tool_call>".split()
WORDS = "What imaging technique is used? A)CT, B)MRI the image is an X-Ray of a lesion. don't I'LL it'ſ 3.5mm 1024 é ñ".split()
SPACES = [*" \n\t\u00a0\u3000\u2028\u0085\u180e\u200b", "  ", "\r\n", "\n\n \n", " \n ", "   x"]
MARKS = "\u0301\u0327\u0323\u3099\u0f71\u1161\u11a8\u094d\u200d\ufe0f\u05b0"
ODD = "👩‍⚕️ ﬁ ǅ \u1100\u1161\u11a8 각 \u212b 한국어 日本語 Ω ² ½ ٣ \ufb2a \U0002f81a ß İ \x00 \x7f".split(" ")
SCRIPTS = [
    *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x7F0, 0x900), (0x900, 0xE00), (0x1100, 0x1200)),
    *((0x1A00, 0x1E00), (0x2000, 0x2C00), (0x3000, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0x10000), (0x10000, 0x20000)),
    *((0x10D00, 0x11960), (0x1E000, 0x1E600), (0x20000, 0x32400), (0xE0000, 0xE0200)),
]


def text(rng: random.Random) -> str:
    """Words, spaces, marks and characters of many scripts, among them what looks like special tokens."""
    pieces = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.6:
            pieces.append(rng.choice(rng.choice((WORDS, WORDS, SPACES, MARKS, ODD, SPECIAL))))
        elif kind < 0.8:
            low, high = rng.choice(SCRIPTS)
            pieces += [chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 4))]
        elif kind < 0.9:
            pieces.append(unicodedata.normalize("NFD", rng.choice(("résumé", "Ångström", "한글", "ǖ", "ộ"))))
        else:
            pieces.append(rng.choice(WORDS)[: rng.randint(1, 5)].upper())
    return "".join(pieces)
