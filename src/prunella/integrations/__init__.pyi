from .lightning import LightningPruning as LightningPruning
from .session import Distillation as Distillation
from .session import Gradual as Gradual
from .trainer import TrainerPruning as TrainerPruning
from .ultralytics import UltralyticsPruning as UltralyticsPruning

__all__ = ["Distillation", "Gradual", "LightningPruning", "TrainerPruning", "UltralyticsPruning"]
