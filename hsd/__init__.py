"""Train language models by Hindsight Self-Distillation; ``hsd --help`` lists the commands."""

__version__ = "0.1.0"
