"""The curves of an output folder in Weights & Biases, a run a cell. WANDB_MODE=offline keeps them on this machine."""

import sys

import wandb

from replication import Study

study = Study(sys.argv[1])
for (cell, arm, seed), curves in study.metrics().dropna().groupby(["cell", "arm", "seed"], observed=True):
    with wandb.init(project=study.suite.name, name=cell, group=arm, config={"arm": arm, "seed": seed}) as run:
        for step, at in curves.groupby("step"):
            run.log(dict(zip(at.tag, at.value, strict=True)), step=step)
