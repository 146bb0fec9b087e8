"""TensorBoard beyond scalars: moving pictures (its own `add_video` needs moviepy) and text."""

from __future__ import annotations

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from t2v.video import gif_bytes


def add_video(trainer: Trainer, tag: str, frames: Tensor, fps: float) -> None:
    """frames uint8 (f h w c), stored as a GIF in an image summary, which TensorBoard shows moving."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _, height, width, _ = frames.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames, fps))
            writer = logger.experiment._get_file_writer()
            writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), trainer.global_step)


def add_text(trainer: Trainer, tag: str, text: str) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, trainer.global_step)
