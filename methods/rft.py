"""Rejection sampling fine-tuning: the whole budget goes into plain rollouts; SFT on the successful ones.

    python train.py config.yaml method=rft trees=out/quest out=out/rft
"""
from config import Config
from leafe import Tree
from methods.rollouts import BUDGET, CHECKS, budget, demonstrations, rollouts  # noqa: F401
from run import Run
from train import fit

KEYS = BUDGET + """
lr: 0.001                     # these two were chosen on the validation split (docs/tuning.md)
steps: 120
"""


def check(cfg: Config) -> None:
    budget(cfg)


def train(run: Run, round_: int) -> None:
    trees = [Tree(task) for task in run.train_tasks]
    rollouts(run, budget(run.cfg), trees)
    fit(run, round_, ("L_extra", "L_demonstrations"), demonstrations(run, trees))
