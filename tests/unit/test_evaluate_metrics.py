"""Metrics against values worked out by hand and examples from the papers that define them."""

import pytest

from kvprofile.evaluate import metrics


def test_normalising_drops_case_punctuation_and_articles():
    assert metrics.normalized("The  U.S.A.,\n and an Apple!") == "usa and apple"
    assert metrics.normalized("theatre a la carte") == "theatre la carte"


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat sat.", "cat sat down", 0.8),  # 2 common of 2 and 3 words: 2 * 2 / 5
        ("down down down", "down down", 0.8),  # words count as often as they occur: 2 common of 3 and 2
        ("Paris", "paris!", 1.0),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "a", 0.0),  # nothing left of either
    ],
)
def test_f1(prediction, answer, expected):
    assert metrics.f1(prediction, answer) == pytest.approx(expected)


def test_rouge_l_on_the_example_of_its_paper():
    """Lin 2004, section 3.1: "police killed the gunman" against its candidates; F at beta 1."""
    assert metrics.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4, abs=1e-6)
    assert metrics.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4, abs=1e-6)
    assert metrics.rouge_l("police the gunman", "police killed the gunman") == pytest.approx(6 / 7, abs=1e-6)


def test_rouge_l_of_nothing():
    assert metrics.rouge_l("", "police killed the gunman") == 0
    assert metrics.rouge_l(" . ", "police killed the gunman") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("abcd", "bcde", 0.75),  # the example of difflib's documentation
        ("```python\n# a comment\n// another\n    x = 1\ny = 2", "    x = 1", 1.0),
        ("\n\nx = 1", "x = 1", 1.0),
        ("abc", "abd", 0.67),  # 2 * 2 / 6, in whole percents
        ("# nothing but comments", "x = 1", 0.0),
        ("", "x = 1", 0.0),
    ],
)
def test_edit_similarity_of_the_first_line_of_code(prediction, answer, expected):
    assert metrics.edit_similarity(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Other location", "Other location", 1.0),
        ("It is a City, or a Country", "City", 0.5),
        ("It is a City, or a Country", "Food", 0.0),
        ("Place", "Other Place", 0.0),
        ("Other Place", "Other Place", 1.0),  # "Place" is a part of the right class, not another class
        ("none of them", "City", 0.0),
    ],
)
def test_classification(prediction, answer, expected):
    classes = ("Place", "Other Place", "Other location", "City", "Country", "Food")
    assert metrics.classification(prediction, answer, classes) == expected


def test_numbers_and_paragraphs():
    assert metrics.numbers("7 or 8, I think 7", "7") == pytest.approx(2 / 3)
    assert metrics.numbers("seven", "7") == 0
    assert metrics.paragraph_number("Paragraph 12", "Paragraph 12") == 1
    assert metrics.paragraph_number("Paragraph 1 and Paragraph 12", "Paragraph 12") == 0.5
    assert metrics.paragraph_number("Paragraph 1", "Paragraph 12") == 0


def test_containing():
    assert metrics.contains("He is JENGO Mwamba.", "Jengo Mwamba") == 1
    assert metrics.contains("He is Jengo.", "Jengo Mwamba") == 0
    assert metrics.share_found("1, 2 and 4", ("1", "2", "3", "4")) == 0.75


def test_the_scores_of_zeroscrolls():
    # ROUGE-1 3/4, ROUGE-2 1/3 ("the gunman"), ROUGE-L 3/4.
    expected = (0.75 * (1 / 3) * 0.75) ** (1 / 3)
    assert metrics.rouge_mean("police kill the gunman", "police killed the gunman") == pytest.approx(expected, abs=1e-5)
    assert metrics.letter("The answer is (B), not A.", "B") == 1
    assert metrics.letter("Banana or C", "B") == 0
    assert metrics.letter("none", "B") == 0
    assert metrics.percentage("60%", "70%") == pytest.approx(0.5)
    assert metrics.percentage("it is 70.0 percent", "70%") == 1
    assert metrics.percentage("most", "70%") == 0
    # The pairs (2,4), (2,3), (1,4), (1,3) of six stand as in the answer.
    assert metrics.order("1, 2, 3, 4", "2, 1, 4, 3") == pytest.approx(4 / 6)
    assert metrics.order("4 3 2 1", "1 2 3 4") == 0
    assert metrics.order("1 2 3", "1 2 3 4") == 0
