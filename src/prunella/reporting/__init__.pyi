from .frontier import Frontier as Frontier
from .frontier import write_frontier as write_frontier
from .page import write_page as write_page
from .report import Curve as Curve
from .report import Report as Report

__all__ = [
    "Curve",
    "Frontier",
    "Report",
    "write_frontier",
    "write_page",
]
