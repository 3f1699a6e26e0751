from . import importers as importers
from .add_biases import with_biases as with_biases
from .card import Card as Card
from .card import write_card as write_card
from .plan_file import load_plan as load_plan
from .plan_file import save_plan as save_plan

__all__ = [
    "Card",
    "importers",
    "load_plan",
    "save_plan",
    "with_biases",
    "write_card",
]
