"""ScienceWorld, the paper's, on its own package, each episode in a process of its own (scale/apart.py).

    pip install scienceworld                      and a Java runtime (java on the PATH)
    python envs.py scienceworld                   data=easy, or other simplifications of the package, comma-separated

Actions and observations are the package's own; the horizon of 100 is its envStepLimit.
"""
import os
import shutil
from functools import lru_cache

from config import UserError, installed
from envs import Env, Outcome


class ScienceWorld(Env):
    """Task ids: `<task>/<variation>`. The splits are the package's train, dev and test variations of its 30 tasks.
    Score: the package's, by 100; success is 100, and -100 (the wrong focus) ends an episode."""
    rules = ("you are in a house with a workshop and a greenhouse, and solve a task of elementary science. "
             "actions: look around, inventory, task, open OBJ, close OBJ, activate OBJ, deactivate OBJ, connect "
             "OBJ to OBJ, disconnect OBJ, use OBJ [on OBJ], look at OBJ, look in OBJ, read OBJ, move OBJ to OBJ,"
             " pick up OBJ, put down OBJ, pour OBJ into OBJ, dunk OBJ into OBJ, mix OBJ, go to LOC, teleport to "
             "LOC, eat OBJ, flush OBJ, focus on OBJ, wait, wait1. an ambiguous action gets a numbered list: "
             "answer with a number. answer with one action")
    max_turns = 100
    apart = True
    refusals = ("No known action matches", "Unknown action", "Ambiguous request", "It's not clear", "I'm not sure")

    def __init__(self, data: str = ""):
        package = installed("scienceworld", "scienceworld")
        if not shutil.which("java"):
            raise UserError("env: scienceworld needs a Java runtime; install one, like Debian's "
                            "default-jre-headless")
        # Without a fixed identity hash, the order of things and so the observations differ from run to run.
        os.environ["JDK_JAVA_OPTIONS"] = ("-XX:+UnlockExperimentalVMOptions -XX:hashCode=2 -XX:+UseSerialGC -Xmx192m "
                                          + os.environ.get("JDK_JAVA_OPTIONS", ""))
        self.env, self.easy = package.ScienceWorldEnv("", envStepLimit=10**6), data
        odd = [word for word in data.split(",") if word not in ("", "easy", *self.env.get_possible_simplifications())]
        if odd:
            raise UserError(f"data: scienceworld has no simplification {odd[0]!r}; there are easy, "
                            f"{', '.join(self.env.get_possible_simplifications())}")

    @lru_cache                                       # seconds, the first time
    def tasks(self, split: str) -> list[str]:
        pick = dict(train=self.env.get_variations_train, valid=self.env.get_variations_dev,
                    test=self.env.get_variations_test).get(split)
        found: list[list[str]] = []
        for name in self.env.get_task_names() if pick else []:
            self.env.load(name, 0, self._easy(name))
            found.append([f"{name}/{variation}" for variation in pick()])
        longest = max(map(len, found), default=0)        # the first of every task, then the second of every task, ...
        return [own[i] for i in range(longest) for own in found if i < len(own)]

    def _easy(self, name: str) -> str:
        """Tasks of electricity cannot be simplified by leaving it out."""
        electric = "power-component" in name or "conductivity" in name
        return ",".join(word for word in self.easy.split(",") if not (electric and word == "noElectricalAction"))

    def difficulty(self, task: str) -> str:
        return task.partition("/")[0]

    def reset(self, task: str) -> str:
        name, _, variation = task.partition("/")
        if name not in self.env.get_task_names() or not variation.isdecimal():
            raise UserError(f"scienceworld has no task {task!r}; ids look like boil/0")
        self.env.load(name, int(variation), self._easy(name))
        self.env.server.reset()
        self.left = self.max_turns
        return self.env.get_task_description() + "\n" + self.env.server.step("look around")

    def step(self, action: str) -> Outcome:
        self.left -= 1
        if "reset task" in action.lower():               # an action of the package, not of the world
            obs = "No known action matches that input."
        else:                                            # its own step() lists all admissible actions: slow
            obs = self.env.server.step(action)
        score = int(round(100 * self.env.server.getScore()))
        done = bool(self.env.server.getCompleted()) or score < 0 or self.left <= 0
        return Outcome(obs.strip(), max(0, score) / 100, done, score == 100, not obs.startswith(self.refusals))

    def actions(self) -> list[str]:
        return [action for action in self.env.get_valid_action_object_combinations() if "reset task" not in action]

    def close(self) -> None:
        self.env.close()
