"""What counts as an answer: to a question with choices one of them, said once and without doubt; labelled lines."""

import json
import re

# What may stand around words and means nothing: markdown, quotes, LaTeX.
_DECORATION = re.compile(r"[*_`\"“”„«»#$]+|\\(?:boxed|text\w*|math\w+)\b|\\[()\[\]]")
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.S)

# What announces a choice.
_LABEL = (
    r"(?:(?:so|thus|therefore|hence),? )?(?:(?:(?:the|my|final|correct|overall|short) )*(?:answer|verdict|decision|judge?ment|"
    r"choice|conclusion|winner|grade|rating)|(?:the )?(?:better|best|preferred|winning) (?:passage|one|choice|option))"
    r"(?: is:? | ?[:=]\s| ?[:=]|\n| ?(?:[-=]>|→) ?| [-–—] )(?:an? (?!\d))?|(?:it(?:'s| is)|this is) a (?!\d)"
)
_NOUN = r"(?:(?:passage|option|document|candidate|number)[ :\n]*)?"  # before 1 or 2

# A sentence after the choice may repeat it in these words, and in no others.
_ECHO = re.compile(
    r"(?:it|this|that|the|passage|text|answers?|is|does|do|did|indeed|so|and|to|question|query|correct(?:ly)?|accurate(?:ly)?|"
    r"relevant|directly|fully|clearly|completely|true|right|address(?:es|ed)?|answered| )+"
)
_NOT = re.compile(r"\b(?:not|(?:is|does|do|did)n't|incorrect(?:ly)?|inaccurate|irrelevant|wrong|false)\b ?")
_TIED = re.compile(r"(?:they are |both are |both passages are )?equally (?:good|relevant|helpful)|neither (?:passage )?is better")
_DOUBT = re.compile(
    r"\?|\b(?:maybe|perhaps|probably|possibly|likely|might|may|could|would|should|unsure|uncertain|unclear|depends?|hard to|"
    r"if|or|either|unless|but|however|although|though|wait|except|partly|partially|example|format|opposite)\b"
)


def parse_verdict(text: str, choices: tuple[str, ...], cut_off: bool = False) -> str | None:
    """The choice that `text` is, or that stands at its start or behind a label such as "Answer:"; None where that is
    not plain: two choices, a doubt, words of another meaning. A reply that was `cut_off` may have had a "but" ahead:
    it must be the choice itself."""
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    if text.startswith('["'):
        return None
    if text.startswith("{") and not re.match(r"\{\w+\}\W*\Z", text):
        try:
            fields = json.loads(text, object_pairs_hook=list)  # pairs, to see a name that stands there twice
        except (ValueError, RecursionError):
            return None
        others = [name for name, _ in fields if name != "verdict"]
        said = [value for name, value in fields if name == "verdict"]
        if (
            len(said) != 1
            or not isinstance(said[0], str)
            or re.search("verdict|answer|choice|final|winner", " ".join(others), re.I)
        ):
            return None
        text, cut_off = said[0], True
    if cut_off:
        word = text.strip().strip("\"'*`.").lower()
        return word if word in choices else None
    lines = (" ".join(line.split()) for line in _DECORATION.sub("", text.lower().replace("’", "'")).split("\n"))
    text = "\n".join(filter(None, lines))
    noun = _NOUN if {choice for choice in choices if choice.isdigit()} == {"1", "2"} else ""
    one = "|".join(f"{noun if choice.isdigit() else ''}[\\[({{<']*(?:{re.escape(choice)})" for choice in choices)
    found = re.match(rf"(?:{_LABEL})?({one})(?!\w)[\])}}>']*(?:\.|!+)?(\Z|(?<=[.!])\s|[,;:]\s| [-–—] |\n|[–—])", text)
    before = ""
    if not found and not any(map(str.isdigit, choices)):  # a reason first, and then, announced, the choice
        found = re.search(rf"(?:\n|(?<=[.!]) )(?:{_LABEL})({one})(?!\w)[\])}}>']*(?:\.|!+)?(\Z)", text)
        before = text[: found.start()] if found else ""
    if not found:
        return None
    verdict = next(choice for choice in choices if found[1].endswith(choice))
    if _DOUBT.search(before) or any(re.search(rf"\b{re.escape(choice)}\b", before) for choice in choices):
        return None
    if verdict == "yes" and re.search(r"\bnot\b|n't", before):
        return None
    after = " ".join(text[found.end() :].rstrip(".!").split())
    return verdict if not found[2] or _repeats(verdict, after) else None


def _repeats(verdict: str, sentence: str) -> bool:
    """Whether the words behind a verdict say the same again, as in "No, it is not"."""
    if verdict == "tie":
        return bool(_TIED.fullmatch(sentence))
    words, negations = _NOT.subn("", sentence)
    return negations == {"yes": 0, "no": 1}.get(verdict) and bool(_ECHO.fullmatch(words) or (negations and not words))


# What may stand before a label: list markers, numbers, the marks of headings and quotations.
_MARKER = r"(?:[*+|]\s+|[-•◦▪–—>#]\s*|\(?\d{1,3}[.):]\s*|\[\d{1,3}\]\s*)*"
_QUOTES = tuple(zip("\"'`*“„„«‘", "\"'`*”“”»’", strict=True))  # and marks of bold, around all that is said
_NOTHING = re.compile(r"\W*(?:n/?a|none)?\W*", re.I)


def labelled_lines(text: str, labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """(label, what it says) of each line `label: ...`, also of a JSON object {label: text, or a list of texts}. Lines
    without a label, or with two, are left out: what they mean would be a guess."""
    text = text.strip()
    if len(fenced := _FENCE.findall(text)) == 1:
        text = fenced[0].strip()
    lines = text.split("\n")
    if text.startswith("{"):
        try:
            fields = json.loads(text, object_pairs_hook=list)  # pairs, to see a name that stands there twice
        except (ValueError, RecursionError):
            return []
        values = ((name, each) for name, value in fields for each in (value if isinstance(value, list) else [value]))
        lines = [f"{name}: {' '.join(each.split())}" for name, each in values if isinstance(each, str)]
    label = rf"({'|'.join(map(re.escape, labels))})(?: ?#?\d{{1,2}})?"
    opened = r"(?P<mark>\*\*|__|[*_`])?"
    closed = r"(?(mark)(?:\*\*|__|[*_`])?)\s*[:：](?(mark)(?:[*_]{1,2}(?=\s))?)"
    line = re.compile(rf"\s*{_MARKER}{opened}{label}{closed}\s*(?P<said>.*)", re.I)
    again = re.compile(rf"(?<!\w){label}[*_`]{{0,2}}\s*[:：]", re.I)
    found = []
    for match in filter(None, map(line.fullmatch, lines)):
        said, mark = match["said"].strip(), match["mark"] or ""
        if mark and said.endswith(mark) and said.count(mark) == 1:  # **label: text**
            said = said.removesuffix(mark)
        for first, last in _QUOTES:
            inner = said.strip(f"{first}{last}")
            if said[:1] == first and said[-1:] == last and not {first, last} & set(inner):
                said = inner.strip()
        if not again.search(said) and not _NOTHING.fullmatch(said):
            found.append((match[2].lower(), said))
    return found
