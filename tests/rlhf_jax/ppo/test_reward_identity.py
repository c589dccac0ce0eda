"""A changed reward function is another one; the same one is the same in every process."""

import functools
import os
import re
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.ppo.reward_identity import function_fingerprint

ROOT = Path(__file__).resolve().parent.parent.parent.parent

BASE = """
    import abc, dataclasses, functools, logging, re, string, typing
    import optax
    LOG = logging.getLogger("rewards")
    WORDS = {"sea", "wind"}
    def share(text):
        return sum(word in WORDS for word in text.split()) * SCALE
    SCALE = 2.0
    class Table:
        weights = {"a": 1}
        def __init__(self, factor):
            self.factor = factor
        def __call__(self, prompts, responses):
            return [self.factor * len(r) for r in responses]
        def score(self, prompts, responses):
            return [self.weights.get(r, 0.0) for r in responses]
    class Judge(abc.ABC):
        factor = 1
        @property
        def twice(self):
            return 2 * self.factor
        @functools.cached_property
        def start(self):
            return len(LOG.name)
        def __call__(self, prompts, responses):
            return [self.twice + self.start for r in responses]
    @dataclasses.dataclass(slots=True)
    class Slots:
        factor: int
        def __call__(self, prompts, responses):
            return [self.factor for r in responses]
    class Words(list):
        factor = 1
        def __init__(self, factor):
            self.own = factor
        def __call__(self, prompts, responses):
            return [self.factor * self.own for r in responses]
    class Pair(typing.NamedTuple):
        factor: int
        def __call__(self, prompts, responses):
            return [self.factor for r in responses]
    def scheduled(end):
        schedule = optax.linear_schedule(0, end, 10)
        return lambda prompts, responses: [schedule(5) for r in responses]
    def plain(prompts, responses, bonus=1.0, *, floor=-1):
        return [max(share(r) + bonus, floor) for r in responses]
    def around(limit):
        def inner(prompts, responses):
            return [min(len(r), limit) for r in responses]
        return inner
    def lower(prompts, responses):
        # a comment
        return [len([c for c in r if c in string.ascii_lowercase]) for r in responses]
"""
CHANGES = [
    ("the code", "plain", "max(share", "min(share"),
    ("a default", "plain", "bonus=1.0", "bonus=2.0"),
    ("a default by keyword", "plain", "floor=-1", "floor=-2"),
    ("a function that is called", "plain", "* SCALE", "/ SCALE"),
    ("a value that a called function reads", "plain", "SCALE = 2.0", "SCALE = 3.0"),
    ("a set", "plain", '{"sea", "wind"}', '{"sea", "rain"}'),
    ("a variable around it", "around(3)", "around(3)", "around(4)"),
    ("the argument of a partial", "functools.partial(plain, bonus=3)", "bonus=3", "bonus=4"),
    ("the object of a method", "Table(2).score", '{"a": 1}', '{"a": 2}'),
    ("what a callable object holds", "Table(2)", "Table(2)", "Table(3)"),
    ("the method of a callable object", "Table(2)", "self.factor * len", "self.factor + len"),
    ("a property", "Judge()", "2 * self.factor", "3 * self.factor"),
    ("a cached property", "Judge()", "len(LOG.name)", "-len(LOG.name)"),
    ("what slots hold", "Slots(2)", "Slots(2)", "Slots(3)"),
    ("what a list of one's own holds", "Words(2)", "Words(2)", "Words(3)"),
    ("the class of a list of one's own", "Words(2)", "self.factor * self", "self.factor - self"),
    ("a named tuple", "Pair(2)", "Pair(2)", "Pair(3)"),
    ("what an installed function was made with", "scheduled(3)", "scheduled(3)", "scheduled(4)"),
    ("one of two lambdas in a line", "[lambda p, r: [1.0], lambda p, r: [2.0]][0]", "][0]", "][1]"),
]


def told(code, expression):
    space = types.ModuleType("rewards_of_mine").__dict__
    exec(textwrap.dedent(code), space)
    return function_fingerprint(eval(expression, space))


@pytest.mark.parametrize(("what", "expression", "old", "new"), CHANGES, ids=lambda x: str(x)[:20])
def test_a_function_that_changed_is_another_one(what, expression, old, new):
    assert old in BASE + expression
    changed = BASE.replace(old, new), expression.replace(old, new)
    assert told(BASE, expression) == told(BASE, expression) != told(*changed), what


def test_comments_and_other_functions_do_not_matter():
    assert told(BASE, "lower") == told(BASE.replace("# a comment", "# another"), "lower")
    assert told(BASE, "lower") == told(BASE.replace("SCALE = 2.0", "SCALE = 3.0"), "lower")


def test_another_process_tells_the_same():
    """Sets are in another order there."""
    code = textwrap.dedent(BASE) + (
        "from rlhf_jax.ppo.reward_identity import function_fingerprint\n"
        "print(function_fingerprint(plain), function_fingerprint(Table(2).score))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout  # fmt: skip
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop().split()) == 2


def test_arrays_patterns_and_installed_functions_are_read():
    def of(weights, pattern, call=np.mean):
        return lambda prompts, responses: [call(weights) * len(re.findall(pattern, responses[0]))]

    first = function_fingerprint(of(np.ones(3), "a"))
    assert first == function_fingerprint(of(np.ones(3), "a"))
    others = [of(np.zeros(3), "a"), of(jnp.ones(3), "b"), of(np.ones(3), "a", np.sum)]
    others += [of(np.ones(3), re.compile("a")), functools.lru_cache(of(np.ones(3), "a"))]
    assert len({first, *map(function_fingerprint, others)}) == 6


def test_a_function_that_calls_itself_is_told():
    def depth(prompts, responses):
        return depth(prompts, responses[1:]) if responses else []

    assert function_fingerprint(depth) == function_fingerprint(depth)


def test_what_cannot_be_told_apart_is_refused_by_name():
    lock = threading.Lock()

    def guarded(prompts, responses):
        with lock:
            return [0.0] * len(responses)

    with pytest.raises(UserError, match="reads lock, .* of type lock, .*reward_name="):
        function_fingerprint(guarded)


def test_a_module_of_ones_own_is_read_with_those_that_it_takes_from(tmp_path):
    """Those of its package, and others of one's own beside it."""
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("from .parts import score\nimport my_tables\n")
    (package / "parts.py").write_text("from my_tables import WORDS\ndef score(x): return len(x)\n")
    (tmp_path / "my_tables.py").write_text("WORDS = 1\nimport my_rewards\n")
    code = (
        "import my_rewards; from rlhf_jax.ppo.reward_identity import function_fingerprint\n"
        "def reward(p, r): return [my_rewards.score(x) for x in r]\n"
        "print(function_fingerprint(reward))"
    )

    def told():
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "JAX_PLATFORMS": "cpu"},
        ).stdout  # fmt: skip

    first = told()
    (package / "parts.py").write_text("def score(x): return -99 * len(x)\n")
    second = told()
    (tmp_path / "my_tables.py").write_text("WORDS = 2\n")
    assert len({first, second, told()}) == 3
