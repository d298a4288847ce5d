"""The curves of an output folder in MLflow, a run a cell; the store is MLFLOW_TRACKING_URI, or sqlite:///mlflow.db."""

import os
import sys

import mlflow

from replication import Study

study = Study(sys.argv[1])
mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
mlflow.set_experiment(study.suite.name)
for (cell, arm, seed), curves in study.metrics().dropna().groupby(["cell", "arm", "seed"], observed=True):
    with mlflow.start_run(run_name=cell, tags={"arm": arm, "seed": str(seed)}):
        for step, at in curves.groupby("step"):
            mlflow.log_metrics(dict(zip(at.tag, at.value, strict=True)), step=step)
