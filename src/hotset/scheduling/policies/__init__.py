"""Scheduling policies: which waiting request goes to which GPU next. One file each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hotset.errors import UnknownNameError
from hotset.scheduling.policies.clockwork import Clockwork
from hotset.scheduling.policies.hotset import Hotset
from hotset.scheduling.policies.interface import Policy, PolicySettings
from hotset.scheduling.policies.lalb import Lalb
from hotset.scheduling.policies.lalb_o3 import LalbO3
from hotset.scheduling.policies.lb import Lb
from hotset.scheduling.policies.mqfq_sticky import MqfqSticky
from hotset.scheduling.policies.pow2_multiplex import Pow2Multiplex
from hotset.scheduling.policies.serverlessllm import ServerlessLlm

POLICIES: Mapping[str, Callable[[PolicySettings], Policy]] = {
    "lb": lambda _: Lb(),
    "lalb": lambda _: Lalb(),
    "lalb_o3": LalbO3,
    "hotset": Hotset,
    "mqfq_sticky": MqfqSticky,
    "pow2_multiplex": lambda _: Pow2Multiplex(),
    "clockwork": lambda _: Clockwork(),
    "serverlessllm": lambda _: ServerlessLlm(),
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """A fresh policy; ``UnknownNameError`` lists the known names."""
    try:
        factory = POLICIES[name]
    except KeyError:
        raise UnknownNameError("policy", name, tuple(POLICIES)) from None
    return factory(settings or PolicySettings())
