"""Training: a config, a loop, checkpoints that resume."""

from .config import TrainConfig, load_config
from .loop import train
from .run import load_run

__all__ = ["TrainConfig", "load_config", "load_run", "train"]
