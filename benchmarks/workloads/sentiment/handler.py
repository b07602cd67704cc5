"""Tells whether texts are in favour, against or neither, with VADER's lexicon and rules.

The event is ``{"texts": [text, …]}``. A score goes from -1 to 1; VADER's authors call a text neutral within
0.05 of zero.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

NEUTRAL = 0.05
LABELS = ("positive", "neutral", "negative")


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Label and score of each text, and how many there are of each label."""
    texts = event.get("texts") if isinstance(event, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return {"error": "expected texts, a list of text"}
    judged = [judge(text) for text in texts]
    counts = Counter(one["label"] for one in judged)
    return {"texts": judged, "counts": {label: counts[label] for label in LABELS}}


def judge(text: str) -> dict[str, Any]:
    """Label and score of one text."""
    score = _analyzer().polarity_scores(text)["compound"]
    label = "positive" if score >= NEUTRAL else "negative" if score <= -NEUTRAL else "neutral"
    return {"label": label, "score": round(score, 2)}


@cache
def _analyzer() -> Any:
    return SentimentIntensityAnalyzer()  # reads the lexicon, from the distribution's own folder
