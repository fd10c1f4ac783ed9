"""Attention heads and MLP units: gates, ranking, selection, and their physical removal."""

from ovit_engine.structured.gates import GateSite, find_sites, install, installed, live_mask, set_gate, uninstall
from ovit_engine.structured.ranking import RANKERS, Ranker, Statistics, find_ranker, register_ranker
from ovit_engine.structured.recording import GateScores
from ovit_engine.structured.shrink_model import harvest, manifest_of, rebuild, shrink

__all__ = [
    "RANKERS",
    "GateScores",
    "GateSite",
    "Ranker",
    "Statistics",
    "find_ranker",
    "find_sites",
    "harvest",
    "install",
    "installed",
    "live_mask",
    "manifest_of",
    "rebuild",
    "register_ranker",
    "set_gate",
    "shrink",
    "uninstall",
]
