"""Several processes share a matrix through Lightning's own DDP: each purifies every n-th chunk.

Chunks are files in the run folder, so nothing travels between the processes: what is gathered is the folder. The parent
then finishes the cells. A chunk's result does not depend on who made it.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dipguard.evaluation.matrix import Matrix, prepare_matrix
from dipguard.evaluation.matrix_run import attacked_images, run_matrix


class _Share(pl.LightningModule):
    """Runs one process's share; made from the settings, since defences with open libraries do not travel."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.settings, self.path = matrix.config, matrix.folder.path

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """The share of this process."""
        share = (self.global_rank, self.trainer.world_size)
        with torch.inference_mode(False):
            run_matrix(prepare_matrix(self.settings, self.path), share=share)


def run_sharded(matrix: Matrix) -> None:
    """Purify all chunks with ``processes`` processes, on GPUs where the matrix runs on one, else on CPUs."""
    processes = matrix.config.processes
    for column in matrix.config.columns:  # once, before they are shared out
        attacked_images(matrix, column)
    trainer = pl.Trainer(
        accelerator="gpu" if matrix.device.type == "cuda" else "cpu",
        devices=processes,
        strategy="ddp_spawn",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(_Share(matrix), DataLoader(range(processes), batch_size=1), return_predictions=False)  # type: ignore[arg-type]
