"""Scores of an answer against references, each in 0 to 1, as LongBench (arXiv 2308.14508) publishes them.

F1 and its normalisation are SQuAD's (arXiv 1606.05250).
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(prediction: str, answer: str) -> float:
    """1 if the answer stands in the prediction, in whatever case: SynthWiki's rule (arXiv 2310.01427)."""
    return float(answer.lower() in prediction.lower())


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, after normalising."""
    words, wanted = normalized(prediction).split(), normalized(answer).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """F of the longest common subsequence of words, by the package `rouge`, which LongBench uses."""
    return _rouge(prediction, answer, "rouge-l")


def rouge_mean(prediction: str, answer: str) -> float:
    """Geometric mean of the F of ROUGE-1, ROUGE-2 and ROUGE-L, ZeroSCROLLS' score of summaries (arXiv 2305.14196)."""
    return float((math.prod(_rouge(prediction, answer, f"rouge-{kind}") for kind in "12l")) ** (1 / 3))


def edit_similarity(prediction: str, answer: str) -> float:
    """Similarity of the first line of code, which is no comment and no fence, in whole percents."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / the number of classes named, if the right one is among them.

    A class whose name is a part of the right one's does not count as named.
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def numbers(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the answer."""
    found = re.findall(r"\d+", prediction)
    return found.count(answer.strip()) / len(found) if found else 0.0


def paragraph_number(prediction: str, answer: str) -> float:
    """`numbers` with the number of the paragraph, the answer being "Paragraph N"."""
    return numbers(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def letter(prediction: str, answer: str) -> float:
    """1 if the first of the letters A to D that stands alone is the answer."""
    found = re.search(r"\b[ABCD]\b", prediction)
    return float(found is not None and found.group() == answer.strip())


def percentage(prediction: str, answer: str) -> float:
    """2 ** (-10 * the distance of two percentages as fractions): "exponential similarity" (arXiv 2305.14196)."""
    shares = [re.search(r"\d+(?:\.\d+)?", text) for text in (prediction, answer)]
    if shares[0] is None or shares[1] is None:
        return 0.0
    return float(2 ** (-10 * abs(float(shares[0].group()) - float(shares[1].group())) / 100))


def order(prediction: str, answer: str) -> float:
    """Share of pairs that stand in the answer's order, 0 for what is no permutation of it: concordance (arXiv 2305.14196)."""
    found, wanted = (re.findall(r"\d+", text) for text in (prediction, answer))
    if sorted(found) != sorted(wanted) or len(wanted) < 2:
        return 0.0
    pairs = [found.index(first) < found.index(second) for first, second in combinations(wanted, 2)]
    return sum(pairs) / len(pairs)


def share_found(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the prediction, as RULER (arXiv 2404.06654) counts."""
    return sum(contains(prediction, answer) for answer in answers) / len(answers)


def _rouge(prediction: str, answer: str, kind: str) -> float:
    from rouge import Rouge

    try:
        return float(Rouge(metrics=[kind]).get_scores(prediction, answer)[0][kind]["f"])
    except (ValueError, RecursionError):  # nothing but blanks and dots, or a sentence without end: published as 0
        return 0.0
