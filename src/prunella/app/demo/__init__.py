"""The main job on real data: prune, heal, prove and measure, in about a minute."""

from prunella.app.demo.run import run_demo as run_demo
