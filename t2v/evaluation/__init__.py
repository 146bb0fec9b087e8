"""The evaluation protocol (sections 4.1.1 and 4.2 of the paper). Knows no pipeline: it is handed a generate function."""

from t2v.evaluation.evaluator import Evaluator
from t2v.evaluation.protocol import Manifest, Protocol, Row, select
from t2v.evaluation.quick import QuickEvaluation
from t2v.evaluation.results import NotComparable, Results, compare, summary
from t2v.evaluation.scores import Score
from t2v.evaluation.videos import VideoFolder

__all__ = [
    "Evaluator",
    "Manifest",
    "NotComparable",
    "Protocol",
    "QuickEvaluation",
    "Results",
    "Row",
    "Score",
    "VideoFolder",
    "compare",
    "select",
    "summary",
]
