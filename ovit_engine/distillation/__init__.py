"""A teacher and the loss terms that compare a student with it."""

from ovit_engine.distillation.losses import hard_loss, soft_loss, token_loss
from ovit_engine.distillation.teacher import OutputPair, Teacher, logits_of

__all__ = ["OutputPair", "Teacher", "hard_loss", "logits_of", "soft_loss", "token_loss"]
