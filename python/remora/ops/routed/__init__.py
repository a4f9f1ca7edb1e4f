"""Mixture-of-Memories: a router, and recurrences over the tokens it sends to each memory."""

from remora.ops.routed import registration as _registration  # noqa: F401
from remora.ops.routed.functional import (
    MomRoute,
    RoutePlan,
    mom_combine,
    mom_gated_delta_rule,
    mom_gated_delta_rule_step,
    mom_route,
    mom_simple_gla,
    mom_simple_gla_step,
    route_plan,
)

__all__ = [
    "MomRoute",
    "RoutePlan",
    "mom_combine",
    "mom_gated_delta_rule",
    "mom_gated_delta_rule_step",
    "mom_route",
    "mom_simple_gla",
    "mom_simple_gla_step",
    "route_plan",
]
