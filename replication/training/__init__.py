"""The LightningModule, the optimizers, the measuring, checkpoints, and the run itself."""
