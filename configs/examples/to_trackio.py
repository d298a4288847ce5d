"""The curves of an output folder in trackio, a run a cell; they lie in TRACKIO_DIR, `trackio show` draws them."""

import sys

import trackio

from replication import Study

study = Study(sys.argv[1])
for (cell, arm, seed), curves in study.metrics().dropna().groupby(["cell", "arm", "seed"], observed=True):
    trackio.init(project=study.suite.name, name=cell, group=arm, config={"arm": arm, "seed": int(seed)})
    for step, at in curves.groupby("step"):
        trackio.log(dict(zip(at.tag, at.value, strict=True)), step=int(step))
    trackio.finish()
