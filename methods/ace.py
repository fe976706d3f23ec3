"""ACE: a playbook of lessons in the prompt, grown by reflection. Nothing is trained; the playbook is the policy.

    python train.py config.yaml method=ace trees=out/quest out=out/ace
"""
import ranks
from config import Check, Config, within
from methods import rollouts as shared
from methods.rollouts import BUDGET, budget, waves
from run import Run, write_aside

KEYS = BUDGET + """
grpo_tasks: 16                # rollouts between two growths of the playbook (GRPO's groups a wave)
playbook_tokens: 160          # longest playbook
context: 1024                 # it stands before every episode
row_tokens: 1024
"""
CHECKS: list[Check] = [*shared.CHECKS, *within("grpo_tasks", 1, 1_000_000), *within("playbook_tokens", 0, 1_000_000),
                       ("warm_start", lambda v, s: not v, "does not go with method=ace")]


def check(cfg: Config) -> None:
    budget(cfg)


def train(run: Run, round_: int) -> None:
    """Agentic Context Engineering: generator, rollouts with the playbook in view; reflector, the policy's experience
    after each failure; curator, append what is new while there is room (cfg.playbook_tokens)."""
    cfg, chat = run.cfg, run.policy.chat
    playbook: list[str] = []
    reflecting = run.but(roots=1, attempts=1, max_depth=0, reflect_every=10**9)     # on failure only
    for trees in waves(reflecting, budget(cfg), cfg.grpo_tasks, reflect=True):
        lessons = [r.e for tree in trees for branch in tree.branches for r in branch.reflections if r.tau]
        for e in lessons:
            if e not in playbook and len(chat.ids("", "\n".join([*playbook, e]))) <= cfg.playbook_tokens:
                playbook.append(e)
        reflecting.playbook = "\n".join(playbook)      # in view from the next wave on
    if ranks.rank() == 0:
        write_aside(run.folder.path / "playbook.txt", "\n".join(playbook) + "\n")
    ranks.wait_for_all()
