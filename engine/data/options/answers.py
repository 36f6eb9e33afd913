r"""Which option a text names: the one reader of the solutions of rows and of the answers of models.

The text is first cleaned (`engine.data.options.texts`): `**C**`, `\boxed{C}`, `"C"`, `Ｃ` and `C.` are all C. What is left must be,
as a whole, one of

    answer    = [words] [lead] choice [verdict]
    lead      = "answer:", "the correct answer is", "final answer:", "option", "I choose", "it is" ...
    words     = anything before "the answer is" or "answer:" that names no other option and denies nothing
    verdict   = "is correct", "is the right answer" ...
    choice    = letter                      C    c    (C)    [C]    C)    C.    C:
              | text                        an option's whole text, an article before it or not
              | letter mark text            C) text    C. text    C: text    C - text    C, text    C (text)    C text
              | text bracketed-letter       text (C)

Case and white space do not matter, but a letter with nothing except a blank after it is a capital. A letter alone is always the
letter, also where it is another option's text. Where letter and text stand together they must agree: a text that is another
option's, names one, or denies (`C) CT` where CT is B; `C) or D)`; `C: not seen`) names none. Other words than the option's are
taken after `C)`, `C.` and `C:` only. Everything else names none: `A or C`, `C?`, `not C`, a text that two options share, an empty
one, one of more than LONGEST characters beyond the longest option.
"""

import re

from engine.data.options.texts import clean, plain, unwrap

LONGEST = 400
_LEADS = 3  # "Answer: the answer is option C" has two
_NOUN = r"(?:answer|ans|option|choice|letter|response)\b"
_QUALITY = r"(?:final|correct|best|right|single|chosen|selected|most (?:likely|appropriate|probable)) "
_IS = r"(?:is|would be|must be|should be)\b"
_LEAD = re.compile(
    rf"(?:(?:so|thus|therefore|hence)\b,? )?(?:(?:(?:the|my) )?(?:{_QUALITY})*{_NOUN}[\"']?\.?(?: ?{_IS})?"
    rf" ?(?:[:=]|->|→|[-–—](?= ))? ?|(?:i (?:would )?(?:choose|select|pick|answer|go with)|it is|it's|it’s|this is|that is)\b:? )",
    re.IGNORECASE,
)
_LATE_LEAD = re.compile(
    rf"(?<=[ .,;:])(?:(?:the|my) )?(?:{_QUALITY})*(?:answer|option|choice)\b[\"']?(?: {_IS}:?|:) ?", re.IGNORECASE
)
_VERDICT = re.compile(
    r" is (?:(?:the )?(?:correct|right|best)(?: (?:answer|option|choice))?|the (?:answer|choice))$", re.IGNORECASE
)
_LETTER = re.compile(r"([A-Z])[)\]}.:]*", re.IGNORECASE | re.ASCII)
_BEFORE = re.compile(r"([(\[{]?)([A-Z])((?: ?[)\]}])*)( ?[.:,=|/、–—-]*)( ?)(.+)", re.IGNORECASE | re.ASCII)
_AFTER = re.compile(r"(.+?)[ ,]*[(\[]([A-Z])[)\]]", re.IGNORECASE | re.ASCII)
_ARTICLE = re.compile(r"(?:an?|the) ")
_LISTED = re.compile(r"(?<!\w)[(\[]?([A-Z])(?:[)\]]|[.:](?= |$)|(?!\w))", re.ASCII)
_DENIAL = re.compile(
    r"\b(?:not?|nor|or|never|neither|none|either|incorrect|wrong|false|unlikely|cannot|unsure|maybe|perhaps|possibly|excluded?|"
    r"except|instead|rather|ruled|\w+n['’]t)\b"
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)


def tagged(text: str) -> str | None:
    """What the last well-formed `<answer>...</answer>` holds, or None.

    Tags match in any case and may span lines; of nested or unclosed tags the innermost pair counts. Linear in the text.
    """
    content, start = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            content, start = text[start : tag.start()], None
    return content


def read_tagged(text: str, options: dict[str, str]) -> str | None:
    """The letter of the option that the last `<answer>` of a text names, or None."""
    content = tagged(text)
    return None if content is None else read_option(content, options)


def read_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option in `options`, {"A": "CT", ...}, that the whole `answer` names, or None: see above."""
    if len(answer) > LONGEST + max(map(len, options.values()), default=0):
        return None
    texts = {letter: plain(text) for letter, text in options.items()}
    text = clean(answer)
    for _ in range(_LEADS + 1):
        for form in (text, unwrap(_VERDICT.sub("", text))):
            if (letter := _choice(form, texts)) is not None:
                return letter
        lead = _LEAD.match(text) or _late_lead(text, texts)
        if lead is None:
            return None
        text = unwrap(text[lead.end() :])
    return None


def _late_lead(text: str, texts: dict[str, str]) -> re.Match | None:
    """The last "the answer is" behind words that say nothing of the options."""
    *_, last = [None, *_LATE_LEAD.finditer(text)]
    return last if last is not None and not _says_more(text[: last.start()], texts) else None


def _choice(text: str, texts: dict[str, str]) -> str | None:
    """The letter that a choice (see above) names."""
    if not text:
        return None
    if (match := _LETTER.fullmatch(text)) and (letter := _if_there(match[1], texts)):
        return letter
    if named := _same(text, texts):
        return named[0] if len(named) == 1 else None
    if match := _BEFORE.fullmatch(text):
        opened, letter, closed, mark, blank, words = match.groups()
        marked = bool(closed or mark.strip())
        if (marked or blank or mark) and not (opened and not closed) and (marked or letter.isupper()):
            strong = bool(closed) or mark.strip() in (".", ":") and bool(blank)
            return _agreed(_if_there(letter, texts), unwrap(words), texts, strong)
    if match := _AFTER.fullmatch(text):
        return _agreed(_if_there(match[2], texts), unwrap(match[1]), texts, other_words=False)
    return None


def _agreed(letter: str | None, words: str, texts: dict[str, str], other_words: bool) -> str | None:
    """The letter, if the words beside it are its option's or, where other words may stand there, no other option's."""
    if letter is None:
        return None
    if named := _same(words, texts):
        return letter if letter in named else None
    if match := _LETTER.fullmatch(words):
        return letter if match[1].upper() == letter else None
    return letter if other_words and not _says_more(words, texts, letter) else None


def _says_more(words: str, texts: dict[str, str], letter: str = "") -> bool:
    """Whether words name another option than that of the letter, or deny or doubt something."""
    folded = f" {words.casefold()} ".replace(texts[letter], " ") if letter else words.casefold()
    if _DENIAL.search(folded) or any(found != letter and found in texts for found in _letters_in(words)):
        return True
    return any(_has_words(folded, text) for other, text in texts.items() if other != letter)


def _letters_in(words: str) -> list[str]:
    """The capitals that stand alone in a text as options' letters do; A and I without a bracket or stop are words."""
    return [match[1] for match in _LISTED.finditer(words) if match[1] not in "AI" or len(match[0]) > 1]


def _same(text: str, texts: dict[str, str]) -> list[str]:
    """The letters of the options whose text this is, with an article before it only where none has it so."""
    folded = text.casefold()
    bare = _ARTICLE.sub("", folded, count=1) if _ARTICLE.match(folded) else folded
    exact = [letter for letter, option in texts.items() if option == folded]
    return exact or [letter for letter, option in texts.items() if option and _ARTICLE.sub("", option, count=1) == bare]


def _has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as words of their own."""
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _if_there(letter: str, texts: dict[str, str]) -> str | None:
    return letter.upper() if letter.upper() in texts else None
